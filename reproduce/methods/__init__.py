"""Methods: the table of rows (`rows.py`), and methods that only the notebooks use."""

from reproduce.methods.budgets import BUDGETS
from reproduce.methods.rows import ROWS, entry_of, matched_to, method_of, methods_of, steps_of, usual_rows
from reproduce.methods.variants import (
    BesaByPair,
    BesaByPart,
    BudgetedWeight,
    ExactCounts,
    LearnedClipping,
    besa_with,
    part_of,
)

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
