"""Methods and measurements of single notebooks."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import besa
from besa.besa import candidate_rates, rank_rows
from besa.decoder import find_blocks, projections
from besa.losses import reconstruction_error
from besa.masks import keep_largest
from besa.walk import frozen, walk
from reproduce.analysis import hidden_state_errors
from reproduce.methods import BUDGETS, BesaByPair, BesaByPart, BudgetedWeight, LearnedClipping, part_of


@torch.no_grad()
def inputs_of(model, windows):
    """Inputs of every projection of the whole model, (tokens, columns), by (block, name)."""
    seen, hooks = {}, []
    for index, block in enumerate(find_blocks(model)):
        for name, linear in projections(block).items():
            keep = functools.partial(lambda key, _, args: seen.update({key: args[0].flatten(0, 1)}), (index, name))
            hooks.append(linear.register_forward_pre_hook(keep))
    model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("rule", "most"), [("owl", 0.08), ("dlp", 0.15)])
def test_budgets_of_other_authors_are_those_of_their_formulas(tiny_llama, windows, rule, most):
    for power, block in zip((1.0, 1.2, 1.5), find_blocks(tiny_llama), strict=True):  # tails of different weight
        for linear in projections(block).values():
            linear.weight.data = linear.weight.sign() * linear.weight.abs() ** power
    inputs, worths = inputs_of(tiny_llama, windows), []
    for index, block in enumerate(find_blocks(tiny_llama)):
        linears = projections(block).items()
        scores = [linear.weight.detach().abs() * inputs[index, name].norm(dim=0) for name, linear in linears]
        outliers = torch.cat([(each > 5 * each.mean()).float().flatten() for each in scores])
        median = torch.cat([each.flatten() for each in scores]).median()
        worths.append(float(outliers.mean() if rule == "owl" else -median))
    worths = np.array(worths)
    lowered = 2 * most * (worths - worths.min()) / (worths.max() - worths.min())
    assert np.ptp(lowered) == pytest.approx(2 * most)
    expected = 0.6 - (lowered - lowered.mean())
    assert BUDGETS[rule](tiny_llama, windows, 0.6) == pytest.approx(expected.tolist(), abs=1e-5)


def test_learned_clipping_keeps_wandas_mask_and_loses_less_than_min_max(tiny_llama, windows):
    learned, quantize = copy.deepcopy(tiny_llama), besa.Quantize(bits=3)
    fixed = besa.prune(tiny_llama, windows, besa.Wanda(quantize=quantize), progress=False)
    report = besa.prune(learned, windows, LearnedClipping(quantize=quantize), progress=False)
    assert report.rows[0]["block_error"] < 0.97 * fixed.rows[0]["block_error"]
    for (index, name), keep_mask in report.keep_masks.items():
        assert index > 0 or torch.equal(keep_mask, fixed.keep_masks[0, name])
        weight = projections(find_blocks(learned)[index])[name].weight
        assert max(len(row.unique()) for row in weight) <= 2**3
        assert not weight[~keep_mask].any()


def test_errors_of_hidden_states_are_those_of_whole_runs(tiny_llama, windows):
    pruned, outputs = copy.deepcopy(tiny_llama), []
    besa.prune(pruned, windows, besa.Wanda(), progress=False)
    errors = hidden_state_errors(pruned, tiny_llama, windows).set_index(["window", "block"])
    for model in (pruned, tiny_llama):
        for block in find_blocks(model):
            block.register_forward_hook(lambda _, __, output: outputs.append(output.detach().double()))
        model(windows, use_cache=False)
    for index, (hidden, dense) in enumerate(zip(outputs[:3], outputs[3:], strict=True)):
        for window in range(6):
            lost = (hidden - dense)[window]
            by_token = lost.norm(dim=1) / dense[window].norm(dim=1)
            both = [float(by_token.mean()), float(lost.norm() / dense[window].norm())]
            assert errors.loc[window, index].tolist() == pytest.approx(both, rel=1e-4)


def test_first_step_of_each_projection_starts_from_wandas_mask_behind_the_pruned_ones(tiny_llama, windows):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    dense = copy.deepcopy(tiny_llama)
    report = besa.prune(tiny_llama, windows, BesaByPart(sparsity=0.46, unit="projection"), progress=False)
    norms, inputs = inputs_of(dense, windows), inputs_of(tiny_llama, windows[:1])
    for number, (name, linear) in enumerate(projections(find_blocks(dense)[0]).items()):
        step, weight, x = report.steps[6 * number], linear.weight.detach(), inputs[0, name]
        pruned = weight * keep_largest(weight.abs() * norms[0, name].norm(dim=0), step["sparsity"])
        error = reconstruction_error((x @ pruned.T)[None], (x @ weight.T)[None])
        assert step["reconstruction_error"] == pytest.approx(float(error), rel=1e-3), name


@pytest.mark.parametrize("unit, n_units", [("projection", 7), ("sublayer", 2)])
def test_each_part_meets_the_sparsity(tiny_llama, windows, unit, n_units):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    method = BesaByPart(sparsity=0.45, unit=unit, epochs=30, d_coef=1.0)
    report = besa.prune(tiny_llama, windows, method, progress=False)
    assert len(report.steps) == n_units * 30 * 6
    frame = report.to_frame()
    part = frame["projection"] if unit == "projection" else frame["projection"].str.split(".").str[0]
    sparsities = frame["zeros"].groupby(part).sum() / (frame["rows"] * frame["columns"]).groupby(part).sum()
    assert sparsities.tolist() == pytest.approx([0.45] * n_units, abs=0.04)  # whole weights of 32 columns


def test_sublayers_of_blocks_without_an_mlp_module_are_their_children(windows):
    config = OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
    report = besa.prune(OPTForCausalLM(config).eval(), windows, BesaByPart(unit="sublayer"), progress=False)
    assert len(report.steps) == 2 * 3 * 6  # attention, fc1, fc2
    assert report.to_frame()["sparsity"].between(0.4, 0.6).all()


def test_inputs_of_a_part_come_from_the_pruned_rest_of_the_block(tiny_llama, windows):
    with frozen(tiny_llama):
        block = next(iter(walk(tiny_llama, windows, progress=False)))
        weights = {"self_attn.o_proj": torch.zeros_like(block.module.self_attn.o_proj.weight)}
        part = part_of(block, "mlp.up_proj", weights)
        expected = block.module.post_attention_layernorm(block.inputs)  # the MLP sees the block's input alone
        torch.testing.assert_close(part.inputs, expected)
        torch.testing.assert_close(part.targets, block.module.mlp.up_proj(expected))
        torch.testing.assert_close(part.run(0), part.targets[:1])
        attention = part_of(block, "self_attn", {})
        torch.testing.assert_close(attention.run(2), attention.targets[2:3])


def test_pairs_reproduce_the_output_of_their_last_block(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    method = BesaByPair()
    report = besa.prune(tiny_llama, windows, method, progress=False)  # blocks 0 and 1, then 2
    assert [row["block"] for row in report.rows] == [0] * 14 + [1] * 7 and len(report.steps) == 2 * 6
    outputs = []
    for model, last in ((tiny_llama, find_blocks(tiny_llama)[0]), (dense, find_blocks(dense)[1])):
        last.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
        model(windows, use_cache=False)
    errors = [reconstruction_error(outputs[0][n : n + 1], outputs[1][n : n + 1]) for n in range(6)]
    assert report.rows[0]["block_error"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    for (index, name), keep_mask in report.keep_masks.items():
        assert not projections(find_blocks(tiny_llama)[index])[name].weight[~keep_mask].any()


def test_gradient_of_a_sparsity_is_the_mean_of_the_weights_near_the_threshold():
    generator = torch.Generator().manual_seed(0)
    weight, toward = torch.randn(2, 6, 400, generator=generator)
    scores = torch.rand(6, 400, generator=generator)
    alpha = torch.tensor([0.5, 0.02, 0.98], requires_grad=True)  # groups of two rows
    masked = BudgetedWeight.apply(alpha, weight, rank_rows(scores, candidate_rates(101)), torch.empty_like(weight))
    (masked * toward).sum().backward()
    ranks = scores.argsort(1).argsort(1)
    edges = [math.floor(400 * rate) for rate in candidate_rates(101).flip(0).double().tolist()]  # of 0 %, 1 %, ...
    for group, (low, high) in enumerate([(45, 55), (0, 7), (93, 100)]):
        rows = slice(2 * group, 2 * group + 2)
        near = (ranks[rows] >= edges[low]) & (ranks[rows] < edges[high])
        expected = -(toward * weight)[rows][near].sum() / ((high - low) / 100)
        assert alpha.grad[group].item() == pytest.approx(expected.item(), rel=1e-4)
