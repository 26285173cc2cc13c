import contextlib
import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import besa
from besa import kernels
from besa.baselines import named_method
from besa.decoder import find_blocks, projections
from besa.importance import InputStatistics, importance, inverse_cholesky
from besa.machine.device import deterministic, unaltered
from besa.masks import keep_largest
from besa.walk import frozen, walk

METHODS = {
    "besa": besa.Besa(),
    "besa layer, dense targets": besa.Besa(row_group="layer", targets="dense", d_coef=50.0),
    "besa in groups of 8 rows, obs": besa.Besa(row_group=8, importance="sparsegpt", epochs=2, seed=3),
    "besa unsmoothed": besa.Besa(sparsity=0.45, smooth=False, importance="magnitude", candidates=51),
    "magnitude": besa.Magnitude(),
    "wanda": besa.Wanda(),
    "sparsegpt": besa.SparseGPT(),
}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_weights_to_the_bit(tiny_llama, windows, name):
    twin = copy.deepcopy(tiny_llama)
    besa.prune(tiny_llama, windows, METHODS[name], progress=False)
    besa.prune(twin, windows, METHODS[name], progress=False)
    for key, value in tiny_llama.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


@contextlib.contextmanager
def defaults(dtype=torch.float32, device=None, precision="highest"):
    try:
        torch.set_default_dtype(dtype), torch.set_default_device(device), torch.set_float32_matmul_precision(precision)
        yield
        assert torch.get_default_dtype() == dtype and torch.get_float32_matmul_precision() == precision  # as before
    finally:
        torch.set_default_dtype(torch.float32), torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")


SET = {
    "a default type": lambda: defaults(torch.bfloat16),
    "a default device": lambda: defaults(device="meta"),
    "less precise products": lambda: defaults(precision="medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", SET)
def test_what_is_set_around_it_moves_no_bit(tiny_llama, windows, name):
    methods = [METHODS["besa in groups of 8 rows, obs"], METHODS["sparsegpt"], METHODS["wanda"]]
    after = []
    for around in (contextlib.nullcontext, SET[name]):
        models = [copy.deepcopy(tiny_llama) for _ in methods]
        with around():
            besa.prune(models[0], windows, methods[0], progress=False)
            besa.prune(models[1], windows, methods[1], progress=False)
            report = besa.prune(models[2], windows, methods[2], reconstruct=besa.Reconstruct("block"), progress=False)
            besa.finetune(models[2], windows, report, progress=False)
        after.append([value for model in models for value in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))


def test_float32_products_are_float32_whatever_is_set():
    """Torch takes bfloat16 for large ones only, and on processors that have it."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with defaults(precision="medium"):
        before = [each.fp32_precision for each in products]
        with unaltered(torch.device("cpu")):
            assert [each.fp32_precision for each in products] == ["ieee", "ieee"]
        assert before == ["tf32", "bf16"] == [each.fp32_precision for each in products]


def test_a_gpu_on_which_cublas_was_started_otherwise_is_refused_before_any_work(monkeypatch):
    def refuse(*_):
        raise RuntimeError("uses CuBLAS ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:2")
    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))  # no GPU is here
    with pytest.raises(ValueError, match=r"=':16:2'\); start again, and import besa before anything is"):
        unaltered(torch.device("cuda")).__enter__()


@pytest.mark.parametrize("name", METHODS)
def test_only_projections_change_and_the_report_counts_their_zeros(tiny_llama, windows, name):
    before = weights_of(tiny_llama)
    report = besa.prune(tiny_llama, windows, METHODS[name], progress=False)
    frame = report.to_frame().set_index(["block", "projection"])
    assert len(frame) == 3 * 7
    for key, value in tiny_llama.state_dict().items():
        if "_proj" not in key:
            assert torch.equal(value, before[key])
    for index, block in enumerate(tiny_llama.model.layers):
        for projection, module in projections(block).items():
            row = frame.loc[(index, projection)]
            assert row["zeros"] == (module.weight == 0).sum()
            if name != "sparsegpt":
                kept = module.weight != 0
                assert torch.equal(module.weight[kept], before[f"model.layers.{index}.{projection}.weight"][kept])
            assert 0 < row["projection_error"] < 1 and 0 < row["block_error"] < 1
    assert report.sparsity == pytest.approx(METHODS[name].sparsity, abs=0.06)
    assert all(not p.grad_fn and p.requires_grad for p in tiny_llama.parameters())


def test_besa_lowers_the_loss_of_a_block(tiny_llama, windows):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    report = besa.prune(tiny_llama, windows, besa.Besa(epochs=20), progress=False)
    steps = [step for step in report.steps if step["block"] == 0]
    assert len(steps) == 20 * 6
    first, last = (sum(step["loss"] for step in part) for part in (steps[:6], steps[-6:]))
    assert last < first


def test_unsmoothed_softmax_reaches_sparsities_beyond_the_recipes_range(tiny_llama, windows):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    report = besa.prune(tiny_llama, windows, besa.Besa(sparsity=0.75, smooth=False, epochs=40), progress=False)
    assert report.sparsity == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("n_different, is_moved", [(6, True), (1, False)])
def test_seed_changes_the_order_of_the_windows_only(tiny_llama, windows, n_different, is_moved):
    """And nothing where all windows are the same."""
    windows = windows[:n_different].repeat(6 // n_different, 1)
    twin = copy.deepcopy(tiny_llama)
    plain = besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    shuffled = besa.prune(twin, windows, besa.Besa(seed=5), progress=False)
    assert ([step["loss"] for step in plain.steps] != [step["loss"] for step in shuffled.steps]) == is_moved


def test_every_epoch_takes_every_window_once_in_an_order_of_its_own():
    steps = [*besa.Besa(seed=5, epochs=2, batch_size=2)._steps(12)]
    epochs = steps[:6], steps[6:]
    for epoch in epochs:
        assert sorted(number for step in epoch for number in step) == [*range(12)]
    assert len({str(epoch) for epoch in epochs} | {str([*besa.Besa(batch_size=2)._steps(12)])}) == 3


def test_targets_of_the_first_block_agree_and_later_ones_differ(tiny_llama, windows):
    twin = copy.deepcopy(tiny_llama)
    pruned = besa.prune(tiny_llama, windows, besa.Besa(targets="pruned"), progress=False)
    dense = besa.prune(twin, windows, besa.Besa(targets="dense"), progress=False)
    losses = [[[s["loss"] for s in report.steps if s["block"] == b] for b in range(3)] for report in (pruned, dense)]
    agree = [ours == pytest.approx(theirs, rel=1e-6) for ours, theirs in zip(*losses, strict=True)]
    assert agree == [True, False, False]
    errors = dense.to_frame().groupby("block")["block_error"].first()
    assert errors[2] > errors[0]  # against the dense model, errors accumulate


def naive_inputs(model, windows, block, name):
    seen = []
    module = model.model.layers[block].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def test_wanda_prunes_each_rows_lowest_weight_times_input_norm(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    besa.prune(tiny_llama, windows, besa.Wanda(sparsity=0.25), progress=False)
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        # Block 1 as Wanda meets it: block 0 pruned, itself dense.
        model = copy.deepcopy(dense)
        model.model.layers[0] = tiny_llama.model.layers[0]
        norms = naive_inputs(model, windows, 1, name).norm(dim=0)
        weight = dense.model.layers[1].get_submodule(name).weight
        for row, pruned in zip(weight, tiny_llama.model.layers[1].get_submodule(name).weight, strict=True):
            lowest = sorted(range(len(row)), key=lambda j, row=row: abs(row[j].item()) * norms[j].item())[
                : len(row) // 4
            ]
            assert sorted(lowest) == (pruned == 0).nonzero().flatten().tolist()


def test_magnitude_prunes_each_projections_smallest_weights(tiny_llama, windows):
    dense = weights_of(tiny_llama)
    besa.prune(tiny_llama, windows, besa.Magnitude(sparsity=0.3), progress=False)
    weight = dense["model.layers.2.mlp.gate_proj.weight"]
    threshold = weight.abs().flatten().sort().values[int(0.3 * weight.numel())]
    assert torch.equal(tiny_llama.model.layers[2].mlp.gate_proj.weight != 0, weight.abs() >= threshold)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(1, 40000, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs(),
        torch.randn(50, 800, generator=torch.Generator().manual_seed(1)).mul(2).round().abs(),
        torch.zeros(3, 5),
    ],
    ids=["one row of bfloat16", "rows of a few values", "all equal"],
)
def test_of_equal_scores_the_first_go_as_in_a_stable_sort(scores, sparsity):
    n_pruned = int(sparsity * scores.shape[1])
    expected = torch.ones_like(scores, dtype=torch.bool)
    expected.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :n_pruned], False)
    assert torch.equal(keep_largest(scores, sparsity), expected)
    assert ((~expected).sum(dim=1) == n_pruned).all()


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_sparsegpt_equals_optimal_brain_surgery_by_explicit_inverses(damping):
    """Pruning a column and correcting those right of it is a least-squares solution, here by explicit inverses."""
    torch.manual_seed(0)
    rows, columns = 5, 12
    x, weight = torch.randn(200, columns) @ torch.randn(columns, columns), torch.randn(rows, columns)
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    method = besa.SparseGPT(block_columns=columns, damping=damping)
    ours, kept, note = method._prune_projection(weight, statistics, 0.5)
    hessian = 2 * (x.T @ x).double()
    hessian += damping * hessian.diag().mean() * torch.eye(columns)
    saliency = torch.stack(
        [weight[:, j].double() ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)], 1
    )
    keep = torch.ones(rows * columns, dtype=torch.bool)
    keep[saliency.flatten().argsort()[: rows * columns // 2]] = False
    keep, expected = keep.view(rows, columns), weight.double().clone()
    for j in range(columns):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = expected[:, j] * ~keep[:, j] / inverse[0, 0]
        expected[:, j:] -= error[:, None] * inverse[0]
    torch.testing.assert_close(ours, (expected * keep).float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(kept.flatten(), keep.flatten()) and note == f"damping {damping:g}, float32"


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt"])
def test_besa_prunes_the_least_important_of_each_row_by_the_importance_that_is_named(tiny_llama, windows, kind):
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, progress=False))
        statistics = block.statistics(hessian=True)
    scores = {name: importance(kind, each.weight.clone(), statistics[name]) for name, each in block.projections.items()}
    report = besa.prune(tiny_llama, windows, besa.Besa(importance=kind), progress=False)
    for name, each in scores.items():
        kept = report.keep_masks[0, name]
        assert (each.masked_fill(kept, 0).amax(1) <= each.masked_fill(~kept, math.inf).amin(1)).all()


def test_an_error_is_relative_to_what_is_named(tiny_llama, windows):
    kinds = [{}, {"loss": "channel"}, {"loss": "token"}]
    first = lambda fields: besa.prune(copy.deepcopy(tiny_llama), windows, besa.Besa(**fields)).steps[0]["loss"]
    paper, beyond = ([first(fields | kind) for kind in kinds] for fields in ({}, {"budget": "exact"}))
    assert paper[0] == paper[1] != paper[2] and beyond[0] == beyond[2] != beyond[1]


def test_sparsegpts_masks_alone_leave_the_kept_weights_and_the_first_blocks_choice(tiny_llama, windows):
    dense, corrected = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    whole = besa.prune(corrected, windows, besa.SparseGPT(sparsity=0.5))
    alone = besa.prune(tiny_llama, windows, besa.SparseGPT(sparsity=0.5, mask_only=True))
    for (block, name), mask in alone.keep_masks.items():
        kept = [projections(find_blocks(model)[block])[name].weight for model in (dense, tiny_llama, corrected)]
        assert torch.equal(kept[1], kept[0] * mask) and not torch.equal(kept[2][mask], kept[0][mask])
        assert block or torch.equal(mask, whole.keep_masks[block, name])
    assert "mask_only" not in besa.SparseGPT().config() and besa.SparseGPT(mask_only=True).config()["mask_only"]


def test_hessian_that_float32_cannot_factorize_is_factorized_and_says_how():
    torch.manual_seed(0)
    x = torch.randn(200, 3) @ torch.randn(3, 64)  # rank 3: float32 cannot tell the damping from 0
    factor = inverse_cholesky(2 * x.T @ x, damping=1e-12)
    assert (factor.dtype, factor.damping) != (torch.float32, 1e-12)
    assert torch.isfinite(factor.upper).all()


def test_activations_that_are_not_finite_name_block_and_projection(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].input_layernorm.weight.fill_(1e38)  # finite, but what it makes is not
    with pytest.raises(ValueError, match=r"block 1, self_attn.q_proj: its inputs hold NaN or infinity"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


class Huge(besa.Wanda):
    """Weights that are finite, but what they make is not."""

    def prune_block(self, block):
        pruned = super().prune_block(block)
        return replace(pruned, weights={name: torch.full_like(each, 3e38) for name, each in pruned.weights.items()})


@pytest.mark.parametrize("method", [besa.Wanda(), besa.Magnitude()])
def test_an_output_that_is_not_finite_names_the_block_and_leaves_it_as_it_was(tiny_llama, windows, method):
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.up_proj.weight.mul_(1e4)
        tiny_llama.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    for index, pruning, message in ((0, Huge(), "pruned, its output holds"), (2, method, "its output holds")):
        before = weights_of(tiny_llama.model.layers[index])
        with pytest.raises(ValueError, match=f"block {index}: {message} NaN or infinity"):
            besa.prune(tiny_llama, windows, pruning, progress=False)
        after = tiny_llama.model.layers[index].state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sparsity": 0.7}, r"outside \(0.376, 0.624\).*smooth=False"),
        ({"sparsity": 0.0, "smooth": False}, r"sparsity 0.0 is outside \(0.000, 1.000\)"),
    ],
)
def test_sparsities_that_cannot_be_learned_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        besa.Besa(**fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.int(), r"windows of torch.int32 \(6, 24\) is not int64 token ids"),
        (lambda w: w[:0], r"no token ids: shape \(0, 24\)"),
        (lambda w: w[:, :1], r"seq_len 1 is outside \[2, 64\]"),
        (lambda w: w.repeat(1, 3), r"seq_len 72 is outside \[2, 64\]"),
        (lambda w: w + 90, "vocabulary has 97"),
        (lambda w: w.flatten(), r"windows of torch.int64 \(144,\) is not int64 token ids \(n_samples, seq_len\)"),
    ],
)
def test_bad_windows_are_refused_before_any_work(tiny_llama, windows, change, message):
    before = weights_of(tiny_llama)
    with pytest.raises(ValueError, match=message):
        besa.prune(tiny_llama, change(windows), besa.Wanda(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    "hessian, damping, words",
    [
        (torch.full((2, 2), math.nan), 0.01, "even with damping 10: it holds NaN or infinity"),
        (torch.tensor([[1.0, 9e9], [9e9, 1.0]]), 0.01, "even with damping 10: it is not that of any inputs"),
        (torch.tensor([[1.0, 9e9], [9e9, 1.0]]), 100.0, "even with damping 100: it is not that of any inputs"),
        (torch.tensor([[1.0, 9e9], [9e9, 1.0]]), 0.03, "even with damping 3: it is not that of any inputs"),
        (torch.tensor([[1.0, 9e9], [9e9, 1.0]]), 0.0, "even with damping 10: it is not that of any inputs"),
    ],
)
def test_a_hessian_that_no_damping_mends_is_told_from_one_of_nan(hessian, damping, words):
    with pytest.raises(ValueError, match=words):
        inverse_cholesky(hessian, damping)


def test_columns_that_never_had_an_input_go_first_by_every_importance_of_the_inputs():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    weight = torch.ones(3, 6)
    for kind in ("wanda", "sparsegpt"):
        found = importance(kind, weight, statistics)
        assert (found[:, 2] == 0).all() and (found[:, [0, 1, 3, 4, 5]] > 0).all()


def test_a_damping_above_ten_is_tried_as_it_is():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    factor = inverse_cholesky(hessian, damping=100.0)
    damped = hessian + 100 * 2.5 * torch.eye(2)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))
    assert factor.damping == 100


def test_row_group_that_does_not_divide_is_refused_by_name(tiny_llama, windows):
    with pytest.raises(ValueError, match=r"block 0, self_attn.q_proj: 32 rows do not divide into groups of 3"):
        besa.prune(tiny_llama, windows, besa.Besa(row_group=3), progress=False)


def test_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown method 'wanda2'; known: magnitude, wanda, sparsegpt"):
        named_method("wanda2")


def test_a_recipe_by_name_takes_every_field():
    assert named_method("besa-row-wise", row_group=8) == besa.Besa(row_group=8)
    layer = named_method("besa-layer-wise", targets="pruned")
    assert layer == besa.Besa(row_group="layer", targets="pruned", d_coef=0.5)


def test_no_sparsities_at_all_are_not_one_for_each_block(tiny_llama, windows):
    with pytest.raises(ValueError, match="0 sparsities are given for 3 blocks"):
        besa.prune(tiny_llama, windows, besa.Wanda(sparsities=()), progress=False)


def test_plot_allocation_draws_blocks_by_projections(tiny_llama, windows):
    ax = besa.prune(tiny_llama, windows, besa.Besa(), progress=False).plot_allocation()
    assert ax.images[0].get_array().shape == (7, 3)
    assert ax.get_xlabel() == "block"


def block_of_llamas_scale(dtype):
    """One block whose loss has gradients as small as LLaMA's (hidden size times length): below what float16 holds."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.1, **shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1000
    return model.to(dtype)


def test_float16_learns_what_float32_learns_where_gradients_are_as_small_as_llamas():
    windows = torch.randint(0, 97, (16, 64), generator=torch.Generator().manual_seed(1))
    method, learned = besa.Besa(epochs=3, penalty=0.001), {}
    for dtype in (torch.float32, torch.float16):
        report = besa.prune(block_of_llamas_scale(dtype), windows, method, progress=False)
        learned[dtype] = torch.tensor([row["sparsity"] for row in report.rows])
        assert report.rows[0]["block_error"] > 0 and len(report.steps) == 3 * 16
    # with an unscaled loss they differ by 0.0035, more than the projections do among each other
    assert (learned[torch.float16] - learned[torch.float32]).abs().max() < 1e-3
    assert learned[torch.float32].max() - learned[torch.float32].min() > 3e-3


def test_steps_that_overflow_in_float16_are_skipped_and_counted(tiny_llama, windows, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, enabled: scaler(*a, init_scale=2.0**40, enabled=enabled))
    report = besa.prune(tiny_llama.half(), windows, besa.Besa(epochs=8), progress=False)
    skipped = [step.get("skipped", False) for step in report.steps if step["block"] == 0]
    assert skipped[0] and not skipped[-1]
    assert f"{sum('skipped' in step for step in report.steps)} of {3 * 8 * 6} steps skipped" in str(report)
    assert report.sparsity == pytest.approx(0.5, abs=0.06)


def test_a_schedule_whose_first_step_overflows_says_nothing(tiny_llama, windows, monkeypatch, recwarn):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, enabled: scaler(*a, init_scale=2.0**40, enabled=enabled))
    new, method = besa.Reconstruct("block", epochs=1), besa.Besa(budget="exact")
    report = besa.prune(tiny_llama.half(), windows, method, progress=False, reconstruct=new)
    assert report.steps[0]["skipped"] and not [each for each in recwarn if "lr_scheduler" in str(each.message)]


@pytest.mark.parametrize(
    "dtype, huge, fields", [(torch.float16, 30.0, {}), (torch.bfloat16, 1e18, {"budget": "exact", "pattern": "N:8"})]
)
def test_a_masked_output_that_overflows_is_an_error_that_names_block_and_step(dtype, huge, fields):
    model = block_of_llamas_scale(dtype)
    mlp = model.model.layers[0].mlp
    windows = torch.randint(0, 97, (16, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # what the two halves of down_proj's columns add cancels, until one half is pruned
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[:1].clone())
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[:1].clone() * 400)
        mlp.down_proj.weight.copy_(torch.tensor([huge, -huge]).repeat_interleave(128))
    with pytest.raises(ValueError, match=r"block 0, training step \d+: the loss is (nan|inf).*; try dtype float32"):
        besa.prune(model, windows, besa.Besa(epochs=3, **fields), progress=False)


def test_the_method_that_contributing_shows_prunes(tiny_llama, windows):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    names = {"__name__": __name__}  # dataclasses look their module up
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    report = besa.prune(tiny_llama, windows, names["Random"](sparsity=0.25), progress=False)
    assert (report.to_frame()["sparsity"] == 0.25).all()


UNMOVED = besa.Besa(sparsity=0.6, d_coef=1e-9)
"""Its logits stay where they start, at a sparsity of 0.5."""


def test_blocks_that_miss_their_sparsity_say_so_in_rows_and_report(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, UNMOVED, progress=False)
    for row in report.rows:
        counted = re.fullmatch(r"the block's sparsity is (0\.\d{4}) for 0\.6", row["note"])
        assert float(counted[1]) == pytest.approx(report.sparsity, abs=0.02) and report.sparsity < 0.55
    assert len(report.missed) == 3 and re.fullmatch(r"block 2 has 0\.\d{4} for 0\.6", report.missed[2])
    assert "WARNING: 3 of 3 blocks miss their target: block 0 has 0." in str(report)


def test_the_rows_of_a_checkpoint_say_so_too_when_they_are_read_back(tiny_llama, windows, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    report = besa.prune_checkpoint(tmp_path / "model", tmp_path / "out", windows, UNMOVED, device="cpu", progress=False)
    again = besa.prune_checkpoint(tmp_path / "model", tmp_path / "out", windows, UNMOVED, device="cpu", progress=False)
    assert len(report.missed) == 3 and again.missed == report.missed


ON_TARGET = {
    "wanda": besa.Wanda(),
    "a sparsity for each block": besa.Wanda(sparsities=(0.25, 0.5, 0.75)),
    "ignored projections": besa.Magnitude(ignore=("mlp", "1")),
    "ignored under a budget": besa.Besa(budget="exact", scores=False, sparsity=0.3, ignore=("self_attn", "1")),
    "2:4": besa.Magnitude(pattern="2:4"),
}


@pytest.mark.parametrize("method", ON_TARGET.values(), ids=ON_TARGET)
def test_blocks_that_meet_their_sparsity_carry_no_note(tiny_llama, windows, method):
    report = besa.prune(tiny_llama, windows, method, progress=False)
    assert report.missed == [] and {row["note"] for row in report.rows} <= {"", "ignored"}
    assert "WARNING" not in str(report)


REFUSED = {"cumsum", "median", "histc", "bincount", "put_", "scatter_reduce", "nll_loss2d_forward", "_ctc_loss"}
"""By torch on a GPU, for as long as all is to repeat (kthvalue, too: there besa sorts)."""


class Sums(TorchDispatchMode):
    """What is computed, and which of it is refused."""

    def __init__(self):
        super().__init__()
        self.seen, self.refused = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.seen.add(name)
        if name in REFUSED and arguments[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
            self.refused.add(name)
        return function(*arguments, **options or {})


ALL = METHODS | {
    "exact": besa.Besa(sparsity=0.6, budget="exact"),
    "joint": besa.Besa(quantize=besa.Quantize(bits=4)),
    "2:4": besa.Besa(pattern="2:4"),
}


@pytest.mark.parametrize("name", ALL)
def test_a_gpu_can_repeat_all_that_is_summed(tiny_llama, windows, monkeypatch, name):
    monkeypatch.setattr(kernels, "_compiled", lambda weight: False)  # what is compiled is for CPUs
    reconstruct = {"exact": besa.Reconstruct("block"), "wanda": besa.Reconstruct("closed")}.get(name)
    with deterministic(True), Sums() as sums:
        report = besa.prune(tiny_llama, windows[:2], ALL[name], reconstruct=reconstruct, progress=False)
        if reconstruct:
            besa.finetune(tiny_llama, windows[:2], report, progress=False)
    assert "mm" in sums.seen and not sums.refused
