"""BESA: learn the sparsity allocation of one block by gradient descent on its reconstruction error (Eqn. 1-2)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from besa.allocation import reachable_sparsity
from besa.decoder import find_blocks, projections, pruned_projections
from besa.importance import Importance, InputStatistics
from besa.learners import BudgetLearner, Learner, ScoreLearner, full_name
from besa.machine.device import way_out
from besa.machine.fields import Count, Positive, Seed, documented
from besa.machine.processes import from_rank_0, mean_, n_ranks
from besa.masks import parse_pattern
from besa.prune import Method
from besa.quantize import Quantize
from besa.sensitivity import MOST_APART, block_losses, spread_over_blocks
from besa.walk import Block, PrunedBlock, reconstruction_error, token_error

SENSITIVITY_WINDOWS, SENSITIVITY_TOKENS = 8, 512
"""Calibration windows, and tokens of each, on which a block's sensitivity is measured."""


class _Unsaid(str):
    """Targets that nobody gave: another budget takes its own, also through `dataclasses.replace`."""


@documented
@dataclass(frozen=True, kw_only=True)
class Besa(Method):
    """Blockwise parameter-efficient sparsity allocation (Xu et al. 2024): the published row-wise recipe by default.

    The published layer-wise recipe is `Besa(row_group="layer", targets="dense", d_coef=0.5)`. Beyond the paper,
    `Besa(budget="exact")` meets any sparsity to the weight and learns which weights of each row stay, too.
    """

    row_group: Literal["row", "layer"] | Count = "row"
    """Rows of a projection that share one learned sparsity: each its own, a number of rows, or all of them. Where
    scores are learned, they share that of each column; "row" learns one for each weight."""
    targets: Literal["pruned", "dense"] | None = None
    """What a pruned block must reproduce: the dense block's output on the same (pruned) inputs, as the released code
    does row-wise, or the dense model's own hidden states, as Algorithm 1 is written and the released code does
    layer-wise. None takes "pruned" with a penalty, or where parts of blocks are reconstructed, and "dense" with an
    exact budget or a pattern."""
    importance: Importance = "wanda"
    """What weights are ranked by: "wanda", |W| times the norm of its inputs; "magnitude", |W|; "sparsegpt", the
    released code's W^2 / U_jj (`besa.SparseGPT` itself goes by the OBS saliency W^2 / U_jj^2)."""
    smooth: bool = True
    """beta = softmax(sigmoid(logits)), the released recipe, which confines the sparsity to (0.376, 0.624); False is the
    paper's plain softmax."""
    candidates: Annotated[int, Ge(2), Le(256)] = 101
    """D + 1, the number of candidate rates p_d between 1 and 0."""
    penalty: Positive = 5.0
    """lambda, the weight of ((s - sparsity) / sparsity)^2 in the loss (Eqn. 2)."""
    d_coef: Positive = 5.0
    """Prodigy's step size factor. Published: row-wise 5 up to 13B, 10 for 30B, 50 for 65B and 70B; layer-wise 0.05, 0.5
    or, for LLaMA-7B, 50."""
    epochs: Count = 1
    """Passes over the windows. Prodigy hardly learns in its first 15 steps: take at least 32 (windows x epochs /
    batch_size)."""
    batch_size: Count = 1
    """Windows per step, a divisor of their number, whose gradients are averaged (published: one). Ranks under torchrun
    share them out."""
    reconstruct: Literal["projection", "sublayer"] | Count = 1
    """Whose output is reconstructed, under a budget of its own: each projection's, attention's and the MLP's, or that
    of this number of consecutive blocks (published: one). New values for kept weights: `prune(reconstruct=...)`."""
    budget: Literal["penalty", "exact"] = "penalty"
    """How the sparsity is kept to. "penalty", published: approached, and confined by `smooth`. "exact": any sparsity in
    (0, 1), met to the weight in every block (or part), by one number per row group (`besa/budget.py`). It counts what
    is ignored as kept, but a block that is ignored as a whole has no budget. A pattern N:M needs none. With either,
    `smooth`, `candidates`, `penalty` and `d_coef` do nothing."""
    scores: bool | None = None
    """Learn which weights are kept too, by a score for each that is added to its log importance (`besa/scores.py`).
    None: with an exact budget or a pattern. False, without a pattern, learns how many of each row alone: cheaper."""
    scope: Literal["block", "model"] = "block"
    """Where an exact budget holds: in every block, or in the model, whose blocks share it by what pruning adds to the
    loss, measured block by block before any is pruned (`besa/sensitivity.py`)."""
    lr: Positive = 0.01
    """Adam's step size for exact budgets and patterns, which falls to 0 as a cosine; three times as much for scores.
    With a penalty it does nothing: there, `d_coef` sets the steps."""
    loss: Literal["channel", "token"] | None = None
    """What a window's error is relative to: the norm of each output channel, published, or of each token, which is less
    easily over-fitted. None takes "channel" with a penalty and "token" with an exact budget or a pattern."""
    quantize: Quantize | None = None
    """Quantize the weights too, their clipping learned beside the allocation (joint compression, Eqn. 7)."""
    seed: Seed | None = None
    """None takes the windows in their order in every epoch (published); a number shuffles the steps anew each epoch."""

    name: ClassVar[str] = "besa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is None or isinstance(self.targets, _Unsaid):
            whole = self._is_beyond and not isinstance(self.reconstruct, str)
            object.__setattr__(self, "targets", _Unsaid("dense" if whole else "pruned"))
        self._check_together()
        self._check_reach()

    @property
    def _is_beyond(self) -> bool:
        """Whether it is asked for what the paper has not."""
        return self.budget == "exact" or self.pattern is not None

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "sparsegpt"

    @property
    def learns_scores(self) -> bool:
        return self._is_beyond if self.scores is None else self.scores

    def config(self) -> dict[str, Any]:
        return super().config() | ({"scores": True} if self.learns_scores else {})

    def _check_together(self) -> None:
        """Refuse fields that do not go together."""
        if self.learns_scores != self._is_beyond and (self.scores or self.pattern):
            raise ValueError(
                f"scores {self.scores} with budget {self.budget!r} and pattern {self.pattern!r}: scores are learned "
                "with budget 'exact' or a pattern, which has nothing else to learn"
            )
        if self.span > 1 and self.sparsities:
            raise ValueError(
                f"reconstruct {self.reconstruct} prunes several blocks as one, which sparsities tell apart; leave one "
                "of them out"
            )
        if self.scope == "model" and (not self._has_budget or self.span > 1 or self.sparsities):
            raise ValueError(
                "scope 'model' wants budget 'exact', no fixed pattern, single blocks and no sparsities of its own, not "
                f"budget {self.budget!r}, pattern {self.pattern!r}, reconstruct {self.reconstruct!r} and sparsities "
                f"{self.sparsities}"
            )
        if isinstance(self.reconstruct, str) and self.targets == "dense":
            raise ValueError(
                f"reconstruct {self.reconstruct!r} with targets 'dense': only whole blocks have the "
                "dense model's outputs; take targets 'pruned'"
            )

    def _check_reach(self) -> None:
        """Refuse sparsities that cannot be learned."""
        lowest, highest = (0.0, 1.0) if self._is_beyond else reachable_sparsity(self.candidates, self.smooth)
        outside = [each for each in self.sparsities or [self.sparsity] if not lowest < each < highest]
        if outside:
            reach = f"what {self.candidates} candidates with smooth={self.smooth} can reach"
            lift = "; budget='exact' or smooth=False lifts the limit" if self.smooth else ""
            why = "" if self._is_beyond else f", {reach}{lift}"
            raise ValueError(f"sparsity {outside[0]} is outside ({lowest:.3f}, {highest:.3f}){why}")

    @property
    def span(self) -> int:
        return self.reconstruct if isinstance(self.reconstruct, int) else 1

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        blocks = find_blocks(model)
        for start in range(0, len(blocks), self.span) if self.span > 1 else ():
            span = blocks[start : start + self.span]
            if len(places := {str(parameter.device) for block in span for parameter in block.parameters()}) > 1:
                raise ValueError(
                    f"{len(span)} blocks from block {start} on lie on {' and '.join(sorted(places))}, and cannot be "
                    "pruned as one; take reconstruct=1, or besa.prune_checkpoint"
                )
        for (index, name), projection in pruned_projections(model, self.ignore).items():
            rows = len(projection.weight)
            if rows % self.group_rows(projection.weight):
                raise ValueError(
                    f"block {index}, {name}: {rows} rows do not divide into groups of {self.row_group}; "
                    "take a divisor, 'row' or 'layer', or ignore the projection"
                )
        if self._has_budget:
            self._check_budgets(self._sizes(model))

    @property
    def _has_budget(self) -> bool:
        """Whether a budget is met that what is ignored counts in; a fixed pattern has none."""
        return self.budget == "exact" and (not self.pattern or parse_pattern(self.pattern)[0] is None)

    def _sizes(self, model: PreTrainedModel) -> list[tuple[int, int]]:
        """Of each block or span of blocks, how many weights may be pruned, and how many there are."""
        blocks = [projections(block).values() for block in find_blocks(model)]
        sizes = [[0, sum(linear.weight.numel() for linear in block)] for block in blocks]
        for (index, _), linear in pruned_projections(model, self.ignore).items():
            sizes[index][0] += linear.weight.numel()
        together = [sizes[start : start + self.span] for start in range(0, len(sizes), self.span)]
        return [(sum(some for some, _ in each), sum(whole for _, whole in each)) for each in together]

    def _check_budgets(self, sizes: list[tuple[int, int]]) -> None:
        """Refuse a budget for which what is not ignored would have to go as a whole."""
        names, sparsities = [f"block {index * self.span}" for index in range(len(sizes))], self.sparsities
        if self.scope == "model":
            names, sizes = ["the model"], [(sum(some for some, _ in sizes), sum(whole for _, whole in sizes))]
        for name, (some, whole), sparsity in zip(names, sizes, sparsities or [self.sparsity] * len(sizes), strict=True):
            if some and sparsity * whole >= some:
                raise ValueError(
                    f"{name}: ignore keeps {1 - some / whole:.1%} of its weights, so that it stays below sparsity "
                    f"{some / whole:.4g}; {sparsity} cannot be reached. Take a lower sparsity, or ignore less"
                )

    @property
    def measures_model(self) -> bool:
        return self.scope == "model"

    def prepared(self, model: PreTrainedModel, windows: Tensor, progress: bool) -> "Besa":
        if self.scope == "block":
            return self
        sizes = self._sizes(model)
        left = [index for index, (some, _) in enumerate(sizes) if some]  # the others are ignored as a whole
        some, whole = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        needed = self.sparsity * (whole / some)
        levels = max(0.02, needed - MOST_APART), min(0.98, needed + MOST_APART)
        some_tokens = windows[:SENSITIVITY_WINDOWS, :SENSITIVITY_TOKENS]
        losses = from_rank_0(block_losses(model, some_tokens, levels, progress, self.ignore))
        spread = spread_over_blocks(losses[left], levels, [sizes[index][0] for index in left], needed)
        sparsities = [self.sparsity] * len(sizes)
        for index, sparsity in zip(left, spread, strict=True):
            sparsities[index] = sparsity * (sizes[index][0] / sizes[index][1])
        return replace(self, scope="block", sparsities=tuple(sparsities))

    def prune_block(self, block: Block) -> PrunedBlock:
        """Learn the allocation of the block, or of each of its parts in turn, then mask its weights with it."""
        statistics = block.statistics(hessian=self.needs_hessian)
        whole = PrunedBlock()
        for name in self._parts(block):
            part = block.part(name, whole.weights) if name else block
            learned = self._learn(learner := self._learner(block, part, name, statistics), part)
            for kind in ("weights", "keep_masks", "quantized"):
                of_part = getattr(learned, kind).items()
                getattr(whole, kind).update({full_name(name, within): value for within, value in of_part})
            whole.steps.extend(learned.steps)
            del part, learner  # before the next ones are made
        return whole

    def _learner(self, block: Block, part: Block, name: str, statistics: dict[str, InputStatistics]) -> Learner:
        """Of a part of the block; under a budget, what is not ignored makes up for what is."""
        kind = ScoreLearner if self.learns_scores else BudgetLearner if self.budget == "exact" else Learner
        some = sum(linear.weight.numel() for linear in block.projections.values())
        whole = sum(linear.weight.numel() for linear in projections(block.module).values())
        return kind(self, part, name, statistics, Fraction(whole, some) if self._has_budget else Fraction(1))

    def _parts(self, block: Block) -> list[str]:
        """Names of the submodules that are learned one after the other; the block's own name is empty."""
        if self.reconstruct == "projection":
            return list(block.projections)
        if self.reconstruct == "sublayer":
            starts = {name.partition(".")[0] for name in block.projections}
            return [name for name, _ in block.module.named_children() if name in starts]
        return [""] if block.projections else []

    @torch.enable_grad()
    def _learn(self, learner: Learner, block: Block) -> PrunedBlock:
        """Minimize the block's loss (Eqn. 2) over the windows, a step at a time."""
        # In float16 the gradient of an unscaled loss underflows to 0; a step whose scaled one overflows is skipped.
        scaler = torch.amp.GradScaler(learner.theta.values.device.type, enabled=block.inputs.dtype == torch.float16)
        log, skipped = [], []
        for step in block.bar(list(self._steps(len(block.inputs))), "learn"):
            learner.zero_grad()
            for window in step:
                masked, sparsity = learner()
                error = self._error(block.run(window, masked), block.target(window))  # Eqn. 1
                loss = error + self.penalty * ((sparsity - learner.sparsity) / learner.sparsity) ** 2  # Eqn. 2
                scaler.scale(loss / len(step)).backward()  # Eqn. 6
                log.append(torch.stack([loss, error, sparsity]).detach())
            skipped.append(learner.step(scaler))
        size = self.batch_size // n_ranks()  # windows of a step on this rank
        entries = mean_(torch.stack(log).view(-1, size, 3).mean(1))
        return learner.pruned(_steps_log(block.index, entries, skipped, block.inputs.dtype))

    @property
    def _error(self) -> Callable[[Tensor, Tensor], Tensor]:
        per_token = self.loss == "token" or (self.loss is None and self._is_beyond)
        return token_error if per_token else reconstruction_error

    def group_rows(self, weight: Tensor) -> int:
        """Rows of a projection that share what is learned."""
        return {"row": 1, "layer": len(weight)}.get(self.row_group, self.row_group)

    def _steps(self, n_samples: int) -> Iterator[range]:
        """This rank's windows in each step. It holds every n-th window, so that a step's windows are the same for
        any number of ranks."""
        size = self.batch_size // n_ranks()
        steps = [range(start, start + size) for start in range(0, n_samples, size)]
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = range(len(steps)) if generator is None else torch.randperm(len(steps), generator=generator).tolist()
            yield from (steps[number] for number in order)


def _steps_log(
    index: int, entries: Float32[Tensor, "steps 3"], skipped: list[bool], dtype: torch.dtype
) -> list[dict[str, float]]:
    """The training log of a block; `skipped` is noted only where a step was.

    Raises:
        ValueError: a loss is not finite: what was learned from it is nothing.
    """
    finite = torch.isfinite(entries).all(dim=1)
    if not finite.all():
        step = int(finite.int().argmin())
        raise ValueError(
            f"block {index}, training step {step}: the loss is {float(entries[step, 0])}, for the masked block puts "
            f"out what overflows; {way_out(dtype)}"
        )
    keys = ("loss", "reconstruction_error", "sparsity")
    steps = [dict(zip(keys, values, strict=True)) for values in entries.tolist()]
    return [step | {"skipped": True} if skip else step for step, skip in zip(steps, skipped, strict=True)]
