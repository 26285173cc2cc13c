import pytest
import torch

import besa
from besa import results
from besa.baselines import named_methods
from besa.experiment import Experiment


@pytest.fixture
def experiment(tiny_llama, windows, tmp_path, smollm2):
    tiny_llama.save_pretrained(tmp_path / "tiny")
    smollm2[1].save_pretrained(tmp_path / "tiny")
    return Experiment(
        item="table1",
        model=str(tmp_path / "tiny"),
        profile=results.PROFILES["smoke"],
        folder=results.open_folder("table1", str(tmp_path / "results")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        tokenizer=smollm2[1],
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
