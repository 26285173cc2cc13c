"""Files that somebody else put, changed or broke: left alone, named, healed; never written through, never trusted."""

import contextlib
import errno
import json
import os
import resource
import shutil

import pytest
import safetensors
import torch
from test_shards import load, prune, source, weights  # noqa: F401 (a fixture)
from typer.testing import CliRunner

import besa
from besa.__main__ import app
from besa.checkpoint import format as checkpoint
from besa.checkpoint import pack, resume
from besa.checkpoint import run as shards
from besa.inputs import assets
from besa.inputs.models import load_shapes
from besa.machine.files import HALF_WRITTEN, replacing, write_text
from besa.masks import KeepMasks
from besa.quantize import save_quantized


@pytest.fixture
def made(source, tmp_path, windows):  # noqa: F811
    """A function that prunes the source into the same output, always by the same command."""
    return lambda: prune(source, tmp_path / "out", windows, besa.Wanda()) and tmp_path / "out"


# What a user has in the output


def test_a_repeated_command_leaves_what_its_user_put_or_changed(made, source):  # noqa: F811
    out = made()
    names = (".notes.2024.md", ".env.2", ".git.1", ".tmpA1b2C3", "hidden-0-1.bin", HALF_WRITTEN + "by me", "LICENSE")
    for name in names:
        (out / name).write_text("mine")
    (out / ".cache.12").mkdir()
    (out / "generation_config.json").write_text('{"temperature": 0.1}')
    before = weights(out)
    made()
    assert weights(out) == before and (out / ".cache.12").is_dir()
    (source / "LICENSE").write_text("theirs")
    (source / "README.txt").write_text("first")
    made()
    assert weights(out) == before | {"README.txt": weights(source)["README.txt"]}
    (source / "README.txt").write_text("second")  # not changed by the user: it is kept up to date
    made()
    assert (out / "README.txt").read_text() == "second" and (out / "LICENSE").read_text() == "mine"


# Names and links that lead elsewhere


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../secret.safetensors"}, "names the shard '../secret.safetensors'"),
        ({"a": "/etc/secret.safetensors"}, "names the shard '/etc/secret.safetensors'"),
        ({"a": "sub/secret.safetensors"}, "names the shard 'sub/secret.safetensors'"),
        ({"a": "..\\secret.safetensors"}, "no file beside it"),
        ({"a": ".."}, "names the shard '..'"),
        ({"a": ""}, "names the shard ''"),
        ({"a": 7}, "names the shard 7"),
        ({"a": [1]}, "is not an index of shards"),
        ({"a": "one", "b": 2}, "is not an index of shards"),
        ({}, "it names no shard"),
        ([], "is not an index of shards"),
        (None, "is not an index of shards"),
    ],
)
def test_an_index_names_files_beside_it_or_is_refused(tmp_path, weight_map, words):
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json") as error:
        checkpoint.shard_paths(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe"])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / checkpoint.INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=r"index.json is not an index of shards .*; fetch that file again"):
        checkpoint.shard_paths(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "evil.py", "more.json", "chat.jinja"])
def test_a_source_whose_links_lead_out_is_refused_before_any_work(source, tmp_path, windows, name):  # noqa: F811
    (tmp_path / "secret").write_text("secret")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*secret, out of its folder"):
        prune(source, tmp_path / "out", windows)
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_and_in_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--me--m" / "snapshots" / "abc", tmp_path / "models--me--m" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "LICENSE").write_text("free")
    (snapshot / "LICENSE.txt").symlink_to("LICENSE")
    (snapshot / "folder.json").mkdir()
    checkpoint.carry_over(snapshot, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "LICENSE", "LICENSE.txt"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_no_link_that_another_user_planted_is_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in (f".out.{os.getpid()}.json", "out.json"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "out.json") as temporary:
        assert temporary.parent.stat().st_mode & 0o077 == 0 and temporary.parent.parent == tmp_path
        temporary.write_text("{}")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "out.json").read_text() == "{}" and not (tmp_path / "out.json").is_symlink()
    assert not list(tmp_path.glob(HALF_WRITTEN + "*"))
    write_text(tmp_path / "plain.txt", "")
    (tmp_path / "touched").touch()
    assert (tmp_path / "plain.txt").stat().st_mode == (tmp_path / "touched").stat().st_mode


def test_hidden_states_are_not_written_through_a_link(source, tmp_path, windows):  # noqa: F811
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out" / "besa").mkdir(parents=True)
    (tmp_path / "out" / "besa" / "hidden-0-0.bin").symlink_to(tmp_path / "victim")
    (tmp_path / "out" / "besa" / "hidden-0-1.bin").symlink_to(tmp_path / "not there")
    prune(source, tmp_path / "out", windows, besa.Wanda(), hidden_states="file")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "not there").exists()


# Python code that comes with a model


@pytest.fixture
def with_code(source, tmp_path):  # noqa: F811
    """A model whose code leaves a file behind when it is run."""
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | own))
    (source / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    return source


@pytest.mark.parametrize("load_it", [besa.load_model, load_shapes, checkpoint.open_checkpoint])
def test_code_runs_only_with_the_flag_and_nobody_is_asked(with_code, tmp_path, monkeypatch, load_it):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    name = with_code if load_it is checkpoint.open_checkpoint else str(with_code)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_it(name)
    assert not (tmp_path / "executed").exists()
    with contextlib.suppress(Exception):  # the code is none that loads
        load_it(name, trust_remote_code=True)
    assert (tmp_path / "executed").exists()


def test_evaluate_does_not_take_yes_from_a_pipe(no_type_checks, with_code, tmp_path):
    line = ["evaluate", str(with_code), "--device", "cpu", "--texts", "", "--tasks", "arc_easy"]
    done = CliRunner().invoke(app, line, input="y\n")
    assert done.exit_code == 1 and "--trust-remote-code" in done.output
    assert not (tmp_path / "executed").exists()


# What a power cut or a bad disk leaves

DAMAGE = [b"", b"{", b"[]", b"{}", b"null", b"\xff\x00", b"[" * 100000]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_note_is_read_as_nothing(tmp_path, damage):
    (tmp_path / "note.json").write_bytes(damage)
    assert resume.note_or_nothing(tmp_path / "note.json") == {}


@pytest.mark.parametrize("damage", [b"", b"{}"])
def test_damaged_notes_heal_or_are_named(made, tmp_path, damage):
    out = made()
    before, notes = weights(out), {path: path.read_bytes() for path in (out / "besa").glob("*.json")}
    (out / "besa" / "source.json").write_bytes(damage)
    (out / "besa" / "block-00001.json").write_bytes(damage)
    (out / "besa" / "carried.json").write_bytes(damage)
    made()
    assert weights(out) == before
    assert (out / "besa" / "source.json").read_bytes() == notes[out / "besa" / "source.json"]
    (out / "besa" / "run.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"run.json is damaged: .* the 3 finished blocks .* delete"):
        made()
    for path in (out / "besa").glob("block-*.json"):  # no finished block: nothing that could be of another run
        path.unlink()
    made()
    assert weights(out) == before and load(out)


CHANGED = [
    ("block-00001.json", '"rows": 32', '"rows": 16'),
    ("block-00001.json", '"zeros": 512', '"zeros": 600'),
    ("block-00001.json", '"seconds": ', '"seconds": 9'),
    ("block-00001.json", '"note": ""', '"note": null'),
    ("source.json", '"sha256": "', '"sha256": "0'),
    ("carried.json", '"config.json": "', '"config.json": "0'),
]


def test_a_value_that_was_changed_in_a_note_is_found(source, tmp_path, windows):  # noqa: F811
    report, out = prune(source, tmp_path / "out", windows, besa.Wanda()), tmp_path / "out"
    before, facts = weights(out), [{**row, "block_seconds": 0} for row in report.rows]
    for name, old, new in CHANGED:
        path = out / "besa" / name
        text = path.read_text().replace(old, new)
        assert new in text and path.write_text(text)
        again = prune(source, out, windows, besa.Wanda())
        assert weights(out) == before and again.seconds < 10
        assert [{**row, "block_seconds": 0} for row in again.rows] == facts, (name, new)
    path = out / "besa" / "run.json"
    path.write_text(path.read_text().replace('"ranks": 1', '"ranks": 2'))
    with pytest.raises(ValueError, match=r"run.json is damaged: it must say of which run the 3 finished blocks are"):
        prune(source, out, windows, besa.Wanda())


@pytest.mark.parametrize(
    "change",
    [
        {"block": "1"},
        {"block": 2},
        {"shard": "../elsewhere.safetensors"},
        {"shard": "model-block-00000.safetensors"},
        {"files": {}},
        {"files": {"../../etc/passwd": "0"}},
        {"files": ["model-block-00001.safetensors"]},
        {"rows": None},
        {"rows": [1]},
        {"rows": [{"block": 0}]},
        {"steps": 3},
        {"seconds": "1"},
    ],
)
def test_an_odd_note_of_a_block_is_named_and_the_block_is_not_taken_for_finished(tmp_path, change):
    note = written_note(tmp_path)
    assert list(resume.finished_blocks(tmp_path)[0]) == [1]
    path = tmp_path / "besa" / "block-00001.json"
    path.write_text(json.dumps(note | change))
    assert resume.finished_blocks(tmp_path) == ({}, [str(path)])
    for name in note:
        path.write_text(json.dumps({key: value for key, value in note.items() if key != name}))
        assert resume.finished_blocks(tmp_path) == ({}, [str(path)])


def written_note(output):
    """Of block 1, its files with it."""
    (output / "besa").mkdir()
    names = ("model-block-00001.safetensors", "besa/masks-00001.safetensors")
    for name in names:
        (output / name).write_text(name)
    note = {"block": 1, "shard": names[0], "rows": [{"block": 1}], "steps": [], "seconds": 0.5}
    note["files"] = {name: resume.sha256(output / name) for name in names}
    (output / "besa" / "block-00001.json").write_text(json.dumps(note))
    return note


def test_a_block_that_is_done_again_is_named_with_its_path(made, source, windows, monkeypatch):  # noqa: F811
    out, said = made(), []
    (out / "besa" / "block-00001.json").write_bytes(b"{")
    monkeypatch.setattr(shards.tqdm, "write", said.append)
    monkeypatch.setattr(shards, "from_rank_0", lambda value: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        besa.prune_checkpoint(source, out, windows, besa.Wanda(), device="cpu", progress=True)
    assert any(str(out / "besa" / "block-00001.json") in line and "pruned again" in line for line in said)


@pytest.mark.parametrize("sums", [b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"copy.bin": 7}', b'{"gone": "0"}'])
def test_a_derived_folder_with_damaged_sums_is_made_again(tmp_path, monkeypatch, sums):
    (tmp_path / "asset").write_bytes(b"content")
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "asset")
    build = lambda asset, folder: shutil.copyfile(asset, folder / "copy.bin")
    folder = assets.derive("toy", build)
    (folder / "copy.bin").unlink()
    (folder / assets.SUMS).write_bytes(sums)
    assert (assets.derive("toy", build) / "copy.bin").read_bytes() == b"content"
    assert json.loads((folder / assets.SUMS).read_text())


# What a disk refuses

ERRORS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EIO: "Input/output error",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
}


def refusing(number):
    """A function that fails as one of the system's or, where it stands for safetensors', as one of safetensors'."""

    def refuse(*arguments, **options):
        if "metadata" in options:
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: refused (os error {number})")
        raise OSError(number, "refused")

    return refuse


WRITERS = {
    "a text": lambda path: write_text(path, "new"),
    "a shard": lambda path: checkpoint.write_shard({"a": torch.zeros(3)}, path),
    "keep-masks": lambda path: KeepMasks().save(path),
    "codes": lambda path: save_quantized({(0, "q"): besa.Quantize().codes(torch.ones(2, 8))}, path),
}


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_disk_refuses_is_named_and_the_old_file_stays(tmp_path, monkeypatch, writer, number):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr("os.fsync" if writer == "a text" else "safetensors.torch.save_file", refusing(number))
    told = rf"file was not written \({ERRORS[number]}; \d+ MiB are free there\): .* stays.*"
    closed = number in (errno.EROFS, errno.EACCES)
    told += "Make the folder writable, or name another" if closed else "Make room, .* disk, and run the same again"
    with pytest.raises(OSError, match=told) as error:
        WRITERS[writer](tmp_path / "file")
    assert error.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


@contextlib.contextmanager
def small_files():
    """No file of this process may become larger than 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_new_folder_goes_where_a_link_leads_and_onto_no_mount_point(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with checkpoint.new_folder(tmp_path / "link") as temporary:
        (temporary / "file").write_text("1")
    assert (tmp_path / "there" / "file").read_text() == "1" and (tmp_path / "link").is_symlink()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    (tmp_path / "to volume").symlink_to(tmp_path / "volume")
    for name in ("volume", "to volume"):
        told = r"volume' is a mount point.*; name a folder in it"
        with pytest.raises(ValueError, match=told), checkpoint.new_folder(tmp_path / name):
            pass


def test_a_real_limit_of_size_is_named_by_every_writer(tmp_path):
    tensor = {"a": torch.zeros(1000)}
    with pytest.raises(OSError, match=r"text was not written \(File too large") as error, small_files():
        write_text(tmp_path / "text", "x" * 2000)
    assert error.value.errno == errno.EFBIG
    with pytest.raises(OSError, match=r"shard was not written \(File too large"), small_files():
        checkpoint.write_shard(tensor, tmp_path / "shard")
    told = r"folder was not written \(File too large.*: nothing is left of it"
    with pytest.raises(OSError, match=told), small_files(), checkpoint.new_folder(tmp_path / "folder") as temporary:
        checkpoint.write_shard(tensor, temporary / "shard")
    with (
        pytest.raises(OSError, match=r"state was not written \(File too large"),
        small_files(),
        replacing(tmp_path / "state") as temporary,
        temporary.open("wb") as file,  # as finetune does
    ):
        torch.save(tensor, file)
    assert not list(tmp_path.iterdir())


def test_a_run_that_the_disk_refuses_names_the_file_and_continues(source, tmp_path, windows, monkeypatch):  # noqa: F811
    prune(source, tmp_path / "whole", windows, besa.Wanda())
    with monkeypatch.context() as refused:
        refused.setattr("os.posix_fallocate", refusing(errno.EDQUOT))
        with pytest.raises(OSError, match=r"besa/hidden-0-0.bin was not written \(Disk quota exceeded"):
            prune(source, tmp_path / "out", windows, besa.Wanda(), hidden_states="file")
    assert not list((tmp_path / "out").rglob("*.bin"))
    prune(source, tmp_path / "out", windows, besa.Wanda(), hidden_states="file")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_cache_that_cannot_be_written_names_the_other_place(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"wiki.utf8 was not written \(Not a directory.*set BESA_CACHE"):
        assets.fetch("wiki")


# A source that changes while it is read


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[::-1])


@pytest.mark.parametrize("change", [cut, replace, os.unlink, os.utime])
@pytest.mark.parametrize("work", ["prune", "pack"])
def test_a_source_that_changes_is_found_before_its_mapping_is_read_on(
    source,  # noqa: F811
    tmp_path,
    windows,
    monkeypatch,
    change,
    work,
):
    if work == "prune":
        where, name, start = shards.Shards, "write", lambda: prune(source, tmp_path / "out", windows, besa.Wanda())
    else:
        where, name, start = pack, "write_shard", lambda: pack.pack_checkpoint(source, tmp_path / "out")
    write, calls = getattr(where, name), []

    def changing(*arguments):
        write(*arguments)
        calls.append(change(source / "model.safetensors"))

    monkeypatch.setattr(where, name, changing)
    with pytest.raises(ValueError, match=r"model.safetensors was replaced, changed or cut since it was opened"):
        start()
    assert len(calls) == 1  # a second block would end this process on a bus error


@pytest.mark.parametrize("opened", [besa.load_model, checkpoint.open_checkpoint, checkpoint.shard_paths])
def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tiny_llama, tiny_tokenizer, tmp_path, opened):
    tiny_tokenizer.save_pretrained(tmp_path)
    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=rf"{shard.name} is missing, or no ordinary file"):
        opened(str(tmp_path) if opened is besa.load_model else tmp_path)


def test_pipes_beside_the_weights_are_left_alone(source, tmp_path, windows):  # noqa: F811
    for name in ("code.py", "notes.txt"):
        os.mkfifo(source / name)
    prune(source, tmp_path / "out", windows, besa.Magnitude())
    assert not (tmp_path / "out" / "code.py").exists()
    (tmp_path / "out" / "besa" / "source.json").unlink()
    os.mkfifo(tmp_path / "out" / "besa" / "source.json")
    prune(source, tmp_path / "out", windows, besa.Magnitude())
    assert json.loads((tmp_path / "out" / "besa" / "source.json").read_text())
