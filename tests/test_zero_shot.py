import copy
import json
import math
import os

import lm_eval
import pytest
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import besa
from besa.data import assets
from besa.evaluate import tasks


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2[1]


def build(architecture, **options):
    """Two random blocks, weights large enough for every context to matter, float32."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 49152, "pad_token_id": 0, "initializer_range": 0.5}
    config_name = "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, config_name)(**shape | options)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model():
    return build("Llama", max_position_embeddings=2048)


def prompts(name, document):
    """The context and the continuations of one document, written down from the tasks' descriptions."""
    if name == "piqa":
        return [(f"Question: {document['goal']}\nAnswer:", f" {document[key]}") for key in ("sol1", "sol2")]
    if name == "winogrande":
        before, after = document["sentence"].split("_")
        return [(before + document[key], f" {after.strip()}") for key in ("option1", "option2")]
    return [(f"Question: {document['question']}\nAnswer:", f" {text}") for text in document["choices"]["text"]]


def right_choice(name, document):
    if name == "piqa":
        return document["label"]
    if name == "winogrande":
        return int(document["answer"]) - 1
    return document["choices"]["label"].index(document["answerKey"])


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    n_context = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation, add_special_tokens=False)["input_ids"])
    log_probabilities = torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
    return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(n_context, len(ids)))


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_challenge"])
def test_accuracy_equals_the_naive_loop_over_single_choices(model, tokenizer, name):
    report = besa.zero_shot(model, tokenizer, [name], limit=12, progress=False)
    lines = (assets.derive("zero-shot", tasks._unpack) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    n_right = 0
    for answer in report.answers:
        document = json.loads(lines[answer["question"]])
        expected = [log_likelihood(model, tokenizer, *pair) for pair in prompts(name, document)]
        assert answer["logliks"] == pytest.approx(expected, abs=1e-3)
        right = expected.index(max(expected)) == right_choice(name, document)
        assert answer["correct"] == right
        n_right += right
    assert report.rows[0]["acc"] == report.to_frame()["acc"]["average"] == n_right / 12
    assert sum(answer["correct"] for answer in report.answers) == n_right
    assert report.rows[0]["stderr"] == pytest.approx(math.sqrt(n_right / 12 * (1 - n_right / 12) / 11))


PLAIN_BOOLQ = """
task: plain
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{passage}}\\nQuestion: {{question}}?\\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_every_answer_equals_that_of_lm_eval_on_a_plainly_written_task(model, tokenizer, tmp_path, monkeypatch):
    lines = (assets.derive("zero-shot", tasks._unpack) / "boolq.jsonl").read_text(encoding="utf-8").splitlines()
    local = tmp_path / "boolq" / "validation.jsonl"
    local.parent.mkdir()
    local.write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    report = besa.zero_shot(model, tokenizer, ["boolq"], progress=False)
    (tmp_path / "plain.yaml").write_text(PLAIN_BOOLQ.replace("FILE", str(local)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = HFLM(model, tokenizer=tokenizer, add_bos_token=False, batch_size=4)
    outcome = lm_eval.simple_evaluate(lm, tasks=["plain"], num_fewshot=0, task_manager=manager)
    assert [answer["correct"] for answer in report.answers] == [s["acc"] == 1 for s in outcome["samples"]["plain"]]
    for answer, sample in zip(report.answers, outcome["samples"]["plain"], strict=True):
        assert answer["logliks"] == pytest.approx([loglik for loglik, _ in sample["filtered_resps"]], abs=1e-3)
    result = outcome["results"]["plain"]
    assert (report.rows[0]["acc"], report.rows[0]["stderr"]) == (result["acc,none"], result["acc_stderr,none"])


def test_questions_to_gemma_begin_with_bos(tokenizer):
    bos, opening = tokenizer.bos_token_id, copy.deepcopy(tokenizer)
    template = {"single": f"{tokenizer.bos_token} $A", "special_tokens": [(tokenizer.bos_token, bos)]}
    opening.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template)  # as Gemma's has
    for architecture, opens in {"Gemma3": True, "Llama": False}.items():
        model, read = build(architecture), []
        model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))  # noqa: B023
        besa.zero_shot(model, opening, ["piqa"], limit=2, progress=False)
        assert read and all((tokens[:, 0] == bos).all() == opens for tokens in read)


def test_a_limit_draws_questions_by_seed(model, tokenizer):
    first, again, other = (
        besa.zero_shot(model, tokenizer, ["winogrande", "arc_easy"], limit=5, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert first == again
    asked = [[a["question"] for a in report.answers if a["task"] == "winogrande"] for report in (first, other)]
    assert asked[0] == sorted(asked[0]) and asked[0] != asked[1] and max(asked[0]) > 100
    assert first.limit == 5 and first.seed == 0 and first.lm_eval == lm_eval.__version__
    frame = first.to_frame()
    assert list(frame.index) == ["winogrande", "arc_easy", "average"]
    assert list(frame["n"]) == [5, 5, 10] and list(frame["of"]) == [1267, 2376, 3643]
    assert frame.loc["average", "acc"] == pytest.approx(frame["acc"].iloc[:2].mean())
    assert frame.loc["average", "stderr"] == pytest.approx(math.hypot(*frame["stderr"].iloc[:2]) / 2)
    assert frame.loc["winogrande", "questions"] != other.to_frame().loc["winogrande", "questions"]
    assert (
        frame.loc["winogrande", "chance"] == 0.5 and 0.2 <= frame.loc["arc_easy", "chance"] <= 1 / 3
    )  # 3 to 5 choices


def test_model_and_tokenizer_are_left_as_they_were(tokenizer):
    model = build("Llama").train()
    before = tokenizer.pad_token, tokenizer.padding_side
    report = besa.zero_shot(model, tokenizer, ["piqa"], limit=1, progress=False)
    assert model.training and (tokenizer.pad_token, tokenizer.padding_side) == before
    assert math.isnan(report.rows[0]["stderr"])  # one question has none


@pytest.mark.parametrize("tasks", [["pica"], ["piqa", "pica"]])
def test_an_unknown_task_is_refused(tasks, model, tokenizer):
    with pytest.raises(ValueError, match="unknown task 'pica'; known: piqa"):
        besa.zero_shot(model, tokenizer, tasks)


def test_a_model_of_nan_is_refused_with_the_question(tokenizer):
    model = build("Llama", max_position_embeddings=2048)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"piqa, question \d+: .*log-likelihoods \[nan, nan\]; look for NaN"):
        besa.zero_shot(model, tokenizer, ["piqa", "arc_easy"], limit=2, progress=False)


def test_the_embedded_model_answers_every_task(smollm2):
    """2 questions per task of six of its blocks; `BESA_QUESTIONS=200 pytest -k every_task` asks all of them 200."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    if not (limit := int(os.environ.get("BESA_QUESTIONS", "0"))):
        limit, model.model.layers, model.config.num_hidden_layers = 2, model.model.layers[:6], 6
    report = besa.zero_shot(model, tokenizer, limit=limit, progress=False)
    for answer in [answer for answer in report.answers if answer["task"] in ("piqa", "winogrande", "arc_challenge")]:
        lines = (assets.derive("zero-shot", tasks._unpack) / f"{answer['task']}.jsonl").read_text(encoding="utf-8")
        document = json.loads(lines.splitlines()[answer["question"]])
        expected = [log_likelihood(model, tokenizer, *pair) for pair in prompts(answer["task"], document)]
        assert answer["logliks"] == pytest.approx(expected, abs=1e-2)
    asked = [answer["task"] for answer in report.answers]
    assert asked == [name for name in tasks.TASKS for _ in range(limit)]
