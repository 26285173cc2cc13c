"""Write files whole or not at all, and tell them by their sha256."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from torch import Tensor


def cache_folder() -> Path:
    """Where what besa fetched or measured lies: `$BESA_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("BESA_CACHE") or platformdirs.user_cache_dir("besa")).expanduser()


HALF_WRITTEN = ".besa-half-written-"
"""What the folders that hold half-written files are called, before eight random letters."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside `path` that becomes `path` once it is written and on the disk.

    The folder is new, has a name that cannot be guessed and lets in nobody else: where others may write, too, no link
    of theirs is written through.
    """
    with tempfile.TemporaryDirectory(prefix=HALF_WRITTEN, dir=path.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, which nobody else may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A renamed file is there for good, even after a power cut, once its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_of(path: Path) -> list[str | int]:
    """What tells a file from one that was written since, without reading it: where it lies, its size and its time."""
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def tensor_sha256(tensor: Tensor) -> str:
    """Of a tensor's values."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()
