"""The heart: logits -> beta -> sparsity -> keep-mask, and its gradient (paper Eqn. 3-6).

A row group of a projection has logits theta over D + 1 candidate rates p_0 = 1, ..., p_D = 0. With
beta = softmax(sigmoid(theta)):

    sparsity             alpha = sum_d beta_d p_d                                   (Eqn. 3)
    pruning probability  P(r)  = sum of the beta_d with floor(C p_d) > r            (Eqn. 4)
    keep-mask            M_ij  = 0 where the rank r of W_ij in its row is below floor(alpha C), else 1   (Eqn. 5)
    gradient             dM_ij := d(1 - P(r_ij)), straight through                  (Eqn. 6)

Eqn. 5 stands here as the released code computes it. The mask passes its gradient on to beta, not through its threshold
floor(alpha C); the penalty on the sparsity reaches beta through alpha (Eqn. 3). So both move alpha.

Rank 0 is the least important of the C weights of a row. P is a step function of the rank with at most D steps, so it is
never stored: an element's bucket is the last candidate that prunes it (rates fall, so all before it do too), and the
gradient of beta_d is minus the sum over the buckets d, d+1, ... of (dL/dW'_ij W_ij).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.machine.device import deterministic
from besa.masks import ranks_of_rows, slices


def candidate_rates(n: int) -> Float32[Tensor, "n"]:
    """`n` rates p_d = 1, ..., 0, equally far apart, rounded as the released code's `arange(1, -0.01, -0.01)`.

    The rounding moves some floor(C p_d) by one.
    """
    step = 1 / (n - 1)
    rates = torch.arange(1.0, -step, -step)[:n]
    rates[-1] = 0.0
    return rates


def candidate_counts(rates: Float32[Tensor, "n"], columns: int) -> Int64[Tensor, "n"]:
    """floor(C p_d): how many of a row's `columns` weights each candidate prunes."""
    return (rates.double() * columns).floor().long()


def simplex(logits: Float32[Tensor, "... n"], smooth: bool) -> Float32[Tensor, "... n"]:
    """beta = softmax(sigmoid(logits)), or softmax(logits) without smoothing; sums to 1.

    The paper writes the plain softmax; the released recipe smooths it, which confines the sparsity.
    """
    return (logits.sigmoid() if smooth else logits).softmax(-1)


def reachable_sparsity(n: int, smooth: bool) -> tuple[float, float]:
    """Lowest and highest sparsity that `n` candidates can express: (0.376, 0.624) for 101 with smoothing."""
    if not smooth:
        return 0.0, 1.0
    # The extremes put sigmoid = 1 on the k highest rates and 0 on the others, for the best k.
    rates = candidate_rates(n).double()
    k = torch.arange(1, n)
    e = torch.e
    highest = float(((e - 1) * rates.cumsum(0)[:-1] + rates.sum()).div((e - 1) * k + n).max())
    return 1 - highest, highest


def rank_rows(importance: Float[Tensor, "rows columns"], counts: Int64[Tensor, "n"]) -> Ranking:
    """Rank every row by importance (stable) and look up the candidate buckets of the ranks."""
    columns = importance.shape[1]
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    bucket_of_rank = (counts[None, :] > torch.arange(columns, device=counts.device)[:, None]).sum(1).sub_(1)
    table = bucket_of_rank.to(importance.device, torch.uint8)
    ranks = ranks_of_rows(importance, dtype)
    buckets = torch.cat([table[part.int()] for part in slices(ranks)])
    return Ranking(ranks, buckets, table)


def prune_counts(alpha: Float32[Tensor, "groups"], columns: int, rows: int) -> Int64[Tensor, "rows"]:
    """floor(alpha C) for every row."""
    return (alpha.detach() * columns).long().repeat_interleave(rows // len(alpha))


def prune_probability(
    beta: Float32[Tensor, "groups n"], counts: Int64[Tensor, "n"], columns: int
) -> Float32[Tensor, "groups columns"]:
    """P(r) of Eqn. 4 by rank. For looking at: training never builds it."""
    prunes = counts[:, None] > torch.arange(columns, device=counts.device)  # (n, columns)
    return beta @ prunes.float()


class _MaskedWeight(torch.autograd.Function):
    """W' = W * M forward (Eqn. 5); straight through to beta backward (Eqn. 6), summed into candidate buckets.

    A weight that is itself learned (quantized with learned clipping) gets the masked gradient.
    """

    @staticmethod
    def forward(ctx, beta, alpha, weight, ranking, out):
        rows, columns = weight.shape
        ctx.weight, ctx.ranking, ctx.shape = weight.detach(), ranking, beta.shape
        ctx.pruned = prune_counts(alpha, columns, rows)
        return masked_rows(weight, ranking.ranks, ctx.pruned, out).view_as(out)

    @staticmethod
    def backward(ctx, grad):
        groups, n = ctx.shape
        sums = bucket_sums(grad, ctx.weight, ctx.ranking, n)  # (rows, n)
        sums = sums.view(groups, -1, n).sum(1)  # (groups, n)
        with deterministic(False):  # torch admits no cumulative sum on a GPU; one this short has one order
            to_beta = -sums.flip(-1).cumsum(-1).flip(-1)
        to_weight = None
        if ctx.needs_input_grad[2]:
            to_weight = masked_rows(grad, ctx.ranking.ranks, ctx.pruned, torch.empty_like(grad))
        return to_beta, None, to_weight, None, None


@dataclass(frozen=True)
class Allocation:
    """One projection that learns how much of each of its row groups is pruned."""

    weight: Float[Tensor, "rows columns"]
    ranking: Ranking
    rates: Float32[Tensor, "n"]
    smooth: bool
    out: Float[Tensor, "rows columns"]
    """Holds the masked weight between forward and backward, so that no step allocates one."""

    @classmethod
    def create(cls, weight: Tensor, importance: Tensor, rates: Tensor, smooth: bool) -> "Allocation":
        ranking = rank_rows(importance, candidate_counts(rates, weight.shape[1]))
        return cls(weight, ranking, rates, smooth, torch.empty_like(weight))

    def __call__(
        self, logits: Float32[Tensor, "groups n"], weight: Float[Tensor, "rows columns"] | None = None
    ) -> tuple[Float[Tensor, "rows columns"], Float32[Tensor, "groups"]]:
        """The masked weight W * M and the sparsity alpha of each row group, both differentiable in the logits.

        Args:
            weight: masked instead of W and differentiable too: W quantized.
        """
        beta = simplex(logits, self.smooth)
        alpha = beta @ self.rates
        weight = self.weight if weight is None else weight
        return _MaskedWeight.apply(beta, alpha, weight, self.ranking, self.out), alpha

    def keep_mask(self, logits: Float32[Tensor, "groups n"]) -> Bool[Tensor, "rows columns"]:
        """M: True where the weight is kept, (rows, columns)."""
        alpha = simplex(logits, self.smooth) @ self.rates
        rows, columns = self.weight.shape
        return self.ranking.kept_above(prune_counts(alpha, columns, rows))
