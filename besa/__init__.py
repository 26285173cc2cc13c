"""BESA: prune large language models with blockwise parameter-efficient sparsity allocation (arXiv 2402.16880).

Start reading at `besa/loop.py`.
"""

import importlib.util
import os
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: with it, sums repeat to the bit
os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers reads it at every call

__version__ = "0.2.0.dev0"

_PUBLIC = {
    "loop": ("prune", "Method"),
    "besa": ("Besa",),
    "baselines": ("Magnitude", "Wanda", "SparseGPT"),
    "quantize": ("Quantize",),
    "report": ("Report",),
    "beyond.exact": ("Exact",),
    "beyond.reconstruct": ("Reconstruct",),
    "beyond.gptq": ("quantize_pruned",),
    "beyond.adapters": ("masked_lora", "KeepZeros"),
    "data.models": ("load_model", "save_model"),
    "data.text": ("calibration_windows", "test_tokens"),
    "data.checkpoint": ("prune_checkpoint",),
    "evaluate.perplexity": ("perplexity",),
    "evaluate.zero_shot": ("zero_shot",),
    "evaluate.cycles": ("simulate_cycles",),
    "packed": ("pack", "unpack"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # torch is imported with the first public name or submodule, not before
    if name not in _HOMES and importlib.util.find_spec(f"besa.{name}") is None:
        raise AttributeError(f"module 'besa' has no attribute {name!r}")
    module = importlib.import_module(f"besa.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return [*globals(), *__all__]
