import json
from pathlib import Path

import pandas as pd
import pytest

from besa.data import assets
from besa.evaluate import tasks

SIZES = {
    "piqa": 1838,
    "boolq": 3270,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
}
FIELDS = {
    "piqa": {"goal", "sol1", "sol2", "label"},
    "boolq": {"passage", "question", "label"},
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "arc_easy": {"question", "choices", "answerKey"},
    "arc_challenge": {"question", "choices", "answerKey"},
}


def embedded(name):
    folder = assets.derive("zero-shot", tasks._unpack)
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_embedded_sets_are_complete_and_in_the_fields_of_the_hub(name):
    documents = embedded(name)
    assert len(documents) == SIZES[name]
    assert all(FIELDS[name] <= set(document) for document in documents)
    assert len({json.dumps(document) for document in documents}) > 0.99 * len(documents)


def test_boolq_has_the_titles_of_superglue_and_both_answers():
    documents = embedded("boolq")
    assert documents[0]["passage"].startswith("Ethanol fuel -- All biomass goes through")
    assert sum(" -- " in document["passage"] for document in documents) > 3200
    assert sum(document["label"] for document in documents) == 2033  # 62.17 % say yes, as known of this split


@pytest.mark.parametrize("name", ["piqa", "boolq", "winogrande", "arc_easy", "arc_challenge"])
def test_published_accuracies_are_whole_questions_of_these_sets(name):
    """ARC's would not be of its validation split. One of the 140 numbers is not: 53.38, LLaMA-65B, ARC-Challenge."""
    published = pd.read_csv(Path(__file__).parents[1] / "reproduce" / "published.csv")
    values = published[(published["item"] == "table2") & (published["task"] == name)]["value"].astype(float)
    count = {n: count_whole(values, n) for n in (SIZES[name], 570, 299)}
    assert len(values) == 28 and count[SIZES[name]] == 28 - (name == "arc_challenge")
    assert name not in ("arc_easy", "arc_challenge") or max(count[570], count[299]) < 10


def count_whole(values, n):
    """Number of the percentages, of two decimals, that are a whole number of n questions."""
    return int((((values * n / 100).round() * 100 / n).round(2) - values).abs().lt(0.006).sum())


def test_the_definitions_are_those_of_lm_eval():
    task = tasks.load_task("hellaswag")
    assert len(task.eval_docs) == 10042 and task.VERSION == 1.0 and task.config.num_fewshot == 0
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == "Roof shingle removal: A man is sitting on a roof. He"
    assert int(task.doc_to_target(document)) == 3


def test_a_local_file_replaces_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    (tmp_path / "piqa").mkdir()
    document = {"goal": "open a door", "sol1": "turn the handle", "sol2": "sing", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(document) + "\n")
    assert list(tasks.load_task("piqa").eval_docs) == [document]


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'pica'; known: piqa, boolq"):
        tasks.load_task("pica")
