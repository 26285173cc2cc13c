"""Magnitude, Wanda and SparseGPT as block methods of the same loop, and every method by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa.besa import Besa
from besa.importance import InputStatistics, inverse_cholesky, magnitude, wanda
from besa.kernels import spread_errors
from besa.machine.fields import Count, Positive, documented
from besa.masks import parse_pattern
from besa.prune import DEFAULT_SPARSITY, Method
from besa.quantize import Quantize
from besa.walk import Block, PrunedBlock


@documented
@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """The smallest weights of each projection go (Han et al. 2015)."""

    name: ClassVar[str] = "magnitude"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        for name, projection in block.projections.items():
            scores = magnitude(projection.weight).flatten()[None]
            pruned.keep_masks[name] = self.keep_mask(scores, self.sparsity_of(block)).view_as(projection.weight)
            pruned.weights[name] = projection.weight * pruned.keep_masks[name]
        return pruned


@documented
@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """The least important weights of each row go, by |W_ij| * ||x_j||_2 (Sun et al. 2024)."""

    quantize: Quantize | None = None
    """Quantize the weights by plain min-max first and prune what that makes of them; with sparsity 0, quantize only."""

    name: ClassVar[str] = "wanda"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, statistics = PrunedBlock(), block.statistics()
        for name, projection in block.projections.items():
            weight = projection.weight
            codes = self.quantize.codes(weight) if self.quantize else None
            scores = wanda(codes.dequantize(weight.dtype) if codes else weight, statistics[name])
            keep_mask = pruned.keep_masks[name] = self.keep_mask(scores, self.sparsity_of(block))
            if codes:
                pruned.quantized[name] = codes.pruned(keep_mask)
            pruned.weights[name] = pruned.quantized[name].dequantize(weight.dtype) if codes else weight * keep_mask
        return pruned


@documented
@dataclass(frozen=True, kw_only=True)
class SparseGPT(Method):
    """Prune column by column and correct the columns to the right (Frantar and Alistarh 2023, Algorithm 1)."""

    damping: Positive = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean; raised where the Hessian cannot be factorized."""
    block_columns: Count = 128
    """Columns that share one selection of what is pruned; with a pattern, each group of M has its own."""
    mask_only: bool = False
    """Leave the kept weights as they were: what its choice is worth without its correction. Not in their paper."""

    name: ClassVar[str] = "sparsegpt"
    needs_hessian: ClassVar[bool] = True

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, statistics = PrunedBlock(), block.statistics(hessian=True)
        for name, projection in block.projections.items():
            found = self._prune_projection(projection.weight, statistics[name], self.sparsity_of(block))
            weight, keep_mask, note = found
            pruned.weights[name] = projection.weight * keep_mask if self.mask_only else weight
            pruned.keep_masks[name], pruned.notes[name] = keep_mask, note
        return pruned

    def _prune_projection(
        self, weight: Float[Tensor, "rows columns"], statistics: InputStatistics, sparsity: float
    ) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"], str]:
        factor = inverse_cholesky(statistics.hessian, self.damping)
        new = weight.float().masked_fill(statistics.hessian.diag() == 0, 0.0)
        keep_mask = torch.empty_like(weight, dtype=torch.bool)
        choose = lambda scores: self.keep_mask(scores.flatten()[None], sparsity).view_as(scores)
        together = parse_pattern(self.pattern)[1] if self.pattern else self.block_columns
        size = max(together, self.block_columns // together * together)
        for start in range(0, weight.shape[1], size):
            columns, right = slice(start, start + size), slice(start + size, None)
            pruned = _prune_columns(new[:, columns], factor.upper[columns, columns], choose, together)
            new[:, columns], keep_mask[:, columns], errors = pruned
            new[:, right] -= errors @ factor.upper[columns, right]
        note = f"damping {factor.damping:g}, {str(factor.dtype).removeprefix('torch.')}"
        return new.to(weight.dtype), keep_mask, note


def _prune_columns(
    weight: Float[Tensor, "rows n"], upper: Float[Tensor, "n n"], choose: Callable[[Tensor], Tensor], together: int
) -> tuple[Float[Tensor, "rows n"], Bool[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Zero what is not kept, spreading each column's error over the columns right of it.

    What is kept of columns that are chosen `together` is chosen by their saliency as they then are.

    Returns:
        the weight, its keep-mask, and the errors.
    """
    weight, errors, keep = weight.clone(), torch.zeros_like(weight), torch.empty_like(weight, dtype=torch.bool)
    for j in range(0, weight.shape[1], together):
        here = slice(j, j + together)
        keep[:, here] = choose(weight[:, here].square() / upper.diag()[here].square())  # OBS saliency
        spread_errors(weight, keep, upper, errors, range(j, min(j + together, weight.shape[1])))
    return weight * keep, keep, errors


def named_method(name: str, sparsity: float = DEFAULT_SPARSITY, **fields) -> Method:
    """A method by the name it has in tables; `fields` go to its dataclass.

    Raises:
        ValueError: unknown name.
    """
    if name == "besa-row-wise":
        return Besa(sparsity=sparsity, **fields)
    if name == "besa-layer-wise":
        recipe = {"row_group": "layer", "targets": "dense", "d_coef": 0.5}  # published: 0.05, 0.5 or, for LLaMA-7B, 50
        return Besa(sparsity=sparsity, **recipe | fields)
    methods = {method.name: method for method in (Magnitude, Wanda, SparseGPT)}
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods)}, besa-layer-wise, besa-row-wise")
    return methods[name](sparsity=sparsity, **fields)
