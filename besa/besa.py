"""BESA: learn the sparsity allocation of one block by gradient descent on its reconstruction error (Eqn. 1-2)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import prodigyopt
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.allocation import Allocation, candidate_rates, reachable_sparsity
from besa.importance import Importance, importance
from besa.machine.processes import mean_, n_ranks
from besa.prune import BlockTask, Method, PrunedBlock, reconstruction_error
from besa.quantize import CLIPPING_START, Quantize
from besa.walk import device_of, find_blocks, projections, record_part, run_block


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
    """Passes over the windows."""
    batch_size: int = 1
    """Windows per step, whose gradients are averaged (published: one). Ranks under torchrun share them out."""
    reconstruct: Literal["projection", "sublayer"] | int = 1
    """What is reconstructed together, under a budget of its own: each projection, attention and MLP each by itself, or
    this number of consecutive blocks (published: one)."""
    quantize: Quantize | None = None
    """Quantize the weights too, their clipping learned beside the allocation (joint compression, Eqn. 7)."""
    seed: int | None = None
    """None takes the windows in their order in every epoch (published); a number shuffles the steps anew each epoch."""

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
        if min(self.epochs, self.batch_size) < 1 or self.penalty <= 0 or self.d_coef <= 0:
            numbers = f"epochs ({self.epochs}), batch_size ({self.batch_size}), penalty ({self.penalty})"
            raise ValueError(f"{numbers} and d_coef ({self.d_coef}) must be positive")
        if self.reconstruct not in ("projection", "sublayer") and (
            isinstance(self.reconstruct, str) or self.reconstruct < 1
        ):
            raise ValueError(f"reconstruct {self.reconstruct!r} is not 'projection', 'sublayer' or a number of blocks")
        if isinstance(self.reconstruct, str) and self.targets == "dense":
            raise ValueError(
                f"reconstruct {self.reconstruct!r} with targets 'dense': only whole blocks have the "
                "dense model's outputs; take targets 'pruned'"
            )
        lowest, highest = reachable_sparsity(self.candidates, self.smooth)
        if not lowest < self.sparsity < highest:
            raise ValueError(
                f"sparsity {self.sparsity} is outside ({lowest:.3f}, {highest:.3f}), what {self.candidates} candidates "
                f"with smooth={self.smooth} can reach" + ("; smooth=False lifts the limit" if self.smooth else "")
            )

    def config(self) -> dict[str, Any]:
        """Name and fields; `batch_size` only where it is not the published one, so that older records stay valid."""
        fields = super().config()
        if self.batch_size == 1:
            del fields["batch_size"]
        return fields

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "sparsegpt"

    @property
    def span(self) -> int:
        return self.reconstruct if isinstance(self.reconstruct, int) else 1

    def passes(self, block: nn.Module) -> int:
        parts = self._parts(block)
        return self.epochs * len(parts)

    def check(self, model: PreTrainedModel) -> None:
        for index, block in enumerate(find_blocks(model)):
            for name, projection in projections(block).items():
                rows = len(projection.weight)
                if rows % self._group_rows(projection.weight):
                    raise ValueError(
                        f"block {index}, {name}: {rows} rows do not divide into groups of {self.row_group}"
                    )
        if self.quantize:
            self.quantize.check(model)

    def prune_block(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        """Learn the allocation of the block, or of each of its parts in turn, then mask its weights with it."""
        whole = PrunedBlock({})
        for part in self._parts(task.block):
            learned = self._prune_part(_part_of(task, part, whole.weights) if part else task, tick)
            whole.weights.update({f"{part}.{name}".strip("."): w for name, w in learned.weights.items()})
            whole.quantized.update({f"{part}.{name}".strip("."): q for name, q in learned.quantized.items()})
            whole.steps.extend(learned.steps)
        return whole

    def _parts(self, block: nn.Module) -> list[str]:
        """Names of the submodules that are learned one after the other; the block's own name is empty."""
        if self.reconstruct == "projection":
            return list(projections(block))
        if self.reconstruct == "sublayer":
            return [name for name, child in block.named_children() if projections(child)]
        return [""]

    def _prune_part(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        allocations = self._allocations(task)
        logits, clipping, steps = self._learn(task, allocations, tick)
        if not self.quantize:
            return PrunedBlock({name: allocations[name](theta)[0] for name, theta in logits.items()}, steps)
        quantized = {
            name: self.quantize.codes(allocation.weight, clipping[name]).pruned(allocation.keep_mask(logits[name]))
            for name, allocation in allocations.items()
        }
        weights = {name: value.dequantize(allocations[name].weight.dtype) for name, value in quantized.items()}
        return PrunedBlock(weights, steps, quantized=quantized)

    def _learn(
        self, task: BlockTask, allocations: dict[str, Allocation], tick: Callable[[], Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
        """Minimize Eqn. 2 over the windows; returns logits, clipping and the log."""
        device = device_of(task.block)
        # Starting at 0, every candidate is equally likely: sparsity one half.
        logits = _Flat({name: (a.groups, self.candidates) for name, a in allocations.items()}, 0.0, device)
        optimizers = [prodigyopt.Prodigy([logits.values], lr=1.0, d_coef=self.d_coef, weight_decay=0.0)]
        clipping = None
        if self.quantize:
            shapes = {name: self.quantize.clipping_shape(a.weight) for name, a in allocations.items()}
            clipping = _Flat(shapes, CLIPPING_START, device)
            optimizers.append(torch.optim.Adam([clipping.values], lr=self.quantize.lr))
        learned = [logits.values] + ([clipping.values] if clipping else [])
        # In float16 the gradient of an unscaled loss underflows to 0; a step whose scaled gradient overflows is skipped.
        scaler = torch.amp.GradScaler(device.type, enabled=task.inputs.dtype == torch.float16)
        log, skipped = [], []
        for step in self._steps(len(task.inputs)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for window in step:
                log.append(self._gradient(task, allocations, logits, clipping, window, len(step), scaler))
                tick()
            for values in learned:
                mean_(values.grad)
            scale = scaler.get_scale()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            skipped.append(scaler.get_scale() < scale)
        entries = mean_(torch.stack(log).view(-1, len(step), 3).mean(1))
        return logits.learned(), clipping.learned() if clipping else {}, _steps_log(task.index, entries, skipped)

    @torch.enable_grad()
    def _gradient(
        self,
        task: BlockTask,
        allocations: dict[str, Allocation],
        logits: "_Flat",
        clipping: "_Flat | None",
        window: int,
        n_windows: int,
        scaler: torch.amp.GradScaler,
    ) -> Float32[Tensor, "3"]:
        """Add one window's share in the gradient of a step; returns its loss, reconstruction error and sparsity."""
        error, sparsity = self._forward(task, allocations, logits, clipping, window)
        loss = error + self.penalty * ((sparsity - self.sparsity) / self.sparsity) ** 2
        scaler.scale(loss / n_windows).backward()
        return torch.stack([loss, error, sparsity]).detach()

    def _forward(
        self,
        task: BlockTask,
        allocations: dict[str, Allocation],
        logits: "_Flat",
        clipping: "_Flat | None",
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction error of one window and the block's sparsity, weighted by the projections' sizes."""
        thetas, clips = logits.by_name(), clipping.by_name() if clipping else {}
        masked, zeros = {}, 0.0
        for name, allocation in allocations.items():
            weight = self.quantize.fake(allocation.weight, clips[name]) if self.quantize else None
            masked[name], alpha = allocation(thetas[name], weight)
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        inputs, targets = task.window(window)
        error = reconstruction_error(run_block(task.block, inputs, task.call, masked), targets)
        return error, zeros / sum(allocation.weight.numel() for allocation in allocations.values())

    def _allocations(self, task: BlockTask) -> dict[str, Allocation]:
        rates = candidate_rates(self.candidates).to(device_of(task.block))
        allocations = {}
        for name, projection in projections(task.block).items():
            weight = projection.weight.detach()
            ranked = self.quantize.codes(weight).dequantize(weight.dtype) if self.quantize else weight
            scores = importance(self.importance, ranked, task.statistics[name])
            groups = len(weight) // self._group_rows(weight)
            allocations[name] = Allocation.create(weight, scores, rates, groups, self.smooth)
        return allocations

    def _group_rows(self, weight: Tensor) -> int:
        return {"row": 1, "layer": len(weight)}.get(self.row_group, self.row_group)

    def _steps(self, n_samples: int) -> Iterator[range]:
        """This rank's windows in each step. It holds every n-th window, so that a step's windows are the same for
        any number of ranks."""
        size = self.batch_size // n_ranks()
        steps = [range(start, start + size) for start in range(0, n_samples, size)]
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = range(len(steps)) if generator is None else torch.randperm(len(steps), generator=generator).tolist()
            yield from (steps[number] for number in order)


def _steps_log(index: int, entries: Float32[Tensor, "steps 3"], skipped: list[bool]) -> list[dict[str, float]]:
    """The training log of a block; `skipped` is noted only where a step was.

    Raises:
        ValueError: a loss is not finite: what was learned from it is nothing.
    """
    finite = torch.isfinite(entries).all(dim=1)
    if not finite.all():
        step = int(finite.int().argmin())
        raise ValueError(
            f"block {index}, training step {step}: the loss is {float(entries[step, 0])}, for the masked block's output "
            "overflows; try dtype bfloat16 or float32"
        )
    keys = ("loss", "reconstruction_error", "sparsity")
    steps = [dict(zip(keys, values, strict=True)) for values in entries.tolist()]
    return [step | {"skipped": True} if skip else step for step, skip in zip(steps, skipped, strict=True)]


def _part_of(task: BlockTask, part: str, weights: dict[str, Tensor]) -> BlockTask:
    """The same task for a submodule: fed by the block as it is pruned so far, it must reproduce its own output."""
    inputs, call, targets = record_part(task.block, part, task.inputs, task.call, weights)
    within = [name for name in task.statistics if f"{name}.".startswith(f"{part}.")]
    statistics = {name[len(part) :].lstrip("."): task.statistics[name] for name in within}
    return BlockTask(task.index, task.block.get_submodule(part), call, inputs, targets, statistics)


class _Flat:
    """Tensors by name that are views of one flat parameter, so that an optimizer's step is one operation."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], start: float, device: torch.device) -> None:
        self.shapes = shapes
        self.values = nn.Parameter(torch.full((sum(map(math.prod, shapes.values())),), start, device=device))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.values.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}

    def learned(self) -> dict[str, Tensor]:
        return {name: part.detach() for name, part in self.by_name().items()}
