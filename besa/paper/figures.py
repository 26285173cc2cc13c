"""What several notebooks draw: DataFrame in, figure out; computes nothing."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

LINES = {
    "wanda": {"color": "tab:blue", "marker": "o"},
    "sparsegpt": {"color": "tab:green", "marker": "^"},
    "magnitude": {"color": "tab:gray", "marker": "s"},
    "besa-row-wise": {"color": "tab:red", "marker": "D"},
    "besa-layer-wise": {"color": "tab:orange", "marker": "v"},
}
"""Colour and marker of a method, the same in every figure with lines."""


def colour(method: str) -> str:
    """BESA's, the dense model's or everybody else's."""
    return "tab:red" if "besa" in method else "black" if method == "dense" else "tab:blue"


def perplexity(frame: pd.DataFrame) -> Figure:
    """One panel per text: perplexity by method on a logarithmic axis, the dense model as a line.

    Args:
        frame: indexed by method, one column per text and, where there are several draws, one for its spread ("± text").
    """
    texts = [text for text in frame.columns if not text.startswith("± ")]
    size = (1.5 + 3.4 * len(texts), 0.9 + 0.36 * len(frame))
    figure, axes = plt.subplots(1, len(texts), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, text in zip(axes[0], texts, strict=True):
        values = frame[text]
        ax.scatter(values, np.arange(len(values)), color=[colour(method) for method in values.index], zorder=3)
        if (spread := f"± {text}") in frame:
            ax.errorbar(values, np.arange(len(values)), xerr=frame[spread], fmt="none", color="grey", capsize=2)
        for position, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (value, position), xytext=(7, 0), textcoords="offset points", va="center")
        if "dense" in values.index:
            ax.axvline(values["dense"], color="grey", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(values.min() * 0.8, values.max() * (values.max() / values.min()) ** 0.35 * 1.15)
        ax.set_xlabel(f"perplexity on {text} (log scale, lower is better)")
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(np.arange(len(frame)), frame.index)
    axes[0, 0].margins(y=0.12)
    axes[0, 0].invert_yaxis()
    return figure


def log_perplexity(ax: Axes, text: str) -> None:
    """A logarithmic axis of perplexity on a text."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.1f}".removesuffix(".0")))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"perplexity on {text} (log scale)")
    ax.grid(alpha=0.3)


def by_setting(frame: pd.DataFrame, references: pd.DataFrame | None = None) -> Figure:
    """A row of panels per text: perplexity over `setting`, a panel per value of `panel`, a line per value of `line`.

    What lies 30 % above its row's median is an arrow at the upper edge with its value, lest it flatten the rest.

    Args:
        frame: `text`, `panel`, `line` (at most three), `setting`, `perplexity` and `baseline` (True is ringed).
            Settings that are all words have no order: they are not connected.
        references: perplexities drawn as horizontal lines, indexed by name, one column per text.
    """
    texts, panels = (list(dict.fromkeys(frame[column])) for column in ("text", "panel"))
    widths = [frame.loc[frame["panel"] == panel, "setting"].nunique() + 0.4 for panel in panels]
    size = (1.4 + max(0.68 * sum(widths), 3.8), 0.7 + 2.5 * len(texts))
    figure, axes = plt.subplots(
        len(texts), len(panels), figsize=size, sharey="row", squeeze=False, layout="constrained", width_ratios=widths
    )
    for text, row in zip(texts, axes, strict=True):
        edge = 1.3 * frame.loc[frame["text"] == text, "perplexity"].median()
        for panel, ax in zip(panels, row, strict=True):
            _settings_panel(ax, frame[(frame["text"] == text) & (frame["panel"] == panel)], edge)
            for number, (label, value) in enumerate(references[text].items() if references is not None else ()):
                if value < edge:
                    ax.axhline(value, color="grey", linestyle=(":", "--", "-.")[number % 3], linewidth=1, label=label)
            ax.set_xlabel(panel)
        row[0].set_ylabel(f"perplexity on {text}")
    labels = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _settings_panel(ax: Axes, frame: pd.DataFrame, edge: float) -> None:
    """One panel of `by_setting`."""
    settings = list(dict.fromkeys(frame["setting"]))
    style = "o-" if any(isinstance(setting, int) for setting in settings) else "o"
    highest = frame.groupby("setting")["perplexity"].transform("max")
    for colour, (line, rows) in zip(("tab:red", "tab:orange", "tab:purple"), frame.groupby("line", sort=False)):
        x = np.array([settings.index(setting) for setting in rows["setting"]])
        shown, cut = rows["perplexity"].clip(upper=edge), (rows["perplexity"] >= edge).to_numpy()
        ax.plot(x, shown.where(~cut), style, color=colour, label=line, linewidth=1)
        rings = rows["baseline"].to_numpy()
        if cut.any():
            ax.plot(x[cut], shown[cut], "^", color=colour, label="above the scale")
        if rings.any():
            ax.plot(x[rings], shown[rings], "o", markersize=11, fillstyle="none", color="black", label="baseline")
        values = rows["perplexity"].to_numpy()
        valleys = np.r_[False, (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:]), False]
        for n, value in enumerate(values):
            offset = -14 if value < highest.loc[rows.index[n]] or valleys[n] or cut[n] else 7  # off other lines
            place = (x[n], shown.iloc[n])
            ax.annotate(f"{value:.2f}", place, (0, offset), textcoords="offset points", ha="center", size=8)
    ax.set_xticks(range(len(settings)), settings, fontsize=8)
    ax.set_xlim(-0.7, len(settings) - 0.3)
    ax.margins(y=0.2)
    ax.grid(axis="y", alpha=0.3)
