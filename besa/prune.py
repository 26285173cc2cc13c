"""Start reading here: prune a model block by block (paper Algorithm 1), whatever the method.

`besa/learn.py` holds the method this is about, `besa/allocation.py` its heart.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.blocks import (
    BlockCall,
    check_model,
    check_tokens,
    embed,
    find_blocks,
    locate,
    projections,
    record_calls,
    run_block,
    spans,
)
from besa.importance import InputStatistics, collect_statistics
from besa.quantize import QuantizedWeight
from besa.report import Report


def prune(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"], method: "Method", progress: bool = True
) -> Report:
    """Prune every projection of every block, in place, block by block (paper Algorithm 1).

    Each block sees what the already pruned blocks before it put out; the method decides what goes, and the pruned
    block's output moves on to the next.

    Args:
        model: any Hugging Face decoder whose blocks `besa.blocks` finds; its weights are overwritten with zeros.
        windows: calibration token ids, from `calibration_windows`.
        method: `Besa`, `Magnitude`, `Wanda` or `SparseGPT`.
        progress: show bars over blocks and windows.

    Raises:
        ValueError: the model, the windows or the method do not go together; raised before any work. NaN or infinite
            activations name block and projection, and leave the blocks before it pruned.
    """
    check_model(model)
    _check_windows(model, windows)
    method.check(model)
    blocks = find_blocks(model)
    report = Report(method.name, n_samples=len(windows), seq_len=windows.shape[1])
    start = time.perf_counter()
    with _frozen(model), torch.no_grad():
        calls = record_calls(model, windows[:1])
        hidden = torch.cat([embed(model, window, calls[0].returns_tuple) for window in windows.split(1)])
        dense = hidden.clone() if method.targets == "dense" else None
        together = spans(blocks, calls, method.span)
        with tqdm(desc="windows", unit="window", leave=False, disable=not progress) as bar:
            for index, (block, call) in tqdm(together.items(), desc=method.name, unit="block", disable=not progress):
                passes = method.passes(block) + 2 + (dense is not None)  # training; observe, advance, the dense stream
                bar.reset(len(windows) * passes)
                _prune_block(index, block, call, hidden, dense, method, report, bar.update)
    report.seconds = time.perf_counter() - start
    return report


def _prune_block(
    index: int,
    block: nn.Module,
    call: BlockCall,
    hidden: Float[Tensor, "n_samples seq_len hidden"],
    dense: Float[Tensor, "n_samples seq_len hidden"] | None,
    method: "Method",
    report: Report,
    tick: Callable[[], Any],
) -> None:
    """Prune one block, or a span of blocks as one.

    `hidden`, and `dense` where it is used, move on to the block's output in place.
    """
    start = time.perf_counter()
    outputs, statistics = _observe(index, block, call, hidden, method, tick)
    if dense is not None:  # Algorithm 1 as written: the dense model's own hidden states are the targets
        for window in dense.split(1):
            window.copy_(run_block(block, window, call))
            tick()
    task = BlockTask(index, block, call, hidden, outputs if dense is None else dense, statistics)
    pruned = method.prune_block(task, tick)
    error, projection_errors = _advance(task, pruned.weights, tick)
    for name, projection in projections(block).items():
        projection.weight.copy_(pruned.weights[name])
    report.quantized.update({locate(index, block, name): value.cpu() for name, value in pruned.quantized.items()})
    report.add(index, block, pruned.notes, pruned.steps, error, projection_errors, time.perf_counter() - start)


def _observe(
    index: int, block: nn.Module, call: BlockCall, hidden: Tensor, method: "Method", tick: Callable[[], Any]
) -> tuple[Tensor | None, dict[str, InputStatistics]]:
    """What the unpruned block makes of its inputs (where that is the target), and the statistics of what enters its
    projections."""
    outputs = torch.empty_like(hidden) if method.targets == "pruned" else None
    finite = torch.ones((), dtype=torch.bool, device=hidden.device)
    with collect_statistics(projections(block), len(hidden), method.needs_hessian) as statistics:
        for number, window in enumerate(hidden.split(1)):
            output = run_block(block, window, call)
            finite &= torch.isfinite(output).all()
            if outputs is not None:
                outputs[number] = output[0]
            tick()
    for name in projections(block):
        if name not in statistics:
            raise ValueError(f"block {index}, {name}: never called; conditional projections are not supported")
        if not statistics[name].is_finite():
            raise ValueError(f"block {index}, {name}: its inputs hold NaN or infinity; try dtype float32")
    if not finite:
        raise ValueError(f"block {index}: its output holds NaN or infinity; try dtype float32")
    return outputs, statistics


def _advance(task: "BlockTask", weights: dict[str, Tensor], tick: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Replace the inputs by the pruned block's outputs; mean reconstruction error, and each projection's own error."""
    errors = []
    with _projection_errors(task.block, weights) as projection_errors:
        for window, target in zip(task.inputs.split(1), task.targets.split(1), strict=True):
            window.copy_(run_block(task.block, window, task.call, weights))
            errors.append(reconstruction_error(window, target))
            tick()
    return float(torch.stack(errors).mean()), projection_errors


def reconstruction_error(
    output: Float[Tensor, "1 seq_len hidden"], target: Float[Tensor, "1 seq_len hidden"]
) -> Float32[Tensor, ""]:
    """Block loss of one window (Eqn. 1): sum(((target - output) / ||target||_2)^2) / hidden, no unit.

    The norm is taken per channel over the window's tokens, as in the released code; the paper writes the plain
    squared norm of the difference.
    """
    target = target.float()
    norm = target.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (1, 1, hidden)
    return ((target - output.float()) / norm).square().sum() / target.shape[-1]


@contextlib.contextmanager
def _projection_errors(block: nn.Module, weights: dict[str, Tensor]) -> Iterator[dict[str, float]]:
    """While active, ||(W - W')x||^2 / ||Wx||^2 of each projection over the first window that passes."""
    errors: dict[str, float] = {}
    dense = {name: projection.weight for name, projection in projections(block).items()}

    def hook(name: str, x: Tensor) -> None:
        if name not in errors:
            output = nn.functional.linear(x, dense[name]).float()
            lost = nn.functional.linear(x, dense[name] - weights[name]).float()
            errors[name] = float(lost.square().sum() / output.square().sum().clamp_min(1e-30))

    handles = [
        projection.register_forward_pre_hook(lambda module, inputs, name=name: hook(name, inputs[0]))
        for name, projection in projections(block).items()
    ]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for any parameter of the model."""
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, requires_grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    if windows.ndim != 2:
        raise ValueError(f"windows must be (n_samples, seq_len), not {tuple(windows.shape)}")
    check_tokens(model, windows, windows.shape[1])


@dataclass(frozen=True)
class BlockTask:
    """What a method is given to prune one block."""

    index: int
    block: nn.Module
    call: BlockCall
    inputs: Float[Tensor, "n_samples seq_len n_in"]
    targets: Float[Tensor, "n_samples seq_len n_out"]
    """What the pruned block must reproduce."""
    statistics: dict[str, InputStatistics]


@dataclass(frozen=True)
class PrunedBlock:
    """What a method gives back: new weights by projection, and what it wants to report."""

    weights: dict[str, Tensor]
    steps: list[dict[str, float]] = field(default_factory=list)
    """Loss, reconstruction error and expected sparsity of each training step."""
    notes: dict[str, str] = field(default_factory=dict)
    """A remark by projection."""
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    """Where weights were quantized: what reproduces them."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the pruning methods: a frozen configuration that prunes one block at a time."""

    sparsity: float = 0.5
    """Fraction of the weights to set to 0, in [0, 1)."""

    name: ClassVar[str]
    needs_hessian: ClassVar[bool] = False
    span: ClassVar[int] = 1
    """Consecutive blocks that are pruned as one."""
    targets: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is outside [0, 1)")

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the configuration does not fit the model's projections."""

    def passes(self, block: nn.Module) -> int:
        """Training passes over the windows (for the progress bar)."""
        return 0

    def prune_block(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and fields, for records."""
        return {"method": self.name, **asdict(self)}
