"""Exact budgets: one unbounded number theta per row group, whose sparsities always meet the block's budget.

    alpha = clip(theta - tau, 0, 1), with tau such that the mean of alpha over all weights is the target

Unlike in `besa/allocation.py`, the paper's way, nothing is approached by a penalty and nothing confines alpha. The loss
tells a row's sparsity what the weights next to its threshold are worth; what is pruned in the end are whole numbers, by
largest remainders.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from besa.allocation import candidate_counts, candidate_rates, rank_rows
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.machine.device import deterministic

BUCKETS = 101
"""Rates that divide a row's ranks into buckets of 1 %."""
BAND = 5
"""Buckets on either side of a row's threshold whose weights say what its sparsity is worth."""


def meet_budget(
    theta: Float32[Tensor, "groups"], sizes: Float32[Tensor, "groups"], sparsity: float
) -> Float32[Tensor, "groups"]:
    """Sparsities alpha = clip(theta - tau, 0, 1) whose mean, weighted by sizes, is `sparsity`; differentiable in theta.

    Args:
        sizes: weights of each row group.
    """
    low, high = theta.detach().min() - 1, theta.detach().max()
    for _ in range(32):  # tau by bisection, to what float32 tells apart: the weighted sum falls with it
        tau = (low + high) / 2
        too_much = (sizes * (theta.detach() - tau).clamp(0, 1)).sum() > sparsity * sizes.sum()
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    free = ((theta - tau > 0) & (theta - tau < 1)).detach()
    full = (theta - tau >= 1).detach()
    share = torch.where(free, sizes, 0.0)
    # What the rows that are neither empty nor full must make up.
    left = sparsity * sizes.sum() - torch.where(full, sizes, 0.0).sum()
    tau = ((share * theta).sum() - left) / share.sum().clamp_min(1e-30)
    return torch.where(free, theta - tau, full.to(theta.dtype))


def whole_counts(wanted: Float[Tensor, "rows"], limits: Int64[Tensor, "rows"], total: int) -> Int64[Tensor, "rows"]:
    """Whole numbers near `wanted`, none above its limit, that add up to `total`: largest remainders go up first.

    Raises:
        ValueError: the limits do not allow the total.
    """
    if not 0 <= total <= int(limits.sum()):
        raise ValueError(f"{total} weights cannot be pruned of {int(limits.sum())}")
    counts = wanted.double().floor().long().clamp(min=0).minimum(limits)
    while (missing := total - int(counts.sum())) != 0:
        able = counts < limits if missing > 0 else counts > 0
        rest = torch.where(able, (wanted.double() - counts) * (1 if missing > 0 else -1), -torch.inf)
        chosen = rest.sort(descending=True, stable=True).indices[: min(abs(missing), int(able.sum()))]
        counts[chosen] += 1 if missing > 0 else -1
    return counts


class _BudgetedWeight(torch.autograd.Function):
    """W' = W * M forward; backward, what a row's loss would gain or lose by the weights next to its threshold.

    dL/dalpha = -C * mean of dL/dM_ij over the ranks within BAND buckets on either side of alpha C (to the nearest
    bucket), summed over the rows of a group, dL/dM_ij being dL/dW'_ij W_ij: these are the next to go or to come back.
    """

    @staticmethod
    def forward(ctx, alpha, weight, ranking, out):
        ctx.alpha, ctx.weight, ctx.ranking = alpha.detach(), weight.detach(), ranking
        rows, columns = weight.shape
        # The rank that each row's kept weights start at.
        ctx.pruned = (ctx.alpha * columns).round().long().repeat_interleave(rows // len(alpha))
        return masked_rows(weight, ranking.ranks, ctx.pruned, out).view_as(out)

    @staticmethod
    def backward(ctx, grad):
        groups = len(ctx.alpha)
        sums = bucket_sums(grad, ctx.weight, ctx.ranking, BUCKETS).view(groups, -1, BUCKETS).sum(1)
        with deterministic(False):  # torch admits no cumulative sum on a GPU; one this short has one order
            below = sums.flip(-1).cumsum(-1)  # (groups, buckets): dL/dM of the ranks below 0 %, 1 %, ... of C
        middle = (ctx.alpha * (BUCKETS - 1)).round().long()[:, None]
        low, high = (middle - BAND).clamp_min(0), (middle + BAND).clamp_max(BUCKETS - 1)
        width = (high - low) / (BUCKETS - 1)  # of the band, as a fraction of C
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = masked_rows(grad, ctx.ranking.ranks, ctx.pruned, torch.empty_like(grad))
        return -((below.gather(1, high) - below.gather(1, low)) / width)[:, 0], to_weight, None, None


@dataclass(frozen=True)
class Budgeted:
    """One projection whose rows' sparsities are given by a budget that they share."""

    weight: Float[Tensor, "rows columns"]
    ranking: Ranking
    out: Float[Tensor, "rows columns"]
    """Holds the masked weight between forward and backward, so that no step allocates one."""

    @classmethod
    def create(cls, weight: Tensor, importance: Tensor) -> "Budgeted":
        counts = candidate_counts(candidate_rates(BUCKETS), weight.shape[1])
        return cls(weight, rank_rows(importance, counts), torch.empty_like(weight))

    def __call__(
        self, alpha: Float32[Tensor, "groups"], weight: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """The masked weight W * M, differentiable in the sparsities.

        Args:
            weight: masked instead of W and differentiable too: W quantized.
        """
        return _BudgetedWeight.apply(alpha, self.weight if weight is None else weight, self.ranking, self.out)

    def keep_mask(self, counts: Int64[Tensor, "rows"]) -> Bool[Tensor, "rows columns"]:
        """M: False for the `counts` least important weights of each row."""
        return self.ranking.kept_above(counts)
