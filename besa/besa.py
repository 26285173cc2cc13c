"""BESA: learn the sparsity allocation of one block by gradient descent on its reconstruction error (Eqn. 1-2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import prodigyopt
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.allocation import Allocation, candidate_rates, reachable_sparsity
from besa.decoder import find_blocks, projections
from besa.importance import Importance, InputStatistics, importance
from besa.machine.processes import mean_, n_ranks
from besa.prune import Method
from besa.quantize import CLIPPING_START, Quantize
from besa.walk import Block, PrunedBlock, reconstruction_error


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

    @property
    def span(self) -> int:
        return self.reconstruct if isinstance(self.reconstruct, int) else 1

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

    def prune_block(self, block: Block) -> PrunedBlock:
        """Learn the allocation of the block, or of each of its parts in turn, then mask its weights with it."""
        statistics = block.statistics(hessian=self.importance == "sparsegpt")
        whole = PrunedBlock()
        for name in self._parts(block):
            part = block.part(name, whole.weights) if name else block
            learned = self._learn(_Learner(self, part, name, statistics), part)
            for pruned, of_part in (
                (whole.weights, learned.weights),
                (whole.keep_masks, learned.keep_masks),
                (whole.quantized, learned.quantized),
            ):
                pruned.update({_joined(name, within): value for within, value in of_part.items()})
            whole.steps.extend(learned.steps)
        return whole

    def _parts(self, block: Block) -> list[str]:
        """Names of the submodules that are learned one after the other; the block's own name is empty."""
        if self.reconstruct == "projection":
            return list(block.projections)
        if self.reconstruct == "sublayer":
            return [name for name, child in block.module.named_children() if projections(child)]
        return [""]

    @torch.enable_grad()
    def _learn(self, learner: "_Learner", block: Block) -> PrunedBlock:
        """Minimize the block's loss (Eqn. 2) over the windows, a step at a time."""
        # In float16 the gradient of an unscaled loss underflows to 0; a step whose scaled one overflows is skipped.
        scaler = torch.amp.GradScaler(learner.logits.values.device.type, enabled=block.inputs.dtype == torch.float16)
        log, skipped = [], []
        for step in block.bar(list(self._steps(len(block.inputs))), "learn"):
            learner.zero_grad()
            for window in step:
                masked, sparsity = learner()
                error = reconstruction_error(block.run(window, masked), block.target(window))  # Eqn. 1
                loss = error + self.penalty * ((sparsity - self.sparsity) / self.sparsity) ** 2  # Eqn. 2
                scaler.scale(loss / len(step)).backward()  # Eqn. 6
                log.append(torch.stack([loss, error, sparsity]).detach())
            skipped.append(learner.step(scaler))
        entries = mean_(torch.stack(log).view(-1, len(step), 3).mean(1))
        return learner.pruned(_steps_log(block.index, entries, skipped))

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


class _Learner:
    """What is learned of one block: the logits of every projection's rows, and the clipping where it is quantized."""

    def __init__(self, method: Besa, block: Block, part: str, statistics: dict[str, InputStatistics]) -> None:
        """
        Args:
            part: what `block` is called in the block that the statistics are of.
        """
        self.quantize, candidates = method.quantize, method.candidates
        self.allocations: dict[str, Allocation] = {}
        for name, projection in block.projections.items():
            weight = projection.weight.detach()
            rates = candidate_rates(candidates).to(weight.device)
            ranked = self.quantize.codes(weight).dequantize(weight.dtype) if self.quantize else weight
            scores = importance(method.importance, ranked, statistics[_joined(part, name)])
            groups = len(weight) // method._group_rows(weight)
            self.allocations[name] = Allocation.create(weight, scores, rates, groups, method.smooth)
        # Starting at 0, every candidate is equally likely: sparsity one half.
        self.logits = _Flat({name: (a.groups, candidates) for name, a in self.allocations.items()}, 0.0, weight.device)
        self.learned = [self.logits]
        self.optimizers = [prodigyopt.Prodigy([self.logits.values], lr=1.0, d_coef=method.d_coef, weight_decay=0.0)]
        if self.quantize:
            shapes = {name: self.quantize.clipping_shape(a.weight) for name, a in self.allocations.items()}
            self.clipping = _Flat(shapes, CLIPPING_START, weight.device)
            self.learned.append(self.clipping)
            self.optimizers.append(torch.optim.Adam([self.clipping.values], lr=self.quantize.lr))

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        """Masked weights by projection and the block's sparsity, weighted by their sizes; both differentiable."""
        logits, clipping = self.logits.by_name(), self.clipping.by_name() if self.quantize else {}
        masked, zeros = {}, 0.0
        for name, allocation in self.allocations.items():
            weight = self.quantize.fake(allocation.weight, clipping[name]) if self.quantize else None
            masked[name], alpha = allocation(logits[name], weight)
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        return masked, zeros / sum(allocation.weight.numel() for allocation in self.allocations.values())

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, scaler: torch.amp.GradScaler) -> bool:
        """Take the step that the gradients of all ranks ask for; whether it was skipped, for they overflowed."""
        for flat in self.learned:
            mean_(flat.values.grad)
        scale = scaler.get_scale()
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() < scale

    @torch.no_grad()
    def pruned(self, steps: list[dict[str, float]]) -> PrunedBlock:
        """Weights and keep-masks as they are learned by now."""
        pruned, logits = PrunedBlock(steps=steps), self.logits.by_name()
        for name, allocation in self.allocations.items():
            pruned.keep_masks[name] = allocation.keep_mask(logits[name])
            if self.quantize:
                codes = self.quantize.codes(allocation.weight, self.clipping.by_name()[name])
                pruned.quantized[name] = codes.pruned(pruned.keep_masks[name])
                pruned.weights[name] = pruned.quantized[name].dequantize(allocation.weight.dtype)
            else:
                pruned.weights[name] = allocation(logits[name])[0]
        return pruned


def _joined(part: str, name: str) -> str:
    """A projection's name in the block, given its name in a part of it."""
    return f"{part}.{name}".strip(".")


def _steps_log(index: int, entries: Float32[Tensor, "steps 3"], skipped: list[bool]) -> list[dict[str, float]]:
    """The training log of a block; `skipped` is noted only where a step was.

    Raises:
        ValueError: a loss is not finite: what was learned from it is nothing.
    """
    finite = torch.isfinite(entries).all(dim=1)
    if not finite.all():
        step = int(finite.int().argmin())
        raise ValueError(
            f"block {index}, training step {step}: the loss is {float(entries[step, 0])}, for the masked block puts "
            "out what overflows; try dtype bfloat16 or float32"
        )
    keys = ("loss", "reconstruction_error", "sparsity")
    steps = [dict(zip(keys, values, strict=True)) for values in entries.tolist()]
    return [step | {"skipped": True} if skip else step for step, skip in zip(steps, skipped, strict=True)]


class _Flat:
    """Tensors by name that are views of one flat parameter, so that an optimizer's step is one operation."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], start: float, device: torch.device) -> None:
        self.shapes = shapes
        self.values = nn.Parameter(torch.full((sum(map(math.prod, shapes.values())),), start, device=device))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.values.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
