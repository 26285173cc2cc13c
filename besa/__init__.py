"""BESA: prune large language models with blockwise parameter-efficient sparsity allocation (arXiv 2402.16880).

Start reading at `besa/loop.py`.
"""

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: with it, sums repeat to the bit
os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers reads it at every call

__version__ = "0.2.0.dev0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))  # the public names
_HOMES = {node.names[0].name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom)}
_NEED_PEFT = ["besa.beyond.adapters", "besa.beyond.finetune"] if importlib.util.find_spec("peft") is None else []
__all__ = [name for name, home in _HOMES.items() if home not in _NEED_PEFT]  # pyright: ignore


def __getattr__(name: str) -> Any:  # torch is imported with the first public name or submodule, not before
    home = _HOMES.get(name, f"besa.{name}")
    if name not in _HOMES and importlib.util.find_spec(home) is None:
        raise AttributeError(f"module 'besa' has no attribute {name!r}")
    if home in _NEED_PEFT:
        raise ImportError(f"besa.{name} needs peft: pip install 'besa-pruning[adapters]'")
    module = importlib.import_module(home)
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
