"""Sweeps: every cell runs, a failing one takes no other along, and finished ones are not run again."""

import itertools
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import submitit
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
script = runpy.run_path(str(ROOT / "reproduce" / "sweep.py"))
command = typer.Typer(add_completion=False)
command.command()(script["main"])


def arguments(folder, models):
    asked = ["--models", models, "--notebooks", "table1", "--folder", folder, "--parallel", "2", "--methods", "wanda"]
    parameters = {"profile": "smoke", "datasets": "wiki", "results": folder / "results"}
    for name, value in parameters.items():
        asked += ["-p", f"{name}={value}"]
    return [*map(str, asked)]


def test_a_failed_cell_loses_no_other_and_the_sweep_continues(tiny_folder, short_texts, tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_DATA", str(short_texts))
    folder = tmp_path / "sweep"
    start = [sys.executable, str(ROOT / "reproduce" / "sweep.py")]
    both = arguments(folder, f"{tiny_folder},{tmp_path / 'missing'}")
    first = subprocess.run([*start, *both], capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    assert "failed: table1-missing-wanda, see" in first.stderr
    log = Path(first.stderr.rpartition("see ")[2].strip())
    assert "cannot load the model" in log.read_text()
    (record,) = (folder / "results" / "records").glob("tiny-smoke-wanda-*.json")
    before = record.stat().st_mtime_ns
    second = CliRunner().invoke(command, arguments(folder, tiny_folder))
    assert second.exit_code == 0 and "finished before: table1-tiny-wanda" in second.stdout
    assert record.stat().st_mtime_ns == before
    executed = folder / "table1-tiny-wanda.ipynb"
    parameters = json.loads(executed.read_text())["metadata"]["papermill"]["parameters"]
    assert script["is_finished"](executed, parameters) and not script["is_finished"](executed, parameters | {"x": 1})
    executed.write_text("{")  # a kill while papermill wrote it
    third = CliRunner().invoke(command, arguments(folder, tiny_folder))
    assert third.exit_code == 0 and "finished before" not in third.stdout


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--methods", "../../../esc", "method '../../../esc' would name a file"),
        ("--methods", "wanda,/tmp/esc", "method '/tmp/esc' would name a file"),
        ("--methods", "..\\esc", "would name a file"),
        ("--methods", "a b", "method 'a b'"),
        ("--gpus", "99", "2 jobs of 99 GPU(s) at a time"),
        ("--notebooks", "table9", "unknown notebook 'table9'"),
        ("--notebooks", "../x", "unknown notebook '../x'"),
        ("--notebooks", "table1,../reproduce/table1", "unknown notebook '../reproduce/table1'"),
        ("--notebooks", "", "unknown notebook ''"),
        ("-p", "sparsty=0.6", "no parameter 'sparsty' in table1; table1 has model, methods, datasets, sparsity"),
        ("-p", "tasks=piqa", "no parameter 'tasks' in table1; table1 has model"),
        ("-p", "recipe.d_coef=2", "no parameter 'recipe.d_coef'"),
        ("-p", "sparsity", "parameter 'sparsity' is not NAME=VALUE"),
        ("-p", "sparsity 0.6", "parameter 'sparsity 0.6' is not NAME=VALUE"),
        ("-p", "recipe={", "parameter 'recipe={' is not NAME=VALUE, with a value in YAML"),
        ("-p", "=7", "no parameter ''"),
    ],
)
def test_bad_options_are_refused_before_any_job(tmp_path, option, value, words):
    arguments = ["--models", "smollm2-135m", "--folder", str(tmp_path / "sweep"), "--parallel", "2", option, value]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(command, arguments)
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert not (tmp_path / "sweep").exists()


def test_slurm_is_given_what_was_asked_for_to_the_letter(tmp_path, monkeypatch):
    asked, given = ["time=2:00:00", "account=0123", "reservation=x", "exclusive"], []
    arguments = ["--models", "smollm2-135m", "--cluster", "slurm", "--folder", str(tmp_path), "--gpus", "2"]
    monkeypatch.setattr("shutil.which", lambda *_: "srun")
    keep = lambda executor, *_: given.append(executor.parameters) or {}
    monkeypatch.setitem(script["main"].__globals__, "run_all", keep)
    result = CliRunner().invoke(command, [*arguments, *itertools.chain(*(("--slurm", each) for each in asked))])
    assert result.exit_code == 0, result.output
    text = submitit.slurm.slurm._make_sbatch_string("python x", tmp_path, **given[0])
    for line in ("time=2:00:00", "account=0123", "reservation=x", "exclusive", "gpus-per-node=2"):
        assert f"#SBATCH --{line}\n" in text


def test_a_notebook_is_replaced_only_by_one_that_ran_through(tmp_path, monkeypatch):
    run_cell, output = script["run_cell"], tmp_path / "table1-x.ipynb"
    output.write_text("the last good one")
    write = lambda source, path, *_, **__: Path(path).write_text("another")

    def fail(*arguments, **_):
        write(*arguments)
        raise RuntimeError("a cell")

    monkeypatch.setattr(run_cell.__globals__["papermill"], "execute_notebook", fail)
    with pytest.raises(RuntimeError, match="a cell"):
        run_cell("table1", output, {}, None)
    assert output.read_text() == "the last good one"
    monkeypatch.setattr(run_cell.__globals__["papermill"], "execute_notebook", write)
    run_cell("table1", output, {}, None)
    assert output.read_text() == "another" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("visible, expected", [("2,3", {"2", "3"}), (None, {"0", "1"})])
def test_jobs_of_this_machine_share_the_gpus_that_it_shows(tmp_path, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    given = set()

    def submit(_, notebook, output, parameters, gpus):
        given.add(gpus)
        return SimpleNamespace(done=lambda: True, exception=lambda: None)

    executor = SimpleNamespace(cluster="local", submit=submit)
    assert not script["run_all"](executor, {"table1-a": {}, "table1-b": {}}, tmp_path, parallel=2, gpus=1)
    assert given == expected


def test_a_parameter_of_one_of_two_notebooks_is_its_own_and_methods_of_one_without_are_refused():
    found = script["cells"]("smollm2-135m", "table1, table2", "", {"tasks": "piqa"})
    assert found["table2-smollm2-135m"]["tasks"] == "piqa" and "tasks" not in found["table1-smollm2-135m"]
    with pytest.raises(typer.BadParameter, match="allocation has no methods to run apart, but model, blocks"):
        script["cells"]("smollm2-135m", "allocation", "wanda", {})


def test_sigint_to_the_parent_alone_ends_its_jobs(tmp_path, monkeypatch):
    started, names = tmp_path / "started", {}
    code = "def run_cell(*_):\n    import os, pathlib, time\n    pathlib.Path({!r}).write_text(str(os.getpid()))\n"
    exec(code.format(str(started)) + "    time.sleep(600)\n", names)  # of no module: pickled as a whole
    inside, sleep = script["run_all"].__globals__, time.sleep

    def interrupted(seconds):
        sleep(0.05)
        if started.exists() and started.read_text():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(inside, "run_cell", names["run_cell"])
    monkeypatch.setattr(inside["time"], "sleep", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background is deaf to
    try:
        executor = script["submitit"].AutoExecutor(folder=tmp_path / "logs", cluster="local")
        with pytest.raises(KeyboardInterrupt):
            script["run_all"](executor, {"table1-tiny": {}}, tmp_path, parallel=1, gpus=0)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(started.read_text())) and time.monotonic() < deadline:
        sleep(0.05)
    assert not psutil.pid_exists(int(started.read_text()))


def test_a_folder_takes_no_recipe_of_a_yaml_beside_it(tmp_path):
    (tmp_path / "llama-7b.yaml").write_text("recipe: {seed: 7}")
    (parameters,) = script["cells"](str(tmp_path / "llama-7b"), "table1", "", {}).values()
    assert parameters == {"model": str(tmp_path / "llama-7b")}
