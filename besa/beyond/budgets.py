"""Sparsities of blocks by what pruning each one alone costs the model's predictions.

D_b(s) is the KL divergence, per token, from the dense model's predictions to those of the model in which Wanda prunes
block b alone to sparsity s. It is measured at two sparsities; between them its logarithm is taken as linear.
The budgets minimize the sum of D_b(s_b), so that one more pruned weight costs the same in every block of n_b weights
whose budget lies inside the spread:

    D_b'(s_b) / n_b = price,    sum of n_b s_b = sparsity * sum of n_b
"""

import numpy as np
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.config import checked
from besa.decoder import embed, find_blocks, projections, record_calls, run_block, run_head
from besa.importance import collect_statistics, wanda
from besa.masks import keep_largest
from besa.walk import frozen

SAMPLE = 4, 128  # windows on which the divergence is measured, and tokens of each


@checked
def block_budgets(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"], sparsity: float, spread: float = 0.15
) -> tuple[float, ...]:
    """One sparsity per block for `sparsities=`: more where pruning changes the model's predictions less.

    Args:
        windows: calibration token ids, of which a few are used.
        sparsity: of all projections together.
        spread: largest distance of a block's sparsity from it.
    """
    spread = max(0.001, min(spread, sparsity, 0.95 - sparsity))
    rates = sparsity - spread, sparsity + spread
    sizes = [sum(linear.weight.numel() for linear in projections(block).values()) for block in find_blocks(model)]
    return share_out(divergences(model, windows[: SAMPLE[0], : SAMPLE[1]], rates), rates, np.array(sizes), sparsity)


def divergences(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"], rates: tuple[float, float]
) -> np.ndarray:
    """D_b at each rate, (blocks, 2)."""
    blocks = find_blocks(model)
    table = np.zeros((len(blocks), 2))
    with frozen(model):
        calls = record_calls(model, windows)
        streams = [embed(model, windows)]  # hidden states before each block
        statistics = []
        for block, call in zip(blocks, calls, strict=True):
            with collect_statistics(projections(block), len(windows), False) as collected:
                streams.append(run_block(block, streams[-1], call))
            statistics.append(collected)
        dense = run_head(model, streams[-1], calls[0]).float().log_softmax(-1)
        for index, block in enumerate(blocks):
            linears = projections(block)
            scores = {name: wanda(linear.weight, statistics[index][name]) for name, linear in linears.items()}
            for column, rate in enumerate(rates):
                weights = {name: linear.weight * keep_largest(scores[name], rate) for name, linear in linears.items()}
                hidden = run_block(block, streams[index], calls[index], weights)
                for later in range(index + 1, len(blocks)):
                    hidden = run_block(blocks[later], hidden, calls[later])
                pruned = run_head(model, hidden, calls[0]).float().log_softmax(-1)
                table[index, column] = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    return table


def share_out(table: np.ndarray, rates: tuple[float, float], sizes: np.ndarray, sparsity: float) -> tuple[float, ...]:
    """The budgets, by bisection of the price's logarithm."""
    shares = sizes / sizes.sum()
    low, high = np.log(np.maximum(table, 1e-9)).T
    slope = np.maximum(high - low, 1e-3) / (rates[1] - rates[0])
    price_at_low = low + np.log(slope / shares)  # logarithms
    bottom, top = price_at_low.min(), (price_at_low + slope * (rates[1] - rates[0])).max()
    for _ in range(60):
        price = (bottom + top) / 2
        budgets = np.clip(rates[0] + (price - price_at_low) / slope, *rates)
        bottom, top = (price, top) if shares @ budgets < sparsity else (bottom, price)
    return tuple(budgets.tolist())
