"""Tables of records: summary, comparison with the paper and with results/reference, provenance, citation."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure

from besa.data.files import atomic_write

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"  # the results that come with the repository
PUBLISHED = Path(__file__).with_name("published.csv")


def slug(name: str) -> str:
    """Last part of a path or hub id, for file names."""
    return Path(name).name.lower()


def summary(records: Iterable[Record]) -> pd.DataFrame:
    """One line per record: counted sparsity, metrics, seconds and peak memory of pruning."""
    lines = [
        {"method": record["config"]["row"], "sparsity": record["sparsity"], **record["metrics"]}
        | {"seconds": record["seconds"], "peak GiB": record["peak_bytes"] / 2**30}
        for record in records
    ]
    return pd.DataFrame(lines).set_index("method")


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each row's seeds and, behind each metric, their standard deviation ("±")."""
    seeds = table.groupby(level=0, sort=False)
    if seeds.size().max() < 2:
        return table
    means = seeds.mean().drop(columns=["seconds", "peak GiB"])
    for name in means.columns[1:]:
        means.insert(means.columns.get_loc(name) + 1, f"± {name}", seeds[name].std())
    return means


def block_sparsities(record: Record) -> tuple[float, ...]:
    """Counted sparsity of every block."""
    rows = pd.DataFrame(record["projections"])
    rows["weights"] = rows["rows"] * rows["columns"]
    rows["zeros"] = (rows["sparsity"] * rows["weights"]).round()
    blocks = rows.groupby("block")[["zeros", "weights"]].sum()
    return tuple((blocks["zeros"] / blocks["weights"]).tolist())


def published(item: str, metric: str = "perplexity", model: str = "llama-7b") -> pd.DataFrame:
    """The paper's numbers: a line per method, a column per text, task or projection."""
    numbers = pd.read_csv(PUBLISHED).query("item == @item and metric == @metric and model == @model")
    return numbers.pivot_table(index="method", columns="task", values="value", sort=False)


def beside_paper(records: Iterable[Record], item: str, metric: str = "perplexity") -> pd.DataFrame:
    """BESA relative to the paper's other methods, there and here: ratios, or points of accuracy.

    The paper's columns are of the same model if its BESA is in the paper, else of LLaMA-7B.
    """
    means = summary(records).groupby(level=0, sort=False).mean()
    ours = means.drop(columns=["sparsity", "seconds", "peak GiB"])
    name = records[0]["config"]["model"]
    model, paper = name, _relative(published(item, metric, name), metric)
    if paper.empty:
        model, paper = "llama-7b", _relative(published(item, metric), metric)
    parts = [paper.add_prefix(f"paper, {model}: "), _relative(ours, metric).add_prefix(f"{name}: ")]
    both = parts[0].index.intersection(parts[1].index, sort=False)
    return pd.concat([part.loc[both] for part in parts], axis=1).rename_axis("BESA relative to")


def _relative(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """BESA's line relative to each other line."""
    frame = frame.rename(index={"besa-row-wise": "besa", "joint-besa": "besa"})
    if "besa" not in frame.index:
        return frame.iloc[:0]
    others = frame.drop(index="besa")
    if metric == "accuracy_percent":
        return frame.loc["besa"] - others
    return frame.loc["besa"] / others


def compare(records: list[Record], item: str, metric: str = "perplexity") -> pd.DataFrame:
    """Our numbers beside published ones of the same model: reproduced if they differ by at most 2 %.

    Published methods without a row of ours come last.
    """
    lines = []
    for record in records:
        config = record["config"]
        paper = published(item, metric, config["model"]).rename(index={"besa": "besa-row-wise"})
        same = config["profile"] == "paper" and config["calibration"] == "c4"
        for name, ours in record["metrics"].items():
            if config["row"] in paper.index and name in paper:
                other = paper.loc[config["row"], name]
                verdict = "reproduced" if abs(ours / other - 1) <= 0.02 else "not reproduced"
                line = {"method": config["row"], "of": name, "ours": ours, "published": other}
                line |= {"difference": f"{ours / other - 1:+.1%}", "verdict": verdict if same else "other settings"}
                lines.append(line)
    others = published(item, metric, config["model"]).rename(index={"besa": "besa-row-wise"})
    lines += [
        {"method": method, "of": name, "published": value, "verdict": "no row here"}
        for (method, name), value in others.stack().items()
        if name in record["metrics"] and method not in [each["config"]["row"] for each in records]
    ]
    return pd.DataFrame(lines).set_index("method") if lines else pd.DataFrame()


def beside_reference(records: Iterable[Record], folder: Path) -> pd.DataFrame:
    """Our metrics beside those of the same configuration in a folder; precision and device may differ."""
    references, lines = {}, []
    for path in sorted(folder.glob("records/*.json")):
        reference = json.loads(path.read_text())
        references[_without_machine(reference)] = reference
    for record in records:
        reference = references.get(_without_machine(record), {"metrics": {}})
        for name, value in record["metrics"].items():
            if other := reference["metrics"].get(name):
                line = {"method": record["config"]["row"], "of": name, "ours": value, "reference": other}
                lines.append(line | {"difference": f"{value / other - 1:+.1%}"})
    return pd.DataFrame(lines).set_index("method") if lines else pd.DataFrame()


def _without_machine(record: Record) -> str:
    config = {key: value for key, value in record["config"].items() if key not in ("dtype", "device")}
    if "matched_to" in config:
        config["method"] = config["method"] | {"sparsities": None}  # counted by another machine
    return json.dumps(config, sort_keys=True)


def write_table(frame: pd.DataFrame, folder: Path, stem: str, caption: str) -> str:
    """Write a table as Markdown (rounded) and CSV; returns the Markdown. `frame.to_latex()` makes LaTeX of it."""
    table = f"**{caption}**\n\n{markdown(frame)}\n"
    with atomic_write(folder / f"{stem}.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    with atomic_write(folder / f"{stem}.csv") as temporary:
        frame.to_csv(temporary)
    return table


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table, numbers rounded as the paper rounds them."""
    shown = frame.apply(lambda column: column.map(lambda value: _rounded(value, str(column.name))))
    return shown.to_markdown(stralign="left", disable_numparse=True)


def _rounded(value: Any, column: str) -> Any:
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    if value != value:
        return ""
    if column == "seconds":
        return f"{value:.0f}"
    return f"{value:.4f}" if column.endswith("sparsity") or "error" in column else f"{value:.2f}"


def save_figure(figure: Figure, folder: Path, stem: str) -> None:
    """Save a figure as PNG and SVG; the same figure gives the same bytes."""
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        with atomic_write(folder / f"{stem}.{suffix}") as path, matplotlib.rc_context({"svg.hashsalt": "besa"}):
            figure.savefig(path, format=suffix, dpi=150, metadata=metadata)


def commit(record: Record) -> str:
    source = record["provenance"]
    return source["commit"][:12] + (" (modified)" if source["modified"] else "")


def sources(records: Iterable[Record]) -> pd.DataFrame:
    """Provenance of each row."""
    lines = [
        {"row": record["config"]["row"], "seed": record["config"].get("seed"), "config_hash": record["config_hash"]}
        | {"commit": commit(record), "torch": record["provenance"]["versions"].get("torch")}
        | {name: record["provenance"][name] for name in ("hardware", "threads", "date")}
        for record in records
    ]
    return pd.DataFrame(lines).set_index("row")


def citation(records: Iterable[Record]) -> str:
    """BibTeX of the paper and of these records, by one hash over the hashes of the rows (`sources` lists them)."""
    records, about = list(records), yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    config, paper = records[-1]["config"], about["preferred-citation"]
    url = about.get("repository-code", paper["url"])  # the paper's until the repository has one
    authors = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    date = max(record["provenance"]["date"] for record in records)
    rows = hashlib.sha256(" ".join(record["config_hash"] for record in records).encode()).hexdigest()[:12]
    label = re.sub(r"[^\w.-]+", "-", f"besa-{config['item']}-{slug(config['model'])}-{rows}")
    return f"""@inproceedings{{xu2024besa,
  title     = {{{paper["title"]}}},
  author    = {{{authors}}},
  booktitle = {{{paper["collection-title"]}}},
  year      = {{{paper["year"]}}},
  url       = {{{paper["url"]}}}
}}

@misc{{{label},
  title  = {{{{besa, {config["item"]} on {config["model"]}}}}},
  author = {{{{besa contributors}}}},
  year   = {{{date[:4]}}},
  note   = {{commit {commit(records[-1])}, profile {config["profile"]}, {date[:10]}, {len(records)} rows {rows}}},
  url    = {{{url}}}
}}"""
