"""N:M patterns for every method: verified group by group, learned by BESA, mixed under a budget, in saved files too."""

import copy
import dataclasses
import json

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from test_shards import assert_same, load, save

import besa
from besa.baselines import named_method
from besa.besa import Besa
from besa.decoder import find_blocks, projections
from besa.importance import InputStatistics, inverse_cholesky
from besa.masks import parse_pattern, places
from besa.scores import Scored, stepped_counts

METHODS = {
    "magnitude": besa.Magnitude,
    "wanda": besa.Wanda,
    "sparsegpt": besa.SparseGPT,
    "besa": Besa,
    "besa, a score per column": lambda **fields: Besa(row_group="layer", **fields),
    "besa, exact budget": lambda **fields: Besa(budget="exact", **fields),
    "besa, two blocks together": lambda **fields: Besa(reconstruct=2, **fields),
    "besa, each projection": lambda **fields: Besa(reconstruct="projection", importance="sparsegpt", **fields),
    "besa in 4 bits": lambda **fields: Besa(quantize=besa.Quantize(bits=4), **fields),
    "wanda in 4 bits": lambda **fields: besa.Wanda(quantize=besa.Quantize(bits=4), **fields),
}


def kept_of_each(keep_mask, m):
    """How many each group of m keeps, (rows, groups)."""
    return keep_mask.view(len(keep_mask), -1, m).sum(2)


@pytest.mark.parametrize("pattern", ["2:4", "3:16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_n_of_every_m(tiny_llama, windows, name, pattern):
    n, m = map(int, pattern.split(":"))
    method = METHODS[name](pattern=pattern)
    report = besa.prune(tiny_llama, windows[:2], method, progress=False)
    assert report.sparsity == method.sparsity == 1 - n / m and len(report.keep_masks) == 21
    for (index, projection), keep_mask in report.keep_masks.items():
        assert (kept_of_each(keep_mask, m) == n).all()
        weight = projections(find_blocks(tiny_llama)[index])[projection].weight
        assert not weight[~keep_mask].any()


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "besa", "mixed"])
def test_the_saved_file_holds_the_pattern_and_the_run_continues(tiny_llama, windows, tmp_path, name):
    source, out = save(tiny_llama, tmp_path / "source"), tmp_path / "out"
    method = Besa(pattern="N:8", budget="exact") if name == "mixed" else METHODS[name](pattern="2:4", ignore=["1.mlp"])
    options = {"device": "cpu", "progress": False}
    report = besa.prune_checkpoint(source, out, windows, method, **options)
    (out / "besa" / "block-00002.json").unlink()
    again = besa.prune_checkpoint(source, out, windows, method, **options)
    besa.prune(tiny_llama, windows, method, progress=False)
    assert_same(load(out), tiny_llama)
    assert again.rows[0] == report.rows[0] and again.sparsity == report.sparsity
    for path in out.glob("model-block-*.safetensors"):
        for key, weight in safetensors.torch.load_file(path).items():
            if key.endswith("_proj.weight"):
                most = kept_of_each(weight != 0, 8 if name == "mixed" else 4).amax(1)
                assert (most == (4 if "layers.1.mlp" in key else 2)).all() or name == "mixed"
    other = Besa(pattern="N:4", budget="exact") if name == "mixed" else METHODS[name](pattern="1:4", ignore=["1.mlp"])
    with pytest.raises(ValueError, match="another method"):
        besa.prune_checkpoint(source, out, windows, other, **options)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 9), groups=st.integers(1, 4), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_places_are_those_of_a_stable_sort_of_each_group(m, groups, rows, seed):
    scores = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    found = places(scores, m)
    for row in range(rows):
        for start in range(0, groups * m, m):
            group = scores[row, start : start + m].tolist()
            expected = [sum((group[k], k) < (group[j], j) for k in range(m)) for j in range(m)]
            assert found[row, start : start + m].tolist() == expected


def test_wanda_and_magnitude_keep_the_best_of_each_group(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama).model.layers[0].mlp.down_proj.weight
    besa.prune(tiny_llama, windows, besa.Magnitude(pattern="3:5", ignore=["re:.*self_attn", "re:.*(up|gate)_proj"]))
    kept = (tiny_llama.model.layers[0].mlp.down_proj.weight != 0).view(-1, 5)
    for group, of in zip(dense.abs().view(-1, 5), kept, strict=True):
        assert group[of].min() > group[~of].max()


def released_sparsegpt(weight, hessian, n, m, block_columns):
    """As the released code prunes N:M: the mask of a group from the weights as they are when its columns begin."""
    w, upper = weight.clone(), inverse_cholesky(hessian).upper
    mask = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], block_columns):
        stop = min(start + block_columns, w.shape[1])
        errors = torch.zeros(len(w), stop - start)
        for j in range(start, stop):
            if j % m == 0:
                scores = w[:, j : j + m] ** 2 / upper.diag()[j : j + m] ** 2
                mask.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            new = w[:, j].masked_fill(mask[:, j], 0)
            errors[:, j - start] = (w[:, j] - new) / upper[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
            w[:, j] = new
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, ~mask


@pytest.mark.parametrize("block_columns", [4, 16, 18, 128])
def test_sparsegpt_chooses_each_group_from_the_weights_as_corrected_by_then(block_columns):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 48) @ torch.randn(48, 48), torch.randn(7, 48)
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    method = besa.SparseGPT(pattern="2:4", block_columns=block_columns)
    ours, kept, _ = method._prune_projection(weight, statistics, 0.5)
    expected, keep_mask = released_sparsegpt(weight, statistics.hessian, 2, 4, block_columns // 4 * 4)
    assert torch.equal(kept, keep_mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_besa_learns_which_weights_of_a_group_stay(tiny_llama, windows, pattern):
    uniform = besa.prune(copy.deepcopy(tiny_llama), windows, besa.Wanda(pattern=pattern), progress=False)
    learned = besa.prune(tiny_llama, windows, Besa(pattern=pattern, epochs=4), progress=False)
    first = learned.steps[0]["reconstruction_error"], learned.steps[4 * 6 - 1]["reconstruction_error"]
    assert first[1] < 0.9 * first[0]
    assert learned.rows[0]["block_error"] < 0.9 * uniform.rows[0]["block_error"]
    twin = besa.prune(copy.deepcopy(tiny_llama), windows, Besa(pattern=pattern, row_group="layer"), progress=False)
    assert twin.sparsity == learned.sparsity


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("row_group", ["row", 8, "layer"])
@pytest.mark.parametrize("sparsity, pattern", [(0.37, "N:8"), (0.9, "N:16"), (0.01, "N:4")])
def test_an_open_n_spreads_over_rows_and_meets_the_budget(tiny_llama, windows, sparsity, pattern, row_group, scope):
    m = int(pattern[2:])
    method = Besa(sparsity=sparsity, pattern=pattern, budget="exact", row_group=row_group, scope=scope)
    report = besa.prune(tiny_llama, windows[:2], method, progress=False)
    frame = report.to_frame()
    sizes = frame["rows"] * frame["columns"]
    if scope == "model":
        assert frame["zeros"].sum() == round(sparsity * sizes.sum())
    else:
        for block, rows in frame.groupby("block"):
            assert rows["zeros"].sum() == round(sparsity * sizes[frame["block"] == block].sum())
    partial = dict.fromkeys(range(3), 0)
    for (index, _), keep_mask in report.keep_masks.items():
        kept = kept_of_each(keep_mask, m)
        spread = kept.amax(1) - kept.amin(1)
        assert spread.max() <= 1
        partial[index] += int(spread.sum())
    assert max(partial.values()) <= 1  # the one row of a block that meets its budget to the weight


@settings(max_examples=100, deadline=None)
@example(rows=[(1, 1.0), (1, 0.25)], m=3, off=1)
@example(rows=[(1, 0.125)], m=5, off=1)
@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=12),
    m=st.integers(2, 8),
    off=st.integers(-1, 1),
)
def test_stepped_counts_add_up_and_one_at_most_is_no_multiple(rows, m, off):
    steps = torch.tensor([step for step, _ in rows])
    wanted = torch.tensor([share * step * m for step, share in rows])
    total = min(max(round(float(wanted.sum())) + off, 0), m * int(steps.sum()))
    counts = stepped_counts(wanted, steps, m, total)
    assert counts.sum() == total and (counts >= 0).all() and (counts <= m * steps).all()
    assert int((counts % steps != 0).sum()) <= 1


def test_scores_and_sparsities_get_the_gradient_of_the_mask():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(6, 32, generator=generator), torch.rand(6, 32, generator=generator)
    toward, scores = torch.randn(6, 32, generator=generator), torch.zeros(3, 32, requires_grad=True)
    patterned, alpha = Scored.create(weight, importance, 8), torch.tensor([0.5, 0.25, 0.75], requires_grad=True)
    counts = torch.tensor([16, 16, 8, 8, 24, 24])
    masked = patterned(scores, counts, alpha)
    pruned = (counts // 4)[:, None]
    place = places(importance, 8)
    assert torch.equal(masked, weight * (place >= pruned))
    (masked * toward).sum().backward()
    gain = toward * weight
    torch.testing.assert_close(scores.grad, gain[0::2] + gain[1::2])
    near = ((place == pruned) | (place == pruned - 1)).float()
    each = -32 * (gain * near).sum(1) / near.sum(1)
    torch.testing.assert_close(alpha.grad, each[0::2] + each[1::2])


def test_unstructured_scores_rank_a_whole_row_and_meet_the_counts_exactly():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(6, 40, generator=generator), torch.rand(6, 40, generator=generator)
    importance[:, 3:9] = importance[:, 3:4]  # equals: the first goes first
    toward, scores = torch.randn(6, 40, generator=generator), torch.randn(6, 40, generator=generator) / 10
    scores[:, 3:9] = 0
    scores.requires_grad_()
    scored, alpha = Scored.create(weight, importance, None), torch.full((6,), 0.5, requires_grad=True)
    counts = torch.tensor([20, 1, 39, 40, 0, 17])
    keep_mask = scored.keep_mask(scores, counts)
    assert ((~keep_mask).sum(1) == counts).all()
    ranked = (importance.log() + scores).detach()
    order = ranked.sort(dim=1, stable=True).indices.tolist()
    assert [{j for j, kept in enumerate(row) if not kept} for row in keep_mask.tolist()] == [
        set(row[:count]) for row, count in zip(order, counts.tolist(), strict=True)
    ]
    masked = scored(scores, counts, alpha)
    assert ((masked != 0) >= keep_mask).all()  # while it is learned, equals at the threshold stay together
    (masked * toward).sum().backward()
    torch.testing.assert_close(scores.grad, toward * weight)
    for row, count in enumerate(counts.tolist()):
        near = order[row][max(count - 2, 0) : count + 2]  # 5 % of 40 on either side
        expected = -40 * (toward * weight)[row, near].mean()
        if not set(near) & set(range(3, 9)):
            torch.testing.assert_close(alpha.grad[row], expected)


def test_a_learned_choice_loses_less_than_learned_counts(tiny_llama, windows):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    counts, choice = (
        besa.prune(copy.deepcopy(tiny_llama), windows, Besa(budget="exact", scores=scores, epochs=8), progress=False)
        for scores in (False, True)
    )
    assert choice.sparsity == pytest.approx(counts.sparsity, abs=1e-9)
    assert choice.rows[0]["block_error"] < counts.rows[0]["block_error"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Besa(scores=True), "scores True with budget 'penalty' and pattern None"),
        (lambda: Besa(scores=False, pattern="2:4"), "scores False with budget 'penalty' and pattern '2:4'"),
        (lambda: besa.Wanda(pattern="4:2"), "pattern '4:2' is not 'N:M' with 0 < N < M <= 128"),
        (lambda: besa.Wanda(pattern="2/4"), "pattern '2/4' is not 'N:M'"),
        (lambda: besa.Wanda(pattern="0:4"), "pattern '0:4' is not 'N:M'"),
        (lambda: besa.Wanda(pattern="1:4", sparsity=0.5), "sparsity 0.5 contradicts pattern '1:4', which prunes 3/4"),
        (lambda: named_method("besa-row-wise", 0.6, pattern="2:4"), "sparsity 0.6 contradicts pattern '2:4'"),
        (lambda: besa.Wanda(pattern="2:4", sparsities=(0.5,)), r"sparsities \(0.5,\) contradicts pattern '2:4'"),
        (lambda: besa.Wanda(pattern="N:8"), r"pattern 'N:8' leaves N to a budget: take besa.Besa\(budget='exact'\)"),
        (lambda: Besa(pattern="N:8"), "pattern 'N:8' leaves N to a budget"),
        (lambda: Besa(pattern="2:4", budget="exact", scope="model"), "scope 'model' wants .* no fixed pattern"),
    ],
)
def test_what_is_no_pattern_or_contradicts_it_is_refused(no_type_checks, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [besa.Magnitude, besa.Wanda, besa.SparseGPT, Besa])
def test_a_pattern_that_does_not_divide_the_columns_is_refused_by_name(tiny_llama, windows, method):
    message = r"block 0, self_attn.q_proj: 32 columns do not divide into the groups of 5 of pattern '3:5'"
    with pytest.raises(ValueError, match=message):
        besa.prune(tiny_llama, windows, method(pattern="3:5"), progress=False)
    besa.prune(tiny_llama, windows, method(pattern="3:5", ignore=["re:.*(attn|up|gate)"]), progress=False)


def test_the_command_takes_patterns_and_ignored_parts():
    from besa.__main__ import _method

    asked = {"sparsity": None, "pattern": "1:4", "ignore": ["0", "re:.*down_proj"]}
    assert _method("besa", None, None, **asked) == Besa(pattern="1:4", ignore=("0", "re:.*down_proj"))
    assert _method("magnitude", None, None, sparsity=None, pattern=None, ignore=None) == besa.Magnitude()
    with pytest.raises(ValueError, match=r"sparsity 0.5 contradicts pattern '1:4'"):
        _method("wanda", None, None, sparsity=0.5, pattern="1:4")


def test_a_sparsity_that_nobody_gave_follows_the_pattern_and_configurations_stay_as_they_were():
    assert besa.Wanda(pattern="1:4").sparsity == besa.Wanda(pattern="1:4", sparsity=0.75).sparsity == 0.75
    assert named_method("besa-row-wise", pattern="1:4").sparsity == 0.75
    for method in (besa.Wanda(pattern="1:4"), Besa(pattern="1:4")):
        assert dataclasses.replace(method, pattern=None).sparsity == 0.5
        assert dataclasses.replace(method, pattern="2:4").sparsity == 0.5
    assert dataclasses.replace(Besa(pattern="1:4"), pattern="N:8", budget="exact").sparsity == 0.5
    assert besa.Wanda() == besa.Wanda(sparsity=0.5) and repr(besa.Wanda()) == repr(besa.Wanda(sparsity=0.5))
    assert besa.Wanda().config() == {"method": "wanda", "sparsity": 0.5, "sparsities": None, "quantize": None}
    config = besa.Wanda(pattern="2:4", ignore=["3"]).config()
    assert (config["pattern"], config["ignore"]) == ("2:4", ["3"]) and json.loads(json.dumps(config)) == config
    assert parse_pattern("N:8") == (None, 8) and parse_pattern("2:4") == (2, 4)
