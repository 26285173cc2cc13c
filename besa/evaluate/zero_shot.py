"""Zero-shot accuracy as the paper measures it, through lm-eval's own tasks and scoring."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.evaluate.tasks import TASKS, check_tasks, load_task, quiet
from besa.machine.device import way_out
from besa.machine.fields import checked, documented
from besa.machine.processes import rank
from besa.machine.state import StateFile, sum_of_weights
from besa.walk import evaluating


@documented
@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """What a model scored: one row per task, one answer per question."""

    rows: list[dict[str, Any]]
    """By task what `to_frame` shows."""
    answers: list[dict[str, Any]]
    """By question: `task`, `question` (its number), and whether the answer is `correct`, among others."""
    limit: int | None
    """Questions asked per task, a subset drawn by `seed`; None: all."""
    seed: int
    """Of that subset."""
    lm_eval: str
    """Version of lm-eval."""

    @property
    def correct(self) -> dict[str, np.ndarray]:
        """Whether each question got the right answer, by task: rows that were asked the same compare one by one."""
        marks = lambda task: [answer["correct"] for answer in self.answers if answer["task"] == task]
        return {row["task"]: np.array(marks(row["task"])) for row in self.rows}

    @property
    def average(self) -> float:
        """Mean accuracy over the tasks, each of the same weight, as a fraction."""
        return sum(row["acc"] for row in self.rows) / len(self.rows)

    @property
    def average_stderr(self) -> float:
        """Standard error of `average`: the tasks' are independent."""
        return math.sqrt(sum(row["stderr"] ** 2 for row in self.rows)) / len(self.rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per task and the average.

        Columns: `acc` and its standard error `stderr`, as fractions; `chance`, what guessing gets; `n` questions asked
        `of` how many; `version`, lm-eval's of the task; `questions`, a hash of the documents asked about.
        """
        average = {
            "task": "average",
            "acc": self.average,
            "stderr": self.average_stderr,
            "version": "",
            "questions": "",
        }
        average |= {name: sum(row[name] for row in self.rows) for name in ("n", "of")}
        average["chance"] = sum(row["chance"] for row in self.rows) / len(self.rows)
        return pd.DataFrame([*self.rows, average]).set_index("task")


@checked
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    progress: bool = True,
    *,
    checkpoint: Path | str | None = None,
) -> ZeroShot:
    """How often the right choice is the likeliest continuation of its question: lm-eval's `acc`, no examples.

    acc = mean over questions of [argmax_c sum log p(tokens of choice c | question) = the right c]: log-probabilities in
    float32, not divided by the choice's length (`acc_norm` is), and no token before the question but Gemma's <bos>.

    Args:
        model, tokenizer: as `load_model` gives them.
        tasks: of piqa, boolq, hellaswag, winogrande, arc_easy, arc_challenge.
        limit: questions per task, drawn by `seed`, the same for every model; None asks all.
        batch_size: contexts per batch; "auto" bounds their tokens (`likelihood`).
        seed: of the questions that a `limit` draws.
        progress: show a bar over the choices.
        checkpoint: a file for the answers so far; after an interruption the same call goes on from there, to the same
            bits. Under torchrun a file per rank.

    Raises:
        ValueError: unknown or repeated task, `limit` or `batch_size` below 1, a choice beyond the model's context, a
            checkpoint of another run, or log-likelihoods that are not finite; the last names the task, the others come
            before any work.
        FileNotFoundError: the questions are neither local nor embedded and the hub did not deliver them.
    """
    import lm_eval.evaluator  # slow to import, and only here needed

    from besa.evaluate.likelihood import SharedContexts

    check_request(tasks, limit, batch_size)
    asked = {"tasks": list(tasks), "limit": limit, "seed": seed, "batch_size": batch_size, "device": model.device.type}
    state = StateFile(_of_rank(checkpoint), "zero_shot", lambda: asked | {"weights": sum_of_weights(model)})
    loaded = {name: load_task(name) for name in tasks}
    available = {name: len(task.eval_docs) for name, task in loaded.items()}
    numbers = {}
    for name, task in loaded.items():
        numbers[name] = _keep_asked(task.dataset, TASKS[name].split, limit, seed)
    with evaluating(model):
        lm = SharedContexts(model, tokenizer, batch_size, progress, state)
        with quiet():
            outcome = lm_eval.evaluator.evaluate(lm, loaded)
    rows = [_row(name, outcome, available[name]) for name in tasks]
    samples = [(name, numbers[name][sample["doc_id"]], sample) for name in tasks for sample in outcome["samples"][name]]
    answers = [_answer(*sample, model.dtype) for sample in samples]
    return ZeroShot(rows=rows, answers=answers, limit=limit, seed=seed, lm_eval=lm_eval.__version__)


@checked
def check_request(tasks: Sequence[str], limit: int | None, batch_size: int | Literal["auto"] = "auto") -> None:
    """Refuse what `zero_shot` would, before long work.

    Raises:
        ValueError: as `zero_shot`.
    """
    check_tasks(tasks)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question per task, or None for all, not {limit}")
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size must be 'auto' or at least 1, not {batch_size!r}")


def _of_rank(checkpoint: Path | str | None) -> Path | str | None:
    """Its own file for every rank but the first."""
    return f"{checkpoint}.rank{rank()}" if checkpoint and rank() else checkpoint


def _keep_asked(dataset: dict[str, Any], split: str, limit: int | None, seed: int) -> list[int]:
    """Leave the documents that are asked, for lm-eval's own `samples` reads all; returns their numbers, in order."""
    n = len(dataset[split])
    numbers = sorted(random.Random(seed).sample(range(n), n if limit is None else min(limit, n)))
    dataset[split] = dataset[split].select(numbers)
    return numbers


def _row(name: str, outcome: dict[str, Any], available: int) -> dict[str, Any]:
    result, samples = outcome["results"][name], outcome["samples"][name]
    stderr = result["acc_stderr,none"]  # "N/A" for one question
    return {
        "task": name,
        "acc": float(result["acc,none"]),
        "stderr": float(stderr) if isinstance(stderr, float) else math.nan,
        "chance": sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples),
        "n": len(samples),
        "of": available,
        "version": outcome["versions"][name],
        "questions": hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()[:12],
    }


def _answer(name: str, question: int, sample: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Number of the question in its task, log-likelihood of each choice in nats, whether the likeliest was right."""
    logliks = [loglik for loglik, _ in sample["filtered_resps"]]
    if not all(map(math.isfinite, logliks)):  # the largest of them would still be some choice
        raise ValueError(
            f"{name}, question {question}: the choices' log-likelihoods are {logliks}: the model's outputs are "
            f"not finite; {way_out(dtype)}"
        )
    return {"task": name, "question": question, "logliks": logliks, "correct": bool(sample["acc"])}
