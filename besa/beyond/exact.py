"""Exact budgets, learned scores and N:M patterns, and new weights that are trained with them.

Sparsity. Every row group has one number theta; tau is such that the block's sparsity is the target:

    alpha = clip(theta - tau, 0, 1)
    dL/dalpha = -C * mean of dL/dM_ij over the weights of a row ranked within 5 % of its threshold alpha C

Scores. Every weight has one (rows of a group share theirs); the largest log importance + score are kept:

    dL/dscore = sum of dL/dM_ij over the rows of a group, straight through

A pattern N:M fixes how many are kept, so that only the scores are learned. One backward pass through W' = M * W gives

    dL/dM_ij = dL/dW'_ij W_ij    and, where the weights are trained, too,    dL/dW_ij = dL/dW'_ij M_ij
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.besa import Parameters, n_groups, training_log
from besa.config import config
from besa.decoder import find_blocks, projections, pruned_projections
from besa.importance import wanda
from besa.loop import PatternMethod
from besa.masks import ranks_of_rows, sorted_rows
from besa.system import mean_over_ranks
from besa.walk import Block, PrunedBlock, Targets, reconstruction_error, token_error

Matrix = Float32[Tensor, "rows columns"]
KeepMask = Bool[Tensor, "rows columns"]
Counts = Int64[Tensor, "rows"]
Groups = Float32[Tensor, "groups"]

BAND = 0.05  # of a row: the weights this near to its threshold on either side give the gradient of its sparsity
SCORE_LR = 3.0  # step size of scores, in units of log importance, relative to that of sparsities
WEIGHT_LR = 0.5  # step size of weights, in units of their root mean square, relative to that of sparsities


@config
class Exact(PatternMethod):
    """Meet any sparsity to the weight in every block, and learn which weights are kept.

    The sparsity of a block counts all its projections; those that are ignored count as kept.

    Args:
        row_group: rows that share what is learned: "row" (each its own), "layer" (all), or a number of rows.
        targets: hidden states of the dense model ("dense"), or outputs of the unpruned block for the same inputs.
        loss: error relative to the norm of each token (`token_error`), or of each channel ("channel", as `Besa`).
        update: train the kept weights, too: while the mask is learned, and twice as long with the final mask.
        lr: Adam's step size for sparsities, which falls to 0 as a cosine; three times as much for scores; for weights
            half of it times their root mean square, in one cycle.
        epochs, batch_size: passes over the windows to learn the mask; windows per step, over all ranks.
    """

    row_group: Literal["row", "layer"] | PositiveInt = "row"
    targets: Targets = "dense"
    loss: Literal["token", "channel"] = "token"
    update: bool = False
    lr: PositiveFloat = 0.01
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1

    name: ClassVar[str] = "exact"

    def check(self, model: PreTrainedModel, n_samples: int) -> None:
        super().check(model, n_samples)
        pruned = pruned_projections(model, self.ignore)
        for index, block in enumerate(find_blocks(model)):
            n_prunable = n_weights({name: linear for (i, name), linear in pruned.items() if i == index})
            limit = n_prunable / n_weights(projections(block))
            target = self.sparsities[index] if self.sparsities else self.sparsity
            if not self.pattern and 0 < limit <= target:
                raise ValueError(f"block {index}: with what is ignored, its sparsity stays below {limit:.4g}")

    def sparsity_of(self, block: Block) -> float:
        """Target sparsity of the projections that are not ignored: the ignored ones count as kept."""
        target = super().sparsity_of(block)
        if self.pattern or not block.projections:
            return target
        return target * (n_weights(projections(block.module)) / n_weights(block.projections))

    def learner(self, block: Block, n_steps: int) -> "MaskLearner":
        return MaskLearner(self, block, n_steps)

    def prune_block(self, block: Block) -> PrunedBlock:
        """Minimize the reconstruction error over the calibration windows."""
        if not block.projections:  # all are ignored
            return PrunedBlock()
        steps = block.steps(self.batch_size, self.epochs)
        error_of = token_error if self.loss == "token" else reconstruction_error
        masks = self.learner(block, len(steps))
        if self.update:
            weights = WeightLearner(masks.weights, 3 * len(steps), WEIGHT_LR * self.lr)
            masks.weights = weights.weights
            log = learn(block, block.targets, steps, [masks, weights], error_of)
            weights.keep_masks = masks.keep_masks()
            log += learn(block, block.targets, 2 * steps, [weights], error_of)
        else:
            log = learn(block, block.targets, steps, [masks], error_of)
        pruned = PrunedBlock(keep_masks=masks.keep_masks())
        pruned.weights = masked(masks.weights, pruned.keep_masks, masks.buffers)
        sparsity = torch.full((), masks.sparsity, device=block.device)
        pruned.steps = training_log(block, torch.stack([torch.stack([e, e, sparsity]) for e in log]), self.batch_size)
        return pruned


@torch.enable_grad()
def learn(block: Block, targets: Tensor, steps: Sequence[range], learners: list, error_of: Any) -> list[Tensor]:
    """Train all learners on the masked weights that the first one gives; returns the errors of the windows."""
    scaler = torch.amp.GradScaler(block.device.type, enabled=block.inputs.dtype == torch.float16)
    log = []
    for batch in block.progress(steps, "learn"):
        for learner in learners:
            learner.optimizer.zero_grad()
        for window in batch:
            error = error_of(block.run(window, learners[0]()), block.window(targets, window))
            scaler.scale(error / len(batch)).backward()
            log.append(error.detach())
        for learner in learners:
            for parameter in [each for group in learner.optimizer.param_groups for each in group["params"]]:
                mean_over_ranks(parameter.grad)
            scaler.step(learner.optimizer)
            learner.schedule.step()
        scaler.update()
    return log


class WeightLearner:
    """Train float32 copies of weights, of which keep-masks keep some; calling it gives these."""

    def __init__(self, weights: dict[str, Tensor], n_steps: int, lr: float) -> None:
        self.weights = {name: nn.Parameter(weight.to(torch.float32, copy=True)) for name, weight in weights.items()}
        self.buffers = {name: torch.empty_like(weight) for name, weight in weights.items()}
        self.keep_masks: dict[str, KeepMask] = {}
        self.optimizer = torch.optim.Adam([{"params": [weight]} for weight in self.weights.values()], fused=True)
        lrs = [lr * float(weight.detach().square().mean().sqrt()) for weight in self.weights.values()]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lrs, n_steps)

    def __call__(self) -> dict[str, Tensor]:
        return {
            name: UpdatedWeight.apply(None, None, weight, self.keep_masks[name], None, self.buffers[name])
            for name, weight in self.weights.items()
        }


def masked(
    weights: dict[str, Tensor], keep_masks: dict[str, KeepMask], buffers: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Fill the buffers with masked weights."""
    return {
        name: buffers[name].copy_(weight.detach()).masked_fill_(~keep_masks[name], 0)
        for name, weight in weights.items()
    }


class MaskLearner:
    """Train scores, and sparsities that always meet the block's budget; calling it gives masked weights."""

    def __init__(self, method: Exact, block: Block, n_steps: int) -> None:
        self.method, self.sparsity = method, method.sparsity_of(block)
        self.weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        self.buffers = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
        self.groups = {name: n_groups(weight, method.row_group) for name, weight in self.weights.items()}
        self.n_pruned = round(self.sparsity * n_weights(block.projections))
        columns = [torch.full((len(weight),), weight.shape[1]) for weight in self.weights.values()]
        self.columns = torch.cat(columns).to(block.device)  # of each row
        sizes = [torch.full((n,), self.weights[name].numel() / n) for name, n in self.groups.items()]
        self.sizes = torch.cat(sizes).to(block.device)  # weights of each row group
        self.theta = Parameters({"": (len(self.sizes),)}, self.sparsity, block.device)
        tiny, self.log_importance = torch.finfo(torch.float32).tiny, {}
        for name, weight in self.weights.items():
            self.log_importance[name] = wanda(weight, block.statistics[name]).clamp_min(tiny).log()
        shapes = {name: (self.groups[name], weight.shape[1]) for name, weight in self.weights.items()}
        self.scores = Parameters(shapes, 0.0, block.device)
        learned = [{"params": [self.scores.flat], "lr": SCORE_LR * method.lr}]
        if not method.pattern:
            learned.append({"params": [self.theta.flat], "lr": method.lr})
        self.optimizer = torch.optim.Adam(learned)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, n_steps)

    def alpha(self) -> dict[str, Groups]:
        """Sparsities of the row groups, differentiable in theta."""
        alpha = meet_budget(self.theta.flat, self.sizes, self.sparsity)
        return dict(zip(self.groups, alpha.split(list(self.groups.values())), strict=True))

    def counts(self, alpha: dict[str, Tensor]) -> dict[str, Counts]:
        """Weights to prune from each row."""
        if self.theta.flat.isnan().any():  # the loss was not finite: the training log raises
            return {name: torch.zeros_like(weight[:, 0], dtype=torch.long) for name, weight in self.weights.items()}
        rows = [len(weight) for weight in self.weights.values()]
        by_row = [each.detach().repeat_interleave(n // len(each)) for n, each in zip(rows, alpha.values(), strict=True)]
        counts = whole_counts(torch.cat(by_row) * self.columns, self.columns, self.n_pruned)
        return dict(zip(self.weights, counts.split(rows), strict=True))

    def ranked(self, name: str) -> Matrix:
        """Log importance + score of every weight."""
        scores, log_importance = self.scores.by_name()[name].detach(), self.log_importance[name]
        by_group = log_importance.view(len(scores), -1, scores.shape[1])
        return (by_group + scores[:, None]).view_as(log_importance)

    def __call__(self) -> dict[str, Tensor]:
        weights, scores = {}, self.scores.by_name()
        if self.method.pattern:
            for name, keep in self.keep_masks().items():
                weight, out = self.weights[name], self.buffers[name]
                weights[name] = UpdatedWeight.apply(scores[name], None, weight, keep, None, out)
            return weights
        alpha = self.alpha()
        for name, counts in self.counts(alpha).items():
            keep, near = around_threshold(self.ranked(name), counts)
            weight, out = self.weights[name], self.buffers[name]
            weights[name] = UpdatedWeight.apply(scores[name], alpha[name], weight, keep, near, out)
        return weights

    def keep_masks(self) -> dict[str, KeepMask]:
        """Keep-masks as learned so far."""
        if self.method.pattern:
            return {name: self.method.keep_mask(self.ranked(name), self.sparsity) for name in self.weights}
        counts = self.counts(self.alpha())
        return {name: ranks_of_rows(self.ranked(name), torch.int32) >= n.int()[:, None] for name, n in counts.items()}


def around_threshold(ranked: Matrix, counts: Counts) -> tuple[KeepMask, KeepMask]:
    """Keep-mask without the `counts` lowest of each row, and the weights ranked near that threshold."""
    columns, ordered = ranked.shape[1], sorted_rows(ranked)
    band = max(1, round(BAND * columns))

    def above(counts: Tensor) -> Tensor:
        threshold = ordered.gather(1, counts.clamp(0, columns - 1)[:, None])
        return (ranked >= threshold) & (counts < columns)[:, None]

    return above(counts), above(counts - band) & ~above(counts + band)


class UpdatedWeight(torch.autograd.Function):
    """W' = W * M forward; the gradients of scores, alpha and W, where they are learned, backward.

    `near` marks the weights that give the gradient of alpha.
    """

    @staticmethod
    def forward(ctx, scores: Tensor | None, alpha, weight: Tensor, keep: Tensor, near: Tensor | None, out: Tensor):
        ctx.weight, ctx.keep, ctx.near = weight.detach(), keep, near
        ctx.n_groups = 0 if scores is None else len(scores)
        return torch.mul(ctx.weight, keep, out=out).view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_scores = to_alpha = to_weight = None
        if ctx.n_groups:
            gain, columns = grad.float() * ctx.weight, grad.shape[1]  # dL/dM
            to_scores = gain.view(ctx.n_groups, -1, columns).sum(1)
            if ctx.near is not None:
                by_row = (gain * ctx.near).sum(1) / ctx.near.sum(1).clamp_min(1)
                to_alpha = -columns * by_row.view(ctx.n_groups, -1).sum(1)
        if ctx.needs_input_grad[2]:
            to_weight = torch.mul(grad, ctx.keep, out=torch.empty_like(ctx.weight))
        return to_scores, to_alpha, to_weight, None, None, None


def n_weights(linears: dict[str, nn.Linear]) -> int:
    return sum(linear.weight.numel() for linear in linears.values())


def meet_budget(theta: Groups, sizes: Groups, sparsity: float) -> Groups:
    """alpha = clip(theta - tau, 0, 1) with mean `sparsity`, weighted by `sizes`; differentiable in theta."""
    low, high = theta.detach().min() - 1, theta.detach().max()
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
    while (missing := total - int(counts.sum())) != 0:
        sign = 1 if missing > 0 else -1
        can_move = counts < limits if missing > 0 else counts > 0
        remainders = torch.where(can_move, (wanted.double() - counts) * sign, -torch.inf)
        n_moved = min(abs(missing), int(can_move.sum()))
        counts[remainders.sort(descending=True, stable=True).indices[:n_moved]] += sign
    return counts
