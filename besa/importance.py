"""Importance of weights: magnitude, Wanda and SparseGPT (OBS), and the input statistics they need. Larger = keep."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from besa.shapes import Matrix, Square

Importance = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass
class InputStatistics:
    """Second moments of the inputs x of a projection, averaged over sequences as in the released code."""

    squared_norm: Float[Tensor, "columns"]
    """Sum of x_j^2 over the tokens, divided by the number of sequences."""
    hessian: Square | None = None
    """2 * sum of x x^T over the tokens, divided by the number of sequences; only on request."""
    tokens: Int64[Tensor, ""] = field(default_factory=partial(torch.zeros, (), dtype=torch.int64))


@contextlib.contextmanager
def collect_statistics(
    projections: dict[str, nn.Linear], n_samples: int, hessian: bool
) -> Iterator[dict[str, InputStatistics]]:
    """Collect the input statistics of projections during forward passes of one sequence each, `n_samples` in all.

    Projections that share an input share one object.
    """
    statistics: dict[str, InputStatistics] = {}
    owners: dict[int, tuple[Tensor, str]] = {}  # id -> (tensor, kept alive so that its id stays unique; projection)

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        _, owner = owners.setdefault(id(x), (x, name))
        if owner != name:
            statistics[name] = statistics[owner]
            return
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, columns)
        if name not in statistics:
            square = x.new_zeros(x.shape[1], x.shape[1]) if hessian else None
            statistics[name] = InputStatistics(x.new_zeros(x.shape[1]), square, x.new_zeros((), dtype=torch.int64))
        statistics[name].tokens += len(x)
        statistics[name].squared_norm += x.square().sum(0) / n_samples
        if (products := statistics[name].hessian) is not None:
            products.addmm_(x.T, x, alpha=2 / n_samples)

    with contextlib.ExitStack() as hooks:
        for name, module in projections.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name)))
        for last in list(projections.values())[-1:]:
            hooks.enter_context(last.register_forward_hook(lambda *_: owners.clear()))
        yield statistics


def magnitude(weight: Matrix) -> Matrix:
    """|W_ij| (Han et al. 2015)."""
    return weight.abs().float()


def wanda(weight: Matrix, statistics: InputStatistics) -> Matrix:
    """|W_ij| * ||x_j||_2 (Sun et al. 2024, Eqn. 1)."""
    return magnitude(weight).mul_(statistics.squared_norm.sqrt())


def sparsegpt(weight: Matrix, statistics: InputStatistics) -> Matrix:
    """W_ij^2 / U_jj with H^-1 = U^T U; 0 in columns without input.

    The released code's `SparseGPT` metric; the OBS saliency (Frantar and Alistarh 2023, Eqn. 4) is W_ij^2 / U_jj^2.
    """
    upper, _ = inverse_cholesky(statistics.hessian)  # pyright: ignore[reportArgumentType]
    return weight.float().square().masked_fill_(statistics.squared_norm == 0, 0).div_(upper.diag())


def importance(kind: Importance, weight: Matrix, statistics: InputStatistics) -> Matrix:
    if kind == "magnitude":
        return magnitude(weight)
    return wanda(weight, statistics) if kind == "wanda" else sparsegpt(weight, statistics)


def inverse_cholesky(hessian: Square, damping: float = 0.01) -> tuple[Square, str]:
    """U with (H + damping * mean(diag H) * I)^-1 = U^T U (Frantar and Alistarh 2023, Sec. 3.3).

    Badly conditioned Hessians fail in float32: float64 comes next, then ten times the damping, up to 10; the second
    value says what was used. Columns without input count as 1 on the diagonal.
    """
    largest = max(damping, 10.0)
    diagonal = hessian.diag()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    while damping <= largest:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().copy_(diagonal + damping * diagonal.mean())
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper.float(), f"damping {damping:g}, {str(dtype).removeprefix('torch.')}"
        damping = 10 * damping
    raise ValueError(f"the Hessian cannot be factorized, even with damping {largest:g}")
