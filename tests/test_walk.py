"""The loop: what every block is given, what it gives up, and when statistics are gathered."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

import besa
from besa import decoder, importance, sensitivity
from besa.decoder import find_blocks, projections
from besa.report import Report
from besa.walk import Block, frozen, token_error, walk


def test_a_magnitude_run_gathers_no_statistics_and_wanda_gathers_no_hessian(tiny_llama, windows, monkeypatch):
    asked, gather = [], Block.statistics
    monkeypatch.setattr(
        Block, "statistics", lambda self, hessian=False: (asked.append(hessian), gather(self, hessian))[1]
    )
    besa.prune(copy.deepcopy(tiny_llama), windows, besa.Magnitude(), progress=False)
    assert asked == []
    besa.prune(copy.deepcopy(tiny_llama), windows, besa.Wanda(), progress=False)
    assert asked == [False] * 3
    besa.prune(tiny_llama, windows, besa.SparseGPT(), progress=False)
    assert asked == [False] * 3 + [True] * 3


@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_a_block_is_gone_before_the_next_one_is_loaded(tiny_llama, windows, targets):
    alive, seen = [], 0

    def load(module):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        copied = copy.deepcopy(module)
        alive.append(weakref.ref(copied))
        return copied

    with frozen(tiny_llama):
        for block in walk(tiny_llama, windows, targets, load=load, progress=False):
            block.finish(besa.Wanda().prune_block(block))
            seen += 1
    assert seen == 3


def test_inputs_come_from_the_pruned_blocks_and_dense_targets_from_the_dense_model(tiny_llama, windows):
    dense = tiny_llama(windows, output_hidden_states=True).hidden_states
    with frozen(tiny_llama):
        for block in walk(tiny_llama, windows, "dense", progress=False):
            if block.index == 1:
                torch.testing.assert_close(block.targets, dense[2].detach())
                expected = tiny_llama(windows, output_hidden_states=True).hidden_states[1]  # block 0 is pruned by now
                torch.testing.assert_close(block.inputs, expected)
                assert not torch.allclose(block.inputs, dense[1])
            block.finish(besa.Wanda().prune_block(block))


def test_a_block_that_is_not_finished_is_an_error(tiny_llama, windows):
    with frozen(tiny_llama), pytest.raises(RuntimeError, match=r"block 0 was not finished: call block.finish"):
        for _ in walk(tiny_llama, windows, progress=False):
            pass


WANDA, BLOCKWISE = (besa.Wanda(), None), (besa.Wanda(), besa.Reconstruct("block", epochs=1))
MOMENTS = {  # what is interrupted, at which of its calls, and what prunes
    "the blocks' calls are recorded": (decoder, "BlockCall", 2, WANDA),
    "statistics are gathered": (importance, "_accumulate", 20, WANDA),
    "a block learns": (torch.Tensor, "backward", 8, (besa.Besa(), None)),
    "scores are learned": (torch.Tensor, "backward", 8, (besa.Besa(budget="exact"), None)),
    "the model is measured": (sensitivity, "run_head", 5, (besa.Besa(budget="exact", scope="model"), None)),
    "a closed form is computed": (besa.Reconstruct, "closed_form", 10, (besa.Wanda(), besa.Reconstruct())),
    "a block is trained": (torch.Tensor, "backward", 5, BLOCKWISE),
    "weights are written": (Report, "of_block", 2, WANDA),
    "a block is left for the next": (Block, "leave", 1, WANDA),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_at_any_moment_leaves_no_hook_and_a_usable_model(tiny_llama, windows, monkeypatch, moment):
    owner, name, number, (method, reconstruct) = MOMENTS[moment]
    windows = windows[:3]
    work, calls, options = getattr(owner, name), itertools.count(1), {"progress": False, "reconstruct": reconstruct}

    def interrupting(*args, **kwargs):
        if next(calls) == number:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    def facts():
        parameters = [(p.requires_grad, p.dtype, p.device, p.shape) for p in tiny_llama.parameters()]
        modules = [(module.training, *vars(module)) for module in tiny_llama.modules()]  # with no forward of their own
        return parameters, modules, torch.is_grad_enabled()

    tiny_llama.model.layers[1].train()  # as it was, not as is usual
    tiny_llama.model.embed_tokens.requires_grad_(False)
    before, copies = facts(), [copy.deepcopy(tiny_llama) for _ in range(2)]
    besa.prune(copies[0], windows, method, **options)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            besa.prune(tiny_llama, windows, method, **options)
    assert facts() == before
    hooks = [vars(module)[kind] for module in tiny_llama.modules() for kind in vars(module) if kind.endswith("_hooks")]
    assert hooks and not any(hooks)
    assert torch.isfinite(tiny_llama(windows).logits).all()
    assert tiny_llama.generate(windows[:1, :4], max_new_tokens=3, pad_token_id=0).shape == (1, 7)
    besa.prune(copies[1], windows, method, **options)
    assert all(map(torch.equal, copies[0].state_dict().values(), copies[1].state_dict().values()))


def test_sparsity_is_counted_from_masks_where_kept_weights_are_zero_too(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, :20] = 0  # more than half of each row
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    assert report.sparsity == 0.5 and (report.to_frame()["sparsity"] == 0.5).all()
    for (index, name), keep_mask in report.keep_masks.items():
        weight = projections(find_blocks(tiny_llama)[index])[name].weight
        assert not weight[~keep_mask].any()
    assert len(report.keep_masks) == 3 * 7


def test_projection_errors_are_of_the_first_window_as_the_pruned_model_computes_it(tiny_llama, windows):
    """||(W - W')x||^2 / ||Wx||^2, one token and one row at a time."""
    dense, entered = copy.deepcopy(tiny_llama), {}
    report = besa.prune(tiny_llama, windows, besa.SparseGPT(), progress=False)
    for index, block in enumerate(find_blocks(tiny_llama)):
        for name, projection in projections(block).items():
            note = lambda _, inputs, key=(index, name): entered.__setitem__(key, inputs[0][0].double())
            projection.register_forward_pre_hook(note)
    with torch.no_grad():
        tiny_llama(windows[:1])
    for row in report.rows:
        key = row["block"], row["projection"]
        before, after = (
            projections(find_blocks(model)[key[0]])[key[1]].weight.detach().double() for model in (dense, tiny_llama)
        )
        lost = whole = 0.0
        for x in entered[key]:
            for w, w_new in zip(before, after, strict=True):
                lost, whole = lost + float((w - w_new) @ x) ** 2, whole + float(w @ x) ** 2
        assert row["projection_error"] == pytest.approx(lost / whole, rel=1e-4), key


def test_token_error_is_the_mean_of_each_tokens_relative_squared_error(tiny_llama, windows):
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, progress=False))
        output, target = block.run(0, besa.Wanda().prune_block(block).weights), block.target(0)
    target[0, 3] *= 1000  # counts as the others do
    errors = []
    for found, wanted in zip(output[0].tolist(), target[0].tolist(), strict=True):
        lost = sum((b - a) ** 2 for a, b in zip(found, wanted, strict=True))
        errors.append(lost / sum(b**2 for b in wanted))
    assert float(token_error(output, target)) == pytest.approx(sum(errors) / windows.shape[1], rel=1e-5)


def test_a_report_shows_itself_in_a_few_lines(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    assert len(repr(report)) < 1000 and "self_attn.q_proj" in repr(report)
    assert "<table" in report._repr_html_() and report.peak_bytes > 0
    assert repr(type(report)("besa", n_samples=1, seq_len=1)) == "besa: nothing pruned yet"
    summary = report.summary()
    assert list(summary.index) == list(projections(find_blocks(tiny_llama)[0]))
    assert (summary["min"] <= summary["sparsity"]).all() and (summary["sparsity"] <= summary["max"]).all()
