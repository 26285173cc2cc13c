"""The command line passes its options on, and names mistakes in one line."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import besa
import besa.checkpoint
from besa.__main__ import app
from besa.data import models

WINDOWS, TOKENS = torch.zeros(2, 3, dtype=torch.long), torch.arange(1000)


class Scores:
    def to_frame(self):
        return pd.DataFrame({"acc": [0.5]}, index=["piqa"])


@pytest.fixture
def called(monkeypatch):
    """Arguments of each function, by its name."""
    found = {}

    def record(module, name, answer=None):
        def function(*arguments, **options):
            found[name] = arguments, options
            return answer

        monkeypatch.setattr(module, name, function)

    record(models, "load_tokenizer", "tokenizer")
    record(besa, "calibration_windows", WINDOWS)
    record(besa, "prune_checkpoint", "report")
    record(besa, "load_model", ("model", "tokenizer"))
    record(besa, "test_tokens", TOKENS)
    record(besa, "perplexity", 12.0)
    record(besa, "zero_shot", Scores())
    return found


def invoke(*line, code=0):
    result = CliRunner().invoke(app, [*map(str, line)])
    assert result.exit_code == code, result.output
    return result.output


def test_every_option_of_prune_is_passed_on(called):
    windows = ["--calibration", "mine", "--n-samples", 7, "--seq-len", 33, "--seed", 3, "--sampler", "pack"]
    fields = ["--sparsity", 0.45, "--set", "d_coef=2", "--set", "epochs=4", "--set", 'ignore=["0", ".*down_proj"]']
    where = ["--device", "cpu", "--trust-remote-code", "--reconstruct"]
    output = invoke("prune", "model", "out", *windows, *fields, "--set", "quantize.bits=3", *where)
    method = besa.Besa(sparsity=0.45, d_coef=2.0, epochs=4, ignore=("0", ".*down_proj"), quantize=besa.Quantize(bits=3))
    assert called["load_tokenizer"] == (("model",), {"trust_remote_code": True})
    assert called["calibration_windows"] == (("mine", "tokenizer", 7, 33, 3, "pack"), {})
    options = {"device": "cpu", "reconstruct": besa.Reconstruct(), "trust_remote_code": True}
    assert called["prune_checkpoint"] == (("model", Path("out"), WINDOWS, method), options)
    assert "report\nwrote out" in output


def test_the_defaults_are_the_published_ones_and_embedded_models_need_no_hub(called):
    for source, text in {"model": "c4", "smollm2-135m": "sotu"}.items():
        invoke("prune", source, "out")
        assert called["calibration_windows"] == ((text, "tokenizer", 128, 2048, 0, "crop"), {})
        assert called["prune_checkpoint"][0][-1] == besa.Besa()


@pytest.mark.parametrize(
    "line, method",
    [
        (["besa", "--set", "row_group=layer", "--set", "match=model", "--set", "d_coef=0.5"], besa.Besa.layer_wise()),
        (["exact", "--set", "pattern=2:4"], besa.Exact(pattern="2:4")),
        (["wanda", "--sparsity", 0], besa.Wanda(sparsity=0.0)),
        (["sparsegpt", "--sparsity", 0.7], besa.SparseGPT(sparsity=0.7)),
        (["magnitude"], besa.Magnitude()),
    ],
)
def test_methods_have_their_names_in_the_tables(called, line, method):
    invoke("prune", "model", "out", "--method", *line)
    assert called["prune_checkpoint"][0][-1] == method


@pytest.mark.parametrize(
    "line, words",
    [
        (["--method", "wnada"], "unknown method 'wnada' (known: besa"),
        (["--method", "mine:Method"], "method 'mine:Method' cannot be imported: No module named 'mine'"),
        (["--set", "epoch=3"], "Besa has no field 'epoch' (fields: sparsity, sparsities, ignore, "),
        (["--set", "epochs=many"], "method besa, epochs: Input should be a valid integer"),
        (["--set", "quantize.bit=4"], "method besa, quantize.bit: Unexpected keyword argument"),
        (["--sparsity", 1.5], "method besa, sparsity: Input should be less than 1, not 1.5; 0.5 is 50 %"),
        (["--sparsity", 0], "method besa, the sparsity must be above 0"),
        (["--method", "magnitude", "--set", "d_coef=5"], "Magnitude has no field 'd_coef'"),
    ],
)
def test_mistakes_are_named_in_one_line_before_any_work(called, line, words):
    output = invoke("prune", "model", "out", *line, code=1)
    assert output.startswith(f"besa: {words}") and output.count("\n") == 1 and not called


def test_an_error_of_the_work_is_one_line(called, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("output 'out' is the source")

    monkeypatch.setattr(besa, "prune_checkpoint", refuse)
    assert invoke("prune", "model", "out", code=1) == "besa: output 'out' is the source\n"


def test_finetune_trains_the_pruned_checkpoint_into_the_output(called, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(besa, "finetune", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.setattr(besa, "save_model", lambda *arguments: (tmp_path / "tokenizer_config.json").touch())
    for _ in range(2):  # the second time all is there
        invoke("prune", "model", tmp_path, "--finetune")
    assert called["prune_checkpoint"][0][1] == tmp_path / "besa" / "pruned"
    assert calls == [(("model", WINDOWS, "report"), {"folder": tmp_path / "besa" / "epochs"})]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_says_how_to_go_on(called, monkeypatch, tmp_path, error):
    (tmp_path / "besa").mkdir()
    (tmp_path / "besa" / "block-00000.json").touch()

    def interrupt(*_, **__):
        raise error

    monkeypatch.setattr(besa, "prune_checkpoint", interrupt)
    output = invoke("prune", "model", tmp_path, code=1)
    assert output.endswith("; 1 blocks are finished, and the same command continues\n") and output.count("\n") == 1


def test_every_option_of_evaluate_is_passed_on(called):
    where = ["--dtype", "float32", "--device", "cpu"]
    sizes = ["--seq-len", 16, "--segments", 2, "--limit", 5]
    output = invoke("evaluate", "m", "--texts", "a,b", "--tasks", "piqa,boolq", *sizes, *where)
    assert called["load_model"] == (("m", "float32", "cpu"), {"trust_remote_code": False})
    (model, tokens, seq_len), _ = called["perplexity"]
    assert called["test_tokens"] == (("b", "tokenizer"), {}) and (model, len(tokens), seq_len) == ("model", 32, 16)
    assert called["zero_shot"] == (("model", "tokenizer", ["piqa", "boolq"], 5), {})
    assert "perplexity on a: 12.0000\nperplexity on b: 12.0000\n" in output and "piqa  0.5" in output


def test_help_answers_without_loading_torch():
    script = "import sys; from besa.__main__ import app; assert 'torch' not in sys.modules; app(['--help'])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("prune", "evaluate"))
    assert invoke("--version") == f"besa {besa.__version__}\n"
