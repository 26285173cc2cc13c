"""Public names, which `besa/__init__.py` loads lazily and type checkers read here."""

from besa.baselines import Magnitude as Magnitude
from besa.baselines import SparseGPT as SparseGPT
from besa.baselines import Wanda as Wanda
from besa.besa import Besa as Besa
from besa.beyond.adapters import KeepZeros as KeepZeros
from besa.beyond.adapters import masked_lora as masked_lora
from besa.beyond.budgets import block_budgets as block_budgets
from besa.beyond.exact import Exact as Exact
from besa.beyond.finetune import finetune as finetune
from besa.beyond.reconstruct import Closed as Closed
from besa.beyond.reconstruct import Reconstruct as Reconstruct
from besa.checkpoint import prune_checkpoint as prune_checkpoint
from besa.data.models import load_model as load_model
from besa.data.models import save_model as save_model
from besa.data.text import calibration_windows as calibration_windows
from besa.data.text import test_tokens as test_tokens
from besa.evaluate.perplexity import perplexity as perplexity
from besa.evaluate.zero_shot import zero_shot as zero_shot
from besa.loop import Method as Method
from besa.loop import prune as prune
from besa.quantize import Quantize as Quantize
from besa.report import Report as Report

__version__: str
