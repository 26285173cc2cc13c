"""Report of a pruning run: one row per block and projection, one entry per training step, and the keep-masks."""

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from besa.masks import KeepMasks
from besa.system import require

if TYPE_CHECKING:
    import matplotlib.axes


@dataclass(repr=False, eq=False)
class Report:
    """Result of pruning a model.

    Args:
        rows: by block and projection: `block`, `projection`, `rows`, `columns`, `zeros`, `sparsity`, `projection_error`
            (||(W - W')x||^2 / ||Wx||^2 on the first window), `tokens` (calibration tokens that it saw), `note`; of the
            block `target_sparsity`, `block_error` (Eqn. 1, mean over windows) and `block_seconds`.
        steps: by training step: `block`, `step`, `loss`, `reconstruction_error`, `sparsity`.
        peak_bytes: highest allocation on the GPU, or highest resident memory of the process.
        keep_masks: True = keep, by (block, projection).
    """

    method: str
    _: KW_ONLY
    n_samples: int
    seq_len: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    keep_masks: KeepMasks = field(default_factory=KeepMasks)

    def extend(self, other: "Report") -> None:
        self.rows += other.rows
        self.steps += other.steps
        self.keep_masks.update(other.keep_masks)

    @property
    def sparsity(self) -> float:
        """Fraction of the projections' weights that are pruned, now or before this run."""
        n_weights = sum(row["rows"] * row["columns"] for row in self.rows)
        return sum(row["zeros"] for row in self.rows) / n_weights if n_weights else 0.0

    def to_frame(self) -> pd.DataFrame:
        """One row per block and projection."""
        return pd.DataFrame(self.rows)

    def summary(self) -> pd.DataFrame:
        """One row per kind of projection: its sparsity over all blocks, lowest and highest, and its mean error.

        Experts are one kind: `experts.*.up`; the calibration tokens of the rarest and the most frequent stand beside.
        """
        frame = self.to_frame().assign(projection=kinds_of(self.to_frame()))
        kinds = frame.assign(weights=frame["rows"] * frame["columns"]).groupby("projection", sort=False)
        table = kinds["sparsity"].agg(["min", "max"]).assign(projection_error=kinds["projection_error"].mean())
        table.insert(0, "sparsity", kinds["zeros"].sum() / kinds["weights"].sum())  # pyright: ignore
        if (kinds.size() > frame["block"].nunique()).any():
            table[["fewest_tokens", "most_tokens"]] = kinds["tokens"].agg(["min", "max"])
        return table

    def plot_allocation(self, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
        """Heat map of the sparsity, blocks x projections."""
        return plot_allocation(self.to_frame(), ax)

    def __str__(self) -> str:
        blocks = len({row["block"] for row in self.rows})
        return f"{self.method}: sparsity {self.sparsity:.4f} in {blocks} blocks, {self.seconds:.0f} s"

    def __repr__(self) -> str:
        return f"{self}\n{self.summary().to_string(float_format='{:.4f}'.format)}" if self.rows else str(self)

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{self.summary().to_html(float_format='{:.4f}'.format)}" if self.rows else f"<p>{self}</p>"


def kinds_of(frame: pd.DataFrame) -> pd.Series:
    """Names of the projections without the numbers of experts."""
    return frame["projection"].str.replace(r"\.\d+\.", ".*.", regex=True)


def plot_allocation(frame: pd.DataFrame, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
    """Heat map of `sparsity` over `block` and `projection`, columns of `Report.to_frame()`; white is
    `target_sparsity`."""
    require("matplotlib", "plot")
    import matplotlib.pyplot as plt  # slow to import
    from matplotlib.colors import CenteredNorm

    frame = frame.assign(projection=kinds_of(frame))
    names = list(dict.fromkeys(frame["projection"]))
    grid = frame.pivot_table("sparsity", "projection", "block").loc[names]
    target = frame["target_sparsity"].mean()
    if ax is None:
        _, ax = plt.subplots(figsize=(2.5 + 0.22 * grid.shape[1], 0.8 + 0.32 * len(names)), layout="constrained")
    image = ax.imshow(grid, aspect="auto", cmap="PuOr_r", norm=CenteredNorm(target))  # pyright: ignore
    ax.set(xlabel="block", yticks=range(len(names)), yticklabels=names)
    ax.figure.colorbar(image, ax=ax, label=f"sparsity (white: target, {target:.2f})")
    return ax
