"""The walk over the blocks: inputs, targets, errors, one loaded block at a time, and interruptions."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

import besa
from besa import decoder, importance
from besa.beyond.reconstruct import Reconstruct
from besa.decoder import find_blocks, projections
from besa.losses import reconstruction_error, token_error
from besa.walk import frozen, walk


def hidden_states(model, windows, behind):
    """Hidden states behind a number of blocks."""
    with torch.no_grad():
        return model(windows, output_hidden_states=True).hidden_states[behind]


def prune_by_walk(model, windows, **options):
    """Blocks pruned by Wanda, while they are current."""
    with frozen(model):
        for block in walk(model, windows, progress=False, **options):
            yield block
            block.finish(besa.Wanda().prune_block(block))


def test_inputs_come_from_pruned_blocks_and_targets_from_the_unpruned_block(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    for block in prune_by_walk(tiny_llama, windows):
        torch.testing.assert_close(block.inputs, hidden_states(tiny_llama, windows, block.index))
        if block.index < 2:  # the last hidden states are normalized
            torch.testing.assert_close(block.targets, hidden_states(tiny_llama, windows, block.index + 1))
    assert not torch.allclose(hidden_states(tiny_llama, windows, 1), hidden_states(dense, windows, 1))


@pytest.mark.parametrize("options", [{"match": "model"}, {"dense": True}])
def test_dense_hidden_states_come_from_the_dense_model(tiny_llama, windows, options):
    dense = copy.deepcopy(tiny_llama)
    for block in prune_by_walk(tiny_llama, windows, **options):
        torch.testing.assert_close(block.dense_inputs, hidden_states(dense, windows, block.index))
        if block.index < 2:
            torch.testing.assert_close(block.dense_outputs, hidden_states(dense, windows, block.index + 1))
        assert torch.equal(block.targets, block.dense_outputs) == ("match" in options or block.index == 0)


@pytest.mark.parametrize("match", ["block", "model"])
def test_only_one_loaded_block_is_in_memory(tiny_llama, windows, match):
    alive, n_blocks = [], 0

    def place(module):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        copied = copy.deepcopy(module)
        alive.append(weakref.ref(copied))
        return copied

    with frozen(tiny_llama):
        for block in walk(tiny_llama, windows, match=match, place=place, progress=False):
            block.finish(besa.Wanda().prune_block(block))
            n_blocks += 1
    assert n_blocks == 3


def test_unfinished_blocks_raise(tiny_llama, windows):
    with frozen(tiny_llama), pytest.raises(RuntimeError, match=r"block 0 is not finished"):
        for _ in walk(tiny_llama, windows, progress=False):
            pass


def test_projection_errors_are_those_of_the_first_window(tiny_llama, windows):
    """||(W - W')x||^2 / ||Wx||^2 with the inputs of the pruned model."""
    dense, inputs = copy.deepcopy(tiny_llama), {}
    report = besa.prune(tiny_llama, windows, besa.SparseGPT(), progress=False)
    for index, block in enumerate(find_blocks(tiny_llama)):
        for name, projection in projections(block).items():

            def note(_, args, key=(index, name)):
                inputs[key] = args[0][0].double()

            projection.register_forward_pre_hook(note)
    with torch.no_grad():
        tiny_llama(windows[:1])
    for row in report.rows:
        key = row["block"], row["projection"]
        before, after = (
            projections(find_blocks(model)[key[0]])[key[1]].weight.detach().double() for model in (dense, tiny_llama)
        )
        x = inputs[key].T
        expected = ((before - after) @ x).square().sum() / (before @ x).square().sum()
        assert row["projection_error"] == pytest.approx(float(expected), rel=1e-4), key


def test_losses_against_naive_loops():
    output, target = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    target[0, 3] *= 1000
    by_token, by_channel = 0.0, 0.0
    norms = [sum(float(target[0, t, c]) ** 2 for c in range(3)) ** 0.5 for t in range(5)]
    sizes = [(sum((float(target[0, t, c]) / norms[t]) ** 2 for t in range(5)) / 5) ** 0.5 for c in range(3)]
    for t in range(5):
        lost = [float(target[0, t, c] - output[0, t, c]) / norms[t] for c in range(3)]
        by_token += sum(lost[c] ** 2 / sizes[c] for c in range(3)) / sum(sizes) / 5
    for c in range(3):
        lost = sum(float(target[0, t, c] - output[0, t, c]) ** 2 for t in range(5))
        by_channel += lost / sum(float(target[0, t, c]) ** 2 for t in range(5)) / 3
    assert float(token_error(output, target)) == pytest.approx(by_token, rel=1e-5)
    assert float(token_error(torch.zeros_like(target), target)) == pytest.approx(1, rel=1e-5)
    assert float(reconstruction_error(output, target)) == pytest.approx(by_channel, rel=1e-5)


WANDA, TRAINED = (besa.Wanda(), None), (besa.Exact(update=True), Reconstruct())
MOMENTS = {  # object, its function that is interrupted, at which call; method and reconstruction
    "recording calls": (decoder, "BlockCall", 2, WANDA),
    "collecting statistics": (importance, "InputStatistics", 6, WANDA),
    "learning": (torch.Tensor, "backward", 8, (besa.Besa(), None)),
    "training a block": (torch.Tensor, "backward", 5, TRAINED),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interruption_leaves_no_hook_and_a_usable_model(tiny_llama, windows, monkeypatch, moment):
    owner, name, number, (method, reconstruct) = MOMENTS[moment]
    work, calls = getattr(owner, name), itertools.count(1)
    options = {"progress": False, "reconstruct": reconstruct}

    def interrupting(*args, **kwargs):
        if next(calls) == number:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    def facts():
        parameters = [(p.requires_grad, p.dtype, p.device, p.shape) for p in tiny_llama.parameters()]
        modules = [(module.training, *vars(module)) for module in tiny_llama.modules()]
        return parameters, modules, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()

    tiny_llama.model.layers[1].train()  # restored as it was, not as is usual
    tiny_llama.model.embed_tokens.requires_grad_(False)
    before = facts()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            besa.prune(tiny_llama, windows[:3], method, **options)
    assert facts() == before
    hooks = [vars(module)[kind] for module in tiny_llama.modules() for kind in vars(module) if kind.endswith("_hooks")]
    assert hooks and not any(hooks)
    assert tiny_llama.generate(windows[:1, :4], max_new_tokens=3, pad_token_id=0).shape == (1, 7)
    besa.prune(tiny_llama, windows[:3], method, **options)
