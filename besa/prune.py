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

from besa.importance import InputStatistics, collect_statistics
from besa.machine.device import deterministic
from besa.machine.processes import check_share, mean_, n_ranks, rank, sum_
from besa.quantize import Quantize, QuantizedWeight
from besa.report import Report
from besa.walk import (
    BlockCall,
    Spans,
    check_model,
    check_tokens,
    device_of,
    embed,
    find_blocks,
    locate,
    projections,
    record_calls,
    run_block,
    spans,
    to_device_of,
)


def prune(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"], method: "Method", progress: bool = True
) -> Report:
    """Prune every projection of every block, in place, block by block (paper Algorithm 1).

    Each block sees what the already pruned blocks before it put out; the method decides what goes, and the pruned
    block's output moves on to the next.

    Args:
        model: any Hugging Face decoder whose blocks `besa.walk` finds; its weights are overwritten with zeros.
        windows: calibration token ids, from `calibration_windows`; under torchrun the same on every rank.
        method: `Besa`, `Magnitude`, `Wanda` or `SparseGPT`.
        progress: show bars over blocks and windows.

    Raises:
        ValueError: the model, the windows or the method do not go together; raised before any work. NaN or infinite
            activations name block and projection, and leave the blocks before it pruned.
    """
    check_model(model)
    check_request(model, windows, method)
    return prune_blocks(model, windows, method, InModel(model.device), progress)


def check_request(model: PreTrainedModel, windows: Tensor, method: "Method") -> None:
    """Refuse windows and methods that do not fit the model, before any work.

    Raises:
        ValueError: as `prune`.
    """
    if windows.ndim != 2:
        raise ValueError(f"windows must be (n_samples, seq_len), not {tuple(windows.shape)}")
    check_tokens(model, windows, windows.shape[1])
    check_share(len(windows), method.batch_size)
    method.check(model)


class InModel:
    """Where the loop takes blocks from and leaves them: here the model itself, which is whole in memory.

    `besa.checkpoint.run.Shards` does the same for a checkpoint of which only one block at a time is in memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for the hidden states of all windows."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def load(self, together: Spans, index: int) -> tuple[nn.Module, BlockCall]:
        """The block, or span of blocks, that starts at `index`, on the device that computes, and its call."""
        return together[index]

    def finished(self, index: int, block: nn.Module) -> Report | None:
        """What an earlier run reported of a block that it finished."""
        return None

    def restore(self, index: int, block: nn.Module) -> None:
        """Overwrite a block's weights by those that an earlier run left."""

    def keep(self, index: int, block: nn.Module, report: Report) -> None:
        """Take a pruned block, and what there is to report of it."""


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: "Method",
    store: InModel,
    progress: bool,
) -> Report:
    """The loop: every block in turn observes its inputs, is pruned, and puts out what the next one sees.

    Under torchrun every rank runs it on its share of the windows, and all come to the same weights.
    """
    report = Report(method.name, n_samples=len(windows), seq_len=windows.shape[1])
    start = time.perf_counter()
    mine = windows[rank() :: n_ranks()]
    with _frozen(model), repeatable(store.device):
        calls = record_calls(model, mine[:1])
        streams = enter(model, mine, calls[0].returns_tuple, store)
        together = spans(find_blocks(model), calls, method.span)
        with tqdm(desc="windows", unit="window", leave=False, disable=not progress) as bar:
            for index in tqdm(together, desc=method.name, unit="block", disable=not progress):
                report.extend(_one_of(together, index, streams, method, len(windows), store, bar))
    report.seconds = time.perf_counter() - start
    return report


def _one_of(
    together: Spans, index: int, streams: "Streams", method: "Method", n_samples: int, store: InModel, bar: tqdm
) -> Report:
    """Prune the block that starts at `index`, or walk through it where an earlier run finished it."""
    block, call = store.load(together, index)  # goes when this function ends, before the next one comes
    report = store.finished(index, block)
    passes = 1 if report else method.passes(block) + 2  # training; observe and advance
    bar.reset(len(streams.hidden) * (passes + (method.targets == "dense")))
    if report:
        if method.targets == "dense":
            _advance_through(block, call, streams.targets, bar.update)
        store.restore(index, block)
        _advance_through(block, call, streams.hidden, bar.update)
    else:
        report = prune_span(index, block, call, streams, method, n_samples, bar.update)
        store.keep(index, block, report)
    return report


@dataclass(frozen=True)
class Streams:
    """Hidden states of all windows on their way through the blocks; they move on in place."""

    hidden: Float[Tensor, "n_samples seq_len hidden"]
    """What enters the next block, the blocks before it pruned."""
    targets: Float[Tensor, "n_samples seq_len hidden"]
    """Targets "dense": what enters it in the dense model. Else room for what the unpruned block makes of `hidden`."""


def enter(model: PreTrainedModel, windows: Tensor, returns_tuple: bool, store: InModel) -> Streams:
    """What enters the first block, for every window."""
    first = embed(model, windows[:1], returns_tuple)
    shape = len(windows), *first.shape[1:]
    streams = Streams(store.new_stream(shape, first.dtype), store.new_stream(shape, first.dtype))
    for number, window in enumerate(windows.split(1)):
        streams.hidden[number] = embed(model, window, returns_tuple)[0]
    streams.targets.copy_(streams.hidden)
    return streams


def _advance_through(block: nn.Module, call: BlockCall, stream: Tensor, tick: Callable[[], Any]) -> None:
    """Hidden states move on to the block's output in place."""
    for window in stream.split(1):
        window.copy_(run_block(block, to_device_of(block, window), call))
        tick()


def prune_span(
    index: int,
    block: nn.Module,
    call: BlockCall,
    streams: Streams,
    method: "Method",
    n_samples: int,
    tick: Callable[[], Any],
) -> Report:
    """Prune one block, or a span of blocks as one; both streams move on to its output.

    Args:
        n_samples: windows on all ranks together.
    """
    start = time.perf_counter()
    statistics = _observe(index, block, call, streams, method, n_samples, tick)
    if method.targets == "dense":  # Algorithm 1 as written: the dense model's own hidden states are the targets
        _advance_through(block, call, streams.targets, tick)
    task = BlockTask(index, block, call, streams.hidden, streams.targets, statistics)
    pruned = method.prune_block(task, tick)
    error, projection_errors = _advance(task, pruned.weights, tick)
    for name, projection in projections(block).items():
        projection.weight.data = pruned.weights[name].detach()  # no copy: the old ones may be mapped from a file
    report = Report(method.name, n_samples=n_samples, seq_len=streams.hidden.shape[1])
    report.quantized = {locate(index, block, name): value.cpu() for name, value in pruned.quantized.items()}
    report.add(index, block, pruned.notes, pruned.steps, error, projection_errors, time.perf_counter() - start)
    return report


def _observe(
    index: int,
    block: nn.Module,
    call: BlockCall,
    streams: Streams,
    method: "Method",
    n_samples: int,
    tick: Callable[[], Any],
) -> dict[str, InputStatistics]:
    """The statistics of what enters the unpruned block's projections; keeps its outputs where they are the target."""
    broken = torch.zeros((), dtype=torch.int32, device=device_of(block))
    with collect_statistics(projections(block), n_samples, method.needs_hessian) as statistics:
        for number, window in enumerate(streams.hidden.split(1)):
            output = run_block(block, to_device_of(block, window), call)
            broken += ~torch.isfinite(output).all()
            if method.targets == "pruned":
                streams.targets[number] = output[0]
            tick()
    for name in projections(block):
        if name not in statistics:
            raise ValueError(f"block {index}, {name}: never called; conditional projections are not supported")
    for shared in {id(statistic): statistic for statistic in statistics.values()}.values():
        shared.sum_over_ranks()
    for name, statistic in statistics.items():
        if not statistic.is_finite():
            raise ValueError(f"block {index}, {name}: its inputs hold NaN or infinity; try dtype float32")
    if sum_(broken):
        raise ValueError(f"block {index}: its output holds NaN or infinity; try dtype float32")
    return statistics


def _advance(task: "BlockTask", weights: dict[str, Tensor], tick: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Replace the inputs by the pruned block's outputs; mean reconstruction error, and each projection's own error."""
    errors = []
    with _projection_errors(task.block, weights) as projection_errors:
        for number in range(len(task.inputs)):
            window, target = task.window(number)
            output = run_block(task.block, window, task.call, weights)
            task.inputs[number] = output[0]
            errors.append(reconstruction_error(output, target))
            tick()
    return float(mean_(torch.stack(errors).mean())), projection_errors


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


def repeatable(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU, attention's gradient and the like in an order that is the same every time; on a CPU it always is."""
    return deterministic(True) if device.type == "cuda" else contextlib.nullcontext()


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

    def window(self, number: int) -> tuple[Float[Tensor, "1 seq_len n_in"], Float[Tensor, "1 seq_len n_out"]]:
        """Inputs and targets of one window, on the block's device."""
        pair = self.inputs[number : number + 1], self.targets[number : number + 1]
        return to_device_of(self.block, pair[0]), to_device_of(self.block, pair[1])


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
    batch_size: ClassVar[int | None] = None
    """Windows per step; None: there are no steps."""
    quantize: ClassVar[Quantize | None] = None

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
