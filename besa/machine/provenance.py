"""Who computed a number, and at what cost: versions, commit, hardware, seconds, peak memory."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import torch

import besa
from besa.machine.device import resolve_device

ROOT = Path(__file__).resolve().parents[2]
"""Where the package lies: besa's own source tree, or where an installer put it."""
_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
"""By the processor's flags, the first that torch would take."""


def results_root() -> Path:
    """Where notebooks write: `$BESA_RESULTS`, else `results` in besa's own source tree, else in the working folder."""
    return Path(os.environ.get("BESA_RESULTS") or (ROOT if _is_source_tree() else Path.cwd()) / "results")


def provenance(device: str = "auto") -> dict[str, Any]:
    """Who computed: versions, commit, processor or GPU, date.

    An installed package has no commit, whatever repository it lies in; its version stands there.

    Args:
        device: what computed, by its name or kind; "auto" is the GPU where there is one.
    """
    own = _is_source_tree() and _git("rev-parse", "--show-toplevel") == ROOT.as_posix()
    packages = ("torch", "transformers", "datasets", "prodigyopt", "numba", "numpy", "lm_eval")
    installed = {package: installed_version(package) for package in packages}
    installed["torch"] = str(torch.__version__)  # PyPI's metadata leave out the build, such as +cu130
    return {
        "commit": (own and _git("rev-parse", "HEAD")) or f"besa {besa.__version__}",
        # Not the README there: `make report` writes it from the records.
        "modified": own and bool(_git("status", "--porcelain", "--", "besa", "reproduce", ":!reproduce/README.md")),
        "hardware": torch.cuda.get_device_name() if resolve_device(device).type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{k: v for k, v in installed.items() if v}},
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _is_source_tree() -> bool:
    project = ROOT / "pyproject.toml"
    return project.is_file() and tomllib.loads(project.read_text("utf-8")).get("project", {}).get("name") == "besa"


def installed_version(package: str) -> str | None:
    """Of a package by its name at PyPI; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def _git(*arguments: str) -> str:
    with contextlib.suppress(OSError):
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return "" if result.returncode else result.stdout.strip()
    return ""


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, what multiplies bfloat16 there, which decides how sums are rounded, and the number of cores."""
    lines = info.read_text().splitlines() if info.is_file() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    unit = next((f" with {unit}" for flag, unit in _BFLOAT16.items() if flag in flags), "")
    return f"{known.get('model name') or platform.processor() or platform.machine()}{unit}, {os.cpu_count()} cores"
