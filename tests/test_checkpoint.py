"""From checkpoint to checkpoint: the bits of pruning in memory, after any interruption and on several ranks.

torchrun starts this file, too: `__main__` is what a rank runs.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import safetensors.torch
import torch
from test_decoder import FAMILIES, build
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import besa
from besa.checkpoint import INDEX, Shards
from besa.data.files import sha256
from besa.system import joined, n_ranks, rank

WINDOWS = torch.randint(1, 97, (4, 24), generator=torch.Generator().manual_seed(1))
METHODS = {
    "wanda": (besa.Wanda(), None),
    "sparsegpt": (besa.SparseGPT(), None),
    "besa": (besa.Besa(ignore=("1.mlp.down_proj",)), None),
    "layer-wise": (besa.Besa.layer_wise(), None),
    "quantized": (besa.Besa(quantize=besa.Quantize(bits=4)), None),
    "exact": (besa.Exact(pattern="2:4"), None),
    "closed": (besa.Closed(), None),
    "reconstructed": (besa.Wanda(), besa.Reconstruct()),
}


@pytest.fixture
def source(tiny_llama, tmp_path):
    return save(tiny_llama, tmp_path / "source")


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "notes.md").write_text("of the source")
    return folder


def prune(source, output, method=besa.Wanda(), reconstruct=None, windows=WINDOWS):  # noqa: B008
    return besa.prune_checkpoint(source, output, windows, method, progress=False, reconstruct=reconstruct)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def assert_same(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, others[name]), name


def sums(folder):
    """SHA-256 of every safetensors file of an output, its masks and codes too."""
    return {path.name: sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_is_pruned_to_the_bit_as_in_memory(tiny_llama, source, tmp_path, name):
    method, reconstruct = METHODS[name]
    report = prune(source, tmp_path / "out", method, reconstruct)
    expected = besa.prune(tiny_llama, WINDOWS, method, progress=False, reconstruct=reconstruct)
    assert_same(load(tmp_path / "out"), tiny_llama)
    seconds = {"block_seconds"}
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert {k: v for k, v in row.items() if k not in seconds} == {
            k: v for k, v in other.items() if k not in seconds
        }
    assert report.steps == expected.steps and report.sparsity == expected.sparsity
    assert report.seconds > 0 and report.peak_bytes > 0
    assert report.keep_masks.keys() == expected.keep_masks.keys()
    assert all(torch.equal(report.keep_masks[key], expected.keep_masks[key]) for key in expected.keep_masks)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_and_back(family, tied, tmp_path):
    model = build(family)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    source = save(model.to(torch.bfloat16), tmp_path / "source")
    prune(source, tmp_path / "out")
    model = load(source)
    besa.prune(model, WINDOWS, besa.Wanda(), progress=False)
    assert_same(load(tmp_path / "out"), model)
    stored, total = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        stored |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert stored.keys() == safetensors.torch.load_file(source / "model.safetensors").keys()  # none missing, none extra
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"total_size": total}, "weight_map": stored}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["besa", "layer-wise", "quantized", "reconstructed"])
def test_an_interrupted_run_continues_to_the_same_bytes(source, tmp_path, monkeypatch, name):
    expected = prune(source, tmp_path / "whole", *METHODS[name])
    write = Shards.write

    def stop(shards, index, module, report):
        write(shards, index, module, report)
        raise Stopped

    for _ in range(3):
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(Shards, "write", stop)
            prune(source, tmp_path / "out", *METHODS[name])
        assert not (tmp_path / "out" / INDEX).exists()
    report = prune(source, tmp_path / "out", *METHODS[name])
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert report.steps == expected.steps and len(report.rows) == len(expected.rows)


def test_a_finished_run_is_only_reported(source, tmp_path, monkeypatch):
    expected = prune(source, tmp_path / "out")
    monkeypatch.setattr(besa.Wanda, "prune_block", None)
    assert prune(source, tmp_path / "out").rows == expected.rows
    monkeypatch.undo()
    before = sums(tmp_path / "out")
    (tmp_path / "out" / "besa" / "block-00001.json").unlink()  # one block is pruned again
    assert prune(source, tmp_path / "out").rows[0] == expected.rows[0]
    assert sums(tmp_path / "out") == before


def test_small_files_are_copied_and_what_their_user_changes_stays(source, tmp_path):
    out = tmp_path / "out"
    prune(source, out)
    shards = {f"model-block-{index:05d}.safetensors" for index in range(3)} | {"model-rest.safetensors", INDEX}
    small = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE.txt"}
    assert {path.name for path in out.iterdir()} == shards | small | {"besa"}
    (out / "LICENSE.txt").write_text("mine")
    prune(source, out)
    assert (out / "LICENSE.txt").read_text() == "mine"
    (tmp_path / "other").touch()
    assert (out / "model-rest.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": besa.Wanda(sparsity=0.6)}, "another method: .*0.5.* there, .*0.6.* now"),
        ({"method": besa.SparseGPT()}, "another method: .*wanda.* there, .*sparsegpt.* now"),
        ({"windows": WINDOWS[:2]}, r"another windows: .*\[4, 24\].* there, .*\[2, 24\]"),
        ({"windows": WINDOWS.flip(0)}, "another windows: "),
        ({"reconstruct": besa.Reconstruct()}, "another reconstruct: None there"),
    ],
)
def test_another_run_in_the_same_output_is_refused(source, tmp_path, change, words):
    prune(source, tmp_path / "out")
    before = sums(tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        prune(source, tmp_path / "out", **change)
    assert sums(tmp_path / "out") == before and (tmp_path / "out" / INDEX).exists()


def test_another_source_is_refused(source, tmp_path):
    prune(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"another config.json"):
        prune(source, tmp_path / "out")


def test_a_source_saved_again_under_the_same_names_is_refused(tiny_llama, source, tmp_path):
    prune(source, tmp_path / "out")
    with torch.no_grad():
        tiny_llama.model.norm.weight.add_(1)
    save(tiny_llama, source)
    with pytest.raises(ValueError, match=r"another source: .*model.safetensors"):
        prune(source, tmp_path / "out")


def test_an_embedded_model_is_written_in_its_originals_precision(small_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_CACHE", str(small_cache))
    model, _ = besa.load_model("smollm2-135m", device="cpu")
    report = besa.prune(model, WINDOWS, besa.SparseGPT(), progress=False)
    besa.prune_checkpoint("smollm2-135m", tmp_path / "out", WINDOWS, besa.SparseGPT(), device="cpu", progress=False)
    written = load(tmp_path / "out")
    assert written.dtype == torch.bfloat16 and written.config.dtype == torch.bfloat16 and report.sparsity == 0.5
    if model.dtype == torch.bfloat16:
        assert_same(written, model)


def test_outputs_that_hold_something_else_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="is the source"):
        prune(source, source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files, such as 'thesis.tex'"):
        prune(source, tmp_path / "mine")
    (tmp_path / "locked" / "besa").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "locked" / "besa" / "lock"), pytest.raises(ValueError, match="another process"):
        prune(source, tmp_path / "locked")


def test_windows_and_methods_that_do_not_fit_the_model_are_refused_before_any_work(source, tmp_path):
    with pytest.raises(ValueError, match="97"):
        prune(source, tmp_path / "out", windows=WINDOWS + 90)
    with pytest.raises(ValueError, match="5 sparsities"):
        prune(source, tmp_path / "out", besa.Wanda(sparsities=(0.5,) * 5))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Twelve blocks, so that a run is long enough to be killed in it, and the output of a run that was not."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("deep")
    save(LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)), folder / "source")
    assert run(folder / "source", folder / "whole").wait(120) == 0
    return folder


def run(source, output, *launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, __file__, str(source), str(output)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(deep, tmp_path):
    draw = random.Random(0)
    for finished in (2, 7):
        process = run(deep / "source", tmp_path / "out")
        while not (tmp_path / f"out/besa/block-{finished:05d}.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)
        process.kill()  # SIGKILL
        assert process.wait() != 0
    assert not (tmp_path / "out" / INDEX).exists()
    (tmp_path / "out" / ".tmpAb12Cd").touch()  # safetensors writes to such a file first
    assert run(deep / "source", tmp_path / "out").wait(120) == 0
    assert sums(tmp_path / "out") == sums(deep / "whole")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names - {"lock"} == {path.name for path in (deep / "whole").rglob("*")} - {"lock"}  # nothing half-written


def test_two_ranks_prune_as_one_process(deep, tmp_path):
    """With two windows: a sum of two numbers is rounded alike in any order."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert run(deep / "source", tmp_path / "out", *launcher).wait(240) == 0
    assert sums(tmp_path / "out") == sums(deep / "whole")
    stored = json.loads((tmp_path / "out/besa/run.json").read_text())
    assert stored["ranks"] == 2 and stored["device"] == "cpu"
    with pytest.raises(ValueError, match="another ranks: 2 there, 1 now"):
        prune_deep(deep / "source", tmp_path / "out")


def prune_deep(source, output):
    return prune(source, output, besa.Besa(batch_size=2, epochs=20), windows=WINDOWS[:2])


if __name__ == "__main__":
    with joined():
        report = prune_deep(*map(Path, sys.argv[1:]))
        assert len(report.rows) == 12 * 7 and (rank(), n_ranks()) != (1, 1)
