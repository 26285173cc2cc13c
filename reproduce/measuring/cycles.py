"""Cycles that the ViTCoD accelerator spends on a pruned projection (Table 4): multiplications only, no memory."""

from dataclasses import dataclass

from jaxtyping import Bool, Int64
from torch import Tensor

from besa.config import checked

PE_ROWS, PE_COLUMNS = 64, 64  # processing elements (PEs); each multiplies one weight per cycle


@dataclass(frozen=True)
class Simulation:
    """One projection times one input vector."""

    cycles: int
    dense_cycles: int  # of the unpruned projection: ceil(rows * columns / 4096)
    threshold: float  # a column is dense if more than this fraction of it is kept
    dense_columns: int
    dense_kept: int  # kept weights in dense columns
    sparse_kept: int  # kept weights in the other columns


@checked
def simulate_cycles(keep_mask: Bool[Tensor, "rows columns"]) -> Simulation:
    """Compute cycles of a pruned projection on the 64 x 64 PEs of ViTCoD (You et al. 2023; Xu et al. 2024, Table 4).

    With c_j weights kept in column j, column j is dense if c_j > threshold * rows. A dense engine computes the dense
    columns whole, beside a sparse engine that computes the other kept weights one by one:

        work_dense = dense_columns * rows        q = work_dense / (work_dense + work_sparse)
        work_sparse = sum of the other c_j       cycles = max(ceil(work_dense / (64 * floor(64 q))),
                                                              ceil(work_sparse / (64 * (64 - floor(64 q)))))

    An engine with work has at least one of the 64 PE columns. The threshold starts at 0.5 and moves by 0.1, at most
    five times, until 40 to 60 % of the kept weights lie in dense columns; the fewest cycles count.

    The released code (hw_sim) counts dense work as columns * dense_columns, and loses kept weights of wide projections.
    """
    kept = keep_mask.sum(dim=0).cpu()  # (columns,)
    tenths, runs = 5, []  # the threshold in tenths: integers compare exactly
    for _ in range(6):
        runs.append(_run(kept, len(keep_mask), tenths))
        dense, total = runs[-1].dense_kept, runs[-1].dense_kept + runs[-1].sparse_kept
        if 4 * total <= 10 * dense <= 6 * total:
            break
        tenths += 1 if 10 * dense > 6 * total else -1
    return min(runs, key=lambda run: run.cycles)


def _run(kept: Int64[Tensor, " columns"], rows: int, tenths: int) -> Simulation:
    is_dense = 10 * kept > tenths * rows
    dense_columns, dense_kept = int(is_dense.sum()), int(kept[is_dense].sum())
    work_dense, work_sparse = dense_columns * rows, int(kept.sum()) - dense_kept
    pe_columns = max(1, PE_COLUMNS * work_dense // (work_dense + work_sparse)) if work_dense else 0
    return Simulation(
        cycles=max(_cycles(work_dense, pe_columns), _cycles(work_sparse, PE_COLUMNS - pe_columns)),
        dense_cycles=_cycles(rows * len(kept), PE_COLUMNS),
        threshold=tenths / 10,
        dense_columns=dense_columns,
        dense_kept=dense_kept,
        sparse_kept=work_sparse,
    )


def _cycles(work: int, pe_columns: int) -> int:
    """ceil(work / PEs)"""
    return -(-work // (pe_columns * PE_ROWS)) if work else 0
