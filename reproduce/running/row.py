"""Prune the model of a row, and write its record."""

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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import besa
from besa.data import files
from besa.data.models import load_tokenizer
from besa.evaluate.perplexity import Perplexity
from besa.loop import Method
from reproduce import ROOT
from reproduce.methods import BUDGETS
from reproduce.records import Config, Record, config_hash, save_record, slug, verdicts

PRUNED_BY = ("model", "checkpoint", "calibration_sha256", "dtype", "device", "method", "reconstruct", "budgets")
"""Entries of a configuration that decide the weights before the epoch."""

PRUNING = ("budgets.py", "peer.py", "peers.py", "variants.py")
"""Files of reproduce/methods/ that prune."""


@dataclass
class Row:
    """One row of a table: a method, its windows, and the configuration that its record is found by.

    Args:
        model: name of the model.
        folder: of its record.
        documents: by test text, the document in which each segment begins.
        keeps: leave pruned models in $BESA_CACHE/pruned.
    """

    model: str
    dtype: torch.dtype
    device: torch.device
    folder: Path
    documents: Mapping[str, np.ndarray]
    keeps: bool
    method: Method | None
    windows: Tensor | None
    config: Config
    record: Record | None
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    weights_sha256: str | None = None

    @property
    def name(self) -> str:
        return self.config["row"]

    def prune(self) -> tuple[PreTrainedModel, besa.Report | None]:
        """Load the model and prune it. A model larger than the GPU stays in host memory, one block at a time moves.

        `budgets` in the configuration shares the sparsity out between blocks, by that spread or rule; `epoch` holds the
        options of `besa.finetune`, which then trains the kept weights. If `keeps`, both models stay on the disk.
        """
        device = self.device
        method = self.method
        report = None
        model = self._load(self.model)
        fits = device.type == "cpu" or model.get_memory_footprint() < 0.6 * torch.cuda.mem_get_info(device)[0]
        if fits:
            model.to(device)
        if method and self.keeps and not hasattr(method, "prepared"):
            model, report = self._pruned_folder(model, method)
            model = model.to(device) if fits else model
        elif method:
            method = self._prepared(model, method)
            with self._timed("pruning"):
                block_device = None if fits else str(device)
                report = besa.prune(model, self.windows, method, reconstruct=self._reconstruct(), device=block_device)
        if report:
            model = self._trained(model, report)
            self.weights_sha256 = weights_sha256(model)
        if not fits:
            import accelerate

            parts = accelerate.infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules))
            model = accelerate.dispatch_model(model, parts)
        return model, report

    def _load(self, name: str | Path) -> PreTrainedModel:
        return besa.load_model(name, self.dtype, "cpu")[0]

    def _reconstruct(self) -> besa.Reconstruct | None:
        kind = self.config.get("reconstruct")
        return besa.Reconstruct(kind) if kind else None

    def _prepared(self, model: PreTrainedModel, method: Method) -> Method:
        """The method after its look at the dense model."""
        if hasattr(method, "prepared"):
            method = method.prepared(model, self.windows)
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
                self.model,
                folder,
                self.windows,
                method,
                device=self.device.type,
                dtype=self.dtype,
                reconstruct=self._reconstruct(),
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
        if self.keeps and costs.exists():  # written last
            self.cpu_seconds |= json.loads(costs.read_text())
            return self._load(folder).to(model.device)
        with self._timed("epoch"):
            besa.finetune(model, self.windows, report, **options)
        if self.keeps:
            besa.save_model(model, load_tokenizer(self.model), folder)
            files.write_json(costs, {"epoch": self.cpu_seconds["epoch"]})
        return model

    def _folder(self, *names: str) -> Path:
        """Folder of the model that these entries of the configuration, and the code, lead to."""
        wanted = {name: self.config.get(name) for name in names}
        key = config_hash(wanted | {"source": source_sha256(), "torch": torch.__version__})
        return files.cache_folder() / "pruned" / f"{slug(self.model)}-{self.config['method']['method']}-{key}"

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
        losses |= {verdicts.DOCUMENTS + name: self.documents[name] for name in losses if name in self.documents}
        self.record = save_record(self.folder, self.config, outcome | more, losses | dict(samples or {}))
        print(self.name, {name: round(float(value), 4) for name, value in metrics.items()}, flush=True)


def weights_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over the SHA-256 of all tensors, by name."""
    digests = {name: files.tensor_sha256(tensor) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@functools.cache
def source_sha256() -> str:
    """SHA-256 over the statements that prune, without comments and docstrings."""
    paths = [*sorted(ROOT.glob("besa/*.py")), *sorted(ROOT.glob("besa/beyond/*.py"))]
    paths += [ROOT / "reproduce" / "methods" / name for name in PRUNING]
    dumps = [ast.dump(WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))) for path in paths]
    return hashlib.sha256("".join(dumps).encode()).hexdigest()


class WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node
