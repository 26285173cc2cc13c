"""Models too large for memory in a notebook's loop: the same numbers, nothing lost, refusals before long work."""

import shutil

import pytest
import torch
from test_shards import save

import besa
from besa.checkpoint import large, plan
from besa.paper.analysis import Owl, stored_bits

FLOAT32, CPU = torch.float32, torch.device("cpu")
METHODS = {"wanda": besa.Wanda(), "besa": besa.Besa(), "4 bits": besa.Besa(quantize=besa.Quantize(bits=4))}


@pytest.fixture
def source(tiny_llama, tmp_path):
    save(tiny_llama, tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def too_large(monkeypatch):
    """No model fits."""
    monkeypatch.setattr(large, "free_device", lambda _: 1000)


def prune_row(source, windows, method, work):
    """A notebook's cell."""
    name, report = large.prune_if_large(source, windows, method, work, FLOAT32, CPU)
    network, _ = besa.load_model(name, FLOAT32, "cpu")
    return name, network, report or besa.prune(network, windows, method, progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_too_large_for_memory_gives_the_same_numbers(source, windows, tmp_path, request, name):
    found, whole, one = prune_row(source, windows, METHODS[name], tmp_path / "work")
    assert found == source and not (tmp_path / "work").exists()
    request.getfixturevalue("too_large")
    found, by_block, other = prune_row(source, windows, METHODS[name], tmp_path / "work")
    assert found == str(tmp_path / "work")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), by_block.state_dict().values()))
    rows = lambda report: [{k: v for k, v in row.items() if k != "block_seconds"} for row in report.rows]
    assert rows(one) == rows(other) and one.sparsity == other.sparsity
    assert stored_bits(whole, one.quantized) == stored_bits(by_block, other.quantized)


def test_what_a_block_takes_while_it_is_pruned_counts(source, windows, tmp_path, monkeypatch):
    free = (plan.BESIDE + 2**19) / large.USABLE  # reconstruction takes as much by itself
    monkeypatch.setattr(large, "free_device", lambda _: int(free))
    assert large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", FLOAT32, CPU) == (source, None)
    reconstruct = besa.Reconstruct("block")
    name, report = large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", FLOAT32, CPU, reconstruct)
    assert name == str(tmp_path / "work") and report.sparsity == 0.5


def test_the_dense_model_is_left_alone(source, windows, tmp_path, too_large):
    assert large.prune_if_large(source, windows, None, tmp_path / "work", FLOAT32, CPU) == (source, None)


def test_what_was_pruned_from_checkpoint_to_checkpoint_goes_on_as_it_began(source, windows, tmp_path, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(large, "free_device", lambda _: 1000)
        large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", FLOAT32, CPU)
    shard = tmp_path / "work" / "model-block-00001.safetensors"
    written = shard.stat().st_mtime_ns
    name, report = large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", FLOAT32, CPU)
    assert name == str(tmp_path / "work") and report.sparsity == 0.5 and shard.stat().st_mtime_ns == written


def test_a_large_model_is_not_converted_and_needs_room_on_the_disk(source, windows, tmp_path, too_large, monkeypatch):
    check = lambda methods, dtype: large.precision_that_fits(source, windows, methods, tmp_path, dtype, CPU)
    assert check([None], torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match=r"stored in torch.float32 and too large to be converted .*give dtype=float32"):
        check([None, besa.Wanda()], torch.bfloat16)
    with pytest.raises(ValueError, match=r"stored in torch.float32"):
        large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", torch.bfloat16, CPU)
    assert check([besa.Wanda()], None) == torch.float32  # what it is stored in
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(ValueError, match=r"too large for the memory of cpu; pruned it takes .* name another results"):
        check([besa.Wanda()], None)


def test_a_large_model_gets_new_values_too_but_is_not_measured_as_a_whole(source, windows, tmp_path, too_large):
    new, cpu = besa.Reconstruct("closed"), torch.device("cpu")
    name, _ = large.prune_if_large(source, windows, besa.Wanda(), tmp_path / "work", torch.float32, cpu, new)
    model, _ = besa.load_model(source, "float32", "cpu")
    besa.prune(model, windows, besa.Wanda(), progress=False, reconstruct=new)
    pruned = besa.load_model(name, "float32", "cpu")[0].state_dict()
    assert all(torch.equal(pruned[key], value) for key, value in model.state_dict().items())
    for method in (besa.Besa(budget="exact", scope="model"), Owl()):
        with pytest.raises(ValueError, match=f"{method.name} with these options measures a model that is in memory"):
            large.prune_if_large(source, windows, method, tmp_path / "other", torch.float32, cpu)
        with pytest.raises(ValueError, match=f"{method.name} with these options measures a model that is in memory"):
            large.precision_that_fits(source, windows, [besa.Wanda(), method], tmp_path, None, cpu)


def test_what_new_values_take_counts_before_a_row_begins(source, windows, tmp_path, monkeypatch):
    asked = source, windows, [besa.Wanda()], tmp_path, torch.bfloat16, CPU
    shapes = large.load_shapes(source)
    alone, new = (
        large._bytes_needed(shapes, windows, torch.bfloat16, CPU, besa.Wanda(), each)
        for each in (None, besa.Reconstruct("block"))
    )
    monkeypatch.setattr(large, "free_device", lambda _: (alone + new) / 2 / large.USABLE)
    assert alone < new and large.precision_that_fits(*asked) == torch.bfloat16
    with pytest.raises(ValueError, match="too large to be converted"):
        large.precision_that_fits(*asked, besa.Reconstruct("block"))


@pytest.mark.parametrize(
    "method, message",
    [
        (besa.Besa(row_group=5), "32 rows do not divide into groups of 5"),
        (besa.Wanda(sparsities=(0.5,)), "1 sparsities are given for 3 blocks"),
        (besa.Besa(budget="exact", sparsities=(0.5,)), "1 sparsities are given for 3 blocks"),
        (besa.Besa(batch_size=4), "6 windows"),
    ],
)
def test_methods_that_do_not_fit_the_model_are_refused(source, windows, tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        large.precision_that_fits(source, windows, [besa.Magnitude(), method], tmp_path, None, CPU)
