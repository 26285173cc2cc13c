"""Matrix -> keep-masks, N:M patterns, and keep-masks as bits."""

import re
from collections import UserDict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64, UInt8
from torch import Tensor

from besa.shapes import KeepMask, Matrix
from besa.system import deterministic
from besa.threads import over_rows


def keep_largest(scores: Matrix, sparsity: float) -> KeepMask:
    """Prune the floor(sparsity * columns) lowest scores of each row; of equal scores, the first."""
    n_pruned = int(sparsity * scores.shape[1])
    if n_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = sorted_rows(scores)[:, n_pruned - 1 : n_pruned]
    lower, equal = scores < threshold, scores == threshold
    n_equal = n_pruned - lower.sum(dim=1, keepdim=True)  # of these are pruned, at least one
    return ~(lower | equal & (equal.cumsum(dim=1, dtype=torch.int32) <= n_equal))


def zeros_before(weight: Matrix) -> KeepMask:
    """Zeros of a weight that was pruned before; dequantized weights have a few, which do not count."""
    zeros = weight == 0
    return zeros if zeros.float().mean() > 0.01 else torch.zeros_like(zeros)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of "N:M": N of every M consecutive weights of a row are kept."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m <= 128:
        raise ValueError(f"pattern {pattern!r} is not 'N:M' with 0 < N < M <= 128")
    return n, m


def places(scores: Matrix, m: int) -> UInt8[Tensor, "rows columns"]:
    """Rank of each weight among its m consecutive ones, 0 for the lowest score; of equal scores, the first."""
    if scores.shape[1] % m:
        raise ValueError(f"{scores.shape[1]} columns do not divide into groups of {m}; ignore the projection")
    # Compared in pairs: sorting this many short rows takes longer, and 8 bytes for the index of each weight.
    members = scores.reshape(-1, m).T.contiguous()
    place = torch.zeros_like(members, dtype=torch.uint8)
    for i in range(m):
        for j in range(i):
            lower = members[j] <= members[i]
            place[i] += lower
            place[j] += ~lower
    return place.T.reshape(scores.shape)


def sorted_rows(scores: Matrix) -> Matrix:
    """Sort each row in ascending order."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(_sort(scores.detach().numpy().copy()))
    return torch.cat([part.sort(dim=1).values for part in row_slices(scores)])


def ranks_of_rows(scores: Matrix, dtype: torch.dtype) -> Int[Tensor, "rows columns"]:
    """Rank of each score in its row, 0 for the lowest; of equal scores, the first."""
    ranks = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    place = torch.arange(scores.shape[1], dtype=dtype, device=scores.device)
    for part, rank in zip(row_slices(scores), row_slices(ranks), strict=True):
        order = _order_of_rows(part)
        with deterministic(False):  # the places of a row are distinct: any order gives the same
            rank.scatter_(1, order, place.expand_as(order))
    return ranks


def order_statistics(scores: Matrix, ranks: Int64[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """The scores of these ranks in each row, 0 for the lowest: by a sort on CPUs, by bisection on GPUs."""
    if scores.device.type == "cpu":
        return sorted_rows(scores).gather(1, ranks)
    return bisect_rows(scores, ranks)


def bisect_rows(scores: Float32[Tensor, "rows columns"], ranks: Int64[Tensor, "rows n"]) -> Float32[Tensor, "rows n"]:
    """The scores of n ranks in each row, exactly, in 32 passes over the integers behind the scores."""
    keys = _ordered_bits(scores)[:, None]  # (rows, 1, columns)
    low = torch.full_like(ranks, -(2**31))
    high = torch.full_like(ranks, 2**31 - 1)
    for _ in range(32):
        middle = (low + high) >> 1
        is_above = (keys <= middle.int()[:, :, None]).sum(2) <= ranks
        low, high = torch.where(is_above, middle + 1, low), torch.where(is_above, high, middle)
    bits = low.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _ordered_bits(scores: Float32[Tensor, "rows columns"]) -> Int32[Tensor, "rows columns"]:
    """Integers in the order of the scores; -0.0 counts as 0.0."""
    bits = (scores.detach() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _order_of_rows(scores: Matrix) -> Int64[Tensor, "rows columns"]:
    """Indices that sort each row; of equal scores, the first comes first."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.sort(dim=1, stable=True).indices
    keys = _ordered_bits(scores).long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[1]))
    return torch.from_numpy(_sort(keys.numpy())).bitwise_and_(0xFFFFFFFF)


def _sort(matrix: np.ndarray) -> np.ndarray:
    """Sort each row in place: numpy with AVX-512 takes a ninth to half of torch's time."""
    over_rows(lambda first, last, rows: rows[first:last].sort(axis=1), matrix)
    return matrix


def row_slices(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each, to bound the size of temporaries such as 64-bit indices."""
    return matrix.split(max(1, 2**22 // matrix.shape[1]))


def pack_bits(keep_mask: KeepMask) -> UInt8[Tensor, "n"]:
    """One bit per weight in row order, the first in the lowest bit of a byte; on the CPU."""
    return torch.from_numpy(np.packbits(keep_mask.cpu().numpy(), bitorder="little"))


def unpack_bits(bits: UInt8[Tensor, "n"], rows: int, columns: int) -> KeepMask:
    kept = np.unpackbits(bits.numpy(), count=rows * columns, bitorder="little")
    return torch.from_numpy(kept).view(rows, columns).bool()


class KeepMasks(UserDict[tuple[int, str], Tensor]):
    """Keep-masks (rows, columns), True = keep, by (block, projection); `data` holds one bit per weight, and shapes."""

    data: dict[tuple[int, str], Any]

    def __setitem__(self, key: tuple[int, str], keep_mask: Tensor) -> None:
        self.data[key] = pack_bits(keep_mask), *keep_mask.shape

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        return unpack_bits(*self.data[key])
