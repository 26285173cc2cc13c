"""What pruning did: one row per block and projection, one entry per training step."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from besa.quantize import QuantizedWeight
from besa.walk import locate, projections

if TYPE_CHECKING:
    import matplotlib.axes


@dataclass
class Report:
    """Rows by block and projection, training steps by block, and the time pruning took."""

    method: str
    _: KW_ONLY
    n_samples: int
    seq_len: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    quantized: Mapping[tuple[int, str], QuantizedWeight] = field(default_factory=dict, repr=False)
    """Where the method quantized: codes, scales and zero-points by block and projection."""

    def add(
        self,
        index: int,
        block: nn.Module,
        notes: dict[str, str],
        steps: list[dict[str, float]],
        error: float,
        projection_errors: dict[str, float],
        seconds: float,
    ) -> None:
        """Note the result of one block, or of a span of blocks that starts with block `index`."""
        for name, projection in projections(block).items():
            weight, (number, within) = projection.weight, locate(index, block, name)
            self.rows.append(
                {
                    "block": number,
                    "projection": within,
                    "rows": weight.shape[0],
                    "columns": weight.shape[1],
                    "zeros": int((weight == 0).sum()),
                    "sparsity": float((weight == 0).sum() / weight.numel()),
                    "projection_error": projection_errors[name],
                    "block_error": error,
                    "block_seconds": seconds,
                    "note": notes.get(name, ""),
                }
            )
        self.steps += [{"block": index, "step": number, **step} for number, step in enumerate(steps)]

    def extend(self, part: "Report") -> None:
        """Append the report of further blocks."""
        self.rows += part.rows
        self.steps += part.steps
        self.quantized = {**self.quantized, **part.quantized}

    @property
    def sparsity(self) -> float:
        """Fraction of the projections' weights that are 0."""
        return sum(row["zeros"] for row in self.rows) / sum(row["rows"] * row["columns"] for row in self.rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per block and projection.

        `sparsity` is counted in the weights. `block_error` is the mean of Eqn. 1 over the windows; `projection_error`
        is ||(W - W')x||^2 / ||Wx||^2 over the first window, x being the projection's input in the pruned block.
        """
        return pd.DataFrame(self.rows)

    def plot_allocation(self, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
        """Heat map of the sparsity, blocks x projections."""
        return allocation(self.to_frame(), ax)

    def __str__(self) -> str:
        blocks = len({row["block"] for row in self.rows})
        skipped = sum("skipped" in step for step in self.steps)
        note = f", {skipped} of {len(self.steps)} steps skipped (float16 overflow)" if skipped else ""
        return f"{self.method}: sparsity {self.sparsity:.4f} in {blocks} blocks, {self.seconds:.0f} s{note}"


def allocation(frame: pd.DataFrame, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
    """Heat map of `sparsity` over `block` and `projection`, the columns of `Report.to_frame()`."""
    import matplotlib.pyplot as plt  # slow to import

    names = list(dict.fromkeys(frame["projection"]))
    grid = frame.pivot(index="projection", columns="block", values="sparsity").loc[names]
    if ax is None:
        _, ax = plt.subplots(figsize=(2.5 + 0.22 * grid.shape[1], 0.8 + 0.32 * len(names)), layout="constrained")
    image = ax.imshow(grid, aspect="auto", cmap="viridis")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("block")
    ax.figure.colorbar(image, ax=ax, label="sparsity (fraction of zeros)")
    return ax
