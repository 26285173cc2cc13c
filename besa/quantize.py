"""Joint compression: min-max quantization of weights with learnable clipping (paper Eqn. 7), and its low-bit state.

    Q(W) = clamp(round(W / h) + z, 0, 2^N - 1)
    h = (gamma1 max W - gamma0 min W) / (2^N - 1),   z = -round(gamma0 min W / h)

over the columns that share a scale h and a zero-point z, and over 0, which so has a code. The weight that stands for
code Q is h (Q - z). Weights are quantized first and pruned then: a pruned weight has the code z and is exactly 0.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import pruned_projections
from besa.machine.fields import Count, Positive, check_fields, documented
from besa.machine.files import replacing
from besa.masks import open_bits, pack_bits, unpack_bits

CLIPPING_START = 4.0
"""Clipping logits before training: gamma = sigmoid(4) = 0.98."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A projection in N bits."""

    codes: UInt8[Tensor, "rows columns"]
    """Q, from 0 to 2^N - 1."""
    scale: Float16[Tensor, "rows groups"]
    """h."""
    zero_point: UInt8[Tensor, "rows groups"]
    """z, a code."""
    bits: int
    keep_mask: Bool[Tensor, "rows columns"] | None = None
    """True = keep; None where nothing is pruned. A kept weight may have the code z too, and then is 0 by rounding."""

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """h (Q - z), computed in float32 and rounded once to `dtype`."""
        steps = self._grouped(self.codes).float() - self.zero_point[..., None]
        return (self.scale.float()[..., None] * steps).view(self.codes.shape).to(dtype)

    def pruned(self, keep_mask: Bool[Tensor, "rows columns"]) -> "QuantizedWeight":
        """The same with zeros where nothing is kept."""
        if keep_mask.all():
            return self
        zeros = self.zero_point.repeat_interleave(self.codes.shape[1] // self.scale.shape[1], dim=1)
        return replace(self, codes=torch.where(keep_mask, self.codes, zeros), keep_mask=keep_mask)

    def cpu(self) -> "QuantizedWeight":
        """The same in host memory."""
        keep_mask = None if self.keep_mask is None else self.keep_mask.cpu()
        return QuantizedWeight(self.codes.cpu(), self.scale.cpu(), self.zero_point.cpu(), self.bits, keep_mask)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.view(*self.scale.shape, -1)  # (rows, groups, columns of a group)


@documented
@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Asymmetric min-max quantization of the weights of every projection."""

    bits: Literal[2, 3, 4, 8] = 4
    """N, of each code."""
    group_size: Count | None = None
    """Columns that share a scale and a zero-point; None: a whole row (per channel)."""
    lr: Positive = 0.2
    """Adam's step size for the clipping logits, where they are learned: 0.2 left the least error of the first blocks of
    SmolLM2-135M in 32 steps, of 0.01 to 0.5; the paper names none."""

    __post_init__ = check_fields

    def check(self, model: PreTrainedModel, ignore: Sequence[str] = ()) -> None:
        """Raise ValueError where the groups do not divide the columns of a projection that is not ignored."""
        for (index, name), projection in pruned_projections(model, ignore).items():
            columns = projection.weight.shape[1]
            if columns % (self.group_size or columns):
                raise ValueError(
                    f"block {index}, {name}: {columns} columns do not divide into groups of {self.group_size}; "
                    "take a group_size that divides them, None for whole rows, or ignore the projection"
                )

    def clipping_shape(self, weight: Float[Tensor, "rows columns"]) -> tuple[int, int, int]:
        """Of the clipping logits: (2, rows, groups), gamma0 and gamma1."""
        rows, columns = weight.shape
        return 2, rows, columns // (self.group_size or columns)

    def fake(
        self, weight: Float[Tensor, "rows columns"], clipping: Float32[Tensor, "2 rows groups"]
    ) -> Float[Tensor, "rows columns"]:
        """h (Q(W) - z), differentiable in the clipping logits: rounding counts as the identity (straight through)."""
        scale, lowest = self._grid(weight, clipping)
        grouped = weight.float().view(*scale.shape, -1)
        scale, zero_point = scale[..., None], _round(-lowest / scale)[..., None]
        codes = (_round(grouped / scale) + zero_point).clamp(0, self.levels)
        return (scale * (codes - zero_point)).view(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def codes(
        self, weight: Float[Tensor, "rows columns"], clipping: Float32[Tensor, "2 rows groups"] | None = None
    ) -> QuantizedWeight:
        """Q(W) of Eqn. 7; without clipping gamma0 = gamma1 = 1: plain min-max. Scales are rounded to float16 first."""
        scale, lowest = self._grid(weight, clipping)
        scale = scale.half().clamp_min(2.0**-24)
        zero_point = (-lowest / scale.float()).round().clamp(0, self.levels)
        grouped = weight.float().view(*scale.shape, -1)
        codes = ((grouped / scale.float()[..., None]).round() + zero_point[..., None]).clamp(0, self.levels)
        return QuantizedWeight(codes.view(weight.shape).byte(), scale, zero_point.byte(), self.bits)

    def most_bytes(self, weight: Float[Tensor, "rows columns"]) -> int:
        """The most that `save_quantized` writes of a projection."""
        _, rows, groups = self.clipping_shape(weight)
        return weight.numel() * (1 + self.bits) // 8 + 3 * rows * groups

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    def _grid(self, weight: Tensor, clipping: Tensor | None) -> tuple[Tensor, Tensor]:
        """h and gamma0 min W, (rows, groups); 0 lies in the range, so that what is pruned has a code."""
        grouped = weight.float().view(*self.clipping_shape(weight)[1:], -1)
        lowest, highest = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        if clipping is not None:
            gamma = clipping.sigmoid()
            lowest, highest = gamma[0] * lowest, gamma[1] * highest
        return ((highest - lowest) / self.levels).clamp_min(1e-8), lowest


def _round(x: Tensor) -> Tensor:
    """Round to the nearest integer; the gradient is the identity's."""
    return x + (x.round() - x).detach()


def save_quantized(quantized: dict[tuple[int, str], QuantizedWeight], path: str | Path) -> float:
    """Write what `Report.quantized` holds as one safetensors file of packed bits; returns bits per weight.

    `QuantizedFiles` reads them back.

    By projection (`3.self_attn.q_proj`): where something is pruned the keep-mask, a bit per weight; the codes of the
    kept weights, N bits each; scales and zero-points. Bits per weight counts all of them, as stored.

    Raises:
        ValueError: nothing is quantized.
    """
    if not quantized:
        raise ValueError("nothing is quantized: prune with quantize=besa.Quantize()")
    tensors, shapes = {}, {}
    for (block, name), weight in quantized.items():
        key = f"{block}.{name}"
        shapes[key] = [*weight.codes.shape, weight.bits]
        tensors |= {f"{key}.{part}": value for part, value in _pack(weight).items()}
    with replacing(Path(path)) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"shapes": json.dumps(shapes)})
    stored = sum(tensor.nbytes for tensor in tensors.values())
    return 8 * stored / sum(weight.codes.numel() for weight in quantized.values())


class QuantizedFiles(Mapping[tuple[int, str], QuantizedWeight]):
    """What `save_quantized` wrote into some files, by block and projection; read when it is asked for."""

    def __init__(self, *paths: str | Path) -> None:
        self._found: dict[tuple[int, str], tuple[str | Path, tuple[int, ...]]] = {}
        for path in paths:
            with open_bits(path) as (_, shapes):
                for key, shape in shapes.items():
                    block, _, name = key.partition(".")
                    self._found[int(block), name] = path, shape

    def __getitem__(self, key: tuple[int, str]) -> QuantizedWeight:
        path, shape = self._found[key]
        with open_bits(path) as (file, _):
            return _unpack(file, f"{key[0]}.{key[1]}", *shape)

    def __contains__(self, key: object) -> bool:
        return key in self._found  # Mapping's own reads it

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(sorted(self._found))

    def __len__(self) -> int:
        return len(self._found)


def _pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    kept = {} if weight.keep_mask is None else {"kept": pack_bits(weight.keep_mask)}
    codes = weight.codes.flatten() if weight.keep_mask is None else weight.codes[weight.keep_mask]
    bits = np.unpackbits(codes.numpy()[:, None] << (8 - weight.bits), axis=1, count=weight.bits)
    return kept | {
        "codes": torch.from_numpy(np.packbits(bits)),
        "scale": weight.scale,
        "zero_point": weight.zero_point,
    }


def _unpack(file: safetensors.safe_open, key: str, rows: int, columns: int, bits: int) -> QuantizedWeight:
    read = lambda part: file.get_tensor(f"{key}.{part}")
    scale, zero_point = read("scale"), read("zero_point")
    keep_mask = unpack_bits(read("kept"), rows, columns) if f"{key}.kept" in file.keys() else None  # noqa: SIM118
    n_kept = rows * columns if keep_mask is None else int(keep_mask.sum())
    packed = read("codes").numpy()
    if len(packed) != -(-n_kept * bits // 8):  # numpy would fill it up
        raise ValueError(f"{len(packed)} bytes of codes, where {n_kept} weights have {bits} bits each")
    unpacked = np.unpackbits(packed, count=n_kept * bits).reshape(n_kept, bits)
    values = torch.from_numpy(np.packbits(unpacked, axis=1)[:, 0] >> (8 - bits))
    codes = zero_point.repeat_interleave(columns // scale.shape[1], dim=1)
    codes = values.view(rows, columns) if keep_mask is None else codes.masked_scatter(keep_mask, values)
    return QuantizedWeight(codes, scale, zero_point, bits, keep_mask)
