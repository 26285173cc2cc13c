"""reproduce.records: parameters, the plan of rows, records."""

import json

import nbformat
import numpy as np
import pytest
import torch

import besa
from reproduce.methods import matched_to, method_of, methods_of, steps_of
from reproduce.records import config_hash, find_record
from reproduce.runs import PROFILES, USUAL_ROWS, Run, documents_of_segments, listed, resolve_profile, resolve_recipe
from reproduce.tables import ROOT


@pytest.fixture
def run(tiny_folder, short_texts, tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_DATA", str(short_texts))
    return Run("table1", model=str(tiny_folder), profile="smoke", recipe={"device": "cpu"}, results=tmp_path)


@pytest.fixture
def inputs(run, tiny_tokenizer):
    return run.windows(tiny_tokenizer, [0, 1]), run.texts(tiny_tokenizer, ["wiki"])


def finish(run, methods, windows, texts):
    """Run what is unfinished; returns the names of the rows that were."""
    names = []
    for row in run.rows(methods, windows, texts, matched=matched_to("besa-row-wise", methods)):
        model, report = row.prune()
        row.save(report, {name: besa.perplexity(model, tokens, run.seq_len) for name, tokens in texts.items()})
        names.append(row.name)
    return names


@pytest.mark.parametrize(
    ("given", "values"),
    [("row,8", ["row", 8]), ("wiki", ["wiki"]), (8, [8]), ([0, 1], [0, 1]), ("0, 1,", [0, 1]), (0.5, [0.5])],
)
def test_lists_from_the_command_line_are_read(given, values):
    assert listed(given) == values


def test_recipes_come_from_the_model_file_and_from_parameters():
    assert resolve_recipe("llama-65b").d_coef == 50 and resolve_recipe("llama-65b").calibration == "c4"
    changed = resolve_recipe("llama-65b", {"d_coef": 2, "seed": 3})
    assert (changed.d_coef, changed.seed, changed.calibration) == (2, 3, "c4")
    assert resolve_recipe("some/hub-id") == resolve_recipe("smollm2-135m")
    with pytest.raises(ValueError, match="Recipe has no field 'd_coeff'"):
        resolve_recipe("llama-7b", {"d_coeff": 2})


def test_files_are_named_for_what_is_unusual(tmp_path):
    for item, usual in USUAL_ROWS.items():
        cells = nbformat.read(ROOT / "reproduce" / f"{item}.ipynb", 4).cells
        parameters = {}
        exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), parameters)
        assert parameters["methods"] == usual
    stems = [
        Run("table1", model="tiny", profile="smoke", results=tmp_path, **names).stem
        for names in ({"methods": list(reversed(USUAL_ROWS["table1"]))}, {"sparsity": 0.6}, {"methods": "dense,wanda"})
    ]
    assert stems == ["tiny-smoke", "tiny-smoke-0.6", "tiny-smoke-dense-wanda"]
    many = [*USUAL_ROWS["table1"], "exact"]
    run = Run("table1", model="tiny", profile="smoke", results=tmp_path, methods=many, matched=False)
    assert run.stem.startswith("tiny-smoke-unmatched-") and len(run.stem) == 27
    reference = tmp_path / "reference" / "table1"
    assert Run("table1", model="tiny", profile="quick", results=reference, methods=many).stem == "tiny-quick"


def test_profiles_are_found_by_name_and_device(monkeypatch):
    monkeypatch.delenv("BESA_PROFILE", raising=False)
    assert resolve_profile("auto", torch.device("cpu")).name == "quick"
    assert resolve_profile("auto", torch.device("cuda")).name == "paper"
    assert resolve_profile("smoke", torch.device("cuda")) is PROFILES["smoke"]
    with pytest.raises(ValueError, match="unknown profile 'large'"):
        resolve_profile("large", torch.device("cpu"))


def test_named_rows_are_the_methods_of_the_tables():
    assert method_of("dense") is None
    assert method_of("wanda", 0.6) == besa.Wanda(sparsity=0.6)
    assert method_of("besa-layer-wise") == besa.Besa(row_group="layer", match="model", d_coef=0.5)
    assert steps_of("wanda + epoch") == {"epoch": {}} and steps_of("wanda + budgets", 0.1) == {"budgets": 0.1}
    assert steps_of("exact + owl + epoch", epoch={"lr": 1}) == {"budgets": "owl", "epoch": {"lr": 1}}
    with pytest.raises(ValueError, match="unknown row 'besa'"):
        method_of("besa")
    names = ["dense", "wanda", "besa-row-wise + epoch", "besa.baselines:SparseGPT"]
    rows = methods_of(names, 0.5, resolve_recipe("llama-30b"))
    assert rows.pop("besa-row-wise + epoch") == besa.Besa(d_coef=10.0)
    assert rows == {"dense": None, "wanda": besa.Wanda(), "sparsegpt": besa.SparseGPT()}
    rows |= {"besa-row-wise": besa.Besa(), "exact + epoch": besa.Exact()}
    assert matched_to("besa-row-wise", rows) == {"wanda": "besa-row-wise", "sparsegpt": "besa-row-wise"}
    assert matched_to("besa-row-wise", ["wanda"]) == matched_to("besa-row-wise", rows, wanted=False) == {}
    assert matched_to("besa-row-wise", ["besa-row-wise", "mine"]) == {"mine": "besa-row-wise"}


def test_rows_are_run_once_and_matched_rows_have_the_sparsity_of_besa(run, inputs):
    windows, texts = inputs
    methods = methods_of(["dense", "magnitude", "wanda", "besa-row-wise", "exact + epoch"], 0.5, run.recipe)
    calibrated = ["besa-row-wise", "exact + epoch", "wanda"]
    assert finish(run, methods, windows, texts) == ["dense", "magnitude", *calibrated, *calibrated]
    records = run.records
    assert finish(run, methods, windows, texts) == [] and run.records == records
    assert [record["config"]["seed"] for record in records] == [0, 0, 0, 0, 0, 1, 1, 1]
    besa_record, wanda = records[2], records[4]
    assert records[3]["config"]["epoch"] == {} and records[3]["cpu_seconds"]["epoch"] > 0
    assert wanda["config"]["matched_to"] == "besa-row-wise" and "matched_to" not in besa_record["config"]
    assert wanda["config"]["method"]["sparsities"][0] == pytest.approx(
        sum(row["zeros"] for row in besa_record["projections"] if row["block"] == 0)
        / sum(row["rows"] * row["columns"] for row in besa_record["projections"] if row["block"] == 0)
    )
    assert 0 <= besa_record["sparsity"] - wanda["sparsity"] < 1 / 16  # less than one weight of a row
    assert finish(run, methods, {2: windows[0].flip(0)}, texts) == ["dense", "magnitude", *calibrated]


def test_a_record_holds_the_configuration_and_the_losses(run, inputs):
    windows, texts = inputs
    finish(run, {"wanda": besa.Wanda()}, {0: windows[0]}, texts)
    (record,) = run.records
    (path,) = run.folder.glob("records/*.json")
    assert json.loads(path.read_text()) == record and path.stem == f"tiny-smoke-wanda-{record['config_hash']}"
    assert record["config"]["method"] == besa.Wanda().config() and record["config"]["test_sha256"].keys() == {"wiki"}
    assert record["provenance"].keys() >= {"commit", "hardware", "threads", "versions", "date"}
    losses = run.samples(record)["wiki"]
    assert np.exp(losses.mean()) == pytest.approx(record["metrics"]["wiki"])
    assert len(run.samples(record)["documents of wiki"]) == len(losses)
    assert find_record(run.folder, record["config"]) == record
    for name in record["config"]:
        changed = record["config"] | {name: "another"}
        assert config_hash(changed) != record["config_hash"]
        assert name in ("model", "profile", "row") or find_record(run.folder, changed) is None


def test_segments_know_the_document_in_which_they_begin(tiny_tokenizer, tmp_path, monkeypatch):
    documents, seq_len = ["one two three " * 40, "four", "five six " * 90], 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    found = documents_of_segments("mine", tiny_tokenizer, seq_len)
    n = len(besa.test_tokens("mine", tiny_tokenizer))
    first = (n - len(tiny_tokenizer(documents[2])["input_ids"])) // seq_len  # in which the last document begins
    assert len(found) == -(-n // seq_len) and set(found[: first - 1]) == {1} and set(found[first + 2 :]) == {3}


def test_reconstruction_is_part_of_the_configuration(run, inputs):
    windows, texts = inputs
    plain = run.row("wanda", besa.Wanda(), windows[0], texts)
    better = run.row("wanda", besa.Wanda(), windows[0], texts, reconstruct=besa.Reconstruct(), tasks=["piqa"])
    assert "reconstruct" not in plain.config and better.config["reconstruct"]["kind"] == "closed"
    assert better.config["tasks"] == ["piqa"] and better.prune()[1].sparsity == 0.5


def test_kept_models_are_those_in_memory_and_are_found_again(run, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    options = {"budgets": 0.1, "epoch": {"lr": 1e-3}}

    def pruned(item, **changed):
        other = Run(item, model=run.model, profile="smoke", recipe={"device": "cpu"} | changed, results=tmp_path / item)
        row = other.row("wanda", besa.Wanda(), inputs[0][0], inputs[1], **options)
        row.prune()
        return row

    monkeypatch.setattr("reproduce.rows.slug", lambda name: "qwen2.5")  # a dot is no suffix
    rows = [pruned("table1"), pruned("table1", keep=True)]
    monkeypatch.setattr(besa, "finetune", None)
    rows.append(pruned("table2", keep=True))
    assert len({row.weights_sha256 for row in rows}) == 1 and rows[1].cpu_seconds == rows[2].cpu_seconds
    assert len([*(tmp_path / "cache" / "pruned").glob("qwen2.5-wanda-*.json")]) == 2


def test_smoke_runs_stay_out_of_the_reference_results(tiny_folder, tmp_path):
    folder = tmp_path / "reference" / "table1"
    run = Run("table1", model=str(tiny_folder), profile="smoke", recipe={"device": "cpu"}, results=folder)
    with pytest.raises(ValueError, match="only shows that the code runs"):
        run.row("dense", None).save(None, {"wiki": 1.0})
