"""What only a GPU can show; skipped where there is none."""

import copy

import pytest
import torch
from test_shards import assert_same, save, weights
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import besa
from besa.inputs import models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

METHODS = {"besa": besa.Besa(), "layer-wise, dense": besa.Besa(row_group="layer", targets="dense")}
METHODS |= {"4 bits": besa.Besa(quantize=besa.Quantize(bits=4)), "sparsegpt": besa.SparseGPT()}


def odd_model():
    """Rows of 105 and 211 weights: half of them, where BESA starts, is no whole number that rounding could miss."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 105, "word_embed_proj_dim": 105, "ffn_dim": 211, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes, vocab_size=97, num_hidden_layers=3, num_attention_heads=5)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_the_gpu_learns_what_the_cpu_learns(windows, name):
    model = odd_model()
    other = copy.deepcopy(model).cuda()
    on_cpu, on_gpu = (besa.prune(each, windows, METHODS[name], progress=False) for each in (model, other))
    assert on_gpu.sparsity == pytest.approx(on_cpu.sparsity, abs=1e-3)
    for ours, theirs in zip(on_gpu.steps[: len(windows)], on_cpu.steps, strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_finds_the_same_bits_twice(dtype):
    """With as many tokens and as wide heads as attention's fast algorithms want, whose gradients need not repeat."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, vocab_size=97, num_hidden_layers=2, max_position_embeddings=512)
    first = LlamaForCausalLM(config).eval().to("cuda", dtype)
    second, windows = copy.deepcopy(first), torch.randint(0, 97, (8, 512))
    method = besa.Besa(budget="exact")
    for model in (first, second):
        report = besa.prune(model, windows, method, reconstruct=besa.Reconstruct("block"), progress=False)
        besa.finetune(model, windows, report, progress=False)
    assert_same(first, second)


def test_where_the_hidden_states_lie_changes_no_bit(tiny_llama, windows, tmp_path):
    source = save(tiny_llama, tmp_path / "source")
    places = ("device", "host", "file")
    for place in places:
        options = {"device": "cuda", "hidden_states": place, "progress": False}
        report = besa.prune_checkpoint(source, tmp_path / place, windows, besa.Besa(), **options)
        assert report.sparsity == pytest.approx(0.5, abs=0.05)
    assert weights(tmp_path / "device") == weights(tmp_path / "host") == weights(tmp_path / "file")


def test_a_model_larger_than_the_gpu_is_measured_as_one_that_fits(monkeypatch):
    whole, tokenizer = besa.load_model("smollm2-135m", "float32", "cuda")
    monkeypatch.setattr(models, "free_device", lambda _: 200 * 2**20)
    spread, _ = besa.load_model("smollm2-135m", "float32", "cuda")
    assert {parameter.device.type for parameter in spread.parameters()} == {"cuda", "meta"}
    tokens = besa.test_tokens("wiki", tokenizer)[: 10 * 512]
    expected, found = (besa.perplexity(model, tokens, 512, progress=False) for model in (whole, spread))
    assert found == pytest.approx(expected, rel=1e-4)
    assert besa.zero_shot(spread, tokenizer, ["piqa"], limit=4, progress=False).rows[0]["n"] == 4
