"""Methods that notebooks compare with, what a learned allocation looks like, what a quantized model takes stored."""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.baselines import Wanda
from besa.decoder import find_blocks, projections, weight_of
from besa.importance import InputStatistics, collect_statistics, wanda
from besa.masks import sorted_rows
from besa.prune import Method
from besa.quantize import QuantizedFiles, QuantizedWeight, save_quantized
from besa.report import Report
from besa.walk import Block, PrunedBlock


@dataclass(frozen=True, kw_only=True)
class WandaOneKind(Method):
    """Wanda on one kind of projection in every block, the other projections left as they are (paper Fig. 1b)."""

    kind: str
    """What the projection is called in its block, without the module that holds it: `q_proj`."""

    name: ClassVar[str] = "wanda-one-kind"

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        kinds = [name.rpartition(".")[2] for name in projections(find_blocks(model)[0])]
        if self.kind not in kinds:
            raise ValueError(f"unknown kind of projection {self.kind!r}; this model has {', '.join(kinds)}")

    def noted(self, block: Block, report: Report) -> Report:
        return report  # the block as a whole is meant to miss the kind's sparsity

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, statistics = PrunedBlock(), block.statistics()
        for name, projection in block.projections.items():
            keep_mask = torch.ones_like(projection.weight, dtype=torch.bool)
            if name.rpartition(".")[2] == self.kind:
                keep_mask = self.keep_mask(wanda(projection.weight, statistics[name]), self.sparsity_of(block))
            pruned.keep_masks[name] = keep_mask
            pruned.weights[name] = projection.weight * keep_mask
        return pruned


@dataclass(frozen=True, kw_only=True)
class WandaByBlock(Wanda):
    """Wanda with a sparsity for each block, by what is seen of its importances in the dense model.

    With D_l what speaks for keeping block l,

        s_l = sparsity - (d_l - mean of d),    d_l = 2 most (D_l - min D) / (max D - min D)
    """

    most: float
    """How far from the mean the sparsities may lie: d_l is at most twice this."""

    def worth(self, importances: list[Float[Tensor, "rows columns"]]) -> float:
        """D_l, of the importances of a block's projections."""
        raise NotImplementedError

    @property
    def measures_model(self) -> bool:
        return True

    def prepared(self, model: PreTrainedModel, windows: Tensor, progress: bool) -> "WandaByBlock":
        worths = []
        for block, statistics in zip(find_blocks(model), dense_statistics(model, windows), strict=True):
            linear = projections(block)
            worths.append(self.worth([wanda(weight_of(each), statistics[name]) for name, each in linear.items()]))
        worths = torch.tensor(worths, dtype=torch.float64)
        d = 2 * self.most * (worths - worths.min()) / (worths.max() - worths.min()).clamp_min(1e-12)
        return replace(self, sparsities=tuple((self.sparsity - (d - d.mean())).tolist()))


@dataclass(frozen=True, kw_only=True)
class Owl(WandaByBlock):
    """More outliers, more is kept (Yin et al. 2024, OWL): D_l is the share of importances above `times` the mean of
    their projection's."""

    times: float = 5.0
    """M."""
    most: float = 0.08
    """lambda."""

    name: ClassVar[str] = "owl"

    def worth(self, importances: list[Tensor]) -> float:
        outliers = sum(int((each > self.times * each.mean()).sum()) for each in importances)
        return outliers / sum(each.numel() for each in importances)


@dataclass(frozen=True, kw_only=True)
class Dlp(WandaByBlock):
    """A larger median importance, less is kept (Chen et al. 2025, DLP); their code takes the mean.

    With U_l the median of a block's, D_l = 1 - U_l / sum of U, of which only the order and the distances count: -U_l.
    """

    most: float = 0.15
    """alpha."""

    name: ClassVar[str] = "dlp"

    def worth(self, importances: list[Tensor]) -> float:
        return -float(torch.cat([each.flatten() for each in importances]).median())


@dataclass(frozen=True, kw_only=True)
class LlmCompressor(Method):
    """SparseGPT as llm-compressor has it, by its own one-shot pruning of the whole model on the same windows.

    It is not installed with besa, whose locked transformers it does not take: `pip install llmcompressor`.
    """

    name: ClassVar[str] = "llm-compressor"

    @property
    def measures_model(self) -> bool:
        return True

    def prepared(self, model: PreTrainedModel, windows: Tensor, progress: bool) -> "LlmCompressor":
        from datasets import Dataset  # slow to import, and only here needed
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        recipe = SparseGPTModifier(
            sparsity=self.sparsity, mask_structure=self.pattern or "0:0", targets=["Linear"], ignore=["re:.*lm_head"]
        )
        data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
        method, pruned = replace(self), copy.deepcopy(model)
        size = {"max_seq_length": windows.shape[1], "num_calibration_samples": len(windows)}
        oneshot(model=pruned, dataset=data, recipe=recipe, **size)
        object.__setattr__(method, "_pruned", find_blocks(pruned))
        return method

    def prune_block(self, block: Block) -> PrunedBlock:
        theirs = projections(self._pruned[block.index])
        weights = {name: theirs[name].weight.detach() for name in block.projections}
        return PrunedBlock(weights=weights, keep_masks={name: weight != 0 for name, weight in weights.items()})


QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Of the rows' sparsities, by projection."""


@torch.no_grad()
def dense_statistics(model: PreTrainedModel, windows: Tensor) -> list[dict[str, InputStatistics]]:
    """Of what enters every block's projections in the dense model; one pass over the windows."""
    with contextlib.ExitStack() as stack:
        collected = [collect_statistics(projections(block), len(windows), False) for block in find_blocks(model)]
        statistics = [stack.enter_context(each) for each in collected]
        for window in windows.split(1):
            model.base_model(window.to(model.device), use_cache=False)
    return statistics


@torch.no_grad()
def row_features(
    model: PreTrainedModel, windows: Int64[Tensor, "n_samples seq_len"]
) -> dict[tuple[int, str], pd.DataFrame]:
    """Features of every row of a dense model's projections, by block and projection; one pass over the windows.

    The importance is Wanda's on the dense model's own inputs: what can be known of a row before any pruning.
    """
    statistics = dense_statistics(model, windows)
    return {
        (index, name): importance_features(weight, wanda(weight, statistics[index][name]))
        for index, block in enumerate(find_blocks(model))
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
    half = sorted_rows(importance)[:, : importance.shape[1] // 2].sum(1)
    features = {
        "row norm": weight.float().norm(dim=1),
        "importance": total,
        "kurtosis": z.pow(4).mean(1) - 3,
        "lost at half": half / total,
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in features.items()})


def row_sparsities(keep_masks: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], np.ndarray]:
    """Fraction of every row that is pruned, by block and projection, from `Report.keep_masks`."""
    return {key: (~keep_masks[key]).float().mean(1).cpu().numpy() for key in keep_masks}


def spearman(features: pd.DataFrame, target: pd.Series | np.ndarray) -> dict[str, float | None]:
    """Spearman's rank correlation of every column with the target; None where a column or the target is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of constants
        found = features.corrwith(pd.Series(np.asarray(target), index=features.index), method="spearman")
    return {name: None if np.isnan(rho) else float(rho) for name, rho in found.items()}


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


def stored_bits(model: PreTrainedModel, quantized: Mapping[tuple[int, str], QuantizedWeight] | None) -> float:
    """Bits per weight of a quantized model as stored, having compared the stored bits with the model's weights.

    Args:
        quantized: `Report.quantized`; None for a model that was not quantized.

    Raises:
        RuntimeError: they are not the model's weights, to the bit.
    """
    if not quantized:
        return 8.0 * model.dtype.itemsize
    blocks, bits, total = find_blocks(model), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        for index, name in quantized:  # one at a time: all codes may be more than fits
            weight = weight_of(projections(blocks[index])[name])
            bits += weight.numel() * save_quantized({(index, name): quantized[index, name]}, path)
            total += weight.numel()
            if not torch.equal(QuantizedFiles(path)[index, name].dequantize(weight.dtype), weight.cpu()):
                raise RuntimeError(f"block {index}, {name}: what is stored does not reproduce the model's weights")
    return bits / total
