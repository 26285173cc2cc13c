"""One row of a table: prune the model, and write the record."""

import ast
import contextlib
import copy
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import besa
from besa.data import files, models
from besa.data.models import load_tokenizer
from besa.evaluate.perplexity import Perplexity
from besa.loop import Method
from reproduce import verdicts
from reproduce.methods import BUDGETS
from reproduce.records import config_hash, save_record
from reproduce.tables import ROOT, Record, slug

if TYPE_CHECKING:
    from reproduce.runs import Run

PRUNED_BY = ("model", "checkpoint", "calibration_sha256", "dtype", "device", "method", "reconstruct", "budgets")
"""Entries of a configuration that decide the weights before the epoch."""


@dataclass
class Row:
    """One row of a table: a method, its windows, and the configuration that its record is found by."""

    run: "Run"
    method: Method | None
    windows: Tensor | None
    config: dict[str, Any]
    record: Record | None
    reconstruct: Any = None
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    weights_sha256: str | None = None

    @property
    def name(self) -> str:
        return self.config["row"]

    def prune(self) -> tuple[PreTrainedModel, besa.Report | None]:
        """Load the model and prune it. A model larger than the GPU stays in host memory, one block at a time moves.

        `budgets` in the configuration shares the sparsity out between blocks, by that spread or rule; `epoch` holds the
        options of `besa.finetune`, which then trains the kept weights. If `Run.keeps`, both models stay on the disk.
        """
        device, method, report = self.run.device, self.method, None
        model = self._load(self.run.model)
        if fits := models.fits(model, device):
            model.to(device)
        if method and self.run.keeps and type(method).prepared is Method.prepared:
            model, report = self._pruned_folder(model, method)
            model = model.to(device) if fits else model
        elif method:
            method = self._prepared(model, method)
            with self._timed("pruning"):
                block_device = None if fits else str(device)
                report = besa.prune(model, self.windows, method, reconstruct=self.reconstruct, device=block_device)
        if report:
            model = self._trained(model, report)
            self.weights_sha256 = weights_sha256(model)
        return model if fits else models.to_device(model, device), report

    def _load(self, name: str | Path) -> PreTrainedModel:
        return besa.load_model(name, self.run.dtype, "cpu")[0]

    def _prepared(self, model: PreTrainedModel, method: Method) -> Method:
        """The method with its budgets by block."""
        if rule := self.config.get("budgets"):
            budgets_of = BUDGETS.get(rule) or partial(besa.block_budgets, spread=rule)
            with self._timed("budgets"):
                budgets = budgets_of(model, self.windows, method.sparsity)
            method = replace(method, sparsities=budgets)
        return method

    def _pruned_folder(self, model: PreTrainedModel, method: Method) -> tuple[PreTrainedModel, besa.Report]:
        """Prune into a folder, or continue there; CPU seconds are known of a run without interruption."""
        folder = self._folder(*PRUNED_BY)
        costs, is_new = Path(f"{folder}.json"), not folder.exists()
        method = self._prepared(model, method)
        with self._timed("pruning"):
            report = besa.prune_checkpoint(
                self.run.model,
                folder,
                self.windows,
                method,
                device=self.run.device.type,
                dtype=self.run.dtype,
                reconstruct=self.reconstruct,
            )
        if is_new:
            files.write_json(costs, self.cpu_seconds)
        self.cpu_seconds = json.loads(costs.read_text()) if costs.exists() else {}
        return self._load(folder), report

    def _trained(self, model: PreTrainedModel, report: besa.Report) -> PreTrainedModel:
        """The model after the epoch, if there is one, from its folder or trained now."""
        if (options := self.config.get("epoch")) is None:
            return model
        folder = self._folder(*PRUNED_BY, "epoch")
        costs = Path(f"{folder}.json")
        if self.run.keeps and costs.exists():  # written last
            self.cpu_seconds |= json.loads(costs.read_text())
            return self._load(folder).to(model.device)
        with self._timed("epoch"):
            besa.finetune(model, self.windows, report, **options)
        if self.run.keeps:
            besa.save_model(model, load_tokenizer(self.run.model), folder)
            files.write_json(costs, {"epoch": self.cpu_seconds["epoch"]})
        return model

    def _folder(self, *names: str) -> Path:
        """Folder of the model that these entries of the configuration, and the code, lead to."""
        wanted = {name: self.config.get(name) for name in names}
        key = config_hash(wanted | {"source": source_sha256(), "torch": torch.__version__})
        return files.cache_folder() / "pruned" / f"{slug(self.run.model)}-{self.config['method']['method']}-{key}"

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.cpu_seconds[part] = time.process_time() - start

    def save(
        self,
        report: besa.Report | None,
        metrics: Mapping[str, float],
        samples: Mapping[str, np.ndarray] | None = None,
        **more: Any,
    ) -> None:
        """Write the record of the row.

        Args:
            report: of `prune`; None for the dense model.
            samples: values whose means the metrics are; a perplexity brings its own, the losses of its segments.
            more: further entries of the record.
        """
        outcome = {
            "metrics": dict(metrics),
            "sparsity": report.sparsity if report else 0.0,
            "seconds": report.seconds if report else 0.0,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": report.peak_bytes if report else 0,
            "weights_sha256": self.weights_sha256,
            "projections": copy.deepcopy(report.rows) if report else [],
        }
        losses = {name: value.losses.numpy() for name, value in metrics.items() if isinstance(value, Perplexity)}
        losses |= {verdicts.DOCUMENTS + name: self.run.documents[name] for name in losses if name in self.run.documents}
        self.record = save_record(self.run.folder, self.config, outcome | more, losses | dict(samples or {}))
        print(self.name, {name: round(float(value), 4) for name, value in metrics.items()}, flush=True)


def weights_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over the SHA-256 of all tensors, by name."""
    digests = {name: files.tensor_sha256(tensor) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@functools.cache
def source_sha256() -> str:
    """SHA-256 over the statements that prune, without comments and docstrings."""
    paths = [*ROOT.glob("besa/*.py"), *ROOT.glob("besa/beyond/*.py"), *ROOT.glob("reproduce/[mp]e*.py")]
    dumps = [ast.dump(WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))) for path in sorted(paths)]
    return hashlib.sha256("".join(dumps).encode()).hexdigest()


class WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node
