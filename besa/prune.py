"""Start reading here: prune a model block by block (paper Algorithm 1), whatever the method.

`besa/besa.py` holds the method this is about, `besa/allocation.py` its heart, `besa/walk.py` what a block is.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import check_model, check_tokens, find_blocks
from besa.machine.memory import measure
from besa.machine.processes import check_share
from besa.quantize import Quantize
from besa.reconstruct import Reconstruct
from besa.report import Report
from besa.walk import Block, PrunedBlock, Targets, frozen, walk


def prune(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: "Method",
    progress: bool = True,
    *,
    reconstruct: Reconstruct | None = None,
) -> Report:
    """Prune every projection of every block, in place, block by block (paper Algorithm 1).

    Each block sees what the already pruned blocks before it put out; the method decides what goes, and the pruned
    block's output moves on to the next. Under torchrun every rank runs it on its share of the windows, and all come to
    the same weights.

    Args:
        model: any Hugging Face decoder whose blocks `besa.decoder` finds; its pruned weights become 0.
        windows: calibration token ids, from `calibration_windows`; under torchrun the same on every rank.
        method: `Besa`, `Magnitude`, `Wanda` or `SparseGPT`.
        progress: show bars over blocks and windows.
        reconstruct: give the kept weights new values, block by block; None leaves them as the method does.

    Raises:
        ValueError: the model, the windows or the method do not go together; raised before any work. NaN or infinite
            activations name block and projection, and leave the blocks before it pruned.
    """
    check_arguments(windows, method)
    check_model(model)
    check_fit(model, windows, method, reconstruct)
    report = Report(method.name, n_samples=len(windows), seq_len=windows.shape[1])
    with measure() as cost, frozen(model):
        method = method.prepared(model, windows, progress)
        take_dense = reconstruct is not None and reconstruct.needs_dense
        for block in walk(model, windows, method.targets, method.span, take_dense=take_dense, progress=progress):
            pruned = method.prune_block(block)
            if reconstruct:
                pruned = reconstruct.improve(block, pruned)
            report.extend(block.finish(pruned))
            del pruned  # before the next block is learned
    report.seconds, report.peak_bytes = cost.seconds, cost.peak_bytes
    return report


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the pruning methods: a frozen configuration that prunes one block at a time."""

    sparsity: float = 0.5
    """Fraction of the weights to set to 0, in [0, 1)."""
    sparsities: tuple[float, ...] | None = None
    """One for each block, in their order; None takes `sparsity` for all."""

    name: ClassVar[str]
    targets: ClassVar[Targets] = "pruned"
    """What a pruned block must reproduce."""
    span: ClassVar[int] = 1
    """Consecutive blocks that are pruned as one."""
    batch_size: ClassVar[int | None] = None
    """Windows per step; None: there are no steps."""
    quantize: ClassVar[Quantize | None] = None

    def __post_init__(self) -> None:
        for sparsity in (self.sparsity, *(self.sparsities or ())):
            if not 0 <= sparsity < 1:
                raise ValueError(f"sparsity {sparsity} is outside [0, 1)")

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the configuration does not fit the model's projections."""

    def prepared(self, model: PreTrainedModel, windows: Tensor, progress: bool) -> "Method":
        """The method once it has seen the dense model; most need not."""
        return self

    def sparsity_of(self, block: Block) -> float:
        """What a block is pruned to."""
        return self.sparsities[block.index] if self.sparsities else self.sparsity

    def prune_block(self, block: Block) -> PrunedBlock:
        """New weights and keep-masks of one block; the block itself stays as it is."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and fields, for records."""
        return {"method": self.name, **asdict(self)}


def check_arguments(windows: Tensor, method: Method) -> None:
    """Refuse what is no windows or no method, such as their names.

    Raises:
        ValueError: says how to make them.
    """
    if not isinstance(windows, Tensor):
        raise ValueError(
            f"windows {windows!r} are no tensor of token ids; make them: besa.calibration_windows('sotu', tokenizer)"
        )
    if windows.ndim != 2:
        raise ValueError(f"windows must be (n_samples, seq_len), not {tuple(windows.shape)}")
    if not isinstance(method, Method):
        raise ValueError(f"method {method!r} is no method; take besa.Besa(), Wanda(), SparseGPT() or Magnitude()")


def check_fit(model: PreTrainedModel, windows: Tensor, method: Method, reconstruct: Reconstruct | None) -> None:
    """Refuse windows and methods that do not fit the model, before any work.

    Raises:
        ValueError: as `prune`.
    """
    check_tokens(model, windows, windows.shape[1])
    check_share(len(windows), method.batch_size)
    n_blocks = len(find_blocks(model))
    if method.sparsities and len(method.sparsities) != n_blocks:
        raise ValueError(f"{len(method.sparsities)} sparsities are given for {n_blocks} blocks; give one for each")
    method.check(model)
    if reconstruct:
        reconstruct.check(len(windows), quantized=method.quantize is not None)
