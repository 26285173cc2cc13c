"""What a run leaves behind: profiles, run records with provenance, tables, comparison with published, citation."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from besa.machine.files import replacing, write_text
from besa.machine.provenance import provenance, results_root

Record = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """How much a notebook computes."""

    name: str
    n_samples: int
    """Calibration windows."""
    seq_len: int
    """Tokens per window and per test segment."""
    max_segments: int | None
    """Test segments per text; None takes all."""
    max_questions: int | None
    """Questions per zero-shot task; None takes all."""


PROFILES = {
    "smoke": Profile("smoke", n_samples=2, seq_len=64, max_segments=2, max_questions=4),
    "quick": Profile("quick", n_samples=32, seq_len=512, max_segments=32, max_questions=200),
    "paper": Profile("paper", n_samples=128, seq_len=2048, max_segments=None, max_questions=None),
}


def resolve_profile(name: str) -> Profile:
    """A profile by name; "auto" takes `$BESA_PROFILE`, else paper where there is a GPU and quick where there is none.

    Raises:
        ValueError: unknown profile.
    """
    if name == "auto":
        name = os.environ.get("BESA_PROFILE") or ("paper" if torch.cuda.is_available() else "quick")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: auto, {', '.join(PROFILES)}")
    return PROFILES[name]


def select(rows: dict[str, Any], names: str) -> dict[str, Any]:
    """The rows of a comma-separated list of names, in its order.

    Raises:
        ValueError: an unknown or repeated name.
    """
    wanted = names.split(",")
    for number, name in enumerate(wanted):
        if name not in rows or name in wanted[:number]:
            known = "repeated" if name in rows else f"unknown; known: {', '.join(rows)}"
            raise ValueError(f"row {name!r} of {names!r} is {known}")
    return {name: rows[name] for name in wanted}


def open_folder(item: str, folder: str | None = None) -> Path:
    """The folder that an item's records and tables go to, made if need be.

    Args:
        item: `table1`, ...
        folder: None takes `<item>` in `results_root()`.

    Raises:
        ValueError: nothing can be written there.
    """
    path = Path(folder) if folder else results_root() / item
    try:
        (path / "records").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"the results folder {str(path)!r} is not writable ({error}); name another one") from error


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any value of the configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def find_record(folder: Path, config: dict[str, Any]) -> Record | None:
    """The finished record of exactly this configuration, if there is one."""
    try:
        return json.loads(_record_path(folder, config).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def save_record(folder: Path, config: dict[str, Any], outcome: dict[str, Any]) -> Record:
    """Write one row's record: configuration and its hash, outcome, provenance."""
    record = {"config": config, "config_hash": config_hash(config), **outcome, "provenance": provenance()}
    write_text(_record_path(folder, config), json.dumps(record, indent=1) + "\n")
    return record


def _record_path(folder: Path, config: dict[str, Any]) -> Path:
    parts = (slug(config["model"]), config["profile"], config["row"], config_hash(config))
    return folder / "records" / ("-".join(parts) + ".json")


def slug(name: str) -> str:
    """A name as part of a file name: the last part of a path or hub id."""
    return Path(name).name.lower()


def summary(records: list[Record]) -> pd.DataFrame:
    """One row per record: perplexities or accuracies, the sparsity counted in the weights, cost."""
    rows = [
        {
            "method": record["config"]["row"],
            "sparsity": record["sparsity"],
            **record["metrics"],
            "seconds": record["seconds"],
            "peak GiB": record["peak_bytes"] / 2**30,
        }
        for record in records
    ]
    return pd.DataFrame(rows).set_index("method")


def compare(records: list[Record], item: str, metric: str = "perplexity") -> pd.DataFrame:
    """Ours beside published, where there is a published value, with the relative difference and a verdict.

    `record["metrics"]` holds our values by text (perplexity), projection (cycles) or task (accuracy_percent).

    The verdict is "reproduced" within 2 %, else "better" (higher for accuracy, else lower) or "worse"; runs that do not
    follow the published protocol (another profile, sparsity, calibration or number of bits, a part of the questions)
    are shown and not judged, and so are printed cycles that cannot be.
    """
    published = pd.read_csv(Path(__file__).with_name("published.csv"))
    names = {"besa": "besa-row-wise"}
    rows = []
    for record in records:
        config = record["config"]
        for text, ours in record["metrics"].items():
            wanted = published[
                published["item"].isin([item, "readme_granularity"])
                & (published["metric"] == metric)
                & (published["model"] == config["model"])
                & (published["method"].replace(names) == config["row"])
                & (published["task"] == text)
            ]
            for _, row in wanted.drop_duplicates("value").iterrows():
                rows.append(_comparison(config, text, ours, row))
    columns = ["method", "text", "ours", "published", "difference", "verdict", "source"]
    return pd.DataFrame(rows, columns=columns)


def _comparison(config: dict[str, Any], text: str, ours: float, published: pd.Series) -> dict[str, Any]:
    value = float(published["value"])
    difference = ours / value - 1
    higher_is_better = published["metric"] == "accuracy_percent"
    printed = published["item"] == "table4" and (published["task"], published["method"]) in IMPOSSIBLE
    if not _follows_protocol(config):
        verdict = "not judged: other protocol"
    elif printed:
        verdict = "not judged: the printed number is not possible"
    else:
        better = (difference > 0) == higher_is_better
        verdict = "reproduced" if abs(difference) <= 0.02 else "better" if better else "worse"
    row = {"method": config["row"], "text": text, "ours": ours, "published": value}
    return {**row, "difference": f"{difference:+.1%}", "verdict": verdict, "source": published["source"]}


IMPOSSIBLE = {
    ("gate_proj", "dense"),
    ("up_proj", "dense"),
    ("down_proj", "dense"),
    ("gate_proj", "besa"),
    ("up_proj", "besa"),
}
"""Cycles in Table 4 that no 64 x 64 multipliers reach: 10128 for 11008 x 4096 weights, and fewer than the kept weights
need; reproduce/table4.ipynb shows where they come from."""


def _follows_protocol(config: dict[str, Any]) -> bool:
    """Whether a run is what the paper ran: what it does not name counts as the published value."""
    published = {"profile": "paper", "limit": None, "bits": 4, "group_size": None}
    published |= {"calibration": "c4", "n_samples": 128, "seq_len": 2048}
    return config["sparsity"] in (0.0, 0.5) and all(
        config.get(name, value) == value for name, value in published.items()
    )


def write_table(frame: pd.DataFrame, folder: Path, stem: str, caption: str) -> str:
    """Write a table as Markdown, CSV (unrounded) and LaTeX; returns the Markdown."""
    markdown = f"**{caption}**\n\n{_rounded(frame).to_markdown(stralign='left', disable_numparse=True)}\n"
    write_text(folder / f"{stem}.md", markdown)
    write_text(folder / f"{stem}.csv", frame.to_csv())
    escaped = re.sub(r"([%&#_$])", r"\\\1", caption)  # pandas escapes the cells only
    write_text(folder / f"{stem}.tex", _rounded(frame).to_latex(caption=escaped, escape=True))
    return markdown


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as the paper prints them: two decimals, sparsities and relative errors four."""
    fine = lambda column: column == "sparsity" or ("error" in str(column) and "1000" not in str(column))
    digits = {column: 4 if fine(column) else 0 if column == "seconds" else 2 for column in frame.columns}
    show = lambda value, n: f"{value:.{n}f}" if isinstance(value, float) else value
    return frame.apply(lambda column: column.map(lambda value: show(value, digits[column.name])))


def save_figure(figure: Figure, folder: Path, stem: str) -> None:
    """Save a figure as PNG and SVG."""
    for suffix in ("png", "svg"):
        with replacing(folder / f"{stem}.{suffix}") as temporary:
            figure.savefig(temporary, dpi=150)


PAPER_BIBTEX = """@inproceedings{xu2024besa,
  title     = {{BESA}: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation},
  author    = {Peng Xu and Wenqi Shao and Mengzhao Chen and Shitao Tang and Kaipeng Zhang and Peng Gao and
               Fengwei An and Yu Qiao and Ping Luo},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  note      = {arXiv:2402.16880}
}"""


def _commit(source: dict[str, Any]) -> str:
    return source["commit"][:12] + (" (modified)" if source["modified"] else "")


def sources(records: Iterable[Record]) -> pd.DataFrame:
    """Where the numbers of each row come from, which need not be the run that shows them."""
    rows = [
        {"row": record["config"]["row"], "config_hash": record["config_hash"], "commit": _commit(source)}
        | {name: source[name] for name in ("hardware", "threads", "date")}
        for record in records
        for source in [record["provenance"]]
    ]
    return pd.DataFrame(rows).set_index("row")


def citation(records: list[Record]) -> str:
    """BibTeX of the paper, and of this run by the commits and hardware of its records and its profile."""
    config, source = records[-1]["config"], records[-1]["provenance"]
    every = lambda values: ", ".join(dict.fromkeys(values))
    commits = every(_commit(record["provenance"]) for record in records)
    hardware = every(record["provenance"]["hardware"] for record in records)
    note = f"commit {commits}, profile {config['profile']}, {hardware}"
    return f"""{PAPER_BIBTEX}

@misc{{besa-{slug(config["model"])}-{records[-1]["config_hash"]},
  title = {{besa, {config["item"]} on {config["model"]}}},
  year  = {{{source["date"][:4]}}},
  note  = {{{note}, {source["date"][:10]}}}
}}"""
