"""Pruned projections that stay packed: a bit per weight and the values that survived, multiplied as they are.

Layout of a projection of `rows` x `columns`; every tensor is contiguous and little-endian:

- `mask`, uint8 (rows, 8 ceil(columns / 64)): bit c % 8 of byte c // 8 says whether column c is kept; bits beyond the
  last column are 0.
- `values`: what is kept, row after row, then 64 zeros, so that a wide load at the end stays inside. Either numbers in
  the weight's own precision, or codes Q of `Quantize`: of 8 bits one a byte, from 0 to 255 (the tensor's dtype, int8,
  only tells them from the others); of 2 to 4 bits as uint8, two a byte, the first in the lower half, and each 64
  columns (8 bytes of the mask) start a new byte.
- `starts`, int64 (rows + 1,): the index in `values` where each row starts, and where the last one ends.
- `scale`, float16, and `zero_point`, uint8, both (rows, groups), with codes: a weight of column c is
  scale (Q - zero_point) of group c groups // columns, computed in float32 and rounded once.
- `bias`, (rows,), where there is one.
"""

import contextlib
import functools
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa import packed_kernels as kernels
from besa.decoder import find_blocks, projections
from besa.machine.fields import checked
from besa.machine.files import cache_folder, write_text
from besa.machine.memory import prefer_large_pages
from besa.machine.threads import over_rows
from besa.masks import pack_bits, slices
from besa.packed_files import keep_packed_when_saved, packed_projections
from besa.quantize import QuantizedWeight
from besa.report import Masks

PADDING = 64
"""Zeros behind the last value."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TENSORS = "mask", "starts", "values", "scale", "zero_point", "bias"
MOST_TILED = 512
"""Tokens whose tiles and sums stay in a cache."""
SCRATCH, BLOCK = 2**22, 256
"""Weights that are dense at a time while many tokens are multiplied: few enough for a cache, in blocks of rows."""


class PackedLinear(nn.Module):
    """A linear map whose pruned weights take one bit each; what it computes is `nn.Linear`'s, within rounding.

    Made by `from_linear` or `from_quantized`. One token is multiplied by the packed rows as they are. Several take what
    is fastest here: that, tiles of the rows made dense in a cache, or slices of rows made dense for torch's product.
    Gradients reach the inputs; the weights are not trained.
    """

    def __init__(
        self,
        in_features: int,
        dtype: torch.dtype,
        mask: Tensor,
        starts: Tensor,
        values: Tensor,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Of tensors in this file's layout; `dtype` is that of inputs, outputs and of the weights `unpack` makes.

        Raises:
            ValueError: they do not fit together; above all, a mask and counts that disagree.
        """
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, len(mask), dtype
        for name, tensor in zip(TENSORS, (mask, starts, values, scale, zero_point, bias), strict=True):
            self.register_buffer(name, tensor)
        self._seen, self._held, self._arrays, self._found = [], [], (), {}
        if not mask.is_meta:
            self.check()
        if kernels.instructions() == "none":
            _tell_that_nothing_is_faster()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, keep_mask: Bool[Tensor, "rows columns"] | None = None) -> "PackedLinear":
        """Pack a projection; what is not kept becomes 0.

        Args:
            keep_mask: True = keep; None: what is not exactly 0. A pruned -0 comes back as 0.

        Raises:
            ValueError: the weight is not in memory, of another precision than 16 or 32 bits, or of another shape than
                the mask.
        """
        weight = linear.weight.detach()
        if weight.dtype not in DTYPES or weight.is_meta:
            raise ValueError(
                f"a weight of {weight.dtype} on {weight.device} cannot be packed; load it in one of {DTYPES}"
            )
        keep = weight != 0 if keep_mask is None else _fitting(keep_mask, weight)
        kept = [rows[mask] for rows, mask in zip(slices(weight), slices(keep), strict=True)]
        values = torch.cat([*kept, weight.new_zeros(PADDING)])
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(weight.shape[1], weight.dtype, _mask(keep), _starts(keep.sum(1)), values, bias=bias)

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        keep_mask: Bool[Tensor, "rows columns"] | None,
        dtype: torch.dtype,
        bias: Float[Tensor, "rows"] | None = None,
    ) -> "PackedLinear":
        """Pack a jointly pruned and quantized projection: the codes of what is kept.

        Args:
            keep_mask: True = keep; None: the codes that do not stand for 0.
            dtype: of inputs and outputs.

        Raises:
            ValueError: dtype has not 16 or 32 bits, or the mask is of another shape.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not one of {DTYPES}")
        codes, columns = quantized.codes, quantized.codes.shape[1]
        zeros = quantized.zero_point.repeat_interleave(columns // quantized.scale.shape[1], dim=1)
        keep = codes != zeros if keep_mask is None else _fitting(keep_mask, codes)
        kept = [rows[mask] for rows, mask in zip(slices(codes), slices(keep), strict=True)]
        if quantized.bits < 8:
            kept = [_in_pairs(rows, mask) for rows, mask in zip(kept, slices(keep), strict=True)]
        values, mask = torch.cat([*kept, codes.new_zeros(PADDING)]), _mask(keep)
        values = values.view(torch.int8) if quantized.bits == 8 else values
        starts = _starts(_sizes(mask, values.dtype)).to(codes.device)
        scales = quantized.scale.contiguous(), quantized.zero_point.contiguous()
        return cls(columns, dtype, mask, starts, values, *scales, None if bias is None else bias.detach().clone())

    def unpack(self) -> nn.Linear:
        """The dense projection: the bits that were packed."""
        linear = nn.Linear(1, 1, bias=self.bias is not None, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = nn.Parameter(self.dense())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    @torch.no_grad()
    def dense(self, start: int = 0, end: int | None = None, out: Tensor | None = None) -> Float[Tensor, "rows columns"]:
        """Rows from `start` to `end` of the dense weight.

        Args:
            out: room for as many rows of 64 ceil(columns / 64) elements; None: new memory.
        """
        self.check()
        end = self.out_features if end is None else end
        shape = end - start, 8 * self.mask.shape[1]
        room = self.values.new_empty(shape, dtype=self.dtype) if out is None else out[: math.prod(shape)].view(shape)
        if self._is_compiled():
            self._unpack_compiled(start, end, room)
        else:
            step = max(1, 2**22 // shape[1])  # a mask of whole bytes and indices beside it: little at a time
            for first in range(start, end, step):
                last = min(first + step, end)
                room[first - start : last - start, : self.in_features] = self._unpack_plain(first, last)
        return room[:, : self.in_features].contiguous() if out is None else room[:, : self.in_features]

    @torch.compiler.disable  # its products are compiled already, and read memory that a compiler only imagines
    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        """W x + b."""
        if x.requires_grad and torch.is_grad_enabled():
            return nn.functional.linear(x, self.dense(), self.bias)
        tokens = x.reshape(-1, self.in_features)
        self.check()
        compiled = x.dtype == self.dtype and self._is_compiled() and len(tokens) > 0
        name = "dense" if not compiled else "packed" if len(tokens) == 1 else self._fastest(len(tokens))
        out = self._products()[name](tokens)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def extra_repr(self) -> str:
        kind = self.dtype if self.scale is None else f"{8 if self.values.dtype == torch.int8 else 4}-bit codes"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def _multiply_packed(self, tokens: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Passes over the packed rows, for up to 16 tokens each."""
        *rows, bias, values = self._arrays
        n = min(kernels.MOST_TOKENS, 1 << (len(tokens) - 1).bit_length())  # compiled for 1, 2, 4, 8 and 16
        n_inputs = -(-len(tokens) // n) * n
        xs, sums = self._inputs(tokens, n_inputs)
        out = torch.empty(n_inputs, self.out_features, dtype=self.dtype)
        by_row = _numpy(out).T
        for first in range(0, n_inputs, n):
            some = slice(first, first + n)
            inputs = kernels.permutations(), tuple(xs[some]), None if sums is None else sums[some]
            args = *rows, bias, by_row[:, some], values
            work = self.in_features * self.out_features
            over_rows(kernels.multiply, self.out_features, *args, *inputs, work=work)
        return out[: len(tokens)]

    def _multiply_tiles(self, tokens: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Passes over the packed rows, dense a few at a time, for up to `MOST_TILED` tokens each."""
        *rows, bias, values = self._arrays
        out = torch.empty(len(tokens), self.out_features, dtype=self.dtype)
        for first in range(0, len(tokens), MOST_TILED):
            xs = self._tiles(tokens[first : first + MOST_TILED])
            few = len(xs) == 1  # a first-level cache holds two tiles' rows and these, a second-level one the rest
            sizes = (32, 8 if self.scale is None else 4) if few else (256, 4)
            args = *rows, bias, _numpy(out[first : first + MOST_TILED]).T, values
            inputs = kernels.tile_shapes(), xs, (0,) * xs.shape[1], *sizes
            work = self.in_features * self.out_features * len(xs)
            over_rows(kernels.multiply_tiles, self.out_features, *args, *inputs, work=work)
        return out

    def _tiles(self, tokens: Float[Tensor, "tokens columns"]) -> np.ndarray:
        """Inputs as tile registers take them: pairs of columns, 16 tokens wide."""
        columns, lanes = 8 * self.mask.shape[1], 1 if len(tokens) <= kernels.TILE else 2
        n_passes = -(-len(tokens) // (lanes * kernels.TILE))
        room = columns - self.in_features, n_passes * lanes * kernels.TILE - len(tokens)
        tokens = nn.functional.pad(tokens, (0, room[0], 0, room[1])) if any(room) else tokens.contiguous()
        pairs = tokens.detach().view(torch.uint32).view(n_passes, lanes, kernels.TILE, columns // 2)
        return pairs.transpose(2, 3).contiguous().numpy()

    def _multiply_dense(self, tokens: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Slices of rows, unpacked one after the other into the same memory."""
        columns = 8 * self.mask.shape[1]
        step = min(self.out_features, max(1, SCRATCH // columns // BLOCK) * BLOCK)
        scratch, outs = _scratch(step * columns, self.dtype, self.mask.device), []
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            bias = None if self.bias is None else self.bias[start:end]
            outs.append(nn.functional.linear(tokens, self.dense(start, end, scratch), bias))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _inputs(self, tokens: Tensor, n_inputs: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Inputs as the kernel reads them, with zeros up to whole words and `n_inputs`; and what codes need of them."""
        is_code, n_words = self.scale is not None, self.mask.shape[1] // 8
        if kernels.instructions() != "avx512" or self.dtype != torch.bfloat16 or self.values.dtype == torch.int8:
            tokens, is_code = tokens.float(), False
        if is_code:
            return kernels.inputs_of_codes(_numpy(tokens), n_inputs, n_words, self.scale.shape[1])
        room = n_words * kernels.WORD - self.in_features, n_inputs - len(tokens)
        tokens = nn.functional.pad(tokens, (0, room[0], 0, room[1])) if any(room) else tokens.contiguous()
        return _numpy(tokens), None

    def _unpack_compiled(self, start: int, end: int, room: Tensor) -> None:
        *rows, _, values = self._arrays
        wide = kernels.instructions() == "avx512" and self.dtype.itemsize == 2 and self.values.dtype != torch.int8
        permutations = None if wide else kernels.permutations()
        rows = [None if array is None else array[start:end] for array in rows]
        work = room.numel() // 8  # a copy, nearly
        over_rows(kernels.unpack, end - start, *rows, _numpy(room), values, permutations, work=work)

    def _unpack_plain(self, start: int, end: int) -> Float[Tensor, "rows columns"]:
        """The same by torch, on any device."""
        bits = _keep_mask(self.mask[start:end])
        keep = bits[:, : self.in_features]
        kept = self.values[int(self.starts[start]) : int(self.starts[end])]
        if self.scale is None:
            return torch.zeros_like(keep, dtype=self.dtype).masked_scatter_(keep, kept)
        if kept.dtype == torch.uint8:
            kept = torch.stack([kept & 15, kept >> 4], 1).flatten()[_used(bits)]
        codes = torch.zeros_like(keep, dtype=torch.uint8).masked_scatter_(keep, kept.view(torch.uint8))
        weight = QuantizedWeight(codes, self.scale[start:end], self.zero_point[start:end], 8).dequantize(self.dtype)
        return weight.masked_fill_(~keep, 0)

    def _is_compiled(self) -> bool:
        """Whether kernels serve: on a processor that has them, unless a word lies in two groups of columns."""
        whole = (
            self.scale is None
            or self.scale.shape[1] == 1
            or self.in_features // self.scale.shape[1] % kernels.WORD == 0
        )
        return whole and self.dtype in DTYPES and self.mask.device.type == "cpu" and kernels.instructions() != "none"

    def _products(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What multiplies inputs of this projection's precision here, by name."""
        products = {"packed": self._multiply_packed, "dense": self._multiply_dense}
        wide = self.dtype == torch.bfloat16 and self.values.dtype != torch.int8
        if wide and kernels.instructions() == "avx512":
            products["tiles"] = self._multiply_tiles
        return products

    def _fastest(self, n_tokens: int) -> str:
        """The product that takes the least time for so many tokens, found by measuring."""
        n_tokens = min(MOST_TILED, 1 << (n_tokens - 1).bit_length())
        case = n_tokens, torch.get_num_threads(), kernels.instructions()
        if case not in self._found:
            kinds = f"{self.values.dtype} {self.dtype} {self.out_features} x {self.in_features}, {n_tokens} tokens"
            here = f"{kernels.instructions()} {'/'.join(self._products())}, {torch.get_num_threads()} threads"
            self._found[case] = _fastest(f"{kinds}, {here}", self, n_tokens)
        return self._found[case]

    def check(self) -> None:
        """Look the tensors through where they are not those looked through last: no kernel reads beyond the values."""
        tensors = [tensor for tensor in self._buffers.values() if tensor is not None]
        seen = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if seen == self._seen:
            return
        if fault := find_fault(self.in_features, self.dtype, self._buffers):
            raise ValueError(f"packed projection of {self.out_features} x {self.in_features}: {fault}")
        if self.mask.device.type == "cpu":
            prefer_large_pages(self.values)
            prefer_large_pages(self.mask)
            self._arrays = (
                self.mask.numpy().view(np.uint64),
                self.starts.numpy(),
                None if self.scale is None else self.scale.view(torch.uint16).numpy(),
                None if self.zero_point is None else self.zero_point.numpy(),
                None if self.bias is None else _numpy(self.bias),
                _numpy(self.values),
            )
        # Last, for another thread may ask. Held, so that no other tensor takes their place in memory unseen.
        self._held, self._seen = tensors, seen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """`to`, `half`, ...: scales stay float16, whatever the precision of inputs and outputs."""
        scale, self._seen, self._held, self._arrays, self._found = self.scale, [], [], (), {}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if scale is not None:
            self.scale = scale.to(self.mask.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        tensors = {name: state_dict.get(prefix + name) for name in TENSORS}
        if all(tensors[name] is not None for name in ("mask", "starts", "values")):
            dtype = self.dtype if tensors["scale"] is not None else tensors["values"].dtype
            if fault := find_fault(self.in_features, dtype, tensors):
                errors.append(f"{prefix[:-1]}: {fault}")
                return
            self.values = self.values.new_empty(tensors["values"].shape)  # another mask keeps another number
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the tensors only."""
        return self.__dict__ | {"_seen": [], "_held": [], "_arrays": (), "_found": {}}


@checked
def pack(model: PreTrainedModel, report: Masks | None = None) -> None:
    """Replace pruned projections in place by packed ones, which compute the same.

    Projections that would grow stay dense, such as those that pruning ignored. From then on the model's own
    `save_pretrained` writes it packed.

    Args:
        model: as `prune` left it.
        report: what `besa.prune` returned, or keep-masks by (block, projection); None: in every projection, what is
            not 0 is kept.

    Raises:
        ValueError: a projection of the report is not in the model's memory, is packed already, or has other weights
            there (the model is dense then, else as it was), or none would be smaller.
    """
    keep_masks = getattr(report, "keep_masks", report)
    quantized = getattr(report, "quantized", None) or {}
    blocks = find_blocks(model)
    found = {(index, name): linear for index, block in enumerate(blocks) for name, linear in projections(block).items()}
    for index, name in [*(found if keep_masks is None else keep_masks), *quantized]:
        if index < len(blocks) and isinstance(dict(blocks[index].named_modules()).get(name), PackedLinear):
            raise ValueError(f"block {index}, {name}: this model is packed already; besa.unpack(model) makes it dense")
        if (index, name) not in found or found[index, name].weight.is_meta:
            raise ValueError(f"block {index}, {name}: no such projection in the memory of this {type(model).__name__}")
    try:
        for index, block in enumerate(blocks):
            pack_block(index, block, keep_masks, quantized)
    except BaseException:  # refused or interrupted: what is dense in part would be saved without a word of the rest
        unpack(model)
        raise
    if not packed_projections(model):
        raise ValueError("no projection of this model would be smaller packed: it has too few zeros; prune it first")
    keep_packed_when_saved(model)


def pack_block(
    index: int,
    block: nn.Module,
    keep_masks: Mapping[tuple[int, str], Tensor] | None,
    quantized: Mapping[tuple[int, str], QuantizedWeight],
) -> None:
    """`pack` for a model's block of this index.

    Raises:
        ValueError: a mask or codes are of other weights.
    """
    for name, linear in projections(block).items():
        key = index, name
        if keep_masks is not None and key not in keep_masks and key not in quantized:
            continue
        try:
            packed = _packed_or_none(linear, (keep_masks or {}).get(key), quantized.get(key))
        except ValueError as error:
            raise ValueError(f"block {index}, {name}: {error}") from error
        if packed is not None:
            block.set_submodule(name, packed)


def _packed_or_none(
    linear: nn.Linear, keep_mask: Bool[Tensor, "rows columns"] | None, codes: QuantizedWeight | None
) -> PackedLinear | None:
    """A projection packed, by its codes where there are any; None where that is not smaller."""
    weight, bias = linear.weight, linear.bias
    if codes is None:
        packed = PackedLinear.from_linear(linear, keep_mask)
    else:
        bias = None if bias is None else bias.to(codes.codes.device)
        packed = PackedLinear.from_quantized(codes, keep_mask, weight.dtype, bias).to(weight.device)
    if not torch.equal(packed.dense(), weight):
        raise ValueError("the report is of other weights than the model's; prune it again")
    smaller = packed.nbytes < sum(parameter.nbytes for parameter in linear.parameters())
    return packed.train(linear.training) if smaller else None


@checked
def unpack(model: PreTrainedModel) -> None:
    """Replace packed projections in place by dense ones of the same bits."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.unpack())
    for module in model.modules():
        vars(module).pop("save_pretrained", None)


def find_fault(in_features: int, dtype: torch.dtype, tensors: Mapping[str, Tensor | None]) -> str | None:
    """What keeps tensors from being a packed projection in this file's layout; None: nothing."""
    mask, starts, values, scale, zero_point, bias = (tensors[name] for name in TENSORS)
    rows, width = len(mask), 8 * -(-in_features // kernels.WORD)
    kinds = (dtype,) if scale is None else (torch.uint8, torch.int8)
    groups = 1 if scale is None else scale.shape[-1]
    for name, tensor, shape, allowed in (
        ("mask", mask, (rows, width), (torch.uint8,)),
        ("starts", starts, (rows + 1,), (torch.int64,)),
        ("values", values, (values.numel(),), kinds),
        ("scale", scale, (rows, groups), (torch.float16,)),
        ("zero_point", zero_point, (rows, groups), (torch.uint8,)),
        ("bias", bias, (rows,), (dtype,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in allowed or not tensor.is_contiguous()):
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {' or '.join(map(str, allowed))} {shape}"
    if (scale is None) != (zero_point is None) or in_features % max(groups, 1):
        return f"{in_features} columns do not fit scale and zero_point of {groups} groups"
    if in_features % kernels.WORD and (_words(mask)[:, -1] >> np.uint64(in_features % kernels.WORD)).any():
        return f"mask keeps columns beyond the last of {in_features}"
    sizes, stored = _sizes(mask, values.dtype), starts.cpu().diff()
    if int(starts[0]) or not torch.equal(sizes, stored):
        row = int((sizes != stored).int().argmax())
        return f"row {row}: its mask keeps {sizes[row]} elements, its starts {stored[row]}; the tensors are damaged"
    if len(values) != int(starts[-1]) + PADDING:
        return f"values has {len(values)} elements, mask and padding take {int(starts[-1]) + PADDING}; it is damaged"
    return None


def _mask(keep_mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows mask_bytes"]:
    return pack_bits(_padded(keep_mask)).view(len(keep_mask), -1).to(keep_mask.device)


def _keep_mask(mask: UInt8[Tensor, "rows mask_bytes"]) -> Bool[Tensor, "rows padded_columns"]:
    """What `_mask` made, with columns up to whole words, where the mask is."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask[:, :, None] & bits).bool().flatten(1)


def _in_pairs(codes: UInt8[Tensor, "kept"], keep_mask: Tensor) -> UInt8[Tensor, "bytes"]:
    """Codes of 4 bits, two a byte; each word of 64 columns starts a new byte."""
    used = _used(_padded(keep_mask))
    halves = torch.zeros_like(used, dtype=torch.uint8).masked_scatter_(used, codes).view(-1, 2)
    return halves[:, 0] | halves[:, 1] << 4


def _used(keep_mask: Bool[Tensor, "rows padded_columns"]) -> Bool[Tensor, "halves"]:
    """Of the halves of bytes that codes take, those that hold one: the last of a word with an odd count holds none."""
    counts = keep_mask.view(-1, kernels.WORD).sum(1)
    ends = (counts + 1).div(2, rounding_mode="floor").mul(2).cumsum(0)
    used = keep_mask.new_ones(int(ends[-1]))
    used[ends[counts % 2 == 1] - 1] = False
    return used


def _sizes(mask: Tensor, dtype: torch.dtype) -> Int64[Tensor, "rows"]:
    """Elements of `values` that each row takes, in host memory."""
    counts = np.bitwise_count(_words(mask))
    counts = (counts + 1) // 2 if dtype == torch.uint8 else counts
    return torch.from_numpy(counts.sum(1, dtype=np.int64))


def _words(mask: Tensor) -> np.ndarray:
    return mask.cpu().numpy().view(np.uint64)


def _starts(sizes: Tensor) -> Int64[Tensor, "rows_and_end"]:
    return nn.functional.pad(sizes.cumsum(0), (1, 0))


def _padded(keep_mask: Tensor) -> Tensor:
    """With columns that are not kept, up to whole words."""
    return nn.functional.pad(keep_mask, (0, -keep_mask.shape[1] % kernels.WORD))


def _fitting(keep_mask: Tensor, weight: Tensor) -> Tensor:
    if keep_mask.shape != weight.shape or keep_mask.dtype != torch.bool:
        raise ValueError(
            f"the keep_mask is {keep_mask.dtype} {tuple(keep_mask.shape)}, the weight {tuple(weight.shape)}; "
            "it takes a bool for each weight"
        )
    return keep_mask.to(weight.device)


def _numpy(tensor: Tensor) -> np.ndarray:
    """A view by whose dtype kernels tell floats apart: bfloat16 as uint16, float16 as int16."""
    views = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return tensor.detach().view(views.get(tensor.dtype, tensor.dtype)).numpy()


@functools.cache
def _tell_that_nothing_is_faster() -> None:
    warnings.warn(
        "this processor has neither AVX2 nor AVX-512 with numba to use them: packed projections save memory here, but "
        "are slower than dense ones, which besa.unpack(model) brings back",
        stacklevel=3,
    )


_LOCAL = threading.local()


def _scratch(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this thread that all projections unpack rows into, one after the other."""
    rooms = _LOCAL.__dict__.setdefault("rooms", {})
    if (dtype, device) not in rooms or len(rooms[dtype, device]) < size:
        with torch.inference_mode(False):  # else nothing but inference could write to it again
            rooms[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return rooms[dtype, device]


def _fastest(kinds: str, packed: PackedLinear, n_tokens: int) -> str:
    """The name of the fastest product: measured once on a machine, then read.

    From a file in `cache_folder()`, since they round differently, and a machine should repeat its results.
    """
    path = cache_folder() / "packed" / f"products-torch-{torch.__version__}.json"
    key, known = f"{kinds}, {kernels.processor()}", _known_products(path)
    if key not in known:
        known |= {key: _measure_products(packed, n_tokens)} | _read_products(path)  # others measure meanwhile
        with contextlib.suppress(OSError):  # where nothing can be kept, the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known, indent=1))
    return known[key]


def _read_products(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_known_products = functools.cache(_read_products)


@torch.no_grad()
def _measure_products(packed: PackedLinear, n_tokens: int) -> str:
    tokens, products = torch.ones(n_tokens, packed.in_features, dtype=packed.dtype), packed._products()
    seconds = [[_seconds(product, tokens) for product in products.values()] for _ in range(8)]  # the first compiles
    least = [min(column) for column in zip(*seconds[1:], strict=True)]
    return min(zip(least, products, strict=True))[1]


def _seconds(product: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    start = time.perf_counter()
    product(tokens)
    return time.perf_counter() - start
