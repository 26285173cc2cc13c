"""Parameters, the table and the plan of rows, records."""

import json

import numpy as np
import pytest
import torch

import besa
from reproduce.drawing.tables import block_sparsities
from reproduce.methods import matched_to, method_of, methods_of, steps_of, usual_rows
from reproduce.records import config_hash, find_record, method_config
from reproduce.running import Run
from reproduce.running.run import documents_of_segments
from reproduce.settings import PROFILES, Recipe, listed, resolve_profile, resolve_recipe


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
    usual = usual_rows("table1")
    stems = [
        Run("table1", model="tiny", profile="smoke", results=tmp_path, **names).stem
        for names in ({"methods": list(reversed(usual))}, {"sparsity": 0.6}, {"methods": "dense,wanda"})
    ]
    assert stems == ["tiny-smoke", "tiny-smoke-0.6", "tiny-smoke-dense-wanda"]
    many = [*usual, "exact"]
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
    recipe = Recipe(d_coef_layer=0.05)
    assert method_of("dense", recipe, sparsity=0.6) is None
    assert method_of("wanda", recipe, sparsity=0.6) == besa.Wanda(sparsity=0.6)
    assert method_of("wanda + epoch", recipe, pattern="1:4") == besa.Wanda(pattern="1:4")
    assert method_of("besa-layer-wise", recipe) == besa.Besa(row_group="layer", match="model", d_coef=0.05)
    assert steps_of("wanda + epoch") == {"epoch": {}} and steps_of("wanda + budgets", 0.1) == {"budgets": 0.1}
    assert steps_of("exact + owl + epoch", epoch={"lr": 1}) == {"budgets": "owl", "epoch": {"lr": 1}}
    with pytest.raises(ValueError, match="unknown row 'besa'"):
        method_of("besa", recipe)
    names = ["dense", "wanda", "besa-row-wise + epoch", "besa.baselines:SparseGPT"]
    rows = methods_of(names, resolve_recipe("llama-30b"), sparsity=0.5)
    assert rows.pop("besa-row-wise + epoch") == besa.Besa(d_coef=10.0)
    assert rows == {"dense": None, "wanda": besa.Wanda(), "sparsegpt": besa.SparseGPT()}
    rows |= {"besa-row-wise": besa.Besa(), "exact + epoch": besa.Exact()}
    assert matched_to("besa-row-wise", rows) == {"wanda": "besa-row-wise", "sparsegpt": "besa-row-wise"}
    assert matched_to("besa-row-wise", ["wanda"]) == matched_to("besa-row-wise", rows, False) == {}
    assert matched_to("besa-row-wise", ["besa-row-wise", "mine"]) == {"mine": "besa-row-wise"}


def test_rows_are_run_once_and_matched_rows_have_the_sparsity_of_besa(run, inputs):
    windows, texts = inputs
    methods = methods_of(["dense", "magnitude", "wanda", "besa-row-wise", "exact + epoch"], run.recipe)
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


def test_each_seed_is_matched_to_its_own_sparsity(run, inputs):
    windows, texts = inputs
    finish(run, {"besa-row-wise": besa.Besa(d_coef=500.0), "wanda": besa.Wanda()}, windows, texts)
    rows = {(record["config"]["row"], record["config"]["seed"]): record for record in run.records}
    reached = [block_sparsities(rows["besa-row-wise", seed]) for seed in (0, 1)]
    assert reached[0] != reached[1]
    assert [tuple(rows["wanda", seed]["config"]["method"]["sparsities"]) for seed in (0, 1)] == reached


def test_a_record_holds_the_configuration_and_the_losses(run, inputs):
    windows, texts = inputs
    finish(run, {"wanda": besa.Wanda()}, {0: windows[0]}, texts)
    (record,) = run.records
    (path,) = run.folder.glob("records/*.json")
    assert json.loads(path.read_text()) == record and path.stem == f"tiny-smoke-wanda-{record['config_hash']}"
    assert record["config"]["method"] == {"method": "wanda"} and record["config"]["test_sha256"].keys() == {"wiki"}
    assert record["provenance"].keys() >= {"commit", "hardware", "threads", "versions", "date"}
    losses = run.samples(record)["wiki"]
    assert np.exp(losses.mean()) == pytest.approx(record["metrics"]["wiki"])
    assert len(run.samples(record)["documents of wiki"]) == len(losses)
    assert find_record(run.folder, record["config"]) == record
    for name in record["config"]:
        changed = record["config"] | {name: "another"}
        assert config_hash(changed) != record["config_hash"]
        assert name in ("model", "profile", "row") or find_record(run.folder, changed) is None


def test_a_configuration_leaves_out_the_fields_at_their_default():
    assert method_config(besa.Besa(sparsity=0.7, ignore=["3"], d_coef=2)) == {
        "method": "besa",
        "ignore": ["3"],
        "d_coef": 2.0,
    }
    assert method_config(besa.Exact(pattern="2:4")) == {"method": "exact", "pattern": "2:4"}


def test_segments_know_the_document_in_which_they_begin(tiny_tokenizer, tmp_path, monkeypatch):
    documents, seq_len = ["one two three " * 40, "four", "five six " * 90], 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    found = documents_of_segments("mine", tiny_tokenizer, seq_len)
    n = len(besa.test_tokens("mine", tiny_tokenizer))
    first = (n - len(tiny_tokenizer(documents[2])["input_ids"])) // seq_len  # in which the last document begins
    assert len(found) == -(-n // seq_len) and set(found[: first - 1]) == {1} and set(found[first + 2 :]) == {3}


def test_documents_of_wikitext2_are_its_articles(tiny_tokenizer, tmp_path, monkeypatch):
    article = [" = A title = ", "one two three " * 40, " = = A section = = ", "four five " * 40]
    (tmp_path / "wikitext2").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in 3 * article)
    (tmp_path / "wikitext2" / "test.jsonl").write_text(lines)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    found = documents_of_segments("wikitext2", tiny_tokenizer, 16)
    articles, n_segments = np.unique(found, return_counts=True)
    assert articles.tolist() == [1, 2, 3] and np.ptp(n_segments) <= 1


def test_reconstruction_is_part_of_the_configuration(run, inputs):
    windows, texts = inputs
    plain = run.row("wanda", besa.Wanda(), windows[0], texts)
    better = run.row("wanda", besa.Wanda(), windows[0], texts, reconstruct="closed", tasks=["piqa"])
    assert "reconstruct" not in plain.config and better.config["reconstruct"] == "closed"
    assert better.config["tasks"] == ["piqa"] and better.prune()[1].sparsity == 0.5


def test_kept_models_are_those_in_memory_and_are_found_again(run, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    options = {"budgets": 0.1, "epoch": {"lr": 1e-3}}

    def pruned(item, **changed):
        other = Run(item, model=run.model, profile="smoke", recipe={"device": "cpu"} | changed, results=tmp_path / item)
        row = other.row("wanda", besa.Wanda(), inputs[0][0], inputs[1], **options)
        row.prune()
        return row

    monkeypatch.setattr("reproduce.running.row.slug", lambda name: "qwen2.5")  # a dot is no suffix
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
