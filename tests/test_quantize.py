import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import besa
from besa.decoder import find_blocks, projections
from besa.quantize import QuantizedFiles, save_quantized

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
def test_codes_and_weights_equal_equation_7_one_by_one(bits, group):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    weight[4] = weight[4].abs()  # a row without negative weights still has a code for 0
    gamma = torch.tensor([0.7, 0.9])
    clipping = gamma.logit()[:, None, None].expand(2, 5, 24 // (group or 24))
    quantized = besa.Quantize(bits=bits, group_size=group).codes(weight, clipping)
    codes, values = naive(weight, bits, group or 24, *gamma.tolist())
    assert torch.equal(quantized.codes, codes.byte())
    torch.testing.assert_close(quantized.dequantize(torch.float32), values, rtol=1e-6, atol=0)


def test_min_max_is_off_by_half_a_step_at_most_and_groups_are_closer():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for group in (None, 32, 8):
        quantized = besa.Quantize(bits=4, group_size=group).codes(weight)
        error = (quantized.dequantize(torch.float32) - weight).abs()
        half_steps = 0.51 * quantized.scale.float().repeat_interleave(64 // quantized.scale.shape[1], dim=1)
        # rounding the zero-point may cut the last code off at one end
        assert (error <= 2 * half_steps).all() and (error <= half_steps).float().mean() > 0.95
        errors.append(error.square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_clipping_gets_the_gradient_that_the_formula_says():
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
    "besa": lambda q: besa.Besa(quantize=q),
    "wanda": lambda q: besa.Wanda(quantize=q),
    "quantization alone": lambda q: besa.Wanda(sparsity=0.0, quantize=q),
}


@pytest.mark.parametrize(
    "name, bits, group",
    [("besa", bits, group) for bits in BITS for group in (None, 8)]
    + [("wanda", 4, None), ("wanda", 3, 8), ("quantization alone", 4, None), ("quantization alone", 8, 8)],
)
def test_packed_codes_and_scales_reproduce_the_saved_weights_bit_for_bit(
    tiny_llama, windows, tmp_path, name, bits, group
):
    tiny_llama.bfloat16()
    fresh = tiny_llama.__class__(tiny_llama.config).bfloat16()
    fresh.load_state_dict(tiny_llama.state_dict())
    method = METHODS[name](besa.Quantize(bits=bits, group_size=group))
    report = besa.prune(tiny_llama, windows, method, progress=False)
    tiny_llama.save_pretrained(tmp_path / "saved")
    bits_per_weight = save_quantized(report.quantized, tmp_path / "packed.safetensors")
    for (index, projection), weight in QuantizedFiles(tmp_path / "packed.safetensors").items():
        projections(find_blocks(fresh)[index])[projection].weight.data = weight.dequantize(torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").state_dict()
    for key, value in fresh.state_dict().items():
        assert torch.equal(value.view(torch.int16), saved[key].view(torch.int16)), key
    kept, weights = (
        sum(r["rows"] * r["columns"] - r["zeros"] for r in report.rows),
        sum(r["rows"] * r["columns"] for r in report.rows),
    )
    groups = sum(quantized.scale.numel() for quantized in report.quantized.values())
    mask_bits = 0 if name == "quantization alone" else weights
    expected = (mask_bits + kept * bits + groups * (16 + 8)) / weights
    assert bits_per_weight == pytest.approx(expected, abs=0.05)  # whole bytes
    for quantized in report.quantized.values():
        assert quantized.codes.max() <= 2**bits - 1
    if name == "quantization alone":
        assert report.sparsity == 0  # rounding makes zeros too, and they are no pruned weights
        assert any((quantized.dequantize(torch.float32) == 0).any() for quantized in report.quantized.values())
    else:
        assert report.sparsity > 0.45
        for key, quantized in report.quantized.items():
            assert torch.equal(quantized.keep_mask, report.keep_masks[key])


def test_learned_clipping_beats_min_max_on_the_same_blocks(smollm2):
    """One real block, 3 bits: what the clipping learns lowers the reconstruction error, with Wanda's masks too."""
    model = copy.deepcopy(smollm2[0])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    sample = besa.calibration_windows("sotu", smollm2[1], n_samples=24, seq_len=64)
    still = {"budget": "exact", "scores": False, "lr": 1e-30, "loss": "channel", "targets": "pruned"}
    quantize = besa.Quantize(bits=3)
    methods = besa.Wanda(quantize=quantize), besa.Besa(quantize=quantize), besa.Besa(quantize=quantize, **still)
    wanda, joint, clipping = (besa.prune(copy.deepcopy(model), sample, method, progress=False) for method in methods)
    assert joint.rows[0]["block_error"] < 0.9 * wanda.rows[0]["block_error"]
    assert all(torch.equal(clipping.keep_masks[key], keep_mask) for key, keep_mask in wanda.keep_masks.items())
    assert clipping.rows[0]["block_error"] < 0.85 * wanda.rows[0]["block_error"]


def test_quantization_is_learned_with_the_same_bits_each_time(tiny_llama, windows):
    state = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    outcomes = []
    for _ in range(2):
        tiny_llama.load_state_dict(state)
        report = besa.prune(tiny_llama, windows, besa.Besa(quantize=besa.Quantize(bits=4)), progress=False)
        outcomes.append([q.scale for q in report.quantized.values()] + [q.codes for q in report.quantized.values()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_a_group_that_does_not_divide_is_refused_by_name_before_any_work(tiny_llama, windows):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    for method in (besa.Besa(quantize=besa.Quantize(group_size=12)), besa.Wanda(quantize=besa.Quantize(group_size=12))):
        with pytest.raises(ValueError, match=r"block 0, self_attn.q_proj: 32 columns do not divide into groups of 12"):
            besa.prune(tiny_llama, windows, method, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.fixture
def saved_codes(tiny_llama, windows, tmp_path):
    """A file of the tiny model's codes; the model has other weights since."""
    report = besa.prune(tiny_llama, windows, besa.Wanda(quantize=besa.Quantize()), progress=False)
    save_quantized(report.quantized, tmp_path / "packed.safetensors")
    assert math.isfinite(report.sparsity)
    for block in find_blocks(tiny_llama):
        for projection in projections(block).values():
            torch.nn.init.ones_(projection.weight)
    return tmp_path / "packed.safetensors"


def test_nothing_that_is_quantized_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="nothing is quantized: prune with quantize="):
        save_quantized({}, tmp_path / "codes.safetensors")
    assert not list(tmp_path.iterdir())
