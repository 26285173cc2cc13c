"""Zero-shot accuracy (Table 2) by lm-eval's tasks and scoring."""

import copy
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.config import checked
from besa.data.text import needs_bos
from besa.evaluate.tasks import TASKS, load_task
from besa.system import deterministic, finite_hint, require
from besa.walk import frozen


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracy by task and by question."""

    rows: list[dict[str, Any]]  # one per task, with the columns of `to_frame`
    answers: list[dict[str, Any]]  # one per question: task, question (its number), logliks (nats), correct
    limit: int | None
    seed: int
    lm_eval: str  # version

    def to_frame(self) -> pd.DataFrame:
        """A row per task and one for the average: `acc`, `stderr` and `chance` as fractions, `n` questions `of` all."""
        stderr = math.sqrt(sum(row["stderr"] ** 2 for row in self.rows)) / len(self.rows)
        average = {
            "task": "average",
            "acc": sum(row["acc"] for row in self.rows) / len(self.rows),
            "stderr": stderr,
            "chance": sum(row["chance"] for row in self.rows) / len(self.rows),
            "n": sum(row["n"] for row in self.rows),
            "of": sum(row["of"] for row in self.rows),
            "version": "",
            "questions": "",
        }
        return pd.DataFrame([*self.rows, average]).set_index("task")


@checked
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> ZeroShot:
    """Fraction of questions whose right choice is the likeliest continuation: lm-eval's `acc`, without examples.

    Log-probabilities are summed over a choice's tokens and not divided by its length, as `acc_norm` does.

    Args:
        tasks: of piqa, boolq, hellaswag, winogrande, arc_easy, arc_challenge.
        limit: questions per task, drawn by `seed`; None asks all.
        batch_size: choices per batch.
    """
    require("lm_eval", "eval")
    import lm_eval.evaluator  # slow
    from lm_eval.models.huggingface import HFLM

    loaded = {name: load_task(name) for name in tasks}
    available = {name: len(task.eval_docs) for name, task in loaded.items()}
    questions = {
        name: sorted(random.Random(seed).sample(range(n), min(limit or n, n))) for name, n in available.items()
    }
    options = {"add_bos_token": needs_bos(model), "softmax_dtype": "float32"}
    # Some models count positions by a cumulative sum, for which CUDA has no deterministic algorithm: warn only.
    with frozen(model), deterministic(model.device.type == "cuda", warn_only=True):
        lm: Any = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, **options)  # pyright: ignore
        lm.loglikelihood = partial(lm.loglikelihood, disable_tqdm=not progress)
        outcome: Any = lm_eval.evaluator.evaluate(lm, dict(loaded), samples=questions)
    rows = [_row(name, outcome, available[name]) for name in tasks]
    answers = []
    for name in tasks:
        for sample in outcome["samples"][name]:
            question = sample["doc_id"]
            logliks = [loglik for loglik, _ in sample["filtered_resps"]]
            if not all(map(math.isfinite, logliks)):
                raise ValueError(f"{name}, question {question}: log-likelihoods {logliks}; {finite_hint(model.dtype)}")
            answers.append({"task": name, "question": question, "logliks": logliks, "correct": bool(sample["acc"])})
    return ZeroShot(rows=rows, answers=answers, limit=limit, seed=seed, lm_eval=lm_eval.__version__)


def _row(name: str, outcome: dict[str, Any], available: int) -> dict[str, Any]:
    result = outcome["results"][name]
    samples = outcome["samples"][name]
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
