"""What BESA learns of one block: logits of every row's allocation; or, beyond the paper, budgets and scores.

A learner is called for the masked weights of a step, takes the step, and tells the masks in the end (`besa/besa.py`).
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import prodigyopt
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from besa.allocation import Allocation, candidate_rates
from besa.budget import Budgeted, meet_budget, whole_counts
from besa.importance import InputStatistics, importance
from besa.machine.device import advance
from besa.machine.processes import mean_, n_ranks
from besa.masks import parse_pattern
from besa.quantize import CLIPPING_START
from besa.scores import SCORE_LR, Scored, stepped_counts
from besa.walk import Block, PrunedBlock

if TYPE_CHECKING:
    from besa.besa import Besa


class Learner:
    """What is learned of one block: the logits of every projection's rows, and the clipping where it is quantized."""

    def __init__(
        self, method: "Besa", block: Block, part: str, statistics: dict[str, InputStatistics], share: Fraction
    ) -> None:
        """
        Args:
            part: the block's name in the whole block, whose projections the statistics name; empty for the whole.
            share: weights that the sparsity is a fraction of, divided by those that may be pruned.
        """
        self.method, self.quantize, self.share = method, method.quantize, share
        self.block_sparsity = method.sparsity_of(block)  # of the whole block, what is ignored included
        self.sparsity = self.block_sparsity * float(share)
        weights = {name: projection.weight.detach() for name, projection in block.projections.items()}
        # Importances take twice a bfloat16 weight's memory: they are made for one projection at a time.
        importances = lambda name: self._importance(weights[name], statistics[full_name(part, name)])
        device = next(iter(weights.values())).device
        steps = method.epochs * len(block.inputs) * n_ranks() // method.batch_size
        self.prepare(weights, importances, device, steps)
        if self.quantize:
            shapes = {name: self.quantize.clipping_shape(weight) for name, weight in weights.items()}
            self.clipping = _Flat(shapes, CLIPPING_START, device)
            self.learned.append(self.clipping)
            self.optimizers.append(torch.optim.Adam([self.clipping.values], lr=self.quantize.lr))

    def _importance(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        ranked = self.quantize.codes(weight).dequantize(weight.dtype) if self.quantize else weight
        return importance(self.method.importance, ranked, statistics)

    def prepare(
        self, weights: dict[str, Tensor], importances: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        """Rank the weights, and make what is learned and its optimizer."""
        method = self.method
        rates, groups = candidate_rates(method.candidates).to(device), self._groups(weights)
        self.allocations = {
            name: Allocation.create(weight, importances(name), rates, method.smooth) for name, weight in weights.items()
        }
        # Starting at 0, every candidate is equally likely: sparsity one half.
        self.theta = _Flat({name: (n, method.candidates) for name, n in groups.items()}, 0.0, device)
        self.learned = [self.theta]
        self.optimizers = [prodigyopt.Prodigy([self.theta.values], lr=1.0, d_coef=method.d_coef, weight_decay=0.0)]

    def _groups(self, weights: dict[str, Tensor]) -> dict[str, int]:
        return {name: len(weight) // self.method.group_rows(weight) for name, weight in weights.items()}

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        """Masked weights by projection and the block's sparsity, weighted by their sizes; both differentiable."""
        theta, masked, zeros = self.theta.by_name(), {}, 0.0
        for name, allocation in self.allocations.items():
            masked[name], alpha = allocation(theta[name], self._quantized(name))
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        return masked, zeros / sum(allocation.weight.numel() for allocation in self.allocations.values())

    def _quantized(self, name: str) -> Tensor | None:
        """A projection's weight as its clipping quantizes it by now; None where nothing is quantized."""
        if self.quantize:
            return self.quantize.fake(self.allocations[name].weight, self.clipping.by_name()[name])
        return None

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
        pruned = PrunedBlock(steps=steps, keep_masks=self.keep_masks())
        for name, keep_mask in pruned.keep_masks.items():
            weight, out = self.allocations[name].weight, self.allocations[name].out
            if self.quantize:
                codes = self.quantize.codes(weight, self.clipping.by_name()[name])
                pruned.quantized[name] = codes.pruned(keep_mask)
                pruned.weights[name] = pruned.quantized[name].dequantize(weight.dtype)
            else:
                pruned.weights[name] = out.copy_(weight).masked_fill_(~keep_mask, 0)
        return pruned

    def keep_masks(self) -> dict[str, Tensor]:
        """M as it is learned by now."""
        theta = self.theta.by_name()
        return {name: allocation.keep_mask(theta[name]) for name, allocation in self.allocations.items()}


class BudgetLearner(Learner):
    """The same where the sparsities always meet the budget: theta is one number per row group, for any target."""

    def prepare(
        self, weights: dict[str, Tensor], importances: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        self.allocations = {name: self._create(weight, importances(name)) for name, weight in weights.items()}
        self.groups = self._groups(weights)
        self.theta = _Flat({"": (sum(self.groups.values()),)}, self.sparsity, device)
        sizes = [torch.full((n,), weights[name].numel() / n) for name, n in self.groups.items()]
        self.sizes = torch.cat(sizes).to(device)
        self.total = round(self.block_sparsity * float(self.share * sum(weight.numel() for weight in weights.values())))
        self.rows = [len(weight) for weight in weights.values()]
        columns = [torch.full((len(weight),), weight.shape[1]) for weight in weights.values()]
        self.columns = torch.cat(columns).to(device)
        rates = self._step_sizes(weights)
        self.learned = list(rates)
        self.optimizers = [torch.optim.Adam([{"params": [flat.values], "lr": lr} for flat, lr in rates.items()])]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[0], steps)

    def _create(self, weight: Tensor, importance: Tensor) -> Any:
        return Budgeted.create(weight, importance)

    def _step_sizes(self, weights: dict[str, Tensor]) -> "dict[_Flat, float]":
        """What is learned, and how fast."""
        return {self.theta: self.method.lr}

    def _alpha(self) -> dict[str, Tensor]:
        alpha = meet_budget(self.theta.values, self.sizes, self.sparsity)
        return dict(zip(self.groups, alpha.split(list(self.groups.values())), strict=True))

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        masked = {name: self.allocations[name](a, self._quantized(name)) for name, a in self._alpha().items()}
        return masked, torch.full((), self.sparsity, device=self.sizes.device)

    def step(self, scaler: torch.amp.GradScaler) -> bool:
        skipped = super().step(scaler)
        advance(self.schedule)
        return skipped

    def _counts(self, alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many weights of each row go."""
        shares = [a.detach().repeat_interleave(n // len(a)) for n, a in zip(self.rows, alpha.values(), strict=True)]
        counts = self._whole(torch.cat(shares) * self.columns)
        return dict(zip(self.allocations, counts.split(self.rows), strict=True))

    def _whole(self, wanted: Tensor) -> Tensor:
        return whole_counts(wanted, self.columns, self.total)

    def keep_masks(self) -> dict[str, Tensor]:
        counts = self._counts(self._alpha())
        return {name: each.keep_mask(counts[name]) for name, each in self.allocations.items()}


class ScoreLearner(BudgetLearner):
    """The same where a score for each weight (of a row group: each column) says which stay, of a row or of every M.

    Where a pattern leaves nothing open, how many stay is not learned.
    """

    def prepare(
        self, weights: dict[str, Tensor], importances: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        self.n, self.m = parse_pattern(self.method.pattern) if self.method.pattern else (None, None)
        super().prepare(weights, importances, device, steps)

    def _step_sizes(self, weights: dict[str, Tensor]) -> "dict[_Flat, float]":
        shapes = {name: (n, weights[name].shape[1]) for name, n in self.groups.items()}
        self.scores, lr = _Flat(shapes, 0.0, self.sizes.device), self.method.lr
        return {self.scores: SCORE_LR * lr} | ({self.theta: lr} if self.n is None else {})

    def _create(self, weight: Tensor, importance: Tensor) -> Scored:
        return Scored.create(weight, importance, self.m)

    def _alpha(self) -> dict[str, Tensor | None]:
        return super()._alpha() if self.n is None else dict.fromkeys(self.allocations)

    def _counts(self, alpha: dict[str, Tensor | None]) -> dict[str, Tensor]:
        if self.n is None:
            return super()._counts(alpha)
        full = lambda each: torch.full((len(each.weight),), each.step * (self.m - self.n), device=self.sizes.device)
        return {name: full(each) for name, each in self.allocations.items()}

    def _whole(self, wanted: Tensor) -> Tensor:
        if self.theta.values.isnan().any():  # after a loss that was not finite, which the log of the steps tells
            return torch.zeros_like(self.columns)
        if self.m is None:
            return super()._whole(wanted)
        return stepped_counts(wanted, self.columns // self.m, self.m, self.total)

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        alpha, scores, masked = self._alpha(), self.scores.by_name(), {}
        counts = self._counts(alpha)
        for name, allocation in self.allocations.items():
            masked[name] = allocation(scores[name], counts[name], alpha[name], self._quantized(name))
        return masked, torch.full((), self.sparsity, device=self.sizes.device)

    def keep_masks(self) -> dict[str, Tensor]:
        scores, counts = self.scores.by_name(), self._counts(self._alpha())
        return {name: each.keep_mask(scores[name], counts[name]) for name, each in self.allocations.items()}


def full_name(part: str, name: str) -> str:
    """A projection's name in the block, given its name in a part of it."""
    return f"{part}.{name}".strip(".")


class _Flat:
    """Tensors by name that are views of one flat parameter, so that an optimizer's step is one operation."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], start: float, device: torch.device) -> None:
        self.shapes = shapes
        self.values = nn.Parameter(torch.full((sum(map(math.prod, shapes.values())),), start, device=device))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.values.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
