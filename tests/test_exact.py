"""Exact budgets, learned scores and N:M patterns."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import besa
from besa.beyond.exact import LearnedWeight, around_threshold, meet_budget, whole_counts
from besa.decoder import find_blocks, projections


def assert_budgets(report, sparsity):
    """The zeros of every block are the target, to the weight; ignored projections have none."""
    assert not report.to_frame().query("note == 'ignored'")["zeros"].any()
    for _, rows in report.to_frame().query("note != 'ignored'").groupby("block"):
        assert rows["zeros"].sum() == round(sparsity * (rows["rows"] * rows["columns"]).sum())


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.376, 0.5, 0.77, 0.99])
def test_every_block_meets_any_target_to_the_weight(tiny_llama, windows, sparsity, update):
    report = besa.prune(tiny_llama, windows[:2], besa.Exact(sparsity=sparsity, update=update), progress=False)
    assert_budgets(report, sparsity)
    for (index, name), keep_mask in report.keep_masks.items():
        assert torch.equal(projections(find_blocks(tiny_llama)[index])[name].weight != 0, keep_mask)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("fields", [{}, {"batch_size": 3}])
def test_budgets_hold_for_every_option(tiny_llama, windows, fields, update):
    report = besa.prune(tiny_llama, windows, besa.Exact(sparsity=0.7, update=update, **fields), progress=False)
    assert_budgets(report, 0.7)


@pytest.mark.parametrize("update", [True, False])
def test_the_budget_is_of_the_projections_that_are_not_ignored(tiny_llama, windows, update):
    method = besa.Exact(sparsity=0.55, ignore=("1", ".*o_proj", "0.mlp.up_proj"), update=update)
    report = besa.prune(tiny_llama, windows[:2], method, progress=False)
    assert_budgets(report, 0.55)


def test_learning_lowers_the_error_of_uniform_rows(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Exact(epochs=20), progress=False)
    errors = [step["reconstruction_error"] for step in report.steps if step["block"] == 0]
    assert sum(errors[-6:]) < 0.99 * sum(errors[:6])
    assert report.to_frame()["sparsity"].std() > 0.005


@pytest.mark.parametrize("fields", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"batch_size": 2}])
def test_updated_weights_lose_less_than_the_mask_alone(tiny_llama, windows, fields):
    before = copy.deepcopy(tiny_llama)
    mask = besa.prune(copy.deepcopy(tiny_llama), windows, besa.Exact(epochs=4, **fields), progress=False)
    both = besa.prune(tiny_llama, windows, besa.Exact(epochs=4, update=True, **fields), progress=False)
    assert both.sparsity == mask.sparsity
    for masked, updated in zip(mask.rows, both.rows):
        assert updated["block_error"] < masked["block_error"]
    for (index, name), keep_mask in both.keep_masks.items():
        new, old = (projections(find_blocks(model)[index])[name].weight for model in (tiny_llama, before))
        assert not new[~keep_mask].any() and (new != old)[keep_mask].float().mean() > 0.9


def test_weights_are_trained_twice_as_long_with_the_final_mask(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Exact(epochs=2, update=True), progress=False)
    assert len(report.steps) == 3 * (1 + 2) * 2 * 6  # blocks, while the mask changes and after, epochs, windows


@pytest.mark.parametrize("fields, factors", [({}, [1, 3]), ({"pattern": "2:4"}, [3])])
def test_step_sizes_fall_to_0_as_a_cosine(tiny_llama, windows, monkeypatch, fields, factors):
    taken, adam_step = [], torch.optim.Adam.step

    def step(self, *rest):
        taken.append([group["lr"] for group in self.param_groups])
        return adam_step(self, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    besa.prune(tiny_llama, windows, besa.Exact(epochs=2, batch_size=2, **fields), progress=False)
    assert len(taken) == 3 * 6  # blocks, steps of each
    for number, rates in enumerate(taken):
        cosine = 0.01 * (1 + math.cos(math.pi * (number % 6) / 6)) / 2
        assert sorted(rates) == pytest.approx([factor * cosine for factor in factors])


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_shifted_sparsities_have_the_target_as_weighted_mean(sparsity):
    theta = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(1)).float()
    alpha = meet_budget(theta, sizes, sparsity)
    assert ((alpha * sizes).sum() / sizes.sum()).item() == pytest.approx(sparsity, abs=1e-5)
    assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-6
    (gradient,) = torch.autograd.grad((alpha * sizes).sum(), theta)  # theta cannot change the budget
    assert gradient.abs().max() < 1e-3 * sizes.max()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 120), st.integers(0, 100)), min_size=1, max_size=9), st.floats(0, 1))
def test_whole_counts_add_up_within_their_limits(rows, share):
    limits = torch.tensor([limit for _, limit in rows])
    total = round(share * int(limits.sum()))
    counts = whole_counts(torch.tensor([wanted for wanted, _ in rows]), limits, total)
    assert counts.sum() == total and (counts >= 0).all() and (counts <= limits).all()


def test_whole_counts_round_the_largest_remainders_up():
    wanted, limits = torch.tensor([2.2, 3.9, 1.5, 0.4]), torch.tensor([9, 9, 9, 9])
    assert whole_counts(wanted, limits, 8).tolist() == [2, 4, 2, 0]


def test_gradients_of_scores_and_sparsities_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    weight, ranked, toward = torch.randn(3, 6, 40, generator=generator)
    counts = torch.tensor([20, 1, 39, 40, 0, 17])
    keep, near = around_threshold(ranked, counts)
    scores, alpha = torch.zeros(6, 40, requires_grad=True), torch.full((6,), 0.5, requires_grad=True)
    weight.requires_grad_()
    masked = LearnedWeight.apply(scores, alpha, weight, keep, near, torch.empty_like(weight))
    (masked * toward).sum().backward()
    torch.testing.assert_close(weight.grad, toward * keep)
    to_scores, to_alpha = torch.zeros(6, 40), torch.zeros(6)
    for row, count in enumerate(counts.tolist()):
        order = ranked[row].argsort().tolist()
        assert keep[row].nonzero().flatten().tolist() == sorted(order[count:])
        to_scores[row] += toward[row] * weight[row].detach()
        band = order[max(count - 2, 0) : count + 2]  # 5 % of 40 on either side
        to_alpha[row] -= 40 * (toward * weight.detach())[row, band].mean()
    torch.testing.assert_close(scores.grad, to_scores)
    torch.testing.assert_close(alpha.grad, to_alpha)


@pytest.mark.parametrize("fields", [{}, {"batch_size": 2}])
@pytest.mark.parametrize("pattern", ["2:4", "3:16"])
def test_learned_patterns_keep_n_of_every_m(tiny_llama, windows, pattern, fields):
    n, m = map(int, pattern.split(":"))
    method = besa.Exact(pattern=pattern, **fields)
    report = besa.prune(tiny_llama, windows[:2], method, progress=False)
    assert report.sparsity == method.sparsity == 1 - n / m
    for keep_mask in report.keep_masks.values():
        assert (keep_mask.view(-1, m).sum(1) == n).all()


def test_learned_patterns_lose_less_than_wandas(tiny_llama, windows):
    method = besa.Exact(pattern="2:4", epochs=4)
    learned = besa.prune(copy.deepcopy(tiny_llama), windows, method, progress=False)
    uniform = besa.prune(tiny_llama, windows, besa.Wanda(pattern="2:4"), progress=False)
    assert learned.rows[0]["block_error"] < 0.9 * uniform.rows[0]["block_error"]
