"""The notebooks of reproduce/ in profile smoke, cell by cell in this process, on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "reproduce").glob("*.ipynb"))
RUNS = {
    "table1": {"seeds": [0, 1]},
    "table2": {"tasks": ["piqa", "arc_challenge"], "limit": 3},
    "table3": {"datasets": ["wiki"]},
    "ablations": {"grid": {"candidates": [11, 101], "n_samples": [1, 2]}},
    "granularity": {"row_groups": ["row", 4], "steps": [0.01, 0.02]},
    "sparsity": {"sparsities": [0.5, 0.7]},
}
OTHERS = ("table4", "figure1", "allocation", "beyond", "models", "cost", "scale", "fidelity")
RUNS |= {name: {} for name in OTHERS}
OWN_MODELS = ("cost", "scale", "fidelity")  # the embedded model, or random weights of a published shape


@pytest.fixture(autouse=True)
def elsewhere(short_texts, monkeypatch):
    """Short texts; figures are drawn into files."""
    monkeypatch.setenv("BESA_DATA", str(short_texts))
    plt.switch_backend("agg")
    yield
    plt.close("all")


def run(name, folder, **parameters):
    """Execute a notebook's cells with parameters, as papermill would, without a kernel."""
    parameters = {"profile": "smoke", "results": str(folder), "recipe": {"device": "cpu"}, **parameters}
    names = {"__name__": "__main__", "display": lambda *_: None}
    for number, cell in enumerate(nbformat.read(ROOT / "reproduce" / f"{name}.ipynb", as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}, cell {number}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters


def records(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}


@pytest.mark.parametrize("name", RUNS)
def test_a_notebook_writes_records_and_tables(name, tiny_folder, small_cache, tmp_path, monkeypatch):
    parameters = {} if name in OWN_MODELS else {"model": str(tiny_folder)}
    if name in OWN_MODELS:
        monkeypatch.setenv("BESA_CACHE", str(small_cache))
    run(name, tmp_path, **parameters, **RUNS[name])
    assert records(tmp_path) and list(tmp_path.glob("*.csv"))
    assert "smoke" in "".join(path.read_text().lower() for path in tmp_path.glob("*.md"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_table1_continues_after_an_interruption(tiny_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("table1", whole, model=str(tiny_folder))
    run("table1", broken, model=str(tiny_folder), methods="dense,besa-row-wise")
    before = records(broken)
    run("table1", broken, model=str(tiny_folder))
    assert before.items() <= records(broken).items() and records(broken).keys() == records(whole).keys()
    tables = [
        pd.read_csv(folder / "tiny-smoke.csv")[["method", "sparsity", "wiki", "sotu"]] for folder in (whole, broken)
    ]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 5
    verdicts = pd.read_csv(broken / "tiny-smoke-verdicts.csv")
    assert set(verdicts["verdict"]) == {"-"} and set(verdicts["against"]) == {"wanda", "sparsegpt"}


def test_one_parameter_turns_matching_off(tiny_folder, tmp_path):
    run("table1", tmp_path, model=str(tiny_folder), matched=False, datasets="wiki")
    rows = [json.loads(path.read_text())["config"]["row"] for path in (tmp_path / "records").iterdir()]
    assert sorted(rows) == ["besa-row-wise", "dense", "magnitude", "sparsegpt", "wanda"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_the_method(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(len(source.splitlines()) <= 25 for source in code)
    assert not re.search(r"^\s*(def|class) |\blambda\b.*=\s*lambda", "\n".join(code), re.MULTILINE)
    assert {"profile", "recipe", "results"} <= papermill.inspect_notebook(path).keys()
    assert re.search(r"\.prune\(|besa\.prune(_checkpoint)?\(", "\n".join(code))


@pytest.mark.parametrize("path", sorted((ROOT / "results/reference").glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_reference_notebooks_ran_to_their_end(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source.strip())
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


def test_an_execution_in_a_kernel_leaves_a_notebook_without_times(tiny_folder, tmp_path):
    output = tmp_path / "table1" / "table1.ipynb"
    parameters = f"{{model: {tiny_folder}, profile: smoke, methods: dense, datasets: wiki, recipe: {{device: cpu}}}}"
    command = [sys.executable, "-m", "reproduce.execute", str(output), parameters]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    notebook = nbformat.read(output, as_version=4)
    assert notebook.metadata.papermill.parameters["methods"] == "dense" and len(notebook.metadata.papermill) == 1
    assert "start_time" not in output.read_text() and (tmp_path / "table1" / "tiny-smoke-dense.csv").is_file()
