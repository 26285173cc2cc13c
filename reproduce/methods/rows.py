"""THE TABLE OF ROWS: every row that tables and figures know by name, and the method behind it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import besa
from besa.loop import Method, method_class
from reproduce.methods.budgets import BUDGETS
from reproduce.methods.peers import Admm, Alps, DSnoT, Ebft, Ria, Safe
from reproduce.methods.variants import LearnedClipping
from reproduce.settings import Recipe

BUDGETED = "`Exact(update=True, sparsities=block_budgets(model, windows, 0.5))`"
BLUE = "#56B4E9"  # of rows without a colour of their own; all colours are Okabe and Ito's, for colour-blind readers


class Entry(NamedTuple):
    """A row of the tables.

    Args:
        make: the method, from the recipe of the model and fields such as `sparsity`; None for the dense model.
        label: its name in figures and README; * = not in the paper.
        code: as README's tables print it; without it the row is not in them.
        notebooks: those that have the row by default.
        is_matched: prune it to the sparsity that BESA reached in each block.
    """

    name: str
    make: Callable[..., Method] | None
    label: str
    colour: str = BLUE
    marker: str = "X"
    code: str = ""
    notebooks: str = ""
    is_matched: bool = False


def of(kind: Callable[..., Method], **fixed: Any) -> Callable[..., Method]:
    """A maker that does not need the recipe."""
    return lambda recipe, **fields: kind(**fields, **fixed)


def row_wise(recipe: Recipe, **fields: Any) -> Method:
    return besa.Besa(**{"d_coef": recipe.d_coef} | fields)


def layer_wise(recipe: Recipe, **fields: Any) -> Method:
    return besa.Besa.layer_wise(**{"d_coef": recipe.d_coef_layer} | fields)


def learned(recipe: Recipe, **fields: Any) -> Method:
    return besa.Exact(update=True, **fields)


def unpruned(recipe: Recipe, **fields: Any) -> Method:
    return besa.Wanda(**fields | {"sparsity": 0.0})


TABLES = "table1 table2 table4"
SHOWN = f"{TABLES} figure1 sparsity"
ENTRIES = (
    Entry("dense", None, "dense", "black", "*", "dense", f"{TABLES} table3"),
    Entry("besa-row-wise", row_wise, "BESA", "#D55E00", "D", "`Besa()`", SHOWN),
    Entry("besa-layer-wise", layer_wise, "BESA layer-wise", "#E69F00", "v"),
    Entry("magnitude", of(besa.Magnitude), "magnitude", "#999999", "s", notebooks="table1 sparsity"),
    Entry("wanda", of(besa.Wanda), "Wanda", "#0072B2", "o", "`Wanda()`", SHOWN, is_matched=True),
    Entry("sparsegpt", of(besa.SparseGPT), "SparseGPT", "#009E73", "^", "`SparseGPT()`", SHOWN, is_matched=True),
    Entry("quantized", unpruned, "quantized only", notebooks="table3"),
    Entry("joint-besa", row_wise, "BESA", "#D55E00", "D", notebooks="table3"),
    Entry("joint-wanda", of(besa.Wanda), "Wanda", "#0072B2", "o", notebooks="table3", is_matched=True),
    Entry("joint-clipping", of(LearnedClipping), "Wanda, learned clipping", notebooks="table3", is_matched=True),
    Entry("closed", of(besa.Closed), "closed form *"),
    Entry("exact", of(besa.Exact), "learned masks *", "#CC79A7", "p", "`Exact()`"),
    Entry("exact-update", learned, "learned masks and weights *", "#7B3294", "P", "`Exact(update=True)`"),
    Entry("exact-update + budgets", learned, "learned masks and weights + budgets *", "#7B3294", "P", BUDGETED),
    Entry("admm", of(Admm), "ADMM", code="ADMM †", notebooks="beyond"),
    Entry("alps", of(Alps), "ALPS", code="ALPS †", notebooks="beyond"),
    Entry("ria", of(Ria), "RIA", code="RIA †", notebooks="beyond"),
    Entry("dsnot", of(DSnoT), "DSnoT", code="DSnoT †", notebooks="beyond"),
    Entry("ebft", of(Ebft), "EBFT", notebooks="beyond"),
    Entry("safe", of(Safe), "SAFE", notebooks="beyond"),
    Entry("ebft + steps", of(Ebft, windows_per_step=1), "EBFT + steps *", code="EBFT †", notebooks="beyond"),
    Entry("safe + steps", of(Safe, windows_per_step=2), "SAFE + steps *", notebooks="beyond"),
)
ROWS = {entry.name: entry for entry in ENTRIES}


def usual_rows(notebook: str) -> list[str]:
    """Rows that a notebook has by default."""
    return [entry.name for entry in ENTRIES if notebook in entry.notebooks.split()]


def entry_of(row: str) -> Entry:
    """The entry of a row. "wanda + epoch", without one of its own, has that of "wanda" with another label."""
    if row in ROWS:
        return ROWS[row]
    name, plus, steps = row.partition(" + ")
    entry = ROWS.get(name, Entry(name, None, name))
    label = f"{entry.label.removesuffix(' *')}{plus}{steps} *" if steps else entry.label
    return entry._replace(name=row, label=label)


def method_of(row: str, recipe: Recipe, **fields: Any) -> Method | None:
    """The method of a row by its name, or your own by "package.module:Class"; None is the dense model.

    Steps behind the name, such as "wanda + epoch", are those of `steps_of`.
    """
    name = row.partition(" + ")[0]
    if ":" in name:
        return method_class(name)(**fields)
    if name not in ROWS:
        raise ValueError(f"unknown row {row!r}; known: {', '.join(ROWS)}, or package.module:Class")
    make = entry_of(row).make
    return make and make(recipe, **fields)


def methods_of(rows: Sequence[str], recipe: Recipe, **fields: Any) -> dict[str, Method | None]:
    """The methods of several rows; a method of yours by its own name."""
    methods = {row: method_of(row, recipe, **fields) for row in rows}
    return {row if ":" not in row else method.name: method for row, method in methods.items()}


def steps_of(row: str, spread: float = 0.15, epoch: Any = None) -> dict[str, Any]:
    """Options of `Run.row` for the steps in the name of a row: "exact-update + budgets + epoch"."""
    rules = {"budgets": spread} | {name: name for name in BUDGETS}
    options = {step: {"budgets": rule} for step, rule in rules.items()} | {"epoch": {"epoch": epoch or {}}}
    options["closed"] = {"reconstruct": "closed"}
    chosen = [options[step] for step in row.split(" + ")[1:] if step in options]
    return {name: option for each in chosen for name, option in each.items()}


def matched_to(row: str, rows: Iterable[str], wanted: bool = True) -> dict[str, str]:
    """Rows that `Run.rows(matched=...)` prunes to the sparsity of another row, by name; none without that row.

    Methods of yours are matched, too.
    """
    if not wanted or row not in rows:
        return {}
    own = [other for other in rows if other not in ROWS and " + " not in other]
    matched = [other for other in rows if other in ROWS and ROWS[other].is_matched]
    return dict.fromkeys([*matched, *own], row)
