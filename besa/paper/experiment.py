"""What the reproduce notebooks run: a model and its texts, prepared once; a record per row, finished rows skipped."""

import functools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int64
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.checkpoint.format import find_checkpoint, precision_of
from besa.checkpoint.run import prune_checkpoint
from besa.decoder import find_blocks
from besa.evaluate.perplexity import hidden_state_errors, perplexity
from besa.inputs.models import load_model, load_shapes, load_tokenizer, weight_bytes
from besa.inputs.text import Sampler, calibration_windows, test_tokens
from besa.machine.device import resolve_device, resolve_dtype
from besa.machine.files import tensor_sha256
from besa.machine.memory import USABLE, Cost, free_device, measure
from besa.paper import results
from besa.paper.results import Profile, Record
from besa.prune import Method, prune
from besa.report import Report

Evaluate = Callable[[PreTrainedModel, Report | None], dict[str, Any]]
"""(the model after pruning, what pruning did or None for the dense model) -> `metrics` and more for the record."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One model, what it is calibrated and tested on, and the folder that records, tables and figures go to."""

    item: str
    """The notebook's name: `table1`, ..."""
    model: str
    profile: Profile
    folder: Path
    dtype: torch.dtype
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    windows: Int64[Tensor, "n_samples seq_len"]
    """Calibration token ids."""
    texts: dict[str, Int64[Tensor, "_"]]
    """Test streams by name."""
    config: dict[str, Any]
    """What else every record is told apart by."""

    @classmethod
    def prepare(
        cls,
        item: str,
        *,
        model: str,
        profile: str = "auto",
        datasets: str | None = None,
        n_samples: int | None = None,
        seq_len: int | None = None,
        calibration: str = "sotu",
        sampler: Sampler = "crop",
        seed: int = 0,
        dtype: str | None = None,
        device: str = "auto",
        results_folder: str | None = None,
        **config: Any,
    ) -> "Experiment":
        """Resolve a notebook's parameters; the arguments are theirs.

        Args:
            n_samples, seq_len: None takes the profile's.
            datasets: test texts, comma-separated; None takes none.
            results_folder: None takes `results/<item>`.
            config: what else the records must be told apart by.

        Raises:
            ValueError: a parameter is unknown, out of range or cannot be had here; before any model is loaded.
        """
        resolved = results.resolve_profile(profile)
        place = resolve_device(device)
        precision = resolve_dtype(dtype, place)
        folder = results.open_folder(item, results_folder)
        tokenizer = load_tokenizer(model)
        n_samples, seq_len = n_samples or resolved.n_samples, seq_len or resolved.seq_len
        texts = [] if datasets is None else datasets.split(",")
        limit = resolved.max_segments and resolved.max_segments * seq_len
        return cls(
            item=item,
            model=model,
            profile=resolved,
            folder=folder,
            dtype=precision,
            device=place,
            tokenizer=tokenizer,
            windows=calibration_windows(calibration, tokenizer, n_samples, seq_len, seed, sampler),
            texts={text: test_tokens(text, tokenizer)[:limit] for text in texts},
            config={"calibration": calibration, "sampler": sampler, "seed": seed, **config},
        )

    def with_samples(self, n_samples: int) -> "Experiment":
        """The same on the first `n_samples` calibration windows.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= n_samples <= len(self.windows):
            raise ValueError(f"n_samples {n_samples} is outside [1, {len(self.windows)}], the windows there are")
        return replace(self, windows=self.windows[:n_samples])

    def with_segments(self, n_segments: int | None) -> "Experiment":
        """The same on the first `n_segments` test segments of every text; None takes all.

        Raises:
            ValueError: there are fewer.
        """
        if n_segments is None:
            return self
        seq_len = self.windows.shape[1]
        for text, tokens in self.texts.items():
            if not 1 <= n_segments <= len(tokens) // seq_len:
                raise ValueError(f"n_segments {n_segments} is outside [1, {len(tokens) // seq_len}], what {text} has")
        return replace(self, texts={text: tokens[: n_segments * seq_len] for text, tokens in self.texts.items()})

    def grid(self, values: list[Any]) -> list[Any]:
        """The values of a sweep; the first, the middle and the last of them in a smoke run."""
        few = dict.fromkeys((0, len(values) // 2, len(values) - 1))
        return [values[index] for index in few] if self.is_smoke else values

    def check(self, methods: Iterable[Method | None]) -> None:
        """Refuse methods that do not fit the model's shapes, before any work.

        Raises:
            ValueError: as the method's own check; the model is too large for memory and stored in another precision,
                or there is no room on the disk for a pruned one.
        """
        methods = list(methods)
        if any(methods) and self._is_too_large():
            self._check_stored(self.shapes.config.dtype)
            needed, free = weight_bytes(self.shapes, self.dtype), shutil.disk_usage(self.folder).free
            free += sum(path.stat().st_size for path in self.folder.glob(".*/*.safetensors"))  # of interrupted rows
            if needed > USABLE * free:
                raise ValueError(
                    f"{self.model} is too large for the memory of {self.device}; pruned it takes {needed / 1e9:.0f} GB "
                    f"of disk, and {free / 1e9:.0f} GB are free in {self.folder}; name another results folder"
                )
        for method in methods:
            if method:
                method.check(self.shapes)

    @functools.cached_property
    def shapes(self) -> PreTrainedModel:
        """The model without its weights."""
        return load_shapes(self.model)

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return len(find_blocks(self.shapes))

    def row_config(self, row: str, method: Method | None) -> dict[str, Any]:
        """Everything that a row's numbers depend on, beside the code and the machine."""
        config = {"item": self.item, "model": self.model, "profile": self.profile.name, **self.config}
        config |= {"n_samples": len(self.windows), "seq_len": self.windows.shape[1]}
        config |= {"dtype": str(self.dtype), "device": self.device.type}
        config |= {"calibration_sha256": tensor_sha256(self.windows)}
        if self.texts:
            config["test_sha256"] = {text: tensor_sha256(stream) for text, stream in self.texts.items()}
        return {
            **config,
            "row": row,
            "sparsity": method.sparsity if method else 0.0,
            "method": method.config() if method else None,
        }

    def record(self, row: str, method: Method | None, evaluate: Evaluate | None = None) -> Record:
        """The finished record of a row, or a new one: load the model, prune it, evaluate it.

        Args:
            row: the row's name, unique in the table and fit for a file name.
            method: None leaves the model dense.
            evaluate: what is measured; None takes the perplexity of every text.

        Returns:
            The record. `seconds` are pruning's: in memory of the whole loop, from checkpoint to checkpoint the blocks'
            sum. `resumed` says whether an earlier call did a part of the work, whose peak memory is lost.
        """
        config = self.row_config(row, method)
        record, work = results.find_record(self.folder, config), self._work(config)
        if record is None:
            resumed = work.exists()
            network, report, cost = self._prune(method, work)
            with measure() as evaluation:
                measured = (evaluate or self.perplexities)(network, report)
            outcome = {
                "sparsity": report.sparsity if report else 0.0,
                "seconds": report.seconds if report else 0.0,
                "peak_bytes": cost.peak_bytes,
                "resumed": resumed,
                "projections": report.rows if report else [],
                "evaluation_seconds": evaluation.seconds,
                **measured,
            }
            record = results.save_record(self.folder, config, outcome)
        shutil.rmtree(work, ignore_errors=True)
        print(row, {name: round(value, 4) for name, value in record["metrics"].items()}, flush=True)
        return record

    def _work(self, config: dict[str, Any]) -> Path:
        """Where the pruned checkpoint of a row lies until the row is recorded, if its model is too large for memory."""
        return self.folder / f".{config['row']}-{results.config_hash(config)}"

    def _prune(self, method: Method | None, work: Path) -> tuple[PreTrainedModel, Report | None, Cost]:
        """The model after pruning, what pruning did, and what it cost."""
        if method and (work.exists() or self._is_too_large()):
            self._check_stored(precision_of(find_checkpoint(self.model)))
            with measure() as cost:
                report = prune_checkpoint(self.model, work, self.windows, method, device=str(self.device))
            network, _ = load_model(str(work), self.dtype, str(self.device))
        else:
            network, _ = load_model(self.model, self.dtype, str(self.device))
            with measure() as cost:
                report = prune(network, self.windows, method) if method else None
        return network, report, cost

    def _is_too_large(self) -> bool:
        """Whether pruning the model as a whole would take more memory than there is.

        Counted are its weights, the hidden states of all windows twice, and 8 bytes for each weight of a block.
        """
        hidden_size = self.shapes.config.get_text_config().hidden_size
        streams = 2 * self.windows.numel() * hidden_size * self.dtype.itemsize
        working = 8 * sum(parameter.numel() for parameter in find_blocks(self.shapes)[0].parameters())
        return weight_bytes(self.shapes, self.dtype) + streams + working > USABLE * free_device(self.device)

    def _check_stored(self, stored: torch.dtype | None) -> None:
        """A model too large for memory is pruned in the precision that it is stored in."""
        if stored not in (None, self.dtype):
            raise ValueError(
                f"{self.model} is stored in {stored} and too large to be converted to {self.dtype} in the memory of "
                f"{self.device}; give dtype={str(stored).removeprefix('torch.')}, or take a larger machine"
            )

    def perplexities(self, network: PreTrainedModel, report: Report | None) -> dict[str, Any]:
        """Perplexity by text, in exp(nats per token)."""
        seq_len = self.windows.shape[1]
        return {"metrics": {text: perplexity(network, tokens, seq_len) for text, tokens in self.texts.items()}}

    def block_errors(self, network: PreTrainedModel, report: Report | None) -> dict[str, Any]:
        """Perplexities, and the hidden states' errors behind each block on the first text's segments."""
        dense, _ = load_model(self.model, self.dtype, str(self.device))
        seq_len = self.windows.shape[1]
        tokens = next(iter(self.texts.values()))
        windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
        measured = self.perplexities(network, report)
        rows = hidden_state_errors(network, dense, windows)
        measured["metrics"] |= {"error first block": rows[0]["error"], "error last block": rows[-1]["error"]}
        return {**measured, "errors": rows}

    @property
    def stem(self) -> str:
        """What this experiment's tables and figures are called."""
        return f"{results.slug(self.model)}-{self.profile.name}"

    def caption(self, text: str) -> str:
        """A caption that says what the numbers rest on."""
        n_samples, seq_len = self.windows.shape
        caption = f"{text}. Profile {self.profile.name}: {n_samples} windows of {seq_len} tokens of "
        caption += self.config["calibration"]
        if self.texts:
            segments = {name: len(tokens) // seq_len for name, tokens in self.texts.items()}
            caption += "; tested on " + ", ".join(f"{n} segments of {name}" for name, n in segments.items())
        return caption + "." + " SMOKE RUN: these numbers only show that the code runs." * self.is_smoke

    @property
    def is_smoke(self) -> bool:
        return self.profile.name == "smoke"

    def write_table(self, frame: pd.DataFrame, text: str, suffix: str = "") -> str:
        """Write a table under the experiment's name; returns it as Markdown."""
        return results.write_table(frame, self.folder, self.stem + suffix, self.caption(text))

    def write_published(self, records: list[Record], metric: str = "perplexity", over: str = "text") -> str:
        """Write our numbers beside the published ones, if there are any; returns Markdown."""
        comparison = results.compare(records, self.item, metric).rename(columns={"text": over})
        if comparison.empty:
            return f"The paper has no numbers for {self.model} here; its LLaMA numbers are not comparable."
        return self.write_table(comparison.set_index("method"), "Ours beside published", "-published")

    def save_figure(self, figure: Figure, suffix: str = "") -> None:
        """Save a figure under the experiment's name, as PNG and SVG; one without a title gets model and profile."""
        if not figure.get_suptitle():
            figure.suptitle(f"{self.model}, profile {self.profile.name}", fontsize=10)
        results.save_figure(figure, self.folder, self.stem + suffix)
