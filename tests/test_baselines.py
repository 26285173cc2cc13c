"""Magnitude, Wanda and SparseGPT against naive implementations; N:M patterns."""

import copy

import pytest
import torch

import besa
from besa.decoder import BlockCall, find_blocks, projections
from besa.importance import InputStatistics, inverse_cholesky
from besa.walk import Block

BASELINES = {"magnitude": besa.Magnitude, "wanda": besa.Wanda, "sparsegpt": besa.SparseGPT}


def inputs_of(model, windows, block, name):
    """Inputs of a projection in whole runs of the model, (tokens, columns)."""
    inputs = []
    projection = model.model.layers[block].get_submodule(name)
    with projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())), torch.no_grad():
        for window in windows:
            model(window[None])
    return torch.cat([x.flatten(0, -2) for x in inputs])


@torch.no_grad()
def prune_projection(method, weight, statistics):
    """New weight, keep-mask and note of a single projection."""
    module = torch.nn.ModuleDict({"p": torch.nn.Linear(*weight.shape[::-1], bias=False)})
    module["p"].weight.copy_(weight)
    block = Block(0, module, BlockCall((), {}), torch.zeros(1, 1, 1), None, frozenset(), 1, None)
    block.statistics = {"p": statistics}
    pruned = method.prune_block(block)
    return pruned.weights["p"], pruned.keep_masks["p"], pruned.notes["p"]


def test_wanda_prunes_the_lowest_weight_times_input_norm_of_each_row(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    besa.prune(tiny_llama, windows, besa.Wanda(sparsity=0.25), progress=False)
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        model = copy.deepcopy(dense)  # block 1 as Wanda meets it: block 0 pruned, itself dense
        model.model.layers[0] = tiny_llama.model.layers[0]
        norms = inputs_of(model, windows, 1, name).norm(dim=0).tolist()
        weight, pruned = (m.model.layers[1].get_submodule(name).weight.tolist() for m in (dense, tiny_llama))
        for row, pruned_row in zip(weight, pruned, strict=True):
            scores = [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
            lowest = sorted(range(len(row)), key=scores.__getitem__)[: len(row) // 4]
            assert sorted(lowest) == [j for j, w in enumerate(pruned_row) if w == 0]


def test_magnitude_prunes_the_smallest_weights_of_each_projection(tiny_llama, windows):
    weight = tiny_llama.model.layers[2].mlp.gate_proj.weight.detach().clone()
    besa.prune(tiny_llama, windows, besa.Magnitude(sparsity=0.3), progress=False)
    threshold = weight.abs().flatten().sort().values[int(0.3 * weight.numel())]
    assert torch.equal(tiny_llama.model.layers[2].mlp.gate_proj.weight != 0, weight.abs() >= threshold)


def test_sparsegpt_equals_optimal_brain_surgery_by_explicit_inverses():
    torch.manual_seed(0)
    rows, columns = 5, 12
    x, weight = torch.randn(200, columns) @ torch.randn(columns, columns), torch.randn(rows, columns)
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    ours, keep_mask, note = prune_projection(besa.SparseGPT(), weight, statistics)
    hessian = 2 * (x.T @ x).double()
    hessian += 0.01 * hessian.diag().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    saliency = torch.stack([weight[:, j].double() ** 2 / inverses[j][0, 0] for j in range(columns)], 1)
    expected_mask = torch.ones(rows * columns, dtype=torch.bool)
    expected_mask[saliency.flatten().argsort()[: rows * columns // 2]] = False
    expected_mask, expected = expected_mask.view(rows, columns), weight.double().clone()
    for j in range(columns):
        error = expected[:, j] * ~expected_mask[:, j] / inverses[j][0, 0]
        expected[:, j:] -= error[:, None] * inverses[j][0]
    torch.testing.assert_close(ours, (expected * expected_mask).float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(keep_mask, expected_mask) and note == "damping 0.01, float32"


def released_sparsegpt(weight, hessian, n, m, block_columns):
    """N:M as the released code: the mask of a group from the weights as they are when its first column comes."""
    w, (upper, _) = weight.clone(), inverse_cholesky(hessian)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], block_columns):
        stop = min(start + block_columns, w.shape[1])
        errors = torch.zeros(len(w), stop - start)
        for j in range(start, stop):
            if j % m == 0:
                scores = w[:, j : j + m] ** 2 / upper.diag()[j : j + m] ** 2
                pruned.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            new = w[:, j].masked_fill(pruned[:, j], 0)
            errors[:, j - start] = (w[:, j] - new) / upper[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
            w[:, j] = new
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, ~pruned


@pytest.mark.parametrize("block_columns", [4, 16, 18, 128])
def test_sparsegpt_chooses_each_group_from_the_corrected_weights(block_columns, monkeypatch):
    monkeypatch.setattr(besa.baselines, "BLOCK_COLUMNS", block_columns)
    torch.manual_seed(0)
    x, weight = torch.randn(200, 48) @ torch.randn(48, 48), torch.randn(7, 48)
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    ours, keep_mask, _ = prune_projection(besa.SparseGPT(pattern="2:4"), weight, statistics)
    expected, expected_mask = released_sparsegpt(weight, statistics.hessian, 2, 4, block_columns // 4 * 4)
    assert torch.equal(keep_mask, expected_mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "3:16"])
@pytest.mark.parametrize("name", [*BASELINES, "wanda in 4 bits"])
def test_patterns_keep_n_of_every_m(tiny_llama, windows, name, pattern):
    n, m = map(int, pattern.split(":"))
    if name == "wanda in 4 bits":
        method = besa.Wanda(quantize=besa.Quantize(bits=4), pattern=pattern)
    else:
        method = BASELINES[name](pattern=pattern)
    report = besa.prune(tiny_llama, windows[:2], method, progress=False)
    assert report.sparsity == method.sparsity == 1 - n / m
    for (index, projection), keep_mask in report.keep_masks.items():
        assert (keep_mask.view(-1, m).sum(1) == n).all()
        assert not projections(find_blocks(tiny_llama)[index])[projection].weight[~keep_mask].any()


@pytest.mark.parametrize("method", [*BASELINES.values(), besa.Exact])
def test_pattern_that_does_not_divide_the_columns_raises(tiny_llama, windows, method):
    with pytest.raises(ValueError, match="columns do not divide into groups of 5"):
        besa.prune(tiny_llama, windows, method(pattern="3:5"), progress=False)


def test_columns_without_input_are_pruned_first_and_masks_tell_the_zeros(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[0].input_layernorm.weight[:20] = 0  # more than half of the columns
    report = besa.prune(tiny_llama, windows, besa.SparseGPT(), progress=False)
    keep_mask, weight = report.keep_masks[0, "self_attn.q_proj"], tiny_llama.model.layers[0].self_attn.q_proj.weight
    assert report.sparsity == 0.5 and torch.equal(keep_mask, weight != 0)
    assert keep_mask[:, 20:].all() and not keep_mask[:, :20].all()


def test_pattern_implies_the_sparsity_or_contradicts_it():
    assert besa.Wanda(pattern="1:4").sparsity == besa.Exact(pattern="1:4", sparsity=0.75).sparsity == 0.75
    for fields in ({"sparsity": 0.5}, {"sparsities": (0.75, 0.75, 0.75)}):
        with pytest.raises(ValueError, match="pattern '1:4'"):
            besa.Wanda(pattern="1:4", **fields)
