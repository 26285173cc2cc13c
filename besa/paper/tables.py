"""Records as tables: what was measured, beside published and reference numbers, where it comes from, how to cite it."""

import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure

from besa.baselines import named_method
from besa.machine.files import read_note, replacing, write_text
from besa.machine.provenance import ROOT

# Here, because every notebook imports it: one size of type in all figures.
matplotlib.rcParams.update(
    {"axes.titlesize": 10, "figure.titlesize": 10, "legend.fontsize": 8, "legend.title_fontsize": 8}
)

Record = dict[str, Any]
"""What `besa.paper.records.Run.save` wrote of a row."""

REFERENCE = ROOT / "results" / "reference"
"""The results that come with the repository."""

_KINDS = {
    "config": {"item": str, "row": str, "model": str, "profile": str},
    "provenance": {"commit": str, "modified": bool, "hardware": str, "threads": int, "date": str, "versions": dict},
}
"""What every table and citation asks of a record."""


def load_record(path: Path) -> Record:
    """A record from its file, which another version or another hand may have written.

    Raises:
        ValueError: it is none, or not as it was written; says what is missing or odd.
        OSError: it cannot be read.
    """
    record = read_note(path)
    parts = record if isinstance(record, dict) else {}
    for part, kinds in _KINDS.items():
        found = parts.get(part)
        for name, kind in kinds.items():
            if not isinstance(found, dict) or not isinstance(found.get(name), kind):
                raise ValueError(f"not a record: its {part} lacks {name}, or holds one that is no {kind.__name__}")
    _check_numbers(record)
    return record


def _check_numbers(record: Record) -> None:
    """Refuse what cannot be counted or compared."""
    values = {name: record.get(name, {}) for name in ("metrics", "stderr")}
    odd = [name for name, found in values.items() if not isinstance(found, dict) or not _numbers(found.values())]
    odd += ["config_hash"] * (not isinstance(record.get("config_hash"), str))
    odd += ["sparsity"] * (not _numbers([record["config"].get("sparsity", 0.0)]))
    odd += ["method"] * (not isinstance(record["config"].get("method"), dict | None))
    if odd:
        raise ValueError(f"not a record: its {', '.join(odd)} cannot be read")


def is_whole(record: Record) -> bool:
    """Whether it has all that `Run.save` writes of a row."""
    has = lambda part, *names: isinstance(part, dict) and _numbers(map(part.get, names))
    rows = record.get("projections")
    whole = isinstance(rows, list) and all(has(row, "block", "rows", "columns", "sparsity") for row in rows)
    return whole and "metrics" in record and has(record, "sparsity", "seconds", "peak_bytes")


def _numbers(values: Iterable[Any]) -> bool:
    """Whether all are, and none is an integer beyond what a float holds."""
    return all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in values)


def slug(name: str) -> str:
    """A name as part of a file name: the last part of a path or hub id."""
    return Path(name).name.lower()


def summary(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: perplexities or accuracies, the sparsity counted, cost; seconds if all are of one machine."""
    records = list(records)
    pruned = [record for record in records if record["config"].get("method")]
    machines = {(record["provenance"]["hardware"], record["provenance"]["threads"]) for record in pruned}
    rows = [
        {"method": record["config"]["row"], "sparsity": record["sparsity"], **record["metrics"]}
        | ({} if len(machines) > 1 else {"seconds": record["seconds"]})
        | {"peak GiB": record["peak_bytes"] / 2**30}
        for record in records
    ]
    return pd.DataFrame(rows).set_index("method")


def over_draws(table: pd.DataFrame) -> pd.DataFrame:
    """A row for all draws of a `summary`'s row: means and standard deviations ("±"); costs are of single draws."""
    draws = table.groupby(level=0, sort=False)
    if draws.size().max() < 2:
        return table
    means = draws.mean().drop(columns=["seconds", "peak GiB"], errors="ignore")
    for name in means.columns[1:]:  # behind the sparsity
        means.insert(means.columns.get_loc(name) + 1, f"± {name}", draws[name].std())
    return means


def block_sparsities(record: Record) -> tuple[float, ...]:
    """The counted sparsity of every block, for other methods to prune to."""
    rows = pd.DataFrame(record["projections"])
    rows["weights"] = rows["rows"] * rows["columns"]
    rows["zeros"] = (rows["sparsity"] * rows["weights"]).round()  # Table 4's records name their share alone
    blocks = rows.groupby("block")[["zeros", "weights"]].sum()
    return tuple((blocks["zeros"] / blocks["weights"]).tolist())


def compare(
    records: Iterable[Record],
    item: str,
    metric: str = "perplexity",
    over: str = "text",
    impossible: Collection[tuple[str, str]] = (),
) -> pd.DataFrame:
    """Ours beside published, where there is a published value, with the relative difference and a verdict.

    The verdict is "reproduced" within 2 %, else "better" (higher for accuracy, else lower) or "worse"; runs that differ
    from the published one in any value that is known of it (profile, calibration, sampler, seed, precision, a field of
    the method, the tasks of an average, ...), or do not name it, are shown and not judged: the verdict names them.

    Args:
        records: `metrics` holds our values by what `over` says.
        metric: perplexity, cycles, accuracy_percent, ... of published.csv.
        over: text, projection or task: the column's name.
        impossible: (projection, method) of printed numbers that cannot be: shown, not judged.
    """
    everything = pd.read_csv(Path(__file__).with_name("published.csv"))
    steps = everything[everything["metric"] == "d_coef"].set_index(["model", "method"])["value"]
    published = everything[everything["item"].isin([item, "readme_granularity"]) & (everything["metric"] == metric)]
    rows = []
    for record in records:
        config, own = record["config"], published[published["model"] == record["config"]["model"]]
        own = own[own["method"].replace({"besa": "besa-row-wise"}) == config["row"]]
        others = _departures(config, steps) if len(own) else []
        for text, ours in record["metrics"].items():
            for _, row in own[own["task"] == text].drop_duplicates("value").iterrows():
                skip = "the printed number is not possible" if (text, row["method"]) in impossible else None
                part = ["tasks"] if text == "average" and set(own["task"]) != set(record["metrics"]) else []
                skip = f"other {', '.join(others + part)}" if others + part else skip
                verdict = f"not judged: {skip}" if skip else _verdict(ours, row["value"], metric == "accuracy_percent")
                entry = _difference(config["row"], over, text, ours, "published", row["value"])
                rows.append(entry | {"verdict": verdict, "source": row["source"]})
    return pd.DataFrame(rows).set_index("method") if rows else pd.DataFrame()


def _difference(row: str, over: str, text: str, ours: float, name: str, other: float) -> dict[str, Any]:
    return {"method": row, over: text, "ours": ours, name: other, "difference": f"{ours / other - 1:+.1%}"}


def _verdict(ours: float, published: float, higher_is_better: bool) -> str:
    difference = ours / published - 1
    better = (difference > 0) == higher_is_better
    return "reproduced" if abs(difference) <= 0.02 else "better" if better else "worse"


def _departures(config: dict[str, Any], steps: pd.Series) -> list[str]:
    """In which values a run differs from what the paper ran, or does not name them.

    Args:
        steps: the published `d_coef` by model and row.
    """
    published = {"profile": "paper", "dtype": "torch.float16", "calibration": "c4", "sampler": "crop", "seed": 0}
    published |= {"n_samples": 128, "seq_len": 2048}
    published |= {"table2": {"limit": None}, "table3": {"bits": 4, "group_size": None}}.get(config["item"], {})
    row = {"joint-wanda": "wanda", "joint-besa": "besa-row-wise"}.get(config["row"], config["row"])
    found = [name for name, value in published.items() if config.get(name, "unknown") != value]
    if row == "dense":
        return found
    step = {"d_coef": float(steps[key])} if (key := (config["model"], row)) in steps else {}
    method = named_method(row, 0.5, **step).config()
    own = (config.get("method") or {}) | {"sparsity": config["sparsity"]}
    names = [name for name in method | own if name != "quantize"]
    return found + [name for name in names if own.get(name, "unknown") != method.get(name, "unknown")]


def beside_reference(records: Iterable[Record], folder: Path) -> pd.DataFrame:
    """Ours beside the records in a folder, row by row, where one was asked for the same: the machine may differ.

    What is no record there is skipped, with a warning that names it.
    """
    references, rows = [], []
    for path in sorted(folder.glob("records/*.json")):
        try:
            references.append(load_record(path))
        except (ValueError, OSError, RecursionError) as error:
            warnings.warn(f"{path} is skipped ({error})", stacklevel=2)
    for record in records:
        same = [other for other in references if _asked_the_same(record["config"], other["config"])]
        for text, ours in record["metrics"].items() if same else ():
            value = max(same, key=lambda other: other["provenance"]["date"]).get("metrics", {}).get(text)
            rows += [_difference(record["config"]["row"], "of", text, ours, "reference", value)] if value else []
    return pd.DataFrame(rows).set_index("method") if rows else pd.DataFrame()


def _asked_the_same(config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations agree in all that both name, but for the machine; later ones may name more."""
    both = (config.keys() & other.keys()) - {"dtype", "device"}
    same = lambda a, b: all(a[key] == b[key] for key in a.keys() & b.keys()) if a and b else a == b
    return all(same(config[key], other[key]) if key == "method" else config[key] == other[key] for key in both)


def write_table(frame: pd.DataFrame, folder: Path, stem: str, caption: str) -> str:
    """Write a table as Markdown, CSV (unrounded) and LaTeX; returns the Markdown."""
    shown = _rounded(frame)
    cells = shown.rename(index=_in_markdown, columns=_in_markdown).map(_in_markdown)
    table = cells.to_markdown(stralign="left", disable_numparse=True)
    markdown = f"**{' '.join(caption.split())}**\n\n{table}\n"
    write_text(folder / f"{stem}.md", markdown)
    write_text(folder / f"{stem}.csv", frame.to_csv())
    write_text(folder / f"{stem}.tex", shown.to_latex(caption=_escaped(caption), escape=True))
    return markdown


def _in_markdown(cell: Any) -> Any:
    """A table's cell: one line, its bars and backslashes escaped."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(cell.split())) if isinstance(cell, str) else cell


_LATEX = {character: f"\\{character}" for character in "%&#_$"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"{": r"\textbraceleft{}", "}": r"\textbraceright{}"}
"""BibTeX counts every brace, an escaped one too."""


def _escaped(text: str) -> str:
    """For LaTeX and BibTeX; pandas does it in cells only."""
    return "".join(_LATEX.get(character, character) for character in text)


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as the paper prints them: two decimals, sparsities and relative errors four; one draw has no spread."""
    fine = lambda column: str(column).endswith("sparsity") or ("error" in str(column) and "1000" not in str(column))
    digits = {column: 4 if fine(column) else 0 if column == "seconds" else 2 for column in frame.columns}
    show = lambda value, n: f"{value:.{n}f}" if isinstance(value, float) else value
    shown = frame.apply(lambda column: column.map(lambda value: show(value, digits[column.name])))
    spreads = [column for column in frame.columns if str(column).startswith("±")]
    shown[spreads] = shown[spreads].where(frame[spreads].notna(), "")
    return shown


def save_figure(figure: Figure, folder: Path, stem: str) -> None:
    """Save a figure as PNG and SVG; the same figure gives the same bytes."""
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        with replacing(folder / f"{stem}.{suffix}") as temporary, matplotlib.rc_context({"svg.hashsalt": "besa"}):
            figure.savefig(temporary, dpi=150, metadata=metadata)


PAPER_BIBTEX = """@inproceedings{xu2024besa,
  title     = {{BESA}: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation},
  author    = {Peng Xu and Wenqi Shao and Mengzhao Chen and Shitao Tang and Kaipeng Zhang and Peng Gao and
               Fengwei An and Yu Qiao and Ping Luo},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://openreview.net/forum?id=gC6JTEU3jl},
  note      = {arXiv:2402.16880}
}"""


def commit(source: dict[str, Any]) -> str:
    """Of a record's provenance, abbreviated."""
    return source["commit"][:12] + (" (modified)" if source["modified"] else "")


def sources(records: Iterable[Record]) -> pd.DataFrame:
    """Where the numbers of each row, and draw, come from, which need not be the run that shows them."""
    records = list(records)
    names = ("row", "seed") if all("seed" in record["config"] for record in records) else ("row",)
    rows = [
        {name: record["config"][name] for name in names}
        | {"config_hash": record["config_hash"], "commit": commit(source)}
        | {"torch": source["versions"].get("torch"), **{name: source[name] for name in ("hardware", "threads", "date")}}
        for record in records
        for source in [record["provenance"]]
    ]
    return pd.DataFrame(rows).set_index("row")


def citation(records: list[Record]) -> str:
    """BibTeX of the paper, and of this run: commits, profile, hardware, last day, and every row by its hash."""
    config, date = records[-1]["config"], max(record["provenance"]["date"] for record in records)
    every = lambda values: _escaped(", ".join(dict.fromkeys(values)))
    item, profile = _escaped(config["item"]), _escaped(config["profile"])
    models = every(record["config"]["model"] for record in records)
    commits = every(commit(record["provenance"]) for record in records)
    hardware = every(record["provenance"]["hardware"] for record in records)
    rows = every(f"{record['config']['row']} {record['config_hash']}" for record in records)
    about = ROOT / "CITATION.cff"  # not in an installed package
    about = yaml.safe_load(about.read_text(encoding="utf-8")) if about.is_file() else {}
    address = about.get("repository-code") or about.get("url")
    url = f"  url    = {{{address}}},\n" if address else ""
    label = re.sub(r"[^\w.-]+", "-", f"besa-{config['item']}-{slug(config['model'])}-{records[-1]['config_hash']}")
    return f"""{PAPER_BIBTEX}

@misc{{{label},
  title  = {{{{besa, {item} on {models}}}}},
  author = {{{{besa contributors}}}},
  year   = {{{date[:4]}}},
{url}  note   = {{commit {commits}, profile {profile}, {hardware}, {date[:10]}; rows: {rows}}}
}}"""
