"""Perplexity as the paper measures it."""

import math

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.blocks import BlockCall, check_tokens, embed, find_blocks, record_calls, run_block, run_head

LOGITS_AT_ONCE = 2**24
"""64 MiB in float32."""


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: Int64[Tensor, "n_tokens"], seq_len: int = 2048, progress: bool = True
) -> float:
    """exp of the mean negative log-likelihood, in nats per token, over non-overlapping segments.

    The last incomplete segment is left out, and the first token of each is not predicted: seq_len - 1 predictions per
    segment. The head runs on a few tokens at a time, so that the logits of a segment never exist at once.

    Raises:
        ValueError: fewer than `seq_len` tokens, not a flat int64 stream, ids beyond the vocabulary, or a `seq_len`
            longer than the model's context.
    """
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be a flat stream (n_tokens,), not {tuple(tokens.shape)}")
    check_tokens(model, tokens, seq_len)
    n_segments = len(tokens) // seq_len
    if n_segments == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one segment of seq_len={seq_len}; lower seq_len")
    segments = tokens[: n_segments * seq_len].view(n_segments, seq_len)
    bar = tqdm(segments.split(1), desc="perplexity", unit="segment", leave=False, disable=not progress)
    training = model.training
    model.eval()
    try:
        calls = record_calls(model, segments[:1])
        total = sum(_negative_log_likelihood(model, segment, calls) for segment in bar)
    finally:
        model.train(training)
    return math.exp(total / (n_segments * (seq_len - 1)))


def _negative_log_likelihood(
    model: PreTrainedModel, segment: Int64[Tensor, "1 seq_len"], calls: list[BlockCall]
) -> float:
    """Summed over the segment's predicted tokens, in nats."""
    hidden = embed(model, segment, calls[0].returns_tuple)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    labels = segment[0, 1:].to(hidden.device)
    step = max(1, LOGITS_AT_ONCE // model.get_input_embeddings().num_embeddings)
    total = 0.0
    for part, targets in zip(hidden[:, :-1].split(step, dim=1), labels.split(step), strict=True):
        logits = run_head(model, part, calls[0].returns_tuple)[0].float()  # (step, vocab)
        total += F.cross_entropy(logits, targets, reduction="sum").double()
    return float(total)
