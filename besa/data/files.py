"""Files that are written whole or not at all, hashes, keep-masks on disk."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import safetensors.torch
import torch
from torch import Tensor

from besa.masks import KeepMasks

PART = ".besa-part-"  # begins the names of half-written files


def cache_folder() -> Path:
    """Folder for fetched and converted files: `$BESA_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("BESA_CACHE") or platformdirs.user_cache_dir("besa")).expanduser()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` once it is written and on the disk."""
    temporary = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its own file, private to the user
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the values of a tensor, of any precision."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def save_masks(keep_masks: KeepMasks, path: str | Path) -> None:
    """Write a safetensors file: bits by name (`3.self_attn.q_proj`), shapes in its metadata."""
    tensors = {f"{block}.{name}": bits for (block, name), (bits, _, _) in keep_masks.data.items()}
    shapes = {f"{block}.{name}": shape for (block, name), (_, *shape) in keep_masks.data.items()}
    with atomic_write(Path(path)) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"shapes": json.dumps(shapes)})


def load_masks(path: str | Path) -> KeepMasks:
    keep_masks = KeepMasks()
    with safetensors.safe_open(path, "pt") as file:
        for key, (rows, columns) in json.loads(file.metadata()["shapes"]).items():
            block, _, name = key.partition(".")
            keep_masks.data[int(block), name] = file.get_tensor(key), rows, columns
    return keep_masks
