"""How much each block's pruning costs the model, and a budget that the blocks share by it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.budget import whole_counts
from besa.decoder import BlockCall, embed, find_blocks, pruned_projections, record_calls, run_block, run_head
from besa.importance import collect_statistics, wanda
from besa.machine.device import way_out
from besa.machine.processes import rank
from besa.masks import keep_largest

MOST_APART = 0.1
"""How far a block's sparsity may lie from the model's, and at most half the way to 0 or to 1."""


@torch.no_grad()
def block_losses(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    levels: tuple[float, ...],
    progress: bool,
    ignore: Sequence[str] = (),
) -> Float32[Tensor, "blocks levels"]:
    """What pruning one block alone, by Wanda to each level, adds to the model's loss, in nats per token.

    Raises:
        ValueError: a loss is not finite.
    """
    calls, blocks = record_calls(model, windows[:1]), list(find_blocks(model))
    pruned = pruned_projections(model, ignore)
    hidden = [embed(model, window) for window in windows.split(1)]
    added = torch.zeros(len(blocks), len(levels))
    for index in tqdm(range(len(blocks)), desc="sensitivity", unit="block", disable=not progress or rank() > 0):
        block, linear = blocks[index], {name: each for (of, name), each in pruned.items() if of == index}
        with collect_statistics(linear, len(windows), hessian=False) as statistics:
            dense = [run_block(block, window, calls[index]) for window in hidden]
        scores = {name: wanda(projection.weight, statistics[name]) for name, projection in linear.items()}
        for number, level in enumerate(levels):
            masked = {name: linear[name].weight * keep_largest(each, level) for name, each in scores.items()}
            for window, tokens in zip(hidden, windows, strict=True):
                state = run_block(block, window, calls[index], masked)
                added[index, number] += _loss_from(model, index + 1, state, calls, tokens) / len(windows)
        if not torch.isfinite(added[index]).all():
            raise ValueError(f"the loss with block {index} pruned is not finite; {way_out(model.dtype)}")
        hidden = dense
    pairs = zip(hidden, windows, strict=True)
    return added - sum(_loss_from(model, len(blocks), state, calls, tokens) for state, tokens in pairs) / len(windows)


def _loss_from(model: PreTrainedModel, start: int, hidden: Tensor, calls: list[BlockCall], tokens: Tensor) -> float:
    """Mean negative log-likelihood of a window whose hidden states enter block `start`."""
    for block, call in zip(list(find_blocks(model))[start:], calls[start:], strict=True):
        hidden = run_block(block, hidden, call)
    labels, total = tokens[1:].to(hidden.device), 0.0
    for part, following in zip(hidden[:, :-1].split(512, dim=1), labels.split(512), strict=True):
        logits = run_head(model, part, calls[0])[0].float()
        total += float(nn.functional.cross_entropy(logits, following, reduction="sum"))
    return total / len(labels)


def spread_over_blocks(
    losses: Float[Tensor, "blocks 2"], levels: tuple[float, float], sizes: list[int], sparsity: float
) -> tuple[float, ...]:
    """A sparsity for each block that adds least to the loss, the model's count met to the weight.

    The loss that a block adds is taken as exp(a + c s) through the two levels measured. Where the sum over the blocks
    is least, one more weight costs the same everywhere: c exp(a + c s) / size is equal, but for what `MOST_APART` cuts.

    Args:
        losses: from `block_losses`.
        sizes: weights of each block.
        sparsity: the model's.
    """
    log_loss = losses.double().clamp_min(1e-5).log()
    slope = ((log_loss[:, 1] - log_loss[:, 0]) / (levels[1] - levels[0])).clamp_min(0.5)
    start, size = log_loss.mean(1), torch.tensor(sizes, dtype=torch.float64)  # at the middle of the levels
    low, high = torch.tensor(-100.0).double(), torch.tensor(100.0).double()
    for _ in range(100):  # the log of what a weight costs, by bisection
        price = (low + high) / 2
        wanted = sum(levels) / 2 + (price + size.log() - slope.log() - start) / slope
        wanted = wanted.clamp(max(sparsity / 2, sparsity - MOST_APART), min((1 + sparsity) / 2, sparsity + MOST_APART))
        low, high = (price, high) if (wanted * size).sum() < sparsity * size.sum() else (low, price)
    counts = whole_counts(wanted * size, size.long(), round(sparsity * int(size.sum())))
    return tuple((counts.double() / size).tolist())
