"""Rows of the tables by name, and methods that are compared with BESA in the notebooks only."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

import besa
from besa.besa import candidate_rates, n_groups, rank_rows
from besa.beyond.exact import LR, BudgetLearner, Exact, masked
from besa.config import config, method_class
from besa.decoder import BlockCall, find_blocks, projections
from besa.importance import InputStatistics, collect_statistics, wanda
from besa.kernels import Ranking, bucket_sums, masked_rows
from besa.loop import Method
from besa.losses import reconstruction_error, token_error
from besa.quantize import CLIPPING_LR, CLIPPING_START
from besa.system import deterministic, n_ranks
from besa.training import Parameters, train
from besa.walk import Block, Match, PrunedBlock

KNOWN = {
    "dense": None,
    "magnitude": besa.Magnitude,
    "wanda": besa.Wanda,
    "sparsegpt": besa.SparseGPT,
    "besa-row-wise": besa.Besa,
    "besa-layer-wise": besa.Besa.layer_wise,
    "exact": besa.Exact,
    "exact-update": partial(besa.Exact, update=True),
    "closed": besa.Closed,
}


def method_of(row: str, sparsity: float = 0.5, **fields: Any) -> Method | None:
    """The method of a row by its name, or your own by "package.module:Class"; None is the dense model.

    Steps behind the name, such as "wanda + epoch", are those of `steps_of`.
    """
    name = row.partition(" + ")[0]
    if name not in KNOWN and ":" not in name:
        raise ValueError(f"unknown row {row!r}; known: {', '.join(KNOWN)}, or package.module:Class")
    make = KNOWN[name] if name in KNOWN else method_class(name)
    return make and make(sparsity=sparsity, **fields)


def steps_of(row: str, spread: float = 0.15, epoch: Any = None) -> dict[str, Any]:
    """Options of `Run.row` for the steps in the name of a row: "exact-update + budgets + epoch"."""
    rules = {"budgets": spread} | {name: name for name in BUDGETS}
    options = {step: {"budgets": rule} for step, rule in rules.items()} | {"epoch": {"epoch": epoch or {}}}
    chosen = [options[step] for step in row.split(" + ")[1:] if step in options]
    return {name: option for each in chosen for name, option in each.items()}


def methods_of(rows: Sequence[str], sparsity: float, recipe: Any) -> dict[str, Method | None]:
    """The methods of several rows, BESA's step sizes from the recipe; a method of yours by its own name."""
    fields = {"besa-row-wise": {"d_coef": recipe.d_coef}, "besa-layer-wise": {"d_coef": recipe.d_coef_layer}}
    methods = {row: method_of(row, sparsity, **fields.get(row.partition(" + ")[0], {})) for row in rows}
    return {row if ":" not in row else method.name: method for row, method in methods.items()}


def matched_to(
    row: str, rows: Iterable[str], others: Sequence[str] | None = None, wanted: bool = True
) -> dict[str, str]:
    """Rows that `Run.rows(matched=...)` prunes to the sparsity of another row, by name; none without that row.

    Args:
        others: rows to match; None takes Wanda, SparseGPT and methods of yours.
    """
    if others is None:
        ours = [other for other in rows if other in KNOWN or " + " in other]
        others = [other for other in rows if other in ("wanda", "sparsegpt") or other not in ours]
    return {other: row for other in rows if other in others} if wanted and row in rows else {}


@torch.no_grad()
def dense_statistics(model: PreTrainedModel, windows: Tensor) -> list[dict[str, InputStatistics]]:
    """Input statistics of every block's projections in the dense model."""
    with contextlib.ExitStack() as stack:
        statistics = [
            stack.enter_context(collect_statistics(projections(block), len(windows), False))
            for block in find_blocks(model)
        ]
        for window in windows.split(1):
            model.base_model(window.to(model.device), use_cache=False)
    return statistics


@torch.no_grad()
def budgets_by_importance(
    model: PreTrainedModel, windows: Tensor, sparsity: float, worth: Callable[[list[Tensor]], float], most: float
) -> tuple[float, ...]:
    """A sparsity for each block, from Wanda's importances in the dense model.

    With D_l = worth(importances of block l's projections), and d_l = 2 most (D_l - min D) / (max D - min D):

        s_l = sparsity - (d_l - mean of d)
    """
    worths = []
    for block, statistics in zip(find_blocks(model), dense_statistics(model, windows), strict=True):
        worths.append(worth([wanda(linear.weight, statistics[name]) for name, linear in projections(block).items()]))
    worths = torch.tensor(worths, dtype=torch.float64)
    d = 2 * most * (worths - worths.min()) / (worths.max() - worths.min()).clamp_min(1e-12)
    return tuple((sparsity - (d - d.mean())).tolist())


def owl_budgets(model: PreTrainedModel, windows: Tensor, sparsity: float) -> tuple[float, ...]:
    """OWL (Yin et al. 2024): D_l is the share of importances above five times the mean of their projection's."""

    def outlier_share(importances: list[Tensor]) -> float:
        outliers = sum(int((each > 5 * each.mean()).sum()) for each in importances)
        return outliers / sum(each.numel() for each in importances)

    return budgets_by_importance(model, windows, sparsity, outlier_share, most=0.08)


def dlp_budgets(model: PreTrainedModel, windows: Tensor, sparsity: float) -> tuple[float, ...]:
    """DLP (Chen et al. 2025): D_l falls with the median importance of the block."""

    def minus_median(importances: list[Tensor]) -> float:
        return -float(torch.cat([each.flatten() for each in importances]).median())

    return budgets_by_importance(model, windows, sparsity, minus_median, most=0.15)


BUDGETS = {"owl": owl_budgets, "dlp": dlp_budgets}
"""Budgets by block of other authors, with their values."""


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
            learned = super().prune_block(part_of(block, name, pruned.weights))
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

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = super().prune_block(block)
        weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        shapes = {name: self.quantize.clipping_shape(weight) for name, weight in weights.items()}
        clipping = Parameters(shapes, CLIPPING_START, block.device)

        def loss_of(window: int) -> tuple[Tensor, Tensor, Tensor]:
            learned = clipping.by_name()
            masked = {n: self.quantize.fake(w, learned[n]) * pruned.keep_masks[n] for n, w in weights.items()}
            error = reconstruction_error(block.run(window, masked), block.window(block.targets, window))
            return error, error, torch.full_like(error, self.sparsity_of(block))

        optimizer = torch.optim.Adam([clipping.flat], lr=CLIPPING_LR)
        pruned.steps = train(block, block.batches(n_ranks(), 1), [optimizer], loss_of)
        for name, values in clipping.by_name().items():
            weight = self.quantize.codes(weights[name], values.detach()).dequantize(weights[name].dtype)
            pruned.weights[name] = weight.masked_fill(~pruned.keep_masks[name], 0)
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

    def prune_block(self, block: Block) -> PrunedBlock:
        batches = block.batches(self.batch_size, self.epochs)
        learner = CountLearner(self, block, len(batches))
        error_of = token_error if self.loss == "token" else reconstruction_error
        sparsity = torch.full((), learner.sparsity, device=block.device)

        def loss_of(window: int) -> tuple[Tensor, Tensor, Tensor]:
            error = error_of(block.run(window, learner()), block.window(block.targets, window))
            return error, error, sparsity

        steps = train(block, batches, [learner.optimizer], loss_of, [learner.schedule])
        keep_masks = learner.keep_masks()
        return PrunedBlock(masked(learner.weights, keep_masks, learner.buffers), keep_masks, steps)


BUCKETS = 101  # rates that divide the ranks of a row into buckets of 1 %
BAND = 5  # buckets on either side of a row's threshold whose weights give the gradient of its sparsity


class CountLearner(BudgetLearner):
    """Trains the sparsities of row groups alone."""

    def __init__(self, method: ExactCounts, block: Block, n_steps: int) -> None:
        groups = {name: n_groups(linear.weight, method.row_group) for name, linear in block.projections.items()}
        super().__init__(method.sparsity_of(block), block, groups)
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
