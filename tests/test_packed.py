"""Packed projections and models: the same bits back, the same products, files, refusals."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from torch import nn
from transformers import AutoModelForCausalLM

import besa
from besa.checkpoint import pack_folder
from besa.decoder import find_blocks, projections
from besa.packed import PackedLinear, kernels, pack, packed_projections, unpack
from besa.quantize import Quantize
from besa.report import Report

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BEST = kernels.instructions()
ALL_SETS = ["bf16", "vnni", "avx2", "none"]
SETS = ALL_SETS[ALL_SETS.index(BEST) :]
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@contextlib.contextmanager
def instruction_set(name):
    """Kernels of another processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "instructions", lambda: name)
        yield


def pruned_linear(rows, columns, dtype, sparsity, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, columns, generator=generator))
    linear.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return linear


def pruned_codes(rows, columns, bits, group_size, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = Quantize(bits=bits, group_size=group_size).codes(torch.randn(rows, columns, generator=generator))
    return codes, torch.rand(rows, columns, generator=generator) >= sparsity


def random_inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prune_half(model):
    """Set a random half of the weights to 0; returns the keep-masks."""
    generator, masks = torch.Generator().manual_seed(0), {}
    for index, block in enumerate(find_blocks(model)):
        for name, projection in projections(block).items():
            masks[index, name] = torch.rand(projection.weight.shape, generator=generator) < 0.5
            projection.weight.data[~masks[index, name]] = 0
    return masks


def compress_jointly(model, bits):
    """Prune a half and quantize; returns the report."""
    report = Report("joint", n_samples=0, seq_len=0)
    for (index, name), keep in prune_half(model).items():
        weight = find_blocks(model)[index].get_submodule(name).weight
        codes = Quantize(bits=bits, group_size=16).codes(weight)
        weight.data = codes.pruned(keep).dequantize(weight.dtype)
        report.keep_masks[index, name] = keep
        report.quantized[index, name] = codes
    return report


def both_kinds(rows, columns, dtype, bits=4):
    """Packed values and packed codes."""
    values = PackedLinear.from_linear(pruned_linear(rows, columns, dtype, 0.5, bias=False))
    return values, PackedLinear.from_quantized(*pruned_codes(rows, columns, bits, None, 0.5), dtype)


def assert_same_weights(model, other):
    for (name, weight), (_, expected) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert weight.dtype == expected.dtype and torch.equal(weight, expected), name


def packed_folder(model, folder, report=None):
    pack(model, report)
    model.save_pretrained(folder)
    return folder


@settings(deadline=None, max_examples=400)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 200)), st.sampled_from([None, 2, 3, 4, 8]),
    st.sampled_from([None, 1, 2, 3]), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from(SETS), st.sampled_from([1, 2, 7, 40]), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_packed_weights_keep_their_bits_and_multiply_as_dense_ones(
    shape, bits, groups, dtype, sparsity, name, tokens, has_bias, seed
):
    rows, columns = shape
    linear = pruned_linear(rows, columns, dtype, sparsity, seed, has_bias)
    exact = linear.weight.double()
    with instruction_set(name):
        if bits is None:
            keep = (linear.weight != 0) | (random_inputs(*shape, seed=seed) < 0)  # a zero may be kept
            packed = PackedLinear.from_linear(linear, keep if groups else None)
        else:
            if groups:
                columns = groups * (64 if seed % 2 else columns)  # groups of whole words, and others
            codes, keep = pruned_codes(rows, columns, bits, columns // groups if groups else None, sparsity, seed)
            packed = PackedLinear.from_quantized(codes, keep, dtype, linear.bias)
            linear.weight = nn.Parameter(codes.pruned(keep).dequantize(dtype), requires_grad=False)
            exact = codes.pruned(keep).dequantize(torch.float32).double()
            assert np.bitwise_count(packed.mask.numpy()).sum() == keep.sum()  # a code of zero may be kept
        again, x = packed.unpack(), random_inputs(2, tokens, columns, seed=seed).to(dtype)
        out = packed(x)
    assert torch.equal(again.weight.view(torch.uint8), linear.weight.view(torch.uint8))
    assert (again.in_features, again.out_features) == (columns, rows)
    assert torch.equal(again.bias, linear.bias) if has_bias else again.bias is None
    expected = nn.functional.linear(x.double(), exact, linear.bias.double() if has_bias else None)
    assert out.dtype == dtype and out.shape == expected.shape
    limit = CLOSE[dtype] * (1 + float(expected.abs().max()))
    torch.testing.assert_close(out.double(), expected, rtol=CLOSE[dtype], atol=limit)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_integer_products_are_as_exact_as_their_dtype_for_inputs_with_outliers(name, scale, dtype, limit):
    codes, keep = pruned_codes(64, 4096, 8, None, 0.5)
    x = random_inputs(1, 4096)
    x[0, 7] = -1000
    x = (x * scale).to(dtype)
    with instruction_set(name):
        out = PackedLinear.from_quantized(codes, keep, dtype)(x).double()
    exact = x.double() @ codes.pruned(keep).dequantize(torch.float32).double().T
    assert (out - exact).norm() < limit * exact.norm()


def test_half_zeros_take_9_bits_and_joint_codes_3():
    values, codes = both_kinds(256, 4096, torch.bfloat16)
    assert values.nbytes * 8 / (256 * 4096) < 9.05 and codes.nbytes * 8 / (256 * 4096) < 3.08


def test_the_same_bits_on_any_number_of_threads():
    x, n_threads = random_inputs(3, 4096).bfloat16(), torch.get_num_threads()
    for packed in both_kinds(600, 4096, torch.bfloat16):
        outs = []
        for n in (1, 2, 1, 2):
            torch.set_num_threads(n)
            outs += [packed(x), torch.cat([packed(token[None]) for token in x])]
        torch.set_num_threads(n_threads)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_give_outputs_that_are_not(value):
    x = torch.ones(1, 64).bfloat16()
    x[0, 3] = value
    for packed in both_kinds(8, 64, torch.bfloat16):
        assert not torch.isfinite(packed(x)).any()


def test_threads_work_after_a_fork():
    code = """
import os, torch
from besa.packed import PackedLinear
torch.set_num_threads(2)
packed = PackedLinear.from_linear(torch.nn.Linear(1024, 1024).requires_grad_(False), torch.rand(1024, 1024) < 0.5)
x = torch.ones(1, 1024)
before = packed(x)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(packed(x), before) else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(packed(x), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_gradients_reach_the_inputs_and_copies_hold_the_same():
    linear, x = pruned_linear(5, 40, torch.float32, 0.5), random_inputs(3, 40).requires_grad_()
    packed = PackedLinear.from_linear(linear)
    gradients = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (linear, packed)]
    torch.testing.assert_close(*gradients)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        copied.load_state_dict(packed.state_dict())
        assert torch.equal(copied.dense(), linear.weight) and torch.equal(copied.bias, linear.bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_another_precision_converts_values_and_leaves_codes(dtype):
    linear, x = pruned_linear(5, 70, torch.float32, 0.5), torch.ones(2, 70, dtype=dtype)
    packed = PackedLinear.from_linear(linear).to(dtype)
    assert torch.equal(packed.dense(), linear.weight.to(dtype)) and packed(x).dtype == dtype
    codes, keep = pruned_codes(5, 70, 4, None, 0.5)
    packed = PackedLinear.from_quantized(codes, keep, torch.float32, linear.bias).to(dtype)
    assert torch.equal(packed.scale, codes.scale) and packed.bias.dtype == dtype
    assert torch.equal(packed.dense(), codes.pruned(keep).dequantize(dtype))


def test_damaged_tensors_are_refused():
    for packed in both_kinds(5, 70, torch.float32, bits=8):
        for name, change in (
            ("mask", lambda t: t[2, 1].bitwise_xor_(4)),
            ("mask", lambda t: t[2, -1].bitwise_xor_(128)),
            ("starts", lambda t: t[2].add_(1)),
            ("values", lambda t: t.resize_(len(t) - 1)),
        ):
            state = packed.state_dict() | {name: packed.get_buffer(name).clone()}
            change(state[name])
            with pytest.raises(ValueError, match="the tensors are damaged"):
                PackedLinear(70, torch.float32, **state)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cannot_be_packed_is_refused_and_the_model_stays_as_it_was(tiny_llama):
    hooked, patched, plain = (pruned_linear(4, 8, torch.float32, 0.5) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    for linear in (Doubled(8, 4), hooked, patched, plain.double(), nn.Linear(4, 4, device="meta")):
        with pytest.raises(ValueError, match="cannot be packed"):
            PackedLinear.from_linear(linear)
    prune_half(tiny_llama)
    tiny_llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"block 1, mlp.up_proj: .* cannot be packed"):
        pack(tiny_llama)
    assert not packed_projections(tiny_llama) and not hasattr(tiny_llama.config, "quantization_config")


@pytest.mark.parametrize("name", SETS)
@torch.no_grad()
def test_a_packed_model_answers_as_the_dense_one_and_unpacks_to_it(tiny_llama, windows, name):
    masks = prune_half(tiny_llama)
    dense, ids = copy.deepcopy(tiny_llama), windows[:2, :8]
    with instruction_set(name):
        pack(tiny_llama, masks)
        assert len(packed_projections(tiny_llama)) == 3 * 7
        torch.testing.assert_close(tiny_llama(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
        texts = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (dense, tiny_llama)]
        assert torch.equal(*texts)
        unpack(tiny_llama)
    assert_same_weights(tiny_llama, dense)


def test_reports_of_other_models_and_dense_models_are_refused(tiny_llama, windows):
    with pytest.raises(ValueError, match="no projection would be smaller"):
        pack(tiny_llama)
    with pytest.raises(ValueError, match=r"block 0, self_attn.q_proj: the report is of other weights"):
        pack(tiny_llama, {(0, "self_attn.q_proj"): torch.zeros(32, 32, dtype=torch.bool)})
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    tiny_llama.checkpoint_dtype = torch.bfloat16  # half of float32 values and a bit are more than that
    with pytest.raises(ValueError, match="its checkpoint's precision"):
        pack(tiny_llama, report)
    tiny_llama.checkpoint_dtype = None
    besa.pack(tiny_llama, report)
    with pytest.raises(ValueError, match="packed already"):
        pack(tiny_llama)


@torch.no_grad()
def test_a_packed_model_goes_through_a_compiler(tiny_llama, windows):
    prune_half(tiny_llama)
    pack(tiny_llama)
    compiled = torch.compile(tiny_llama, backend="aot_eager")(windows).logits
    torch.testing.assert_close(compiled, tiny_llama(windows).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_embedded_model_writes_the_same_text_packed(smollm2):
    model, tokenizer = copy.deepcopy(smollm2)
    model.checkpoint_dtype = None
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:6], 6
    for block in find_blocks(model):
        for projection in projections(block).values():
            weight = projection.weight.data
            weight[weight.abs() < weight.abs().quantile(0.5, dim=1, keepdim=True)] = 0
    ids = tokenizer(["The state of the union", "The first law of motion"], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    logits = model(expected).logits
    pack(model)
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), expected)
    torch.testing.assert_close(model(expected).logits, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_from_pretrained_gives_a_saved_packed_model_back(tiny_llama, windows, tmp_path, dtype, joint):
    model = tiny_llama.to(dtype)
    report = compress_jointly(model, bits=4) if joint else prune_half(model)
    dense = copy.deepcopy(model)
    loaded = AutoModelForCausalLM.from_pretrained(packed_folder(model, tmp_path / "1", report), dtype="auto")
    assert loaded.model.layers[0].mlp.up_proj.values.dtype == (torch.uint8 if joint else dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(model(windows).logits, dense(windows).logits, rtol=0, atol=atol)
    assert_same_weights(loaded, model)
    model.model.rotary_emb = loaded.model.rotary_emb  # its frequencies stay float32 if nothing is converted
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    pickle.loads(pickle.dumps(copy.deepcopy(loaded))).save_pretrained(tmp_path / "2")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "2", dtype="auto"), model)
    unpack(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("family", ["OPT", "GPTNeoX", "Gemma3", "GPTNeo"])
@torch.no_grad()
def test_models_of_every_family_answer_as_before_when_packed_saved_and_loaded(family, windows, tmp_path):
    from test_decoder import build

    model = build(family)
    masks, dense = prune_half(model), copy.deepcopy(model)
    loaded = AutoModelForCausalLM.from_pretrained(packed_folder(model, tmp_path, masks))
    assert len(packed_projections(loaded)) == len(masks)
    torch.testing.assert_close(loaded(windows).logits, dense(windows).logits, rtol=0, atol=1e-5)
    unpack(loaded)
    assert_same_weights(loaded, dense)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_head_of_8_bits_answers_as_its_dense_copy_and_holds_tied_embeddings(tiny_llama, windows, tmp_path, tied):
    prune_half(tiny_llama)
    if tied:
        tiny_llama.config.tie_word_embeddings = True
        tiny_llama.tie_weights()
    embeddings, head = (each.weight.clone() for each in (tiny_llama.model.embed_tokens, tiny_llama.lm_head))
    rounded = besa.Quantize(bits=8).codes(head).dequantize(head.dtype)
    besa.pack(tiny_llama, head=True)
    logits = tiny_llama(windows).logits
    tiny_llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(windows).logits, logits)
    assert torch.equal(*(m.generate(windows[:1, :4], max_new_tokens=5, do_sample=False) for m in (tiny_llama, loaded)))
    for model in (tiny_llama, copy.deepcopy(loaded)):
        besa.unpack(model)
        torch.testing.assert_close(model(windows).logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(model.lm_head.weight, rounded)
        assert (model.model.embed_tokens.weight is model.lm_head.weight) == model.config.tie_word_embeddings == tied
        assert tied or torch.equal(model.model.embed_tokens.weight, embeddings)


def test_a_damaged_folder_is_refused(tiny_llama, tmp_path):
    prune_half(tiny_llama)
    file = packed_folder(tiny_llama, tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(Exception, match="not fully covered"):  # of safetensors
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = safetensors.torch.load(content)
    tensors["model.layers.1.mlp.up_proj.mask"][3, 1:4] = 255
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: .* damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="packed format 1, not 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_pruned_checkpoint_is_packed_with_its_masks_and_codes(tiny_llama, windows, tmp_path, bits):
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"tokens")
    method, folder = besa.Wanda(quantize=besa.Quantize(bits=bits) if bits else None), tmp_path / "pruned"
    besa.prune_checkpoint(tmp_path / "source", folder, windows, method, progress=False, device="cpu")
    pack_folder(folder, tmp_path / "packed")
    sizes = [
        sum(file.stat().st_size for file in tmp_path.glob(f"{name}/*.safetensors")) for name in ("packed", "pruned")
    ]
    assert 0 < sizes[0] < sizes[1]
    assert (tmp_path / "packed" / "tokenizer.model").read_bytes() == b"tokens"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    assert model.model.layers[1].mlp.up_proj.values.dtype == (torch.uint8 if bits else torch.bfloat16)
    unpack(model)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    for source, output, words in (
        (folder, "packed", "exists; name a new folder"),
        (tmp_path / "packed", "again", "is packed already"),
        (tmp_path / "source", "again", "no projection would be smaller"),
    ):
        with pytest.raises(ValueError, match=words):
            pack_folder(source, tmp_path / output)
    assert not (tmp_path / "again").exists()


def test_any_checkpoint_with_zeros_is_packed_and_load_model_reads_it(tiny_llama, smollm2, tmp_path):
    prune_half(tiny_llama)
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.tie_weights()
    besa.save_model(tiny_llama, smollm2[1], tmp_path / "zeros")
    pack_folder(tmp_path / "zeros", tmp_path / "packed")
    model, _ = besa.load_model(str(tmp_path / "packed"), "float32", "cpu")
    assert len(packed_projections(model)) == 3 * 7
    besa.unpack(model)
    assert_same_weights(model, tiny_llama)


def test_a_pruned_checkpoint_is_rounded_while_it_is_packed(tiny_llama, smollm2, windows, tmp_path):
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    besa.save_model(tiny_llama, smollm2[1], tmp_path / "pruned")
    pack_folder(tmp_path / "pruned", tmp_path / "packed", 4, windows)
    besa.pack(tiny_llama, besa.quantize_pruned(tiny_llama, report, windows, 4, progress=False))
    model, _ = besa.load_model(str(tmp_path / "packed"), "float32", "cpu")
    assert_same_weights(model, tiny_llama)
