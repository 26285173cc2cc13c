"""BESA: learn the sparsity allocation of one block by gradient descent on its reconstruction error (Eqn. 1-2)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import prodigyopt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.allocation import Allocation, candidate_rates, reachable_sparsity
from besa.blocks import find_blocks, projections, run_block
from besa.importance import Importance, importance
from besa.prune import BlockTask, Method, PrunedBlock, reconstruction_error


@dataclass(frozen=True, kw_only=True)
class Besa(Method):
    """Blockwise parameter-efficient sparsity allocation (Xu et al. 2024): the published row-wise recipe by default."""

    row_group: Literal["row", "layer"] | int = "row"
    """Rows of a projection that share one learned sparsity: each its own, a number of rows, or all of them."""
    targets: Literal["pruned", "dense"] = "pruned"
    """What a pruned block must reproduce: the dense block's output on the same (pruned) inputs, as the released code
    does row-wise, or the dense model's own hidden states, as Algorithm 1 is written and the released code does
    layer-wise."""
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
    """Passes over the windows, one window per step."""
    seed: int | None = None
    """None takes the windows in their order in every epoch (published); a number shuffles them anew each epoch."""

    name: ClassVar[str] = "besa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_group not in ("row", "layer") and (isinstance(self.row_group, str) or self.row_group < 1):
            raise ValueError(f"row_group {self.row_group!r} is not 'row', 'layer' or a number of rows")
        if self.targets not in ("pruned", "dense"):
            raise ValueError(f"targets {self.targets!r} is not 'pruned' or 'dense'")
        if self.importance not in ("magnitude", "wanda", "sparsegpt"):
            raise ValueError(f"importance {self.importance!r} is not 'magnitude', 'wanda' or 'sparsegpt'")
        if not 2 <= self.candidates <= 256:
            raise ValueError(f"candidates {self.candidates} is outside [2, 256]")
        if self.epochs < 1 or self.penalty <= 0 or self.d_coef <= 0:
            raise ValueError(f"epochs ({self.epochs}), penalty ({self.penalty}) and d_coef must be positive")
        lowest, highest = reachable_sparsity(self.candidates, self.smooth)
        if not lowest < self.sparsity < highest:
            raise ValueError(
                f"sparsity {self.sparsity} is outside ({lowest:.3f}, {highest:.3f}), what {self.candidates} candidates "
                f"with smooth={self.smooth} can reach" + ("; smooth=False lifts the limit" if self.smooth else "")
            )

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "sparsegpt"

    @property
    def passes(self) -> int:
        return self.epochs

    def check(self, model: PreTrainedModel) -> None:
        for index, block in enumerate(find_blocks(model)):
            for name, projection in projections(block).items():
                if projection.weight.shape[0] % self._group_rows(projection.weight):
                    raise ValueError(
                        f"block {index}, {name}: {projection.weight.shape[0]} rows do not divide into groups of "
                        f"{self.row_group}"
                    )

    def prune_block(self, task: BlockTask, tick: Callable[[], Any]) -> PrunedBlock:
        """Learn the block's allocation, then mask its weights with it."""
        allocations = self._allocations(task)
        logits, steps = self._learn(task, allocations, tick)
        masked = {name: allocations[name](theta)[0] for name, theta in logits.items()}
        return PrunedBlock(masked, steps)

    def _learn(
        self, task: BlockTask, allocations: dict[str, Allocation], tick: Callable[[], Any]
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Minimize Eqn. 2 over the windows, one Prodigy step per window; returns logits by projection and the log."""
        # One flat parameter, starting at 0: every candidate equally likely, sparsity one half.
        shapes = {name: (allocation.groups, self.candidates) for name, allocation in allocations.items()}
        sizes = [groups * candidates for groups, candidates in shapes.values()]
        flat = nn.Parameter(torch.zeros(sum(sizes), device=task.inputs.device))
        optimizer = prodigyopt.Prodigy([flat], lr=1.0, d_coef=self.d_coef, weight_decay=0.0)
        log = []
        for window in self._order(len(task.inputs)):
            with torch.enable_grad():
                logits = {n: part.view(shapes[n]) for n, part in zip(shapes, flat.split(sizes), strict=True)}
                error, sparsity = self._forward(task, allocations, logits, window)
                loss = error + self.penalty * ((sparsity - self.sparsity) / self.sparsity) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.append(torch.stack([loss, error, sparsity]).detach())
            tick()
        keys = ("loss", "reconstruction_error", "sparsity")
        steps = [dict(zip(keys, values, strict=True)) for values in torch.stack(log).tolist()]
        return {n: part.view(shapes[n]).detach() for n, part in zip(shapes, flat.split(sizes), strict=True)}, steps

    def _forward(
        self, task: BlockTask, allocations: dict[str, Allocation], logits: dict[str, Tensor], window: int
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction error of one window and the block's sparsity, weighted by the projections' sizes."""
        masked, zeros = {}, 0.0
        for name, allocation in allocations.items():
            masked[name], alpha = allocation(logits[name])
            zeros = zeros + alpha.mean() * allocation.weight.numel()
        output = run_block(task.block, task.inputs[window : window + 1], task.call, masked)
        error = reconstruction_error(output, task.targets[window : window + 1])
        return error, zeros / sum(allocation.weight.numel() for allocation in allocations.values())

    def _allocations(self, task: BlockTask) -> dict[str, Allocation]:
        rates = candidate_rates(self.candidates).to(task.inputs.device)
        allocations = {}
        for name, projection in projections(task.block).items():
            weight = projection.weight.detach()
            scores = importance(self.importance, weight, task.statistics[name])
            groups = len(weight) // self._group_rows(weight)
            allocations[name] = Allocation.create(weight, scores, rates, groups, self.smooth)
        return allocations

    def _group_rows(self, weight: Tensor) -> int:
        return {"row": 1, "layer": len(weight)}.get(self.row_group, self.row_group)

    def _order(self, n_samples: int) -> Iterator[int]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield from (
                range(n_samples) if generator is None else torch.randperm(n_samples, generator=generator).tolist()
            )
