"""DataFrame in, matplotlib Axes out; computes nothing."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter


def allocation(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of `sparsity` over `block` and `projection`, the columns of `Report.to_frame()`."""
    names = list(dict.fromkeys(frame["projection"]))
    grid = frame.pivot(index="projection", columns="block", values="sparsity").loc[names]
    if ax is None:
        _, ax = plt.subplots(figsize=(2.5 + 0.22 * grid.shape[1], 0.8 + 0.32 * len(names)), layout="constrained")
    image = ax.imshow(grid, aspect="auto", cmap="viridis")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("block")
    ax.figure.colorbar(image, ax=ax, label="sparsity (fraction of zeros)")
    return ax


def perplexity(frame: pd.DataFrame) -> Figure:
    """One panel per text: perplexity by method on a logarithmic axis, the dense model as a line.

    Args:
        frame: indexed by method, one column per text.
    """
    figure, axes = plt.subplots(1, frame.shape[1], figsize=(1.5 + 3.4 * frame.shape[1], 0.9 + 0.36 * len(frame)))
    figure.set_layout_engine("constrained")
    for ax, text in zip(np.atleast_1d(axes), frame.columns, strict=True):
        values = frame[text]
        positions = np.arange(len(values))
        ax.scatter(values, positions, color=[_colour(method) for method in values.index], zorder=3)
        for position, value in zip(positions, values, strict=True):
            ax.annotate(f"{value:.2f}", (value, position), xytext=(7, 0), textcoords="offset points", va="center")
        if "dense" in values.index:
            ax.axvline(values["dense"], color="grey", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(values.min() * 0.8, values.max() * (values.max() / values.min()) ** 0.35 * 1.15)
        ax.set_yticks(positions, values.index)
        ax.invert_yaxis()
        ax.set_xlabel(f"perplexity on {text} (log scale, lower is better)")
        ax.grid(axis="x", alpha=0.3)
        if ax is not np.atleast_1d(axes)[0]:
            ax.set_yticklabels([])
    return figure


def accuracy(frame: pd.DataFrame, errors: pd.DataFrame, chance: pd.Series) -> Figure:
    """One panel per task and for the average: accuracy by method with its standard error, the dense model as a line.

    Args:
        frame: percent, indexed by method, one column per task and `average`.
        errors: standard errors, of the same form.
        chance: percent right by guessing, indexed by column.
    """
    columns = min(4, frame.shape[1])
    rows = -(-frame.shape[1] // columns)
    size = (1.3 + 2.6 * columns, rows * (1.0 + 0.34 * len(frame)))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    positions = np.arange(len(frame))
    for ax, task in zip(axes.flat, frame.columns):
        for position, method in zip(positions, frame.index, strict=True):
            value, error = frame.loc[method, task], errors.loc[method, task]
            ax.errorbar(value, position, xerr=error, fmt="o", color=_colour(method), capsize=2)
            ax.annotate(f"{value:.2f}", (value, position), xytext=(0, 5), textcoords="offset points", ha="center")
        if "dense" in frame.index:
            ax.axvline(frame.loc["dense", task], color="grey", linestyle=":", linewidth=1)
        ax.axvline(chance[task], color="tab:orange", linestyle="--", linewidth=1)
        ax.set_xlabel(f"{task} (%)")
        ax.margins(x=0.15, y=0.25)
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(positions, frame.index)
    axes[0, 0].invert_yaxis()
    for ax in axes.flat[frame.shape[1] :]:
        ax.axis("off")
    figure.suptitle("zero-shot accuracy, higher is better; dotted: dense, dashed: guessing", fontsize=10)
    return figure


def speedup(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bars of `speed-up` by `projection` and `method`, a tick at each bar's `limit`, the dense model as a line at 1.

    Args:
        frame: one row per method and projection, the dense model left out.
    """
    methods, names = (list(dict.fromkeys(frame[column])) for column in ("method", "projection"))
    if ax is None:
        _, ax = plt.subplots(figsize=(2.5 + 1.1 * len(names), 3.2), layout="constrained")
    width = 0.84 / max(len(methods), 1)
    for number, method in enumerate(methods):
        rows = frame[frame["method"] == method]
        positions = [names.index(name) + (number + 0.5) * width - 0.42 for name in rows["projection"]]
        others = [other for other in methods if _colour(other) == _colour(method)]  # told apart by their shade
        shade = (1 + others.index(method)) / len(others)
        bars = ax.bar(positions, rows["speed-up"], 0.9 * width, color=_colour(method), alpha=shade, label=method)
        ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        ax.scatter(positions, rows["limit"], marker="_", s=90, color="black", zorder=3)
    ax.scatter([], [], marker="_", s=90, color="black", label="limit: all PEs busy with kept weights")
    ax.axhline(1, color="grey", linestyle=":", linewidth=1, label="dense")
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("speed-up (dense cycles / cycles)")
    ax.set_ylim(0, 1.35 * max([1.0, *frame["limit"]]))
    ax.legend(ncols=3, fontsize=8, loc="upper center", frameon=False)
    return ax


def block_errors(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Lines of `error` over `block` by `method`: how far pruning moved the hidden states behind each block."""
    if ax is None:
        _, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for method, rows in frame.groupby("method", sort=False):
        ax.plot(rows["block"], rows["error"], label=method, markersize=4, **_line(method))
    ax.set_xlabel("block")
    ax.set_ylabel(r"mean over tokens of $\|h - h_{dense}\|\,/\,\|h_{dense}\|$")
    ax.set_ylim(0, 1.05 * frame["error"].max())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def kind_perplexity(frame: pd.DataFrame, text: str, ax: Axes | None = None) -> Axes:
    """Lines of perplexity over `sparsity` by `kind`, the one kind of projection that was pruned; logarithmic.

    Args:
        frame: one row per kind and sparsity, the dense model's among them as sparsity 0 of every kind.
        text: the column that holds the perplexity.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for marker, (kind, rows) in zip(itertools.cycle("osD^v<>PX*"), frame.groupby("kind", sort=False)):
        ax.plot(rows["sparsity"], rows[text], marker=marker, markersize=5, label=kind)
    _log_perplexity(ax, text)
    ax.set_xlabel("sparsity of the one kind that is pruned (fraction of zeros)")
    ax.legend(fontsize=8, title="pruned, in every block", title_fontsize=8)
    return ax


def perplexity_by_sparsity(
    frame: pd.DataFrame, text: str, dense: float, recipe: tuple[float, float], ax: Axes | None = None
) -> Axes:
    """Lines of perplexity over the counted `sparsity` by `method`, logarithmic.

    Args:
        frame: one row per method and sparsity; `smooth` is False where BESA left the released recipe.
        text: the column that holds the perplexity.
        dense: the dense model's.
        recipe: what the released recipe can reach, shaded.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    for method, rows in frame.groupby("method", sort=False):
        rows = rows.sort_values("sparsity")
        line, inside, beyond = _line(method), rows[rows["smooth"]], rows[~rows["smooth"]]
        ax.plot(inside["sparsity"], inside[text], label=method, **line)
        if len(beyond):
            ax.plot(rows["sparsity"], rows[text], color=line["color"], linestyle=":", zorder=1.9)
            hollow = {**line, "linestyle": "", "markerfacecolor": "white"}
            ax.plot(beyond["sparsity"], beyond[text], label=f"{method}, plain softmax", **hollow)
    ax.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    ax.axvspan(*recipe, color="tab:red", alpha=0.08, linewidth=0, label="what BESA's recipe reaches")
    _log_perplexity(ax, text)
    ax.set_xlabel("sparsity, counted (fraction of zeros in the projections)")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def _log_perplexity(ax: Axes, text: str) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"perplexity on {text} (log scale)")
    ax.grid(alpha=0.3)


def _line(method: str) -> dict[str, str]:
    """Colour and marker, the same in every figure with lines."""
    known = {
        "wanda": ("tab:blue", "o"),
        "sparsegpt": ("tab:green", "^"),
        "magnitude": ("tab:gray", "s"),
        "besa-row-wise": ("tab:red", "D"),
        "besa-layer-wise": ("tab:orange", "v"),
    }
    return dict(zip(("color", "marker"), known.get(method, ("tab:purple", "P")), strict=True))


def _colour(method: str) -> str:
    return "tab:red" if method.startswith("besa") else "black" if method == "dense" else "tab:blue"
