"""`Exact` that learns the sparsities of rows alone."""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from besa.besa import candidate_rates, rank_rows
from besa.beyond.exact import LR, BudgetLearner, Exact
from besa.config import config
from besa.importance import wanda
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.losses import reconstruction_error
from besa.system import deterministic
from besa.walk import Block, Match


@config
class ExactCounts(Exact):
    """`Exact` without scores: learns how many weights of a row are kept, by Wanda's importance, not which.

    Args:
        row_group: rows that share a sparsity: "row", "layer", or a number of rows.
        match: outputs to reproduce, as in `Besa`.
        loss: error relative to the norm of each token, or of each channel as in `Besa`.
        lr: Adam's step size for the sparsities.
    """

    row_group: Literal["row", "layer"] | PositiveInt = "row"
    match: Match = "model"
    loss: Literal["token", "channel"] = "token"
    lr: PositiveFloat = LR

    name: ClassVar[str] = "exact-counts"

    def learner(self, block: Block, n_steps: int) -> "CountLearner":
        return CountLearner(self, block, n_steps)

    def error(self, output: Tensor, target: Tensor) -> Tensor:
        return super().error(output, target) if self.loss == "token" else reconstruction_error(output, target)


BUCKETS = 101  # rates that divide the ranks of a row into buckets of 1 %
BAND = 5  # buckets on either side of a row's threshold whose weights give the gradient of its sparsity


class CountLearner(BudgetLearner):
    """Trains the sparsities of row groups alone."""

    def __init__(self, method: ExactCounts, block: Block, n_steps: int) -> None:
        super().__init__(method.sparsity_of(block), block, method.row_group)
        rates, self.rankings = candidate_rates(BUCKETS).to(block.device), {}
        for name, weight in self.weights.items():
            self.rankings[name] = rank_rows(wanda(weight, block.statistics[name]), rates)
        self.optimizer = torch.optim.Adam([self.theta.flat], lr=method.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, n_steps)

    def __call__(self) -> dict[str, Tensor]:
        return {
            name: BudgetedWeight.apply(alpha, self.weights[name], self.rankings[name], self.buffers[name])
            for name, alpha in self.alpha().items()
        }

    def keep_masks(self) -> dict[str, Tensor]:
        return {name: self.rankings[name].kept_above(n) for name, n in self.counts(self.alpha()).items()}


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
