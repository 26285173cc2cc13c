"""The published method: rates, ranks, the gradient against a naive loop, what it learns, and row groups."""

import copy
import dataclasses
import math

import pytest
import torch

import besa
from besa import kernels
from besa.besa import MaskedWeight, candidate_rates, offset, rank_rows, simplex
from besa.importance import importance
from besa.walk import frozen, walk


def one_block(model):
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


def straight_through(weight, scores, logits, smooth):
    """Eqn. 3-6 with the full probability matrix and torch's own gradient."""
    rates = candidate_rates(logits.shape[1])
    rows, columns = weight.shape
    beta = simplex(logits, smooth).repeat_interleave(rows // len(logits), 0)  # (rows, n)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    counts = torch.tensor([int(columns * rate) for rate in rates.tolist()])
    probability = torch.stack([(beta * (counts > rank)).sum(1) for rank in range(columns)], 1).gather(1, ranks)
    keep = (ranks >= (beta @ rates * columns).long()[:, None]).float()
    return weight * (keep - (1 - probability).detach() + (1 - probability))


@pytest.mark.parametrize("groups, n, smooth", [(12, 101, True), (12, 101, False), (4, 11, True), (1, 256, True)])
def test_gradient_equals_autograd_through_the_probability_matrix(groups, n, smooth):
    torch.manual_seed(groups + n)
    weight, scores, grad = torch.randn(3, 12, 40)
    logits = torch.randn(groups, n, requires_grad=True)
    rates, beta = candidate_rates(n), simplex(logits, smooth)
    masked = MaskedWeight.apply(beta, beta @ rates, weight, rank_rows(scores, rates), torch.empty_like(weight))
    expected = straight_through(weight, scores, logits, smooth)
    torch.testing.assert_close(masked, expected)
    (ours,) = torch.autograd.grad((masked * grad).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * grad).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_quantized_weights_get_the_masked_gradient():
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    rates, beta = candidate_rates(101), simplex(torch.randn(6, 101), True)
    ranking = rank_rows(torch.rand(6, 40), rates)
    masked = MaskedWeight.apply(beta, beta @ rates, weight, ranking, torch.empty(6, 40))
    (masked * grad).sum().backward()
    kept = ranking.kept_above((beta @ rates * 40).long())
    assert torch.equal(weight.grad, grad * kept)


@pytest.mark.parametrize("columns", [1, 40, 33000])
def test_ranks_order_each_row_and_buckets_name_the_last_pruning_candidate(columns):
    torch.manual_seed(columns)
    scores, rates = torch.rand(3, columns), candidate_rates(101)
    ranking = rank_rows(scores, rates)
    ordered = torch.empty_like(scores).scatter_(1, ranking.ranks.long(), scores)
    assert (ordered.diff(dim=1) >= 0).all()
    assert ranking.ranks.dtype == (torch.int32 if columns == 33000 else torch.int16)
    counts = (rates.double() * columns).floor()
    bucket, rank = ranking.buckets.long(), ranking.ranks.long()
    assert (counts[bucket] > rank).all() and (counts[bucket + 1] <= rank).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_compiled_kernels_equal_plain_torch(dtype, n_threads, monkeypatch):
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 401, 300).to(dtype)
    ranking = rank_rows(torch.rand(401, 300), candidate_rates(101))
    counts = torch.randint(0, 301, (401,))

    def outcomes():
        masked = kernels.masked_rows(weight, ranking.ranks, counts, torch.empty_like(weight))
        return kernels.bucket_sums(grad, weight, ranking, 101), masked

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        sums, compiled = outcomes()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(kernels, "_is_compiled", lambda weight: False)
    plain_sums, plain = outcomes()
    assert torch.equal(compiled, plain)
    torch.testing.assert_close(sums, plain_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [2, 11, 50, 101, 256])
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_learning_starts_at_the_target(n, sparsity):
    rates = candidate_rates(n)
    shift = offset(rates, sparsity)
    assert float(simplex(torch.zeros(1, n), True, shift) @ rates) == pytest.approx(sparsity, abs=1e-3)
    assert (sparsity == 0.5) == bool((shift == 0).all())  # at 50 % the released recipe


def test_too_few_steps_warn(tiny_llama, windows):
    with pytest.warns(UserWarning, match="hardly learns in 6 steps"):
        besa.prune(one_block(tiny_llama), windows, besa.Besa(), progress=False)


def test_learning_lowers_the_loss(tiny_llama, windows):
    report = besa.prune(one_block(tiny_llama), windows, besa.Besa(epochs=20), progress=False)
    losses = [step["loss"] for step in report.steps]
    assert len(losses) == 20 * 6 and sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize("sparsity", [0.25, 0.75])
@pytest.mark.parametrize("smooth", [True, False])
def test_other_sparsities_are_reached(tiny_llama, windows, sparsity, smooth):
    method = besa.Besa(sparsity=sparsity, smooth=smooth, epochs=40)
    report = besa.prune(one_block(tiny_llama), windows, method, progress=False)
    assert report.sparsity == pytest.approx(sparsity, abs=0.02)


def test_a_step_averages_the_gradients_of_its_windows(tiny_llama, windows):
    """Six equal windows in one step move theta as one of them."""
    model, windows = one_block(tiny_llama), windows[:1]
    one = besa.prune(copy.deepcopy(model), windows, besa.Besa(epochs=8), progress=False)
    six = besa.prune(model, windows.repeat(6, 1), besa.Besa(epochs=8, batch_size=6), progress=False)
    assert len(one.steps) == len(six.steps) == 8
    for ours, theirs in zip(one.steps, six.steps):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("row_group, n_counts", [("row", 80), (8, 10), ("layer", 1)])
def test_rows_of_a_group_share_a_sparsity(tiny_llama, windows, row_group, n_counts):
    method = besa.Besa(row_group=row_group, epochs=20)
    report = besa.prune(one_block(tiny_llama), windows, method, progress=False)
    counts = report.keep_masks[0, "mlp.up_proj"].sum(1).view(n_counts, -1)
    assert (counts == counts[:, :1]).all()
    assert n_counts == 1 or len(counts.unique()) > 1


def test_row_group_that_does_not_divide_raises(tiny_llama, windows):
    with pytest.raises(ValueError, match="row_group 3 does not divide the 32 rows"):
        besa.prune(tiny_llama, windows, besa.Besa(row_group=3), progress=False)


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt"])
def test_the_least_important_weights_of_each_row_are_pruned(tiny_llama, windows, kind):
    with frozen(tiny_llama):
        block = next(iter(walk(tiny_llama, windows, hessian=True, progress=False)))
    scores = {
        name: importance(kind, linear.weight.detach().clone(), block.statistics[name])
        for name, linear in block.projections.items()
    }
    report = besa.prune(tiny_llama, windows, besa.Besa(importance=kind), progress=False)
    for name, each in scores.items():
        kept = report.keep_masks[0, name]
        assert (each.masked_fill(kept, 0).amax(1) <= each.masked_fill(~kept, math.inf).amin(1)).all()


def test_targets_agree_on_the_first_block_and_errors_add_up_on_later_ones(tiny_llama, windows):
    twin = copy.deepcopy(tiny_llama)
    pruned = besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    dense = besa.prune(twin, windows, besa.Besa(match="model"), progress=False)
    losses = [[[s["loss"] for s in report.steps if s["block"] == b] for b in range(3)] for report in (pruned, dense)]
    assert [ours == pytest.approx(theirs, rel=1e-6) for ours, theirs in zip(*losses)] == [True, False, False]
    errors = dense.to_frame().groupby("block")["block_error"].first()
    assert errors[2] > errors[0]


@pytest.mark.parametrize("method", [besa.Besa(epochs=3), besa.Exact(epochs=3), besa.Exact(update=True, epochs=3)])
def test_loss_that_is_not_finite_names_the_block(tiny_llama, windows, monkeypatch, method):
    def overflowing(output, target):
        return (output.float() - target.float()).square().sum() * 1e38 * 1e38

    for module in (besa.besa, besa.beyond.exact):
        for name in ("reconstruction_error", "token_error"):
            monkeypatch.setattr(module, name, overflowing, raising=False)
    with pytest.raises(ValueError, match="block 0: the loss is not finite"):
        besa.prune(tiny_llama, windows, method, progress=False)


def test_configuration_is_json_and_makes_the_method_again():
    method = besa.Besa(row_group=8, ignore=["1.mlp"], quantize=besa.Quantize(bits=3))
    config = method.config()
    assert config["method"] == "besa" and config["ignore"] == ["1.mlp"] and config["quantize"]["bits"] == 3
    fields = {field.name for field in dataclasses.fields(method)}
    assert config.keys() == fields | {"method"}
    assert dataclasses.replace(besa.Wanda(), sparsity=0.3) == besa.Wanda(sparsity=0.3)
