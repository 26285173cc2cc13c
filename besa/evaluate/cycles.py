"""Cycles that the ViTCoD accelerator spends on a pruned projection (paper Table 4): multiplications only, no memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import find_blocks, projections
from besa.machine.fields import checked, documented
from besa.packed_files import packed_projections

PE_ROWS, PE_COLUMNS = 64, 64
"""Processing elements (PEs); each multiplies one weight per cycle."""
MOVES = 5
"""How often the threshold may move by 0.1: it starts at 0.5 and so stays in [0, 1]."""


@documented
@dataclass(frozen=True)
class Simulation:
    """One projection times one input vector, at the threshold that takes the fewest cycles."""

    cycles: int
    """Spent on the kept weights."""
    dense_cycles: int
    """Spent where nothing is pruned, on every PE: ceil(rows * columns / 4096)."""
    threshold: float
    """A column is dense where more than this fraction of it is kept."""
    dense_columns: int
    """Columns that the dense engine computes whole."""
    dense_kept: int
    """Kept weights in the dense columns."""
    sparse_kept: int
    """Kept weights in the other columns, which the sparse engine computes one by one."""

    @property
    def speedup(self) -> float:
        """dense_cycles / cycles; infinite where nothing is kept."""
        return self.dense_cycles / self.cycles if self.cycles else math.inf


@checked
def simulate_cycles(keep_mask: Bool[Tensor, "rows columns"]) -> Simulation:
    """Compute cycles of a pruned projection on ViTCoD's 64 x 64 PEs (You et al. 2023; Xu et al. 2024, Table 4).

    With c_j weights kept in column j, column j is dense where c_j > threshold * rows. A dense engine computes the dense
    columns whole, beside a sparse engine that computes the other kept weights one by one:

        work_dense = dense_columns * rows        q = work_dense / (work_dense + work_sparse)
        work_sparse = sum of the other c_j       cycles = max(ceil(work_dense / (64 * floor(64 q))),
                                                              ceil(work_sparse / (64 * (64 - floor(64 q)))))

    An engine with work has at least one of the 64 PE columns, one without work has none. The threshold starts at 0.5;
    it moves up by 0.1 where the dense columns hold more than 60 % of the kept weights and down where they hold less
    than 40 %, at most five times; the fewest cycles of all thresholds tried count, the first of equals.

    The released code (LLMPrune-BESA, hw_sim) gives other numbers where it is wrong. It counts dense work as
    columns * dense_columns, which holds for square projections only; it swaps columns through the id 200, and kept
    weights of wider projections are lost; it drops dense work for which floor(64 q) = 0; and it never tries where the
    fifth move leads.

    Args:
        keep_mask: (rows, columns), True = keep, on any device.

    Raises:
        ValueError: not two-dimensional, or not bool.
    """
    kept = keep_mask.sum(dim=0).cpu()  # (columns,)
    tenths, tried = 5, []  # the threshold in tenths: integers compare exactly
    for _ in range(1 + MOVES):
        tried.append(_run(kept, len(keep_mask), tenths))
        dense, total = tried[-1].dense_kept, tried[-1].dense_kept + tried[-1].sparse_kept
        if 4 * total <= 10 * dense <= 6 * total:
            break
        tenths += 1 if 10 * dense > 6 * total else -1
    return min(tried, key=lambda run: run.cycles)


def _run(kept: Int64[Tensor, " columns"], rows: int, tenths: int) -> Simulation:
    """Both engines at one threshold; `kept` counts the kept weights of each column."""
    is_dense = 10 * kept > tenths * rows
    dense_columns, dense_kept = int(is_dense.sum()), int(kept[is_dense].sum())
    work_dense, work_sparse = dense_columns * rows, int(kept.sum()) - dense_kept
    pe_columns = 0
    if work_dense:
        pe_columns = max(1, PE_COLUMNS * work_dense // (work_dense + work_sparse))
    return Simulation(
        cycles=max(_cycles(work_dense, pe_columns), _cycles(work_sparse, PE_COLUMNS - pe_columns)),
        dense_cycles=_cycles(rows * len(kept), PE_COLUMNS),
        threshold=tenths / 10,
        dense_columns=dense_columns,
        dense_kept=dense_kept,
        sparse_kept=work_sparse,
    )


def _cycles(work: int, pe_columns: int) -> int:
    """ceil(work / PEs), exactly; an engine without PEs has no work."""
    return -(-work // (pe_columns * PE_ROWS)) if work else 0


def simulate_model(
    model: PreTrainedModel,
    keep_masks: Mapping[tuple[int, str], Bool[Tensor, "rows columns"]] | None = None,
) -> pd.DataFrame:
    """`simulate_cycles` of every projection of a model, from its keep-masks.

    The accelerator gets `down_proj` in square patches, cut along its columns (the last one as wide as what is left);
    their cycles add up.

    Args:
        model: any decoder whose blocks `besa.decoder` finds; its weights are not looked at.
        keep_masks: `Report.keep_masks`; None for a model of which nothing is pruned.

    Returns:
        One row per block and projection: `block`, `projection`, `kind` (the last part of its name), `rows`, `columns`,
        `sparsity`, `cycles`, `dense_cycles`.

    Raises:
        ValueError: projections are packed.
    """
    if packed_projections(model):
        raise ValueError("the projections of this model are packed; unpack them first: besa.unpack(model)")
    table = []
    for index, block in enumerate(find_blocks(model)):
        for name, projection in projections(block).items():
            (rows, columns), kind = projection.weight.shape, name.rpartition(".")[2]
            keep_mask = keep_masks[index, name] if keep_masks else torch.ones(rows, columns, dtype=torch.bool)
            patches = keep_mask.split(rows, dim=1) if kind == "down_proj" else [keep_mask]
            runs = [simulate_cycles(patch) for patch in patches]
            kept = sum(run.dense_kept + run.sparse_kept for run in runs)
            table.append(
                {
                    "block": index,
                    "projection": name,
                    "kind": kind,
                    "rows": rows,
                    "columns": columns,
                    "sparsity": 1 - kept / (rows * columns),
                    "cycles": sum(run.cycles for run in runs),
                    "dense_cycles": sum(run.dense_cycles for run in runs),
                }
            )
    return pd.DataFrame(table)
