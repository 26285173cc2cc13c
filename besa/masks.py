"""Scores -> keep-mask, and keep-masks held as bits."""

import contextlib
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt8
from torch import Tensor

from besa.machine.device import deterministic
from besa.machine.files import replacing
from besa.machine.threads import sort_rows


def keep_largest(scores: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
    """False for the floor(sparsity * columns) lowest scores of each row; of equals, the first go."""
    n_pruned = int(sparsity * scores.shape[1])
    if n_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = sorted_rows(scores)[:, n_pruned - 1 : n_pruned]
    lower, equal = scores < threshold, scores == threshold
    n_equal = n_pruned - lower.sum(dim=1, keepdim=True)  # that go; at least one does
    return ~(lower | equal & (equal.cumsum(dim=1, dtype=torch.int32) <= n_equal))


def parse_pattern(pattern: str) -> tuple[int | None, int]:
    """N and M of "N:M": N of every M consecutive weights of a row are kept; None for the letter N, left to a budget.

    Raises:
        ValueError: it is no such pattern.
    """
    found = re.fullmatch(r"(N|[0-9]+):([0-9]+)", pattern)
    n, m = (None if found[1] == "N" else int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < (1 if n is None else n) < m <= 128:
        raise ValueError(
            f"pattern {pattern!r} is not 'N:M' with 0 < N < M <= 128: N of every M consecutive weights are kept, as in "
            "'2:4'; or, with the letter N, 'N:8'"
        )
    return n, m


def places(scores: Float[Tensor, "rows columns"], m: int) -> UInt8[Tensor, "rows columns"]:
    """Where each weight stands among its m consecutive ones, 0 for the lowest score; of equals, the first is lower.

    m divides the columns. The N:m mask is `places(scores, m) >= m - N`.
    """
    # Compared in pairs: sorting this many short rows takes longer, and 8 bytes for each weight's index.
    members = scores.reshape(-1, m).T.contiguous()
    place = torch.zeros_like(members, dtype=torch.uint8)
    for i in range(m):
        for j in range(i):
            lower = members[j] <= members[i]
            place[i] += lower
            place[j] += ~lower
    return place.T.reshape(scores.shape)


def sorted_rows(scores: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Each row from low to high."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(sort_rows(scores.detach().numpy().copy()))
    return torch.cat([part.sort(dim=1).values for part in slices(scores)])


def _order_of_rows(scores: Float[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """Where each row's lowest score stands, then the next; of equals, the first goes first."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        bits = (scores.detach() + 0.0).view(torch.int32)  # -0.0 became 0.0
        bits ^= (bits >> 31) & 0x7FFFFFFF  # as integers in the order of the scores
        keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[1]))
        return torch.from_numpy(sort_rows(keys.numpy())).bitwise_and_(0xFFFFFFFF)
    return scores.sort(dim=1, stable=True).indices


def ranks_of_rows(scores: Float[Tensor, "rows columns"], dtype: torch.dtype) -> Int[Tensor, "rows columns"]:
    """Where each score stands in its row, 0 for the lowest; of equals, the first is lower."""
    ranks = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    place = torch.arange(scores.shape[1], dtype=dtype, device=scores.device)
    for part, rank in zip(slices(scores), slices(ranks), strict=True):
        order = _order_of_rows(part)
        with deterministic(False):  # a row's places are all different; torch would sort them
            rank.scatter_(1, order, place.expand_as(order))
    return ranks


def slices(matrix: Shaped[Tensor, "rows columns"]) -> tuple[Shaped[Tensor, "part columns"], ...]:
    """Views of a few rows each: torch's temporaries, such as indices of 64 bits, would fill the memory at once."""
    return matrix.split(max(1, 2**22 // matrix.shape[1]))


def pack_bits(keep_mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "n"]:
    """A bit per weight, row by row without a gap, the first in a byte's lowest bit; in host memory."""
    return torch.from_numpy(np.packbits(keep_mask.cpu().numpy(), bitorder="little"))


def unpack_bits(bits: UInt8[Tensor, "n"], rows: int, columns: int) -> Bool[Tensor, "rows columns"]:
    """The keep-mask of what `pack_bits` made.

    Raises:
        ValueError: it is of another number of weights.
    """
    if bits.dtype != torch.uint8 or bits.shape != (-(-rows * columns // 8),):
        raise ValueError(f"{tuple(bits.shape)} of {bits.dtype} are not the bits of a keep-mask {rows} x {columns}")
    kept = np.unpackbits(bits.numpy(), count=rows * columns, bitorder="little")
    return torch.from_numpy(kept).view(rows, columns).bool()


@contextlib.contextmanager
def open_bits(path: str | Path) -> Iterator[tuple[safetensors.safe_open, dict[str, tuple[int, ...]]]]:
    """A file of packed bits, and the shapes by projection in its metadata.

    Raises:
        ValueError: it is damaged, which also reading from it may find; names it.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            yield file, {key: tuple(map(operator.index, shape)) for key, shape in shapes.items()}
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); prune the checkpoint again") from error


class KeepMasks(Mapping[tuple[int, str], Tensor]):
    """Keep-masks (rows, columns), True = keep, by block and projection; a bit per weight in host memory or a file."""

    def __init__(self) -> None:
        self._bits: dict[tuple[int, str], tuple[Tensor, int, int]] = {}

    def __setitem__(self, key: tuple[int, str], keep_mask: Tensor) -> None:
        self._bits[key] = pack_bits(keep_mask), *keep_mask.shape

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        return unpack_bits(*self._bits[key])

    def __contains__(self, key: object) -> bool:
        return key in self._bits  # Mapping's own unpacks it

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def take(self, others: "KeepMasks") -> None:
        """Add the masks of further blocks, as bits."""
        self._bits |= others._bits

    def of_block(self, block: int) -> "KeepMasks":
        """Those of one block."""
        found = KeepMasks()
        found._bits = {key: bits for key, bits in self._bits.items() if key[0] == block}
        return found

    def save(self, path: str | Path) -> None:
        """Write them as one safetensors file: bits by projection (`3.self_attn.q_proj`), shapes in its metadata."""
        tensors = {f"{block}.{name}": bits for (block, name), (bits, _, _) in self._bits.items()}
        shapes = {f"{block}.{name}": shape for (block, name), (_, *shape) in self._bits.items()}
        with replacing(Path(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"shapes": json.dumps(shapes)})

    def load(self, path: str | Path) -> "KeepMasks":
        """Add those of a file; their bits stay there until they are asked for."""
        with open_bits(path) as (file, shapes):
            for key, (rows, columns) in shapes.items():
                block, _, name = key.partition(".")
                self._bits[int(block), name] = file.get_tensor(key), rows, columns
        return self
