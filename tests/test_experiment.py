import shutil
from dataclasses import replace

import pytest
import torch
from test_shards import save

import besa
from besa.baselines import named_methods
from besa.checkpoint import run as shards
from besa.inputs.models import load_tokenizer
from besa.paper import results
from besa.paper.experiment import Experiment
from besa.quantize import packed_record


@pytest.fixture
def experiment(tiny_llama, windows, tmp_path):
    save(tiny_llama, tmp_path / "tiny")
    return Experiment(
        item="table1",
        model=str(tmp_path / "tiny"),
        profile=results.PROFILES["smoke"],
        folder=results.open_folder("table1", str(tmp_path / "results")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        tokenizer=load_tokenizer(str(tmp_path / "tiny")),
        windows=windows,
        texts={"text": windows.flatten()},
        config={"calibration": "random", "seed": 0},
    )


def test_a_finished_row_is_read_back_and_another_configuration_is_another_row(experiment):
    first = experiment.record("wanda", besa.Wanda())
    assert first["metrics"]["text"] > 1 and first["sparsity"] == 0.5 and len(first["projections"]) == 21
    assert experiment.record("wanda", besa.Wanda(), evaluate=lambda *_: pytest.fail("computed again")) == first
    others = [experiment.record("wanda", besa.Wanda(sparsity=0.25)), experiment.record("dense", None)]
    others.append(experiment.with_samples(3).record("wanda", besa.Wanda()))
    assert len({record["config_hash"] for record in [first, *others]}) == 4
    assert len(list((experiment.folder / "records").iterdir())) == 4
    assert others[1]["sparsity"] == 0 and others[1]["config"]["method"] is None


@pytest.fixture
def too_large(monkeypatch, experiment):
    """No model fits; where one was pruned, nothing of it stays."""
    monkeypatch.setattr("besa.paper.experiment.free_device", lambda _: 1000)
    yield
    assert [path.name for path in experiment.folder.iterdir()] == ["records"]


METHODS = {"wanda": besa.Wanda(), "besa": besa.Besa(), "4 bits": besa.Besa(quantize=besa.Quantize(bits=4))}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_too_large_for_memory_leaves_the_same_record(experiment, request, name):
    def measured(network, report):
        return packed_record(network, report.quantized) | experiment.perplexities(network, report)

    numbers = lambda record: [record[key] for key in ("config", "metrics", "sparsity", "bits_per_weight")]
    rows = lambda record: [{k: v for k, v in row.items() if k != "block_seconds"} for row in record["projections"]]
    whole = experiment.record("row", METHODS[name], measured)
    shutil.rmtree(experiment.folder / "records")
    (experiment.folder / "records").mkdir()
    request.getfixturevalue("too_large")
    by_block = experiment.record("row", METHODS[name], measured)
    assert numbers(by_block) == numbers(whole) and rows(by_block) == rows(whole)


def test_an_interrupted_row_of_a_large_model_continues_behind_its_last_block(experiment, too_large, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        experiment.record("wanda", besa.Wanda(), lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert len(list(experiment.folder.glob(".wanda-*/model-block-*.safetensors"))) == 3
    monkeypatch.setattr(shards, "prune_blocks", lambda *_: pytest.fail("pruned again"))
    monkeypatch.setattr("besa.paper.experiment.free_device", lambda _: 10**12)  # it goes on as it began
    record = experiment.record("wanda", besa.Wanda())
    assert record["sparsity"] == 0.5 and record["seconds"] > 0 and record["resumed"]


def test_a_large_model_is_not_converted_and_needs_room_on_the_disk(experiment, too_large, monkeypatch):
    other = replace(experiment, dtype=torch.bfloat16)
    other.check([None])
    with pytest.raises(ValueError, match=r"stored in torch.float32 and too large to be converted .*give dtype=float32"):
        other.check([None, besa.Wanda()])
    with pytest.raises(ValueError, match=r"stored in torch.float32"):
        other.record("wanda", besa.Wanda())
    experiment.check([besa.Wanda()])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(ValueError, match=r"too large for the memory of cpu; pruned it takes .* name another results"):
        experiment.check([besa.Wanda()])


def test_fewer_windows_are_the_first_ones_and_more_are_refused(experiment, windows):
    assert torch.equal(experiment.with_samples(2).windows, windows[:2])
    with pytest.raises(ValueError, match=r"n_samples 7 is outside \[1, 6\]"):
        experiment.with_samples(7)


def test_a_caption_says_what_the_numbers_rest_on(experiment):
    caption = experiment.caption("Perplexity")
    assert "Profile smoke: 6 windows of 24 tokens of random; tested on 6 segments of text." in caption
    assert "SMOKE RUN" in caption


def test_methods_come_by_name_with_their_fields():
    rows = named_methods("dense,wanda,besa-row-wise", 0.4, {"besa-row-wise": {"d_coef": 7.0}})
    assert rows == {
        "dense": None,
        "wanda": besa.Wanda(sparsity=0.4),
        "besa-row-wise": besa.Besa(sparsity=0.4, d_coef=7.0),
    }
    with pytest.raises(ValueError, match="row 'wanda' of 'wanda,wanda' is repeated"):
        named_methods("wanda,wanda")
    with pytest.raises(ValueError, match="unknown method 'wander'"):
        named_methods("dense,wander")


def test_rows_are_selected_by_name():
    assert list(results.select({"a": 1, "b": 2, "c": 3}, "c,a")) == ["c", "a"]
    with pytest.raises(ValueError, match=r"row 'd' of 'a,d' is unknown; known: a, b"):
        results.select({"a": 1, "b": 2}, "a,d")
