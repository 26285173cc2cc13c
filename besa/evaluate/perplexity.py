"""Perplexity as the paper measures it, and how far pruning moves the hidden states."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.decoder import BlockCall, check_tokens, context_of, embed, find_blocks, record_calls, run_block, run_head
from besa.inputs.text import with_bos
from besa.machine.device import way_out
from besa.machine.fields import checked
from besa.machine.processes import from_all, n_ranks, rank, sum_
from besa.walk import evaluating

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Tokens times vocabulary that the head computes at once: 64 MiB and 1 GiB in float32."""
LARGEST_LOSS = math.log(sys.float_info.max)
"""Nats per token, whose exp is the largest float64."""
SPREAD_AT_ONCE = 8
"""Segments that run together where a model's weights do not all fit on the GPU, and come anew for every run."""


class Perplexity(float):
    """A number, which brings along what it is the exp of the mean of."""

    losses: Float64[Tensor, "n_segments"]
    """Mean negative log-likelihood of each segment, in nats per token: rows measured on the same text are compared
    segment by segment."""


@checked
@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: Int64[Tensor, "n_tokens"], seq_len: int = 2048, progress: bool = True
) -> Perplexity:
    """exp of the mean negative log-likelihood, in nats per token, over non-overlapping segments.

    The last incomplete segment is left out, and the first token of each is not predicted: seq_len - 1 predictions per
    segment. Gemma's begin with <bos> (`besa.inputs.text.with_bos`). The head runs on a few tokens at a time, so that
    the logits of a segment never exist at once.
    Under torchrun the ranks share the segments.

    Args:
        model: as `load_model` gives it, packed or not.
        tokens: from `test_tokens`; a part of them, such as `tokens[: 32 * seq_len]`, for a look.
        seq_len: tokens per segment, published 2048; numbers of other lengths are not comparable.
        progress: show a bar over the segments.

    Returns:
        A float; its `losses` (n_segments,) are the segments' own, in nats per token.

    Raises:
        ValueError: fewer than `seq_len` tokens, not a flat int64 stream, ids beyond the vocabulary, a `seq_len` longer
            than the model's context, or a segment whose own perplexity is NaN or beyond float64; names the segment.
    """
    check_tokens(model, tokens, seq_len)
    n_segments = count_segments(tokens, seq_len)
    config = model.config.get_text_config()
    segments, bos = tokens[: n_segments * seq_len].view(n_segments, seq_len), getattr(config, "bos_token_id", None)
    segments = with_bos(segments, config.model_type, bos)
    mine = segments[rank() :: n_ranks()]
    together = SPREAD_AT_ONCE if any(parameter.is_meta for parameter in model.parameters()) else 1
    losses, problem = torch.zeros(n_segments, dtype=torch.float64), None  # summed over each segment's tokens
    options = {"desc": "perplexity", "unit": "segment", "leave": False, "disable": not progress or rank() > 0}
    with evaluating(model), tqdm(total=len(mine), **options) as bar:
        batches = mine.split(together) if len(mine) else ()  # more ranks than segments
        calls = {n: record_calls(model, segments[:n]) for n in set(map(len, batches))}
        for number, batch in enumerate(batches):
            first = rank() + number * together * n_ranks()
            found = _negative_log_likelihoods(model, batch, calls[len(batch)])
            for segment, loss in enumerate(found):
                losses[first + segment * n_ranks()] = loss
                problem = problem or _problem(loss / (seq_len - 1), first + segment * n_ranks())
            if problem:
                break
            bar.update(len(batch))
    for each in filter(None, from_all(problem)):  # on every rank: none is to wait for one that is gone
        raise ValueError(f"{each} gives no finite perplexity; {way_out(model.dtype)}")
    losses = sum_(losses).tolist()
    value = Perplexity(math.exp(sum(losses) / (n_segments * (seq_len - 1))))
    value.losses = torch.tensor(losses, dtype=torch.float64) / (seq_len - 1)
    return value


def count_segments(tokens: Int64[Tensor, "n_tokens"], seq_len: int) -> int:
    """How many whole segments a text has.

    Raises:
        ValueError: fewer than `seq_len` tokens.
    """
    if len(tokens) < seq_len:
        raise ValueError(f"{len(tokens)} tokens do not fill one segment of seq_len={seq_len}; lower seq_len")
    return len(tokens) // seq_len


def _problem(nats: float, segment: int) -> str | None:
    """A mean loss that is NaN, or whose exp float64 does not hold, and where it arises."""
    return None if nats < LARGEST_LOSS else f"segment {segment}: a loss of {nats:.4g} nats per token"


def _negative_log_likelihoods(
    model: PreTrainedModel, segments: Int64[Tensor, "batch seq_len"], calls: list[BlockCall]
) -> Iterator[float]:
    """Of each segment, summed over its predicted tokens, in nats."""
    hidden = embed(model, segments)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    labels = segments[:, 1:].to(hidden.device)
    for states, following in zip(hidden[:, :-1], labels, strict=True):
        logits = logits_in_parts(model, states, following, calls[0])
        yield float(sum(F.cross_entropy(each.float(), wanted, reduction="sum").double() for each, wanted in logits))


def logits_in_parts(
    model: PreTrainedModel, states: Float[Tensor, "n hidden"], labels: Int64[Tensor, "n"], call: BlockCall
) -> Iterator[tuple[Float[Tensor, "part vocab"], Int64[Tensor, "part"]]]:
    """What the head makes of hidden states, a few at a time, with what was to be predicted."""
    at_once = LOGITS_AT_ONCE["cpu" if states.device.type == "cpu" else "cuda"]
    step = max(1, min(context_of(model), at_once // model.get_input_embeddings().num_embeddings))
    for part, wanted in zip(states.split(step), labels.split(step), strict=True):
        yield run_head(model, part[None], call)[0], wanted


@torch.no_grad()
def hidden_state_errors(
    model: PreTrainedModel, dense: PreTrainedModel, windows: Int64[Tensor, "n_windows seq_len"], progress: bool = True
) -> list[dict[str, Any]]:
    """How far the hidden states behind each block have moved from the dense model's (paper Fig. 1a).

    With h_t and d_t what the pruned and the dense model's block puts out for token t, before any final norm:

        error = mean over a window's tokens of ||h_t - d_t|| / ||d_t||
        frobenius_error = ||h - d||_F / ||d||_F of the window

    In the second the tokens with the largest norms count most: where the first token's is 200 times the others', as
    behind block 11 of SmolLM2-135M, it says little about the others.

    Args:
        model: the pruned model, on any device; both models walk their blocks side by side, one window at a time.
        dense: the model before pruning.
        windows: token ids.

    Returns:
        A row per window and block with `window`, `block`, `error` and `frobenius_error`, no unit.

    Raises:
        ValueError: token ids that the model cannot take, or models of different shapes.
    """
    check_tokens(model, windows, windows.shape[-1])
    sizes = [(len(find_blocks(network)), network.config.get_text_config().hidden_size) for network in (model, dense)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models differ in (blocks, hidden size): {sizes[0]} and, dense, {sizes[1]}")
    rows = []
    with evaluating(model), evaluating(dense):
        calls = [record_calls(network, windows[:1]) for network in (model, dense)]
        for number in tqdm(range(len(windows)), desc="errors", unit="window", leave=False, disable=not progress):
            hidden, target = (embed(network, windows[number : number + 1]) for network in (model, dense))
            steps = zip(find_blocks(model), find_blocks(dense), *calls, strict=True)
            for index, (block, dense_block, call, dense_call) in enumerate(steps):
                hidden, target = run_block(block, hidden, call), run_block(dense_block, target, dense_call)
                error, other = _relative_errors(hidden, target.to(hidden.device)).tolist()
                rows.append({"window": number, "block": index, "error": error, "frobenius_error": other})
    return rows


def _relative_errors(
    hidden: Float[Tensor, "1 seq_len hidden"], target: Float[Tensor, "1 seq_len hidden"]
) -> Float32[Tensor, "2"]:
    """(mean over tokens, whole window) of ||hidden - target|| / ||target||."""
    lost, norm = (hidden.float() - target.float()).norm(dim=2), target.float().norm(dim=2)  # (1, seq_len)
    return torch.stack([(lost / norm).mean(), lost.norm() / norm.norm()])
