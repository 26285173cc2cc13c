"""Every option of the command `besa` reaches the function that does the work, which is recorded here and not run."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import typer
from torch.distributed import DistNetworkError
from typer.testing import CliRunner

import besa
from besa.__main__ import app
from besa.checkpoint import format as checkpoint
from besa.checkpoint import pack
from besa.evaluate import tasks
from besa.inputs import models
from besa.machine import processes

WINDOWS, TOKENS = torch.zeros(2, 3, dtype=torch.long), torch.arange(1000)


class Scores:
    def to_frame(self):
        return pd.DataFrame({"acc": [0.5], "stderr": [0.1], "n": [5], "of": [9]}, index=["piqa"])


@pytest.fixture
def asked(no_type_checks, monkeypatch):
    """What each function is asked for, by its name."""
    found = {}

    def record(module, name, answer=None):
        def asked(*arguments, **options):
            found[name] = arguments, options
            return answer

        monkeypatch.setattr(module, name, asked)

    record(models, "load_tokenizer", "tokenizer")
    record(besa, "calibration_windows", WINDOWS)
    record(besa, "prune_checkpoint", "report")
    record(besa, "plan_checkpoint", "plan")
    record(besa, "load_model", ("model", None))
    record(besa, "test_tokens", TOKENS)
    record(besa, "perplexity", 12.0)
    record(besa, "zero_shot", Scores())
    record(tasks, "load_task")
    record(checkpoint, "export")
    record(pack, "pack_checkpoint", (2**33, 2**31))
    return found


def invoke(*line):
    result = CliRunner().invoke(app, [*map(str, line)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_option_of_prune_is_heeded(asked):
    windows = ["--calibration", "mine", "--n-samples", 7, "--seq-len", 33, "--sampler", "pack", "--seed", 3]
    learned = ["--sparsity", 0.45, "--budget", "penalty", "--d-coef", 2, "--epochs", 4, "--batch-size", 5]
    others = ["--ignore", "0", "--ignore", "re:.*down_proj", "--bits", 3, "--group-size", 16]
    where = ["--device", "cpu", "--hidden-states", "file", "--trust-remote-code", "--reconstruct", "block"]
    invoke("prune", "model", "out", *windows, *learned, *others, *where)
    method = besa.Besa(
        sparsity=0.45,
        budget="penalty",
        d_coef=2.0,
        epochs=4,
        batch_size=5,
        ignore=("0", "re:.*down_proj"),
        quantize=besa.Quantize(bits=3, group_size=16),
    )
    assert asked["load_tokenizer"] == (("model", True), {})
    assert asked["calibration_windows"] == (("mine", "tokenizer", 7, 33, 3, "pack"), {})
    more = {"device": "cpu", "hidden_states": "file", "trust_remote_code": True}
    more["reconstruct"] = besa.Reconstruct("block")
    assert asked["prune_checkpoint"] == (("model", Path("out"), WINDOWS, method), more)
    assert "plan_checkpoint" not in asked


@pytest.mark.parametrize(
    "line, method",
    [
        ([], besa.Besa()),
        (["--method", "besa-layer-wise", "--d-coef", 50], besa.Besa(row_group="layer", targets="dense", d_coef=50.0)),
        (["--budget", "exact", "--pattern", "N:8"], besa.Besa(budget="exact", pattern="N:8")),
        (["--method", "wanda", "--pattern", "2:4"], besa.Wanda(pattern="2:4")),
        (["--method", "sparsegpt", "--sparsity", 0.7], besa.SparseGPT(sparsity=0.7)),
        (["--method", "magnitude"], besa.Magnitude()),
    ],
)
def test_a_dry_run_plans_the_method_that_is_named_by_the_published_windows(asked, line, method):
    assert "plan" in invoke("prune", "model", "out", *line, "--dry-run")
    more = {"device": "auto", "hidden_states": "auto", "trust_remote_code": False, "reconstruct": None}
    assert asked["plan_checkpoint"] == (("model", Path("out"), WINDOWS, method), more)
    assert asked["calibration_windows"] == (("sotu", "tokenizer", 128, 2048, 0, "crop"), {})
    assert "prune_checkpoint" not in asked


@pytest.mark.parametrize(
    "line, words",
    [
        (
            ["--method", "magnitude", "--bits", 4, "--budget", "exact"],
            "--budget, --bits: not used by method 'magnitude'",
        ),
        (["--method", "wanda", "--d-coef", 5], "--d-coef: not used by method 'wanda'; leave it out"),
    ],
)
def test_options_that_are_not_for_a_method_are_refused_by_their_names(asked, line, words):
    result = CliRunner().invoke(app, ["prune", "model", "out", *map(str, line)])
    assert result.exit_code == 1 and words in result.output and not asked


def test_a_step_takes_a_window_of_every_rank_where_nothing_is_said(asked, monkeypatch):
    monkeypatch.setattr(processes, "n_ranks", lambda: 8)
    for name, method in (("besa", besa.Besa(batch_size=8)), ("wanda", besa.Wanda())):
        invoke("prune", "model", "out", "--method", name)
        assert asked["prune_checkpoint"][0][3] == method


def test_every_option_of_evaluate_is_heeded(asked, tmp_path):
    texts = ["--texts", "mine", "--seq-len", 16, "--max-segments", 3]
    questions = ["--tasks", "piqa,boolq", "--limit", 5, "--checkpoint", tmp_path / "answers"]
    where = ["--dtype", "float32", "--device", "cpu", "--trust-remote-code"]
    output = invoke("evaluate", "model", *texts, *questions, *where)
    assert asked["load_tokenizer"] == (("model", True), {}) and asked["test_tokens"] == (("mine", "tokenizer"), {})
    assert asked["load_model"] == (("model", "float32", "cpu"), {"trust_remote_code": True})
    (model, tokens, seq_len), _ = asked["perplexity"]
    assert (model, seq_len) == ("model", 16) and torch.equal(tokens, TOKENS[:48])
    found = ("model", "tokenizer", ["piqa", "boolq"], 5), {"checkpoint": tmp_path / "answers"}
    assert asked["zero_shot"] == found and asked["load_task"] == (("boolq",), {})
    assert "perplexity on mine: 12.0000 over 3 segments of 16 tokens" in output and "piqa  0.5" in output


def test_export_and_pack_pass_on_what_they_are_told(asked):
    assert "wrote folder" in invoke("export", "model", "folder", "--dtype", "float16", "--trust-remote-code")
    assert asked["export"] == (("model", Path("folder"), "float16", True), {})
    said = "wrote folder: 0.250 of the 8.00 GiB of weights in model"
    assert said in invoke("pack", "model", "folder", "--trust-remote-code")
    assert asked["pack_checkpoint"] == (("model", Path("folder"), True), {})


def test_a_rank_whose_others_are_gone_says_so(asked, monkeypatch):
    def lost(*_, **__):
        raise DistNetworkError("Connection closed by peer\nand more")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(besa, "prune_checkpoint", lost)
    result = CliRunner().invoke(app, ["prune", "model", "out"])
    assert result.exit_code == 1 and "besa: rank 1 lost the others (Connection closed by peer)" in result.output
    assert isinstance(result.exception, SystemExit | typer.Exit)
