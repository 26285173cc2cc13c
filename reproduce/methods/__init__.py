"""Methods: the table of rows (`rows.py`), and methods that only the notebooks use."""

from reproduce.methods.budgets import BUDGETS
from reproduce.methods.clipping import LearnedClipping
from reproduce.methods.counts import BudgetedWeight, ExactCounts
from reproduce.methods.parts import BesaByPair, BesaByPart, besa_with, part_of
from reproduce.methods.rows import ROWS, entry_of, matched_to, method_of, methods_of, steps_of, usual_rows

__all__ = [
    "BUDGETS",
    "ROWS",
    "BesaByPair",
    "BesaByPart",
    "BudgetedWeight",
    "ExactCounts",
    "LearnedClipping",
    "besa_with",
    "entry_of",
    "matched_to",
    "method_of",
    "methods_of",
    "part_of",
    "steps_of",
    "usual_rows",
]
