"""Pruning on a GPU; skipped where there is none."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import besa

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

METHODS = {
    "besa": besa.Besa(),
    "layer-wise": besa.Besa.layer_wise(),
    "4 bits": besa.Besa(quantize=besa.Quantize(bits=4)),
    "exact": besa.Exact(),
    "exact, updated": besa.Exact(update=True),
    "closed": besa.Closed(),
    "sparsegpt": besa.SparseGPT(),
}


def odd_model():
    """Rows of 105 and 211 weights: half of them, where BESA starts, is far from a whole number."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 105, "word_embed_proj_dim": 105, "ffn_dim": 211, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes, vocab_size=97, num_hidden_layers=3, num_attention_heads=5)).eval()


def assert_equal(model, other):
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_gpu_learns_what_the_cpu_learns(windows, name):
    model = odd_model()
    other = copy.deepcopy(model).cuda()
    on_cpu, on_gpu = (besa.prune(each, windows, METHODS[name], progress=False) for each in (model, other))
    assert on_gpu.sparsity == pytest.approx(on_cpu.sparsity, abs=1e-3)
    for ours, theirs in zip(on_gpu.steps[: len(windows)], on_cpu.steps):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize("name", METHODS)
def test_one_block_at_a_time_on_the_gpu_is_the_whole_model_on_it(tiny_llama, windows, name):
    moved = copy.deepcopy(tiny_llama)
    report = besa.prune(moved, windows, METHODS[name], progress=False, device="cuda")
    assert {parameter.device.type for parameter in moved.parameters()} == {"cpu"} and report.peak_bytes > 0
    whole = tiny_llama.cuda()
    expected = besa.prune(whole, windows, METHODS[name], progress=False)
    assert report.sparsity == pytest.approx(expected.sparsity, abs=1e-3)
    for ours, theirs in zip(report.rows, expected.rows):
        assert ours["block_error"] == pytest.approx(theirs["block_error"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_repeats_itself_to_the_bit(dtype):
    """With the lengths and head sizes of attention's fast algorithms, whose gradients need not repeat."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, vocab_size=97, num_hidden_layers=2, max_position_embeddings=512)
    first = LlamaForCausalLM(config).eval().to("cuda", dtype)
    second, windows = copy.deepcopy(first), torch.randint(0, 97, (8, 512))
    for model in (first, second):
        besa.prune(model, windows, besa.Exact(update=True), reconstruct=besa.Reconstruct(), progress=False)
    assert_equal(first, second)
