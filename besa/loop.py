"""START HERE: prune a model block by block (paper Algorithm 1), with any method.

`besa/besa.py` holds the paper's method, `besa/baselines.py` those it is compared with, `besa/walk.py` the blocks.
"""

import json
import time
import warnings
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from besa.config import Sparsity, checked, config
from besa.decoder import check_model, check_tokens, find_blocks, projections, pruned_projections
from besa.experts import join, split
from besa.masks import keep_largest, parse_pattern, places, zeros_before
from besa.quantize import Quantize
from besa.report import Report
from besa.shapes import KeepMask, Matrix
from besa.system import measure, n_ranks, resolve_device
from besa.walk import Block, Match, PrunedBlock, frozen, walk


@config
class Method:
    """Base of the pruning methods: a frozen configuration that prunes one block at a time.

    Args:
        sparsity: fraction of the weights to set to 0, of the projections that are not ignored; 0.5 by default.
        sparsities: one for each block, instead of `sparsity`.
        ignore: projections or blocks that stay dense, by name ("3", "3.mlp.down_proj") or regular expression.
    """

    sparsity: Sparsity = 0.5
    sparsities: Annotated[tuple[Sparsity, ...], Field(strict=False)] | None = None
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = ()

    name: ClassVar[str]
    match: ClassVar[Match] = "block"
    """Whose output a pruned block must reproduce: its own before pruning ("block"), or the dense model's ("model")."""
    batch_size: ClassVar[int | None] = None
    """Windows per training step; None without training."""
    needs_hessian: ClassVar[bool] = False
    quantize: ClassVar[Quantize | None] = None

    def check(self, model: PreTrainedModel, n_samples: int) -> None:
        """Refuse a configuration that does not fit the model, before any work."""
        n_blocks = len(find_blocks(model))
        if self.sparsities is not None and len(self.sparsities) != n_blocks:
            raise ValueError(f"{len(self.sparsities)} sparsities for {n_blocks} blocks")
        pruned_projections(model, self.ignore)
        step = self.batch_size or n_ranks()
        if n_samples % step or step % n_ranks():
            raise ValueError(f"{n_samples} windows do not divide into steps of {step} on {n_ranks()} ranks")

    def prepared(self, model: PreTrainedModel, windows: Tensor) -> "Method":
        """The method after a look at the dense model."""
        return self

    def sparsity_of(self, block: Block) -> float:
        return self.sparsities[block.index] if self.sparsities else self.sparsity

    def prune_block(self, block: Block) -> PrunedBlock:
        """New weights and keep-masks of a block; the block itself does not change."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and fields, after a round trip through JSON."""
        return json.loads(json.dumps({"method": self.name, **asdict(self)}))


@config
class PatternMethod(Method):
    """A method that can also prune to a pattern N:M.

    Args:
        pattern: "2:4" keeps 2 of every 4 consecutive weights of a row; sets the sparsity to 1 - N/M.
    """

    pattern: str | None = None
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        n, m = parse_pattern(self.pattern or "1:2")
        sparsity = 1 - n / m
        if self.pattern is not None and (self.sparsities or self.sparsity not in (None, sparsity)):
            raise ValueError(f"pattern {self.pattern!r} sets the sparsity; leave sparsity and sparsities out")
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", sparsity)

    def keep_mask(self, scores: Matrix, sparsity: float) -> KeepMask:
        """Prune the lowest scores of each row, or of each M consecutive weights."""
        if self.pattern:
            n, m = parse_pattern(self.pattern)
            return places(scores, m) >= m - n
        return keep_largest(scores, sparsity)


@runtime_checkable
class Reconstruction(Protocol):
    """Gives the kept weights of a pruned block new values, such as `besa.Reconstruct()`."""

    def improve(self, block: Block, pruned: PrunedBlock) -> PrunedBlock: ...

    def config(self) -> dict[str, Any]: ...


@checked
def prune(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    progress: bool = True,
    *,
    reconstruct: Reconstruction | None = None,
    device: str | torch.device | None = None,
    hidden_device: str | torch.device | None = None,
) -> Report:
    """Prune all projections of a model in place, block by block (paper Algorithm 1).

    Under torchrun every rank calls it with the same windows, takes its share of them, and gets the same weights.

    Args:
        windows: calibration token ids, from `calibration_windows`.
        method: `Besa`, `Exact`, `Closed`, `Wanda`, `SparseGPT` or `Magnitude`.
        progress: show bars over blocks and windows.
        reconstruct: `Reconstruct()` gives the kept weights new values.
        device: move one block at a time there, for models larger than the GPU.
        hidden_device: keep the hidden states of the windows there; None takes the GPU if they fill at most a quarter of
            its free memory, else the host.
    """
    check(model, windows, method, reconstruct)
    method = method.prepared(model, windows)
    compute_device = model.device if device is None else resolve_device(device)
    home = model.device
    report = Report(method.name, n_samples=len(windows), seq_len=windows.shape[1])
    with measure(compute_device) as cost, frozen(model, compute_device):
        try:
            for block in walk(
                model,
                windows,
                match=method.match,
                dense=reconstruct is not None,
                hessian=method.needs_hessian,
                ignore=method.ignore,
                place=lambda module: split(module.to(compute_device)),
                hidden_device=None if hidden_device is None else resolve_device(hidden_device),
                progress=progress,
            ):
                report.extend(prune_block(block, method, reconstruct))
                join(block.module).to(home)
        finally:
            join(find_blocks(model)).to(home)  # the one that was being pruned, after an error
    warn_of_few_tokens(report)
    report.seconds = cost.seconds
    report.peak_bytes = cost.peak_bytes
    return report


def check(model: PreTrainedModel, windows: Tensor, method: Method, reconstruct: Reconstruction | None) -> None:
    """Refuse what does not go together, before any work."""
    check_model(model)
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError("this model is spread over devices; load it with device='cpu', and call prune(device='cuda')")
    first = projections(find_blocks(model)[0]).values()
    share = sum(int(zeros_before(linear.weight).sum()) for linear in first) / sum(each.weight.numel() for each in first)
    if share:
        warnings.warn(
            f"{share:.1%} of the first block's weights are 0 already: was this model pruned before? Load it again to "
            "start from the dense model",
            stacklevel=5,
        )
    check_tokens(model, windows, windows.shape[1])
    method.check(model, len(windows))
    if reconstruct is not None and method.quantize is not None:
        raise ValueError("quantized weights cannot be reconstructed; leave out `quantize` or `reconstruct`")


def prune_block(
    block: Block, method: Method, reconstruct: Reconstruction | None, dtype: torch.dtype | None = None
) -> Report:
    """Prune one block, give its kept weights new values, and move its inputs on to the next block.

    Args:
        dtype: precision in which the weights are stored, to which they are rounded.
    """
    pruned = method.prune_block(block)
    if reconstruct is not None:
        pruned = reconstruct.improve(block, pruned)
    if dtype is not None:
        pruned.weights = {name: weight.to(dtype).to(weight.dtype) for name, weight in pruned.weights.items()}
    outcome = block.finish(pruned)
    about = {
        "target_sparsity": method.sparsity_of(block),
        "block_error": outcome.block_error,
        "block_seconds": time.perf_counter() - block.started,
    }
    report = Report(method.name, n_samples=block.n_samples, seq_len=block.inputs.shape[1])
    for name, projection in projections(block.module).items():
        weight = projection.weight
        zeros = outcome.zeros.get(name, 0)
        note = pruned.notes.get(name, "")
        if name in block.ignored:
            zeros = int(zeros_before(weight).sum())
            note = "ignored"
            pruned.keep_masks[name] = torch.ones_like(weight, dtype=torch.bool)
        row = {"block": block.index, "projection": name, "rows": len(weight), "columns": weight.shape[1]}
        row |= {"zeros": zeros, "sparsity": zeros / weight.numel()} | {
            "tokens": int(block.statistics[name].tokens) if name in block.statistics else None
        }
        row |= {"projection_error": outcome.projection_errors.get(name, 0.0), **about, "note": note}
        report.rows.append(row)
        report.keep_masks[block.index, name] = pruned.keep_masks[name]
    report.steps = [{"block": block.index, "step": number, **step} for number, step in enumerate(pruned.steps)]
    return report


def warn_of_few_tokens(report: Report) -> None:
    few = [row["tokens"] for row in report.rows if row["tokens"] is not None and row["tokens"] < 64]
    if len(few) > len(report.rows) / 10:
        warnings.warn(
            f"{len(few)} of {len(report.rows)} projections saw fewer than 64 calibration tokens, one of them "
            f"{min(few)}; give more windows",
            stacklevel=3,
        )
