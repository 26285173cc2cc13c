import copy
import functools
import itertools
import json
import operator
import pickle
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from test_decoder import ARCHITECTURES, build
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import besa
from besa import packed as packed_module
from besa import packed_kernels as kernels
from besa.__main__ import app
from besa.checkpoint.pack import pack_checkpoint
from besa.decoder import find_blocks, projections
from besa.packed import PADDING, PackedLinear, pack, unpack
from besa.packed_files import save_packed
from besa.quantize import Quantize
from besa.report import Report

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATHS = [path for path in ("avx512", "avx2", "none") if path in ("none", "avx2", kernels.instructions())]
PATHS = PATHS if kernels.instructions() != "none" else ["none"]
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def measured_elsewhere(tmp_path_factory):
    """Crossovers that tests measure are not kept for the user."""
    folder, kept = tmp_path_factory.mktemp("cache"), packed_module.cache_folder
    packed_module.cache_folder = lambda: folder
    yield
    packed_module.cache_folder = kept


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this processor has neither")
        yield


class on_path:
    """The products that a processor with other instructions takes."""

    def __init__(self, path):
        self.path, self.kept = path, kernels.instructions

    def __enter__(self):
        kernels.instructions = lambda: self.path

    def __exit__(self, *error):
        kernels.instructions = self.kept


def pruned_linear(rows, columns, dtype, sparsity, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, columns, generator=generator))
    linear.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return linear


def pruned_codes(rows, columns, bits, group_size, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    quantized = Quantize(bits=bits, group_size=group_size).codes(torch.randn(rows, columns, generator=generator))
    return quantized, torch.rand(rows, columns, generator=generator) >= sparsity


def bits_of(tensor):
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 200))
sparsities = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
seeds = st.integers(0, 1000)
products = st.sampled_from(["packed", "tiles", "dense"])
tiled = pytest.mark.skipif(kernels.instructions() != "avx512", reason="no wide registers here")


@settings(deadline=None, max_examples=150)
@given(shapes, st.sampled_from(DTYPES), sparsities, st.sampled_from(PATHS), st.booleans(), seeds)
def test_what_is_unpacked_has_the_bits_that_were_packed(shape, dtype, sparsity, path, bias, seed):
    linear = pruned_linear(*shape, dtype, sparsity, seed, bias)
    with on_path(path):
        again = PackedLinear.from_linear(linear).unpack()
    assert torch.equal(bits_of(again.weight), bits_of(linear.weight))
    assert again.weight.shape == shape and (again.in_features, again.out_features) == shape[::-1]
    assert torch.equal(again.bias, linear.bias) if bias else again.bias is None


@settings(deadline=None, max_examples=150)
@given(
    shapes, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 1, 2, 3]), st.sampled_from(DTYPES), sparsities,
    st.sampled_from(PATHS), seeds,
)  # fmt: skip
def test_codes_give_the_weights_of_the_joint_model(shape, bits, groups, dtype, sparsity, path, seed):
    rows, columns = shape
    if groups:
        columns = groups * (64 if seed % 2 else columns)  # groups of whole words, and others
    quantized, keep = pruned_codes(rows, columns, bits, columns // groups if groups else None, sparsity, seed)
    with on_path(path):
        packed = PackedLinear.from_quantized(quantized, keep, dtype)
        weight = packed.unpack().weight
    assert torch.equal(bits_of(weight), bits_of(quantized.pruned(keep).dequantize(dtype)))
    assert torch.equal(packed_module._keep_mask(packed.mask)[:, :columns], keep)  # a code of zero may be kept


@settings(deadline=None, max_examples=150)
@given(shapes, st.sampled_from(DTYPES), sparsities, st.sampled_from(PATHS), st.integers(1, 40), seeds, products)
def test_products_are_those_of_the_dense_weight(shape, dtype, sparsity, path, tokens, seed, product):
    linear = pruned_linear(*shape, dtype, sparsity, seed)
    x = torch.randn(2, tokens, shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    with on_path(path):
        packed = PackedLinear.from_linear(linear)
        packed._fastest = lambda n: product if product in packed._products() else "dense"
        out = packed(x)
    expected = linear.double()(x.double())
    assert out.dtype == dtype and out.shape == (2, tokens, shape[0])
    torch.testing.assert_close(
        out.double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * float(expected.abs().max())
    )


@settings(deadline=None, max_examples=150)
@given(
    shapes, st.sampled_from([3, 4, 8]), st.sampled_from([None, 64, 128]), st.sampled_from(DTYPES), sparsities,
    st.sampled_from(PATHS), st.integers(1, 40), seeds, products,
)  # fmt: skip
def test_products_of_codes_are_those_of_the_dense_weight(
    shape, bits, group, dtype, sparsity, path, tokens, seed, product
):
    rows, columns = shape[0], 128 * (1 + shape[1] // 64) if group else shape[1]
    quantized, keep = pruned_codes(rows, columns, bits, group, sparsity, seed)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with on_path(path):
        packed = PackedLinear.from_quantized(quantized, keep, dtype, bias)
        packed._fastest = lambda n: product if product in packed._products() else "packed"
        out = packed(x).double()
    expected = x.double() @ quantized.pruned(keep).dequantize(torch.float32).double().T + bias.double()
    torch.testing.assert_close(
        out, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * (1e-2 + float(expected.abs().max()))
    )


def test_half_zeros_take_9_bits_and_joint_codes_3():
    packed = PackedLinear.from_linear(pruned_linear(256, 4096, torch.bfloat16, 0.5, bias=False))
    assert packed.nbytes * 8 / (256 * 4096) < 9.05
    packed = PackedLinear.from_quantized(*pruned_codes(256, 4096, 4, None, 0.5), torch.bfloat16)
    assert packed.nbytes * 8 / (256 * 4096) < 3.08


def test_a_mask_prunes_and_may_keep_a_zero():
    linear = pruned_linear(4, 70, torch.bfloat16, 0.5)
    keep = torch.rand(4, 70, generator=torch.Generator().manual_seed(3)) < 0.5
    packed = PackedLinear.from_linear(linear, keep)
    assert torch.equal(packed.dense(), linear.weight * keep)
    assert len(packed.values) == keep.sum() + PADDING


@pytest.mark.parametrize("product", ["packed", pytest.param("tiles", marks=tiled)])
def test_the_same_bits_every_time_and_on_any_number_of_threads(product):
    packed = PackedLinear.from_linear(pruned_linear(600, 4096, torch.bfloat16, 0.5))
    x = torch.randn(3, 4096).bfloat16()
    outs, n_threads = [], torch.get_num_threads()
    for n in (1, 2, 1, 2):
        torch.set_num_threads(n)
        outs += [packed._products()[product](x), packed._products()[product](x[:2])]
    torch.set_num_threads(n_threads)
    assert all(torch.equal(out, outs[0]) for out in outs[::2])
    assert all(torch.equal(out, outs[1]) for out in outs[1::2])


def test_infinite_inputs_come_out_as_from_the_dense_projection():
    linear = pruned_linear(8, 64, torch.bfloat16, 0.5)
    x = torch.ones(1, 64).bfloat16()
    x[0, 3] = float("inf")
    assert torch.equal(torch.isfinite(PackedLinear.from_linear(linear)(x)), torch.isfinite(linear(x)))


def test_many_tokens_take_slices_of_rows(monkeypatch):
    linear = pruned_linear(37, 100, torch.float32, 0.5)
    x = torch.randn(50, 100)
    monkeypatch.setattr(packed_module, "SCRATCH", 1000)  # 7 rows of 128
    monkeypatch.setattr(packed_module, "BLOCK", 1)
    packed, dense, slices = PackedLinear.from_linear(linear), PackedLinear.dense, []
    monkeypatch.setattr(PackedLinear, "dense", lambda *given: slices.append(given[1:3]) or dense(*given))
    torch.testing.assert_close(packed._multiply_dense(x), linear(x))
    assert slices == [*itertools.pairwise([0, 7, 14, 21, 28, 35, 37])]


def test_gradients_reach_the_inputs():
    linear = pruned_linear(5, 40, torch.float32, 0.5)
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    (found,) = torch.autograd.grad(PackedLinear.from_linear(linear)(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_copies_pickles_and_state_dicts_hold_the_same():
    linear, other = pruned_linear(5, 70, torch.bfloat16, 0.5), pruned_linear(5, 70, torch.bfloat16, 0.9, seed=1)
    packed = PackedLinear.from_linear(linear)
    packed(torch.ones(1, 70).bfloat16())
    loaded = PackedLinear.from_linear(other)
    loaded.load_state_dict(packed.state_dict())
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
        assert torch.equal(copied.dense(), linear.weight) and torch.equal(copied.bias, linear.bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_another_precision_converts_values_and_leaves_codes(dtype):
    linear = pruned_linear(5, 70, torch.float32, 0.5)
    packed = PackedLinear.from_linear(linear).to(dtype)
    assert (
        torch.equal(packed.dense(), linear.weight.to(dtype)) and packed(torch.ones(2, 70, dtype=dtype)).dtype == dtype
    )
    quantized, keep = pruned_codes(5, 70, 4, None, 0.5)
    packed = PackedLinear.from_quantized(quantized, keep, torch.float32, linear.bias).to(dtype)
    assert torch.equal(packed.scale, quantized.scale) and packed.bias.dtype == dtype
    assert torch.equal(packed.dense(), quantized.pruned(keep).dequantize(dtype))


def damaged(state, name):
    state = {key: value.clone() for key, value in state.items()}
    if name == "mask":
        state["mask"][2, 1] ^= 4
    elif name == "padding":
        state["mask"][2, -1] |= 128
    elif name == "starts":
        state["starts"][2] += 1
    else:
        state["values"] = state["values"][:-1]
    return state


@pytest.mark.parametrize(
    "name, told", [("mask", "row 2"), ("padding", "last of 70"), ("starts", "row 1"), ("values", "values has")]
)
@pytest.mark.parametrize("codes", [False, True])
def test_damaged_tensors_are_refused_by_name(name, told, codes):
    if codes:
        packed = PackedLinear.from_quantized(*pruned_codes(5, 70, 4, None, 0.5), torch.float32)
    else:
        packed = PackedLinear.from_linear(pruned_linear(5, 70, torch.float32, 0.5))
    state = damaged(packed.state_dict(), name)
    if (
        codes
        and name == "mask"
        and torch.equal(packed_module._sizes(state["mask"], torch.uint8)[2:3], packed.starts.diff()[2:3])
    ):
        state["mask"][2, 1] ^= 2 ^ 8  # an odd count takes the room of the next even one
    with pytest.raises(ValueError, match=told):
        PackedLinear(70, torch.float32, **state)
    with pytest.raises(RuntimeError, match=f"mlp.0: .*{told}"):
        nn.ModuleDict({"mlp": nn.ModuleList([packed])}).load_state_dict({f"mlp.0.{k}": v for k, v in state.items()})
    if name != "values":
        packed.get_buffer("starts" if name == "starts" else "mask").copy_(
            state["starts" if name == "starts" else "mask"]
        )
        with pytest.raises(ValueError, match=told):
            packed(torch.ones(1, 70))


def test_what_cannot_be_packed_is_refused(no_type_checks):
    linear = pruned_linear(4, 8, torch.float32, 0.5)
    with pytest.raises(ValueError, match="the keep_mask is"):
        PackedLinear.from_linear(linear, torch.ones(4, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="float64"):
        PackedLinear.from_linear(linear.double())
    with pytest.raises(ValueError, match="meta"):
        PackedLinear.from_linear(nn.Linear(4, 4, device="meta"))


def test_a_processor_without_instructions_is_told_once():
    packed_module._tell_that_nothing_is_faster.cache_clear()
    with on_path("none"), pytest.warns(UserWarning, match="neither AVX2 nor AVX-512") as told:
        for _ in range(3):
            PackedLinear.from_linear(pruned_linear(4, 8, torch.float32, 0.5))
    assert len(told) == 1


@pytest.mark.skipif(kernels.instructions() == "none", reason="nothing is compiled here")
def test_the_fastest_product_is_measured_once_on_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(packed_module, "cache_folder", lambda: tmp_path)
    packed = PackedLinear.from_linear(pruned_linear(64, 128, torch.bfloat16, 0.5))
    packed(torch.ones(1, 128).bfloat16())
    found = packed._fastest(9)
    assert found in packed._products()
    packed_module._known_products.cache_clear()  # another process
    monkeypatch.setattr(packed_module, "_measure_products", lambda *_: pytest.fail("measured again"))
    assert packed._fastest(16) == found
    (path,) = (tmp_path / "packed").glob("products-*.json")
    path.write_text(json.dumps({"another's": "dense"}))  # which began before this one wrote, and wrote after it
    monkeypatch.setattr(packed_module, "_measure_products", lambda *_: "packed")
    packed_module._fastest("new", packed, 1)
    assert json.loads(path.read_text()).keys() > {"another's"}
    path.write_text("[]")
    packed_module._known_products.cache_clear()
    assert packed_module._fastest("new", packed, 1) == "packed"


@tiled
@pytest.mark.parametrize("registers", ([kernels.tile_shapes] if kernels.has_tiles() else []) + [lambda: None])
@pytest.mark.parametrize("codes", [False, True])
def test_tiles_hold_many_rows_and_tokens_beside_torchs_own(monkeypatch, codes, registers):
    """More rows than are dense at a time, more tokens than a pass takes, and torch's tile registers in between."""
    monkeypatch.setattr(kernels, "tile_shapes", registers)
    if codes:
        packed = PackedLinear.from_quantized(*pruned_codes(301, 640, 4, 128, 0.5), torch.bfloat16)
    else:
        packed = PackedLinear.from_linear(pruned_linear(301, 640, torch.bfloat16, 0.5))
    linear, x = packed.unpack(), torch.randn(530, 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    for n in (530, 33, 2):
        before = nn.functional.linear(x[:n], linear.weight)
        out = packed._multiply_tiles(x[:n])
        assert torch.equal(nn.functional.linear(x[:n], linear.weight), before)
        torch.testing.assert_close(out, linear(x[:n]), rtol=1e-2, atol=1e-2 * float(out.abs().max()))


def prune_half(model):
    """Keep-masks of a random half, which is set to 0."""
    generator, masks = torch.Generator().manual_seed(0), {}
    for index, block in enumerate(find_blocks(model)):
        for name, projection in projections(block).items():
            masks[index, name] = torch.rand(projection.weight.shape, generator=generator) < 0.5
            projection.weight.data[~masks[index, name]] = 0
    return masks


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_a_packed_model_answers_as_the_dense_one_and_unpacks_to_it(tiny_llama, windows, path):
    masks = prune_half(tiny_llama)
    dense, ids = copy.deepcopy(tiny_llama), windows[:2, :8]
    with on_path(path):
        pack(tiny_llama, masks)
        assert sum(isinstance(module, PackedLinear) for module in tiny_llama.modules()) == 3 * 7
        torch.testing.assert_close(tiny_llama(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
        texts = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (dense, tiny_llama)]
        assert torch.equal(*texts)
        unpack(tiny_llama)
    for (name, weight), (_, expected) in zip(tiny_llama.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(weight, expected), name


class JointReport(Report):
    """What a report of joint compression has."""

    def __init__(self, model, bits):
        self.keep_masks, self.quantized = prune_half(model), {}
        for index, block in enumerate(find_blocks(model)):
            for name, projection in projections(block).items():
                quantized = Quantize(bits=bits, group_size=16).codes(projection.weight)
                self.quantized[index, name] = quantized
                keep = self.keep_masks[index, name]
                projection.weight.data = quantized.pruned(keep).dequantize(projection.weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_jointly_compressed_model_packs_to_its_codes(tiny_llama, windows, dtype):
    report = JointReport(tiny_llama.to(dtype), bits=4)
    dense = copy.deepcopy(tiny_llama)
    pack(tiny_llama, report)
    assert tiny_llama.model.layers[0].mlp.up_proj.values.dtype == torch.uint8
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(tiny_llama(windows).logits, dense(windows).logits, rtol=0, atol=atol)


def test_only_what_shrinks_is_packed_and_a_foreign_report_is_refused(tiny_llama, tmp_path):
    with pytest.raises(
        ValueError, match="no projection of this model would be smaller packed: it has too few zeros; prune it"
    ):
        pack(tiny_llama)
    assert not any(isinstance(module, PackedLinear) for module in tiny_llama.modules())
    with pytest.raises(ValueError, match=r"nothing in this model is packed: call besa.pack\(model, report\) first"):
        save_packed(tiny_llama, tmp_path)
    masks = {(0, "self_attn.q_proj"): torch.zeros(32, 32, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"block 0, self_attn.q_proj: the report is of other weights"):
        pack(tiny_llama, masks)
    with pytest.raises(ValueError, match=r"block 3, self_attn.q_proj: no such projection"):
        pack(tiny_llama, {(3, "self_attn.q_proj"): masks[0, "self_attn.q_proj"]})


def test_a_refused_report_leaves_the_model_dense_and_a_second_packing_is_told(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Wanda(sparsity=0.6), progress=False)
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    last = 2, "mlp.down_proj"
    wrong = {**report.keep_masks, last: ~report.keep_masks[last]}
    with pytest.raises(ValueError, match=r"block 2, mlp.down_proj: the report is of other weights"):
        besa.pack(tiny_llama, wrong)
    after = tiny_llama.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    besa.pack(tiny_llama, report)
    with pytest.raises(ValueError, match=r"this model is packed already; besa.unpack\(model\) makes it dense"):
        besa.pack(tiny_llama, report)


def test_a_thread_that_asks_while_another_looks_the_tensors_through_gets_the_same(monkeypatch):
    linear = nn.Linear(96, 64, bias=False).bfloat16().requires_grad_(False)
    packed = copy.deepcopy(PackedLinear.from_linear(linear, torch.rand(64, 96) < 0.5))  # nothing was looked through
    x, others, prefer = torch.ones(1, 96, dtype=torch.bfloat16), [], packed_module.prefer_large_pages

    def ask_meanwhile(tensor):
        monkeypatch.setattr(packed_module, "prefer_large_pages", prefer)
        with ThreadPoolExecutor(1) as pool:
            others.append(pool.submit(packed, x).result())
        prefer(tensor)

    monkeypatch.setattr(packed_module, "prefer_large_pages", ask_meanwhile)
    assert torch.equal(packed(x), packed(x)) and len(others) == 1 and torch.equal(others[0], packed(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_goes_through_a_compiler(tiny_llama, windows, dtype):
    model = tiny_llama.to(dtype)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    besa.pack(model, besa.prune(model, windows, besa.Wanda(sparsity=0.6), progress=False))
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(windows).logits
        assert torch.allclose(compiled, model(windows).logits, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@torch.no_grad()
def test_the_embedded_model_writes_the_same_text_packed(smollm2):
    """Six of its blocks."""
    dense, tokenizer = smollm2
    model = copy.deepcopy(dense)
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


def packed_folder(model, folder, report=None):
    pack(model, report)
    save_packed(model, folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_from_pretrained_gives_a_saved_packed_model_back(tiny_llama, windows, tmp_path, dtype):
    for joint in (True, False):
        model = copy.deepcopy(tiny_llama).to(dtype)
        report = JointReport(model, bits=4) if joint else prune_half(model)
        loaded = AutoModelForCausalLM.from_pretrained(packed_folder(model, tmp_path / str(joint), report), dtype="auto")
        for (name, tensor), (_, expected) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
        model.model.rotary_emb = loaded.model.rotary_emb  # its frequencies stay float32 only where nothing is converted
        assert torch.equal(loaded(windows).logits, model(windows).logits)
        assert torch.equal(*[m.generate(windows[:2, :5], max_new_tokens=8, do_sample=False) for m in (loaded, model)])
        packed_folder(loaded, tmp_path / "again")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_models_of_every_architecture_answer_as_before_when_packed_saved_and_loaded(architecture, windows, tmp_path):
    model = build(architecture)
    masks = prune_half(model)
    dense = copy.deepcopy(model)
    loaded = AutoModelForCausalLM.from_pretrained(packed_folder(model, tmp_path, masks))
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == len(masks)
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    torch.testing.assert_close(loaded(windows).logits, dense(windows).logits, rtol=0, atol=1e-5)
    unpack(loaded)
    for name, weight in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("joint", [False, True])
@torch.no_grad()
def test_a_damaged_folder_is_refused_by_name(tiny_llama, tmp_path, joint):
    report = JointReport(tiny_llama, bits=4) if joint else prune_half(tiny_llama)
    file = packed_folder(tiny_llama, tmp_path, report) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    file.write_bytes(content[:4])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    file.write_bytes(content.replace(b"up_proj.starts", b"up_proj.startz", 1))  # transformers would make random ones
    with pytest.raises(ValueError, match=r"describes \d+ tensors called starts, the files hold \d+"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = safetensors.torch.load(content)
    tensors["model.layers.1.mlp.up_proj.mask"][3, 0] ^= 0b111  # by an odd number; a byte holds two codes
    tensors["model.layers.1.mlp.up_proj.mask"][3, 1:4] = 255
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: .*row 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="packed format 2 is not 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ((), None, "projections in config.json's quantization_config is None, no JSON object"),
        ((), ["up_proj"], "no JSON object"),
        ((UP,), None, f"config.json describes no packed projection as {UP}: "),
        ((UP,), {}, f"no packed projection as {UP}: 'tensors'"),
        (("model.layers.9.mlp.up_proj",), {}, "no packed projection as model.layers.9.mlp.up_proj"),
        (("model.norm",), None, "no packed projection as model.norm"),
        ((UP, "in_features"), 33, f"config.json describes {UP} as PackedLinear.in_features=33, .* where the model has"),
        ((UP, "in_features"), "32", f"config.json describes {UP} as PackedLinear"),
        ((UP, "dtype"), "int64", f"no packed projection as {UP}: dtype torch.int64 is not one of"),
        ((UP, "dtype"), "nn", f"no packed projection as {UP}: dtype <module"),
        ((UP, "tensors", "mask"), ["uint8", 8], f"config.json describes {UP} as PackedLinear"),
        ((UP, "tensors", "mask"), ["uint8", -8, 8], f"no packed projection as {UP}: "),
        ((UP, "tensors", "mask"), ["uint8"], f"no packed projection as {UP}: "),
        ((UP, "tensors", "mask"), [], f"no packed projection as {UP}: "),
        ((UP, "tensors", "other"), ["uint8", 8], f"no packed projection as {UP}: "),
        ((UP, "tensors", "mask"), ["uint8", 2**70], f"no packed projection as {UP}: "),
    ],
)
def test_a_damaged_description_is_refused_by_name(tiny_llama, tmp_path, no_type_checks, place, value, words):
    path = packed_folder(tiny_llama, tmp_path, prune_half(tiny_llama)) / "config.json"
    config = json.loads(path.read_text())
    *parents, last = "quantization_config", "projections", *place
    functools.reduce(operator.getitem, parents, config)[last] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_packed_projections_is_not_saved_as_packed(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="nothing in this model is packed"):
        save_packed(tiny_llama, tmp_path)


def test_a_packed_model_is_not_saved_to_a_file(tiny_llama, tmp_path):
    prune_half(tiny_llama)
    pack(tiny_llama)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file' is a file; name a folder"):
        save_packed(tiny_llama, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_importing_besa_behind_transformers_is_enough(tiny_llama, tmp_path):
    """Before it is what an installed one does, in test_package.py."""
    prune_half(tiny_llama)
    packed_folder(tiny_llama, tmp_path)
    code = "from transformers import AutoModelForCausalLM; import besa"
    code += f"; print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).model.layers[0].mlp.up_proj)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("PackedLinear(in_features=32, out_features=80")


def read_by_the_documents(folder, name):
    """A projection's dense float32 weight by numpy alone, from what besa/packed.py and packed_files.py document."""
    file, kinds = (folder / "model.safetensors").read_bytes(), {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I64": "<i8"}
    (length,) = struct.unpack("<Q", file[:8])
    parts = {}
    for key, entry in json.loads(file[8 : 8 + length]).items():
        if key.rpartition(".")[0] == name:
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            stored = np.frombuffer(file[start:end], kinds.get(entry["dtype"], "u1")).reshape(entry["shape"])
            is_bfloat16 = entry["dtype"] == "BF16"
            parts[key.rpartition(".")[2]] = (stored.astype("u4") << 16).view("f4") if is_bfloat16 else stored
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["projections"][name]
    columns, values = config["in_features"], parts["values"][:-64]
    kept = np.unpackbits(parts["mask"], axis=1, bitorder="little")  # (rows, columns up to a multiple of 64)
    if config["tensors"]["values"][0] == "uint8":  # two codes a byte; a word of 64 columns starts a new one
        counts = kept.reshape(-1, 64).sum(1)
        ends = (2 * ((counts + 1) // 2)).cumsum()
        halves = np.stack([values & 15, values >> 4], 1).flatten()
        values = np.delete(halves, ends[counts % 2 == 1] - 1)
    weight = np.zeros((len(kept), columns), "f4")
    weight[kept[:, :columns] == 1] = values
    if "scale" in parts:
        size = columns // parts["scale"].shape[1]
        scale, zero = (parts[part].astype("f4").repeat(size, axis=1) for part in ("scale", "zero_point"))
        weight = np.where(kept[:, :columns] == 1, scale * (weight - zero), 0)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("bits", [None, 4, 8])
@torch.no_grad()
def test_a_reader_written_from_the_documents_reads_a_file(tiny_llama, tmp_path, bits):
    model = tiny_llama.to(torch.bfloat16)
    report = JointReport(model, bits) if bits else prune_half(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "_proj" in name}
    packed_folder(model, tmp_path, report)
    for name, weight in weights.items():
        assert torch.equal(read_by_the_documents(tmp_path, name.removesuffix(".weight")).bfloat16(), weight), name


@torch.no_grad()
def test_a_packed_model_saves_itself_and_an_unpacked_one_as_any_other(tiny_llama, windows, tmp_path):
    prune_half(tiny_llama)
    dense = copy.deepcopy(tiny_llama)
    pack(tiny_llama)
    for number, model in enumerate([tiny_llama, copy.deepcopy(tiny_llama), pickle.loads(pickle.dumps(tiny_llama))]):
        model.save_pretrained(tmp_path / str(number))
        assert not hasattr(model.config, "quantization_config")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(windows).logits, tiny_llama(windows).logits)
        loaded.save_pretrained(tmp_path / "again")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").model.layers[0].mlp.up_proj.nbytes
    unpack(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "dense")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(windows).logits, dense(windows).logits)


@torch.no_grad()
def test_what_is_packed_loads_and_saves_without_its_head(tiny_llama, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_module, "_fastest", lambda *_: "dense")  # measured, another may win on a busy machine
    prune_half(tiny_llama)
    states = tiny_llama.model(windows).last_hidden_state
    pack(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "whole")
    tiny_llama.model.save_pretrained(tmp_path / "base")
    for folder in ("whole", "base"):
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert isinstance(base.layers[0].mlp.up_proj, PackedLinear)
        assert torch.equal(base(windows).last_hidden_state, states)
    base.save_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(model.model(windows).last_hidden_state, states)
    unpack(tiny_llama)
    tiny_llama.model.save_pretrained(tmp_path / "dense")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "dense")(windows).last_hidden_state, states)


@pytest.fixture
def pruned_folder(tiny_llama, windows, tmp_path):
    """What `prune_checkpoint` leaves of a model with a tokenizer beside it, by method."""
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"tokens")

    def prune(method):
        folder = tmp_path / "pruned"
        besa.prune_checkpoint(tmp_path / "source", folder, windows, method, progress=False, device="cpu")
        return folder

    return prune


@pytest.mark.parametrize("bits", [None, 4])
def test_pack_writes_a_pruned_checkpoint_block_by_block(no_type_checks, pruned_folder, tmp_path, bits):
    folder = pruned_folder(besa.Wanda(quantize=besa.Quantize(bits=bits) if bits else None))
    result = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "packed")], catch_exceptions=False)
    assert result.exit_code == 0 and "MiB of weights" in result.stdout
    assert (tmp_path / "packed" / "tokenizer.model").read_bytes() == b"tokens"
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    projection = model.model.layers[1].mlp.up_proj
    assert projection.values.dtype == (torch.uint8 if bits else torch.bfloat16)
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) == 3 + 1
    save_packed(model, tmp_path / "saved")  # says the same of itself
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    unpack(model)
    for (name, weight), (_, expected) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(weight, expected), name


def test_pack_takes_any_checkpoint_with_zeros_and_load_model_gives_it_packed_or_dense(
    tiny_llama, smollm2, tmp_path, windows
):
    prune_half(tiny_llama)
    tiny_llama.config.tie_word_embeddings = True  # one matrix, which counts once
    tiny_llama.tie_weights()
    tiny_llama.save_pretrained(tmp_path / "zeros")
    smollm2[1].save_pretrained(tmp_path / "zeros")
    before, after = pack_checkpoint(tmp_path / "zeros", tmp_path / "packed")
    assert after < before == (tmp_path / "zeros" / "model.safetensors").stat().st_size
    packed, _ = besa.load_model(str(tmp_path / "packed"), "float32", "cpu")
    dense, _ = besa.load_model(str(tmp_path / "packed"), "float32", "cpu", packed=False)
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)
    for (name, weight), (_, expected) in zip(dense.state_dict().items(), tiny_llama.state_dict().items(), strict=True):
        assert torch.equal(weight, expected), name


def test_pack_refuses_what_it_cannot_do_and_leaves_nothing(tiny_llama, pruned_folder, tmp_path):
    folder = pruned_folder(besa.Wanda())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="too few zeros"):
        pack_checkpoint(tmp_path / "source", tmp_path / "packed")
    with pytest.raises(ValueError, match="lies in or around"):
        pack_checkpoint(folder, folder / "packed")
    masks = sorted((folder / "besa").glob("masks-*"))
    masks[0].write_bytes(masks[1].read_bytes().replace(b'"1.', b'"0.').replace(b'\\"1.', b'\\"0.'))
    with pytest.raises(ValueError, match=r"block 0, .*: the report is of other weights"):
        pack_checkpoint(folder, tmp_path / "packed")
    assert sorted(tmp_path.iterdir()) == before


def test_a_packed_folder_is_no_source_but_told_how_to_become_dense(pruned_folder, tmp_path, windows):
    pack_checkpoint(pruned_folder(besa.Wanda(sparsity=0.6)), tmp_path / "packed")
    for work in (pack_checkpoint, functools.partial(besa.prune_checkpoint, windows=windows, method=besa.Wanda())):
        with pytest.raises(ValueError, match=r"is packed; make it dense: besa.load_model\(.*packed=False\)"):
            work(tmp_path / "packed", tmp_path / "out")


def test_a_packed_model_is_not_pruned_but_told_how_to_become_dense(tiny_llama, windows):
    prune_half(tiny_llama)
    pack(tiny_llama)
    told = "block 0, self_attn.q_proj: a PackedLinear is not a torch.nn.Linear .*; a packed model becomes dense"
    with pytest.raises(ValueError, match=told):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    find_blocks(tiny_llama)[0].mlp.down_proj = torch.nn.Linear(48, 32, bias=False)  # what was too dense to pack
    with pytest.raises(ValueError, match=told):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


RESIDENT = """
import ctypes, gc, sys
import psutil, torch
import besa.packed
from transformers import AutoModelForCausalLM

model = None
for _ in range(2):  # the first round loads libraries and compiled code, too
    model = None
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    model(torch.ones(1, 1, dtype=torch.int64))
    ctypes.CDLL(None).malloc_trim(0)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to give memory back")
@pytest.mark.parametrize("joint", [False, True])
@torch.no_grad()
def test_a_loaded_model_takes_the_memory_of_its_file(tmp_path, joint):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64)).to(torch.bfloat16)
    folder = packed_folder(model, tmp_path, JointReport(model, 4) if joint else prune_half(model))
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(folder)], capture_output=True, text=True, check=True)
    size = (folder / "model.safetensors").stat().st_size
    assert int(done.stdout) < 1.1 * size + 2e6
