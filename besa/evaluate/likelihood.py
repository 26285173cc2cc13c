"""Log-likelihoods of continuations, as lm-eval asks for them, with every context run once."""

import copy
import inspect
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from besa.evaluate.perplexity import LOGITS_AT_ONCE
from besa.evaluate.tasks import quiet
from besa.machine.memory import total_device
from besa.machine.processes import from_all, n_ranks, rank

CACHED_AT_ONCE = 0.1
"""Of the device's memory, at most so much goes to the keys and values of a batch."""
_NO_TOKEN = -100

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: something, the context's tokens, the continuation's tokens."""


class SharedContexts(HFLM):
    """lm-eval's model, but what several choices continue is run once.

    Each choice continues from the keys and values of its context; contexts with the same number of choices make a
    batch, padded on the left. lm-eval runs a context again for every choice of more than one token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: Any, progress: bool):
        with quiet():  # a copy, because lm-eval may give the tokenizer a padding token
            super().__init__(model, tokenizer=copy.deepcopy(tokenizer), add_bos_token=False, batch_size=batch_size)
        self._progress = progress
        # transformers 5.24 renamed the argument; its output's field likewise, which is why the cache is made here.
        renamed = "cache" in inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each request, log p(continuation | context) in nats and whether greedy decoding would write it."""
        answers: dict[int, tuple[float, bool]] = {}
        total = len(requests) // n_ranks()
        with tqdm(total=total, desc="zero-shot", unit="choice", leave=False, disable=not self._progress) as bar:
            for batch in itertools.islice(self._batches(requests), rank(), None, n_ranks()):  # this rank's share
                contexts, groups = zip(*batch, strict=True)
                members = [index for group in groups for index in group]
                scores = self._score(contexts, [requests[index][2] for index in members])
                answers |= dict(zip(members, scores, strict=True))
                bar.update(len(members))
        answers = {index: answer for share in from_all(answers) for index, answer in share.items()}
        return [answers[index] for index in range(len(requests))]

    def _batches(self, requests: list[Request]) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Lists of (context, the numbers of its requests), the longest contexts first."""
        groups = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            groups[tuple(context[-self._room(continuation) :])].append(index)
        n_cut = sum(len(context) > self._room(continuation) for _, context, continuation in requests)
        if n_cut:
            warnings.warn(
                f"{n_cut} prompts exceed the model's {self.max_length} tokens and lose their beginning", stacklevel=2
            )
        longest = lambda members: max(len(requests[index][2]) for index in members)
        alike = defaultdict(list)  # number of choices -> (tokens to run, context, its requests)
        for context, members in groups.items():
            n_tokens = len(context) + len(members) * longest(members)
            alike[len(members)].append((n_tokens, context, members))
        for alternatives in alike.values():
            alternatives.sort(reverse=True)
            while alternatives:
                n_tokens, _, members = alternatives[0]
                size = self._contexts_at_once(n_tokens, len(members))
                yield [(context, members) for _, context, members in alternatives[:size]]
                del alternatives[:size]

    def _room(self, continuation: list[int]) -> int:
        """Tokens that a context may have; the last of the continuation is predicted, not read."""
        if len(continuation) > self.max_length:
            raise ValueError(f"a choice of {len(continuation)} tokens exceeds the model's {self.max_length}")
        return self.max_length + 1 - len(continuation)

    def _contexts_at_once(self, n_tokens: int, n_choices: int) -> int:
        """How many contexts of so many tokens, with those of their choices, make a batch."""
        if self.batch_size != "auto":
            return self.batch_size
        at_once = LOGITS_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"]
        by_logits = at_once // (n_tokens * self.model.get_input_embeddings().num_embeddings)
        cached = n_choices * n_tokens * _cache_bytes(self.model)  # every choice gets a copy of its context's
        return max(1, min(by_logits, int(CACHED_AT_ONCE * total_device(self.device)) // cached))

    def _score(self, contexts: Sequence[tuple[int, ...]], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Of each continuation; as many belong to each context."""
        cache = DynamicCache(config=self.model.config)
        options = {self._cache_argument: cache, "use_cache": True}
        n_choices = len(continuations) // len(contexts)
        tokens = self._pad(contexts, 0, "left")  # (contexts, n)
        targets = self._pad(continuations, _NO_TOKEN, "right")  # (contexts * choices, longest)
        n, longest = tokens.shape[1], targets.shape[1]
        lengths = torch.tensor([[len(context)] for context in contexts], device=self.device)
        positions = torch.arange(-n, longest - 1, device=self.device) + lengths  # (contexts, n + longest - 1)
        # Padding right of a continuation needs no mask: causal attention does not look there.
        mask, positions = (positions >= 0).long(), positions.clamp(0, self.max_length - 1)
        first = {"attention_mask": mask[:, :n], "position_ids": positions[:, :n], "logits_to_keep": 1}
        logits = self.model(tokens, **first, **options).logits.repeat_interleave(n_choices, dim=0)
        if longest > 1:
            cache.batch_repeat_interleave(n_choices)
            mask, positions = (part.repeat_interleave(n_choices, dim=0) for part in (mask, positions[:, n:]))
            rest = self.model(targets[:, :-1].clamp(min=0), attention_mask=mask, position_ids=positions, **options)
            logits = torch.cat([logits, rest.logits], dim=1)  # (contexts * choices, longest, vocab)
        return _sum_scores(logits.float(), targets)

    def _pad(self, rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
        parts = [torch.tensor(row) for row in rows]
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side).to(self.device)


def _cache_bytes(model: PreTrainedModel) -> int:
    """Of the keys and values of one token."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    width = (getattr(config, "num_key_value_heads", None) or n_heads) * (
        getattr(config, "head_dim", None) or config.hidden_size // n_heads
    )
    return 2 * config.num_hidden_layers * width * model.dtype.itemsize


def _sum_scores(
    logits: Float[Tensor, "n longest vocab"], targets: Int64[Tensor, "n longest"]
) -> list[tuple[float, bool]]:
    """Log-likelihood in nats of each row of targets, and whether every target is the likeliest token."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_NO_TOKEN, reduction="none")
    greedy = ((logits.argmax(dim=-1) == targets) | (targets == _NO_TOKEN)).all(dim=1)
    return list(zip((-losses.view_as(targets).sum(dim=1)).tolist(), greedy.tolist(), strict=True))
