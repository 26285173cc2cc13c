"""What a learned allocation looks like by row, and what it goes along with."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.decoder import find_blocks, projections, weight_of
from besa.importance import collect_statistics, wanda
from besa.inputs.models import load_model
from besa.paper.experiment import Experiment
from besa.report import Report

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Of the rows' sparsities, by projection."""


@torch.no_grad()
def row_features(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"]
) -> dict[tuple[int, str], pd.DataFrame]:
    """Features of every row of a dense model's projections, by block and projection; one pass over the windows.

    The importance is Wanda's on the dense model's own inputs: what can be known of a row before any pruning.
    """
    blocks = find_blocks(model)
    with contextlib.ExitStack() as stack:
        statistics = [
            stack.enter_context(collect_statistics(projections(block), len(windows), False)) for block in blocks
        ]
        for window in windows.split(1):
            model.base_model(window.to(model.device), use_cache=False)
    return {
        (index, name): importance_features(weight, wanda(weight, statistics[index][name]))
        for index, block in enumerate(blocks)
        for name, projection in projections(block).items()
        for weight in [weight_of(projection)]
    }


def importance_features(
    weight: Float[Tensor, "rows columns"], importance: Float[Tensor, "rows columns"]
) -> pd.DataFrame:
    """One line per row i with importances s_ij over its C columns.

    Columns: `row norm` ||W_i||_2; `importance` sum_j s_ij; `kurtosis` mean_j z_ij^4 - 3 of the standardized
    importances z_ij (outliers raise it); `lost at half`, the share of the sum that the C // 2 least important hold.
    """
    step = max(1, 2**25 // importance.shape[1])  # sorting a 70B projection at once takes 10 GB
    slices = zip(weight.split(step), importance.split(step), strict=True)
    return pd.concat([_features(*rows) for rows in slices], ignore_index=True)


def _features(weight: Float[Tensor, "rows columns"], importance: Float[Tensor, "rows columns"]) -> pd.DataFrame:
    total = importance.sum(1)
    z = (importance - importance.mean(1, keepdim=True)) / importance.std(1, keepdim=True, correction=0)
    half = importance.sort(dim=1).values[:, : importance.shape[1] // 2].sum(1)
    features = {
        "row norm": weight.float().norm(dim=1),
        "importance": total,
        "kurtosis": z.pow(4).mean(1) - 3,
        "lost at half": half / total,
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in features.items()})


def row_sparsities(keep_masks: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], np.ndarray]:
    """Fraction of every row of the projections that is pruned, by block and projection."""
    return {key: (~keep_mask).float().mean(1).numpy() for key, keep_mask in keep_masks.items()}


def spearman(features: pd.DataFrame, target: pd.Series | np.ndarray) -> dict[str, float | None]:
    """Spearman's rank correlation of every column with the target, equal values sharing their mean rank.

    None where it is undefined: a constant column or target, or fewer than three values.
    """
    ranks, rank = features.rank(), pd.Series(np.asarray(target)).rank()
    if len(rank) < 3 or rank.nunique() < 2:
        return dict.fromkeys(features.columns)
    varied = {name: ranks[name].nunique() > 1 for name in features.columns}
    return {name: float(ranks[name].corr(rank)) if varied[name] else None for name in features.columns}


def row_analysis(
    sparsities: dict[tuple[int, str], np.ndarray], features: dict[tuple[int, str], pd.DataFrame]
) -> dict[str, Any]:
    """What a record keeps of the rows, small whatever the model.

    `row_quantiles`: QUANTILES of the rows' sparsities by projection, over all blocks. `row_correlations`: one entry per
    block and projection with Spearman's correlation of its rows' sparsity with each feature. `feature_means`: the
    features' means over the rows, likewise.
    """
    names = list(dict.fromkeys(name for _, name in sparsities))
    by_name = {name: np.concatenate([rows for (_, n), rows in sparsities.items() if n == name]) for name in names}
    places = {key: {"block": key[0], "projection": key[1]} for key in sparsities}
    return {
        "row_quantiles": {name: np.quantile(rows, QUANTILES).tolist() for name, rows in by_name.items()},
        "row_correlations": [places[key] | spearman(features[key], rows) for key, rows in sparsities.items()],
        "feature_means": [places[key] | features[key].mean().to_dict() for key in sparsities],
    }


def learned(experiment: Experiment, network: PreTrainedModel, report: Report) -> dict[str, Any]:
    """For the record of a BESA row: perplexities, training steps by column, and `row_analysis`.

    Holds a second, dense copy of the model for a while.
    """
    dense, _ = load_model(experiment.model, experiment.dtype, str(experiment.device))
    return {
        **experiment.perplexities(network, report),
        "steps": pd.DataFrame(report.steps).round(6).to_dict("list"),
        **row_analysis(row_sparsities(report.keep_masks), row_features(dense, experiment.windows)),
    }


def block_correlations(frame: pd.DataFrame, features: list[str]) -> pd.DataFrame:
    """Spearman's correlation over the blocks of a projection's `sparsity` with each feature, a line per projection.

    Args:
        frame: one line per block and projection.
    """
    groups = frame.groupby("projection", sort=False)
    lines = {name: spearman(group[features].reset_index(drop=True), group["sparsity"]) for name, group in groups}
    return pd.DataFrame.from_dict(lines, orient="index", dtype=float).rename_axis("projection")


def correlation_table(by_row: pd.DataFrame, by_block: pd.DataFrame) -> pd.DataFrame:
    """Both levels in one table: a line per level and feature, a column per projection and their mean.

    Args:
        by_row: `row_correlations`, one line per block and projection; averaged over the blocks.
        by_block: from `block_correlations`.
    """
    rows = by_row.drop(columns="block").set_index("projection").astype(float)
    levels = {"rows": rows.groupby(level=0, sort=False).mean().T, "blocks": by_block.T}
    table = pd.concat(levels, names=["among", "feature"])
    return table.assign(mean=table.mean(axis=1))


def spread(count: int, n_blocks: int) -> list[int]:
    """At most so many blocks, evenly spread from the first to the last.

    Raises:
        ValueError: none are asked for.
    """
    if count < 1:
        raise ValueError(f"blocks {count} must be at least 1")
    return [round(float(index)) for index in np.linspace(0, n_blocks - 1, min(count, n_blocks))]
