"""Projections and blocks that stay dense: which ones a name means, and what that does to sparsities and budgets."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_shards import assert_same, load, save

import besa
from besa.besa import Besa
from besa.checkpoint.pack import pack_checkpoint
from besa.decoder import find_blocks, projections, pruned_projections
from besa.packed_files import packed_projections
from besa.reconstruct import Reconstruct

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ignored(model, ignore):
    """As 0.q_proj, 2.down_proj, ..."""
    left = pruned_projections(model, ignore)
    every = {(i, name) for i, block in enumerate(find_blocks(model)) for name in projections(block)}
    return sorted(f"{i}.{name.rpartition('.')[2]}" for i, name in every - left.keys())


@pytest.mark.parametrize(
    "entry, meant",
    [
        ("model.layers.1.mlp.up_proj", ["1.up_proj"]),
        ("1.mlp.up_proj", ["1.up_proj"]),
        ("mlp.up_proj", ["0.up_proj", "1.up_proj", "2.up_proj"]),
        ("model.layers.2", sorted(f"2.{name}" for name in NAMES)),
        ("2", sorted(f"2.{name}" for name in NAMES)),
        ("0.mlp", ["0.down_proj", "0.gate_proj", "0.up_proj"]),
        ("re:.*down_proj", ["0.down_proj", "1.down_proj", "2.down_proj"]),
        (r"re:model\.layers\.[02]\.self_attn\.[qk]_proj", ["0.k_proj", "0.q_proj", "2.k_proj", "2.q_proj"]),
        ("lm_head", []),
        ("re:.*lm_head", []),
    ],
)
def test_names_mean_what_they_mean_to_llm_compressor_and_to_reports(tiny_llama, entry, meant):
    assert ignored(tiny_llama, [entry]) == meant


@pytest.mark.parametrize(
    "ignore, message",
    [
        (["mlp.up"], "ignore 'mlp.up' names no projection; there are model.layers.0.self_attn.q_proj, 0.self_attn"),
        (["re:down_proj"], "ignore 're:down_proj' names no projection"),  # matched from the start
        (["7"], "ignore '7' names no projection"),
        (["re:(down"], r"ignore 're:\(down' is no regular expression"),
        (["re:.*"], r"ignore \['re:.\*'\] leaves no projection to prune"),
    ],
)
def test_entries_that_name_nothing_or_everything_are_refused(tiny_llama, windows, ignore, message):
    for method in (besa.Wanda, Besa):
        with pytest.raises(ValueError, match=message):
            besa.prune(tiny_llama, windows, method(ignore=ignore), progress=False)


METHODS = {
    "magnitude": besa.Magnitude,
    "wanda": besa.Wanda,
    "sparsegpt": besa.SparseGPT,
    "besa": Besa,
    "exact": lambda **fields: Besa(budget="exact", **fields),
    "model": lambda **fields: Besa(budget="exact", scope="model", **fields),
    "span": lambda **fields: Besa(budget="exact", reconstruct=2, **fields),
    "sublayer": lambda **fields: Besa(reconstruct="sublayer", **fields),
    "projection": lambda **fields: Besa(reconstruct="projection", **fields),
    "4 bits": lambda **fields: Besa(quantize=besa.Quantize(bits=4), **fields),
}


@pytest.mark.parametrize("kind", [None, "closed", "block"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_ignored_stays_as_it_is_and_counts_as_kept(tiny_llama, windows, name, kind):
    before, ignore = copy.deepcopy(tiny_llama.state_dict()), ["1", "re:.*[02].*self_attn", "0.mlp.down_proj"]
    method = METHODS[name](ignore=ignore, sparsity=0.15 if name in ("model", "span") else 0.4)
    if method.quantize and kind:
        pytest.skip("quantized weights are not reconstructed")
    reconstruct = Reconstruct(kind) if kind else None
    report = besa.prune(tiny_llama, windows[:2], method, progress=False, reconstruct=reconstruct)
    left = pruned_projections(tiny_llama, ignore)
    assert len(left) == 5 and len(report.rows) == len(report.keep_masks) == 21
    for row in report.rows:
        key = row["block"], row["projection"]
        if key in left:
            assert 0 < row["sparsity"] < 1 and row["note"] != "ignored"
        else:
            assert (row["zeros"], row["projection_error"], row["note"]) == (0, 0.0, "ignored")
            assert report.keep_masks[key].all()
            weight = f"model.layers.{key[0]}.{key[1]}.weight"
            assert torch.equal(tiny_llama.state_dict()[weight], before[weight])


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("pattern", [None, "N:8"])
def test_an_exact_budget_counts_what_is_ignored_and_the_others_make_up_for_it(tiny_llama, windows, scope, pattern):
    method = Besa(sparsity=0.55, budget="exact", scope=scope, pattern=pattern, ignore=["re:.*o_proj", "0.mlp.up_proj"])
    frame = besa.prune(tiny_llama, windows, method, progress=False).to_frame()
    sizes = frame["rows"] * frame["columns"]
    for block in range(3) if scope == "block" else ["all"]:
        chosen = (frame["block"] == block) | (block == "all")
        assert frame["zeros"][chosen].sum() == round(0.55 * sizes[chosen].sum())


def test_a_model_budget_is_met_by_the_blocks_that_are_not_ignored(tiny_llama, windows):
    method = Besa(sparsity=0.4, budget="exact", scope="model", ignore=["1"])
    frame = besa.prune(tiny_llama, windows, method, progress=False).to_frame()
    assert frame["zeros"].sum() == round(0.4 * (frame["rows"] * frame["columns"]).sum())
    assert not frame["zeros"][frame["block"] == 1].any()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"ignore": ["re:.*mlp"]},
            r"block 0: ignore keeps 71.4% of its weights, so that it stays below sparsity 0.2857",
        ),
        ({"ignore": ["2.mlp"], "pattern": "N:8"}, "block 2: ignore keeps 71.4%"),
        ({"ignore": ["0", "1"], "scope": "model"}, "the model: ignore keeps 66.7% .*0.5 cannot be reached"),
        ({"ignore": ["0.mlp"], "sparsities": (0.3, 0.5, 0.5)}, "block 0: .* 0.3 cannot be reached"),
        ({"ignore": ["2.mlp", "2.self_attn.q_proj"], "reconstruct": 2, "sparsity": 0.9}, "block 2: ignore keeps"),
    ],
)
def test_a_budget_that_ignored_parts_make_impossible_is_refused_before_any_work(tiny_llama, windows, fields, message):
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ValueError, match=message):
        besa.prune(tiny_llama, windows, Besa(**{"budget": "exact", **fields}), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sparsity=st.floats(0.01, 0.99),
    ignore=st.lists(st.sampled_from([f"{i}.self_attn.{n}" for i in range(3) for n in NAMES[:4]]), max_size=4),
    pattern=st.sampled_from([None, "N:4", "N:8"]),
    row_group=st.sampled_from(["row", "layer", 4]),
)
def test_any_target_any_ignored_part_any_pattern(tiny_llama, windows, sparsity, ignore, pattern, row_group):
    model = copy.deepcopy(tiny_llama)
    method = Besa(sparsity=sparsity, budget="exact", ignore=ignore, pattern=pattern, row_group=row_group)
    sizes = method._sizes(model)
    if any(sparsity * whole >= some for some, whole in sizes):
        with pytest.raises(ValueError, match="cannot be reached"):
            besa.prune(model, windows, method, progress=False)
        return
    frame = besa.prune(model, windows[:2], method, progress=False).to_frame()
    zeros = frame.groupby("block")["zeros"].sum()
    assert zeros.tolist() == [round(sparsity * whole) for _, whole in sizes]


@pytest.mark.parametrize("name", ["wanda", "exact", "span", "4 bits"])
def test_a_checkpoint_is_the_same_bytes_and_continues(tiny_llama, windows, tmp_path, name):
    source, out = save(tiny_llama, tmp_path / "source"), tmp_path / "out"
    ignore = ("1.self_attn.q_proj", "re:.*up_proj") + ("2",) * (name == "4 bits")  # a block without codes
    method, options = METHODS[name](ignore=ignore), {"device": "cpu", "progress": False}
    first = besa.prune_checkpoint(source, out, windows, method, **options)
    expected = besa.prune(tiny_llama, windows, method, progress=False)
    assert_same(load(out), tiny_llama)
    (out / "besa" / "block-00001.json").unlink()
    report = besa.prune_checkpoint(source, out, windows, method, **options)
    assert_same(load(out), tiny_llama)
    assert report.sparsity == first.sparsity == expected.sparsity
    assert all(torch.equal(report.keep_masks[key], mask) for key, mask in expected.keep_masks.items())
    assert {index for index, _ in report.quantized} == ({0, 1} if name == "4 bits" else set())
    with pytest.raises(ValueError, match=r"another method \(ignore\)"):
        other = METHODS[name](ignore=("1.self_attn.q_proj",))
        besa.prune_checkpoint(source, out, windows, other, **options)


@pytest.mark.parametrize("kind", ["low-rank", "full"])
def test_what_is_ignored_is_fine_tuned_as_a_whole(tiny_llama, windows, kind):
    report = besa.prune(tiny_llama, windows, besa.Wanda(ignore=["1", "0.mlp.up_proj"]), progress=False)
    before = copy.deepcopy(tiny_llama.state_dict())
    result = besa.finetune(tiny_llama, windows.repeat(2, 1), report, besa.FineTune(kind, lr=0.01), progress=False)
    assert result.best_step > 0 and len(report.keep_masks) == 21
    for (index, name), keep_mask in report.keep_masks.items():
        key = f"model.layers.{index}.{name}.weight"
        moved = tiny_llama.state_dict()[key] != before[key]
        assert not moved[~keep_mask].any() and moved[keep_mask].float().mean() > 0.95, key


@pytest.mark.parametrize("name", ["wanda", "4 bits"])
def test_what_is_ignored_stays_dense_where_the_others_are_packed(tiny_llama, windows, tmp_path, name):
    source, out, ignore = save(tiny_llama, tmp_path / "source"), tmp_path / "out", ("1", "0.mlp.up_proj")
    method, dense = METHODS[name](ignore=ignore), copy.deepcopy(tiny_llama)
    others = {f"model.layers.{index}.{name}" for index, name in pruned_projections(tiny_llama, ignore)}
    besa.prune_checkpoint(source, out, windows, method, device="cpu", progress=False)
    pack_checkpoint(out, tmp_path / "packed")
    besa.pack(tiny_llama, besa.prune(tiny_llama, windows, method, progress=False))
    for model in (tiny_llama, load(tmp_path / "packed")):
        assert packed_projections(model).keys() == others and len(others) == 13
        assert all((module.scale is None) == (name == "wanda") for module in packed_projections(model).values())
        besa.unpack(model)
        assert_same(model, load(out))
        for key in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"):
            assert torch.equal(model.get_submodule(key).weight, dense.get_submodule(key).weight)
