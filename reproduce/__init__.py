"""The notebooks' Python.

settings   parameters of notebooks
records    a row's record, its file, and verdicts over records
methods    the table of rows, and methods that only notebooks use
drawing    tables and figures
measuring  measurements of single notebooks
running    a row, and the rows of a notebook
page       README's tables and the report
execute    a notebook from the command line
book       the site

Imports go up this list only.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"  # the results that come with the repository
