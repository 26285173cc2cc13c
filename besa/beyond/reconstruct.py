"""New values for the weights that a mask keeps, one projection after the other, without training.

Boža 2024, Sec. 3, has a = 0. With y the input of the projection in the model as pruned and reconstructed so far, and x
in the dense model:

    min over Z with Z = M * Z of  sum over tokens of ||Z y - W (y + a (x - y))||^2

by ADMM from Z = M * W, U = 0, with H = sum y y^T scaled to a unit diagonal, and T = sum (y + a (x - y)) y^T:

    V = (W T + rho (Z - U)) (H + rho I)^-1,    Z = M * (V + U),    U <- U + V - Z
"""

import contextlib
import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from besa.config import CONFIG
from besa.decoder import Stopped, run_block
from besa.importance import Matrix, Square
from besa.masks import KeepMask
from besa.system import finite_hint, sum_over_ranks
from besa.walk import Block, PrunedBlock

ITERATIONS = 20  # of ADMM, as in Boža 2024
TOWARD_DENSE = 0.5  # a; 0 repairs the pruning of the projection alone, 1 aims at the output of the dense model
RHO = 1.0  # ADMM's penalty, for a Hessian of unit diagonal, as in Boža 2024
DAMPING = 0.01  # added to the diagonals of H and T, as a fraction of the mean of H's; SparseGPT's


@dataclass(frozen=True, config=CONFIG)
class Reconstruct:
    """Give the kept weights new values once a block's mask is chosen, for `prune(..., reconstruct=Reconstruct())`.

    Args:
        kind: "closed": each projection by itself, in closed form and about SparseGPT's time.
    """

    kind: Literal["closed"] = "closed"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    @torch.no_grad()
    def improve(self, block: Block, pruned: PrunedBlock) -> PrunedBlock:
        weights: dict[str, Tensor] = {}
        for names in projections_by_input(block):
            hessian, toward = moments(block, names[0], weights, TOWARD_DENSE)
            for name in names:
                weight = block.projections[name].weight
                weights[name] = closed_form(weight, hessian, toward, pruned.keep_masks[name])
        return replace(pruned, weights=weights)


def closed_form(
    weight: Matrix,
    hessian: Square,
    toward: Square,
    keep_mask: KeepMask,
    *,
    iterations: int = ITERATIONS,
    rho: float = RHO,
    damping: float = DAMPING,
) -> Matrix:
    """ADMM for one projection; exactly 0 where nothing is kept.

    Args:
        hessian, toward: H and T; with T = H the pruning of this projection alone is repaired.
    """
    hessian, toward, scale = scaled(hessian, toward, damping)
    hessian.diagonal().add_(rho)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    inverse = torch.cholesky_inverse(torch.where(failed > 0, math.nan, lower))
    w = weight.float() * scale
    kept = keep_mask.float()
    wanted = w @ toward
    both = w * kept
    sign = rho * (2 * kept - 1)
    dropped = 1 - kept
    for _ in range(iterations):  # both = Z + U: Z is its kept part, U the rest, so rho (Z - U) = sign * both
        both = torch.addcmul(torch.addcmul(wanted, sign, both) @ inverse, dropped, both)
    new = (both / scale).to(weight.dtype).masked_fill_(~keep_mask, 0)
    if not torch.isfinite(new).all():
        raise ValueError(f"no closed form with rho {rho:g} and damping {damping:g}: the inputs are nearly singular")
    return new


def scaled(hessian: Tensor, toward: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both damped and divided by the square roots of H's diagonal, and these."""
    added = damping * hessian.diagonal().mean() + 1e-30
    hessian, toward = hessian.clone(), toward.clone()
    hessian.diagonal().add_(added)
    toward.diagonal().add_(added)
    scale = hessian.diagonal().sqrt()
    scales = scale[:, None] * scale
    return hessian.div_(scales), toward.div_(scales), scale


def run_until(block: Block, name: str, hidden: Tensor, weights: dict[str, Tensor]) -> Float[Tensor, "tokens columns"]:
    """Run a block up to a projection and return its input."""

    def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Stopped(inputs[0])

    with block.module.get_submodule(name).register_forward_pre_hook(stop):
        try:
            run_block(block.module, hidden, block.call, weights)
        except Stopped as stopped:
            return stopped.args[0].flatten(0, -2)


def projections_by_input(block: Block) -> list[list[str]]:
    """Names of the projections in calling order, those with the same input together."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # id -> (the tensor, kept alive so that its id stays unique; names)

    def note(name: str, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    with contextlib.ExitStack() as hooks:
        for name, linear in block.projections.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(note, name)))
        block.run(0)
    return [names for _, names in seen.values()]


def moments(block: Block, name: str, weights: dict[str, Tensor], toward_dense: float) -> tuple[Square, Square]:
    """H = sum y y^T and T = sum (y + a (x - y)) y^T of the inputs of a projection over the windows of all ranks.

    y is its input in this block with `weights` in it, x in the dense model; `toward_dense` is a.
    """
    columns = block.projections[name].weight.shape[1]
    hessian = torch.zeros(columns, columns, device=block.device)
    cross = torch.zeros_like(hessian)
    share = 1 / block.n_samples
    for number in block.progress(range(len(block.inputs)), "observe"):
        y = run_until(block, name, block.window(block.inputs, number), weights)
        x = run_until(block, name, block.window(block.dense_inputs, number), {})
        if y.dtype == torch.float16:  # sums over tokens overflow; bfloat16's do not, and its products are fast
            x, y = x.float(), y.float()
        hessian.add_(y.T @ y, alpha=share)
        cross.add_(x.T @ y, alpha=share)
    if not torch.isfinite(sum_over_ranks(hessian)).all() or not torch.isfinite(sum_over_ranks(cross)).all():
        raise ValueError(f"block {block.index}: the inputs of {name} overflow; {finite_hint(block.inputs.dtype)}")
    return hessian, hessian.lerp(cross, toward_dense)
