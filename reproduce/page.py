"""Write the report, reproduce/README.md, from the notebooks and from what came with the repository.

`python reproduce/page.py`, or `make report`; the same inputs give the same bytes. `--results results` writes
results/README.md from your own runs instead, `--show table1` prints what a run left, as `make table1` does. Smoke
runs are left out. A record or table that cannot be read is skipped, and named in the report and on the terminal. How
it looks is in reproduce/templates; `make book` makes a site of it and of what it leads to.
"""

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
import typer

from besa.machine.files import write_text
from besa.machine.provenance import ROOT
from besa.paper.tables import REFERENCE, load_record, slug

DIFFERENCE = "difference ± standard error"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError)


@dataclass
class Item:
    """One notebook, and what its runs left in its folder under results/."""

    name: str
    title: str
    code: list[str] = field(default_factory=list)
    """Of the notebook, by cell."""
    higher_is_better: bool = False
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

    def verdict(self, name: str) -> str:
        """What a run says of claims, published and released numbers; without any, the rows beside each other."""
        found = []
        for beside, what in (("published", "published numbers"), ("released", "comparisons with the released code")):
            if "verdict" in (compared := self.tables.get(f"{name}-{beside}", pd.DataFrame())):
                found.append(f"of {len(compared)} {what} {counts(compared)}")
        if "verdict" in (judged := self.tables.get(f"{name}-verdicts", pd.DataFrame())):
            found.append(f"of {len(judged)} claims {counts(judged)}")
        if found:
            return f"{self.title_of(name)}: {'; '.join(found)}"
        run = self.runs[name].query("metrics.notna() and not one_kind")
        pruned = run.query("sparsity > 0 and row != 'dense'")["sparsity"]
        shown = run["sparsity"] == (0.5 if 0.5 in set(pruned) else pruned.max())
        run = run[shown | (run["row"] == "dense")]
        scores = pd.DataFrame(list(run["metrics"]), index=run["row"])
        scores = scores[[text for text in scores if not text.startswith("error ")]]
        if (n := scores.shape[1]) > 3:  # too many for one line
            scores = scores[["average"]] if "average" in scores else scores.mean(axis=1).to_frame(f"mean of {n}")
        scores = scores.dropna(axis=1, how="all")
        if not scores.index.is_unique or run["model"].nunique() > 1:  # several runs: no row stands for its method
            scores = pd.DataFrame()
        stderr = {row: errors.get("average") for row, errors in zip(run["row"], run["stderr"], strict=True)}
        found = [outcome(scores[text].dropna(), self.higher_is_better, stderr) for text in scores]
        return f"not judged: {self.title_of(name)}; {'; '.join(found) or 'see the tables'}"


def counts(table: pd.DataFrame) -> str:
    """How often each verdict was reached."""
    return ", ".join(f"{n} {word}" for word, n in table["verdict"].value_counts().items())


def claims(items: list[Item]) -> dict[str, list[dict[str, str]]]:
    """What was judged, by verdict: a line for each item, run and pair of rows, with the difference on every text.

    Of tasks their average stands for all, and of a row with and without a partner of as many zeros the fair pair.
    """
    said: dict[str, list[dict[str, str]]] = {verdict: [] for verdict in ("holds", "does not hold", "undecided")}
    runs = [(item, run) for item in items for run in item.runs]
    for item, run in runs:
        judged = item.tables.get(f"{run}-verdicts", pd.DataFrame())
        over = "task" if "task" in judged else "text"
        if not {"row", "against", over, "verdict", DIFFERENCE, "rests on"} <= set(judged):
            continue
        fair = {row.removesuffix("-matched") for row in judged["against"] if row.endswith("-matched")}
        judged = judged[~judged["against"].isin(fair)]
        judged = judged[judged[over] == "average"] if "average" in set(judged[over]) else judged
        for (verdict, row, against), part in judged.groupby(["verdict", "row", "against"], sort=False):
            line = {"row": row, "against": against, "rests_on": part["rests on"].iloc[0]}
            line |= {"difference": ", ".join(part[over] + " " + part[DIFFERENCE])}
            said[verdict].append(line | {"where": f"{item.title.partition(':')[0]}, {item.title_of(run)}"})
    return said


def outcome(values: pd.Series, higher_is_better: bool, stderr: dict[str, float | None]) -> str:
    """In order the first row of a sparsity, BESA, SparseGPT, Wanda, and the dense model: with one draw no winner."""
    error = lambda row: f" ± {stderr[row]:.2f}" if stderr[row] else ""
    shown = {row: f"{row} {value:.2f}{error(row)}" for row, value in values.items()}
    dense = [shown["dense"]] if "dense" in shown else []
    ranked = values.drop("dense", errors="ignore").sort_values(ascending=not higher_is_better, kind="stable").index
    if ranked.empty:
        return f"{values.name}: {', '.join(dense)}"
    named = re.compile(r"(joint-)?(besa|wanda|sparsegpt|besa-row-wise)(-0\.5)?|baseline")
    others = [shown[row] for row in ranked[1:] if named.fullmatch(row)] + dense
    return f"{values.name}: {', '.join([shown[ranked[0]], *others])}"


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
    config, method = record["config"], record["config"].get("method") or {}
    metrics = {text: float(value) for text, value in record.get("metrics", {}).items()}
    facts = {"row": config["row"], "model": slug(config["model"]), "profile": config["profile"]}
    facts |= {"sparsity": config.get("sparsity", 0.0), "one_kind": "kind" in method, "stderr": record.get("stderr", {})}
    return facts | {"metrics": metrics or None, "date": record["provenance"]["date"]}


def read_item(item: Item, folder: Path) -> Item:
    """Add what the runs of an item left in its folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    smoke = re.compile(r"-smoke(-|$)")  # these numbers only show that the code runs
    stems = lambda pattern: sorted(path.stem for path in folder.glob(pattern) if not smoke.search(path.stem))
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
        item.higher_is_better = item.name in set(published.query("metric == 'accuracy_percent'")["item"])
        read_item(item, results / item.name)
    runs = [run for item in items for run in item.runs.values()]
    ran = {model for run in runs for model in run.dropna(subset="metrics")["model"]}  # random weights have none
    loader = jinja2.FileSystemLoader(ROOT / "reproduce" / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    known = {"claims": claims(items), "unknown": [name for name in published["model"].unique() if name not in ran]}
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
