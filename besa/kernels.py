"""Passes over every weight, compiled by numba for CPUs: the mask and its gradient.

On other devices and in other precisions torch computes the same.
"""

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from besa.shapes import KeepMask, Matrix
from besa.system import deterministic
from besa.threads import over_rows


@dataclass(frozen=True)
class Ranking:
    """The rank of each weight in its row, computed once per block."""

    ranks: Int[Tensor, "rows columns"]
    """0 = least important; int16 if it suffices, else int32."""
    buckets: UInt8[Tensor, "rows columns"] | None
    """Index of the last candidate that prunes the weight; None on GPUs, which sum by `bucket_of_rank`."""
    bucket_of_rank: UInt8[Tensor, "columns"]

    def kept_above(self, n_pruned: Int[Tensor, "rows"]) -> KeepMask:
        """Keep-mask without the `n_pruned` lowest-ranked weights of each row."""
        return self.ranks >= n_pruned.to(self.ranks.dtype)[:, None]


def masked_rows(
    weight: Matrix,
    ranks: Int[Tensor, "rows columns"],
    n_pruned: Int[Tensor, "rows"],
    out: Matrix,
) -> Matrix:
    """Write `weight` without the `n_pruned` lowest-ranked weights of each row to `out`."""
    if not _is_compiled(weight):
        return torch.mul(weight, ranks >= n_pruned[:, None], out=out)
    over_rows(_mask, _bits(weight), ranks.numpy(), n_pruned.to(ranks.dtype).numpy(), _bits(out))
    return out


def bucket_sums(grad: Matrix, weight: Matrix, ranking: Ranking, n_buckets: int) -> Float[Tensor, "rows n_buckets"]:
    """Sum grad * weight over each bucket of each row, in float32 and in a fixed order."""
    if _is_compiled(weight) and grad.dtype == weight.dtype:
        sums = torch.zeros(len(weight), n_buckets)
        kernel = _sum_bfloat16 if weight.dtype == torch.bfloat16 else _sum_float32
        over_rows(kernel, _bits(grad.contiguous()), _bits(weight), ranking.buckets.numpy(), sums.numpy())  # pyright: ignore
        return sums
    # Sorted by rank, all rows have their buckets in the same columns, so that a matrix product sums them. Adding by
    # index would use float atomics on a GPU, whose order and rounding change from run to run.
    by_rank = torch.empty_like(grad, dtype=torch.float32)
    with deterministic(False):  # the ranks of a row are distinct: any order gives the same
        by_rank.scatter_(1, ranking.ranks.long(), grad.float() * weight)
    return by_rank @ nn.functional.one_hot(ranking.bucket_of_rank.long(), n_buckets).float()


def _is_compiled(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)


def _bits(tensor: Tensor) -> np.ndarray:
    """A numpy view: float32 as it is, bfloat16 (which numpy lacks) as its 16 bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@no_type_check
@numba.njit(nogil=True, cache=True)
def _mask(first, last, weight, ranks, n_pruned, out):
    zero = weight.dtype.type(0)
    for i in range(first, last):
        for j in range(weight.shape[1]):
            out[i, j] = weight[i, j] if ranks[i, j] >= n_pruned[i] else zero


@no_type_check
@numba.njit(nogil=True, cache=True)
def _sum_float32(first, last, grad, weight, buckets, sums):
    product = np.empty(weight.shape[1], np.float32)
    for i in range(first, last):
        for j in range(weight.shape[1]):  # this loop becomes vector instructions, the next one cannot
            product[j] = grad[i, j] * weight[i, j]
        for j in range(weight.shape[1]):
            sums[i, buckets[i, j]] += product[j]


@no_type_check
@numba.njit(nogil=True, cache=True)
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
