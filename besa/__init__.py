"""BESA: prune large language models with blockwise parameter-efficient sparsity allocation (arXiv 2402.16880).

Start reading at `besa/prune.py`.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: with it, sums repeat to the bit

from besa.baselines import Magnitude, SparseGPT, Wanda, named_method
from besa.besa import Besa
from besa.checkpoint.run import plan_checkpoint, prune_checkpoint
from besa.evaluate.cycles import simulate_cycles
from besa.evaluate.perplexity import perplexity
from besa.evaluate.zero_shot import ZeroShot, zero_shot
from besa.inputs.models import load_model
from besa.inputs.text import calibration_windows, test_tokens
from besa.prune import prune
from besa.quantize import Quantize
from besa.report import Report

__version__ = "0.1.0"

__all__ = [
    "Besa",
    "Magnitude",
    "Quantize",
    "Report",
    "SparseGPT",
    "Wanda",
    "ZeroShot",
    "calibration_windows",
    "load_model",
    "named_method",
    "perplexity",
    "plan_checkpoint",
    "prune",
    "prune_checkpoint",
    "simulate_cycles",
    "test_tokens",
    "zero_shot",
]
