"""Variants of public methods: BESA by another unit, Wanda with learned clipping, `Exact` without scores."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

import besa
from besa.besa import Learner, Parameters, candidate_rates, rank_rows
from besa.beyond.exact import LR, BudgetLearner, Exact
from besa.config import config
from besa.decoder import BlockCall, find_blocks, projections
from besa.importance import wanda
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.losses import reconstruction_error
from besa.quantize import CLIPPING_LR, CLIPPING_START
from besa.system import deterministic
from besa.walk import Block, Match, PrunedBlock


@config
class BesaByPart(besa.Besa):
    """BESA that reconstructs the output of each projection, or of attention and MLP, one after the other.

    Args:
        unit: "projection" or "sublayer".
    """

    unit: Literal["projection", "sublayer"]

    name: ClassVar[str] = "besa-by-part"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        parts = dict.fromkeys(name.partition(".")[0] for name in block.projections)
        names = [name for name, _ in block.module.named_children() if name in parts]
        for name in list(block.projections) if self.unit == "projection" else names:
            part = part_of(block, name, pruned.weights)
            learner = Learner(self, part)
            learned = learner.result(self.learn(learner, part))
            pruned.weights |= learned.weights
            pruned.keep_masks |= learned.keep_masks
            pruned.steps += learned.steps
        return pruned


def besa_with(name: str, value: Any, **fields: Any) -> besa.Besa:
    """BESA with another value of a field, or with a unit of reconstruction: "projection", "sublayer" or 2 blocks."""
    if name != "unit":
        return besa.Besa(**fields | {name: value})
    return BesaByPair(**fields) if value == 2 else BesaByPart(**fields, unit=value)


@dataclass
class Part(Block):
    """A submodule of a block, as a block whose projections have their names in the whole block."""

    prefix: str = ""

    @property
    def projections(self) -> dict[str, nn.Linear]:
        return {f"{self.prefix}.{name}".strip("."): linear for name, linear in projections(self.module).items()}

    def run(self, number: int, weights: dict[str, Tensor] | None = None) -> Tensor:
        own = {f"{name.removeprefix(self.prefix)}.weight".strip("."): w for name, w in (weights or {}).items()}
        inputs = self.window(self.inputs, number), *self.call.args
        output = torch.func.functional_call(self.module, own, inputs, self.call.kwargs)
        return output[0] if self.call.in_tuple else output


@torch.no_grad()
def part_of(block: Block, name: str, weights: dict[str, Tensor]) -> Part:
    """A part with its own outputs as targets; `weights` replace those of the rest of the block."""
    module, inputs, outputs, calls = block.module.get_submodule(name), [], [], []
    signature = inspect.signature(module.forward)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs)  # the hidden states come first, whatever their name
        calls.append(BlockCall(bound.args[1:], bound.kwargs, isinstance(output, tuple)))
        inputs.append(bound.args[0].view(block.inputs.shape[1], -1))  # some families flatten windows and tokens
        outputs.append((output[0] if calls[-1].in_tuple else output).view(block.inputs.shape[1], -1))

    with module.register_forward_hook(record, with_kwargs=True):
        for number in range(len(block.inputs)):
            block.run(number, weights)
    shared = None, block.ignored, block.n_samples, block.bar
    part = Part(block.index, module, calls[0], torch.stack(inputs), *shared, prefix=name)
    part.targets, part.statistics = torch.stack(outputs), block.statistics
    return part


@config
class BesaByPair(besa.Besa):
    """BESA that reconstructs the output of every two consecutive blocks together, of models like Llama."""

    name: ClassVar[str] = "besa-by-pair"

    def prepared(self, model: PreTrainedModel, windows: Tensor) -> "BesaByPair":
        """Join the blocks of the model in pairs; the model computes the same."""
        blocks = find_blocks(model)
        pairs = [Pair(blocks[i : i + 2]) for i in range(0, len(blocks), 2)]
        model.base_model.layers, model.config.num_hidden_layers = nn.ModuleList(pairs), len(pairs)
        model._no_split_modules = [*model._no_split_modules, "Pair"]
        return self


class Pair(nn.ModuleList):
    """Two blocks that are called alike."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self:
            hidden = block(hidden, *args, **kwargs)
        return hidden


@config
class LearnedClipping(besa.Wanda):
    """Wanda's mask of the quantized weights, the clipping of the quantization learned as in joint BESA (Eqn. 7)."""

    name: ClassVar[str] = "learned-clipping"

    @torch.enable_grad()
    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, quantize = super().prune_block(block), self.quantize
        weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        shapes = {name: quantize.clipping_shape(weight) for name, weight in weights.items()}
        clipping = Parameters(shapes, CLIPPING_START, block.device)
        optimizer = torch.optim.Adam([clipping.flat], lr=CLIPPING_LR)
        for window in block.progress(range(len(block.inputs)), "learn"):
            learned = clipping.by_name()
            masked = {n: quantize.fake(w, learned[n]) * pruned.keep_masks[n] for n, w in weights.items()}
            optimizer.zero_grad()
            reconstruction_error(block.run(window, masked), block.window(block.targets, window)).backward()
            optimizer.step()
        for name, values in clipping.by_name().items():
            codes = quantize.codes(weights[name], values.detach()).pruned(pruned.keep_masks[name])
            pruned.weights[name] = codes.dequantize(weights[name].dtype)
        return pruned


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
