"""GPTQ (Frantar et al. 2023) for a pruned model: its kept weights become codes."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.config import checked
from besa.decoder import pruned_projections
from besa.importance import inverse_cholesky
from besa.quantize import Quantize, QuantizedWeight
from besa.report import Report
from besa.walk import PrunedBlock, frozen, walk

Matrix = Float[Tensor, "rows columns"]
KeepMask = Bool[Tensor, "rows columns"]


@checked
def quantize_pruned(
    model: PreTrainedModel,
    report: Report | Mapping[tuple[int, str], Tensor] | None,
    windows: Int64[Tensor, "n_samples seq_len"] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    progress: bool = True,
) -> Report:
    """Round the kept weights of a pruned model to codes, in place, by GPTQ (Frantar et al. 2023) within the mask.

    The error of a column is compensated in the columns to its right. `pack` takes the report that is returned.

    Args:
        model: pruned by any method.
        report: what `prune` returned, or keep-masks by (block, projection); None keeps all weights that are not 0.
        windows: calibration token ids; None rounds every weight to the nearest code.
        bits: of a code: 2, 3, 4 or 8.
        group_size: columns that share a scale and a zero-point; None: a whole row.
    """
    masks = report.keep_masks if isinstance(report, Report) else report
    n_samples, seq_len = (0, 0) if windows is None else windows.shape
    quantize, rounded = Quantize(bits=bits, group_size=group_size), Report("gptq", n_samples=n_samples, seq_len=seq_len)
    if windows is None:
        for key, projection in pruned_projections(model).items():
            weight = projection.weight.detach()
            keep_mask = masks[key].to(weight.device) if masks else weight != 0
            codes = with_best_range(quantize, weight, torch.ones_like(weight[0])).pruned(keep_mask)
            projection.weight.data = codes.dequantize(weight.dtype)
            row = {"projection_error": math.nan, "note": "to the nearest"}
            rounded.add(key, keep_mask, int((~keep_mask).sum()), codes, row)
        return rounded
    with frozen(model):
        for block in walk(model, windows, hessian=True, progress=progress):
            pruned = PrunedBlock()
            for name, projection in block.projections.items():
                keep_mask = masks[block.index, name].to(block.device) if masks else projection.weight != 0
                codes = round_columns(projection.weight, keep_mask, block.statistics[name].hessian, quantize)
                pruned.quantized[name], pruned.keep_masks[name] = codes, keep_mask
                pruned.weights[name] = codes.dequantize(projection.weight.dtype)
            rounded.extend(block.finish(pruned))
    return rounded


def round_columns(weight: Matrix, keep_mask: KeepMask, hessian: Tensor, quantize: Quantize) -> QuantizedWeight:
    """Column by column, with H^-1 = U^T U: e_j = (W_j - M_j Q(W_j)) / U_jj, and W_k <- W_k - e_j U_jk for k > j."""
    upper, _ = inverse_cholesky(hessian)
    codes = with_best_range(quantize, weight, hessian.diag())
    new_weight, columns, group = weight.float().clone(), range(weight.shape[1]), weight.shape[1] // codes.scale.shape[1]
    for start in columns[::128]:
        chosen, errors = columns[start : start + 128], []
        for j in chosen:
            scale, zero_point = codes.scale[:, j // group].float(), codes.zero_point[:, j // group].float()
            code = ((new_weight[:, j] / scale).round() + zero_point).clamp(0, quantize.levels)
            code = torch.where(keep_mask[:, j], code, zero_point)
            codes.codes[:, j] = code
            errors.append((new_weight[:, j] - scale * (code - zero_point)) / upper[j, j])
            new_weight[:, j : chosen.stop] -= errors[-1][:, None] * upper[j, j : chosen.stop]
        new_weight[:, chosen.stop :] -= torch.stack(errors, 1) @ upper[start : chosen.stop, chosen.stop :]
    return codes.pruned(keep_mask)


def with_best_range(quantize: Quantize, weight: Matrix, importance: Tensor) -> QuantizedWeight:
    """Q(W) with gamma0 = gamma1 of the least sum of importance * squared error, for each row or group."""
    shape, gammas, errors = quantize.clipping_shape(weight), torch.linspace(1, 0.6, 11, device=weight.device), []
    for gamma in gammas:
        codes = quantize.codes(weight, gamma.expand(shape).logit(1e-6))
        squares = (codes.dequantize(torch.float32) - weight.float()).square() * importance
        errors.append(squares.view(*codes.scale.shape, -1).sum(-1))
    best = gammas[torch.stack(errors).argmin(0)]
    return quantize.codes(weight, best.expand(shape).logit(1e-6))
