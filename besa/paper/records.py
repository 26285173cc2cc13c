"""What a notebook's run rests on, its parameters resolved, and what it leaves: a JSON record per finished row."""

import ast
import copy
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml
from jaxtyping import Int64
from matplotlib.figure import Figure
from torch import Tensor

from besa.evaluate.perplexity import Perplexity
from besa.inputs.models import checkpoint_identity
from besa.inputs.text import Sampler
from besa.machine.device import resolve_device, resolve_dtype
from besa.machine.fields import Count, Positive, check_fields, checked
from besa.machine.files import replacing, tensor_sha256, write_note
from besa.machine.provenance import ROOT, provenance, results_root
from besa.paper import tables, verdicts
from besa.paper.tables import Record, slug
from besa.prune import Method
from besa.report import Report


@dataclass(frozen=True)
class Profile:
    """How much a notebook computes."""

    name: str
    n_samples: int
    """Calibration windows."""
    seq_len: int
    """Tokens per window and per test segment."""
    max_segments: int | None
    """Test segments per text; None takes all."""
    max_questions: int | None
    """Questions per zero-shot task; None takes all."""


PROFILES = {
    "smoke": Profile("smoke", n_samples=2, seq_len=64, max_segments=2, max_questions=2),
    "quick": Profile("quick", n_samples=32, seq_len=512, max_segments=32, max_questions=200),
    "paper": Profile("paper", n_samples=128, seq_len=2048, max_segments=None, max_questions=None),
}


def resolve_profile(name: str, device: torch.device) -> Profile:
    """A profile by name; "auto" takes `$BESA_PROFILE`, else paper where a GPU computes and quick where a CPU does.

    Raises:
        ValueError: unknown profile.
    """
    if name == "auto":
        name = os.environ.get("BESA_PROFILE") or ("paper" if device.type == "cuda" else "quick")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: auto, {', '.join(PROFILES)}")
    return PROFILES[name]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model's recipe fixes: `recipe` in reproduce/params/<model>.yaml; these values where there is no file."""

    calibration: str = "sotu"
    """Text that the windows come from."""
    sampler: Sampler = "crop"
    """crop (published: a random crop of a document longer than seq_len) or pack."""
    seed: int = 0
    """Of the sampler."""
    n_samples: Count | None = None
    """Calibration windows; None takes the profile's."""
    seq_len: Count | None = None
    """Tokens per window and per test segment; None takes the profile's."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """None takes what the device is fast in."""
    device: str = "auto"
    """auto, cpu or cuda."""
    d_coef: Positive = 5.0
    """Prodigy's d_coef, row-wise; the published runs set it by model."""
    d_coef_layer: Positive = 0.5
    """The same layer-wise; 50 as for LLaMA-7B prunes SmolLM2 to 46 % in 32 steps."""
    clipping_lr: Positive = 0.2
    """Adam's step size for the clipping of a quantization."""

    __post_init__ = check_fields


def resolve_recipe(model: str, values: dict[str, Any] | None = None) -> Recipe:
    """The recipe of reproduce/params/<model>.yaml, if there is one, with some values changed.

    Raises:
        ValueError: a key that no recipe has, or a value that it does not take.
    """
    path = ROOT / "reproduce" / "params" / f"{Path(model).name}.yaml"
    own = Path(model).name == model and path.is_file()
    found = (yaml.safe_load(path.read_text())["recipe"] if own else {}) | (values or {})
    known = vars(Recipe())
    for key in found:
        if key not in known:
            raise ValueError(f"recipe has an unknown key {key!r}; known: {', '.join(known)}")
    typed = lambda key, value: float(value) if type(value) is int and isinstance(known[key], float) else value
    return Recipe(**{key: typed(key, value) for key, value in found.items()})


def listed(values: Any) -> list[Any]:
    """The values of a papermill list; `-p row_groups row,8` gives a string instead, `-p row_groups 8` a number.

    Raises:
        ValueError: one of them is no name and no finite number.
    """
    if isinstance(values, str):
        words = [word.strip() for word in values.split(",") if word.strip()]
        return [int(word) if word.isdecimal() else word for word in words]
    values = list(values) if isinstance(values, list | tuple) else [values]
    for value in values:
        if not isinstance(value, str | int) and not (isinstance(value, float) and math.isfinite(value)):
            raise ValueError(f"{value!r} is not a name or a finite number, which lists are of: 'row,8' or ['row', 8]")
    return values


_SHARED = ("model", "datasets", "sparsity", "profile", "recipe")
"""What the files in reproduce/params hold, of which a notebook may have no use."""


def _check_injected() -> None:
    """Refuse what papermill gives to a notebook that has no such parameter: papermill warns, and runs all the same.

    Its cell stands behind the notebook's own, among the inputs of the kernel.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    for own, injected in itertools.pairwise(shell.user_ns.get("In", []) if shell else []):
        if injected.startswith("# Parameters\n"):
            known = _assigned(own)
            for name in set(_assigned(injected)) - {*known, *_SHARED}:
                raise ValueError(f"unknown parameter {name!r}; this notebook has {', '.join(known)}")


def _assigned(cell: str) -> list[str]:
    """The names that a cell of plain assignments gives values to."""
    statements = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]) for node in statements]


def open_folder(item: str, folder: str | None = None) -> Path:
    """The folder that an item's records and tables go to, made if need be.

    Args:
        item: `table1`, ...
        folder: None takes `results/<item>` of this repository, or `$BESA_RESULTS/<item>`.

    Raises:
        ValueError: nothing can be written there.
    """
    path = Path(folder) if folder else results_root() / item
    try:
        (path / "records").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"the results folder {str(path)!r} is not writable ({error}); name another one") from error


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any value of the configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def find_record(folder: Path, config: dict[str, Any]) -> Record | None:
    """The finished record of exactly this configuration, if there is one that can be read.

    Raises:
        FileExistsError: what has its name is no file, and would stand in the way after long work.
    """
    path = _record_path(folder, config)
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no ordinary file, and a record is to go there; remove it")
    try:
        record = tables.load_record(path)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if config_hash(record["config"]) == config_hash(config) else None


def save_record(
    folder: Path, config: dict[str, Any], outcome: dict[str, Any], samples: Mapping[str, np.ndarray] | None = None
) -> Record:
    """Write one row's record: configuration and its hash, outcome, provenance; beside it what its metrics are means of.

    Raises:
        ValueError: a smoke run among the results that are tracked.
    """
    if config["profile"] == "smoke" and tables.REFERENCE in folder.resolve().parents:
        raise ValueError(f"smoke runs only show that the code runs: none goes to {folder}; name another results folder")
    if samples:
        path = _samples_path(folder, config)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **samples)
    record = {"config": config, "config_hash": config_hash(config), **outcome}
    record["provenance"] = provenance(config.get("device", "auto"))
    write_note(_record_path(folder, config), record)
    return record


def _record_path(folder: Path, config: dict[str, Any]) -> Path:
    parts = (slug(config["model"]), config["profile"], config["row"], config_hash(config))
    return folder / "records" / ("-".join(parts) + ".json")


def _samples_path(folder: Path, config: dict[str, Any]) -> Path:
    return folder / "samples" / _record_path(folder, config).with_suffix(".npz").name


class Run:
    """One notebook on one model: what it was asked for, where its records, tables and figures go, which rows are there.

    It loads, prunes and measures nothing: the notebook's cells do, for the rows that it `has` not.
    """

    @checked
    def __init__(
        self,
        item: str,
        *,
        model: str,
        profile: str = "auto",
        recipe: dict[str, Any] | None = None,
        results: str | None = None,
        shorter: int = 1,
        **config: Any,
    ) -> None:
        """Resolve a notebook's parameters; the arguments are theirs.

        Args:
            item: the notebook's name: `table1`, ...
            recipe: values that differ from reproduce/params/<model>.yaml's.
            results: folder; None takes `results/<item>`.
            shorter: the profile's seq_len is divided by it, but for the published one.
            config: what else the records must be told apart by.

        Raises:
            ValueError: a parameter is unknown or cannot be had here; before any model is loaded.
        """
        _check_injected()
        self.item, self.model = item, model
        self.recipe = resolve_recipe(model, recipe)
        self.device = resolve_device(self.recipe.device)
        self.profile = resolve_profile(profile, self.device)
        self.calibration, self.sampler, self.seed = self.recipe.calibration, self.recipe.sampler, self.recipe.seed
        self.n_samples = self.recipe.n_samples or self.profile.n_samples
        self.seq_len = self.recipe.seq_len or self.profile.seq_len // (1 if self.profile.name == "paper" else shorter)
        self.dtype = resolve_dtype(self.recipe.dtype, self.device) if self.recipe.dtype else None
        self.config = config | {name: getattr(self, name) for name in ("calibration", "sampler", "seed")}
        # As early as can be: what is replaced while it runs is recorded under what was there, and not found again.
        self.checkpoint = checkpoint_identity(model)
        self.segments: dict[str, int] = {}
        self.folder = open_folder(item, results)

    @property
    def is_smoke(self) -> bool:
        return self.profile.name == "smoke"

    @property
    def test_limit(self) -> int | None:
        """Tokens of each test text; None takes all."""
        return self.profile.max_segments and self.profile.max_segments * self.seq_len

    def fields(self, row: str) -> dict[str, Any]:
        """What the recipe fixes of a method by the name of its row."""
        steps = {"besa-row-wise": self.recipe.d_coef, "besa-layer-wise": self.recipe.d_coef_layer}
        return {"d_coef": steps[row]} if row in steps else {}

    def on(
        self,
        windows: Int64[Tensor, "n_samples seq_len"],
        texts: dict[str, Int64[Tensor, "_"]] | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> "Run":
        """The same run, its records told apart by calibration windows (and their seed), test texts and precision."""
        run = copy.copy(self)
        run.seed = self.seed if seed is None else seed
        run.checkpoint = checkpoint_identity(self.model)  # the tokenizer may just have come from the hub
        run.n_samples, run.dtype = len(windows), dtype or self.dtype
        run.segments = {name: len(tokens) // self.seq_len for name, tokens in (texts or {}).items()}
        run.config = self.config | {"seed": run.seed, "calibration_sha256": tensor_sha256(windows)}
        if texts:
            run.config["test_sha256"] = {name: tensor_sha256(tokens) for name, tokens in texts.items()}
        return run

    def apart(self, **config: Any) -> "Run":
        """The same run, its records told apart by what else a row depends on."""
        run = copy.copy(self)
        run.config = self.config | config
        return run

    def row_config(self, row: str, method: Method | None) -> dict[str, Any]:
        """Everything that a row's numbers depend on, beside the code and the machine."""
        asked = {"item": self.item, "model": self.model, "profile": self.profile.name, **self.config}
        asked |= {"n_samples": self.n_samples, "seq_len": self.seq_len}
        asked |= {"checkpoint": self.checkpoint} if self.checkpoint else {}
        asked |= {"dtype": str(self.dtype), "device": self.device.type, "row": row}
        pruned = {"sparsity": method.sparsity, "method": method.config()} if method else {"sparsity": 0.0}
        return asked | {"method": None} | pruned

    def has(self, row: str, method: Method | None) -> bool:
        """Whether the row is finished, by exactly this configuration."""
        return self._found(row, method) is not None

    def _found(self, row: str, method: Method | None) -> Record | None:
        """Its record, if there is one that has all that `save` writes."""
        record = find_record(self.folder, self.row_config(row, method))
        return record if record and tables.is_whole(record) else None

    def work(self, row: str, method: Method | None) -> Path:
        """Where a row's pruned checkpoint lies until the row is saved, if its model is too large for memory."""
        return self.folder / f".{row}-{config_hash(self.row_config(row, method))}"

    def state(self, row: str, method: Method | None) -> Path:
        """A file for the state of a row's long work, until the row is saved."""
        work = self.work(row, method)
        return work.with_name(f"{work.name}.pt")

    def save(
        self,
        row: str,
        method: Method | None,
        report: Report | None,
        metrics: dict[str, float],
        samples: Mapping[str, np.ndarray] | None = None,
        **more: Any,
    ) -> Record:
        """Write the record of a finished row.

        Args:
            row: its name, unique in the table and fit for a file name.
            method, report: what pruned, and what it did; None for the dense model.
            metrics: what was measured; a perplexity brings its segments' losses along.
            samples: what else a metric is the mean of, by its name, such as the answers to a task's questions.
            more: what else the record keeps.
        """
        outcome = {
            "metrics": metrics,
            "sparsity": report.sparsity if report else 0.0,
            "seconds": report.seconds if report else 0.0,
            "peak_bytes": report.peak_bytes if report else 0,
            "projections": report.rows if report else [],
        }
        losses = {name: value.losses.numpy() for name, value in metrics.items() if isinstance(value, Perplexity)}
        samples = {**losses, **(samples or {})}
        record = save_record(self.folder, self.row_config(row, method), outcome | more, samples)
        shutil.rmtree(self.work(row, method), ignore_errors=True)
        self.state(row, method).unlink(missing_ok=True)
        print(row, {name: round(value, 4) for name, value in metrics.items()}, flush=True)
        for missed in report.missed if report else ():
            print(f"{row} WARNING: {missed}", flush=True)
        return record

    def records(self, rows: dict[str, Method | None]) -> list[Record]:
        """The records of finished rows, in their order.

        Raises:
            ValueError: a row has none that can be read.
        """
        found = {row: self._found(row, method) for row, method in rows.items()}
        for row in (row for row, record in found.items() if record is None):
            raise ValueError(f"row {row!r} has no whole record in {self.folder}; run the cells before this one again")
        return list(found.values())

    def samples(self, record: Record) -> dict[str, np.ndarray]:
        """What the metrics of a row are means of: losses by segment, answers by question; none of older records.

        Raises:
            ValueError: their file is damaged; names it.
        """
        path = _samples_path(self.folder, record["config"])
        if not path.is_file():
            return {}
        try:
            with np.load(path) as file:
                return dict(file)
        except Exception as error:  # numpy, zipfile and zlib raise many kinds
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); delete its record, too, and run the row again"
            ) from error

    @property
    def stem(self) -> str:
        """What this run's tables and figures are called."""
        return f"{slug(self.model)}-{self.profile.name}"

    def caption(self, text: str) -> str:
        """A caption that says what the numbers rest on."""
        caption = f"{text}. Profile {self.profile.name}: {self.n_samples} windows of {self.seq_len} tokens of "
        caption += self.calibration
        if self.segments:
            caption += "; tested on " + ", ".join(f"{n} segments of {name}" for name, n in self.segments.items())
        return caption + "." + " SMOKE RUN: these numbers only show that the code runs." * self.is_smoke

    def write_table(self, frame: pd.DataFrame, text: str, suffix: str = "") -> str:
        """Write a table under the run's name; returns it as Markdown."""
        return tables.write_table(frame, self.folder, self.stem + suffix, self.caption(text))

    def write_published(self, records: list[Record], metric: str = "perplexity", **options: Any) -> str:
        """Write our numbers beside the published ones, if there are any (`tables.compare`); returns Markdown."""
        comparison = tables.compare(records, options.pop("item", self.item), metric, **options)
        if comparison.empty:
            return f"The paper has no numbers for {self.model} here; its LLaMA numbers are not comparable."
        return self.write_table(comparison, "Ours beside published", "-published")

    def write_verdicts(
        self,
        records: Iterable[Record],
        claims: Iterable[tuple[str, str]],
        metric: str = "perplexity",
        over: str = "text",
    ) -> str:
        """Write whether rows are better than others, as is claimed of them (`verdicts.judge`); returns Markdown."""
        found = verdicts.judge(records, claims, self.samples, metric, over)
        if found.empty:
            return "Of the rows that are compared, one is missing: there is nothing to judge."
        return self.write_table(found, "Claims, judged by paired differences at 95 %", "-verdicts")

    def write_reference(self, records: Iterable[Record]) -> str:
        """Write our numbers beside those that came with the repository, if there are any; returns Markdown."""
        if tables.REFERENCE in self.folder.resolve().parents:
            return "This is the reference run."
        comparison = tables.beside_reference(records, tables.REFERENCE / self.item)
        if comparison.empty:
            return f"The repository holds no reference run of these rows ({self.model}, profile {self.profile.name})."
        return self.write_table(comparison, f"Ours beside results/reference/{self.item}", "-reference")

    def save_figure(self, figure: Figure, suffix: str = "", seeds: Sequence[int] = ()) -> None:
        """Save a figure under the run's name, as PNG and SVG; one without a title gets model, profile and draws."""
        if not figure.get_suptitle():
            drawn = [f"mean of {len(seeds)} draws"] if len(seeds) > 1 else [f"seed {seed}" for seed in seeds]
            figure.suptitle(", ".join([self.model, f"profile {self.profile.name}", *drawn]))
        tables.save_figure(figure, self.folder, self.stem + suffix)
