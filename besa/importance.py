"""How much each weight matters: magnitude, Wanda and SparseGPT (OBS) importance, and the input statistics they need.

Larger importance means keep.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa.machine.processes import sum_

Importance = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass
class InputStatistics:
    """Second moments of a projection's inputs x (columns,), averaged over sequences as the released code does."""

    squared_norm: Float[Tensor, "columns"]
    """sum over tokens of x_j^2, divided by the number of sequences."""
    hessian: Float[Tensor, "columns columns"] | None = None
    """2 * sum over tokens of x x^T, divided by the number of sequences; only where it is asked for."""

    def sum_over_ranks(self) -> None:
        """Take in what the other ranks' windows hold."""
        sum_(self.squared_norm)
        if self.hessian is not None:
            sum_(self.hessian)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.squared_norm).all())


@contextlib.contextmanager
def collect_statistics(
    projections: dict[str, nn.Linear], n_samples: int, hessian: bool
) -> Iterator[dict[str, InputStatistics]]:
    """While active, gather the input statistics of every projection; those fed by one tensor share one statistic.

    Yields:
        a dictionary that fills with the forward passes (one sequence each, `n_samples` in all).
    """
    statistics: dict[str, InputStatistics] = {}
    current: dict[int, tuple[Tensor, str]] = {}  # id -> (the tensor, kept alive so that the id stays its own; owner)

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        _, owner = current.setdefault(id(x), (x, name))
        if owner == name:
            _accumulate(statistics, name, x.reshape(-1, x.shape[-1]).float(), n_samples, hessian)
        else:
            statistics[name] = statistics[owner]

    with contextlib.ExitStack() as hooks:
        for name, module in projections.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name)))
        for last in list(projections.values())[-1:]:  # there is none where a block is ignored
            hooks.enter_context(last.register_forward_hook(lambda *_: current.clear()))
        yield statistics


def _accumulate(statistics: dict[str, InputStatistics], name: str, x: Tensor, n_samples: int, hessian: bool) -> None:
    squares = x.square().sum(0) / n_samples
    products = (x.T @ x).mul_(2 / n_samples) if hessian else None
    if name not in statistics:
        statistics[name] = InputStatistics(squares, products)
    else:
        statistics[name].squared_norm += squares
        if products is not None:
            statistics[name].hessian += products


def magnitude(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """|W_ij| (Han et al. 2015)."""
    return weight.abs().float()  # in this order a bfloat16 weight has one float32 copy, not two


def wanda(weight: Float[Tensor, "rows columns"], statistics: InputStatistics) -> Float[Tensor, "rows columns"]:
    """|W_ij| * ||x_j||_2 (Sun et al. 2024, Eqn. 1)."""
    return magnitude(weight).mul_(statistics.squared_norm.sqrt())


def sparsegpt(weight: Float[Tensor, "rows columns"], statistics: InputStatistics) -> Float[Tensor, "rows columns"]:
    """W_ij^2 / U_jj with H^-1 = U^T U, the released code's `SparseGPT` metric; 0 in columns that never had an input.

    The OBS saliency (Frantar and Alistarh 2023, Eqn. 4, as their code computes it) is W_ij^2 / U_jj^2, the released
    code's `SparseGPT-Git`.
    """
    factor = inverse_cholesky(statistics.hessian)
    return weight.float().square().masked_fill_(statistics.hessian.diag() == 0, 0).div_(factor.upper.diag())


def importance(
    kind: Importance, weight: Float[Tensor, "rows columns"], statistics: InputStatistics
) -> Float[Tensor, "rows columns"]:
    """Importance of a projection's weights by the name of its kind."""
    if kind == "magnitude":
        return magnitude(weight)
    return wanda(weight, statistics) if kind == "wanda" else sparsegpt(weight, statistics)


@dataclass(frozen=True)
class InverseFactor:
    upper: Float[Tensor, "columns columns"]
    """U with (H + damping * mean(diag H) * I)^-1 = U^T U, float32."""
    damping: float
    dtype: torch.dtype
    """Precision that the factorization needed."""


def inverse_cholesky(hessian: Float[Tensor, "columns columns"], damping: float = 0.01) -> InverseFactor:
    """Upper Cholesky factor of the inverse of the damped Hessian (Frantar and Alistarh 2023, Sec. 3.3).

    float32 fails on badly conditioned Hessians: float64 is tried next, then ten times the damping, up to 10, until it
    works; the result says what was used. Columns that never had an input count as 1 on the diagonal.

    Raises:
        ValueError: none of these helps, nor the given one where it is larger.
    """
    largest = max(damping, 10.0)
    diagonal = hessian.diag()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    while damping <= largest:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().copy_(diagonal + damping * diagonal.mean())
            upper = _inverse_upper(damped)
            if upper is not None:
                return InverseFactor(upper.float(), damping, dtype)
        tried, damping = damping, 10 * damping or 1e-6
    why = "is not that of any inputs" if torch.isfinite(hessian).all() else "holds NaN or infinity"
    raise ValueError(f"the Hessian cannot be factorized even with damping {tried:g}: it {why}")


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper
