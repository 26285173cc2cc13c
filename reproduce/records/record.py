"""JSON records of rows: configuration, outcome, provenance."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache

import besa
from besa.data.files import atomic_write, write_json
from besa.data.models import EMBEDDED, PAPER_MODELS
from besa.loop import Method
from besa.system import resolve_device
from reproduce import REFERENCE, ROOT


class Config(TypedDict, total=False):
    """What a row's numbers depend on; its hash names the record. Notebooks add entries of their own."""

    item: str  # name of the notebook
    model: str
    checkpoint: str  # version of the weights, see `checkpoint_identity`
    profile: str
    row: str  # name of the method and, behind " + ", what is done besides
    sparsity: float  # asked for
    method: dict[str, Any] | None  # name of its class, and the fields that are not at their default
    matched_to: str  # row to whose sparsity this one is pruned, block by block
    budgets: float | str  # spread or rule by which the blocks share the sparsity
    reconstruct: str  # kind of `besa.Reconstruct`
    epoch: dict[str, Any]  # options of `besa.finetune`
    calibration: str  # text of the windows
    sampler: str
    seed: int  # of the windows
    n_samples: int
    seq_len: int
    calibration_sha256: str
    test_sha256: dict[str, str]  # by test text
    dtype: str
    device: str


class Record(TypedDict, total=False):
    """A row's configuration, outcome and provenance. Notebooks add entries of their own."""

    config: Config
    config_hash: str
    metrics: dict[str, float]  # by test text, task or projection
    sparsity: float  # counted
    seconds: float  # of pruning
    cpu_seconds: dict[str, float]  # of the processor: budgets, pruning, epoch
    peak_bytes: int  # on the GPU, or of the process
    weights_sha256: str | None  # of the pruned model; None for the dense one
    projections: list[dict[str, Any]]  # `Report.rows`
    provenance: dict[str, Any]  # commit, versions, hardware, threads, date


def target_of(record: Record) -> float | str:
    """Sparsity, or pattern, that a row was to have."""
    method = record["config"]["method"] or {}
    return method.get("pattern") or record["config"]["sparsity"]


def method_config(method: Method) -> dict[str, Any]:
    """Name of a method, and its fields that are not at their default; the sparsity is an entry of `Config`."""
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    changed = {"method": method.name}
    for name, value in method.config().items():
        if name not in defaults or getattr(method, name) != defaults[name]:
            changed[name] = value
    changed.pop("sparsity", None)
    return changed


def slug(name: str) -> str:
    """Last part of a path or hub id, for file names."""
    return Path(name).name.lower()


def checkpoint_identity(name: str) -> str | None:
    """Version of the weights behind a name: a hub commit, or a hash over names, sizes and times of a folder's files.

    None for the embedded models, which are pinned.
    """
    if name in EMBEDDED:
        return None
    if Path(name).is_dir():
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(name).iterdir())]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    config = try_to_load_from_cache(PAPER_MODELS.get(name, name), "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def record_path(folder: Path, config: Mapping[str, Any]) -> Path:
    row = config["row"].replace(" + ", "-")
    stem = "-".join((slug(config["model"]), config["profile"], row, config_hash(config)))
    return folder / "records" / f"{stem}.json"


def find_record(folder: Path, config: Mapping[str, Any]) -> Record | None:
    """The record of exactly this configuration, if there is one."""
    path = record_path(folder, config)
    return json.loads(path.read_text()) if path.is_file() else None


def is_reference(folder: Path) -> bool:
    """Whether a folder belongs to the results that come with the repository."""
    return folder.resolve().parent.name == REFERENCE.name


def save_record(
    folder: Path, config: Mapping[str, Any], outcome: Mapping[str, Any], samples: Mapping[str, np.ndarray] | None = None
) -> Record:
    """Write the record of a row: configuration, outcome, provenance; `samples` go to a .npz file beside it."""
    if config["profile"] == "smoke" and is_reference(folder):
        raise ValueError(f"a smoke run only shows that the code runs: name another results folder than {folder}")
    path = record_path(folder, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples:
        (folder / "samples").mkdir(exist_ok=True)
        with atomic_write(folder / "samples" / f"{path.stem}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **samples)
    record = {"config": dict(config), "config_hash": config_hash(config), **outcome}
    record["provenance"] = provenance(config.get("device", "auto"))
    write_json(path, record)
    return record


def provenance(device: str) -> dict[str, Any]:
    """Commit, versions, hardware and date."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "prodigyopt", "numba", "numpy", "lm_eval"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_gpu = resolve_device(device).type == "cuda"
    return {
        "commit": _git("rev-parse", "HEAD") or f"besa {besa.__version__}",
        "modified": bool(_git("status", "--porcelain", "--", "besa", "reproduce", ":!reproduce/README.md")),
        "hardware": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "versions": versions | {"torch": str(torch.__version__)},  # with its build, such as +cu130
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return result.stdout.strip()


def _processor() -> str:
    """Name, the unit that multiplies bfloat16 (it decides how sums are rounded), number of cores."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.replace("\t", "").split(":", 1) for line in info.splitlines() if ":" in line)
    name, flags = lines.get("model name", "").strip() or platform.machine(), lines.get("flags", "").split()
    unit = " with AMX" if "amx_bf16" in flags else " with AVX-512 BF16" if "avx512_bf16" in flags else ""
    return f"{name}{unit}, {os.cpu_count()} cores"
