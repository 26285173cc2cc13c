"""Training end to end: zeros stay, the rest of the model comes back as it was."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer

import besa
from besa.beyond.adapters import pruned_linears
from besa.beyond.finetune import step_size
from besa.decoder import find_blocks, projections


@pytest.fixture
def pruned(tiny_llama, windows):
    tiny_llama.requires_grad_(False).model.norm.requires_grad_(True)
    return tiny_llama, besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


def loss(model, windows):
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def assert_zeros(model, report):
    for (index, name), keep_mask in report.keep_masks.items():
        assert not projections(find_blocks(model)[index])[name].weight[~keep_mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_and_norms_learn_and_nothing_else_changes(pruned, windows, dtype):
    model, report = pruned
    model.to(dtype)
    before, rotary = copy.deepcopy(model), copy.deepcopy(model.model.rotary_emb.inv_freq)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    besa.finetune(model, windows, report, lr=1e-2, epochs=3, progress=False)
    assert torch.equal(torch.rand(1), expected)  # the global generator goes on as if nothing had happened
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert loss(model.float(), windows) < loss(before.float(), windows) - 0.05
    assert_zeros(model, report)
    state, old = model.state_dict(), before.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(state["model.norm.weight"], old["model.norm.weight"])
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary) and not model.training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_step_size_follows_the_mean_square_of_the_weights(pruned):
    for linear, keep_mask in pruned_linears(*pruned):
        linear.weight.data = 0.2 * keep_mask  # half of them
    assert step_size(*pruned) == 1e-4


def test_long_windows_are_cut_into_equal_parts(pruned, windows):
    (whole, report), cut = pruned, copy.deepcopy(pruned[0])
    besa.finetune(whole, windows, report, max_length=10, progress=False)
    besa.finetune(cut, windows.reshape(-1, 8), report, progress=False)
    assert all(map(torch.equal, whole.state_dict().values(), cut.state_dict().values()))


def test_adapters_are_merged_and_keep_zeros(pruned, windows):
    model, report = pruned
    names, before = [name for name, _ in model.named_parameters()], copy.deepcopy(model)
    besa.finetune(model, windows, report, lr=1e-2, epochs=3, lora=LoraConfig(r=4), progress=False)
    assert [name for name, _ in model.named_parameters()] == names and loss(model, windows) < loss(before, windows)
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    assert_zeros(model, report)


def test_the_same_call_continues_after_the_last_whole_epoch(pruned, windows, tmp_path, monkeypatch):
    model, report = pruned
    whole, broken, again = (copy.deepcopy(model) for _ in range(3))
    besa.finetune(whole, windows, report, epochs=2, progress=False)
    step, taken = Trainer.training_step, []

    def interrupt(self, *arguments):
        taken.append(1)
        if len(taken) == 5:  # of 2 x 3
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "training_step", interrupt)
        besa.finetune(broken, windows, report, epochs=2, folder=tmp_path, progress=False)
    besa.finetune(again, windows, report, epochs=2, folder=tmp_path, progress=False)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), msg=name)
