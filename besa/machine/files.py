"""Write files whole or not at all, read none that is not whole, and tell them by their sha256."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
from torch import Tensor


def cache_folder() -> Path:
    """Where what besa fetched or measured lies: `$BESA_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("BESA_CACHE") or platformdirs.user_cache_dir("besa")).expanduser()


@contextlib.contextmanager
def writing(
    path: Path, kept: str = "what was whole before stays, and the same command continues behind it"
) -> Iterator[None]:
    """Turn what a disk refuses into an error that names the file, what is left, and how to go on.

    Raises:
        OSError: of the same number, by which a full disk, a quota, a limit of size and a broken disk are told apart.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors has no number of its own
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number is None:
            raise
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        closed = number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
        cure = "Make room, raise the limit or check the disk, and run the same again"
        raise OSError(
            number,
            f"{path} was not written ({os.strerror(number)}; {free / 2**20:.0f} MiB are free there): {kept}. "
            + ("Make the folder writable, or name another" if closed else cure),
        ) from error


HALF_WRITTEN = ".besa-half-written-"
"""What the folders that hold half-written files are called, before eight random letters."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside `path` that becomes `path` once it is written and on the disk.

    The folder is new, has a name that cannot be guessed and lets in nobody else: where others may write, too, no link
    of theirs is written through.

    Raises:
        OSError: as `writing`; nothing is left of the file.
    """
    about = {"prefix": HALF_WRITTEN, "dir": path.parent, "ignore_cleanup_errors": True}
    with writing(path), tempfile.TemporaryDirectory(**about) as folder:
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


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write JSON that holds its own sha256, whole or not at all."""
    write_text(path, json.dumps(note | {"sha256": _sum_of(note)}, indent=1) + "\n")


def read_note(path: Path) -> Any:
    """What `write_note` wrote, without the sum, which JSON of earlier versions and of other hands lacks.

    Raises:
        ValueError: it is no JSON, or other values than were written.
        OSError: it cannot be read.
    """
    note = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(note, dict) and note.pop("sha256", None) not in (None, _sum_of(note)):
        raise ValueError("its sha256 is not that of its values, so that one of them was changed")
    return note


def _sum_of(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_of(path: Path) -> list[str | int]:
    """What tells a file from one that was written since, without reading it: where it lies, its size and its time."""
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def check_same(marks: dict[Path, list[str | int]]) -> None:
    """Refuse files that are no longer what their marks say: a mapped file that shrank ends the process on a bus error.

    Raises:
        ValueError: names the first.
    """
    for path, mark in marks.items():
        if not path.is_file() or mark_of(path) != mark:
            raise ValueError(
                f"{path} was replaced, changed or cut since it was opened, with {mark[1]} bytes; put it back, or wait "
                "until it is written, and run the same again"
            )


def check_whole(path: Path) -> list[str]:
    """Refuse a safetensors file that is shorter or longer than its header says, or none that can be mapped.

    Returns:
        The names of its tensors.

    Raises:
        ValueError: names the file, its size, and what it should be.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path} is missing, or no ordinary file; fetch or write it again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max(ends.values(), default=0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it has no safetensors header; fetch or write it again") from error
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, its header says {expected}; fetch or write it again")
    return [*ends]


def tensor_sha256(tensor: Tensor) -> str:
    """Of a tensor's values."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()
