"""The loop over the blocks: every method, several families, precision, threads, and what is refused."""

import contextlib
import copy
import dataclasses
import multiprocessing

import pytest
import torch
from test_decoder import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import besa
from besa import kernels
from besa.decoder import find_blocks, projections
from besa.system import deterministic

METHODS = {
    "besa": besa.Besa(),
    "layer-wise": besa.Besa.layer_wise(d_coef=50.0),
    "groups of 8 rows": besa.Besa(row_group=8, importance="sparsegpt", epochs=2),
    "unsmoothed": besa.Besa(sparsity=0.45, smooth=False, importance="magnitude", candidates=51),
    "4 bits": besa.Besa(quantize=besa.Quantize(bits=4)),
    "exact": besa.Exact(),
    "closed": besa.Closed(),
    "2:4": besa.Exact(pattern="2:4"),
    "magnitude": besa.Magnitude(),
    "wanda": besa.Wanda(),
    "sparsegpt": besa.SparseGPT(),
}
KEEPING_VALUES = METHODS.keys() - {"closed", "sparsegpt", "4 bits"}


def prune(model, windows, method, **options):
    return besa.prune(model, windows, method, progress=False, **options)


def assert_equal(model, other):
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_only_projections_change_and_the_report_counts_their_zeros(tiny_llama, windows, name):
    dense, twin = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    report = prune(tiny_llama, windows, METHODS[name])
    frame = report.to_frame().set_index(["block", "projection"])
    assert len(frame) == len(report.keep_masks) == 3 * 7
    for key, value in tiny_llama.state_dict().items():
        if "_proj" not in key:
            assert torch.equal(value, dense.state_dict()[key])
    for (index, projection), keep_mask in report.keep_masks.items():
        before, after = (projections(find_blocks(model)[index])[projection].weight for model in (dense, tiny_llama))
        row = frame.loc[index, projection]
        assert row["zeros"] == (~keep_mask).sum() and not after[~keep_mask].any()
        if name in KEEPING_VALUES:
            assert torch.equal(after, before * keep_mask)
        assert 0 < row["projection_error"] < 1 and 0 < row["block_error"] < 1
    assert report.sparsity == pytest.approx(METHODS[name].sparsity, abs=0.06)
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    prune(twin, windows, METHODS[name])
    assert_equal(twin, tiny_llama)  # to the bit


@pytest.mark.parametrize("family", ["GPTNeo", "OPT", "Gemma3", "GPTNeoX", "Qwen3"])
def test_other_families_are_pruned(windows, family):
    model, windows = build(family), windows.clamp_min(1)
    dense = copy.deepcopy(model)
    report = prune(model, windows, besa.Besa())
    assert report.sparsity == pytest.approx(0.5, abs=0.06) and len(report.steps) == 3 * 6
    with torch.no_grad():
        hidden = [each(windows, output_hidden_states=True).hidden_states[1] for each in (dense, model)]
    errors = [besa.losses.reconstruction_error(hidden[1][n : n + 1], hidden[0][n : n + 1]) for n in range(6)]
    assert report.rows[0]["block_error"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["besa", "exact", "sparsegpt"])
def test_blocks_moved_to_a_device_one_at_a_time_are_pruned_alike(tiny_llama, windows, name):
    moved = copy.deepcopy(tiny_llama)
    assert prune(moved, windows, METHODS[name], device="cpu").sparsity == pytest.approx(0.5, abs=0.06)
    prune(tiny_llama, windows, METHODS[name])
    assert_equal(moved, tiny_llama)


@contextlib.contextmanager
def defaults(dtype=torch.float32, device=None, precision="highest"):
    try:
        torch.set_default_dtype(dtype), torch.set_default_device(device), torch.set_float32_matmul_precision(precision)
        yield
        assert torch.get_default_dtype() == dtype and torch.get_float32_matmul_precision() == precision  # restored
    finally:
        torch.set_default_dtype(torch.float32), torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")


SETTINGS = {
    "default dtype": lambda: defaults(torch.bfloat16),
    "default device": lambda: defaults(device="meta"),
    "less precise products": lambda: defaults(precision="medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_global_settings_change_no_bit(tiny_llama, windows, setting):
    for method, reconstruct in (
        (METHODS["groups of 8 rows"], None),
        (METHODS["sparsegpt"], None),
        (METHODS["wanda"], besa.Reconstruct()),
    ):
        model, twin = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        prune(model, windows, method, reconstruct=reconstruct)
        with SETTINGS[setting]():
            prune(twin, windows, method, reconstruct=reconstruct)
        assert_equal(twin, model)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_passes_over_rows_after_its_parent_did():
    """OpenMP's threads do not exist in a forked child, which would wait for them."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        weight, ranks = torch.randn(999, 400), torch.arange(400, dtype=torch.int16).repeat(999, 1)
        args = weight, ranks, torch.arange(999) % 400, torch.empty_like(weight)
        expected = kernels.masked_rows(*args).numpy().copy()
        child = multiprocessing.get_context("fork").Process(target=kernels.masked_rows, args=args)
        args[-1].share_memory_().zero_()
        child.start()
        child.join(30)
        child.kill()
    finally:
        torch.set_num_threads(n_threads)
    assert child.exitcode == 0 and (args[-1].numpy() == expected).all()


def block_of_llamas_scale(dtype):
    """One block whose gradients are as small as LLaMA's: below the range of float16."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.1, **shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1000
    return model.to(dtype)


def test_float16_learns_as_float32_where_gradients_are_tiny():
    windows = torch.randint(0, 97, (16, 64), generator=torch.Generator().manual_seed(1))
    learned = {}
    for dtype in (torch.float32, torch.float16):
        report = prune(block_of_llamas_scale(dtype), windows, besa.Besa(epochs=3, penalty=0.001))
        learned[dtype] = torch.tensor([row["sparsity"] for row in report.rows])
    # With an unscaled loss they differ by 0.0035, more than the projections do among each other.
    assert (learned[torch.float16] - learned[torch.float32]).abs().max() < 1e-3
    assert learned[torch.float32].max() - learned[torch.float32].min() > 3e-3


def test_steps_that_float16_skips_are_counted(monkeypatch):
    monkeypatch.setattr(besa.beyond.exact, "token_error", lambda *pair: 1e30 * besa.losses.token_error(*pair))
    windows = torch.randint(0, 97, (16, 64), generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="block 0: float16 overflowed in 16 of 16 steps"):
        report = prune(block_of_llamas_scale(torch.float16), windows, besa.Exact())
    assert report.steps[-1]["skipped"] == 16


def test_a_block_comes_back_from_the_device_after_an_error(tiny_llama, windows, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append((self, device)) or self)
    with pytest.raises(ValueError, match="block 0"):
        prune(tiny_llama, windows, Huge(), device="cpu")
    assert moved[-1] == (tiny_llama.model.layers, torch.device("cpu"))


def test_every_method_takes_a_sparsity_for_each_block(tiny_llama, windows):
    for method in (besa.Wanda, besa.Magnitude, besa.SparseGPT, besa.Exact):
        report = prune(copy.deepcopy(tiny_llama), windows, method(sparsities=(0.25, 0.5, 0.75)))
        frame = report.to_frame()
        sizes = (frame["rows"] * frame["columns"]).groupby(frame["block"]).sum()
        sparsities = frame.groupby("block")["zeros"].sum() / sizes
        assert sparsities.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    for sparsities in ((0.5, 0.5), ()):
        with pytest.raises(ValueError, match=f"{len(sparsities)} sparsities .* 3 blocks"):
            prune(tiny_llama, windows, besa.Wanda(sparsities=sparsities))


def test_ignored_projections_stay_and_count_as_kept(tiny_llama, windows):
    dense, ignore = copy.deepcopy(tiny_llama), ["1", ".*[02].*self_attn.*", "0.mlp.down_proj"]
    for name in ("wanda", "sparsegpt", "besa", "4 bits"):
        model = copy.deepcopy(tiny_llama)
        method = dataclasses.replace(METHODS[name], ignore=ignore, sparsity=0.4)
        report = prune(model, windows[:2], method)
        assert len(report.rows) == len(report.keep_masks) == 21
        n_pruned = 0
        for row in report.rows:
            index, projection = row["block"], row["projection"]
            weight, before = (projections(find_blocks(m)[index])[projection].weight for m in (model, dense))
            if row["note"] == "ignored":
                assert row["zeros"] == row["projection_error"] == 0 and report.keep_masks[index, projection].all()
                assert torch.equal(weight, before)
            else:
                assert 0 < row["sparsity"] < 1
                n_pruned += 1
        assert n_pruned == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.int(), "windows"),
        (lambda w: w.flatten(), "windows"),
        (lambda w: w[:0], "no token ids"),
        (lambda w: w[:, :1], r"seq_len 1 is outside \[2, 64\]"),
        (lambda w: w.repeat(1, 3), r"seq_len 72 is outside \[2, 64\]"),
        (lambda w: w + 90, "vocabulary of 97"),
    ],
)
def test_bad_windows_raise(tiny_llama, windows, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prune(tiny_llama, change(windows), besa.Wanda())


def test_windows_that_steps_do_not_divide_raise(tiny_llama, windows):
    for method in (besa.Besa(batch_size=4), besa.Exact(batch_size=4)):
        with pytest.raises(ValueError, match=r"6 windows .* 4"):
            prune(tiny_llama, windows, method)


@pytest.mark.parametrize(
    "make",
    [
        lambda: besa.Besa(row_group="rows"),
        lambda: besa.Besa(sparsity=1.0),
        lambda: besa.Besa(epochs=True),
        lambda: besa.Besa(loss="token"),
        lambda: besa.Besa(d_coef=float("nan")),
    ],
)
def test_bad_fields_raise(make):
    with pytest.raises(ValueError):
        make()


def test_activations_that_are_not_finite_name_block_and_projection(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].input_layernorm.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"block 1: the inputs of self_attn.q_proj are NaN or infinite"):
        prune(tiny_llama, windows, besa.Wanda())


class Huge(besa.Wanda):
    """Finite weights whose outputs overflow."""

    def prune_block(self, block):
        pruned = super().prune_block(block)
        pruned.weights = {name: torch.full_like(weight, 3e38) for name, weight in pruned.weights.items()}
        return pruned


def test_outputs_that_are_not_finite_name_the_block_and_leave_it(tiny_llama, windows):
    before = copy.deepcopy(tiny_llama)
    with pytest.raises(ValueError, match="block 0: after pruning, the output is NaN or infinite"):
        prune(tiny_llama, windows, Huge())
    assert_equal(tiny_llama, before)


def test_projections_that_are_never_called_raise(tiny_llama, windows):
    tiny_llama.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"block 1.*mlp.spare.*never called"):
        prune(tiny_llama, windows, besa.Wanda())


REFUSED = {"cumsum", "median", "histc", "bincount", "put_", "scatter_reduce", "nll_loss2d_forward", "_ctc_loss"}
"""Operations without a deterministic form on GPUs."""


class Operations(TorchDispatchMode):
    """Records the operations, and those that deterministic algorithms refuse."""

    def __init__(self):
        super().__init__()
        self.seen, self.refused = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.seen.add(name)
        if name in REFUSED and arguments[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
            self.refused.add(name)
        return function(*arguments, **options or {})


@pytest.mark.parametrize("name", METHODS)
def test_every_operation_has_a_deterministic_form_on_a_gpu(tiny_llama, windows, monkeypatch, name):
    monkeypatch.setattr(kernels, "_is_compiled", lambda weight: False)  # compiled kernels are for CPUs
    reconstruct = {"wanda": besa.Reconstruct()}.get(name)
    with deterministic(True), Operations() as operations:
        prune(tiny_llama, windows[:2], METHODS[name], reconstruct=reconstruct)
    assert "mm" in operations.seen and not operations.refused


def test_opt_counts_positions_outside_of_deterministic_algorithms(windows):
    """By a cumulative sum of floats, which has no deterministic form on a GPU."""
    with deterministic(True), Operations() as operations:
        prune(build("OPT"), windows[:2].clamp_min(1), besa.Wanda())
        assert torch.are_deterministic_algorithms_enabled()
    assert "cumsum" in operations.seen and not operations.refused
