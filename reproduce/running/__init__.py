"""Running: a row (`row.py`), and the rows of a notebook with their tables and figures (`run.py`)."""

from reproduce.running.run import Run

__all__ = ["Run"]
