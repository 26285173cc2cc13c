"""Write the report, reproduce/README.md, from the notebooks and from what came with the repository.

`python reproduce/page.py`, or `make report`; the same inputs give the same bytes. `--results results` writes
results/README.md from your own runs instead, `--show table1` prints what a run left, as `make table1` does. Smoke
runs are left out. A record or table that cannot be read is skipped, and named in the report and on the terminal. How
it looks is in reproduce/templates; `make book` makes a site of it and of what it leads to.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jinja2
import nbformat
import pandas as pd
import scipy.stats
import typer

from besa.machine.files import write_text
from besa.machine.provenance import ROOT
from besa.paper.tables import REFERENCE, load_record, slug
from besa.paper.verdicts import MATCHED, SURE

DIFFERENCE = "difference ± standard error"
QUANTITIES = {
    "text": "perplexity",
    "task": "accuracy, points",
    "projection": "cycles",
    "hidden states": "error",
    "model": "seconds",
}
"""What a table of verdicts is of, by the column that names what each row was measured on."""
RECIPES = "besa-row-wise", "besa-layer-wise", "joint-besa"
"""What the rows that the paper proposes start with: alone, and with 4 bits."""
TARGET = re.compile(r"-(0\.\d+)(?=-|$)")
"""Of a sweep, in the name of a row."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError)


@dataclass
class Item:
    """One notebook, and what its runs left in its folder under results/."""

    name: str
    title: str
    code: list[str] = field(default_factory=list)
    """Of the notebook, by cell."""
    notebooks: dict[str, bool] = field(default_factory=dict)
    """The executed ones, that of the item's own name first, and whether they ran the code that is there now."""
    runs: dict[str, pd.DataFrame] = field(default_factory=dict)
    """A row per record, by what the names of their files start with: model and profile, or "" for other names."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def read(self, read: Callable[..., Any], path: Path, *arguments: Any) -> Any:
        """`read(path, ...)`; None, and a line in `skipped`, if it cannot be read."""
        try:
            return read(path, *arguments)
        except UNREADABLE as error:
            self.skipped.append(f"{path.name} ({type(error).__name__}: {error})")

    def of_run(self, run: str, names: list[str]) -> list[str]:
        """The files of a run; for "" those of no other."""
        owner = lambda name: next((key for key in self.runs if key and f"{name}-".startswith(f"{key}-")), "")
        return [name for name in names if owner(name) == run]

    def label_of(self, run: str, table: str) -> str:
        """What a table is called beside its run."""
        return table.removeprefix(run).strip("-") or "table"

    def title_of(self, run: str) -> str:
        return ", ".join([*self.runs[run]["model"].unique(), *self.runs[run]["profile"].unique()])

    def all_judged(self, run: str) -> pd.DataFrame:
        """The verdicts of a run."""
        tables = [self.tables.get(f"{run}-{of}", pd.DataFrame()) for of in ("verdicts", "zero-shot-verdicts")]
        table = pd.concat(tables, ignore_index=True)
        return table if "verdict" in table else pd.DataFrame()

    def judged(self, run: str) -> pd.DataFrame:
        """Those to show: beside a row with a partner of as many zeros ("-matched"), what that leaves undecided."""
        if (table := self.all_judged(run)).empty:
            return table
        against = table.get("against", pd.Series("", index=table.index))
        claims = [tuple(claim) for claim in table.reindex(columns=["row", *QUANTITIES]).map(str).to_numpy()]
        is_decided = table["verdict"] != "undecided"
        every, settled = set(zip(against, claims)), set(itertools.compress(zip(against, claims), is_decided))
        partners = list(zip(against + MATCHED, claims))
        has_partner = pd.Series([pair in every for pair in partners], table.index)
        is_settled = pd.Series([pair in settled for pair in partners], table.index)
        return table[~has_partner | (is_decided & ~is_settled)]

    def verdicts(self, run: str) -> list[str]:
        """What a run says of published numbers, of the released code's, and of claims."""
        found = []
        for beside, what in (("published", "published numbers"), ("released", "comparisons with the released code")):
            if "verdict" in (compared := self.tables.get(f"{run}-{beside}", pd.DataFrame())):
                found.append(f"{what}: {counts(compared)}{furthest(compared)}")
        if len(judged := self.judged(run)):
            found.append(f"claims: {counts(judged)}")
        return found

    def verdict(self, run: str) -> str:
        return f"{self.title_of(run)}: {'; '.join(self.verdicts(run)) or 'not judged'}"


def counts(table: pd.DataFrame) -> str:
    """How often each verdict was reached."""
    return ", ".join(f"{word} {n} of {len(table)}" for word, n in table["verdict"].value_counts().items())


def furthest(table: pd.DataFrame) -> str:
    """How far ours is apart at most, where a table says so, of each thing compared."""
    if not {"of", "largest difference"} <= set(table):
        return ""
    most = table.groupby("of", sort=False)["largest difference"].max()
    return f" (relative differences of at most {'; '.join(f'{apart:.1g} in {of}' for of, apart in most.items())})"


def claims(items: list[Item]) -> list[dict[str, str]]:
    """What was judged: a line for each item, run, pair of rows and verdict, with the difference on every text.

    Of tasks their average stands for all. A † is behind what is decided by itself, and not among all.
    """
    lines = []
    runs = [(item, run) for item in items for run in item.runs]
    least = least_certain([item.all_judged(run) for item, run in runs])
    for (item, run), over in itertools.product(runs, QUANTITIES):
        judged, where = item.judged(run), f"{item.title.partition(':')[0]}, {item.title_of(run)}"
        if not {"row", "against", over, "verdict", DIFFERENCE, "rests on"} <= set(judged):
            continue
        judged = judged.dropna(subset=over)
        judged = judged[judged[over] == "average"] if "average" in set(judged[over]) else judged
        for (verdict, row, against), part in judged.groupby(["verdict", "row", "against"], sort=False):
            mark = (part["p"] > least).map({True: " †", False: ""}) if "p" in part and verdict != "undecided" else ""
            line = {"verdict": verdict, "row": row, "against": against, "of": QUANTITIES[over], "where": where}
            line["difference"] = ", ".join(part[over] + " " + part[DIFFERENCE] + mark + uneven(part))
            lines.append(line | {"rests_on": "; ".join(part["rests on"].unique())})
    return lines


def in_short(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """In what the paper's recipes are better or worse than rows of as many zeros, where the error is known.

    A line for each item, run and pair of rows, the targets of a sweep together; other rows where they alone decide. The
    quick profile is left out where the published size has as many draws.
    """
    pairs = {(line["where"], line["row"], line["against"]) for line in lines}
    is_fair = lambda where, row, against: against.endswith(MATCHED) or (where, row, against + MATCHED) in pairs
    ours = [line for line in lines if line["row"].startswith(RECIPES)]
    known = [line for line in ours if is_fair(line["where"], line["row"], line["against"])]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for line in (line for line in known if "± ?" not in line["difference"]):
        row, against = (TARGET.sub("", line[name]) for name in ("row", "against"))
        named = line | {"row": row, "against": against, "draws": line["rests_on"].rpartition(", ")[2].partition(" ")[0]}
        short = found.setdefault((line["where"], line["of"], row, against), named)
        difference = "".join(f"at {target} " for target in TARGET.findall(line["row"])) + line["difference"]
        short[line["verdict"]] = ", ".join([*filter(None, [short.get(line["verdict"])]), difference])
    at_full = lambda key: (re.sub("quick$", "paper", key[0]), *key[1:])
    has_as_many = lambda key: found.get(at_full(key), {}).get("draws") == found[key]["draws"]
    return [line for key, line in found.items() if at_full(key) == key or not has_as_many(key)]


def least_certain(judged: list[pd.DataFrame]) -> float:
    """The largest p that Benjamini and Hochberg's procedure calls a discovery among all verdicts, shown or not.

    What is sure and yet undecided, for its zeros, is no discovery, and does not count.
    """
    fair = [table[~((table["verdict"] == "undecided") & (table["p"] < SURE))] for table in judged if "p" in table]
    p = pd.concat([table["p"] for table in fair]).dropna() if fair else pd.Series()
    found = p[scipy.stats.false_discovery_control(p) < SURE] if len(p) else p
    return max(found, default=0.0)


def uneven(judged: pd.DataFrame) -> pd.Series:
    """Behind what is sure and yet undecided the fractions of zeros, for these are why."""
    nothing = pd.Series("", index=judged.index)
    why = (judged["verdict"] == "undecided") & (judged.get("p", nothing + "nan").astype(float) < SURE)
    return (" (zeros " + judged.get("zeros", nothing) + ")").where(why, "")


def read_notebook(path: Path) -> Item:
    """The title from a notebook's first cell.

    Raises:
        ValueError: it is not a notebook that starts with a heading.
    """
    try:
        cells = nbformat.read(path, as_version=4).cells
        text = cells[0].source
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a notebook ({type(error).__name__})") from error
    if not text.startswith("# "):
        raise ValueError(f"the first cell of {path} does not start with a heading")
    return Item(path.stem, text.splitlines()[0][2:], code_of(cells))


def code_of(cells: list[nbformat.NotebookNode]) -> list[str]:
    """A notebook's code by cell, but for the parameters that papermill puts in."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [cell.source for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]


def read_record(path: Path) -> dict[str, Any]:
    """What the report says of a record."""
    record = load_record(path)
    config = record["config"]
    metrics = {text: float(value) for text, value in record.get("metrics", {}).items()}
    facts = {"model": slug(config["model"]), "profile": config["profile"]}
    return facts | {"metrics": metrics or None, "date": record["provenance"]["date"]}


def read_item(item: Item, folder: Path) -> Item:
    """Add what the runs of an item left in its folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    smoke = re.compile(r"-smoke(-|$)")  # these numbers only show that the code runs
    is_shown = lambda path: not (smoke.search(path.stem) or path.name.startswith("."))  # hidden: a run that failed
    stems = lambda pattern: sorted(path.stem for path in folder.glob(pattern) if is_shown(path))
    tables = {name: item.read(pd.read_csv, folder / f"{name}.csv") for name in stems("*.csv")}
    item.tables = {name: table for name, table in tables.items() if table is not None}
    item.figures = stems("*.png")
    executed = sorted(stems("*.ipynb"), key=lambda name: name != item.name)
    code = lambda path: code_of(nbformat.read(path, as_version=4).cells)
    item.notebooks = {name: item.read(code, folder / f"{name}.ipynb") == item.code for name in executed}
    records = [item.read(read_record, path) for path in sorted(folder.glob("records/*.json"))]
    records = [record for record in records if record and record["profile"] != "smoke"]
    for record in sorted(records, key=lambda record: record["date"]):
        run = f"{record['model']}-{record['profile']}"
        named = any(f"{name}-".startswith(f"{run}-") for name in [*item.tables, *item.figures])
        found.setdefault(run if named else "", []).append(record)
    item.runs = {run: pd.DataFrame(found[run]) for run in sorted(found)}
    return item


def build(reproduce: Path, results: Path, path: Path) -> tuple[str, list[str]]:
    """The text of the report at `path`, and what was skipped.

    Raises:
        ValueError: a notebook cannot be read.
    """
    items = [read_notebook(notebook) for notebook in reproduce.glob("*.ipynb")]
    items.sort(key=lambda item: (item.name != "fidelity", not item.title.startswith("Table"), item.title))
    published = pd.read_csv(ROOT / "besa" / "paper" / "published.csv")
    for item in items:
        read_item(item, results / item.name)
    runs = [run for item in items for run in item.runs.values()]
    ran = {model for run in runs for model in run.dropna(subset="metrics")["model"]}  # random weights have none
    loader = jinja2.FileSystemLoader(ROOT / "reproduce" / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    judged = claims(items)
    known = {
        "claims": judged,
        "in_short": in_short(judged),
        "unknown": [name for name in published["model"].unique() if name not in ran],
        "is_reference": results.resolve() == REFERENCE,
    }
    known["unjudged"] = [item for item in items if item.runs and not any(map(item.verdicts, item.runs))]
    where = os.path.relpath(results, path.parent)
    text = environment.get_template("README.md").render(items=items, results=where, **known)
    return text + "\n", [f"{item.name}/{line}" for item in items for line in item.skipped]


def shown(item: str, folder: Path) -> str:
    """What the newest run of an item left: its tables as text, the reference numbers last, and where all of it lies."""
    written, found = sorted(folder.glob("*.md"), key=lambda path: path.stat().st_mtime), Item(item, "")
    if not written:
        raise typer.BadParameter(f"{folder} holds no table of {item!r}; run its notebook first: make {item}")
    records = [found.read(read_record, path) for path in sorted(folder.glob("records/*.json"))]
    runs = {f"{record['model']}-{record['profile']}" for record in records if record}
    run = next((run for run in runs if f"{written[-1].stem}-".startswith(f"{run}-")), "")
    own = sorted((path for path in written if path.stem.startswith(run)), key=lambda p: p.stem.endswith("-reference"))
    paths = [folder / f"{item}.ipynb", *own, *sorted(folder.glob(f"{run}*.png")), folder / "records"]
    skipped = [f"skipped {line}" for line in found.skipped]
    return "\n".join([*(path.read_text(encoding="utf-8") for path in own), *skipped, *map(str, paths)])


def main(
    results: Annotated[Path, typer.Option(help="folder of your own runs, such as results")] = REFERENCE,
    show: Annotated[str, typer.Option(help="print what a notebook left there, such as table1, and write nothing")] = "",
) -> None:
    """Write the report: reproduce/README.md of what came with the repository, or README.md among your own results."""
    if show:
        print(shown(show, results / show))
        return
    path = (ROOT / "reproduce" if results.resolve() == REFERENCE else results) / "README.md"
    text, skipped = build(ROOT / "reproduce", results, path)
    write_text(path, text)
    print(path)
    print(*(f"skipped {line}" for line in skipped), sep="\n", end="\n" * bool(skipped), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
