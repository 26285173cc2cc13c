"""Log-likelihoods of continuations, as lm-eval asks for them, with every context run once."""

import contextlib
import copy
import hashlib
import inspect
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.decoder import run_blocks
from besa.evaluate.perplexity import logits_in_parts
from besa.evaluate.tasks import quiet
from besa.inputs.text import opens_with_bos
from besa.machine.processes import from_all, n_ranks, rank
from besa.machine.state import StateFile

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
"""In a batch: more are no faster, and differ more in length."""
FLOATS_AT_ONCE = 2**22
"""Of logits: what is larger than 16 MiB a CPU's allocator asks the system for, every time."""

Request = tuple[Any, list[int], list[int]]
"""As lm-eval passes it: a key that is not used here, the context's tokens, the continuation's tokens."""


@contextlib.contextmanager
def _without_plans() -> Iterator[None]:
    """Leave out cuDNN's attention, which a GPU may take and which plans anew for every shape of a batch."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class SharedContexts(HFLM):
    """lm-eval's model, but what several choices continue is run once, and the head only where a choice is predicted.

    A context and its choices are one row of tokens, in which each choice sees its context and itself, at the positions
    that it has alone. Rows of about the same length make a batch, padded on the right. lm-eval runs a context again for
    every choice of more than one token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: Any,
        progress: bool,
        state: StateFile | None = None,
    ):
        self._text_config = model.config.get_text_config()
        begins = opens_with_bos(self._text_config.model_type)
        with quiet():  # a copy, because lm-eval may give the tokenizer a padding token
            super().__init__(model, tokenizer=copy.deepcopy(tokenizer), add_bos_token=begins, batch_size=batch_size)
        self._progress, self._state = progress, state or StateFile(None, "", dict)
        kinds = [getattr(self._text_config, name, None) or () for name in ("layer_types", "attention_layers")]
        self._kinds = set().union(*kinds)
        # A model that takes no mask and positions of ours runs each choice with its context in a row of its own.
        self._shares = (
            self._kinds <= {"full_attention", "sliding_attention"}
            and self._text_config._attn_implementation in ("sdpa", "eager")
            and not getattr(self._text_config, "alibi", False)
            and "position_ids" in inspect.signature(model.forward).parameters
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each request, log p(continuation | context) in nats and whether greedy decoding would write it."""
        asked = hashlib.sha256(repr([request[1:] for request in requests]).encode()).hexdigest()
        answers = (self._state.read(questions=asked) or {"answers": {}})["answers"]
        options = {"desc": "zero-shot", "unit": "choice", "leave": False, "disable": not self._progress or rank() > 0}
        with tqdm(total=len(requests) // n_ranks(), initial=len(answers), **options) as bar:
            for batch in itertools.islice(self._batches(requests), rank(), None, n_ranks()):  # this rank's share
                members = [index for _, group in batch for index in group]
                if members[0] in answers:  # batches are found whole
                    continue
                scores = self._score([(row, [requests[index][2] for index in group]) for row, group in batch])
                answers |= dict(zip(members, scores, strict=True))
                bar.update(len(members))
                self._state.write({"answers": answers})
        self._state.write({"answers": answers}, at_once=True)
        every = {index: answer for share in from_all(answers) for index, answer in share.items()}
        return [every[index] for index in range(len(requests))]

    def _batches(self, requests: list[Request]) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Lists of (context, the numbers of its requests), the longest first."""
        groups = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            alone = None if self._shares else index
            groups[tuple(context[-self._room(continuation) :]), alone].append(index)
        n_cut = sum(len(context) > self._room(continuation) for _, context, continuation in requests)
        if n_cut:
            warnings.warn(
                f"{n_cut} prompts exceed the model's {self.max_length} tokens and lose their beginning", stacklevel=2
            )
        n_tokens = lambda context, members: len(context) + sum(len(requests[index][2]) - 1 for index in members)
        rows = [(n_tokens(context, members), context, members) for (context, _), members in groups.items()]
        rows.sort(reverse=True)
        while rows:
            size = self._rows_at_once(rows[0][0])
            yield [(context, members) for _, context, members in rows[:size]]
            del rows[:size]

    def _room(self, continuation: list[int]) -> int:
        """Tokens that a context may have; the last of the continuation is predicted, not read."""
        if len(continuation) > self.max_length:
            raise ValueError(f"a choice of {len(continuation)} tokens exceeds the model's {self.max_length}")
        return self.max_length + 1 - len(continuation)

    def _rows_at_once(self, n_tokens: int) -> int:
        """How many rows of so many tokens make a batch."""
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, TOKENS_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"] // n_tokens)

    def _score(self, rows: list[tuple[Sequence[int], list[list[int]]]]) -> list[tuple[float, bool]]:
        """Of each context's choices, one after the other."""
        tokens, owners, positions, before = zip(*(_row(*row) for row in rows), strict=True)
        tokens, owners, positions = self._pad(tokens, 0), self._pad(owners, -1), self._pad(positions, 0)
        options = {"attention_mask": self._masks(owners, positions), "position_ids": positions} if self._shares else {}
        with _without_plans():
            hidden, call = run_blocks(self.model, tokens, **options)
        choices = [choice for _, group in rows for choice in group]
        labels = torch.tensor([token for choice in choices for token in choice], device=hidden.device)
        at = [(number, column) for number, columns in enumerate(before) for column in columns]
        logits = logits_in_parts(self.model, hidden[tuple(zip(*at, strict=True))], labels, call)
        found = torch.cat([_scores(*part) for part in logits]).cpu().split([len(choice) for choice in choices])
        return [(float(scores[:, 0].sum()), bool(scores[:, 1].all())) for scores in found]

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Int64[Tensor, "rows n"]:
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value).to(self.device)

    def _masks(
        self, owners: Int64[Tensor, "rows n"], positions: Int64[Tensor, "rows n"]
    ) -> Float[Tensor, "rows 1 n n"] | dict[str, Tensor]:
        """What is added to the attention scores; of each kind of block, if the model has two."""
        distance = positions[:, :, None] - positions[:, None]  # (rows, query, key)
        seen = ((owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])) & (distance >= 0)
        window = getattr(self._text_config, "sliding_window", None)
        near = seen & (distance < window) if window else seen
        lowest = torch.finfo(self.model.dtype).min
        added = lambda mask: (~mask).to(self.model.dtype).mul_(lowest)[:, None]
        if len(self._kinds) == 2:
            return {"full_attention": added(seen), "sliding_attention": added(near)}
        return added(seen if self._kinds == {"full_attention"} else near)


def _scores(logits: Float[Tensor, "n vocab"], labels: Int64[Tensor, "n"]) -> Float32[Tensor, "n 2"]:
    """Of each target, its log-likelihood in nats, and 1 where no token is likelier."""
    found, step = [], max(1, FLOATS_AT_ONCE // logits.shape[1])
    for part, wanted in zip(logits.split(step), labels.split(step), strict=True):
        part = part.float()
        losses = F.cross_entropy(part, wanted, reduction="none")
        found.append(torch.stack([-losses, (part.gather(1, wanted[:, None])[:, 0] == part.amax(dim=1)).float()], dim=1))
    return torch.cat(found)


def _row(context: Sequence[int], choices: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """A context and its choices in one row: tokens; the owner of each (0: the context, k: the k-th choice); where it
    stands; and for each token of a choice the column that predicts it. A choice's last token is not read."""
    tokens, owners, positions, before = list(context), [0] * len(context), list(range(len(context))), []
    for number, choice in enumerate(choices, start=1):
        before += [len(context) - 1, *range(len(tokens), len(tokens) + len(choice) - 1)]
        positions += range(len(context), len(context) + len(choice) - 1)
        owners += [number] * (len(choice) - 1)
        tokens += choice[:-1]
    return tokens, owners, positions, before
