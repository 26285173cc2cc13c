"""BESA: learn the sparsity allocation of one block by gradient descent on its reconstruction error (Eqn. 1-2)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import prodigyopt
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.allocation import Allocation, candidate_rates, reachable_sparsity
from besa.budget import Budgeted, meet_budget, whole_counts
from besa.decoder import find_blocks, projections, pruned_projections
from besa.importance import Importance, InputStatistics, importance
from besa.machine.fields import documented
from besa.machine.processes import from_rank_0, mean_, n_ranks
from besa.masks import parse_pattern
from besa.prune import Method
from besa.quantize import CLIPPING_START, Quantize
from besa.scores import SCORE_LR, Scored, stepped_counts
from besa.sensitivity import block_losses, spread_over_blocks
from besa.walk import Block, PrunedBlock, reconstruction_error, token_error

SENSITIVITY_WINDOWS, SENSITIVITY_TOKENS = 8, 512
"""Calibration windows, and tokens of each, on which a block's sensitivity is measured."""


@documented
@dataclass(frozen=True, kw_only=True)
class Besa(Method):
    """Blockwise parameter-efficient sparsity allocation (Xu et al. 2024): the published row-wise recipe by default.

    The published layer-wise recipe is `Besa(row_group="layer", targets="dense")`, with a `d_coef` of its own.
    """

    row_group: Literal["row", "layer"] | int = "row"
    """Rows of a projection that share one learned sparsity: each its own, a number of rows, or all of them. Where
    scores are learned, they share that of each column; "row" learns one for each weight."""
    targets: Literal["pruned", "dense"] | None = None
    """What a pruned block must reproduce: the dense block's output on the same (pruned) inputs, as the released code
    does row-wise, or the dense model's own hidden states, as Algorithm 1 is written and the released code does
    layer-wise. None takes "pruned" with a penalty and "dense" with an exact budget or a pattern, where it can be."""
    importance: Importance = "wanda"
    """What weights are ranked by."""
    smooth: bool = True
    """beta = softmax(sigmoid(logits)), the released recipe; False is the paper's plain softmax."""
    candidates: int = 101
    """D + 1, the number of candidate rates p_d between 1 and 0."""
    penalty: float = 5.0
    """lambda, the weight of ((s - sparsity) / sparsity)^2 in the loss (Eqn. 2)."""
    d_coef: float = 5.0
    """Prodigy's step size factor; the published runs set it by model (reproduce/params)."""
    epochs: int = 1
    """Passes over the windows."""
    batch_size: int = 1
    """Windows per step, whose gradients are averaged (published: one). Ranks under torchrun share them out."""
    reconstruct: Literal["projection", "sublayer"] | int = 1
    """Whose output is reconstructed, under a budget of its own: each projection's, attention's and the MLP's, or that
    of this number of consecutive blocks (published: one). New values for kept weights: `prune(reconstruct=...)`."""
    budget: Literal["penalty", "exact"] = "penalty"
    """How the sparsity is kept to. "penalty", published: approached, and confined by `smooth`. "exact": any sparsity in
    (0, 1), met to the weight in every block (or part), by one number per row group (`besa/budget.py`). It counts what
    is ignored as kept, but a block that is ignored as a whole has no budget. A pattern N:M needs none."""
    scores: bool | None = None
    """Learn which weights are kept too, by a score for each that is added to its log importance (`besa/scores.py`).
    None: with an exact budget or a pattern. False learns how many of each row alone, which is cheaper."""
    scope: Literal["block", "model"] = "block"
    """Where an exact budget holds: in every block, or in the model, whose blocks share it by what pruning adds to the
    loss, measured block by block before any is pruned (`besa/sensitivity.py`)."""
    lr: float = 0.01
    """Adam's step size for exact budgets, which falls to 0 as a cosine; three times as much for scores."""
    loss: Literal["channel", "token"] | None = None
    """What a window's error is relative to: the norm of each output channel, published, or of each token, which is less
    easily over-fitted. None takes "channel" with a penalty and "token" with an exact budget or a pattern."""
    quantize: Quantize | None = None
    """Quantize the weights too, their clipping learned beside the allocation (joint compression, Eqn. 7)."""
    seed: int | None = None
    """None takes the windows in their order in every epoch (published); a number shuffles the steps anew each epoch."""

    name: ClassVar[str] = "besa"

    def __post_init__(self) -> None:
        super().__post_init__()
        beyond = self.budget == "exact" or self.pattern is not None
        if self.targets is None:
            whole = beyond and not isinstance(self.reconstruct, str)
            object.__setattr__(self, "targets", "dense" if whole else "pruned")
        if self.scores is None:
            object.__setattr__(self, "scores", beyond)
        if self.scores != beyond and (self.scores or self.pattern):
            raise ValueError(
                f"scores {self.scores} with budget {self.budget!r} and pattern {self.pattern!r}: scores are learned "
                "with budget 'exact' or a pattern, which has nothing else to learn"
            )
        if self.row_group not in ("row", "layer") and (isinstance(self.row_group, str) or self.row_group < 1):
            raise ValueError(f"row_group {self.row_group!r} is not 'row', 'layer' or a number of rows")
        if self.targets not in ("pruned", "dense"):
            raise ValueError(f"targets {self.targets!r} is not 'pruned' or 'dense'")
        if self.importance not in ("magnitude", "wanda", "sparsegpt"):
            raise ValueError(f"importance {self.importance!r} is not 'magnitude', 'wanda' or 'sparsegpt'")
        if not 2 <= self.candidates <= 256:
            raise ValueError(f"candidates {self.candidates} is outside [2, 256]")
        if min(self.epochs, self.batch_size) < 1 or min(self.penalty, self.d_coef, self.lr) <= 0:
            numbers = f"epochs ({self.epochs}), batch_size ({self.batch_size}), penalty ({self.penalty})"
            raise ValueError(f"{numbers}, d_coef ({self.d_coef}) and lr ({self.lr}) must be positive")
        if self.span > 1 and self.sparsities:
            raise ValueError(
                f"reconstruct {self.reconstruct} prunes several blocks as one, which sparsities tell apart"
            )
        if self.scope == "model" and (not self._has_budget or self.span > 1 or self.sparsities):
            raise ValueError(
                "scope 'model' wants budget 'exact', no fixed pattern, single blocks and no sparsities of its own"
            )
        if self.scope not in ("block", "model"):
            raise ValueError(f"scope {self.scope!r} is not 'block' or 'model'")
        if self.budget not in ("penalty", "exact") or self.loss not in ("channel", "token", None):
            raise ValueError(f"budget {self.budget!r} is not 'penalty' or 'exact', or loss {self.loss!r} no known one")
        if self.reconstruct not in ("projection", "sublayer") and (
            isinstance(self.reconstruct, str) or self.reconstruct < 1
        ):
            raise ValueError(f"reconstruct {self.reconstruct!r} is not 'projection', 'sublayer' or a number of blocks")
        if isinstance(self.reconstruct, str) and self.targets == "dense":
            raise ValueError(
                f"reconstruct {self.reconstruct!r} with targets 'dense': only whole blocks have the "
                "dense model's outputs; take targets 'pruned'"
            )
        free = self.budget == "exact" or self.pattern
        lowest, highest = (0.0, 1.0) if free else reachable_sparsity(self.candidates, self.smooth)
        extremes = min(self.sparsities or [self.sparsity]), max(self.sparsities or [self.sparsity])
        if not lowest < extremes[0] <= extremes[1] < highest:
            wrong = extremes[0] if extremes[0] <= lowest else extremes[1]
            reach = f"what {self.candidates} candidates with smooth={self.smooth} can reach"
            way_out = "; budget='exact' or smooth=False lifts the limit" if self.smooth else ""
            why = "" if free else f", {reach}{way_out}"
            raise ValueError(f"sparsity {wrong} is outside ({lowest:.3f}, {highest:.3f}){why}")

    @property
    def span(self) -> int:
        return self.reconstruct if isinstance(self.reconstruct, int) else 1

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        for (index, name), projection in pruned_projections(model, self.ignore).items():
            rows = len(projection.weight)
            if rows % self._group_rows(projection.weight):
                raise ValueError(f"block {index}, {name}: {rows} rows do not divide into groups of {self.row_group}")
        if self._has_budget:
            self._check_budgets(self._sizes(model))
        if self.quantize:
            self.quantize.check(model)

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
        names, targets = [f"block {index * self.span}" for index in range(len(sizes))], self.sparsities
        if self.scope == "model":
            names, sizes = ["the model"], [(sum(some for some, _ in sizes), sum(whole for _, whole in sizes))]
        for name, (some, whole), sparsity in zip(names, sizes, targets or [self.sparsity] * len(sizes), strict=True):
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
        levels = max(0.02, self.sparsity - 0.1), min(0.98, self.sparsity + 0.1)
        some_tokens = windows[:SENSITIVITY_WINDOWS, :SENSITIVITY_TOKENS]
        losses = from_rank_0(block_losses(model, some_tokens, levels, progress))
        sizes = self._sizes(model)
        left = [index for index, (some, _) in enumerate(sizes) if some]  # the others are ignored as a whole
        some, whole = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        needed = self.sparsity * (whole / some)
        spread = spread_over_blocks(losses[left], levels, [sizes[index][0] for index in left], needed)
        sparsities = [self.sparsity] * len(sizes)
        for index, sparsity in zip(left, spread, strict=True):
            sparsities[index] = sparsity * (sizes[index][0] / sizes[index][1])
        return replace(self, scope="block", sparsities=tuple(sparsities))

    def prune_block(self, block: Block) -> PrunedBlock:
        """Learn the allocation of the block, or of each of its parts in turn, then mask its weights with it."""
        statistics = block.statistics(hessian=self.importance == "sparsegpt")
        whole = PrunedBlock()
        for name in self._parts(block):
            part = block.part(name, whole.weights) if name else block
            learned = self._learn(learner := self._learner(block, part, name, statistics), part)
            for pruned, of_part in (
                (whole.weights, learned.weights),
                (whole.keep_masks, learned.keep_masks),
                (whole.quantized, learned.quantized),
            ):
                pruned.update({_joined(name, within): value for within, value in of_part.items()})
            whole.steps.extend(learned.steps)
            del part, learner  # before the next ones are made
        return whole

    def _learner(self, block: Block, part: Block, name: str, statistics: dict[str, InputStatistics]) -> "_Learner":
        """Of a part of the block; under a budget, what is not ignored makes up for what is."""
        kind = _ScoreLearner if self.scores else _BudgetLearner if self.budget == "exact" else _Learner
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
    def _learn(self, learner: "_Learner", block: Block) -> PrunedBlock:
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
        return learner.pruned(_steps_log(block.index, entries, skipped))

    @property
    def _error(self) -> Callable[[Tensor, Tensor], Tensor]:
        per_token = self.loss == "token" or (self.loss is None and (self.budget == "exact" or self.pattern is not None))
        return token_error if per_token else reconstruction_error

    def _group_rows(self, weight: Tensor) -> int:
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


class _Learner:
    """What is learned of one block: the logits of every projection's rows, and the clipping where it is quantized."""

    def __init__(
        self, method: Besa, block: Block, part: str, statistics: dict[str, InputStatistics], share: Fraction
    ) -> None:
        """
        Args:
            part: the block's name in the whole block, whose projections the statistics name; empty for the whole.
            share: weights that the sparsity is a fraction of, for each that may be pruned.
        """
        self.method, self.quantize, self.share = method, method.quantize, share
        self.target = method.sparsity_of(block)
        self.sparsity = self.target * float(share)
        weights = {name: projection.weight.detach() for name, projection in block.projections.items()}
        # Scores take twice a bfloat16 weight's memory: they are made for one projection at a time.
        scores = lambda name: self._scores(weights[name], statistics[_joined(part, name)])
        device = next(iter(weights.values())).device
        self.prepare(weights, scores, device, steps=method.epochs * len(block.inputs) * n_ranks() // method.batch_size)
        if self.quantize:
            shapes = {name: self.quantize.clipping_shape(weight) for name, weight in weights.items()}
            self.clipping = _Flat(shapes, CLIPPING_START, device)
            self.learned.append(self.clipping)
            self.optimizers.append(torch.optim.Adam([self.clipping.values], lr=self.quantize.lr))

    def _scores(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        ranked = self.quantize.codes(weight).dequantize(weight.dtype) if self.quantize else weight
        return importance(self.method.importance, ranked, statistics)

    def prepare(
        self, weights: dict[str, Tensor], scores: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        """Rank the weights, and make what is learned and its optimizer."""
        method = self.method
        rates, groups = candidate_rates(method.candidates).to(device), self._groups(weights)
        self.allocations = {
            name: Allocation.create(weight, scores(name), rates, groups[name], method.smooth)
            for name, weight in weights.items()
        }
        # Starting at 0, every candidate is equally likely: sparsity one half.
        self.theta = _Flat({name: (n, method.candidates) for name, n in groups.items()}, 0.0, device)
        self.learned = [self.theta]
        self.optimizers = [prodigyopt.Prodigy([self.theta.values], lr=1.0, d_coef=method.d_coef, weight_decay=0.0)]

    def _groups(self, weights: dict[str, Tensor]) -> dict[str, int]:
        return {name: len(weight) // self.method._group_rows(weight) for name, weight in weights.items()}

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        """Masked weights by projection and the block's sparsity, weighted by their sizes; both differentiable."""
        theta, masked, zeros = self.theta.by_name(), {}, 0.0
        for name, allocation in self.allocations.items():
            masked[name], alpha = allocation(theta[name], self._quantized(name))
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        return masked, zeros / sum(allocation.weight.numel() for allocation in self.allocations.values())

    def _quantized(self, name: str) -> Tensor | None:
        """A projection's weight as its clipping quantizes it by now; None where nothing is quantized."""
        if self.quantize:
            return self.quantize.fake(self.allocations[name].weight, self.clipping.by_name()[name])
        return None

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, scaler: torch.amp.GradScaler) -> bool:
        """Take the step that the gradients of all ranks ask for; whether it was skipped, for they overflowed."""
        for flat in self.learned:
            mean_(flat.values.grad)
        scale = scaler.get_scale()
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() < scale

    @torch.no_grad()
    def pruned(self, steps: list[dict[str, float]]) -> PrunedBlock:
        """Weights and keep-masks as they are learned by now."""
        pruned = PrunedBlock(steps=steps, keep_masks=self.keep_masks())
        for name, keep_mask in pruned.keep_masks.items():
            weight, out = self.allocations[name].weight, self.allocations[name].out
            if self.quantize:
                codes = self.quantize.codes(weight, self.clipping.by_name()[name])
                pruned.quantized[name] = codes.pruned(keep_mask)
                pruned.weights[name] = pruned.quantized[name].dequantize(weight.dtype)
            else:
                pruned.weights[name] = out.copy_(weight).masked_fill_(~keep_mask, 0)
        return pruned

    def keep_masks(self) -> dict[str, Tensor]:
        """M as it is learned by now."""
        theta = self.theta.by_name()
        return {name: allocation.keep_mask(theta[name]) for name, allocation in self.allocations.items()}


class _BudgetLearner(_Learner):
    """The same where the sparsities always meet the budget: theta is one number per row group, for any target."""

    def prepare(
        self, weights: dict[str, Tensor], scores: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        self.allocations = {name: self._create(weight, scores(name)) for name, weight in weights.items()}
        self.groups = self._groups(weights)
        self.theta = _Flat({"": (sum(self.groups.values()),)}, self.sparsity, device)
        sizes = [torch.full((n,), weights[name].numel() / n) for name, n in self.groups.items()]
        self.sizes = torch.cat(sizes).to(device)
        self.total = round(self.target * float(self.share * sum(weight.numel() for weight in weights.values())))
        self._descend({self.theta: self.method.lr}, steps)

    def _create(self, weight: Tensor, scores: Tensor) -> Any:
        return Budgeted.create(weight, scores)

    def _descend(self, learned: "dict[_Flat, float]", steps: int) -> None:
        """What is learned, with its step sizes."""
        self.learned = list(learned)
        self.optimizers = [torch.optim.Adam([{"params": [flat.values], "lr": lr} for flat, lr in learned.items()])]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[0], steps)

    def _alpha(self) -> dict[str, Tensor]:
        alpha = meet_budget(self.theta.values, self.sizes, self.sparsity)
        return dict(zip(self.groups, alpha.split(list(self.groups.values())), strict=True))

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        masked = {name: self.allocations[name](a, self._quantized(name)) for name, a in self._alpha().items()}
        return masked, torch.full((), self.sparsity, device=self.sizes.device)

    def step(self, scaler: torch.amp.GradScaler) -> bool:
        skipped = super().step(scaler)
        self.schedule.step()
        return skipped

    def keep_masks(self) -> dict[str, Tensor]:
        wanted, limits = [], []
        for name, alpha in self._alpha().items():
            rows, columns = self.allocations[name].weight.shape
            wanted.append((alpha * columns).repeat_interleave(rows // len(alpha)))
            limits.append(torch.full((rows,), columns, device=alpha.device))
        limits = torch.cat(limits)
        counts = whole_counts(torch.cat(wanted), limits, self.total)
        rows = [len(allocation.weight) for allocation in self.allocations.values()]
        by_name = zip(self.allocations.items(), counts.split(rows), strict=True)
        return {name: allocation.keep_mask(count) for (name, allocation), count in by_name}


class _ScoreLearner(_BudgetLearner):
    """The same where a score for each weight (of a row group: each column) says which stay, of a row or of every M.

    Where a pattern leaves nothing open, how many stay is not learned.
    """

    def prepare(
        self, weights: dict[str, Tensor], scores: Callable[[str], Tensor], device: torch.device, steps: int
    ) -> None:
        self.n, self.m = parse_pattern(self.method.pattern) if self.method.pattern else (None, None)
        super().prepare(weights, scores, device, steps)
        shapes = {name: (n, weights[name].shape[1]) for name, n in self.groups.items()}
        self.scores, lr = _Flat(shapes, 0.0, device), self.method.lr
        rates = {self.scores: SCORE_LR * lr} | ({self.theta: lr} if self.n is None else {})
        self._descend(rates, steps)

    def _create(self, weight: Tensor, scores: Tensor) -> Scored:
        return Scored.create(weight, scores, self.m)

    def _counts(self, alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many weights of each row go."""
        rows = [len(each.weight) for each in self.allocations.values()]
        per_row = lambda numbers: torch.tensor(numbers).repeat_interleave(torch.tensor(rows)).to(self.sizes.device)
        columns = per_row([each.weight.shape[1] for each in self.allocations.values()])
        steps = per_row([each.step for each in self.allocations.values()])
        shares = [a.detach().repeat_interleave(n // len(a)) for n, a in zip(rows, alpha.values(), strict=True)]
        wanted = torch.cat(shares) * columns
        if self.n is not None:
            counts = steps * (self.m - self.n)
        elif self.m:
            counts = stepped_counts(wanted, steps, self.m, self.total)
        else:
            counts = whole_counts(wanted, columns, self.total)
        return dict(zip(self.allocations, counts.split(rows), strict=True))

    def __call__(self) -> tuple[dict[str, Tensor], Float32[Tensor, ""]]:
        alpha, scores, masked = self._alpha(), self.scores.by_name(), {}
        counts = self._counts(alpha)
        for name, allocation in self.allocations.items():
            learned = alpha[name] if self.n is None else None
            masked[name] = allocation(scores[name], counts[name], learned, self._quantized(name))
        return masked, torch.full((), self.sparsity, device=self.sizes.device)

    def keep_masks(self) -> dict[str, Tensor]:
        scores, counts = self.scores.by_name(), self._counts(self._alpha())
        return {name: each.keep_mask(scores[name], counts[name]) for name, each in self.allocations.items()}


def _joined(part: str, name: str) -> str:
    """A projection's name in the block, given its name in a part of it."""
    return f"{part}.{name}".strip(".")


def _steps_log(index: int, entries: Float32[Tensor, "steps 3"], skipped: list[bool]) -> list[dict[str, float]]:
    """The training log of a block; `skipped` is noted only where a step was.

    Raises:
        ValueError: a loss is not finite: what was learned from it is nothing.
    """
    finite = torch.isfinite(entries).all(dim=1)
    if not finite.all():
        step = int(finite.int().argmin())
        raise ValueError(
            f"block {index}, training step {step}: the loss is {float(entries[step, 0])}, for the masked block puts "
            "out what overflows; try dtype bfloat16 or float32"
        )
    keys = ("loss", "reconstruction_error", "sparsity")
    steps = [dict(zip(keys, values, strict=True)) for values in entries.tolist()]
    return [step | {"skipped": True} if skip else step for step, skip in zip(steps, skipped, strict=True)]


class _Flat:
    """Tensors by name that are views of one flat parameter, so that an optimizer's step is one operation."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], start: float, device: torch.device) -> None:
        self.shapes = shapes
        self.values = nn.Parameter(torch.full((sum(map(math.prod, shapes.values())),), start, device=device))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.values.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
