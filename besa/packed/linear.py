"""Pruned projections that stay packed: one bit per weight, and the values that are kept.

Layout of a projection of `rows` x `columns`; every tensor is contiguous and little-endian:

- `mask`, uint8 (rows, 8 ceil(columns / 64)): bit c % 8 of byte c // 8 is 1 where column c is kept.
- `values`: what is kept, row after row, then 64 zeros for wide loads at the end. Either numbers in the precision of the
  weight, or codes of `Quantize`: 8 bits one a byte (dtype int8, though from 0 to 255); 2 to 4 bits two a byte (uint8),
  the first in the lower half, and each 64 columns (8 bytes of the mask) start a new byte.
- `starts`, int64 (rows + 1,): index in `values` of the first element of each row, and of the end of the last one.
- `scale`, float16, and `zero_point`, uint8, both (rows, groups), with codes: a kept weight of column c is
  scale (code - zero_point) of group c groups // columns, computed in float32 and rounded once.
- `bias`, (rows,), if there is one.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn

from besa.masks import KeepMask
from besa.packed import kernels
from besa.quantize import QuantizedWeight

PADDING = 64
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
Kind = tuple[str, int, str]  # of kernels: instructions, bits of a code, precision
TENSORS = "mask", "starts", "values", "scale", "zero_point", "bias"
SLICE = 2**22  # bytes of weights that are dense at a time when many tokens are multiplied: they stay in a cache


class PackedLinear(nn.Module):
    """A linear map whose pruned weights take one bit each; it computes what `nn.Linear` does, within rounding.

    Few tokens are multiplied by the packed rows; for many, slices of rows are unpacked. The weights are not trained.
    """

    def __init__(self, in_features: int, dtype: torch.dtype, **tensors: Tensor | None) -> None:
        """`dtype` is that of inputs, outputs and unpacked weights; `tensors` are named as in the layout above."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, len(tensors["mask"]), dtype
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.bits = 8 if self.values.dtype == torch.int8 else 4  # of a stored code
        self._prepared: tuple[Any, ...] = ()
        if not self.mask.is_meta:
            self.check()

    @classmethod
    @jaxtyped(typechecker=beartype)
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, keep_mask: KeepMask | None = None) -> "PackedLinear":
        """Pack a projection; weights that are not kept become 0.

        Args:
            keep_mask: True = keep; None keeps all that is not exactly 0.
        """
        check_plain(linear)
        weight = linear.weight.detach().cpu()
        keep = weight != 0 if keep_mask is None else keep_mask.cpu()
        packed = cls(weight.shape[1], weight.dtype, **_tensors(_packed_mask(keep), weight[keep], linear.bias))
        return packed.to(linear.weight.device)

    @classmethod
    @jaxtyped(typechecker=beartype)
    @torch.no_grad()
    def from_quantized(
        cls, codes: QuantizedWeight, keep_mask: KeepMask | None, dtype: torch.dtype, bias: Tensor | None = None
    ) -> "PackedLinear":
        """Pack the codes of a pruned and quantized projection.

        Args:
            keep_mask: True = keep; None keeps the codes that do not stand for 0.
            dtype: precision of inputs and outputs.
        """
        device, codes = codes.codes.device, codes.cpu()
        columns, groups = codes.codes.shape[1], codes.scale.shape[1]
        zeros = codes.zero_point.repeat_interleave(columns // groups, dim=1)
        keep = codes.codes != zeros if keep_mask is None else keep_mask.cpu()
        values, mask = codes.codes[keep], _packed_mask(keep)
        values = values.view(torch.int8) if codes.bits == 8 else _paired(values, mask)
        tensors = _tensors(mask, values, bias)
        tensors |= {"scale": codes.scale.contiguous(), "zero_point": codes.zero_point.contiguous()}
        return cls(columns, dtype, **tensors).to(device)

    def unpack(self) -> nn.Linear:
        """Return the dense projection, of the same bits that were packed."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    @torch.no_grad()
    def dense(self, start: int = 0, end: int | None = None, room: Tensor | None = None) -> Tensor:
        """Unpack the weights of some rows, (rows, columns), into `room` if there is any."""
        end, prepared = min(end or self.out_features, self.out_features), self._prepare()
        if prepared is None:
            return torch.cat([self._unpack_by_torch(i, min(i + 64, end)) for i in range(start, end, 64)])
        shape = end - start, 8 * self.mask.shape[1]
        out = torch.empty(shape, dtype=self.dtype) if room is None else room[: end - start]
        task = kernels.Task.from_buffer_copy(prepared[0])
        task.row, task.last_row, task.stride = start, end, out.stride(0) * out.itemsize
        task.out = out.data_ptr() - start * task.stride
        kernels.run(kernels.dense_kernel(*prepared[1]), task, out.numel())
        return out[:, : self.in_features].contiguous()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b."""
        if x.requires_grad and torch.is_grad_enabled():
            return nn.functional.linear(x, self.dense(), self.bias)
        tokens, prepared = x.detach().reshape(-1, self.in_features).contiguous(), self._prepare()
        few = 0 if prepared is None else 16 if kernels.vector_lanes(*prepared[1]) > 16 else 8  # measured on Zen 4
        packed = tokens.shape[0] <= few and x.dtype == self.dtype and x.is_cpu
        out = self._multiply_packed(tokens, *prepared) if packed else self._multiply_slices(tokens)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def check(self, name: str = "packed projection") -> None:
        """Raise ValueError if the tensors contradict each other (a damaged file); then move them to large pages."""
        columns, groups = self.in_features, 1 if self.scale is None else self.scale.shape[-1]
        starts, last_word = _starts(self.mask, self.values.dtype), self.mask[:, -8:].cpu().numpy()
        kept = np.unpackbits(last_word, axis=1, bitorder="little")[:, columns % kernels.WORD or kernels.WORD :]
        sizes = len(self.values) - PADDING, columns % groups, kept.sum()
        if not torch.equal(self.starts.cpu(), starts) or sizes != (starts[-1], 0, 0):
            raise ValueError(f"{name}: mask, starts and values contradict each other; the tensors are damaged")
        if self.mask.device.type == "cpu":
            self.mask, self.values = kernels.in_large_pages(self.mask), kernels.in_large_pages(self.values)

    def _prepare(self) -> tuple[kernels.Task, Kind] | None:
        """Choose kernels and write down where the tensors are; None where torch has to compute."""
        tensors = list(self._buffers.values())
        if self._prepared and all(map(operator.is_, tensors, self._prepared[0])):
            return self._prepared[1]
        name, groups = kernels.instructions(), 1 if self.scale is None else self.scale.shape[1]
        whole, prepared = groups == 1 or self.in_features // groups % kernels.WORD == 0, None
        if name != "none" and whole and self.dtype in DTYPES and self.mask.device.type == "cpu":
            addresses = {part: tensor.data_ptr() for part, tensor in self.named_buffers() if part != "bias"}
            task = kernels.Task(words=self.mask.shape[1] // 8, groups=groups, last_row=self.out_features, **addresses)
            task.stride, task.permutations = 4 * self.out_features, kernels.PERMUTATIONS.ctypes.data
            for part, tensor in ("mask", self.mask), ("values", self.values):
                of_pair = 1 + 2 * tensor.nbytes // self.out_features  # the same columns of a later pair are read ahead
                setattr(task, f"{part}_ahead", of_pair * -(-kernels.PREFETCH // of_pair))
            prepared = task, (name, 0 if self.scale is None else self.bits, DTYPES[self.dtype])
        self._prepared = tensors, prepared
        return prepared

    def _multiply_packed(self, tokens: Tensor, task: kernels.Task, kind: Kind) -> Tensor:
        """Pass over the packed rows for one token, or for every four; fewer are padded."""
        task, lanes, n_tokens = kernels.Task.from_buffer_copy(task), kernels.vector_lanes(*kind), tokens.shape[0]
        columns, at_once = kernels.WORD * task.words, 1 if n_tokens == 1 else 4
        kernel = kernels.product_kernel(*kind, at_once)
        out = torch.empty(n_tokens + -n_tokens % at_once, task.last_row)
        for i in range(0, n_tokens, at_once):
            some = tokens[i : i + at_once]
            if lanes == kernels.WORD:
                n_digits = kernels.DIGITS[kind[2]]
                digits = kernels.split_inputs(some.float().numpy(), at_once, task.words, task.groups, n_digits)
                task.inputs, task.input_sums, task.steps = digits[3:]
            else:
                some = some if lanes == 32 else some.float()
                some = nn.functional.pad(some, (0, columns - some.shape[1], 0, at_once - some.shape[0]))
                some = some.view(at_once, -1, lanes).transpose(0, 1).contiguous()
                task.inputs = some.data_ptr()
            task.row, task.out = 0, out.data_ptr() + i * task.stride
            kernels.run(kernel, task, columns * task.last_row)
        out = out[:n_tokens]
        return (out if self.bias is None else out + self.bias).to(tokens.dtype)

    def _multiply_slices(self, tokens: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Unpack some rows at a time for the matrix product of torch."""
        step, outs = max(1, SLICE // (self.in_features * self.dtype.itemsize)), []
        room = torch.empty(min(step, self.out_features), 8 * self.mask.shape[1], dtype=self.dtype)
        for i in range(0, self.out_features, step):
            bias = None if self.bias is None else self.bias[i : i + step]
            outs.append(nn.functional.linear(tokens, self.dense(i, i + step, room), bias))
        return torch.cat(outs, dim=1)

    def _unpack_by_torch(self, start: int, end: int) -> Float[Tensor, "rows columns"]:
        """Unpack rows on any device."""
        bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=self.mask.device)
        kept = (self.mask[start:end, :, None] & bits).bool().flatten(1)
        keep = kept[:, : self.in_features]
        values = self.values[int(self.starts[start]) : int(self.starts[end])]
        if self.scale is None:
            return torch.zeros_like(keep, dtype=self.dtype).masked_scatter_(keep, values)
        if self.bits == 4:
            values = torch.stack([values & 15, values >> 4], 1).flatten()[_filled(kept.view(-1, kernels.WORD).sum(1))]
        codes = torch.zeros_like(keep, dtype=torch.uint8).masked_scatter_(keep, values.view(torch.uint8))
        weight = QuantizedWeight(codes, self.scale[start:end], self.zero_point[start:end], self.bits)
        return weight.dequantize(self.dtype).masked_fill_(~keep, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Convert or move; scales stay float16."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.scale = None if scale is None else scale.to(self.mask.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": ()}


def check_plain(linear: nn.Module, name: str = "projection") -> None:
    """Refuse a projection that computes more than `nn.Linear` does, and one whose weight cannot be packed."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    if type(linear) is not nn.Linear or hooks or "forward" in vars(linear):
        raise ValueError(f"{name}: a {type(linear).__name__} with its own forward or with hooks cannot be packed")
    if linear.weight.dtype not in DTYPES or linear.weight.is_meta:
        raise ValueError(f"{name}: a weight of {linear.weight.dtype} on {linear.weight.device} cannot be packed")


def _packed_mask(keep: Tensor) -> Tensor:
    padded = np.pad(keep.numpy(), ((0, 0), (0, -keep.shape[1] % kernels.WORD)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little"))


def _tensors(mask: Tensor, values: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    bias = None if bias is None else bias.detach().cpu().clone()
    padded = torch.cat([values, values.new_zeros(PADDING)])
    return {"mask": mask, "starts": _starts(mask, values.dtype), "values": padded, "bias": bias}


def _counts(mask: Tensor) -> Tensor:
    """Kept weights of each word."""
    return torch.from_numpy(np.bitwise_count(mask.cpu().numpy().view(np.uint64)).astype(np.int64))


def _starts(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """First element of each row in `values` of a dtype, and the end."""
    counts = _counts(mask)
    counts = (counts + 1) // 2 if dtype == torch.uint8 else counts  # of bytes with two codes
    return nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))


def _filled(counts: Tensor) -> Tensor:
    """Half-bytes that hold a code: each word starts a byte, so that an odd count leaves its last half empty."""
    ends = (counts + counts % 2).cumsum(0)
    filled = torch.ones(int(ends[-1]), dtype=torch.bool, device=counts.device)
    filled[ends[counts % 2 == 1] - 1] = False
    return filled


def _paired(codes: Tensor, mask: Tensor) -> Tensor:
    """Codes of 4 bits two a byte; each word starts a new byte."""
    filled = _filled(_counts(mask).flatten())
    halves = torch.zeros_like(filled, dtype=torch.uint8).masked_scatter_(filled, codes)
    return halves[::2] | halves[1::2] << 4
