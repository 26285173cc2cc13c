import pytest

from besa import Besa
from besa.paper.settings import ablations, fractions, granularities, scale_runs


def test_the_released_recipes_keep_their_names_and_step_sizes():
    rows = granularities({"pruned": "row,8,layer", "dense": "row,layer"}, d_coef=5.0, d_coef_layer=50.0, sparsity=0.45)
    assert list(rows) == [
        "besa-row-wise",
        "besa-8-pruned",
        "besa-layer-pruned",
        "besa-row-dense",
        "besa-layer-wise",
    ]
    assert rows["besa-layer-wise"] == Besa(sparsity=0.45, row_group="layer", targets="dense", d_coef=50.0)
    assert rows["besa-8-pruned"] == Besa(sparsity=0.45, row_group=8)


def test_each_ablation_changes_one_value_and_holds_the_baseline_once():
    baseline = Besa(d_coef=7.0)
    grids = {"n_samples": "64,8", "candidates": "11,101", "importance": "magnitude,wanda,sparsegpt", "epochs": ""}
    settings = ablations(baseline, 32, grids)
    assert [setting.row for setting in settings] == [
        "n_samples-8",
        "baseline",
        "n_samples-64",
        "candidates-11",
        "baseline",
        "importance-magnitude",
        "baseline",
        "importance-sparsegpt",
    ]
    for setting in settings:
        if setting.row == "baseline":
            assert setting.method == baseline and setting.n_samples == 32
    assert settings[0].n_samples == 8 and settings[0].method == baseline
    assert settings[3].method == Besa(d_coef=7.0, candidates=11) and settings[3].n_samples == 32


def test_a_limit_keeps_the_baseline_and_still_refuses_what_it_cuts():
    settings = ablations(Besa(), 2, {"n_samples": "8,16", "epochs": "1,3,5"}, limit=1)
    assert [setting.value for setting in settings] == [2, 8, 1, 3]
    with pytest.raises(ValueError, match="epochs 0 is not a whole number of at least 1"):
        ablations(Besa(), 2, {"epochs": "3,0"}, limit=1)


@pytest.mark.parametrize(
    "grids, message",
    [
        ({"n_samples": "8,0"}, "n_samples 0 is not a whole number of at least 1"),
        ({"epochs": "1,many"}, "epochs 'many' is not a whole number"),
        ({"candidates": "11,51,11"}, "candidates: 11 is repeated in '11,51,11'"),
        ({"importance": "wander"}, "importance 'wander' is not 'magnitude'"),
        ({"epochs": "1"}, "no value differs from the baseline"),
    ],
)
def test_bad_values_are_refused_by_name(no_type_checks, grids, message):
    with pytest.raises(ValueError, match=message):
        ablations(Besa(), 32, grids)


def test_bad_row_groups_are_refused(no_type_checks):
    with pytest.raises(ValueError, match="row_group 'column' is not 'row', 'layer' or a number of rows"):
        granularities({"pruned": "row,column"})
    with pytest.raises(ValueError, match="row groups with dense targets: 'row' is repeated"):
        granularities({"dense": "row,row"})
    with pytest.raises(ValueError, match="no row groups are given"):
        granularities({"pruned": "", "dense": ""})


def test_fractions_are_sorted_numbers():
    assert fractions("sparsities", "0.8,0, 0.35") == [0.0, 0.35, 0.8]


@pytest.mark.parametrize(
    "values, message",
    [
        ("0.5,half", "sparsities '0.5,half': 'half' is not a number"),
        ("", "sparsities '': '' is not a number"),
        ("0.5,1", r"sparsities '0.5,1': 1 is outside \[0, 1\)"),
        ("nan", r"sparsities 'nan': nan is outside \[0, 1\)"),
        ("0.5,0.50", "sparsities '0.5,0.50': a value is repeated"),
    ],
)
def test_fractions_name_the_parameter_and_the_value_that_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        fractions("sparsities", values)


def test_scale_runs_name_shape_blocks_and_windows():
    assert scale_runs("llama-7b:4x32, llama2-70b:2x8") == [("llama-7b", 4, 32), ("llama2-70b", 2, 8)]
    for text in ("llama-7b", "gpt-5:2x2", "llama-7b:0x2", "llama-7b:2x2,"):
        with pytest.raises(ValueError, match=r"is not SHAPE:BLOCKSxWINDOWS with a shape of smollm2-135m"):
            scale_runs(text)
