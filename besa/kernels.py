"""Passes over every weight, fused: masking and summing the mask's gradient in a training step, SparseGPT's updates.

numba compiles them for the processor by itself at first use and keeps the result in its cache; where numba is missing,
on other devices and in other precisions, plain torch computes the same.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from besa.machine.device import deterministic
from besa.machine.threads import numba, over_rows

if numba is not None:
    import numpy as np

    from besa.machine.threads import in_threads


@dataclass(frozen=True)
class Ranking:
    """Where each weight of a projection stands in its row, computed once per block."""

    ranks: Int[Tensor, "rows columns"]
    """0 = least important; int16 where it suffices, else int32."""
    buckets: UInt8[Tensor, "rows columns"]
    """Index of the last candidate that prunes the element."""
    bucket_of_rank: UInt8[Tensor, "columns"]

    def kept_above(self, prune_counts: Int[Tensor, "rows"]) -> Bool[Tensor, "rows columns"]:
        """False for the `prune_counts` lowest-ranked weights of each row, compared in the ranks' type, uncopied."""
        return self.ranks >= prune_counts.to(self.ranks.dtype)[:, None]


def masked_rows(
    weight: Float[Tensor, "rows columns"],
    ranks: Int[Tensor, "rows columns"],
    prune_counts: Int[Tensor, "rows"],
    out: Float[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """`weight` with the `prune_counts` lowest-ranked of each row set to 0, written to `out`."""
    if _compiled(weight):
        counts = prune_counts.to(ranks.dtype)
        arrays = _bits(weight), ranks.numpy(), counts.numpy(), _bits(out)
        over_rows(_mask, len(weight), *arrays, work=weight.numel())
        return out
    return torch.mul(weight, ranks >= prune_counts[:, None], out=out)


def bucket_sums(
    grad: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
    ranking: Ranking,
    n_buckets: int,
) -> Float[Tensor, "rows n_buckets"]:
    """Per row, the sum of grad * weight over the elements of each bucket, in float32; the same bits every time."""
    if _compiled(weight) and grad.dtype == weight.dtype:
        sums = torch.zeros(len(weight), n_buckets)
        kernel = _sum_bfloat16 if weight.dtype == torch.bfloat16 else _sum_float32
        arrays = _bits(grad.contiguous()), _bits(weight), ranking.buckets.numpy(), sums.numpy()
        over_rows(kernel, len(weight), *arrays, work=weight.numel())
        return sums
    # Sorted by rank, every row has its buckets in the same columns: a matrix product sums them. Adding by index would
    # take float atomics on a GPU, whose order, and so whose rounding, changes from run to run.
    member = nn.functional.one_hot(ranking.bucket_of_rank.long(), n_buckets).float()  # (columns, n_buckets)
    step = max(1, 2**24 // weight.shape[1])  # torch wants 64-bit indices, four times the memory of the ranks
    sums = []
    for g, w, r in zip(grad.split(step), weight.split(step), ranking.ranks.split(step), strict=True):
        by_rank = torch.empty_like(g, dtype=torch.float32)
        with deterministic(False):  # a row's ranks are all different; torch would sort them and wait for the GPU
            by_rank.scatter_(1, r.long(), g.float() * w)
        sums.append(by_rank @ member)
    return torch.cat(sums)


def spread_errors(
    weight: Float[Tensor, "rows n"],
    keep: Bool[Tensor, "rows n"],
    upper: Float[Tensor, "n n"],
    errors: Float[Tensor, "rows n"],
    columns: range,
) -> None:
    """SparseGPT's update, in float32: for each column j in turn, where nothing is kept, weight_j / upper_jj goes to
    errors_j, 0 before, and errors_j * upper_jk is taken from every weight_k; `upper` is 0 left of its diagonal."""
    if _compiled(weight):
        arrays = weight.numpy(), keep.numpy(), upper.contiguous().numpy(), errors.numpy(), columns.start, columns.stop
        return over_rows(_spread, len(weight), *arrays, work=weight.numel() * len(columns) // 2)
    for j in columns:
        errors[:, j] = weight[:, j] * ~keep[:, j] / upper[j, j]
        weight[:, j:] -= errors[:, j : j + 1] * upper[j, j:]


def _compiled(weight: Tensor) -> bool:
    return numba is not None and weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)


def _bits(tensor: Tensor):
    """A numpy view: float32 as it is, bfloat16 (which numpy lacks) as its 16 bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


if numba is not None:

    @in_threads
    @no_type_check
    def _mask(first, last, weight, ranks, prune_counts, out):
        zero = weight.dtype.type(0)
        for i in range(first, last):
            for j in range(weight.shape[1]):
                out[i, j] = weight[i, j] if ranks[i, j] >= prune_counts[i] else zero

    @in_threads
    @no_type_check
    def _spread(first, last, weight, keep, upper, errors, start, stop):
        for i in range(first, last):
            for j in range(start, stop):
                if not keep[i, j]:
                    error = weight[i, j] / upper[j, j]
                    errors[i, j] = error
                    for k in range(weight.shape[1]):  # 0 is taken left of j: whole vectors take a third of the time
                        weight[i, k] -= error * upper[j, k]

    @in_threads
    @no_type_check
    def _sum_float32(first, last, grad, weight, buckets, sums):
        product = np.empty(weight.shape[1], np.float32)
        for i in range(first, last):
            for j in range(weight.shape[1]):  # this loop becomes vector instructions, the next one cannot
                product[j] = grad[i, j] * weight[i, j]
            for j in range(weight.shape[1]):
                sums[i, buckets[i, j]] += product[j]

    @in_threads
    @no_type_check
    def _sum_bfloat16(first, last, grad, weight, buckets, sums):
        g, w = np.empty(weight.shape[1], np.uint32), np.empty(weight.shape[1], np.uint32)
        g_float, w_float = g.view(np.float32), w.view(np.float32)
        for i in range(first, last):
            for j in range(weight.shape[1]):
                g[j] = np.uint32(grad[i, j]) << np.uint32(16)  # a bfloat16 is the upper half of a float32
                w[j] = np.uint32(weight[i, j]) << np.uint32(16)
            for j in range(weight.shape[1]):
                g_float[j] *= w_float[j]
            for j in range(weight.shape[1]):
                sums[i, buckets[i, j]] += g_float[j]
