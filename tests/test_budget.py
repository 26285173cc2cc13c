"""Exact budgets: any target, met to the weight, and a gradient that says which rows should give more."""

import copy
import dataclasses
import math

import pytest
import torch

import besa
from besa.allocation import candidate_counts, candidate_rates
from besa.besa import Besa
from besa.budget import Budgeted, meet_budget, whole_counts
from besa.decoder import find_blocks, projections
from besa.sensitivity import block_losses, spread_over_blocks


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.376, 0.5, 0.624, 0.77, 0.99])
def test_a_block_meets_any_target_to_the_weight(tiny_llama, windows, sparsity):
    report = besa.prune(tiny_llama, windows, Besa(sparsity=sparsity, budget="exact"), progress=False)
    frame = report.to_frame()
    for block, rows in frame.groupby("block"):
        assert rows["zeros"].sum() == round(sparsity * (rows["rows"] * rows["columns"]).sum()), block
    for (index, name), keep_mask in report.keep_masks.items():
        weight = projections(find_blocks(tiny_llama)[index])[name].weight
        assert torch.equal(weight != 0, keep_mask)


@pytest.mark.parametrize("fields", [{"row_group": "layer"}, {"row_group": 8}, {"reconstruct": 2}, {"targets": "dense"}])
def test_budgets_hold_for_groups_of_rows_spans_and_dense_targets(tiny_llama, windows, fields):
    report = besa.prune(tiny_llama, windows, Besa(sparsity=0.7, budget="exact", **fields), progress=False)
    frame = report.to_frame()
    total = (frame["rows"] * frame["columns"]).sum()
    assert frame["zeros"].sum() == pytest.approx(0.7 * total, abs=2)  # a rounding for each budget


@pytest.mark.parametrize("fields, factors", [({"scores": False}, {1.0}), ({}, {1.0, 3.0}), ({"pattern": "2:4"}, {3.0})])
def test_step_sizes_fall_to_0_as_a_cosine_within_the_steps_there_are(tiny_llama, windows, monkeypatch, fields, factors):
    taken, step = [], torch.optim.Adam.step
    keep = lambda self, *rest: taken.append([group["lr"] for group in self.param_groups]) or step(self, *rest)
    monkeypatch.setattr(torch.optim.Adam, "step", keep)
    budget = {} if "pattern" in fields else {"budget": "exact"}
    besa.prune(tiny_llama, windows, besa.Besa(**budget, **fields, epochs=2, batch_size=2, lr=0.2), progress=False)
    n_steps = 2 * len(windows) // 2
    assert len(taken) == 3 * n_steps  # of three blocks
    for number, rates in enumerate(taken):
        cosine = 0.2 * (1 + math.cos(math.pi * (number % n_steps) / n_steps)) / 2
        assert sorted(rates) == pytest.approx(sorted(factor * cosine for factor in factors))


def test_an_exact_budget_learned_lowers_the_error_of_a_uniform_one(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, Besa(budget="exact", epochs=10, lr=0.02), progress=False)
    steps = [step["reconstruction_error"] for step in report.steps if step["block"] == 0]
    assert sum(steps[-6:]) < 0.99 * sum(steps[:6])
    assert report.to_frame()["sparsity"].std() > 0.005


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_shifted_sparsities_have_the_target_as_their_weighted_mean(sparsity):
    theta = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(1)).float()
    alpha = meet_budget(theta, sizes, sparsity)
    assert ((alpha * sizes).sum() / sizes.sum()).item() == pytest.approx(sparsity, abs=1e-5)
    assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-6
    (gradient,) = torch.autograd.grad((alpha * sizes).sum(), theta)  # nothing that is learned changes the budget
    assert gradient.abs().max() < 1e-3 * sizes.max()


@pytest.mark.parametrize("total", [0, 1, 17, 149, 150])
def test_whole_counts_add_up_and_stay_within_their_limits(total):
    limits = torch.tensor([10, 0, 40, 100])
    wanted = total * torch.tensor([0.5, 0.1, 0.25, 0.15])
    counts = whole_counts(wanted, limits, total)
    assert counts.sum() == total and (counts >= 0).all() and (counts <= limits).all()
    with pytest.raises(ValueError, match="151 weights cannot be pruned of 150"):
        whole_counts(wanted, limits, 151)


def test_the_gradient_of_a_sparsity_is_the_mean_of_the_weights_next_to_the_threshold():
    generator = torch.Generator().manual_seed(0)
    weight, scores = torch.randn(6, 400, generator=generator), torch.rand(6, 400, generator=generator)
    toward = torch.randn(6, 400, generator=generator)
    budgeted = Budgeted.create(weight, scores)
    alpha = torch.tensor([0.5, 0.02, 0.98], requires_grad=True)  # groups of two rows
    ((budgeted(alpha) * toward).sum()).backward()
    ranks = scores.argsort(1).argsort(1)
    edges = candidate_counts(candidate_rates(101), 400).flip(0)  # of 0 %, 1 %, ... of the 400 ranks
    for group, (low, high) in enumerate([(45, 55), (0, 7), (93, 100)]):
        rows = slice(2 * group, 2 * group + 2)
        band = (ranks[rows] >= edges[low]) & (ranks[rows] < edges[high])
        expected = -(toward * weight)[rows][band].sum() / ((high - low) / 100)
        assert alpha.grad[group].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_same_run_twice_learns_the_same_bits(tiny_llama, windows):
    twin = copy.deepcopy(tiny_llama)
    for model in (tiny_llama, twin):
        besa.prune(model, windows, Besa(sparsity=0.8, budget="exact"), progress=False)
    for one, two in zip(tiny_llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"budget": "exact", "sparsity": 0.0}, r"sparsity 0.0 is outside \(0.000, 1.000\)"),
        ({"scope": "model"}, "scope 'model' wants budget 'exact'"),
        ({"budget": "exact", "sparsities": (0.5, 0.0)}, r"sparsity 0.0 is outside \(0.000, 1.000\)"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Besa(**fields)


def test_a_models_budget_is_met_to_the_weight_and_its_blocks_share_it(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.down_proj.weight *= 100  # the model leans on this block
        tiny_llama.lm_head.weight *= 10
    windows = tiny_llama.generate(windows[:, :8], max_new_tokens=16, do_sample=False)  # what it expects itself
    report = besa.prune(tiny_llama, windows, Besa(sparsity=0.6, budget="exact", scope="model"), progress=False)
    frame = report.to_frame()
    assert frame["zeros"].sum() == round(0.6 * (frame["rows"] * frame["columns"]).sum())
    zeros = frame.groupby("block")["zeros"].sum()
    assert zeros[0] < zeros[1] and zeros[0] < zeros[2]


def test_every_method_takes_a_sparsity_for_each_block(tiny_llama, windows):
    for method in (besa.Wanda, besa.Magnitude, besa.SparseGPT):
        report = besa.prune(copy.deepcopy(tiny_llama), windows, method(sparsities=(0.25, 0.5, 0.75)), progress=False)
        found = report.to_frame().groupby("block")["sparsity"].mean()
        assert found.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    with pytest.raises(ValueError, match="2 sparsities are given for 3 blocks"):
        besa.prune(tiny_llama, windows, besa.Wanda(sparsities=(0.5, 0.5)))


def test_what_pruning_one_block_adds_is_what_the_model_says(tiny_llama, windows):
    levels = (0.3, 0.6)
    found = block_losses(tiny_llama, windows[:2], levels, progress=False)
    before = math.log(besa.perplexity(tiny_llama, windows[:2].flatten(), 24, progress=False))
    with torch.no_grad():
        dense = copy.deepcopy(tiny_llama)
        besa.prune(tiny_llama, windows[:2], besa.Wanda(sparsity=0.6), progress=False)
        dense.model.layers[0] = tiny_llama.model.layers[0]  # block 0 saw dense inputs
    after = math.log(besa.perplexity(dense, windows[:2].flatten(), 24, progress=False))
    assert found.shape == (3, 2)
    assert float(found[0, 1]) == pytest.approx(after - before, abs=1e-5)


def test_what_is_ignored_adds_nothing_to_the_loss_of_its_block(tiny_llama, windows):
    levels = (0.3, 0.6)
    whole = block_losses(tiny_llama, windows[:2], levels, progress=False)
    some = block_losses(tiny_llama, windows[:2], levels, progress=False, ignore=("1", "re:.*layers.0.mlp"))
    assert torch.equal(some[2], whole[2]) and some[1].abs().max() < 1e-6 < (some[0] - whole[0]).abs().min()


def test_a_model_that_overflows_shares_no_budget(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(3e38)
    with pytest.raises(ValueError, match=r"the loss with block 0 pruned is not finite; look for NaN"):
        besa.prune(tiny_llama, windows, besa.Besa(budget="exact", scope="model"), progress=False)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_blocks_that_cost_more_keep_more(sparsity):
    losses = torch.tensor([[0.001, 0.004], [0.1, 0.4], [0.01, 0.04]])
    sizes = [1000, 1000, 2000]
    spread = spread_over_blocks(losses, (sparsity - 0.1, sparsity + 0.1), sizes, sparsity)
    assert spread[0] > spread[2] > spread[1]
    assert sum(round(s * n) for s, n in zip(spread, sizes, strict=True)) == round(sparsity * 4000)
    assert max(abs(s - sparsity) for s in spread) < 0.101


def test_what_nobody_gave_follows_the_budget_through_replace():
    exact, penalty = besa.Besa(budget="exact"), besa.Besa()
    assert dataclasses.replace(penalty, budget="exact").config() == exact.config() != penalty.config()
    assert dataclasses.replace(exact, budget="penalty").config() == penalty.config()
    assert exact.config()["scores"] and "scores" not in penalty.config()
    given = dataclasses.replace(besa.Besa(targets="pruned"), budget="exact", scores=False)
    assert given.targets == "pruned" and "scores" not in dataclasses.replace(given, sparsity=0.6).config()
