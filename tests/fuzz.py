"""An hour of whatever may come in, outside `make test`: it is refused by name, or goes through with right numbers.

    python tests/fuzz.py --minutes 60 [--seed N] [configurations] [notes] [records] [headers] [packed] [packing]

A refusal is a ValueError or an OSError, on the terminal one line, that names field or file. Nothing half-written stays,
and what a user has in an output is not touched. hypothesis shrinks what it finds; each cause is printed once.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import resource
import runpy
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import get_type_hints

os.environ["TQDM_DISABLE"] = "1"

import hypothesis
import hypothesis.strategies as st
import numpy as np
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from test_packed import on_path
from test_page import write_notebook
from test_shards import load, save, weights
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import besa
from besa.__main__ import app
from besa.decoder import find_blocks, projections
from besa.machine.files import HALF_WRITTEN, read_note
from besa.machine.provenance import ROOT
from besa.packed_files import packed_projections
from besa.paper import records, tables
from besa.prune import TOLERANCE, Method
from besa.report import MISSED

WINDOWS = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(1))
SECONDS, BYTES = 60, 16 * 2**30
"""What one example may take, and ask for."""


class Broken(Exception):
    """A promise is."""


class Refused(Exception):
    """As it may be."""


def promise(kept, what):
    if not kept:
        raise Broken(what)


@contextlib.contextmanager
def refusing(*names):
    """A refusal is fine that names one of these."""
    try:
        yield
    except (ValueError, OSError) as error:
        promise(any(str(name) in str(error) for name in names), f"unclear: {type(error).__name__}: {error}")
        raise Refused from error


def command(*arguments, names):
    """What `besa ...` prints, or one line that names one of these."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    with refusing(*names):
        if done.exit_code:
            raise ValueError(done.stderr.rpartition("besa: ")[2])  # behind progress bars
    return done.stdout


# Models, texts and folders


def tiny(hidden=16, dtype=torch.float32):
    """Two blocks of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "vocab_size": 48}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    return LlamaForCausalLM(config).eval().to(dtype)


def own_text(folder):
    (folder / "mine").mkdir(parents=True)
    for split in ("train", "test"):
        line = json.dumps({"text": " ".join(f"w{i % 40}" for i in range(99))})
        (folder / "mine" / f"{split}.jsonl").write_text(line + "\n")
    os.environ["BESA_DATA"] = str(folder)


MINE = {".env.2": "secret", "notes.md": "mine", "besa/.git.1": "mine"}
"""What a user has in an output."""


@contextlib.contextmanager
def copied(folder, damage, mine=()):
    """A copy of a folder with damaged files, and what is its user's own."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy)
        for name, how in dict(damage).items():
            (copy / name).write_bytes(damaged((copy / name).read_bytes(), how))
        for name in mine:
            (copy / name).write_text(MINE[name])
        try:
            yield copy
        finally:
            promise(not list(Path(place).rglob(f"{HALF_WRITTEN}*")), "something half-written stays")
            promise(all((copy / name).read_text() == MINE[name] for name in mine), "a user's file is changed")


# What comes in

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]
WORDS = ["", "..", "../x", "/etc/passwd", "\ud800", "\0", "a\nb", "x" * 300, "NaN", "F16", "I32", "BOOL", "F8_E4M3"]
LEAVES = st.sampled_from([None, True, False, *NUMBERS, *WORDS]) | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda e: st.lists(e, max_size=3) | st.dictionaries(st.text(max_size=3), e, max_size=2))
WHOLE = st.sampled_from([b"", b"{", b"[]", b"{}", b"null", b"NaN", b"1e999", b"\xff\x00", b"[" * 10**5, b'"\\ud800"'])
FOREIGN = [np.float64("nan"), np.float32(0.5), np.int64(2), np.bool_(True), np.ones(2), np.array(0.5), Decimal("0.5")]
FOREIGN += [torch.tensor(0.5), torch.tensor([1, 2]), torch.float16, object(), float, b"row", {1}, range(2), (0.5, 1j)]
"""Values that no JSON holds."""


def places(tree, path=()):
    """The paths of a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def edits(tree, under=()):
    """One entry set to anything or to what stands elsewhere, changed by a number, left out, or one put beside it."""
    found = list(places(tree))
    path = st.sampled_from([path for path in found if len(path) > len(under) and path[: len(under)] == under] or [()])
    small = [value for value in (at(tree, path) for path in found) if len(str(value)) < 80]
    value = JSON | st.sampled_from(small)
    put = st.tuples(st.sampled_from(["set", "beside"]), path, value)
    return put | st.tuples(st.sampled_from(["add", "drop"]), path, st.sampled_from([-1, 1, 8, 1e-3]))


def edited(tree, edit):
    how, path, value = edit
    if not path:
        return value
    tree = json.loads(json.dumps(tree))
    parent, key = at(tree, path[:-1]), path[-1]
    if how == "set":
        parent[key] = value
    elif how == "drop":
        del parent[key]
    elif how == "beside" and isinstance(parent, dict):
        parent["new"] = value
    elif how == "add" and isinstance(parent[key], int | float):
        parent[key] += value
    return tree


def parted(data):
    """The header of a safetensors file, and what is behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def damages(data, under=()):
    """Of a file: cut, overwritten somewhere, all another; edits of its JSON, or of its header."""
    some, where = st.binary(min_size=1, max_size=8), st.integers(0, len(data))
    found = st.tuples(st.just("cut"), where) | st.tuples(st.just("put"), where, some) | st.tuples(st.just("all"), WHOLE)
    with contextlib.suppress(ValueError):
        return st.tuples(st.just("json"), edits(json.loads(data), under)) | found
    with contextlib.suppress(ValueError, struct.error):
        header, rest = parted(data)
        found |= st.tuples(st.just("put"), st.integers(0, len(data) - len(rest)), some)
        return st.tuples(st.just("header"), edits(header)) | st.tuples(st.just("length"), st.integers(0, 2**64)) | found
    return found


def damaged(data, damage):
    how, *values = damage
    if how == "cut":
        return data[: values[0]]
    if how == "put":
        return data[: values[0]] + values[1] + data[values[0] + len(values[1]) :]
    if how == "all":
        return values[0]
    if how == "json":
        return json.dumps(edited(json.loads(data), values[0])).encode() if data else data
    if how == "length":
        return struct.pack("<Q", values[0] % 2**64) + data[8:]
    header, rest = parted(data)
    header = json.dumps(edited(header, values[0])).encode()
    return struct.pack("<Q", len(header)) + header + rest


def in_files(folder, *patterns, under=()):
    """The name of one of the files, and what happens to it."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    each = lambda path: st.tuples(st.just(str(path.relative_to(folder))), damages(path.read_bytes(), under))
    return st.one_of(*map(each, paths))


# Configurations

CLASSES = [besa.Besa, besa.Wanda, besa.SparseGPT, besa.Magnitude, besa.Quantize, besa.Reconstruct, besa.FineTune]
COUNTS = ("epochs", "iterations", "batch_size", "rank", "patience", "group_size", "reconstruct", "block_columns")
LIKELY = dict.fromkeys(COUNTS, st.sampled_from([1, 2, 4, 8, 16]))
LIKELY |= {"row_group": st.sampled_from(["row", "layer", 1, 2, 8]), "candidates": st.integers(2, 12)}
LIKELY |= {"pattern": st.sampled_from(["2:4", "1:4", "N:8", "8:16", "N:4"]), "sparsity": st.floats(0, 1)}
LIKELY |= {"ignore": st.lists(st.sampled_from(["0", "1.mlp.down_proj", "re:.*proj", "re:(", "nope"]), max_size=2)}
LIKELY |= {"sparsities": st.tuples(*[st.floats(0, 1)] * 2), "lr": st.floats(1e-5, 10), "d_coef": st.floats(0.1, 1e6)}


@st.composite
def values_of(draw, cls):
    """Some fields, each with a likely value, one of its annotation, or anything."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        typed = st.from_type(hints[name])
        odd = JSON | st.sampled_from(FOREIGN)
        found[name] = draw(st.one_of(LIKELY.get(name, typed), LIKELY.get(name, typed), typed, odd))
    return found


def configurations(_):
    """Refused by the name of a field, or it prunes, trains and packs a model as it says."""
    quantize = st.builds(besa.Quantize, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([None, 8, 5]))
    st.register_type_strategy(besa.Quantize, quantize)
    example = st.sampled_from(CLASSES).flatmap(lambda cls: st.tuples(st.just(cls), values_of(cls)))
    return st.tuples(example, st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), check_configuration


def check_configuration(example):
    (cls, values), dtype = example
    with refusing(*values, "sparsity"):
        made = cls(**values)
    if any(type(value) is int and abs(value) > 300 for value in vars(made).values()):
        return  # would take too long
    model, before = tiny(dtype=dtype), tiny(dtype=dtype).state_dict()
    method = made if isinstance(made, Method) else besa.Wanda(quantize=made if cls is besa.Quantize else None)
    with refusing(""):
        new_values = made if cls is besa.Reconstruct else None
        report = besa.prune(model, WINDOWS, method, progress=False, reconstruct=new_values)
    check_pruned(model, method, report, before)
    if cls is besa.FineTune:
        with refusing(""):
            besa.finetune(model, WINDOWS, report, made, dense=tiny(dtype=dtype), progress=False)
        check_pruned(model, method, report, before)
    with torch.no_grad():
        logits = model(WINDOWS).logits
        with refusing("smaller packed"):  # few zeros
            besa.pack(model, report)
        promise(torch.allclose(model(WINDOWS).logits, logits, atol=0.1 * float(logits.abs().max())), "packed: others")


def check_pruned(model, method, report, before):
    """Finite, 0 where and as often as the report says, and all else as it was."""
    found = {(i, name): p.weight for i, b in enumerate(find_blocks(model)) for name, p in projections(b).items()}
    promise(all(torch.isfinite(weight).all() for weight in found.values()), "a weight is not finite")
    others = {name: value for name, value in model.state_dict().items() if "proj" not in name}
    promise(all(torch.equal(value, before[name]) for name, value in others.items()), "more than projections changed")
    promise(not any(found[key][~mask].any() for key, mask in report.keep_masks.items()), "what is pruned is not 0")
    for block in (0, 1):
        rows = [row for row in report.rows if row["block"] == block]
        pruned = [row for row in rows if row["note"] != "ignored"]
        zeros = [int((~report.keep_masks[block, row["projection"]]).sum()) for row in rows]
        promise(zeros == [row["zeros"] for row in rows], "the rows count other zeros")
        target = method.sparsities[block] if method.sparsities else method.sparsity
        sizes = [sum(row["rows"] * row["columns"] for row in some) for some in (rows, pruned)]
        near = any(abs(sum(zeros) - target * size) <= TOLERANCE * size + 1 for size in sizes)
        promise(near or not pruned or any(MISSED in row["note"] for row in pruned), "another sparsity without a word")


# A run's notes in its output


def notes(folder):
    """A run that is finished, or half finished, ends with the same bytes and report, or names its output."""
    source = save(tiny(), folder / "source")
    own_text(folder / "data")
    windows = besa.calibration_windows("mine", besa.load_model(source)[1], 4, 8)
    made = lambda out: besa.prune_checkpoint(source, out, windows, besa.Wanda(), device="cpu", progress=False)
    report, expected = made(folder / "whole"), weights(folder / "whole")
    shutil.copytree(folder / "whole", folder / "half")
    (folder / "half" / "besa" / "block-00001.json").rename(folder / "half" / "besa" / "block-00001.json.off")
    facts = lambda report: [{**row, "block_seconds": 0} for row in report.rows]
    options = ["--method", "wanda", "--calibration", "mine", "--n-samples", 4, "--seq-len", 8, "--device", "cpu"]

    def check(example):
        start, by_command, damage = example
        damage = [(name, how) for name, how in damage if (folder / start / name).exists()]
        with copied(folder / start, damage, MINE) as out:
            if by_command:
                told = command("prune", source, out, *options, names=[out])
                promise(f"sparsity {report.sparsity:.4f} in 2 blocks" in told, told)
            else:
                with refusing(out):
                    again = made(out)
                promise(facts(again) == facts(report) and 0 < again.seconds < SECONDS, "another report")
            found = {name: total for name, total in weights(out).items() if name not in MINE}
            promise(found == expected, "other bytes")

    damage = in_files(folder / "whole", "besa/*.json", "*.index.json")
    return st.tuples(st.sampled_from(["whole", "half"]), st.booleans(), st.lists(damage, min_size=1, max_size=2)), check


# Records, and what their metrics are means of


def finished_run(folder):
    """Three rows, with a table."""
    about = {"model": "llama-7b", "profile": "quick", "recipe": {"device": "cpu"}, "results": str(folder / "table1")}
    run = records.Run("table1", **about).on(WINDOWS, dict.fromkeys(["wikitext2", "c4"], WINDOWS[0]), torch.float32)
    rows = {"dense": None, "wanda": besa.Wanda(), "besa-row-wise": besa.Besa()}
    for row, method in rows.items():
        report = besa.prune(tiny(), WINDOWS, method, progress=False) if method else None
        losses = {name: np.linspace(1, 2, 8) for name in run.segments}
        run.save(row, method, report, {name: float(np.exp(each.mean())) for name, each in losses.items()}, losses)
    return run, rows


def told_by(run, rows):
    """What a notebook's cells say of a run."""
    found = run.records(rows)
    claims = [("besa-row-wise", "wanda"), ("wanda", "dense")]
    yield run.write_table(tables.summary(found), "Perplexity")
    yield run.write_published(found) + run.write_verdicts(found, claims) + run.write_reference(found)
    yield run.write_table(tables.over_draws(tables.summary([*found, *found])), "Draws", "-draws")
    yield run.write_table(tables.sources(found), "Sources", "-sources") + tables.citation(found)
    yield tables.block_sparsities(found[-1])


def of_records(folder):
    """The report goes on without what is damaged; a notebook's cells name it, or say what they said."""
    page = runpy.run_path(str(ROOT / "reproduce" / "page.py"))
    run, rows = finished_run(folder / "results")
    expected = list(told_by(run, rows))
    (folder / "reproduce").mkdir()
    write_notebook(folder / "reproduce" / "table1.ipynb", "# Table 1")
    built = lambda results: page["build"](folder / "reproduce", results, folder / "reproduce" / "README.md")
    text, skipped = built(folder / "results")
    promise("| Table 1 |" in text and not skipped, skipped)

    def check(example):
        age, damage = example
        with copied(folder / age, damage) as copy:
            names = [Path(name).name for name, _ in damage]
            text, skipped = built(copy)
            promise("| Table 1 |" in text and all(any(name in line for name in names) for line in skipped), skipped)
            page["shown"]("table1", copy / "table1")
            run.folder, tables.REFERENCE = copy / "table1", copy.parent / "none"
            with refusing(*names, *rows):
                told = list(told_by(run, rows))
            run.folder = folder / "results" / "table1"
            tables.REFERENCE = copy
            with refusing(*names):
                run.write_reference(run.records(rows))
            promise(age == "older" or told == expected, "other numbers")

    shutil.copytree(folder / "results", folder / "older")
    for path in (folder / "older").glob("*/records/*.json"):
        path.write_text(json.dumps(read_note(path)))  # without its sum
    damage = in_files(folder / "results", "table1/records/*.json", "table1/samples/*.npz", "table1/*.csv")
    return st.tuples(st.sampled_from(["results", "older"]), st.lists(damage, min_size=1, max_size=2)), check


# A source's headers


def headers(folder):
    """What safetensors itself reads, and is the model's, is loaded as it is; all else is refused."""
    save(tiny(), folder / "single"), save(tiny(), folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    tiny().save_pretrained(folder / "sharded", max_shard_size="10KB")
    own_text(folder / "data")
    kinds = {name: (value.shape, value.dtype) for name, value in tiny().state_dict().items()}

    def check(example):
        form, way, damage = example
        with copied(folder / form, [damage]) as copy:
            names, out = [copy, damage[0], "look for NaN"], copy.parent / "out"
            if way == "load":
                with refusing(*names):
                    found = besa.load_model(copy, "float32", "cpu")[0].state_dict()
            elif way == "prune":
                with refusing(*names):
                    besa.prune_checkpoint(copy, out, WINDOWS, besa.Wanda(), device="cpu", progress=False)
                found = {name: value for name, value in load(out).state_dict().items() if "proj" not in name}
            else:
                options = ["--texts", "mine", "--seq-len", 8, "--device", "cpu", "--dtype", "float32"]
                command("evaluate", copy, *options, names=names)
                found = {}
            stored = {}
            for path in copy.glob("*.safetensors"):
                stored |= safetensors.torch.load_file(path)  # it is legal, or should have been refused
            promise(
                {name: (value.shape, value.dtype) for name, value in stored.items()} == kinds, "an odd file is read"
            )
            same = lambda name: torch.equal(found[name].nan_to_num(0.5), stored[name].nan_to_num(0.5))
            promise(all(map(same, found)), "other numbers")

    ways = st.sampled_from(["load", "prune", "evaluate"])
    each = lambda form: in_files(folder / form, "*.safetensors", "*.index.json", "config.json")
    return st.one_of(*(st.tuples(st.just(form), ways, each(form)) for form in ("single", "sharded"))), check


# Packed files


def packed(folder):
    """What loads is multiplied as it is unpacked; all else is refused."""
    for form, quantize in (("values", None), ("codes", besa.Quantize(bits=4)), ("bytes", besa.Quantize(bits=8))):
        model = tiny(64, torch.bfloat16)
        besa.pack(model, besa.prune(model, WINDOWS, besa.Wanda(sparsity=0.7, quantize=quantize), progress=False))
        promise(len(packed_projections(model)) == 14, "nothing is packed")
        save(model, folder / form)
    own_text(folder / "data")

    def check(example):
        form, way, damage = example
        with copied(folder / form, damage) as copy:
            names = [copy, *(name for name, _ in damage), "look for NaN", "proj", "packed format"]
            if way == "evaluate":
                command("evaluate", copy, "--texts", "mine", "--seq-len", 8, "--device", "cpu", names=names)
                return
            with refusing(*names):
                model = besa.load_model(copy, torch.bfloat16, "cpu")[0] if way == "load" else from_pretrained(copy)
            for name, module in packed_projections(model).items():
                dense = module.dense()
                with on_path("none"):  # torch's own indexing
                    promise(torch.equal(module.dense().nan_to_num(), dense.nan_to_num()), f"{name}: other weights")
            with torch.no_grad():
                logits = [model(tokens).logits for tokens in (WINDOWS[:1, :1], WINDOWS)]
                besa.unpack(model)
                for tokens, one in zip((WINDOWS[:1, :1], WINDOWS), logits, strict=True):
                    other = model(tokens).logits
                    near = {"atol": 0.05 * float(other.abs().nan_to_num(0, 0).max()), "equal_nan": True}
                    promise(not other.isfinite().all() or torch.allclose(one, other, **near), "another product")

    ways = st.sampled_from(["load", "from_pretrained", "evaluate"])
    inside = lambda form: in_files(folder / form, "config.json", under=("quantization_config",))
    each = lambda form: st.lists(in_files(folder / form, "*.safetensors") | inside(form), min_size=1, max_size=2)
    return st.one_of(*(st.tuples(st.just(form), ways, each(form)) for form in ("values", "codes", "bytes"))), check


def from_pretrained(folder):
    """What transformers refuses by itself, and that it warns of missing tensors, is its own affair."""
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:
        if any("/besa/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise Refused from error
    if found["missing_keys"]:
        raise Refused
    return model


# What a run leaves for `besa pack`


def packing(folder):
    """Masks and codes are those of the weights, or they are refused."""
    save(tiny(64), folder / "source")
    for form, quantize in (("masks", None), ("codes", besa.Quantize(bits=4))):
        method = besa.Wanda(sparsity=0.7, quantize=quantize)
        besa.prune_checkpoint(folder / "source", folder / form, WINDOWS, method, device="cpu", progress=False)
    expected = {form: load(folder / form).state_dict() for form in ("masks", "codes")}

    def check(example):
        form, damage = example
        with copied(folder / form, damage) as copy:
            command("pack", copy, copy.parent / "out", names=[copy, "other weights", "proj"])
            model = load(copy.parent / "out")
            besa.unpack(model)
            same = [torch.equal(value, expected[form][name]) for name, value in model.state_dict().items()]
            promise(all(same), "other weights")

    each = lambda form: st.lists(in_files(folder / form, f"besa/{form}*.safetensors"), min_size=1, max_size=2)
    return st.one_of(*(st.tuples(st.just(form), each(form)) for form in ("masks", "codes"))), check


# The hunt

TARGETS = {"configurations": configurations, "notes": notes, "records": of_records}
TARGETS |= {"headers": headers, "packed": packed, "packing": packing}


def cause_of(error):
    """What tells one find from another: its kind and the last line of besa that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/besa/" in frame.filename]
    return type(error).__name__, str(error)[:40] if isinstance(error, Broken) else str(frames[-1:])


def hunt(target, seconds, seed):
    """Try examples of a target for so long; each new cause is shrunk and printed."""
    tally, causes, end = Counter(), set(), time.monotonic() + seconds

    def attempt(example):
        tally["tried"] += 1
        signal.alarm(SECONDS)
        try:
            check(example)
            tally["gone through"] += 1
        except Refused:
            tally["refused"] += 1
        except Exception as error:
            if cause_of(error) not in causes:
                raise
            tally["found again"] += 1
        finally:
            signal.alarm(0)

    with tempfile.TemporaryDirectory() as folder:
        examples, check = TARGETS[target](Path(folder))
        options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "max_examples": 100}
        options |= {"phases": [Phase.generate, Phase.shrink], "report_multiple_bugs": False}
        while time.monotonic() < end:
            try:
                hypothesis.seed(seed := seed + 1)(settings(**options)(hypothesis.given(examples)(attempt)))()
            except Exception as error:
                causes.add(cause_of(error))
                print(f"\n--- {target}, find {len(causes)}", flush=True)
                traceback.print_exception(error, limit=-6, chain=False)
    print(f"{target}: {dict(tally)}, {len(causes)} causes", flush=True)
    return len(causes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=60, help="shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chosen = given.targets or list(TARGETS)
    faulthandler.enable()
    signal.signal(signal.SIGALRM, lambda *_: promise(False, f"more than {SECONDS} s"))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    transformers.utils.logging.set_verbosity_error()
    raise SystemExit(sum(hunt(target, 60 * given.minutes / len(chosen), given.seed) for target in chosen))


if __name__ == "__main__":
    main()
