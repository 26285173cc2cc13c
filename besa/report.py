"""What pruning did: one row per block and projection, one entry per training step, and the keep-masks."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from besa.decoder import locate, projections
from besa.machine.fields import documented
from besa.masks import KeepMasks
from besa.quantize import QuantizedWeight

if TYPE_CHECKING:
    import matplotlib.axes

    from besa.walk import PrunedBlock


MISSED = "the block's sparsity is "
"""How the note on the rows of a block that misses its target begins."""


@documented
@dataclass(repr=False, eq=False)
class Report:
    """Rows by block and projection, training steps by block, masks, and what pruning took."""

    method: str
    """Its name."""
    _: KW_ONLY
    n_samples: int
    """Calibration windows."""
    seq_len: int
    """Tokens of each."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """By block and projection: `block`, `projection`, `rows`, `columns`, `zeros`, `sparsity`, `projection_error`; of
    the whole block `block_error` (Eqn. 1, relative to each output channel) and `block_seconds`; `note`."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """By training step: `block`, `step`, `loss`, `reconstruction_error` (relative to what `Besa.loss` names),
    `sparsity`; `skipped` where the step was."""
    seconds: float = 0.0
    """What pruning took, all in all."""
    peak_bytes: int = 0
    """Highest resident memory of the process, or highest allocation on the GPU, while it was pruned."""
    keep_masks: KeepMasks = field(default_factory=KeepMasks)
    """True = kept, by block and projection; sparsity is counted from them. `keep_masks.save(path)` writes them,
    `besa.masks.KeepMasks().load(path)` reads them for `finetune` and `pack`."""
    quantized: Mapping[tuple[int, str], QuantizedWeight] = field(default_factory=dict)
    """Where the method quantized: codes, scales and zero-points by block and projection."""

    @classmethod
    def of_block(
        cls,
        index: int,
        module: nn.Module,
        pruned: "PrunedBlock",
        error: float,
        projection_errors: dict[str, float],
        seconds: float,
    ) -> "Report":
        """What was done to one block, or to a span of blocks that starts with block `index`."""
        report = cls("", n_samples=0, seq_len=0)
        for name in projections(module):
            keep_mask, key = pruned.keep_masks[name], locate(index, module, name)
            rows, columns = keep_mask.shape
            zeros = rows * columns - int(keep_mask.sum())
            row = {"block": key[0], "projection": key[1], "rows": rows, "columns": columns, "zeros": zeros}
            row |= {"sparsity": zeros / (rows * columns), "projection_error": projection_errors[name]}
            row |= {"block_error": error, "block_seconds": seconds, "note": pruned.notes.get(name, "")}
            report.rows.append(row)
            report.keep_masks[key] = keep_mask
        report.steps = [{"block": index, "step": number, **step} for number, step in enumerate(pruned.steps)]
        report.quantized = {locate(index, module, name): weight.cpu() for name, weight in pruned.quantized.items()}
        return report

    def extend(self, part: "Report") -> None:
        """Append the report of further blocks."""
        self.rows += part.rows
        self.steps += part.steps
        self.keep_masks.take(part.keep_masks)
        self.quantized = {**self.quantized, **part.quantized}

    @property
    def sparsity(self) -> float:
        """Fraction of the projections' weights that are pruned, counted from the keep-masks."""
        weights = sum(row["rows"] * row["columns"] for row in self.rows)
        return sum(row["zeros"] for row in self.rows) / weights if weights else 0.0

    @property
    def missed(self) -> list[str]:
        """In words, each block whose counted sparsity misses its target by more than `besa.prune.TOLERANCE`."""
        noted = [(row["block"], row["note"].partition(MISSED)[2]) for row in self.rows if MISSED in row["note"]]
        return [f"block {block} has {rest}" for block, rest in dict(noted).items()]

    def to_frame(self) -> pd.DataFrame:
        """One row per block and projection.

        `sparsity` and `zeros` are counted from the keep-masks. `block_error` is the mean of Eqn. 1 over the windows,
        against the method's own targets: errors of methods with pruned and with dense targets do not compare;
        `projection_error` is ||(W - W')x||^2 / ||Wx||^2 over the first window, x being the projection's input in the
        pruned block.
        """
        return pd.DataFrame(self.rows)

    def summary(self) -> pd.DataFrame:
        """One row per kind of projection: its sparsity over all blocks, lowest and highest, and its mean error."""
        frame = self.to_frame()
        kinds = frame.assign(weights=frame["rows"] * frame["columns"]).groupby("projection", sort=False)
        table = kinds["sparsity"].agg(["min", "max"]).assign(projection_error=kinds["projection_error"].mean())
        table.insert(0, "sparsity", kinds["zeros"].sum() / kinds["weights"].sum())
        return table

    def plot_allocation(self, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
        """Heat map of the sparsity, blocks x projections."""
        return plot_allocation(self.to_frame(), ax)

    def __str__(self) -> str:
        blocks = len({row["block"] for row in self.rows})
        if not blocks:
            return f"{self.method}: nothing pruned yet"
        missed, skipped = self.missed, sum("skipped" in step for step in self.steps)
        note = f", {skipped} of {len(self.steps)} steps skipped (float16 overflow)" if skipped else ""
        note += f"\nWARNING: {len(missed)} of {blocks} blocks miss their target: {'; '.join(missed)}" if missed else ""
        return f"{self.method}: sparsity {self.sparsity:.4f} in {blocks} blocks, {self.seconds:.0f} s{note}"

    def __repr__(self) -> str:
        return f"{self}\n{self.summary().to_string(float_format='{:.4f}'.format)}" if self.rows else str(self)

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{self.summary().to_html(float_format='{:.4f}'.format)}" if self.rows else f"<p>{self}</p>"


Masks = Report | Mapping[tuple[int, str], Tensor]
"""What `besa.prune` returned, or keep-masks (rows, columns) by block and projection."""


def plot_allocation(frame: pd.DataFrame, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
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
