"""Baselines in the same loop: magnitude, Wanda and SparseGPT."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from besa.config import config
from besa.importance import inverse_cholesky, magnitude, wanda
from besa.loop import PatternMethod
from besa.masks import parse_pattern
from besa.quantize import Quantize
from besa.shapes import KeepMask, Matrix
from besa.walk import Block, PrunedBlock

BLOCK_COLUMNS = 128  # columns whose mask SparseGPT chooses at once, as released; with a pattern, M columns


@config
class Magnitude(PatternMethod):
    """Prune the smallest weights of each projection (Han et al. 2015)."""

    name: ClassVar[str] = "magnitude"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        for name, projection in block.projections.items():
            scores = magnitude(projection.weight).flatten()[None]
            pruned.keep_masks[name] = self.keep_mask(scores, self.sparsity_of(block)).view_as(projection.weight)
            pruned.weights[name] = projection.weight.masked_fill(~pruned.keep_masks[name], 0)
        return pruned


@config
class Wanda(PatternMethod):
    """Prune the least important weights of each row, by |W_ij| * ||x_j||_2 (Sun et al. 2024).

    Args:
        quantize: quantize by min-max first, and prune the quantized weights.
    """

    quantize: Quantize | None = None

    name: ClassVar[str] = "wanda"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        for name, projection in block.projections.items():
            weight = projection.weight
            if self.quantize:
                weight = self.quantize.codes(weight).dequantize(weight.dtype)
            scores = wanda(weight, block.statistics[name])
            pruned.keep_masks[name] = self.keep_mask(scores, self.sparsity_of(block))
            pruned.weights[name] = weight.masked_fill(~pruned.keep_masks[name], 0)
        return pruned


@config
class SparseGPT(PatternMethod):
    """Prune column by column and correct the columns to the right (Frantar and Alistarh 2023, Algorithm 1)."""

    name: ClassVar[str] = "sparsegpt"
    needs_hessian: ClassVar[bool] = True

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        for name, projection in block.projections.items():
            hessian = block.statistics[name].hessian
            assert hessian is not None  # `needs_hessian`
            outcome = self._prune_projection(projection.weight, hessian, self.sparsity_of(block))
            pruned.weights[name], pruned.keep_masks[name], pruned.notes[name] = outcome
        return pruned

    def _prune_projection(self, weight: Matrix, hessian: Tensor, sparsity: float) -> tuple[Matrix, KeepMask, str]:
        def choose(scores: Tensor) -> Tensor:
            return self.keep_mask(scores.flatten()[None], sparsity).view_as(scores)

        upper, note = inverse_cholesky(hessian)
        no_input = hessian.diag() == 0
        new_weight = weight.float().masked_fill(no_input, 0.0)  # these columns are pruned first
        keep_mask = torch.empty_like(weight, dtype=torch.bool)
        n_chosen = parse_pattern(self.pattern)[1] if self.pattern else BLOCK_COLUMNS
        size = max(n_chosen, BLOCK_COLUMNS // n_chosen * n_chosen)
        for start in range(0, weight.shape[1], size):
            columns, right = slice(start, start + size), slice(start + size, None)
            pruned = _prune_columns(new_weight[:, columns], upper[columns, columns], choose, n_chosen)
            new_weight[:, columns], keep_mask[:, columns], errors = pruned
            new_weight[:, right] -= errors @ upper[columns, right]
        new_weight = torch.where(no_input & keep_mask, weight.float(), new_weight)
        return new_weight.to(weight.dtype), keep_mask, note


def _prune_columns(
    weight: Matrix, upper: Tensor, choose: Callable[[Tensor], Tensor], n_chosen: int
) -> tuple[Matrix, KeepMask, Matrix]:
    """Prune some columns and spread each column's error over those to its right.

    The mask of `n_chosen` columns is chosen by the OBS saliency of their updated weights.
    """
    weight = weight.clone()
    errors = torch.zeros_like(weight)
    keep_mask = torch.empty_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % n_chosen == 0:
            chosen = slice(j, j + n_chosen)
            keep_mask[:, chosen] = choose(weight[:, chosen].square() / upper.diag()[chosen].square())
        errors[:, j] = weight[:, j] * ~keep_mask[:, j] / upper[j, j]
        weight[:, j:] -= errors[:, j : j + 1] * upper[j, j:]
    return weight.masked_fill_(~keep_mask, 0), keep_mask, errors
