"""Reconstruction: new values for kept weights in closed form."""

import copy

import pytest
import torch

import besa
from besa.beyond.reconstruct import Reconstruct, closed_form, moments, projections_by_input
from besa.decoder import find_blocks, projections
from besa.masks import keep_largest
from besa.walk import frozen, walk

METHODS = {
    "wanda": besa.Wanda(),
    "magnitude": besa.Magnitude(sparsity=0.7),
    "sparsegpt": besa.SparseGPT(),
    "besa, dense model": besa.Besa(match="model"),
    "exact": besa.Exact(sparsity=0.6),
}


def prune(model, windows, reconstruct, method=None):
    return besa.prune(copy.deepcopy(model), windows, method or besa.Wanda(), progress=False, reconstruct=reconstruct)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    keep_mask = torch.rand(10, 24, generator=generator) < 0.5
    keep_mask[3], keep_mask[4] = True, False
    return weight, x.T @ x, keep_mask


def test_many_iterations_reach_the_least_squares_solution_of_each_row(problem):
    weight, hessian, keep_mask = problem
    damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(24)).double()
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(keep_mask):
        exact[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight[row].double())

    def lost(new):
        return float(((new - weight).double() @ damped * (new - weight)).sum())

    new, _ = closed_form(weight, hessian, hessian, lambda _: keep_mask, iterations=5000)
    torch.testing.assert_close(new.double(), exact, rtol=1e-2, atol=1e-2)
    few, _ = closed_form(weight, hessian, hessian, lambda _: keep_mask)
    assert lost(exact) <= lost(few) < 1.05 * lost(exact) < lost(weight * keep_mask)
    assert not few[~keep_mask].any()
    torch.testing.assert_close(few[3], weight[3], rtol=1e-3, atol=1e-3)  # a full row stays


def test_targets_lie_between_the_own_output_and_that_of_the_dense_model(problem):
    weight, _, keep_mask = problem
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(400, 24, generator=generator)
    x = y + 0.3 * torch.randn(400, 24, generator=generator)
    for a in (0.0, 0.3, 1.0):
        wanted = (y + a * (x - y)).double() @ weight.T.double()
        exact = torch.zeros_like(weight, dtype=torch.float64)
        for row, kept in enumerate(keep_mask):
            exact[row, kept] = torch.linalg.lstsq(y[:, kept].double(), wanted[:, row]).solution
        hessian, toward = y.T @ y, (y + a * (x - y)).T @ y
        new, _ = closed_form(weight, hessian, toward, lambda _: keep_mask, iterations=2000, damping=1e-7)
        torch.testing.assert_close(new.double(), exact, rtol=1e-3, atol=1e-3)


def test_masks_are_chosen_as_in_the_plain_iterations(problem):
    weight, hessian, _ = problem
    damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(24)).double()
    scale = damped.diagonal().sqrt()
    damped = damped / scale / scale[:, None]
    w, u = weight.double() * scale, torch.zeros(10, 24, dtype=torch.float64)
    kept = w.abs() >= w.abs().sort(dim=1).values[:, 12:13]
    z = w * kept
    for iteration in range(20):
        v = (w @ damped + z - u) @ torch.linalg.inv(damped + torch.eye(24))
        if iteration < 15:
            kept = (v + u).abs() >= (v + u).abs().sort(dim=1).values[:, 12:13]
        z, u = (v + u) * kept, (v + u) * ~kept
    new, keep_mask = closed_form(weight, hessian, hessian, lambda scores: keep_largest(scores, 0.5))
    assert torch.equal(keep_mask, kept)
    torch.testing.assert_close(new.double(), z / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [besa.Closed(sparsity=0.6), besa.Closed(pattern="2:4")], ids=["0.6", "2:4"])
def test_closed_meets_its_target_and_loses_less_than_on_wandas_mask(tiny_llama, windows, method):
    same, better = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    wanda = besa.Wanda(pattern=method.pattern, sparsity=None if method.pattern else method.sparsity)
    before = besa.prune(same, windows, wanda, progress=False, reconstruct=Reconstruct())
    after = besa.prune(better, windows, method, progress=False)
    for key, keep_mask in after.keep_masks.items():
        assert torch.equal(keep_mask.sum(1), before.keep_masks[key].sum(1))  # of each row
        assert not projections(find_blocks(better)[key[0]])[key[1]].weight[~keep_mask].any()
    if method.pattern:
        assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in after.keep_masks.values())
    with torch.no_grad():
        dense, *pruned = (model.model(windows).last_hidden_state for model in (tiny_llama, same, better))
    assert (pruned[1] - dense).norm() < (pruned[0] - dense).norm()


def test_moments_against_hooks_on_whole_runs_of_both_models(tiny_llama, windows):
    dense, name, a, inputs = copy.deepcopy(tiny_llama), "mlp.down_proj", 0.25, []
    with frozen(tiny_llama):
        for block in walk(tiny_llama, windows, dense=True, progress=False):
            pruned = besa.Wanda().prune_block(block)
            if block.index == 1:
                assert [len(names) for names in projections_by_input(block)] == [3, 1, 2, 1]
                hessian, toward = moments(block, name, pruned.weights, a)
            block.finish(pruned)
            if block.index == 1:
                break
    for model in (dense, tiny_llama):
        find_blocks(model)[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            model(windows)
    x, y = (each.flatten(0, 1) for each in inputs)
    torch.testing.assert_close(hessian, y.T @ y / len(windows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(toward, (y + a * (x - y)).T @ y / len(windows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_masks_of_every_method_are_kept_and_less_is_lost(tiny_llama, windows, name):
    masked, better = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    before = besa.prune(masked, windows, METHODS[name], progress=False)
    after = besa.prune(better, windows, METHODS[name], progress=False, reconstruct=Reconstruct())
    for key, keep_mask in after.keep_masks.items():
        assert key[0] > 0 or torch.equal(before.keep_masks[key], keep_mask)  # later blocks see other inputs
        assert not projections(find_blocks(better)[key[0]])[key[1]].weight[~keep_mask].any()
    with torch.no_grad():
        dense, *pruned = (model.model(windows).last_hidden_state for model in (tiny_llama, masked, better))
    if name != "sparsegpt":  # SparseGPT has corrected its weights
        assert (pruned[1] - dense).norm() < (pruned[0] - dense).norm()


def test_ignored_projections_and_blocks_stay_dense(tiny_llama, windows):
    before, method = copy.deepcopy(tiny_llama), besa.Wanda(ignore=("1", "0.mlp.up_proj"))
    besa.prune(tiny_llama, windows, method, progress=False, reconstruct=Reconstruct())
    same = [
        torch.equal(a, b) for a, b in zip(before.model.layers[1].parameters(), tiny_llama.model.layers[1].parameters())
    ]
    assert all(same) and torch.equal(
        before.model.layers[0].mlp.up_proj.weight, tiny_llama.model.layers[0].mlp.up_proj.weight
    )


def test_what_cannot_be_reconstructed_raises(tiny_llama, windows):
    with pytest.raises(ValueError, match="quantized weights cannot be reconstructed"):
        prune(tiny_llama, windows, Reconstruct(), besa.Wanda(quantize=besa.Quantize()))
