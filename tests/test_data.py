import json

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import besa
from besa.inputs.text import load_documents


def word_tokenizer():
    """A word is a token, and its number is its id; 0 ends a text."""
    words = tokenizers.models.WordLevel({"</s>": 0} | {str(n): n for n in range(1, 1100)}, unk_token="</s>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


TOKENIZER = word_tokenizer()


@pytest.fixture
def local_text(tmp_path, monkeypatch):
    """Ten documents of 3, 6, ... 30 consecutive numbers."""
    documents = [" ".join(str(100 * n + i) for i in range(3 * n)) for n in range(1, 11)]
    (tmp_path / "c4").mkdir()
    for split in ("train", "validation"):
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (tmp_path / "c4" / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    return documents


def test_crop_takes_consecutive_tokens_of_documents_longer_than_seq_len(local_text):
    windows = besa.calibration_windows("c4", TOKENIZER, n_samples=50, seq_len=12, seed=3)
    assert windows.shape == (50, 12) and windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    assert set((windows[:, 0] // 100).tolist()) == {5, 6, 7, 8, 9, 10}


def test_crop_draws_as_the_released_code_does(local_text):
    import random

    random.seed(7)
    expected = []
    while len(expected) < 5:
        tokens = TOKENIZER(local_text[random.randint(0, 9)])["input_ids"]
        if len(tokens) > 12:
            start = random.randint(0, len(tokens) - 12 - 1)
            expected.append(tokens[start : start + 12])
    windows = besa.calibration_windows("c4", TOKENIZER, n_samples=5, seq_len=12, seed=7)
    assert windows.tolist() == expected


def test_pack_uses_every_token_once(local_text):
    windows = besa.calibration_windows("c4", TOKENIZER, n_samples=17, seq_len=10, sampler="pack")
    tokens = [token for token in windows.flatten().tolist() if token]
    assert len(set(tokens)) == len(tokens) == 17 * 10 - (windows == 0).sum()


def test_same_seed_same_windows_and_another_seed_others(local_text):
    draw = lambda seed: besa.calibration_windows("c4", TOKENIZER, 8, 12, seed)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_test_tokens_join_the_documents(local_text):
    assert besa.test_tokens("c4", TOKENIZER).tolist() == [int(w) for d in local_text for w in d.split()]


def test_too_little_text_says_how_much_there_is(local_text):
    with pytest.raises(ValueError, match=r"no document of 'c4' is longer than seq_len=30: 10 documents of at most 30"):
        besa.calibration_windows("c4", TOKENIZER, 4, 30)
    with pytest.raises(ValueError, match=r"'c4' has 175 tokens in 10 documents, 4 windows of 50 need 200: .*=3"):
        besa.calibration_windows("c4", TOKENIZER, 4, 50, sampler="pack")


def test_bad_names_and_numbers_are_refused(no_type_checks, local_text):
    with pytest.raises(ValueError, match="unknown text 'c5'; known: wikitext2, c4, ptb, sotu, wiki"):
        besa.calibration_windows("c5", TOKENIZER)
    with pytest.raises(ValueError, match="sampler 'slide'"):
        besa.calibration_windows("c4", TOKENIZER, sampler="slide")
    with pytest.raises(ValueError, match=r"n_samples \(0\)"):
        besa.calibration_windows("c4", TOKENIZER, n_samples=0)
    with pytest.raises(ValueError, match="'wiki' is for testing only"):
        besa.calibration_windows("wiki", TOKENIZER)


@pytest.mark.parametrize("line", ["not json", '{"sentence": "a"}', "3"])
def test_a_local_text_of_another_form_is_refused_by_name(tmp_path, monkeypatch, line):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(line)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"c4/train.jsonl: every line must be a JSON object with a 'text' field"):
        load_documents("c4", "train")


def test_without_a_hub_both_ways_out_are_named(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"\$BESA_DATA/ptb/test.jsonl.*'sotu', 'wiki'"):
        besa.test_tokens("ptb", TOKENIZER)


def test_hub_files_are_read_by_column(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"sentence": ["1 2", "3"]})
    assert besa.test_tokens("ptb", TOKENIZER).tolist() == [1, 2, 3]


def test_embedded_texts_are_split_by_speech_and_article():
    train, test = load_documents("sotu", "train"), load_documents("sotu", "test")
    assert (len(train), len(test)) == (200, 49)
    assert not set(train) & set(test)
    articles = load_documents("wiki", "test")
    assert len(articles) == 1095
    assert articles[0].startswith("2007 European Parliament election in Romania") and "<doc" not in " ".join(articles)


def test_a_folder_of_ones_own_is_a_text_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"unknown text 'mine'; known: .*\$BESA_DATA/mine"):
        besa.test_tokens("mine", TOKENIZER)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    assert besa.test_tokens("mine", TOKENIZER).tolist() == TOKENIZER("one\n\ntwo")["input_ids"]
    with pytest.raises(FileNotFoundError, match=r"'mine' has no train.jsonl in .*mine"):
        besa.calibration_windows("mine", TOKENIZER, 1, 2)
