"""Log-likelihoods of continuations for lm-eval, with each context run once."""

import copy
import inspect
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.evaluate.perplexity import logits_in_parts, run_blocks
from besa.system import n_ranks, rank, sum_over_ranks

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}  # per batch
FLOATS_AT_ONCE = 2**22  # logits converted to float32 at once: malloc asks the system for each block above 16 MiB

Request = tuple[Any, list[int], list[int]]
"""From lm-eval: a key, the tokens of the context, the tokens of the continuation."""


class SharedContexts(HFLM):
    """lm-eval's model, but each context runs once for all of its choices, and the head only on predicted tokens.

    A context and its choices form one row of tokens. Each choice attends to its context and itself, at the positions
    that it has alone. Rows of similar length form a batch, padded on the right.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: Any, progress: bool):
        config = model.config.get_text_config()
        # lm-eval may give the tokenizer a padding token
        options = {"tokenizer": copy.deepcopy(tokenizer), "add_bos_token": "gemma" in config.model_type}
        super().__init__(model, batch_size=batch_size, **options)
        self._progress = progress
        self._window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None), getattr(config, "attention_layers", None)
        self._kinds = set().union(*filter(None, kinds))
        # Models that take no such mask or positions run each choice in a row of its own.
        self._shares = (
            self._kinds <= {"full_attention", "sliding_attention"}
            and config._attn_implementation in ("sdpa", "eager")
            and not getattr(config, "alibi", False)
            and "position_ids" in inspect.signature(model.forward).parameters
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding yields it) of each request."""
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)
        silent = not self._progress or rank() > 0
        with tqdm(total=len(requests), desc="zero-shot", unit="choice", leave=False, disable=silent) as bar:
            for batch in itertools.islice(self._batches(requests), rank(), None, n_ranks()):
                members = [index for _, group in batch for index in group]
                answers[members] = self._score([(row, [requests[index][2] for index in group]) for row, group in batch])
                bar.update(len(members) * n_ranks())
        return [(loglik, is_greedy == 1) for loglik, is_greedy in sum_over_ranks(answers).tolist()]

    def _batches(self, requests: list[Request]) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Yield lists of (context, indices of its requests), the longest first."""
        groups = defaultdict(list)
        n_cut = 0
        for index, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            if room < 1:
                raise ValueError(f"a choice of {len(continuation)} tokens exceeds the model's {self.max_length}")
            n_cut += len(context) > room
            groups[tuple(context[-room:]), None if self._shares else index].append(index)
        if n_cut:
            warnings.warn(f"{n_cut} prompts exceed the model's {self.max_length} tokens: cut on the left", stacklevel=2)
        rows = []
        for (context, _), members in groups.items():
            rows.append((len(context) + sum(len(requests[index][2]) - 1 for index in members), context, members))
        rows.sort(reverse=True)
        while rows:
            size = self._rows_at_once(rows[0][0])
            yield [(context, members) for _, context, members in rows[:size]]
            del rows[:size]

    def _rows_at_once(self, n_tokens: int) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, TOKENS_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"] // n_tokens)

    def _score(self, rows: list[tuple[Sequence[int], list[list[int]]]]) -> Float64[Tensor, "n_choices 2"]:
        """Log-likelihood of each choice, and 1 if greedy decoding yields it."""
        tokens, owners, positions, sources = zip(*(_row(*row) for row in rows), strict=True)
        tokens, owners, positions = self._pad(tokens, 0), self._pad(owners, -1), self._pad(positions, 0)
        options = {}
        if self._shares:
            options = {"attention_mask": self._masks(owners, positions), "position_ids": positions}
        hidden, call = run_blocks(self.model, tokens, **options)
        choices = [choice for _, group in rows for choice in group]
        labels = torch.tensor([token for choice in choices for token in choice], device=hidden.device)
        places = [(number, column) for number, columns in enumerate(sources) for column in columns]
        parts = logits_in_parts(self.model, hidden[tuple(zip(*places, strict=True))], labels, call)
        scores = torch.cat([_scores(*part) for part in parts]).cpu().split([len(choice) for choice in choices])
        totals = [[float(each[:, 0].sum()), float(each[:, 1].all())] for each in scores]
        return torch.tensor(totals, dtype=torch.float64)

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Int64[Tensor, "rows n"]:
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value).to(self.device)

    def _masks(
        self, owners: Int64[Tensor, "rows n"], positions: Int64[Tensor, "rows n"]
    ) -> Float[Tensor, "rows 1 n n"] | dict[str, Tensor]:
        """Additive attention masks; one for each kind of block if the model has two."""
        distance = positions[:, :, None] - positions[:, None]  # (rows, query, key)
        visible = ((owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])) & (distance >= 0)
        near = visible & (distance < self._window) if self._window else visible
        if len(self._kinds) == 2:
            return {"full_attention": self._additive(visible), "sliding_attention": self._additive(near)}
        return self._additive(visible if self._kinds == {"full_attention"} else near)

    def _additive(self, visible: Tensor) -> Float[Tensor, "rows 1 n n"]:
        return (~visible).to(self.model.dtype).mul_(torch.finfo(self.model.dtype).min)[:, None]


def _scores(logits: Float[Tensor, "n vocab"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    """Log-likelihood of each label in nats, and 1 if no token is likelier."""
    scores, step = [], max(1, FLOATS_AT_ONCE // logits.shape[1])
    for part, part_labels in zip(logits.split(step), labels.split(step), strict=True):
        part = part.float()
        losses = F.cross_entropy(part, part_labels, reduction="none")
        is_best = part.gather(1, part_labels[:, None])[:, 0] == part.amax(dim=1)
        scores.append(torch.stack([-losses, is_best.float()], dim=1))
    return torch.cat(scores)


def _row(context: Sequence[int], choices: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens of a context and its choices, owner of each (0: the context, k: the k-th choice), positions, and the
    column that predicts each token of a choice. The last token of a choice is not read."""
    tokens, owners, positions, sources = list(context), [0] * len(context), list(range(len(context))), []
    for number, choice in enumerate(choices, start=1):
        sources += [len(context) - 1, *range(len(tokens), len(tokens) + len(choice) - 1)]
        positions += range(len(context), len(context) + len(choice) - 1)
        owners += [number] * (len(choice) - 1)
        tokens += choice[:-1]
    return tokens, owners, positions, sources
