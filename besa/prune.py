"""Start reading here: prune a model block by block (paper Algorithm 1), and the block's own learning (Eqn. 1-2)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, ClassVar, Literal

import pandas as pd
import prodigyopt
import torch
from jaxtyping import Float, Float32, Int64
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa import figures
from besa.allocation import Allocation, candidate_rates, reachable_sparsity
from besa.blocks import BlockCall, check_model, check_tokens, embed, find_blocks, projections, record_calls, run_block
from besa.importance import Importance, InputStatistics, collect_statistics, importance


def prune(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"], method: "Method", progress: bool = True
) -> "Report":
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
    report = Report(method, n_samples=len(windows), seq_len=windows.shape[1])
    start = time.perf_counter()
    with _frozen(model), torch.no_grad():
        calls = record_calls(model, windows[:1])
        hidden = torch.cat([embed(model, window, calls[0].returns_tuple) for window in windows.split(1)])
        dense = hidden.clone() if method.targets == "dense" else None
        passes = method.passes + 2 + (dense is not None)  # beside training: observe, advance, the dense stream
        with tqdm(desc="windows", unit="window", leave=False, disable=not progress) as bar:
            for index, block in enumerate(tqdm(blocks, desc=method.name, unit="block", disable=not progress)):
                bar.reset(len(windows) * passes)
                _prune_block(index, block, calls[index], hidden, dense, method, report, bar.update)
    report.seconds = time.perf_counter() - start
    return report


def _prune_block(
    index: int,
    block: nn.Module,
    call: BlockCall,
    hidden: Float[Tensor, "n_samples seq_len hidden"],
    dense: Float[Tensor, "n_samples seq_len hidden"] | None,
    method: "Method",
    report: "Report",
    tick: Callable[[], Any],
) -> None:
    """Prune one block; `hidden`, and `dense` where it is used, move on to the block's output in place."""
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
    report.add(index, block, pruned, error, projection_errors, time.perf_counter() - start)


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
    inputs: Float[Tensor, "n_samples seq_len hidden"]
    targets: Float[Tensor, "n_samples seq_len hidden"]
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


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the pruning methods: a frozen configuration that prunes one block at a time."""

    sparsity: float = 0.5
    """Fraction of the weights to set to 0, in [0, 1)."""

    name: ClassVar[str]
    needs_hessian: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    """Training passes over the windows (for the progress bar)."""
    targets: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is outside [0, 1)")

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the configuration does not fit the model's projections."""

    def prune_block(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and fields, for records."""
        return {"method": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Besa(Method):
    """Blockwise parameter-efficient sparsity allocation (Xu et al. 2024): the published row-wise recipe by default."""

    row_group: Literal["row", "layer"] | int = "row"
    """Rows of a projection that share one learned sparsity: each its own, a number of rows, or all of them."""
    targets: Literal["pruned", "dense"] = "pruned"
    """What a pruned block must reproduce: the dense block's output on the same (pruned) inputs, as the released code
    does row-wise, or the dense model's own hidden states, as Algorithm 1 is written and the released code does
    layer-wise."""
    importance: Importance = "wanda"
    """What weights are ranked by."""
    smooth: bool = True
    """beta = softmax(sigmoid(logits)), the released recipe; False is the paper's plain softmax."""
    candidates: int = 101
    """D + 1, the number of candidate rates p_d between 1 and 0."""
    penalty: float = 5.0
    """lambda, the weight of ((s - sparsity) / sparsity)^2 in the loss (Eqn. 2)."""
    d_coef: float = 5.0
    """Prodigy's step size factor; the published runs set it by model (reproduce/params)."""
    epochs: int = 1
    """Passes over the windows, one window per step."""
    seed: int | None = None
    """None takes the windows in their order in every epoch (published); a number shuffles them anew each epoch."""

    name: ClassVar[str] = "besa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_group not in ("row", "layer") and (isinstance(self.row_group, str) or self.row_group < 1):
            raise ValueError(f"row_group {self.row_group!r} is not 'row', 'layer' or a number of rows")
        if self.targets not in ("pruned", "dense"):
            raise ValueError(f"targets {self.targets!r} is not 'pruned' or 'dense'")
        if self.importance not in ("magnitude", "wanda", "sparsegpt"):
            raise ValueError(f"importance {self.importance!r} is not 'magnitude', 'wanda' or 'sparsegpt'")
        if not 2 <= self.candidates <= 256:
            raise ValueError(f"candidates {self.candidates} is outside [2, 256]")
        if self.epochs < 1 or self.penalty <= 0 or self.d_coef <= 0:
            raise ValueError(f"epochs ({self.epochs}), penalty ({self.penalty}) and d_coef must be positive")
        lowest, highest = reachable_sparsity(self.candidates, self.smooth)
        if not lowest < self.sparsity < highest:
            raise ValueError(
                f"sparsity {self.sparsity} is outside ({lowest:.3f}, {highest:.3f}), what {self.candidates} candidates "
                f"with smooth={self.smooth} can reach" + ("; smooth=False lifts the limit" if self.smooth else "")
            )

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "sparsegpt"

    @property
    def passes(self) -> int:
        return self.epochs

    def check(self, model: PreTrainedModel) -> None:
        for index, block in enumerate(find_blocks(model)):
            for name, projection in projections(block).items():
                if projection.weight.shape[0] % self._group_rows(projection.weight):
                    raise ValueError(
                        f"block {index}, {name}: {projection.weight.shape[0]} rows do not divide into groups of "
                        f"{self.row_group}"
                    )

    def prune_block(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        """Learn the block's allocation, then mask its weights with it."""
        allocations = self._allocations(task)
        logits, steps = self._learn(task, allocations, tick)
        masked = {name: allocations[name](theta)[0] for name, theta in logits.items()}
        return PrunedBlock(masked, steps)

    def _learn(
        self, task: BlockTask, allocations: dict[str, Allocation], tick: Callable[[], Any]
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Minimize Eqn. 2 over the windows, one Prodigy step per window; returns logits by projection and the log."""
        # One flat parameter, starting at 0: every candidate equally likely, sparsity one half.
        shapes = {name: (allocation.groups, self.candidates) for name, allocation in allocations.items()}
        sizes = [groups * candidates for groups, candidates in shapes.values()]
        flat = nn.Parameter(torch.zeros(sum(sizes), device=task.inputs.device))
        optimizer = prodigyopt.Prodigy([flat], lr=1.0, d_coef=self.d_coef, weight_decay=0.0)
        log = []
        for window in self._order(len(task.inputs)):
            with torch.enable_grad():
                logits = {n: part.view(shapes[n]) for n, part in zip(shapes, flat.split(sizes), strict=True)}
                error, sparsity = self._forward(task, allocations, logits, window)
                loss = error + self.penalty * ((sparsity - self.sparsity) / self.sparsity) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.append(torch.stack([loss, error, sparsity]).detach())
            tick()
        keys = ("loss", "reconstruction_error", "sparsity")
        steps = [dict(zip(keys, values, strict=True)) for values in torch.stack(log).tolist()]
        return {n: part.view(shapes[n]).detach() for n, part in zip(shapes, flat.split(sizes), strict=True)}, steps

    def _forward(
        self, task: BlockTask, allocations: dict[str, Allocation], logits: dict[str, Tensor], window: int
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction error of one window and the block's sparsity, weighted by the projections' sizes."""
        masked, zeros = {}, 0.0
        for name, allocation in allocations.items():
            masked[name], alpha = allocation(logits[name])
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        output = run_block(task.block, task.inputs[window : window + 1], task.call, masked)
        error = reconstruction_error(output, task.targets[window : window + 1])
        return error, zeros / sum(allocation.weight.numel() for allocation in allocations.values())

    def _allocations(self, task: BlockTask) -> dict[str, Allocation]:
        rates = candidate_rates(self.candidates).to(task.inputs.device)
        allocations = {}
        for name, projection in projections(task.block).items():
            weight = projection.weight.detach()
            scores = importance(self.importance, weight, task.statistics[name])
            groups = len(weight) // self._group_rows(weight)
            allocations[name] = Allocation.create(weight, scores, rates, groups, self.smooth)
        return allocations

    def _group_rows(self, weight: Tensor) -> int:
        return {"row": 1, "layer": len(weight)}.get(self.row_group, self.row_group)

    def _order(self, n_samples: int) -> Iterator[int]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield from (
                range(n_samples) if generator is None else torch.randperm(n_samples, generator=generator).tolist()
            )


@dataclass
class Report:
    """What pruning did: one row per block and projection, one entry per training step."""

    method: Method
    _: KW_ONLY
    n_samples: int
    seq_len: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add(
        self,
        index: int,
        block: nn.Module,
        pruned: PrunedBlock,
        error: float,
        projection_errors: dict[str, float],
        seconds: float,
    ) -> None:
        """Note one block's result."""
        for name, projection in projections(block).items():
            weight = projection.weight
            self.rows.append(
                {
                    "block": index,
                    "projection": name,
                    "rows": weight.shape[0],
                    "columns": weight.shape[1],
                    "zeros": int((weight == 0).sum()),
                    "sparsity": float((weight == 0).sum() / weight.numel()),
                    "projection_error": projection_errors[name],
                    "block_error": error,
                    "block_seconds": seconds,
                    "note": pruned.notes.get(name, ""),
                }
            )
        self.steps += [{"block": index, "step": number, **step} for number, step in enumerate(pruned.steps)]

    @property
    def sparsity(self) -> float:
        """Fraction of the projections' weights that are 0."""
        return sum(row["zeros"] for row in self.rows) / sum(row["rows"] * row["columns"] for row in self.rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per block and projection.

        `sparsity` is counted in the weights. `block_error` is the mean of Eqn. 1 over the windows; `projection_error`
        is ||(W - W')x||^2 / ||Wx||^2 over the first window, x being the projection's input in the pruned block.
        """
        return pd.DataFrame(self.rows)

    def plot_allocation(self, ax: Axes | None = None) -> Axes:
        """Heat map of the sparsity, blocks x projections."""
        return figures.allocation(self.to_frame(), ax)

    def __str__(self) -> str:
        blocks = len({row["block"] for row in self.rows})
        return f"{self.method.name}: sparsity {self.sparsity:.4f} in {blocks} blocks, {self.seconds:.0f} s"
