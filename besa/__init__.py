"""BESA: prune large language models with blockwise parameter-efficient sparsity allocation (arXiv 2402.16880).

Start reading at `besa/prune.py`.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: with it, sums repeat to the bit
os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers reads it at every call

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:  # for editors and type checkers, the same as _HOMES
    from besa.baselines import Magnitude as Magnitude
    from besa.baselines import SparseGPT as SparseGPT
    from besa.baselines import Wanda as Wanda
    from besa.besa import Besa as Besa
    from besa.checkpoint.run import plan_checkpoint as plan_checkpoint
    from besa.checkpoint.run import prune_checkpoint as prune_checkpoint
    from besa.evaluate.cycles import simulate_cycles as simulate_cycles
    from besa.evaluate.perplexity import perplexity as perplexity
    from besa.evaluate.zero_shot import ZeroShot as ZeroShot
    from besa.evaluate.zero_shot import zero_shot as zero_shot
    from besa.finetune import FineTune as FineTune
    from besa.finetune import finetune as finetune
    from besa.inputs.models import load_model as load_model
    from besa.inputs.text import calibration_windows as calibration_windows
    from besa.inputs.text import test_tokens as test_tokens
    from besa.packed import pack as pack
    from besa.packed import unpack as unpack
    from besa.packed_files import save_packed as save_packed
    from besa.prune import prune as prune
    from besa.quantize import Quantize as Quantize
    from besa.reconstruct import Reconstruct as Reconstruct
    from besa.report import Report as Report

_HOMES = {
    "load_model": "inputs.models",
    "calibration_windows": "inputs.text",
    "test_tokens": "inputs.text",
    "prune": "prune",
    "Besa": "besa",
    "Wanda": "baselines",
    "SparseGPT": "baselines",
    "Magnitude": "baselines",
    "Quantize": "quantize",
    "Reconstruct": "reconstruct",
    "finetune": "finetune",
    "FineTune": "finetune",
    "Report": "report",
    "perplexity": "evaluate.perplexity",
    "zero_shot": "evaluate.zero_shot",
    "ZeroShot": "evaluate.zero_shot",
    "simulate_cycles": "evaluate.cycles",
    "prune_checkpoint": "checkpoint.run",
    "plan_checkpoint": "checkpoint.run",
    "pack": "packed",
    "unpack": "packed",
    "save_packed": "packed_files",
}
"""The public API: name -> the file it stands in."""

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Lazy(ModuleType):
    """This package: torch and all that are loaded with the first public name that is asked for, not before."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"besa.{_HOMES[name]}"), name)
            setattr(self, name, value)
            return value
        if importlib.util.find_spec(f"besa.{name}"):  # a file of the package, such as `besa.quantize`
            return importlib.import_module(f"besa.{name}")
        raise AttributeError(f"module 'besa' has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # `besa.prune` stays the function: importing the file of that name would put the file in its place.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Lazy


class _TeachTransformers(importlib.abc.MetaPathFinder):
    """Once transformers loads models, `from_pretrained` reads packed ones: besa.packed_files registers their format."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "transformers.modeling_utils":
            return None
        # It stays where it is: this import may be interrupted, or somebody only ask where the file lies.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (other.find_spec(name, path, target) for other in others)), None)
        if spec and spec.loader:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), importlib.import_module("besa.packed_files"))
        return spec


if "transformers.modeling_utils" in sys.modules:
    importlib.import_module("besa.packed_files")
else:
    sys.meta_path.insert(0, _TeachTransformers())
