"""Sparsities of blocks by what pruning each one alone costs the model's predictions.

D_b(s) is the KL divergence, per token, from the dense model's predictions to those of the model in which Wanda prunes
block b alone to sparsity s. It is measured at two sparsities; between them its logarithm is taken as linear.
The budgets minimize the sum of D_b(s_b). With n_b weights in block b, a further pruned weight then costs the same in
every block whose budget lies inside the spread:

    D_b'(s_b) / n_b = price,    sum of n_b s_b = sparsity * sum of n_b
"""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.config import checked
from besa.decoder import embed, find_blocks, projections, record_calls, run_block, run_head
from besa.experts import join, split
from besa.importance import collect_statistics, wanda
from besa.masks import keep_largest
from besa.system import resolve_device
from besa.walk import frozen

SAMPLE = 4, 128  # windows on which the divergence is measured, and tokens of each


@checked
def block_budgets(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    sparsity: float,
    spread: float = 0.15,
    *,
    device: str | torch.device | None = None,
) -> tuple[float, ...]:
    """One sparsity per block for `sparsities=`: more where pruning changes the model's predictions less.

    Args:
        windows: calibration token ids, of which a few are used.
        sparsity: of all projections together.
        spread: largest distance of a block's sparsity from it.
        device: move one block at a time there, as in `prune`.
    """
    compute_device = None if device is None else resolve_device(device)
    spread = max(0.001, min(spread, sparsity, 0.95 - sparsity))
    rates = sparsity - spread, sparsity + spread
    sizes = [sum(linear.weight.numel() for linear in projections(block).values()) for block in find_blocks(model)]
    table = divergences(model, windows[: SAMPLE[0], : SAMPLE[1]], rates, compute_device)
    return share_out(table, rates, np.array(sizes), sparsity)


def divergences(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    rates: tuple[float, float],
    device: torch.device | None = None,
) -> np.ndarray:
    """D_b at each rate, (blocks, 2), in one pass over the blocks, each on `device` in its turn."""
    home = model.device
    place = device or home
    pruned = {}  # hidden states of the models in which one block is pruned, by block and rate
    with frozen(model, place):
        calls = record_calls(model, windows)
        hidden = embed(model, windows).to(place)
        for index, block in enumerate(find_blocks(model)):
            split(block.to(place))
            call = calls[index].to(place)
            with collect_statistics(projections(block), len(windows), False) as statistics:
                output = run_block(block, hidden, call)
            pruned = {key: run_block(block, states, call) for key, states in pruned.items()}
            for column, rate in enumerate(rates):
                weights = {
                    name: linear.weight * keep_largest(wanda(linear.weight, statistics[name]), rate)
                    for name, linear in projections(block).items()
                }
                pruned[index, column] = run_block(block, hidden, call, weights)
            hidden = output
            join(block).to(home)
        dense = run_head(model, hidden.to(home), calls[0]).float().log_softmax(-1)
        table = np.zeros((len(calls), 2))
        for key, states in pruned.items():
            predicted = run_head(model, states.to(home), calls[0]).float().log_softmax(-1)
            table[key] = float((dense.exp() * (dense - predicted)).sum(-1).mean())
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
    return tuple(budgets.tolist())  # pyright: ignore[reportPossiblyUnboundVariable]
