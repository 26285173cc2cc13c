"""Who computed a number, and at what cost: versions, commit, hardware, seconds, peak memory."""

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0
    """Highest resident memory of the process, or highest allocation on the GPU."""
    peak_anonymous_bytes: int = 0
    """Highest anonymous memory of the process, in host memory and not backed by a file (Linux only, else 0)."""


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Time a piece of work and take its peak memory."""
    cost = Cost()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _reset_peak_resident()
    start = time.perf_counter()
    with _watch_anonymous(cost):
        yield cost
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident()


def _reset_peak_resident() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what earlier work freed, unless asked
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is the whole process's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _watch_anonymous(cost: Cost) -> Iterator[None]:
    """Look every 20 ms: unlike for resident memory, the kernel keeps no peak."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            cost.peak_anonymous_bytes = max(cost.peak_anonymous_bytes, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Host memory of this process that no file backs: what cannot be dropped and read again (Linux only, else 0)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("RssAnon"))
    return 0


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
