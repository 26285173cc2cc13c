"""Budgets across blocks: what pruning a block alone costs, and how it is shared out."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import besa
from besa.beyond.budgets import divergences, share_out
from besa.decoder import find_blocks, projections
from besa.importance import collect_statistics, wanda
from besa.masks import keep_largest


@torch.no_grad()
def test_divergences_against_whole_models_with_one_pruned_block(tiny_llama, windows):
    table = divergences(tiny_llama, windows, (0.3, 0.7))
    dense = tiny_llama(windows).logits.log_softmax(-1)
    for index, block in enumerate(find_blocks(tiny_llama)):
        with collect_statistics(projections(block), len(windows), False) as statistics:
            tiny_llama(windows)
        for column, rate in enumerate((0.3, 0.7)):
            model = copy.deepcopy(tiny_llama)
            for name, linear in projections(find_blocks(model)[index]).items():
                linear.weight.data *= keep_largest(wanda(linear.weight, statistics[name]), rate)
            pruned = model(windows).logits.log_softmax(-1)
            expected = F.kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean()
            assert table[index, column] == pytest.approx(float(expected), rel=1e-3)


def test_budgets_have_the_sparsity_and_spare_the_blocks_that_matter(tiny_llama, windows):
    before = copy.deepcopy(tiny_llama.state_dict())
    with torch.no_grad():  # the last block hardly changes anything
        for linear in projections(find_blocks(tiny_llama)[2]).values():
            linear.weight *= 0.01
    budgets = besa.block_budgets(tiny_llama, windows, 0.6, spread=0.2)
    assert np.mean(budgets) == pytest.approx(0.6, abs=1e-6) and budgets[2] == pytest.approx(0.8)
    assert all(0.4 <= budget <= 0.8 for budget in budgets) and before.keys() == tiny_llama.state_dict().keys()
    report = besa.prune(tiny_llama, windows, besa.Exact(sparsities=budgets), progress=False)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)


def test_no_other_budgets_of_the_same_size_cost_less():
    rng = np.random.default_rng(0)
    table = np.exp(rng.normal(size=(5, 1)) + np.array([0.0, 1.0]) * rng.uniform(0.5, 4, size=(5, 1)))
    sizes = np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    budgets = np.array(share_out(table, (0.5, 0.9), sizes, 0.7))
    slope = np.log(table[:, 1] / table[:, 0]) / 0.4

    def cost(rates):
        return float((table[:, 0] * np.exp(slope * (rates - 0.5))).sum())

    assert sizes @ budgets / sizes.sum() == pytest.approx(0.7)
    for _ in range(200):
        step = rng.normal(size=5) * 0.02
        other = np.clip(budgets + step - sizes @ step / sizes.sum(), 0.5, 0.9)
        other += 0.7 - sizes @ other / sizes.sum()  # of the same size again
        if other.min() >= 0.5 and other.max() <= 0.9:
            assert cost(budgets) <= cost(other) + 1e-9
