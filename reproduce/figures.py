"""Figures that several notebooks draw, in one palette: DataFrame in, figure out."""

import textwrap
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

matplotlib.rcParams.update({"axes.titlesize": 10, "figure.titlesize": 11, "legend.fontsize": 8, "axes.axisbelow": True})

LABELS = {  # README's names of rows; * = not in the paper
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "besa-row-wise": "BESA",
    "besa-layer-wise": "BESA layer-wise",
    "exact": "learned masks *",
    "exact-update": "learned masks and weights *",
    "closed": "closed form *",
    "besa": "BESA",
    "quantized": "quantized only",
    "joint-besa": "BESA",
    "joint-wanda": "Wanda",
    "joint-clipping": "Wanda, learned clipping",
    "admm": "ADMM",
    "alps": "ALPS",
    "ria": "RIA",
    "dsnot": "DSnoT",
    "ebft": "EBFT",
    "safe": "SAFE",
}
STYLES = {  # Okabe and Ito's palette, which colour-blind readers can tell apart
    "dense": {"color": "black", "marker": "*"},
    "besa-row-wise": {"color": "#D55E00", "marker": "D"},
    "besa-layer-wise": {"color": "#E69F00", "marker": "v"},
    "exact": {"color": "#CC79A7", "marker": "p"},
    "wanda": {"color": "#0072B2", "marker": "o"},
    "sparsegpt": {"color": "#009E73", "marker": "^"},
    "magnitude": {"color": "#999999", "marker": "s"},
    "exact-update": {"color": "#7B3294", "marker": "P"},
}
OTHER = {"color": "#56B4E9", "marker": "X"}
ALIASES = {"joint-besa": "besa-row-wise", "besa": "besa-row-wise", "joint-wanda": "wanda"}


def label(row: str) -> str:
    """README's name of a row; a row with a further part, such as "wanda + block", is not in the paper."""
    name, plus, part = row.partition(" + ")
    name = LABELS.get(name, name)
    return f"{name.removesuffix(' *')}{plus}{part} *" if part else name


def style(row: str) -> dict[str, str]:
    """Colour and marker of a row, the same in every figure."""
    name = row.partition(" + ")[0]
    return STYLES.get(ALIASES.get(name, name), OTHER)


def kind_styles(n: int) -> list[dict[str, Any]]:
    """Colours and markers of n kinds of projections, none of them a method's."""
    return [
        {"color": colour, "marker": "osD^v<>"[k % 7]}
        for k, colour in enumerate(plt.cm.viridis(np.linspace(0, 0.95, n)))
    ]


def write_size(figure: Figure, size: str, is_smoke: bool) -> None:
    """Write the size of the run in small letters below the title of a figure, in red if it is a smoke run."""
    if any(text.get_text().endswith(" *") for text in figure.findobj(Text)):
        size = f"{size} * not in the paper."
    title, lines = figure.get_suptitle(), textwrap.wrap(size, int(17 * figure.get_figwidth()))
    height = figure.get_figheight() + 0.2 * len(lines)
    figure.set_figheight(height)
    figure.suptitle(title + "\n" * len(lines))  # empty lines for the size
    place = 1 - (0.25 + 0.18 * title.count("\n")) / height
    colour = "red" if is_smoke else "dimgrey"
    figure.text(0.5, place, "\n".join(lines), ha="center", va="top", size=7.5, color=colour, linespacing=1.4)


def perplexity(table: pd.DataFrame, texts: list[str]) -> Figure:
    """A panel per text: perplexity of each row with its standard deviation ("± text"), the dense model as a line."""
    size = (0.6 + 0.075 * max(map(len, map(label, table.index))) + 3.3 * len(texts), 1.1 + 0.4 * len(table))
    figure, axes = plt.subplots(1, len(texts), figsize=size, sharey=True, squeeze=False, layout="constrained")
    places = np.arange(len(table))
    for ax, text in zip(axes[0], texts, strict=True):
        for place, (row, value) in zip(places, table[text].items()):
            spread = table[f"± {text}"].iloc[place] if f"± {text}" in table else np.nan
            error_point(ax, value, place, spread, row, f"{value:.2f}", horizontal=True)
        if "dense" in table.index:
            ax.axvline(table[text]["dense"], color="black", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        plain_ticks(ax)
        ax.set_xlabel(f"perplexity on {text} (log scale)")
        ax.margins(x=0.12)
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(places, map(label, table.index))
    axes[0, 0].set_ylim(len(table) - 0.5, -0.7)
    return figure


def plain_ticks(ax: Axes) -> None:
    """Write numbers such as 30, not powers, along a logarithmic x axis."""
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if high < 6 * low else (1, 2, 5), numticks=20))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())


def error_point(ax: Axes, x: float, y: float, spread: float, row: str, number: str, horizontal: bool = False) -> None:
    """A point, its error bar drawn over the marker so that short bars are seen, and its number above them."""
    colour, marker = style(row)["color"], style(row)["marker"]
    ax.plot([x], [y], marker, color=colour, markersize=9, markeredgewidth=0)
    top = y
    if spread == spread:
        error = {"xerr" if horizontal else "yerr": spread}
        ax.errorbar([x], [y], **error, fmt="none", color="black", capsize=3, elinewidth=1, zorder=4)
        top = y if horizontal else y + spread
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # covers a line behind the number
    ax.annotate(
        number, (x, top), (0, 6), textcoords="offset points", ha="center", va="bottom", size=8, bbox=box, zorder=5
    )


def log_perplexity(ax: Axes, text: str) -> None:
    """A logarithmic axis of perplexity."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.1f}".removesuffix(".0")))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"perplexity on {text} (log scale)")
    ax.grid(alpha=0.3)


def by_setting(frame: pd.DataFrame, references: dict[str, float] | None = None) -> Figure:
    """A panel per `panel`: the perplexity of each `setting` with its standard deviation.

    Values 30 % above the median are beyond the axis: an arrow points there, with their value.

    Args:
        frame: columns panel, setting, row (which sets colour and marker), perplexity, spread.
        references: perplexities that are drawn as horizontal lines, by name.
    """
    panels = list(dict.fromkeys(frame["panel"]))
    widths = [frame.loc[frame["panel"] == panel, "setting"].nunique() + 1 for panel in panels]
    size = (2.0 + 0.75 * sum(widths), 3.2)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained", width_ratios=widths
    )
    edge = 1.3 * frame["perplexity"].median()
    for ax, panel in zip(axes[0], panels, strict=True):
        points = frame[frame["panel"] == panel]
        settings = list(dict.fromkeys(points["setting"]))
        for _, point in points.iterrows():
            place, value = settings.index(point["setting"]), point["perplexity"]
            if value < edge:
                error_point(ax, place, value, point["spread"], point["row"], f"{value:.2f}")
                continue
            ax.annotate(
                f"{value:.1f},\nbeyond\nthe axis",
                (place, 0.99),
                (0, -24),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                size=8,
                arrowprops={"arrowstyle": "-|>", "color": style(point["row"])["color"], "linewidth": 2},
            )
        for number, (name, value) in enumerate((references or {}).items()):
            ax.axhline(value, color="grey", linestyle=(":", "--", "-.")[number % 3], linewidth=1, label=label(name))
        ax.set_xticks(range(len(settings)), settings, fontsize=8)
        ax.set_xlim(-0.6, len(settings) - 0.4)
        ax.set_title(panel)
        ax.margins(y=0.25)
        ax.grid(axis="y", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
