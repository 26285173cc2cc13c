"""N:M patterns: N of every M consecutive weights of a row are kept, and BESA learns which, by a score for each.

    kept are the N of each M with the largest  log importance + score
    dL/dscore = sum of dL/dM_ij, straight through, over the rows of a group, which share the scores of their columns

Where N is open ("N:8"), a row's sparsity alpha = 1 - N/M is learned beside them, under the budget of `besa/budget.py`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from besa.masks import places

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
    n = int((filled <= missing).sum())
    counts[order[:n]] += steps[order[:n]]
    left = total - int(counts.sum())
    if left:  # below 0 where rounding in float32 gave away too much
        counts[order[n] if left > 0 else counts.argmax()] += left
    return counts


class _PatternedWeight(torch.autograd.Function):
    """W' = W * M forward; backward straight through to the scores, and to the sparsities where they are learned.

    dL/dalpha = -C * mean of dL/dM_ij over the weights of a row that are next to go or to come back, dL/dM_ij being
    dL/dW'_ij W_ij.
    """

    @staticmethod
    def forward(ctx, scores, alpha, weight, patterned, pruned):
        ctx.place, ctx.pruned = places(patterned.ranked(scores.detach()), patterned.m), pruned.to(torch.uint8)[:, None]
        ctx.weight, ctx.groups = weight.detach(), len(scores)
        return torch.mul(ctx.weight, ctx.place >= ctx.pruned, out=patterned.out).view_as(patterned.out)

    @staticmethod
    def backward(ctx, grad):
        gain, columns = grad.float() * ctx.weight, grad.shape[1]  # dL/dM
        to_alpha = to_weight = None
        if ctx.needs_input_grad[1]:
            near = (ctx.place == ctx.pruned) | (ctx.place + 1 == ctx.pruned)
            to_alpha = -columns * ((gain * near).sum(1) / near.sum(1)).view(ctx.groups, -1).sum(1)
        if ctx.needs_input_grad[2]:
            to_weight = grad * (ctx.place >= ctx.pruned)
        return gain.view(ctx.groups, -1, columns).sum(1), to_alpha, to_weight, None, None


@dataclass(frozen=True)
class Patterned:
    """One projection that learns which of its weights an N:M pattern keeps."""

    weight: Float[Tensor, "rows columns"]
    log_importance: Float32[Tensor, "rows columns"]
    m: int
    out: Float[Tensor, "rows columns"]
    """Holds the masked weight between forward and backward, so that no step allocates one."""

    @classmethod
    def create(cls, weight: Tensor, importance: Tensor, m: int) -> "Patterned":
        log_importance = importance.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return cls(weight, log_importance, m, torch.empty_like(weight))

    @property
    def step(self) -> int:
        """Weights of a row that one step of its N takes: one of each group."""
        return self.weight.shape[1] // self.m

    def ranked(self, scores: Float32[Tensor, "groups columns"]) -> Float32[Tensor, "rows columns"]:
        """What the weights of a group of M are ranked by."""
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
        return _PatternedWeight.apply(scores, alpha, weight, self, counts // self.step)

    def keep_mask(
        self, scores: Float32[Tensor, "groups columns"], counts: Int64[Tensor, "rows"]
    ) -> Bool[Tensor, "rows columns"]:
        """M: False for as many of each row; past the last whole step, those of the next that rank lowest."""
        ranked, pruned = self.ranked(scores), counts // self.step
        place = places(ranked, self.m)
        keep_mask = place >= pruned.to(torch.uint8)[:, None]
        for row in (counts % self.step).nonzero().flatten().tolist():
            following = (place[row] == pruned[row]).nonzero().flatten()
            lowest = ranked[row, following].argsort()[: int(counts[row]) % self.step]
            keep_mask[row, following[lowest]] = False
        return keep_mask
