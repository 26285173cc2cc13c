"""Traps on the way to a GPU, shown without one."""

import copy

import accelerate
import pytest
import torch
from transformers import TrainingArguments

import besa
from besa.beyond import finetune
from besa.beyond.budgets import divergences
from besa.data import models
from besa.system import where_it_fits
from besa.training import FLOAT16_SCALE, loss_scaler, training_log
from besa.walk import frozen, walk

GPU = torch.device("cuda")


@pytest.fixture
def free_memory(monkeypatch):
    """A GPU with 1 MB of free memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**20, 2**30))


def test_a_model_larger_than_the_gpu_is_spread_for_evaluation(tiny_llama, free_memory, monkeypatch):
    moved = []
    monkeypatch.setattr(accelerate, "infer_auto_device_map", lambda model, **_: {"": "cpu"})
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, parts: moved.append(parts) or model)
    monkeypatch.setattr(type(tiny_llama), "to", lambda model, device: moved.append(device) or model)
    assert models.to_device(tiny_llama, GPU) is tiny_llama
    monkeypatch.setattr(type(tiny_llama), "get_memory_footprint", lambda _: 2**20)
    models.to_device(tiny_llama, GPU)
    assert moved == [GPU, {"": "cpu"}]


def test_a_model_that_is_spread_over_devices_is_refused(tiny_llama, windows):
    before = copy.deepcopy(tiny_llama.state_dict())
    tiny_llama.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"spread over devices; load it with device='cpu', and call prune\(device="):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_saves(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(models, "rank", lambda: rank)
    besa.save_model(tiny_llama, tiny_tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved").exists() == (rank == 0)


def test_finetune_takes_one_of_eight_gpus(tiny_llama, windows, monkeypatch):
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    seen = []

    def on_eight_gpus(*arguments, **options):
        made = TrainingArguments(*arguments, **options)
        made._n_gpu = 8
        return made

    class Trainer:
        def __init__(self, model, arguments, **_):
            seen.append((arguments.n_gpu, arguments.train_batch_size))

        def train(self, **_):
            pass

    monkeypatch.setattr(finetune, "TrainingArguments", on_eight_gpus)
    monkeypatch.setattr(finetune, "Trainer", Trainer)
    besa.finetune(tiny_llama, windows, report, progress=False)
    assert seen == [(1, 2)]


@pytest.mark.parametrize("match, dense, n_streams", [("block", False, 2), ("model", False, 3), ("block", True, 4)])
def test_hidden_states_leave_the_gpu_if_all_their_streams_do_not_fit(
    tiny_llama, windows, free_memory, monkeypatch, match, dense, n_streams
):
    asked = []
    monkeypatch.setattr("besa.walk.where_it_fits", lambda _, device, n: asked.append(n) or device)
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, match=match, dense=dense, progress=False))
    streams = [block.inputs, block.dense_inputs, block.targets, block.dense_outputs]
    assert asked == [n_streams] == [len({id(stream) for stream in streams if stream is not None})]
    stream = torch.empty(2**17 // n_streams, device="meta", dtype=torch.uint8)
    assert where_it_fits(stream, GPU, n_streams) == GPU
    assert where_it_fits(stream, GPU, 3 * n_streams) == torch.device("cpu")


def test_hidden_states_live_where_they_are_told_to(tiny_llama, windows, monkeypatch):
    monkeypatch.setattr("besa.walk.where_it_fits", None)  # is not asked
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, hidden_device=torch.device("cpu"), progress=False))
    assert block.inputs.device == block.targets.device == torch.device("cpu")


def test_budgets_move_one_block_at_a_time(tiny_llama, windows, monkeypatch):
    expected = divergences(tiny_llama, windows, (0.3, 0.7))
    moved = []
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda module, device: moved.append((module, device)) or to(module, device)
    )
    found = divergences(tiny_llama, windows, (0.3, 0.7), torch.device("cpu:0"))
    assert (found == expected).all()
    there = [module for module, device in moved if device == torch.device("cpu:0")]
    assert there == list(tiny_llama.model.layers)


def test_skipped_steps_are_counted_after_thousands_of_others(tiny_llama, windows):
    with frozen(tiny_llama):
        block = next(walk(tiny_llama, windows, progress=False))
    block.inputs = block.inputs.half()
    scaler = loss_scaler(block)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], 0.1)
    for step in range(2100):
        weight.grad = torch.tensor(torch.inf if step in (5, 2050) else 1.0)
        scaler.scale(weight)
        scaler.step(optimizer)
        scaler.update()
    log = training_log(block, [torch.ones(3)] * 2100, scaler, 2100)
    assert log[-1]["skipped"] == 2 and scaler.get_scale() == FLOAT16_SCALE / 4
