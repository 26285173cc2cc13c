"""BESA (Xu et al., ICLR 2024): every row of every projection learns its own sparsity, one block at a time.

A row group has logits theta over candidate rates p_0 = 1, ..., p_D = 0. beta = softmax(sigmoid(theta) + c p), where c
is such that theta = 0 gives the target (0 at 50 %):

    sparsity   alpha = sum_d beta_d p_d                                              (Eqn. 3)
    P(r)       sum of the beta_d with floor(C p_d) > r, for the weight of rank r     (Eqn. 4)
    mask       M = 0 for the floor(alpha C) least important of a row's C weights     (Eqn. 5)
    gradient   dM := -dP, straight through                                           (Eqn. 6)
    loss       reconstruction error + penalty ((sparsity - target) / target)^2       (Eqn. 1, 2)

W' = W * M. Rank 0 is the least important weight of a row. P is a step function of the rank, so an index per weight
replaces it: its bucket, the last candidate that prunes it. dL/dbeta_d is minus the sum of dL/dW'_ij W_ij over the
buckets d, d + 1, ..., plus p_d times the penalty's dL/dalpha.
"""

import warnings
from typing import Annotated, Any, ClassVar, Literal

import prodigyopt
import torch
from annotated_types import Ge, Le
from jaxtyping import Float32, Int64
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from besa.config import config
from besa.importance import Importance, importance
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.loop import Method
from besa.losses import reconstruction_error
from besa.masks import ranks_of_rows, row_slices
from besa.quantize import CLIPPING_LR, CLIPPING_START, Quantize
from besa.shapes import Matrix, Scalar
from besa.system import deterministic
from besa.training import Parameters, train
from besa.walk import Block, Match, PrunedBlock

Logits = Float32[Tensor, "groups n"]


@config
class Besa(Method):
    """The published row-wise recipe; `Besa.layer_wise()` is the layer-wise one.

    Args:
        row_group: rows that share one learned sparsity: "row" (each its own), "layer" (all), or a number of rows.
        match: outputs to reproduce: the unpruned block's for the same inputs ("block", as the released code does
            row-wise), or the dense model's hidden states ("model", Algorithm 1 as written).
        importance: ranks the weights of a row: "wanda", "magnitude", or "sparsegpt" (W^2 / U_jj, as released).
        smooth: beta = softmax(sigmoid(theta) + c p): as released at 50 %, where c = 0; ours at other targets. False is
            the paper's softmax(theta), in which some rows lose all their weights.
        candidates: number of candidate rates.
        penalty: weight of the sparsity term (lambda of Eqn. 2).
        d_coef: Prodigy's step size factor. Published: 5 up to 13B, 10 for 30B, 50 for 65B, 70B; layer-wise 0.05 to 50.
        epochs, batch_size: passes over the windows; windows per step, over all ranks. Prodigy needs at least 32 steps.
        quantize: quantize the weights, too, with learned clipping (Eqn. 7).
    """

    row_group: Literal["row", "layer"] | PositiveInt = "row"
    match: Match = "block"
    importance: Importance = "wanda"
    smooth: bool = True
    candidates: Annotated[int, Ge(2), Le(256)] = 101
    penalty: PositiveFloat = 5.0
    d_coef: PositiveFloat = 5.0
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1
    quantize: Quantize | None = None

    name: ClassVar[str] = "besa"

    def __post_init__(self) -> None:
        if 0 in (self.sparsities or (self.sparsity,)):
            raise ValueError("the sparsity must be above 0: the penalty is relative to it")

    @classmethod
    def layer_wise(cls, **fields: Any) -> "Besa":
        """The published layer-wise recipe: one sparsity per projection. `d_coef` differs by model: 50 for LLaMA-7B."""
        return cls(**{"row_group": "layer", "match": "model", "d_coef": 0.5} | fields)

    def check(self, model: PreTrainedModel, n_samples: int) -> None:
        super().check(model, n_samples)
        if (n_steps := n_samples * self.epochs // self.batch_size) < 32:
            warnings.warn(f"BESA hardly learns in {n_steps} steps; give at least 32 windows or epochs", stacklevel=4)

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "sparsegpt"

    def prune_block(self, block: Block) -> PrunedBlock:
        """Minimize Eqn. 2 over the calibration windows."""
        if not block.projections:  # all are ignored
            return PrunedBlock()
        learner = Learner(self, block)
        target_sparsity = self.sparsity_of(block)

        def loss_of(window: int) -> tuple[Scalar, Scalar, Scalar]:
            masked, sparsity = learner()
            error = reconstruction_error(block.run(window, masked), block.window(block.targets, window))  # Eqn. 1
            loss = error + self.penalty * ((sparsity - target_sparsity) / target_sparsity) ** 2  # Eqn. 2
            return loss, error, sparsity

        steps = train(block, block.batches(self.batch_size, self.epochs), learner.optimizers, loss_of)
        return learner.result(steps)


class Learner:
    """The trainable parameters of one block: calling it gives masked weights and the block's expected sparsity."""

    def __init__(self, method: Besa, block: Block) -> None:
        self.method = method
        self.weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        self.rates = candidate_rates(method.candidates).to(block.device)
        self.offset = offset(self.rates, method.sparsity_of(block))
        self.rankings = {}
        for name, weight in self.weights.items():
            ranked = self.method.quantize.codes(weight).dequantize(weight.dtype) if self.method.quantize else weight
            self.rankings[name] = rank_rows(importance(method.importance, ranked, block.statistics[name]), self.rates)
        self.buffers = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
        shapes = {
            name: (n_groups(weight, method.row_group), method.candidates) for name, weight in self.weights.items()
        }
        self.theta = Parameters(shapes, 0.0, block.device)
        prodigy = prodigyopt.Prodigy([self.theta.flat], lr=1.0, d_coef=method.d_coef, weight_decay=0)
        self.optimizers: list[torch.optim.Optimizer] = [prodigy]
        if self.method.quantize:
            shapes = {name: self.method.quantize.clipping_shape(weight) for name, weight in self.weights.items()}
            self.clipping = Parameters(shapes, CLIPPING_START, block.device)
            self.optimizers.append(torch.optim.Adam([self.clipping.flat], lr=CLIPPING_LR))

    def __call__(self) -> tuple[dict[str, Tensor], Scalar]:
        """Masked weights and the block's sparsity, weighted by the sizes of the projections."""
        theta = self.theta.by_name()
        masked = {}
        zeros: Any = 0.0
        for name, weight in self.weights.items():
            beta = simplex(theta[name], self.method.smooth, self.offset)
            alpha = beta @ self.rates  # Eqn. 3
            value = self.method.quantize.fake(weight, self.clipping.by_name()[name]) if self.method.quantize else weight
            masked[name] = MaskedWeight.apply(beta, alpha, value, self.rankings[name], self.buffers[name])
            zeros = zeros + alpha.mean() * weight.numel()
        return masked, zeros / sum(weight.numel() for weight in self.weights.values())

    @torch.no_grad()
    def result(self, steps: list[dict[str, float]]) -> PrunedBlock:
        """The pruned weights and keep-masks as learned so far, with the training log."""
        pruned = PrunedBlock(steps=steps)
        theta = self.theta.by_name()
        for name, weight in self.weights.items():
            alpha = simplex(theta[name], self.method.smooth, self.offset) @ self.rates
            keep_mask = self.rankings[name].kept_above(n_pruned(alpha, weight))
            pruned.keep_masks[name] = keep_mask
            if self.method.quantize:
                weight = self.method.quantize.codes(weight, self.clipping.by_name()[name]).dequantize(weight.dtype)
            pruned.weights[name] = self.buffers[name].copy_(weight).masked_fill_(~keep_mask, 0)
        return pruned


class MaskedWeight(torch.autograd.Function):
    """W' = W * M forward (Eqn. 5); straight through to beta backward (Eqn. 6)."""

    @staticmethod
    def forward(ctx, beta, alpha, weight, ranking, out):
        ctx.weight = weight.detach()
        ctx.ranking = ranking
        ctx.shape = beta.shape
        ctx.n_pruned = n_pruned(alpha, weight)
        return masked_rows(weight, ranking.ranks, ctx.n_pruned, out).view_as(out)

    @staticmethod
    def backward(ctx, grad):
        groups, n = ctx.shape
        sums = bucket_sums(grad, ctx.weight, ctx.ranking, n).view(groups, -1, n).sum(1)
        with deterministic(False):  # torch refuses CUDA's cumsum; one this short has a fixed order
            to_beta = -sums.flip(-1).cumsum(-1).flip(-1)
            to_weight = None
        if ctx.needs_input_grad[2]:  # a quantized weight, whose clipping is learned
            to_weight = masked_rows(grad, ctx.ranking.ranks, ctx.n_pruned, torch.empty_like(grad))
        return to_beta, None, to_weight, None, None


def candidate_rates(n: int) -> Float32[Tensor, "n"]:
    """p_d = 1, ..., 0, with the rounding of the released `arange(1, -0.01, -0.01)`, which moves some floor(C p_d)."""
    rates = torch.arange(1.0, -1 / (n - 1), -1 / (n - 1))[:n]
    rates[-1] = 0.0
    return rates


def offset(rates: Float32[Tensor, "n"], sparsity: float) -> Float32[Tensor, "n"]:
    """c p_d, with c such that softmax(c p) has mean `sparsity`."""
    low = -1e4
    high = 1e4
    centered = torch.linspace(1, -1, len(rates), dtype=torch.float64)
    while high - low > 1e-9:
        c = (low + high) / 2
        too_high = float((c / 2 * centered).softmax(0) @ centered) > 2 * sparsity - 1
        low, high = (low, c) if too_high else (c, high)
    return rates * round((low + high) / 2, 8)


def simplex(theta: Logits, smooth: bool, offset: Float32[Tensor, "n"] | float = 0.0) -> Logits:
    """beta: non-negative, sums to 1. The offset belongs to the smoothed one."""
    return (theta.sigmoid() + offset if smooth else theta).softmax(-1)


def n_pruned(alpha: Float32[Tensor, "groups"], weight: Matrix) -> Int64[Tensor, "rows"]:
    """floor(alpha C) of each row."""
    return (alpha.detach() * weight.shape[1]).long().repeat_interleave(len(weight) // len(alpha))


def n_groups(weight: Matrix, row_group: str | int) -> int:
    size = {"row": 1, "layer": len(weight)}.get(str(row_group)) or int(row_group)
    if len(weight) % size:
        raise ValueError(f"row_group {row_group} does not divide the {len(weight)} rows of a projection")
    return len(weight) // size


def candidate_counts(rates: Float32[Tensor, "n"], columns: int) -> Int64[Tensor, "n"]:
    """floor(C p_d), the number of weights of a row that each candidate prunes."""
    return (rates.double() * columns).floor().long()


def rank_rows(scores: Matrix, rates: Float32[Tensor, "n"]) -> Ranking:
    """Rank each row by importance (stable), and map each rank to its bucket."""
    columns = scores.shape[1]
    counts = candidate_counts(rates, columns)
    bucket_of_rank = (counts[None, :] > torch.arange(columns, device=counts.device)[:, None]).sum(1).sub_(1).byte()
    ranks = ranks_of_rows(scores, torch.int16 if columns < 2**15 else torch.int32)
    if scores.device.type != "cpu":
        return Ranking(ranks, None, bucket_of_rank)
    return Ranking(ranks, torch.cat([bucket_of_rank[part.int()] for part in row_slices(ranks)]), bucket_of_rank)
