"""Exact budgets, learned scores and N:M patterns.

Sparsity. Every row group has one number theta; tau is such that the block's sparsity is the target:

    alpha = clip(theta - tau, 0, 1)
    dL/dalpha = -C * mean of dL/dM_ij over the weights of a row ranked within 5 % of its threshold alpha C

Scores. Every weight (of a row group: every column) has one. The weights with the largest sums are kept:

    log importance + score
    dL/dscore = sum of dL/dM_ij over the rows of a group, straight through

A pattern N:M fixes how many are kept, so that only the scores are learned. dL/dM_ij is dL/dW'_ij W_ij.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from besa.besa import Parameters, candidate_rates, n_groups, rank_rows, training_log
from besa.config import config
from besa.decoder import find_blocks, projections, pruned_projections
from besa.importance import wanda
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.loop import PatternMethod
from besa.masks import ranks_of_rows, sorted_rows
from besa.system import deterministic, mean_over_ranks, n_ranks
from besa.walk import Block, PrunedBlock, Targets, reconstruction_error, token_error

Matrix = Float32[Tensor, "rows columns"]
KeepMask = Bool[Tensor, "rows columns"]
Counts = Int64[Tensor, "rows"]
Groups = Float32[Tensor, "groups"]

BUCKETS = 101  # rates that divide the ranks of a row into buckets of 1 %
BAND = 5  # buckets on either side of a row's threshold whose weights give the gradient of its sparsity
SCORE_LR = 3.0  # step size of scores, in units of log importance, relative to that of sparsities


@config
class Exact(PatternMethod):
    """Meet any sparsity to the weight in every block, ignored projections included, and learn which weights are kept.

    Args:
        row_group: rows that share what is learned: "row" (each its own), "layer" (all), or a number of rows.
        targets: hidden states of the dense model ("dense"), or outputs of the unpruned block for the same inputs.
        loss: error relative to the norm of each token ("token"), or of each output channel ("channel", as `Besa`).
        scores: learn which weights of a row are kept; False learns how many only, which is cheaper.
        lr: Adam's step size, which falls to 0 as a cosine; three times as much for scores.
        epochs, batch_size: passes over the windows; windows per step, over all ranks.
    """

    row_group: Literal["row", "layer"] | PositiveInt = "row"
    targets: Targets = "dense"
    loss: Literal["token", "channel"] = "token"
    scores: bool = True
    lr: PositiveFloat = 0.01
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1

    name: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern and not self.scores:
            raise ValueError(f"pattern {self.pattern!r} leaves only scores to learn; take scores=True")

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

    @torch.enable_grad()
    def prune_block(self, block: Block) -> PrunedBlock:
        """Minimize the reconstruction error over the calibration windows."""
        if not block.projections:  # all are ignored
            return PrunedBlock()
        learner = ScoreLearner(self, block) if self.scores else BudgetLearner(self, block)
        error_of = token_error if self.loss == "token" else reconstruction_error
        scaler = torch.amp.GradScaler(block.device.type, enabled=block.inputs.dtype == torch.float16)
        sparsity, log = torch.full((), learner.sparsity, device=block.device), []
        size = self.batch_size // n_ranks()
        batches = [range(start, start + size) for start in range(0, len(block.inputs), size)]
        for batch in block.progress(batches * self.epochs, "learn"):
            learner.optimizer.zero_grad()
            for window in batch:
                error = error_of(block.run(window, learner()), block.window(block.targets, window))
                scaler.scale(error / size).backward()
                log.append(torch.stack([error, error, sparsity]).detach())
            learner.step(scaler)
        steps = training_log(block, torch.stack(log), self.batch_size)
        pruned = PrunedBlock(keep_masks=learner.keep_masks(), steps=steps)
        for name, keep_mask in pruned.keep_masks.items():
            pruned.weights[name] = learner.buffers[name].copy_(learner.weights[name]).masked_fill_(~keep_mask, 0)
        return pruned


class BudgetLearner:
    """Trainable sparsities of row groups, which always meet the block's budget; calling it gives masked weights."""

    def __init__(self, method: Exact, block: Block) -> None:
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
        self.optimizer = torch.optim.Adam(self.prepare(block))
        n_steps = method.epochs * block.n_samples // method.batch_size
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, n_steps)

    def prepare(self, block: Block) -> list[dict[str, Any]]:
        """Rank the weights; returns what is learned, with its step size."""
        rates, self.rankings = candidate_rates(BUCKETS).to(block.device), {}
        for name, weight in self.weights.items():
            self.rankings[name] = rank_rows(wanda(weight, block.statistics[name]), rates)
        return [{"params": [self.theta.flat], "lr": self.method.lr}]

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

    def __call__(self) -> dict[str, Tensor]:
        masked = {}
        for name, alpha in self.alpha().items():
            masked[name] = BudgetedWeight.apply(alpha, self.weights[name], self.rankings[name], self.buffers[name])
        return masked

    def keep_masks(self) -> dict[str, KeepMask]:
        """Keep-masks as learned so far."""
        return {name: self.rankings[name].kept_above(n) for name, n in self.counts(self.alpha()).items()}

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Take a step with the gradients of all ranks."""
        for group in self.optimizer.param_groups:
            mean_over_ranks(group["params"][0].grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.schedule.step()


class ScoreLearner(BudgetLearner):
    """Also learns which weights of a row are kept; under a pattern, only which of every M."""

    def prepare(self, block: Block) -> list[dict[str, Any]]:
        tiny, self.log_importance = torch.finfo(torch.float32).tiny, {}
        for name, weight in self.weights.items():
            self.log_importance[name] = wanda(weight, block.statistics[name]).clamp_min(tiny).log()
        shapes = {name: (self.groups[name], weight.shape[1]) for name, weight in self.weights.items()}
        self.scores = Parameters(shapes, 0.0, block.device)
        learned = [{"params": [self.scores.flat], "lr": SCORE_LR * self.method.lr}]
        if not self.method.pattern:
            learned.append({"params": [self.theta.flat], "lr": self.method.lr})
        return learned

    def ranked(self, name: str) -> Matrix:
        """Log importance + score of every weight."""
        scores, log_importance = self.scores.by_name()[name].detach(), self.log_importance[name]
        by_group = log_importance.view(len(scores), -1, scores.shape[1])
        return (by_group + scores[:, None]).view_as(log_importance)

    def __call__(self) -> dict[str, Tensor]:
        masked, scores = {}, self.scores.by_name()
        if self.method.pattern:
            for name, keep in self.keep_masks().items():
                masked[name] = ScoredWeight.apply(
                    scores[name], None, self.weights[name], keep, None, self.buffers[name]
                )
            return masked
        alpha = self.alpha()
        for name, counts in self.counts(alpha).items():
            keep, near = around_threshold(self.ranked(name), counts)
            weight, out = self.weights[name], self.buffers[name]
            masked[name] = ScoredWeight.apply(scores[name], alpha[name], weight, keep, near, out)
        return masked

    def keep_masks(self) -> dict[str, KeepMask]:
        if self.method.pattern:
            return {name: self.method.keep_mask(self.ranked(name), self.sparsity) for name in self.weights}
        counts = self.counts(self.alpha())
        return {name: ranks_of_rows(self.ranked(name), torch.int32) >= n.int()[:, None] for name, n in counts.items()}


def around_threshold(ranked: Matrix, counts: Counts) -> tuple[KeepMask, KeepMask]:
    """Keep-mask without the `counts` lowest of each row, and the weights ranked near that threshold."""
    columns, ordered = ranked.shape[1], sorted_rows(ranked)
    band = max(1, round(BAND / (BUCKETS - 1) * columns))

    def above(counts: Tensor) -> Tensor:
        threshold = ordered.gather(1, counts.clamp(0, columns - 1)[:, None])
        return (ranked >= threshold) & (counts < columns)[:, None]

    return above(counts), above(counts - band) & ~above(counts + band)


class BudgetedWeight(torch.autograd.Function):
    """W' = W * M forward; the gradient of alpha from the weights ranked near the threshold backward."""

    @staticmethod
    def forward(ctx, alpha: Tensor, weight: Tensor, ranking: Ranking, out: Tensor) -> Tensor:
        ctx.alpha, ctx.weight, ctx.ranking = alpha.detach(), weight, ranking
        rows, columns = weight.shape
        counts = (ctx.alpha * columns).round().long().repeat_interleave(rows // len(alpha))
        return masked_rows(weight, ranking.ranks, counts, out).view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = bucket_sums(grad, ctx.weight, ctx.ranking, BUCKETS).view(len(ctx.alpha), -1, BUCKETS).sum(1)
        with deterministic(False):  # CUDA has no deterministic cumsum; one this short has a fixed order
            below = sums.flip(-1).cumsum(-1)  # (groups, buckets): dL/dM of the ranks below 0 %, 1 %, ... of C
        middle = (ctx.alpha * (BUCKETS - 1)).round().long()[:, None]
        low, high = (middle - BAND).clamp_min(0), (middle + BAND).clamp_max(BUCKETS - 1)
        width = (high - low) / (BUCKETS - 1)  # as a fraction of C
        return -((below.gather(1, high) - below.gather(1, low)) / width)[:, 0], None, None, None


class ScoredWeight(torch.autograd.Function):
    """W' = W * M forward; straight through to the scores, and to alpha where `near` is given, backward."""

    @staticmethod
    def forward(ctx, scores, alpha, weight: Tensor, keep: Tensor, near: Tensor | None, out: Tensor) -> Tensor:
        ctx.weight, ctx.near, ctx.n_groups = weight, near, len(scores)
        return torch.mul(weight, keep, out=out).view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gain, columns = grad.float() * ctx.weight, grad.shape[1]  # dL/dM
        to_alpha = None
        if ctx.near is not None:
            by_row = (gain * ctx.near).sum(1) / ctx.near.sum(1).clamp_min(1)
            to_alpha = -columns * by_row.view(ctx.n_groups, -1).sum(1)
        return gain.view(ctx.n_groups, -1, columns).sum(1), to_alpha, None, None, None, None


def n_weights(linears: dict[str, torch.nn.Linear]) -> int:
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
