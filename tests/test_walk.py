"""The loop: what every block is given, what it gives up, and when statistics are gathered."""

import copy
import gc
import weakref

import pytest
import torch

import besa
from besa.decoder import find_blocks, projections
from besa.walk import Block, frozen, walk


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


@pytest.mark.parametrize("moment", range(6))
def test_interrupted_at_any_moment_leaves_no_hook_and_a_usable_model(tiny_llama, windows, monkeypatch, moment):
    runs, calls = Block.run, []

    def interrupting(self, *arguments):
        calls.append(1)
        if len(calls) == 1 + 4 * moment:
            raise KeyboardInterrupt
        return runs(self, *arguments)

    monkeypatch.setattr(Block, "run", interrupting)
    with pytest.raises(KeyboardInterrupt):
        besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    assert torch.is_grad_enabled() and all(parameter.requires_grad for parameter in tiny_llama.parameters())
    for block in find_blocks(tiny_llama):
        modules = [block, *projections(block).values()]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        assert "forward" not in vars(block)
    assert torch.isfinite(tiny_llama(windows).logits).all()


def test_sparsity_is_counted_from_masks_where_kept_weights_are_zero_too(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, :20] = 0  # more than half of each row
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    assert report.sparsity == 0.5 and (report.to_frame()["sparsity"] == 0.5).all()
    for (index, name), keep_mask in report.keep_masks.items():
        weight = projections(find_blocks(tiny_llama)[index])[name].weight
        assert not weight[~keep_mask].any()
    assert len(report.keep_masks) == 3 * 7


def test_a_report_shows_itself_in_a_few_lines(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    assert len(repr(report)) < 1000 and "self_attn.q_proj" in repr(report)
    assert "<table" in report._repr_html_() and report.peak_bytes > 0
    assert repr(type(report)("besa", n_samples=1, seq_len=1)) == "besa: nothing pruned yet"
    summary = report.summary()
    assert list(summary.index) == list(projections(find_blocks(tiny_llama)[0]))
    assert (summary["min"] <= summary["sparsity"]).all() and (summary["sparsity"] <= summary["max"]).all()
