"""Who computed a number, and at what cost: versions, commit, hardware, seconds, peak memory."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Who computed: versions, commit, processor or GPU, date."""
    packages = ("torch", "transformers", "datasets", "prodigyopt", "numba", "numpy", "lm_eval")
    installed = {package: _version(package) for package in packages}
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        # Not the README there: `make report` writes it from the records.
        "modified": bool(_git("status", "--porcelain", "--", "besa", "reproduce", ":!reproduce/README.md")),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{k: v for k, v in installed.items() if v}},
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def _git(*arguments: str) -> str:
    with contextlib.suppress(OSError):
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return "" if result.returncode else result.stdout.strip()
    return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.open() if "model name" in line] if info.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
