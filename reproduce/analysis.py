"""Measurements of single notebooks: hidden states, stored bits, learned allocations; random checkpoints."""

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from besa.decoder import embed, find_blocks, projections, record_calls, run_block
from besa.importance import wanda
from besa.masks import sorted_rows
from besa.quantize import Quantize
from besa.report import Report
from besa.system import Cost
from besa.walk import frozen
from reproduce.cycles import simulate_cycles
from reproduce.methods import dense_statistics

# Figure 1


def hidden_state_errors(model: PreTrainedModel, dense: PreTrainedModel, segments: Tensor) -> pd.DataFrame:
    """Relative errors of a pruned model's hidden states behind each block, a line per segment and block.

    error = mean over tokens of ||h - h_dense|| / ||h_dense||; frobenius_error is that of the whole segment.
    """
    lines = []
    with frozen(model), frozen(dense):
        calls, dense_calls = record_calls(model, segments[:1]), record_calls(dense, segments[:1])
        for number, segment in enumerate(segments.split(1)):
            hidden, target = embed(model, segment), embed(dense, segment)
            steps = zip(find_blocks(model), find_blocks(dense), calls, dense_calls, strict=True)
            for index, (block, dense_block, call, dense_call) in enumerate(steps):
                hidden, target = run_block(block, hidden, call), run_block(dense_block, target, dense_call)
                exact = target.to(hidden.device).float()
                lost, norm = (hidden.float() - exact).norm(dim=2), exact.norm(dim=2)  # (1, seq_len)
                errors = {"error": float((lost / norm).mean()), "frobenius_error": float(lost.norm() / norm.norm())}
                lines.append({"window": number, "block": index, **errors})
    return pd.DataFrame(lines)


# Table 3


def stored_bits(keep_masks: Mapping[tuple[int, str], Tensor], quantizer: Quantize) -> float:
    """Bits per weight: codes of the kept weights, a bit per weight for the mask, scales and zero-points.

    A projection without zeros has no mask. A scale takes two bytes, a zero-point one.
    """
    n_bytes = 0
    n_weights = 0
    for keep_mask in keep_masks.values():
        rows, columns = keep_mask.shape
        n_kept = int(keep_mask.sum())
        n_bytes += math.ceil(n_kept * quantizer.bits / 8)
        n_bytes += 3 * rows * columns // (quantizer.group_size or columns)
        if n_kept < keep_mask.numel():
            n_bytes += math.ceil(keep_mask.numel() / 8)
        n_weights += keep_mask.numel()
    return 8 * n_bytes / n_weights


# Allocation

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def row_analysis(keep_masks: Mapping[tuple[int, str], Tensor], dense: PreTrainedModel, windows: Tensor) -> dict:
    """Sparsities of rows compared with features of the dense model, as entries of a record.

    `row_quantiles`: QUANTILES of the sparsities of all rows, by projection. `row_correlations`: Spearman's correlation
    of sparsity and each feature over the rows of a projection. `feature_means`: means over its rows.
    """
    by_name: dict[str, list[np.ndarray]] = {}
    correlations, means, statistics = [], [], dense_statistics(dense, windows)
    for index, block in enumerate(find_blocks(dense)):
        for name, linear in projections(block).items():
            weight = linear.weight.detach()
            sparsity = (~keep_masks[index, name]).float().mean(1).numpy()
            features = row_features(weight, wanda(weight, statistics[index][name]))
            by_name.setdefault(name, []).append(sparsity)
            correlations.append({"block": index, "projection": name, **spearman(features, sparsity)})
            means.append({"block": index, "projection": name, **features.mean().to_dict()})
    quantiles = {name: np.quantile(np.concatenate(rows), QUANTILES).tolist() for name, rows in by_name.items()}
    return {"row_quantiles": quantiles, "row_correlations": correlations, "feature_means": means}


@torch.no_grad()
def row_features(weight: Tensor, importance: Tensor) -> pd.DataFrame:
    """A line per row: norm, sum of importances, their kurtosis, and the share of the less important half."""
    total = importance.sum(1)
    z = (importance - importance.mean(1, keepdim=True)) / importance.std(1, keepdim=True, correction=0)
    half = sorted_rows(importance)[:, : importance.shape[1] // 2].sum(1)
    features = {"row norm": weight.float().norm(dim=1), "importance": total}
    features |= {"kurtosis": z.pow(4).mean(1) - 3, "lost at half": half / total}
    return pd.DataFrame({name: values.cpu().numpy() for name, values in features.items()})


def spearman(features: pd.DataFrame, target: pd.Series | np.ndarray) -> dict[str, float | None]:
    """Rank correlation of each column with the target; None if either is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of constants
        correlations = features.corrwith(pd.Series(np.asarray(target), index=features.index), method="spearman")
    return {name: None if np.isnan(rho) else float(rho) for name, rho in correlations.items()}


def correlation_table(by_row: pd.DataFrame, frame: pd.DataFrame, features: list[str]) -> pd.DataFrame:
    """Correlations with sparsity among rows and among blocks: a column per projection, and their mean.

    Args:
        by_row: `row_correlations`, averaged over the blocks.
        frame: a line per block and projection, with `sparsity` and the features.
    """
    rows = by_row.drop(columns="block").set_index("projection").astype(float).groupby(level=0, sort=False).mean().T
    groups = frame.groupby("projection", sort=False)
    lines = {name: spearman(group[features].reset_index(drop=True), group["sparsity"]) for name, group in groups}
    blocks = pd.DataFrame.from_dict(lines, orient="index", dtype=float).T
    table = pd.concat({"rows": rows, "blocks": blocks}, names=["among", "feature"])
    return table.assign(mean=table.mean(axis=1))


# Cost, scale

SHAPES: dict[str, dict[str, Any]] = {  # without the number of blocks
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-7b": {},  # the default of transformers
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def write_random(shape: str, folder: Path, n_blocks: int) -> None:
    """Write a bfloat16 checkpoint of random weights."""
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=n_blocks, max_position_embeddings=4096)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


@contextlib.contextmanager
def watch_anonymous() -> Iterator[Cost]:
    """Peak of the anonymous memory of this process (what no file backs), looked at every 20 ms; Linux only."""
    process, cost, done = psutil.Process(), Cost(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            memory = process.memory_info()
            cost.peak_bytes = max(cost.peak_bytes, memory.rss - getattr(memory, "shared", 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield cost
    done.set()
    watcher.join()


# Table 4


def simulate_model(model: PreTrainedModel, keep_masks: Mapping[tuple[int, str], Tensor] | None = None) -> pd.DataFrame:
    """`simulate_cycles` of every projection, a row per block and projection.

    `down_proj` runs in square patches, cut along its columns, whose cycles add up.

    Args:
        keep_masks: `Report.keep_masks`; None for the dense model.
    """
    table = []
    for index, block in enumerate(find_blocks(model)):
        for name, projection in projections(block).items():
            (rows, columns), kind = projection.weight.shape, name.rpartition(".")[2]
            keep_mask = keep_masks[index, name] if keep_masks else torch.ones(rows, columns, dtype=torch.bool)
            patches = keep_mask.split(rows, dim=1) if kind == "down_proj" else [keep_mask]
            runs = [simulate_cycles(patch) for patch in patches]
            kept = sum(run.dense_kept + run.sparse_kept for run in runs)
            table.append({"block": index, "projection": name, "kind": kind, "rows": rows, "columns": columns})
            table[-1]["sparsity"] = 1 - kept / (rows * columns)
            table[-1]["cycles"] = sum(run.cycles for run in runs)
            table[-1]["dense_cycles"] = sum(run.dense_cycles for run in runs)
    return pd.DataFrame(table)


def row_histogram(report: Report) -> list[int]:
    """Rows of all projections by sparsity, in 100 bins of 1 %."""
    sparsities = torch.cat([1 - keep_mask.float().mean(1) for keep_mask in report.keep_masks.values()])
    return torch.histc(sparsities, 100, 0, 1).long().tolist()
