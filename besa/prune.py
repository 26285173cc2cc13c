"""Start reading here: prune a model block by block (paper Algorithm 1), whatever the method.

`besa/besa.py` holds the method this is about, `besa/learners.py` what it learns of a block, `besa/allocation.py` its
heart, `besa/walk.py` what a block is.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import check_model, check_tokens, find_blocks, pruned_projections
from besa.machine.fields import check_fields, checked
from besa.machine.memory import measure
from besa.machine.processes import check_share
from besa.masks import keep_largest, parse_pattern, places
from besa.quantize import Quantize
from besa.reconstruct import Reconstruct
from besa.report import MISSED, Report
from besa.walk import Block, PrunedBlock, Targets, frozen, walk


@checked
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
        model: any Hugging Face decoder whose blocks `besa.decoder` finds; its pruned weights become 0. If it is
            pruned already, what is left counts as the dense model: to compare methods, load it anew for each.
        windows: calibration token ids, from `calibration_windows`; under torchrun the same on every rank.
        method: `Besa`, `Magnitude`, `Wanda` or `SparseGPT`.
        progress: show bars over blocks and windows.
        reconstruct: give the kept weights new values, block by block; None leaves them as the method does.

    Raises:
        ValueError: the model, the windows or the method do not go together; raised before any work. NaN or infinite
            activations name block and projection, and leave the blocks before it pruned.
    """
    check_model(model)
    check_fit(model, windows, method, reconstruct)
    report = Report(method.name, n_samples=len(windows), seq_len=windows.shape[1])
    with measure(model.device) as cost, frozen(model):
        method = method.prepared(model, windows, progress)
        also = {"take_dense": reconstruct is not None, "ignore": method.ignore, "progress": progress}
        for block in walk(model, windows, method.targets, method.span, **also):
            pruned = method.prune_block(block)
            if reconstruct:
                pruned = reconstruct.improve(block, pruned)
            report.extend(method.noted(block, block.finish(pruned)))
            del pruned  # before the next block is learned
    report.seconds, report.peak_bytes = cost.seconds, cost.peak_bytes
    return report


class _Unsaid(float):
    """A sparsity that nobody gave, which a pattern may replace; one that was given must agree with it."""


Sparsity = Annotated[float, Ge(0), Lt(1)]
DEFAULT_SPARSITY = _Unsaid(0.5)
TOLERANCE = 0.05
"""By so much may the counted sparsity of a block miss its target before its rows say so."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the pruning methods: a frozen configuration that prunes one block at a time."""

    sparsity: Sparsity = DEFAULT_SPARSITY
    """Fraction of the weights to set to 0, in [0, 1); where only a pattern N:M is given, 1 - N/M. Counted over
    the projections that are not ignored; under an exact budget (`Besa`) over all, so that those are pruned more."""
    sparsities: tuple[Sparsity, ...] | None = None
    """One for each block, in their order; None takes `sparsity` for all."""
    pattern: str | None = None
    """"N:M", such as "2:4": N of every M consecutive weights of a row are kept. With the letter N, "N:8", every row has
    an N of its own, from the sparsity that its row group (`Besa`) learns under an exact budget."""
    ignore: Sequence[str] = ()
    """Projections and blocks that stay dense, by name ("3.mlp.down_proj", "3") or by a regular expression for the name
    in the model, as in llm-compressor ("re:.*down_proj"); see `besa.decoder.pruned_projections`."""

    name: ClassVar[str]
    targets: ClassVar[Targets] = "pruned"
    """What a pruned block must reproduce."""
    span: ClassVar[int] = 1
    """Consecutive blocks that are pruned as one."""
    batch_size: ClassVar[int | None] = None
    """Windows per step; None: there are no steps."""
    quantize: ClassVar[Quantize | None] = None
    needs_hessian: ClassVar[bool] = False
    """Whether it asks a block for its Hessians, which a plan makes room for."""
    learns_scores: ClassVar[bool] = False
    """Whether which weights stay is learned, not their number alone."""
    measures_model: ClassVar[bool] = False
    """Whether the dense model as a whole must be in memory before its first block is pruned: for `prepared`."""
    _has_budget: ClassVar[bool] = False
    """Whether a budget is met that what is ignored counts in, as kept."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "ignore", tuple(self.ignore))  # hashable, whatever was given
        if isinstance(self.sparsity, _Unsaid):  # not what another pattern implied, before `dataclasses.replace`
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY)
        if self.pattern is not None:
            self._follow(self.pattern)

    def _follow(self, pattern: str) -> None:
        """Take the sparsity that a pattern implies."""
        n, m = parse_pattern(pattern)
        if n is None:
            if not self._has_budget:
                raise ValueError(f"pattern {pattern!r} leaves N to a budget: take besa.Besa(budget='exact'), or give N")
            return
        implied = 1 - n / m
        if isinstance(self.sparsity, _Unsaid):
            object.__setattr__(self, "sparsity", _Unsaid(implied))
        if self.sparsities or abs(self.sparsity - implied) > 1e-6:
            given = f"sparsities {self.sparsities}" if self.sparsities else f"sparsity {self.sparsity}"
            raise ValueError(
                f"{given} contradicts pattern {pattern!r}, which prunes {m - n}/{m}; leave one of them out"
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the configuration does not fit the model's blocks or projections."""
        n_blocks = len(find_blocks(model))
        if self.sparsities is not None and len(self.sparsities) != n_blocks:
            raise ValueError(f"{len(self.sparsities)} sparsities are given for {n_blocks} blocks; give one for each")
        pruned = pruned_projections(model, self.ignore)
        for (index, name), linear in pruned.items() if self.pattern else ():
            columns, (_, m) = linear.weight.shape[1], parse_pattern(self.pattern)
            if columns % m:
                raise ValueError(
                    f"block {index}, {name}: {columns} columns do not divide into the groups of {m} of pattern "
                    f"{self.pattern!r}; take another M, or ignore the projection"
                )
        if self.quantize:
            self.quantize.check(model, self.ignore)

    def prepared(self, model: PreTrainedModel, windows: Tensor, progress: bool) -> "Method":
        """The method once it has seen the dense model; most need not."""
        return self

    def sparsity_of(self, block: Block) -> float:
        """What a block is pruned to."""
        return self.sparsities[block.index] if self.sparsities else self.sparsity

    def noted(self, block: Block, report: Report) -> Report:
        """The report of a finished block, its rows with a note where the counted sparsity misses its target by more
        than `TOLERANCE`: where learning failed, or a pattern or few columns leave no better choice."""
        pruned = [row for row in report.rows if row["note"] != "ignored"]
        if not pruned:
            return report
        counting = report.rows if self._has_budget else pruned
        counted = sum(row["zeros"] for row in counting) / sum(row["rows"] * row["columns"] for row in counting)
        target = self.sparsity_of(block)
        if abs(counted - target) > TOLERANCE:
            for row in pruned:
                row["note"] = "; ".join(filter(None, (row["note"], f"{MISSED}{counted:.4f} for {target:.4g}")))
        return report

    def keep_mask(self, scores: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
        """False for the lowest scores of each row or, under a pattern, of each of its groups."""
        if self.pattern:
            n, m = parse_pattern(self.pattern)
            return places(scores, m) >= m - n
        return keep_largest(scores, sparsity)

    def prune_block(self, block: Block) -> PrunedBlock:
        """New weights and keep-masks of one block; the block itself stays as it is."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and fields, for records, as JSON gives them back; pattern, ignore, scores and mask_only are left out
        where unused (no `scores`: which weights stay was not learned)."""
        fields = {"method": self.name, **asdict(self)}
        later = ("pattern", "ignore", "scores", "mask_only")
        unused = {name for name in later if not fields.get(name)}  # as in older records
        return json.loads(json.dumps({name: value for name, value in fields.items() if name not in unused}))


def check_fit(model: PreTrainedModel, windows: Tensor, method: Method, reconstruct: Reconstruct | None) -> None:
    """Refuse windows and methods that do not fit the model, before any work.

    Raises:
        ValueError: as `prune`.
    """
    check_tokens(model, windows, windows.shape[1])
    check_share(len(windows), method.batch_size)
    method.check(model)
    if reconstruct:
        reconstruct.check(len(windows), quantized=method.quantize is not None)
