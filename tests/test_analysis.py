import copy
import dataclasses
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

import besa
from besa.decoder import find_blocks, projections
from besa.paper import analysis
from besa.quantize import QuantizedFiles, save_quantized


def test_spearman_is_one_for_any_rising_function_and_shares_ranks_of_equals():
    x = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    frame = pd.DataFrame({"rising": x**3, "falling": -np.exp(x), "ties": [2.0, 1, 1, 3, 3], "constant": np.ones(5)})
    rho = analysis.spearman(frame, x)
    assert np.isclose(rho["rising"], 1) and np.isclose(rho["falling"], -1)
    assert np.isclose(rho["ties"], np.corrcoef([3, 1.5, 1.5, 4.5, 4.5], x)[0, 1])
    assert rho["constant"] is None
    assert analysis.spearman(frame, np.ones(5)) == dict.fromkeys(frame.columns)


def test_row_features_are_those_of_a_loop_over_rows(tiny_llama, windows):
    features = analysis.row_features(tiny_llama, windows)
    name, block = "mlp.down_proj", find_blocks(tiny_llama)[1]
    weight = projections(block)[name].weight.detach()
    inputs = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        tiny_llama(windows)
    handle.remove()
    norms = (inputs[0].flatten(0, 1).square().sum(0) / len(windows)).sqrt()
    for i in (0, 17):
        scores = [float(w.abs() * n) for w, n in zip(weight[i], norms, strict=True)]
        mean, variance = np.mean(scores), np.var(scores)
        expected = {
            "row norm": float(weight[i].norm()),
            "importance": sum(scores),
            "kurtosis": np.mean([(s - mean) ** 4 for s in scores]) / variance**2 - 3,
            "lost at half": sum(sorted(scores)[: len(scores) // 2]) / sum(scores),
        }
        found = features[1, name].iloc[i].to_dict()
        assert found.keys() == expected.keys() and np.allclose([*found.values()], [*expected.values()], rtol=1e-4)
    assert len(features) == 3 * 7


def test_owl_and_dlp_give_blocks_the_sparsities_of_a_loop_over_their_importances(tiny_llama, windows):
    inputs = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, x, key=(index, name): inputs.__setitem__(key, x[0].flatten(0, 1)))
        for index, block in enumerate(find_blocks(tiny_llama))
        for name, linear in projections(block).items()
    ]
    with torch.no_grad():
        tiny_llama(windows)
    for handle in handles:
        handle.remove()
    outliers, medians = [], []
    for index, block in enumerate(find_blocks(tiny_llama)):
        scores = [
            linear.weight.detach().abs() * inputs[index, name].norm(dim=0)
            for name, linear in projections(block).items()
        ]
        outliers.append(sum((s > 2 * s.mean()).sum().item() for s in scores) / sum(s.numel() for s in scores))
        ordered = np.sort(np.concatenate([s.flatten().numpy() for s in scores]))
        medians.append(ordered[(len(ordered) - 1) // 2])  # torch's, of an even number
    for method, worth in ((analysis.Owl(times=2.0), np.array(outliers)), (analysis.Dlp(), -np.array(medians))):
        kept = 2 * method.most * (worth - worth.min()) / (worth.max() - worth.min())
        found = method.prepared(tiny_llama, windows, progress=False).sparsities
        assert np.allclose(found, 0.5 - (kept - kept.mean()), atol=2e-3) and np.isclose(np.mean(found), 0.5)


def test_what_llm_compressor_prunes_is_taken_with_its_masks(tiny_llama, windows, monkeypatch):
    asked = {}

    def oneshot(model, dataset, recipe, **size):
        asked.update(recipe=recipe, tokens=dataset["input_ids"], **size)
        for block in find_blocks(model):
            for linear in projections(block).values():
                linear.weight.data[:, ::2] = 0

    package, pruning = types.ModuleType("llmcompressor"), types.ModuleType("llmcompressor.modifiers.pruning")
    package.oneshot, pruning.SparseGPTModifier = oneshot, dict
    for name, module in ((package.__name__, package), (pruning.__name__, pruning)):
        monkeypatch.setitem(sys.modules, name, module)
    dense = copy.deepcopy(tiny_llama)
    report = besa.prune(tiny_llama, windows, analysis.LlmCompressor(sparsity=0.5), progress=False)
    assert asked["recipe"]["sparsity"] == 0.5 and asked["recipe"]["mask_structure"] == "0:0"
    assert list(asked["tokens"]) == windows.tolist() and asked["num_calibration_samples"] == len(windows)
    for index, block in enumerate(find_blocks(tiny_llama)):
        for name, linear in projections(block).items():
            weight = projections(find_blocks(dense)[index])[name].weight
            assert not linear.weight[:, ::2].any() and torch.equal(linear.weight[:, 1::2], weight[:, 1::2])
            assert torch.equal(report.keep_masks[index, name], linear.weight != 0)


def test_rows_are_summed_up_by_projection_and_correlated_by_block():
    sparsities = {(0, "q"): np.array([0.2, 0.4, 0.6]), (1, "q"): np.array([0.1, 0.9, 0.5])}
    features = {key: pd.DataFrame({"x": [1.0, 2.0, 3.0]}) for key in sparsities}
    result = analysis.row_analysis(sparsities, features)
    assert np.allclose(result["row_quantiles"]["q"][::3], [0.1, 0.45, 0.9])  # lowest, median, highest
    assert [entry["x"] for entry in result["row_correlations"]] == [1.0, 0.5]
    by_block = pd.DataFrame({"depth": [0.7]}, index=pd.Index(["q"], name="projection"))
    table = analysis.correlation_table(pd.DataFrame(result["row_correlations"]), by_block)
    assert table.loc[("rows", "x"), "q"] == 0.75 and table.loc[("blocks", "depth"), "mean"] == 0.7


def test_sparsities_of_rows_are_counted_from_the_masks_wherever_weights_happen_to_be_zero(tiny_llama, windows):
    with torch.no_grad():
        find_blocks(tiny_llama)[0].self_attn.q_proj.weight[0] = 0  # of a kept weight nobody can tell
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    found = analysis.row_sparsities(report.keep_masks)
    assert len(found) == 3 * 7 and all(np.all(rows == 0.5) for rows in found.values())
    report = besa.prune(tiny_llama, windows, besa.Wanda(sparsity=0.0), progress=False)
    assert all(np.all(rows == 0) for rows in analysis.row_sparsities(report.keep_masks).values())


def test_stored_bits_are_those_of_the_file_and_must_be_the_models_weights(tiny_llama, windows, tmp_path):
    assert analysis.stored_bits(tiny_llama, None) == 32
    report = besa.prune(tiny_llama, windows, besa.Wanda(quantize=besa.Quantize(bits=4)), progress=False)
    stored = save_quantized(report.quantized, tmp_path / "packed.safetensors")
    assert analysis.stored_bits(tiny_llama, report.quantized) == pytest.approx(stored)
    assert analysis.stored_bits(tiny_llama, QuantizedFiles(tmp_path / "packed.safetensors")) == pytest.approx(stored)
    key, weight = next(iter(report.quantized.items()))
    other = {**report.quantized, key: dataclasses.replace(weight, scale=weight.scale * 2)}
    with pytest.raises(RuntimeError, match=r"block 0, self_attn.q_proj: what is stored does not reproduce"):
        analysis.stored_bits(tiny_llama, other)


def test_one_kind_prunes_that_kind_as_wanda_would_and_leaves_the_rest(tiny_llama, windows):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    report = besa.prune(tiny_llama, windows, analysis.WandaOneKind(kind="down_proj", sparsity=0.75), progress=False)
    rows = report.to_frame()
    assert (rows["sparsity"] == (rows["projection"] == "mlp.down_proj") * 0.75).all() and not rows["note"].any()
    for key, value in tiny_llama.state_dict().items():
        assert torch.equal(value, before[key]) == ("down_proj" not in key)
    with pytest.raises(ValueError, match=r"unknown kind of projection 'mlp'; this model has q_proj, .*, down_proj"):
        besa.prune(tiny_llama, windows, analysis.WandaOneKind(kind="mlp"), progress=False)


def test_owl_keeps_more_where_there_are_more_outliers_and_the_mean_stays(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, ::8] *= 30  # columns of outliers
    inputs, shares = {}, []
    for index, block in enumerate(find_blocks(tiny_llama)):
        for name, linear in projections(block).items():
            keep = lambda _, x, key=(index, name): inputs.__setitem__(key, x[0].flatten(0, 1))
            linear.register_forward_pre_hook(keep)
    with torch.no_grad():
        tiny_llama(windows)
    for index, block in enumerate(find_blocks(tiny_llama)):
        scores = [linear.weight.abs() * inputs[index, name].norm(dim=0) for name, linear in projections(block).items()]
        shares.append(sum(int((s > 5 * s.mean()).sum()) for s in scores) / sum(s.numel() for s in scores))
    d = [0.16 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    method = analysis.Owl(sparsity=0.6)
    prepared = method.prepared(tiny_llama, windows, progress=False)
    assert prepared.sparsities == pytest.approx([0.6 - (each - sum(d) / 3) for each in d], abs=1e-6)
    assert min(prepared.sparsities) == prepared.sparsities[1] and method.measures_model
    report = besa.prune(tiny_llama, windows, method, progress=False)
    counted = report.to_frame().groupby("block")["zeros"].sum()
    assert counted[1] == counted.min()
