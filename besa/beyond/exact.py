"""Exact budgets, learned scores and N:M patterns, and new weights that are trained with them.

Sparsity. Every row has one number theta; tau is such that the block's sparsity is the target:

    alpha = clip(theta - tau, 0, 1)
    dL/dalpha = -C * mean of dL/dM_ij over the weights of a row ranked within 5 % of its threshold alpha C

Scores. Every weight has one; the largest log importance + score are kept:

    dL/dscore_ij = dL/dM_ij, straight through

A pattern N:M fixes how many are kept, so that only the scores are learned. One backward pass through W' = M * W gives

    dL/dM_ij = dL/dW'_ij W_ij    and, where the weights are trained, too,    dL/dW_ij = dL/dW'_ij M_ij
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int64
from pydantic import PositiveInt
from torch import Tensor, nn

from besa.config import config
from besa.importance import wanda
from besa.loop import PatternMethod
from besa.losses import token_error
from besa.masks import order_statistics, ranks_of_rows
from besa.shapes import KeepMask, Matrix, Scalar
from besa.training import Parameters, train
from besa.walk import Block, Match, PrunedBlock

Counts = Int64[Tensor, "rows"]
Groups = Float32[Tensor, "groups"]

BAND = 0.05  # of a row: the weights this near to its threshold on either side give the gradient of its sparsity
LR = 0.01  # Adam's step size for sparsities
SCORE_LR = 3 * LR  # for scores, in units of log importance
WEIGHT_LR = LR / 2  # for weights, in units of their root mean square


@config
class Exact(PatternMethod):
    """Meet any sparsity to the weight in every block, and learn which weights are kept.

    A block must reproduce the dense model's hidden states; the error is relative to the norm of each token
    (`token_error`).

    Args:
        update: train the kept weights, too: while the mask is learned, and twice as long with the final mask.
        epochs, batch_size: passes over the windows to learn the mask; windows per step, over all ranks.
    """

    update: bool = False
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1

    name: ClassVar[str] = "exact"
    match: ClassVar[Match] = "model"

    def prune_block(self, block: Block) -> PrunedBlock:
        if not block.projections:  # all are ignored
            return PrunedBlock()
        batches = block.batches(self.batch_size, self.epochs)
        masks = MaskLearner(self, block, len(batches))
        sparsity = torch.full((), masks.sparsity, device=block.device)

        def loss_of(learner: Callable[[], dict[str, Tensor]], window: int) -> tuple[Scalar, Scalar, Scalar]:
            error = token_error(block.run(window, learner()), block.window(block.targets, window))
            return error, error, sparsity

        if self.update:
            weights = WeightLearner(masks.weights, 3 * len(batches))
            masks.weights = weights.weights  # the masks are then of the weights as they are trained
            schedules = [masks.schedule, weights.schedule]
            optimizers = [masks.optimizer, weights.optimizer]
            steps = train(block, batches, optimizers, partial(loss_of, masks), schedules)
            weights.keep_masks = masks.keep_masks()
            steps += train(block, 2 * batches, optimizers[1:], partial(loss_of, weights), schedules[1:])
            keep_masks = weights.keep_masks
        else:
            steps = train(block, batches, [masks.optimizer], partial(loss_of, masks), [masks.schedule])
            keep_masks = masks.keep_masks()
        return PrunedBlock(masked(masks.weights, keep_masks, masks.buffers), keep_masks, steps)


class WeightLearner:
    """Train float32 copies of weights, of which keep-masks keep some; calling it gives these."""

    def __init__(self, weights: dict[str, Tensor], n_steps: int) -> None:
        self.weights: dict[str, Tensor] = {
            name: nn.Parameter(weight.to(torch.float32, copy=True)) for name, weight in weights.items()
        }
        self.buffers = {name: torch.empty_like(weight) for name, weight in weights.items()}
        self.keep_masks: dict[str, KeepMask] = {}
        self.optimizer = torch.optim.Adam([{"params": [weight]} for weight in self.weights.values()], fused=True)
        lrs = [WEIGHT_LR * float(weight.detach().square().mean().sqrt()) for weight in self.weights.values()]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lrs, n_steps)  # cycles Adam's beta1, too

    def __call__(self) -> dict[str, Tensor]:
        return {
            name: LearnedWeight.apply(None, None, weight, self.keep_masks[name], None, self.buffers[name])
            for name, weight in self.weights.items()
        }


def masked(
    weights: Mapping[str, Tensor], keep_masks: Mapping[str, KeepMask], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Fill the buffers with masked weights."""
    return {
        name: buffers[name].copy_(weight.detach()).masked_fill_(~keep_masks[name], 0)
        for name, weight in weights.items()
    }


class BudgetLearner:
    """Sparsities of groups of rows that always meet the block's budget.

    Args:
        groups: number of row groups of each projection.
    """

    def __init__(self, sparsity: float, block: Block, groups: dict[str, int]) -> None:
        self.sparsity = sparsity
        self.groups = groups
        self.weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        self.buffers = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
        self.n_pruned = round(sparsity * sum(weight.numel() for weight in self.weights.values()))
        columns = [torch.full((len(weight),), weight.shape[1]) for weight in self.weights.values()]
        self.columns = torch.cat(columns).to(block.device)  # of each row
        sizes = [torch.full((n,), self.weights[name].numel() / n) for name, n in groups.items()]
        self.sizes = torch.cat(sizes).to(block.device)  # weights of each row group
        self.theta = Parameters({"": (len(self.sizes),)}, sparsity, block.device)

    def alpha(self) -> dict[str, Groups]:
        """Sparsities of the row groups, differentiable in theta."""
        alpha = meet_budget(self.theta.flat, self.sizes, self.sparsity)
        return dict(zip(self.groups, alpha.split(list(self.groups.values())), strict=True))

    def counts(self, alpha: dict[str, Tensor]) -> dict[str, Counts]:
        """Weights to prune from each row."""
        rows = [len(weight) for weight in self.weights.values()]
        by_row = [each.detach().repeat_interleave(n // len(each)) for n, each in zip(rows, alpha.values(), strict=True)]
        finite = torch.cat(by_row).nan_to_num(self.sparsity)  # if the loss was not finite, the training log raises
        counts = whole_counts(finite * self.columns, self.columns, self.n_pruned)
        return dict(zip(self.weights, counts.split(rows), strict=True))


class MaskLearner(BudgetLearner):
    """Train a score of every weight, and sparsities of rows that meet the block's budget."""

    def __init__(self, method: Exact, block: Block, n_steps: int) -> None:
        rows = {name: len(linear.weight) for name, linear in block.projections.items()}
        super().__init__(method.sparsity_of(block), block, groups=rows)
        self.method = method
        tiny = torch.finfo(torch.float32).tiny
        self.log_importance = {
            name: wanda(weight, block.statistics[name]).clamp_min(tiny).log() for name, weight in self.weights.items()
        }
        self.scores = Parameters({name: weight.shape for name, weight in self.weights.items()}, 0.0, block.device)
        learned = [{"params": [self.scores.flat], "lr": SCORE_LR}]
        if not method.pattern:
            learned.append({"params": [self.theta.flat], "lr": LR})
        self.optimizer = torch.optim.Adam(learned, fused=block.device.type == "cuda")
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, n_steps)

    def ranked(self, name: str) -> Matrix:
        """Log importance + score of every weight."""
        return self.log_importance[name] + self.scores.by_name()[name].detach()

    def __call__(self) -> dict[str, Tensor]:
        scores = self.scores.by_name()
        if self.method.pattern:
            return {
                name: LearnedWeight.apply(scores[name], None, self.weights[name], keep, None, self.buffers[name])
                for name, keep in self.keep_masks().items()
            }
        alpha = self.alpha()
        weights = {}
        for name, counts in self.counts(alpha).items():
            keep, near = around_threshold(self.ranked(name), counts)
            weights[name] = LearnedWeight.apply(
                scores[name], alpha[name], self.weights[name], keep, near, self.buffers[name]
            )
        return weights

    def keep_masks(self) -> dict[str, KeepMask]:
        if self.method.pattern:
            return {name: self.method.keep_mask(self.ranked(name), self.sparsity) for name in self.weights}
        counts = self.counts(self.alpha())
        return {name: ranks_of_rows(self.ranked(name), torch.int32) >= n.int()[:, None] for name, n in counts.items()}


def around_threshold(ranked: Matrix, counts: Counts) -> tuple[KeepMask, KeepMask]:
    """Keep-mask without the `counts` lowest of each row, and the weights ranked near that threshold."""
    columns = ranked.shape[1]
    band = max(1, round(BAND * columns))
    cuts = torch.stack([counts, counts - band, counts + band], dim=1)
    thresholds = order_statistics(ranked, cuts.clamp(0, columns - 1))
    above = [(ranked >= thresholds[:, i : i + 1]) & (cuts[:, i : i + 1] < columns) for i in range(3)]
    return above[0], above[1] & ~above[2]


class LearnedWeight(torch.autograd.Function):
    """W' = W * M forward; the gradients of scores, alpha and W, where they are learned, backward.

    `near` marks the weights that give the gradient of alpha.
    """

    @staticmethod
    def forward(
        ctx, scores: Tensor | None, alpha: Tensor | None, weight: Tensor, keep: Tensor, near: Tensor | None, out: Tensor
    ) -> Tensor:
        ctx.weight = weight.detach()
        ctx.keep = keep
        ctx.near = near
        return torch.mul(ctx.weight, keep, out=out).view_as(out)  # a view: autograd refuses `out` itself

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_scores = to_alpha = to_weight = None
        if ctx.needs_input_grad[0]:
            to_scores = grad.float() * ctx.weight  # dL/dM
            if ctx.near is not None:
                by_row = (to_scores * ctx.near).sum(1) / ctx.near.sum(1).clamp_min(1)
                to_alpha = -grad.shape[1] * by_row
        if ctx.needs_input_grad[2]:
            to_weight = torch.mul(grad, ctx.keep, out=torch.empty_like(ctx.weight))
        return to_scores, to_alpha, to_weight, None, None, None


def meet_budget(theta: Groups, sizes: Groups, sparsity: float) -> Groups:
    """alpha = clip(theta - tau, 0, 1) with mean `sparsity`, weighted by `sizes`; differentiable in theta."""
    low, high = theta.detach().min() - 1, theta.detach().max()
    tau = low
    for _ in range(32):  # bisection to float32's precision: the weighted sum falls with tau
        tau = (low + high) / 2
        too_much = (sizes * (theta.detach() - tau).clamp(0, 1)).sum() > sparsity * sizes.sum()
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    free = ((theta - tau > 0) & (theta - tau < 1)).detach()
    full = (theta - tau >= 1).detach()
    free_sizes = torch.where(free, sizes, 0.0)
    free_budget = sparsity * sizes.sum() - torch.where(full, sizes, 0.0).sum()
    tau = ((free_sizes * theta).sum() - free_budget) / free_sizes.sum().clamp_min(1e-30)
    return torch.where(free, theta - tau, full.to(theta.dtype))


def whole_counts(wanted: Float[Tensor, "rows"], limits: Counts, total: int) -> Counts:
    """Round `wanted` to whole numbers up to `limits` that add up to `total`: largest remainders go up first."""
    counts = wanted.double().floor().long().clamp(min=0).minimum(limits)
    place = torch.arange(len(counts), device=counts.device)
    while True:
        missing = total - counts.sum()
        can_move = torch.where(missing > 0, counts < limits, counts > 0)
        remainders = torch.where(can_move, (wanted.double() - counts) * missing.sign(), -torch.inf)
        order = remainders.sort(descending=True, stable=True).indices
        n_moved = missing.abs().minimum(can_move.sum())
        counts[order] += missing.sign() * (place < n_moved)
        if counts.sum() == total:  # the one wait for the GPU; nearly always after one pass
            return counts
