import errno
import itertools
import json
import re
import time
from dataclasses import replace

import pytest
import tokenizers
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

import besa
from besa.inputs import text
from besa.inputs.text import TEXTS, load_documents
from besa.machine.files import tensor_sha256
from besa.machine.provenance import ROOT


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


def test_gemmas_windows_begin_with_its_bos(local_text):
    family = type("GemmaTokenizerFast", (PreTrainedTokenizerFast,), {})
    by_class = family(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="</s>", bos_token="</s>")
    by_token = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="</s>", bos_token="<bos>"
    )
    for tokenizer, sampler in itertools.product((by_class, by_token), ("crop", "pack")):
        windows = besa.calibration_windows("c4", tokenizer, 4, 12, sampler=sampler)
        as_cut = besa.calibration_windows("c4", TOKENIZER, 4, 12, sampler=sampler)
        assert (windows[:, 0] == tokenizer.bos_token_id).all() and torch.equal(windows[:, 1:], as_cut[:, 1:])


def test_test_tokens_join_the_documents(local_text):
    assert besa.test_tokens("c4", TOKENIZER).tolist() == [int(w) for d in local_text for w in d.split()]


def test_of_c4_the_published_segments_are_taken(local_text, monkeypatch):
    assert (TEXTS["c4"].max_documents, TEXTS["c4"].max_tokens) == (1100, 256 * 2048)
    whole = besa.test_tokens("c4", TOKENIZER).tolist()
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], max_tokens=50))
    assert besa.test_tokens("c4", TOKENIZER).tolist() == whole[:50]
    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], max_documents=2))
    assert besa.test_tokens("c4", TOKENIZER).tolist() == [int(w) for d in local_text[:2] for w in d.split()]


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


ODD_LINES = {
    "not json": "Expecting value",
    '{"text": "cut': "Invalid control character",
    "": "Expecting value",
    "3": "it is a int",
    "null": "it is a NoneType",
    '["text"]': "it is a list",
    '{"sentence": "a"}': "it lacks 'text'",
    '{"text": 3}': "'text' is a int",
    '{"text": null}': "'text' is a NoneType",
    '{"text": ["a"]}': "'text' is a list",
    r'{"text": "\ud800"}': "surrogates not allowed",
    "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("line, words", ODD_LINES.items(), ids=range(len(ODD_LINES)))
def test_an_odd_line_of_a_local_text_is_refused_by_file_and_line(tmp_path, monkeypatch, line, words):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(f'{{"text": "one"}}\n{line}\n{{"text": "three"}}\n')
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"c4/train.jsonl, line 2: every line must be a JSON object .*'text'") as error:
        load_documents("c4", "train")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"text": "one"}\n{"text": "\xff"}\n', "c4/train.jsonl, line 2: .*utf-8"),
        (b"\x00\x01", "c4/train.jsonl, line 1: .*JSON object"),
        (b"", "c4/train.jsonl is empty; write a JSON object with 'text' into every line"),
    ],
)
def test_a_file_of_no_text_is_refused_by_name(tmp_path, monkeypatch, content, words):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_bytes(content)
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        besa.calibration_windows("c4", TOKENIZER, 1, 2)


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


# A document is encoded once, a huge one in pieces


drawn = besa.calibration_windows.__wrapped__  # by what is no tokenizer of transformers, too


class Counting:
    """A tokenizer that keeps what it was asked for."""

    is_fast, eos_token_id = True, 0

    def __init__(self, seconds=0.0):
        self.seen, self.seconds = [], seconds

    def __call__(self, document, **options):
        time.sleep(self.seconds)
        self.seen.append(document)
        return TOKENIZER(document, **options)


@pytest.mark.parametrize("sampler, n_samples", [("crop", 1000), ("pack", 10)])
def test_every_document_is_encoded_at_most_once(no_type_checks, local_text, sampler, n_samples):
    tokenizer = Counting()
    drawn("c4", tokenizer, n_samples, 12, sampler=sampler)
    assert len(tokenizer.seen) == len(set(tokenizer.seen)) <= 10


def sentencepiece_tokenizer():
    """In the manner of Llama's: a space before the text, no split into words, a token before and one behind it."""
    document = load_documents("sotu", "test")[0]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f" {word}" for word in document.split()], trainer)
    ids = [(name, special.index(name)) for name in ("<s>", "</s>")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_disk_that_refuses_datasets_its_copy_is_not_a_damaged_file(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "/home/me/.cache")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(OSError, match=r"\[Errno 30\].*x.parquet .*; set HF_DATASETS_CACHE to a folder with room"):
        text._column(tmp_path / "x.parquet", "text")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "words"])
def test_the_pieces_of_a_huge_text_have_the_tokens_of_the_whole(smollm2, monkeypatch, kind):
    makers = {"byte-level": lambda: smollm2[1], "sentencepiece": sentencepiece_tokenizer, "words": lambda: TOKENIZER}
    tokenizer, documents = makers[kind](), load_documents("sotu", "test")[::8]
    monkeypatch.setattr(text, "load_documents", lambda *_: documents)
    expected = tokenizer("\n\n".join(documents))["input_ids"]
    for at_once in (997, 20_000):
        monkeypatch.setattr(text, "AT_ONCE", at_once)
        assert besa.test_tokens("sotu", tokenizer).tolist() == expected
        pieces = [*text._token_ids(tokenizer, "\n\n".join(documents), tqdm(disable=True))]
        assert len(pieces) > len("\n\n".join(documents)) / at_once  # never the whole at once


def test_a_line_without_spaces_is_cut_all_the_same(smollm2, monkeypatch):
    monkeypatch.setattr(text, "AT_ONCE", 1000)
    monkeypatch.setattr(text, "load_documents", lambda *_: ["0123456789" * 1000])
    expected = smollm2[1]("0123456789" * 1000)["input_ids"]  # a token for each digit
    assert besa.test_tokens("sotu", smollm2[1]).tolist() == expected


def test_the_windows_of_the_reference_are_drawn_to_the_bit(smollm2):
    (path,) = (ROOT / "results" / "reference" / "table1" / "records").glob("smollm2-135m-quick-dense-*.json")
    config = json.loads(path.read_text())["config"]
    asked = [config[name] for name in ("n_samples", "seq_len", "seed", "sampler")]
    windows = besa.calibration_windows(config["calibration"], smollm2[1], *asked)
    assert tensor_sha256(windows) == config["calibration_sha256"] and config["test_sha256"]
    for name, expected in config["test_sha256"].items():
        assert tensor_sha256(besa.test_tokens(name, smollm2[1])[: 32 * config["seq_len"]]) == expected


@pytest.mark.parametrize(
    "sampler, n_samples, seq_len, words",
    [
        ("pack", 10**6, 2048, r"'c4' has 680 characters in 10 documents, far too few .* n_samples=1, or another text"),
        ("crop", 10**6, 12, r"far too few for 1000000 windows: take at most n_samples=2720"),
        ("pack", 1000, 12, "take at most n_samples=226"),
        ("pack", 1, 4000, "far too few for 1 windows: lower seq_len, or take another text"),
    ],
)
def test_a_million_windows_of_a_small_text_are_refused_before_it_is_encoded(
    no_type_checks, local_text, sampler, n_samples, seq_len, words
):
    tokenizer = Counting()
    with pytest.raises(ValueError, match=words):
        drawn("c4", tokenizer, n_samples, seq_len, sampler=sampler)
    assert not tokenizer.seen


def test_what_takes_longer_than_a_second_shows_how_far_it_is(no_type_checks, local_text, capsys):
    drawn("c4", TOKENIZER, 4, 12)
    assert "tokenize" not in capsys.readouterr().err
    drawn("c4", Counting(seconds=0.2), 17, 10, sampler="pack")
    assert re.search(r"tokenize: \d+char \[00:0\d", capsys.readouterr().err)
