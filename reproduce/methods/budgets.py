"""Sparsity budgets by block of other authors."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import find_blocks, projections
from besa.importance import InputStatistics, collect_statistics, wanda


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
