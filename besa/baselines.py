"""Magnitude, Wanda and SparseGPT as block methods of the same loop, and every method by name."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from besa.besa import Besa
from besa.importance import InputStatistics, inverse_cholesky, magnitude, wanda
from besa.machine.fields import documented
from besa.masks import keep_largest
from besa.prune import Method
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
            pruned.keep_masks[name] = keep_largest(scores, self.sparsity_of(block)).view_as(projection.weight)
            pruned.weights[name] = projection.weight * pruned.keep_masks[name]
        return pruned


@documented
@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """The least important weights of each row go, by |W_ij| * ||x_j||_2 (Sun et al. 2024)."""

    quantize: Quantize | None = None
    """Quantize the weights by plain min-max first and prune what that makes of them; with sparsity 0, quantize only."""

    name: ClassVar[str] = "wanda"

    def check(self, model: PreTrainedModel) -> None:
        if self.quantize:
            self.quantize.check(model)

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, statistics = PrunedBlock(), block.statistics()
        for name, projection in block.projections.items():
            weight = projection.weight
            codes = self.quantize.codes(weight) if self.quantize else None
            scores = wanda(codes.dequantize(weight.dtype) if codes else weight, statistics[name])
            keep_mask = pruned.keep_masks[name] = keep_largest(scores, self.sparsity_of(block))
            if codes:
                pruned.quantized[name] = codes.pruned(keep_mask)
            pruned.weights[name] = pruned.quantized[name].dequantize(weight.dtype) if codes else weight * keep_mask
        return pruned


@documented
@dataclass(frozen=True, kw_only=True)
class SparseGPT(Method):
    """Prune column by column and correct the columns to the right (Frantar and Alistarh 2023, Algorithm 1)."""

    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean; raised where the Hessian cannot be factorized."""
    block_columns: int = 128
    """Columns that share one selection of what is pruned."""

    name: ClassVar[str] = "sparsegpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping <= 0 or self.block_columns < 1:
            raise ValueError(f"damping ({self.damping}) and block_columns ({self.block_columns}) must be positive")

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, statistics = PrunedBlock(), block.statistics(hessian=True)
        for name, projection in block.projections.items():
            found = self._prune_projection(projection.weight, statistics[name], self.sparsity_of(block))
            weight, keep_mask, note = found
            pruned.weights[name], pruned.keep_masks[name], pruned.notes[name] = weight, keep_mask, note
        return pruned

    def _prune_projection(
        self, weight: Float[Tensor, "rows columns"], statistics: InputStatistics, sparsity: float
    ) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"], str]:
        factor = inverse_cholesky(statistics.hessian, self.damping)
        new = weight.float().masked_fill(statistics.hessian.diag() == 0, 0.0)
        keep_mask = torch.empty_like(weight, dtype=torch.bool)
        for start in range(0, weight.shape[1], self.block_columns):
            columns = slice(start, start + self.block_columns)
            upper = factor.upper[columns, columns]
            scores = new[:, columns].square() / upper.diag().square()  # OBS saliency
            keep = keep_mask[:, columns] = keep_largest(scores.flatten()[None], sparsity).view_as(scores)
            new[:, columns], errors = _prune_columns(new[:, columns], keep, upper)
            new[:, start + self.block_columns :] -= errors @ factor.upper[columns, start + self.block_columns :]
        note = f"damping {factor.damping:g}, {str(factor.dtype).removeprefix('torch.')}"
        return new.to(weight.dtype), keep_mask, note


def _prune_columns(
    weight: Float[Tensor, "rows n"], keep: Bool[Tensor, "rows n"], upper: Float[Tensor, "n n"]
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Zero what is not kept, spreading each column's error over the columns right of it; also returns the errors."""
    weight, errors = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        errors[:, j] = weight[:, j] * ~keep[:, j] / upper[j, j]
        weight[:, j:] -= errors[:, j : j + 1] * upper[j, j:]
    return weight * keep, errors


def named_method(name: str, sparsity: float = 0.5, **fields) -> Method:
    """A method by the name it has in tables; `fields` go to its dataclass.

    Raises:
        ValueError: unknown name.
    """
    if name == "besa-row-wise":
        return Besa(sparsity=sparsity, row_group="row", targets="pruned", **fields)
    if name == "besa-layer-wise":
        return Besa(sparsity=sparsity, row_group="layer", targets="dense", **fields)
    methods = {method.name: method for method in (Magnitude, Wanda, SparseGPT)}
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods)}, besa-layer-wise, besa-row-wise")
    return methods[name](sparsity=sparsity, **fields)
