"""Perplexity over non-overlapping segments of a text."""

import math
import sys

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.config import checked
from besa.data.text import needs_bos, with_bos
from besa.decoder import (
    BlockCall,
    check_tokens,
    context_of,
    embed,
    find_blocks,
    record_calls,
    run_block,
    run_head,
    vocabulary_of,
)
from besa.system import finite_hint, n_ranks, rank, sum_over_ranks
from besa.walk import frozen

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Tokens times vocabulary per call of the head. Other values change the order of the sums, and so the last bits."""
LARGEST_LOSS = math.log(sys.float_info.max)


class Perplexity(float):
    """A float with `losses`, the mean negative log-likelihood of each segment in nats per token."""

    losses: Float64[Tensor, " n_segments"]


@checked
def perplexity(
    model: PreTrainedModel, tokens: Int64[Tensor, " n_tokens"], seq_len: int = 2048, progress: bool = True
) -> Perplexity:
    """Perplexity: exp of the mean negative log-likelihood over the seq_len - 1 predictions of each segment.

    An incomplete last segment is left out. Under torchrun the ranks share the segments.

    Args:
        tokens: from `test_tokens`, or a part of it such as `tokens[: 32 * seq_len]`.
        seq_len: tokens per segment; the paper takes 2048, and other lengths give other numbers.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no head; load the model with besa.load_model")
    check_tokens(model, tokens, seq_len)
    n_segments = len(tokens) // seq_len
    if n_segments == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill a segment of seq_len={seq_len}")
    segments = tokens[: n_segments * seq_len].view(n_segments, seq_len)
    if needs_bos(model):
        segments = with_bos(segments, model.config.get_text_config().bos_token_id)
    losses = torch.zeros(n_segments, dtype=torch.float64)  # sums over the tokens of each segment
    local_segments = range(rank(), n_segments, n_ranks())
    with frozen(model):
        calls = record_calls(model, segments[:1])
        silent = not progress or rank() > 0
        for index in tqdm(local_segments, desc="perplexity", unit="segment", leave=False, disable=silent):
            losses[index] = _negative_log_likelihood(model, segments[index : index + 1], calls)
    means = sum_over_ranks(losses) / (seq_len - 1)
    if not (means < LARGEST_LOSS).all():
        index = int((means < LARGEST_LOSS).int().argmin())
        raise ValueError(f"segment {index} has a loss of {means[index]:.4g} nats per token; {finite_hint(model.dtype)}")
    value = Perplexity(math.exp(sum(losses.tolist()) / (n_segments * (seq_len - 1))))
    value.losses = means
    return value


def _negative_log_likelihood(
    model: PreTrainedModel, segment: Int64[Tensor, "1 seq_len"], calls: list[BlockCall]
) -> float:
    """Sum over the predicted tokens of a segment, in nats."""
    hidden = embed(model, segment)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    labels = segment[0, 1:].to(hidden.device)
    at_once = LOGITS_AT_ONCE["cpu" if hidden.device.type == "cpu" else "cuda"]
    step = max(1, min(context_of(model), at_once // vocabulary_of(model)))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part, part_labels in zip(hidden[0, :-1].split(step), labels.split(step), strict=True):
        logits = run_head(model, part[None], calls[0])[0].float()
        total += F.cross_entropy(logits, part_labels, reduction="sum").double()
    return float(total)
