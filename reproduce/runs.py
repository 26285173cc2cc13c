"""Run the rows of a notebook: parameters, profiles, the plan of rows, their tables and figures."""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

import besa
from besa.config import config
from besa.data.files import tensor_sha256
from besa.data.text import TEXTS, Text, load_documents
from besa.loop import Method
from besa.system import resolve_device, resolve_dtype
from reproduce import figures, tables, verdicts
from reproduce.methods import steps_of
from reproduce.records import checkpoint_identity, config_hash, find_record, is_reference, record_path
from reproduce.rows import Row
from reproduce.tables import REFERENCE, ROOT, Record, slug

SMOKE = "SMOKE RUN: these numbers only show that the code runs."

USUAL_ROWS = {  # files of a run with other rows have another name
    "table1": ["dense", "besa-row-wise", "wanda", "sparsegpt", "magnitude"],
    "table2": ["dense", "besa-row-wise", "wanda", "sparsegpt"],
    "table3": ["dense", "quantized", "joint-besa", "joint-wanda", "joint-clipping"],
    "table4": ["dense", "besa-row-wise", "wanda", "sparsegpt"],
    "figure1": ["besa-row-wise", "wanda", "sparsegpt"],
    "sparsity": ["magnitude", "besa-row-wise", "wanda", "sparsegpt"],
}


class Profile(NamedTuple):
    """The size of a run: calibration windows, tokens of each, test segments per text, questions per task."""

    name: str
    n_samples: int
    seq_len: int
    max_segments: int | None
    max_questions: int | None


PROFILES = {
    "smoke": Profile("smoke", 2, 64, 2, 2),
    "quick": Profile("quick", 32, 512, 32, 200),
    "paper": Profile("paper", 128, 2048, None, None),
}


def resolve_profile(name: str, device: torch.device) -> Profile:
    """A profile by name; "auto" is `$BESA_PROFILE`, else paper on a GPU and quick on a CPU."""
    if name == "auto":
        name = os.environ.get("BESA_PROFILE") or ("paper" if device.type == "cuda" else "quick")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: auto, {', '.join(PROFILES)}")
    return PROFILES[name]


@config
class Recipe:
    """Settings of a model, from reproduce/params/<model>.yaml; these defaults where there is no file.

    Args:
        calibration: text of the calibration windows; "c4-{seed}" is another text for each seed.
        sampler: "crop" (published: a random crop of a document longer than seq_len) or "pack".
        seed: of the sampler.
        n_samples, seq_len: calibration windows and tokens of each; None takes the profile's.
        dtype: None takes a precision in which the device is fast.
        d_coef, d_coef_layer: Prodigy's step size, row-wise and layer-wise; the published runs set it by model.
        keep: leave pruned models in $BESA_CACHE/pruned, where an interrupted row continues and other notebooks find
            them; None does in profile paper.
    """

    calibration: str = "sotu"
    sampler: Literal["crop", "pack"] = "crop"
    seed: int = 0
    n_samples: int | None = None
    seq_len: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    device: str = "auto"
    d_coef: float = 5.0
    d_coef_layer: float = 0.5
    keep: bool | None = None


def resolve_recipe(model: str, values: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in reproduce/params/<model>.yaml, some of its values changed."""
    path = ROOT / "reproduce" / "params" / f"{model}.yaml"
    known = yaml.safe_load(path.read_text())["recipe"] if "/" not in model and path.is_file() else {}
    return Recipe(**known | dict(values or {}))


def listed(values: Any) -> list[Any]:
    """A list parameter; `papermill -p row_groups row,8` gives a string, `-p row_groups 8` a number."""
    if isinstance(values, str):
        words = [word.strip() for word in values.split(",") if word.strip()]
        return [int(word) if word.isdecimal() else word for word in words]
    return list(values) if isinstance(values, list | tuple) else [values]


class Run:
    """A notebook's run on one model: resolved parameters, rows, and a folder for records, tables and figures."""

    def __init__(
        self,
        item: str,
        *,
        model: str,
        profile: str = "auto",
        recipe: Mapping[str, Any] | None = None,
        results: str | Path | None = None,
        shorter: int = 1,
        sparsity: float = 0.5,
        methods: Any = None,
        matched: bool = True,
        variant: str = "",
        **config: Any,
    ) -> None:
        """
        Args:
            item: name of the notebook: `table1`, ...
            recipe: values that differ from reproduce/params/<model>.yaml.
            results: folder; None takes `results/<item>`, below `$BESA_RESULTS` if that is set.
            shorter: divides the profile's seq_len, except in profile paper.
            sparsity, methods, matched: of the notebook; what is not as usual becomes part of the names of files.
            variant: part of the names of files, too.
            config: further values that distinguish this run's records.
        """
        self.item, self.model = item, model
        self.sparsity, self.matched, self.variant = sparsity, matched, variant
        self.methods = listed(methods or USUAL_ROWS.get(item, []))
        self.recipe = resolve_recipe(model, recipe)
        self.device = resolve_device(self.recipe.device)
        self.dtype = resolve_dtype(self.recipe.dtype, self.device)
        self.profile = resolve_profile(profile, self.device)
        self.is_smoke = self.profile.name == "smoke"
        self.keeps = self.profile.name == "paper" if self.recipe.keep is None else self.recipe.keep
        self.n_samples = self.recipe.n_samples or self.profile.n_samples
        divisor = 1 if self.profile.name == "paper" else shorter
        self.seq_len = self.recipe.seq_len or self.profile.seq_len // divisor
        self.folder = Path(results or Path(os.environ.get("BESA_RESULTS") or ROOT / "results") / item)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config, self.segments, self.documents, self.records = dict(config), {}, {}, []

    def windows(
        self, tokenizer: Any, seeds: list[int] | None = None, n_samples: int | None = None
    ) -> dict[int, Tensor]:
        """Calibration windows of each seed; None takes the recipe's seed."""
        size, seeds = (
            (n_samples or self.n_samples, self.seq_len),
            [self.recipe.seed] if seeds is None else listed(seeds),
        )
        if not seeds:
            raise ValueError("seeds is empty: name one, or leave it out")
        text = self.recipe.calibration
        return {
            seed: besa.calibration_windows(text.format(seed=seed), tokenizer, *size, seed, self.recipe.sampler)
            for seed in seeds
        }

    def texts(self, tokenizer: Any, names: Any, max_segments: int | None = None) -> dict[str, Tensor]:
        """Test tokens of each text; None takes the profile's number of segments."""
        if not listed(names):
            raise ValueError("datasets is empty: name a text, such as wiki")
        n_segments = max_segments or self.profile.max_segments
        texts = {name: besa.test_tokens(name, tokenizer) for name in listed(names)}
        if n_segments:
            texts = {name: tokens[: n_segments * self.seq_len] for name, tokens in texts.items()}
        self.segments = {name: len(tokens) // self.seq_len for name, tokens in texts.items()}
        for name, n in self.segments.items():
            self.documents[name] = documents_of_segments(name, tokenizer, self.seq_len)[:n]
        return texts

    def row(
        self,
        name: str,
        method: Method | None,
        windows: Tensor | None = None,
        texts: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
        reconstruct: Any = None,
        **config: Any,
    ) -> Row:
        """One row; `config` holds further values that its numbers depend on. Its `record` is None until it is saved."""
        identity = {"item": self.item, "model": self.model, "profile": self.profile.name, "seq_len": self.seq_len}
        identity |= {"calibration": self.recipe.calibration, "sampler": self.recipe.sampler}
        identity |= {"seed": self.recipe.seed if seed is None else seed, "n_samples": self.n_samples}
        if windows is not None:
            identity |= {"calibration_sha256": tensor_sha256(windows), "n_samples": len(windows)}
        if texts:
            identity["test_sha256"] = {text: tensor_sha256(tokens) for text, tokens in texts.items()}
        if self.checkpoint:
            identity["checkpoint"] = self.checkpoint
        identity |= {"dtype": str(self.dtype), "device": self.device.type, "row": name, **self.config, **config}
        if reconstruct or "reconstruct" in self.config:
            identity["reconstruct"] = reconstruct and reconstruct.config()
        identity |= {"sparsity": method.sparsity if method else 0.0, "method": method.config() if method else None}
        return Row(self, method, windows, identity, find_record(self.folder, identity), reconstruct)

    @functools.cached_property
    def checkpoint(self) -> Any:
        return checkpoint_identity(self.model)

    def rows(
        self,
        methods: Mapping[str, Method | None],
        windows: Mapping[int, Tensor],
        texts: Mapping[str, Tensor] | None = None,
        *,
        matched: Mapping[str, str] | None = None,
        **config: Any,
    ) -> Iterator[Row]:
        """Iterate over the rows without a record: each method with the windows of each seed.

        Methods without calibration run once. `self.records` then holds the records of all rows, in this order.

        Args:
            matched: rows by the row whose sparsity they are pruned to, block by block; they come last.
        """
        if not methods:
            raise ValueError("methods is empty: name a row, such as wanda")
        self.records, first, matched = [], next(iter(windows)), matched or {}
        names = sorted(methods, key=lambda name: name in matched)
        plan = [(seed, name) for seed in windows for name in names if seed == first or is_calibrated(methods[name])]
        for seed, name in tqdm(plan, desc=self.item, unit="row", delay=5, leave=False):
            method, inputs = methods[name], {"windows": windows[seed], "texts": texts, "seed": seed, **config}
            inputs |= steps_of(name)
            if name in matched:
                reached = self.row(matched[name], methods[matched[name]], **inputs).record
                method = replace(method, sparsities=tables.block_sparsities(reached))
                inputs["matched_to"] = matched[name]
            row = self.row(name, method, **inputs)
            if row.record is None:
                yield row
            self.records.append(row.record)

    def samples(self, record: Record) -> dict[str, np.ndarray]:
        """The values whose means a record's metrics are: losses by segment, answers by question."""
        path = self.folder / "samples" / f"{record_path(self.folder, record['config']).stem}.npz"
        if not path.is_file():
            return {}
        with np.load(path) as file:
            return dict(file)

    @property
    def stem(self) -> str:
        """Name of this run's tables and figures."""
        parts = [slug(self.model), self.profile.name]
        if self.recipe.calibration != resolve_recipe(self.model).calibration:
            parts.append(self.recipe.calibration.replace(" ", "-"))
        if self.sparsity != 0.5:
            parts.append(f"{self.sparsity:g}")
        if not self.matched:
            parts.append("unmatched")
        if self.variant:
            parts.append(self.variant)
        others = sorted(self.methods) != sorted(USUAL_ROWS.get(self.item, []))
        if others and not is_reference(self.folder):
            parts += self.methods if len(self.methods) < 4 else [config_hash({"methods": sorted(self.methods)})[:6]]
        return "-".join(parts)

    @property
    def size(self) -> str:
        """Sentences for captions: the size of the run."""
        size = f"Profile {self.profile.name}: {self.n_samples} windows of {self.seq_len} tokens of "
        size += self.recipe.calibration
        if self.segments:
            size += "; tested on " + ", ".join(f"{n} segments of {name}" for name, n in self.segments.items())
        return size + (f". {SMOKE}" if self.is_smoke else ".")

    def write_table(self, frame: pd.DataFrame, caption: str, suffix: str = "") -> str:
        """Write a table under the run's name, the size of the run in its caption; returns Markdown."""
        return tables.write_table(frame, self.folder, self.stem + suffix, f"{caption}. {self.size}")

    def write_verdicts(self, records: list[Record], claims: Any, metric: str = "perplexity", over: str = "text") -> str:
        """Write a verdict on each claim: pairs of rows, the first said to be better; returns Markdown."""
        judgements = verdicts.judge(records, claims, self.samples, metric, over)
        rule = "Verdicts: ± is the 95 % interval; yes or no if it leaves out 0, over at least three seeds"
        return self.write_table(judgements, rule, "-verdicts") if len(judgements) else "No rows to compare."

    def write_published(self, records: list[Record], metric: str = "perplexity", item: str | None = None) -> str:
        """Write BESA's relative numbers beside the paper's, and all numbers if the paper has this model; Markdown."""
        relative = tables.beside_paper(records, item or self.item, metric)
        if relative.empty:
            return "No row of BESA."
        written = self.write_table(relative, "Beside the paper", "-beside-paper")
        direct = tables.compare(records, item or self.item, metric)
        if len(direct):
            written += "\n" + self.write_table(direct, "Ours and published", "-published")
        return written

    def write_reference(self, records: list[Record]) -> str:
        """Write our numbers beside those in results/reference; returns Markdown."""
        if is_reference(self.folder):
            return "This is the reference run."
        pairs = tables.beside_reference(records, REFERENCE / self.item)
        return self.write_table(pairs, "Beside results/reference", "-reference") if len(pairs) else "Not in it."

    def save_figure(self, figure: Figure, suffix: str = "", *, stem: str = "", size: str = "") -> None:
        """Save a figure under the run's name, the size of the run in small letters below it.

        Args:
            stem: another name.
            size: another size.
        """
        size = size or self.size
        if self.is_smoke and SMOKE not in size:
            size = f"{size} {SMOKE}"
        figures.write_size(figure, size, self.is_smoke)
        tables.save_figure(figure, self.folder, (stem or self.stem) + suffix)


def documents_of_segments(text: str, tokenizer: Any, seq_len: int) -> np.ndarray:
    """Number of the document of a test text in which each segment begins; of WikiText-2 the article."""
    kind = TEXTS.get(text, Text())
    documents = load_documents(text, kind.test_split)[: kind.max_documents]
    joined = kind.separator.join(documents)
    begins = np.cumsum([0] + [len(document) + len(kind.separator) for document in documents])
    if text == "wikitext2":
        begins = [title.start() for title in re.finditer(r"^ = [^=].* = $", joined, re.MULTILINE)]
    places = tokenizer(joined, return_offsets_mapping=True, verbose=False)["offset_mapping"][::seq_len]
    return np.searchsorted(begins, [start for start, _ in places], side="right")


def is_calibrated(method: Method | None) -> bool:
    """Whether calibration windows change the result."""
    return method is not None and method.name != "magnitude" and method.sparsity > 0
