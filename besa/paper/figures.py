"""DataFrame in, matplotlib Axes out; computes nothing."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from besa.report import allocation

__all__ = ["allocation"]


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
        ax.margins(y=0.12)
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
    figure.supxlabel("zero-shot accuracy, higher is better; dotted: dense, dashed: guessing", fontsize=10)
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


def by_setting(frame: pd.DataFrame, references: pd.DataFrame | None = None) -> Figure:
    """A row of panels per text: perplexity over `setting`, a panel per value of `panel`, a line per value of `line`.

    What lies 30 % above its row's median is an arrow at the upper edge with its value, lest it flatten the rest.

    Args:
        frame: `text`, `panel`, `line` (at most three), `setting`, `perplexity` and `baseline` (True is ringed).
            Settings that are all words have no order: they are not connected.
        references: perplexities drawn as horizontal lines, indexed by name, one column per text.
    """
    texts, panels, lines = (list(dict.fromkeys(frame[column])) for column in ("text", "panel", "line"))
    settings = {panel: list(dict.fromkeys(frame.loc[frame["panel"] == panel, "setting"])) for panel in panels}
    widths = [len(settings[panel]) + 0.4 for panel in panels]
    size = (1.4 + max(0.68 * sum(widths), 2.6 + 0.4 * len(lines)), 0.7 + 2.5 * len(texts))
    figure, axes = plt.subplots(
        len(texts), len(panels), figsize=size, sharey="row", squeeze=False, layout="constrained", width_ratios=widths
    )
    for text, row in zip(texts, axes, strict=True):
        edge = 1.3 * frame.loc[frame["text"] == text, "perplexity"].median()
        for panel, ax in zip(panels, row, strict=True):
            inside = frame[(frame["text"] == text) & (frame["panel"] == panel)]
            _settings_panel(ax, inside, settings[panel], lines, edge)
            for number, (label, value) in enumerate(references[text].items() if references is not None else ()):
                if value < edge:
                    ax.axhline(value, color="grey", linestyle=(":", "--", "-.")[number % 3], linewidth=1, label=label)
            ax.set_xlabel(panel)
        row[0].set_ylabel(f"perplexity on {text}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    edges = frame.groupby("text")["perplexity"].transform("median") * 1.3
    if (frame["perplexity"] >= edges).any():
        handles.append(Line2D([], [], marker="^", color="black", linestyle="none"))
        labels.append("above the scale")
    if frame["baseline"].any():
        handles.append(Line2D([], [], marker="o", markersize=11, fillstyle="none", color="black", linestyle="none"))
        labels.append("baseline")
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _settings_panel(ax: Axes, frame: pd.DataFrame, settings: list, lines: list[str], edge: float) -> None:
    """One panel of `by_setting`."""
    style = "o-" if any(isinstance(setting, int) for setting in settings) else "o"
    highest = frame.groupby("setting")["perplexity"].max()
    colours = ("tab:red", "tab:orange", "tab:purple")  # all of them BESA's
    for number, line in enumerate(lines):
        rows = frame[frame["line"] == line]
        x = [settings.index(setting) for setting in rows["setting"]]
        neighbours = pd.concat([rows["perplexity"].shift(1), rows["perplexity"].shift(-1)], axis=1)
        valley = (rows["perplexity"] < neighbours.min(axis=1)) & neighbours.notna().all(axis=1)
        shown = rows["perplexity"].where(rows["perplexity"] < edge)
        ax.plot(x, shown, style, color=colours[number], label=line, linewidth=1)
        for place, (index, point) in zip(x, rows.iterrows(), strict=True):
            value, cut = point["perplexity"], point["perplexity"] >= edge
            above = value == highest[point["setting"]] and not cut and not valley[index]
            offset, va = ((0, 7), "bottom") if above else ((0, -7), "top")
            ax.annotate(
                f"{value:.2f}",
                (place, min(value, edge)),
                offset,
                textcoords="offset points",
                ha="center",
                va=va,
                size=8,
            )
            if cut:
                ax.plot(place, edge, "^", color=colours[number])
            if point["baseline"]:
                ax.plot(place, min(value, edge), "o", markersize=11, fillstyle="none", color="black")
    ax.set_xticks(range(len(settings)), settings, fontsize=8)
    ax.set_xlim(-0.7, len(settings) - 0.3)
    ax.margins(y=0.2)
    ax.grid(axis="y", alpha=0.3)


def row_spread(frame: pd.DataFrame, limits: tuple[float, float], ax: Axes | None = None) -> Axes:
    """How the sparsities of rows spread within each projection: median, quartiles, 1st and 99th percentile, extremes.

    Args:
        frame: the quantiles 0, 0.01, 0.25, 0.5, 0.75, 0.99 and 1 in this order as rows, one column per projection.
        limits: lowest and highest sparsity that can be expressed, drawn as dotted lines.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6.5, 1.2 + 0.4 * frame.shape[1]), layout="constrained")
    keys = ("low", "whislo", "q1", "med", "q3", "whishi", "high")
    boxes = [dict(zip(keys, frame[name], strict=True)) | {"label": name} for name in frame.columns]
    ax.bxp(boxes, orientation="horizontal", showfliers=False, medianprops={"color": "tab:red"})
    for position, box in enumerate(boxes, start=1):
        ax.plot([box["low"], box["high"]], [position, position], "|", color="grey", markersize=7)
    for limit in limits:
        ax.axvline(limit, color="grey", linestyle=":", linewidth=1)
    ax.invert_yaxis()
    ax.set_xlabel(
        "sparsity of a row (fraction of zeros), all blocks\n"
        "box: quartiles, whiskers: 1 % and 99 %, ticks: extremes, dotted: limits"
    )
    ax.grid(axis="x", alpha=0.3)
    return ax


def training(frame: pd.DataFrame, sparsity: float) -> Figure:
    """Loss, reconstruction error and sparsity over the training steps, one line per block.

    Args:
        frame: `block`, `step`, `loss`, `reconstruction_error`, `sparsity`.
        sparsity: the target, drawn as a dotted line.
    """
    labels = {
        "loss": "loss\n(Eqn. 2, log scale)",
        "reconstruction_error": "reconstruction error\n(Eqn. 1, log scale)",
        "sparsity": "expected sparsity\n(fraction of zeros)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    blocks = list(dict.fromkeys(frame["block"]))
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for number, block in enumerate(blocks):
            rows = frame[frame["block"] == block]
            colour = plt.get_cmap("viridis")(0.9 * number / max(len(blocks) - 1, 1))
            ax.plot(rows["step"], rows[column], color=colour, label=f"block {block}", linewidth=1.2)
        ax.set_xlabel("step (one window each)")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        if column != "sparsity":
            ax.set_yscale("log")
    axes[2].axhline(sparsity, color="grey", linestyle=":", label="target")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def correlations(frame: pd.DataFrame) -> Figure:
    """One panel per level: Spearman's correlation of sparsity with each feature, mean as a bar, projections as points.

    Args:
        frame: indexed by `among` (the level) and `feature`, one column per projection and `mean`.
    """
    levels = list(dict.fromkeys(frame.index.get_level_values("among")))
    names = [name for name in frame.columns if name != "mean"]
    heights = [len(frame.loc[level]) for level in levels]
    figure, axes = plt.subplots(
        len(levels), 1, figsize=(7.5, 1.6 + 0.42 * len(frame)), sharex=True, squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for ax, level in zip(axes[:, 0], levels, strict=True):
        rows = frame.loc[level]
        positions = np.arange(len(rows))
        ax.barh(positions, rows["mean"], 0.7, color="lightgrey", label="mean")
        for number, name in enumerate(names):
            offsets = positions + 0.5 * ((number + 0.5) / len(names) - 0.5)
            ax.scatter(rows[name], offsets, s=16, color=f"C{number % 10}", label=name, zorder=3)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(positions, rows.index)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_title(f"among {level}", fontsize=10, loc="left")
        ax.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlim(-1.05, 1.05)
    axes[-1, 0].set_xlabel("Spearman's correlation with sparsity")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


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
    return "tab:red" if "besa" in method else "black" if method == "dense" else "tab:blue"
