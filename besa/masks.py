"""Scores -> keep-masks, N:M patterns, and keep-masks as bits."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from besa.kernels import over_rows
from besa.system import deterministic

Scores = Float[Tensor, "rows columns"]
KeepMask = Bool[Tensor, "rows columns"]


def keep_largest(scores: Scores, sparsity: float) -> KeepMask:
    """Prune the floor(sparsity * columns) lowest scores of each row; of equal scores, the first."""
    n_pruned = int(sparsity * scores.shape[1])
    if n_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = sorted_rows(scores)[:, n_pruned - 1 : n_pruned]
    lower, equal = scores < threshold, scores == threshold
    n_equal = n_pruned - lower.sum(dim=1, keepdim=True)  # of these are pruned, at least one
    return ~(lower | equal & (equal.cumsum(dim=1, dtype=torch.int32) <= n_equal))


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of "N:M": N of every M consecutive weights of a row are kept."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m <= 128:
        raise ValueError(f"pattern {pattern!r} is not 'N:M' with 0 < N < M <= 128")
    return n, m


def places(scores: Scores, m: int) -> UInt8[Tensor, "rows columns"]:
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


def sorted_rows(scores: Scores) -> Scores:
    """Sort each row in ascending order."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(_sort(scores.detach().numpy().copy()))
    return torch.cat([part.sort(dim=1).values for part in row_slices(scores)])


def ranks_of_rows(scores: Scores, dtype: torch.dtype) -> Int[Tensor, "rows columns"]:
    """Rank of each score in its row, 0 for the lowest; of equal scores, the first."""
    ranks = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    place = torch.arange(scores.shape[1], dtype=dtype, device=scores.device)
    for part, rank in zip(row_slices(scores), row_slices(ranks), strict=True):
        order = _order_of_rows(part)
        with deterministic(False):  # the places of a row are distinct: any order gives the same
            rank.scatter_(1, order, place.expand_as(order))
    return ranks


def _order_of_rows(scores: Scores) -> Int64[Tensor, "rows columns"]:
    """Indices that sort each row; of equal scores, the first comes first."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.sort(dim=1, stable=True).indices
    bits = (scores.detach() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the scores
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[1]))
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
    """Inverse of `pack_bits`."""
    kept = np.unpackbits(bits.numpy(), count=rows * columns, bitorder="little")
    return torch.from_numpy(kept).view(rows, columns).bool()


class KeepMasks(Mapping[tuple[int, str], Tensor]):
    """Keep-masks (rows, columns), True = keep, by (block, projection); held as one bit per weight."""

    def __init__(self) -> None:
        self.bits: dict[tuple[int, str], tuple[Tensor, int, int]] = {}  # bits, rows, columns

    def __setitem__(self, key: tuple[int, str], keep_mask: Tensor) -> None:
        self.bits[key] = pack_bits(keep_mask), *keep_mask.shape

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        return unpack_bits(*self.bits[key])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def update(self, other: "KeepMasks") -> None:
        self.bits |= other.bits
