"""Learned scores: which weights of a row, or of every M consecutive ones, are kept.

    kept are those with the largest  log importance + score
    dL/dscore = sum of dL/dM_ij, straight through, over the rows of a group, which share the scores of their columns

How many of a row are kept is a pattern's N:M, or learned beside the scores, under the budget of `besa/budget.py`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from besa.budget import BAND, BUCKETS
from besa.masks import places, ranks_of_rows, sorted_rows

SCORE_LR = 3.0
"""How much faster scores, in units of log importance, learn than sparsities."""


def stepped_counts(
    wanted: Float[Tensor, "rows"], steps: Int64[Tensor, "rows"], m: int, total: int
) -> Int64[Tensor, "rows"]:
    """Whole numbers near `wanted` that add up to `total`, all but one of them multiples of their row's step.

    Largest remainders go up first; the one meets the total.

    Args:
        steps: weights that a row gives up for one step of its N: columns / m.
        total: the sum of `wanted`, but for rounding; at most that of m * steps.
    """
    counts = (wanted.double() / steps).floor().long().clamp(0, m) * steps
    rest = torch.where(counts < m * steps, (wanted.double() - counts) / steps, -torch.inf)
    order = rest.sort(descending=True, stable=True).indices
    missing, filled = total - int(counts.sum()), steps[order].cumsum(0)
    n = min(int((filled <= missing).sum()), int(rest.isfinite().sum()))
    counts[order[:n]] += steps[order[:n]]
    left = total - int(counts.sum())
    if left < 0:  # rounding in float32 gave away too much
        counts[counts.argmax()] += left
    elif left:
        room = ((m * steps - counts)[order] >= left).nonzero().flatten()
        below = room[room >= n]
        counts[order[below[0] if len(below) else room[0]]] += left
    return counts


class _ScoredWeight(torch.autograd.Function):
    """W' = W * M forward; backward straight through to the scores, and to the sparsities where they are learned.

    dL/dalpha = -C * mean of dL/dM_ij over the weights of a row that are next to go or to come back, dL/dM_ij being
    dL/dW'_ij W_ij.
    """

    @staticmethod
    def forward(ctx, scores, alpha, weight, scored, pruned):
        ctx.keep, ctx.near = scored.chosen(scored.ranked(scores.detach()), pruned)
        ctx.weight, ctx.groups = weight.detach(), len(scores)
        return torch.mul(ctx.weight, ctx.keep, out=scored.out).view_as(scored.out)

    @staticmethod
    def backward(ctx, grad):
        gain, columns = grad.float() * ctx.weight, grad.shape[1]  # dL/dM
        to_alpha = to_weight = None
        if ctx.needs_input_grad[1]:
            of_row = (gain * ctx.near).sum(1) / ctx.near.sum(1).clamp_min(1)
            to_alpha = -columns * of_row.view(ctx.groups, -1).sum(1)
        if ctx.needs_input_grad[2]:
            to_weight = grad * ctx.keep
        return gain.view(ctx.groups, -1, columns).sum(1), to_alpha, to_weight, None, None


@dataclass(frozen=True)
class Scored:
    """One projection that learns which of its weights are kept."""

    weight: Float[Tensor, "rows columns"]
    log_importance: Float32[Tensor, "rows columns"]
    m: int | None
    """Consecutive weights that a pattern chooses among; None: all of a row."""
    out: Float[Tensor, "rows columns"]
    """Holds the masked weight between forward and backward, so that no step allocates one."""

    @classmethod
    def create(cls, weight: Tensor, importance: Tensor, m: int | None) -> "Scored":
        log_importance = importance.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return cls(weight, log_importance, m, torch.empty_like(weight))

    @property
    def step(self) -> int:
        """Weights of a row that go at once: one, or under a pattern one of each M."""
        return self.weight.shape[1] // self.m if self.m else 1

    def ranked(self, scores: Float32[Tensor, "groups columns"]) -> Float32[Tensor, "rows columns"]:
        """What weights are ranked by."""
        by_group = self.log_importance.view(len(scores), -1, scores.shape[1])
        return (by_group + scores[:, None]).view_as(self.log_importance)

    def __call__(
        self,
        scores: Float32[Tensor, "groups columns"],
        counts: Int64[Tensor, "rows"],
        alpha: Float32[Tensor, "groups"] | None = None,
        weight: Float[Tensor, "rows columns"] | None = None,
    ) -> Float[Tensor, "rows columns"]:
        """The masked weight W * M, differentiable in the scores.

        Args:
            counts: weights of each row that go, down to a multiple of `step`.
            alpha: sparsities, where they are learned: differentiable too.
            weight: masked instead of W and differentiable too: W quantized.
        """
        weight = self.weight if weight is None else weight
        return _ScoredWeight.apply(scores, alpha, weight, self, counts // self.step)

    def chosen(
        self, ranked: Float32[Tensor, "rows columns"], pruned: Int64[Tensor, "rows"]
    ) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
        """M while it is learned, and which weights are next to go or to come back.

        Args:
            pruned: how many of each row, or of each M of the row, go.
        """
        if self.m:
            place, pruned = places(ranked, self.m), pruned.to(torch.uint8)[:, None]
            return place >= pruned, (place == pruned) | (place + 1 == pruned)
        columns = ranked.shape[1]
        lowest, band = sorted_rows(ranked), max(1, round(BAND / (BUCKETS - 1) * columns))
        above = lambda count: ranked >= lowest.gather(1, count.clamp(0, columns - 1)[:, None])
        keep = above(pruned) & (pruned < columns)[:, None]
        return keep, above(pruned - band) & ~(above(pruned + band) & (pruned + band < columns)[:, None])

    def keep_mask(
        self, scores: Float32[Tensor, "groups columns"], counts: Int64[Tensor, "rows"]
    ) -> Bool[Tensor, "rows columns"]:
        """M: False for `counts` weights of each row: past the last whole step, the lowest-ranked of the next."""
        ranked, pruned = self.ranked(scores), counts // self.step
        if self.m is None:
            return ranks_of_rows(ranked, torch.int32) >= counts.to(torch.int32)[:, None]
        place = places(ranked, self.m)
        keep_mask = place >= pruned.to(torch.uint8)[:, None]
        for row in (counts % self.step).nonzero().flatten().tolist():
            following = (place[row] == pruned[row]).nonzero().flatten()
            lowest = ranked[row, following].argsort(stable=True)[: int(counts[row]) % self.step]
            keep_mask[row, following[lowest]] = False
        return keep_mask
