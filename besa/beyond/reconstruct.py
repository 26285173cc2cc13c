"""Masks and weights of a block in closed form, one projection after the other, without training.

Boža 2024, Sec. 3, has a = 0. With y the input of the projection in the model as pruned and reconstructed so far, and x
in the dense model:

    min over Z with Z = M * Z of  sum over tokens of ||Z y - W (y + a (x - y))||^2

by ADMM from Z = M * W, U = 0, with H = sum y y^T and T = sum (y + a (x - y)) y^T, scaled to a unit diagonal of H:

    V = (W T + rho (Z - U)) (H + rho I)^-1,    Z = M * (V + U),    U <- U + V - Z

M is given (`Reconstruct`), or chosen by |V + U| in the first iterations (`Closed`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from besa.config import config
from besa.decoder import Stopped, run_block
from besa.loop import PatternMethod
from besa.shapes import KeepMask, Matrix, Square
from besa.system import finite_hint, sum_over_ranks
from besa.walk import Block, Match, PrunedBlock

ITERATIONS = 20  # of ADMM, as in Boža 2024
CHOOSING = 15  # the mask is chosen again in the first ones, then fixed; as in his code
TOWARD_DENSE = 0.5  # a; with 0 the target is W y, with 1 it is W x, the output in the dense model
RHO = 1.0  # ADMM's penalty, for a Hessian of unit diagonal, as in Boža 2024
DAMPING = 0.1  # added to the diagonals of H and T, as a fraction of the mean of H's; as in his code


@dataclass(frozen=True)
class Reconstruct:
    """Give the kept weights new values once a block's mask is chosen, for `prune(..., reconstruct=Reconstruct())`.

    Each projection by itself, in closed form.
    """

    def config(self) -> dict[str, Any]:
        return {"kind": "closed"}

    def improve(self, block: Block, pruned: PrunedBlock) -> PrunedBlock:
        return replace(pruned, weights=fit(block, lambda name, _: pruned.keep_masks[name]).weights)


@config
class Closed(PatternMethod):
    """Choose the mask of each projection while its weights are fitted, by ADMM, without training."""

    name: ClassVar[str] = "closed"
    match: ClassVar[Match] = "model"

    def prune_block(self, block: Block) -> PrunedBlock:
        return fit(block, lambda _, scores: self.keep_mask(scores, self.sparsity_of(block)))


@torch.no_grad()
def fit(block: Block, choose: Callable[[str, Matrix], KeepMask]) -> PrunedBlock:
    """Fit the projections in calling order, each to its inputs behind those that are fitted already.

    Args:
        choose: keep-mask of a projection from its name and |V + U|.
    """
    fitted = PrunedBlock()
    for names in projections_by_input(block):
        hessian, toward = moments(block, names[0], fitted.weights, TOWARD_DENSE)
        for name in names:
            weight = block.projections[name].weight
            fitted.weights[name], fitted.keep_masks[name] = closed_form(weight, hessian, toward, partial(choose, name))
    return fitted


def closed_form(
    weight: Matrix,
    hessian: Square,
    toward: Square,
    choose: Callable[[Matrix], KeepMask],
    *,
    iterations: int = ITERATIONS,
    rho: float = RHO,
    damping: float = DAMPING,
) -> tuple[Matrix, KeepMask]:
    """ADMM for one projection: new weights, exactly 0 where nothing is kept, and the keep-mask.

    Args:
        hessian, toward: H and T; with T = H the pruning of this projection alone is repaired.
        choose: keep-mask from |V + U|.
    """
    hessian, toward, scale = scaled(hessian, toward, damping)
    hessian.diagonal().add_(rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    w = weight.float() * scale
    wanted = w @ toward
    keep_mask = choose(w.abs())
    both = w * keep_mask
    for iteration in range(iterations):  # both = V + U: Z is its kept part, U the rest, so rho (Z - U) = sign * both
        sign = torch.where(keep_mask, rho, -rho)
        both = torch.addcmul(torch.addcmul(wanted, sign, both) @ inverse, (~keep_mask).float(), both)
        if iteration < CHOOSING:
            keep_mask = choose(both.abs())
    return (both / scale).to(weight.dtype).masked_fill_(~keep_mask, 0), keep_mask


def scaled(hessian: Tensor, toward: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both damped and divided by the square roots of H's diagonal, and these."""
    added = damping * hessian.diagonal().mean() + 1e-30
    hessian = hessian.clone()
    toward = toward.clone()
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
    raise ValueError(f"block {block.index} did not call {name}")


def projections_by_input(block: Block) -> list[list[str]]:
    """Names of the projections in calling order, those with the same input together."""
    groups: dict[int, list[str]] = {}
    for name, statistics in block.statistics.items():  # shared by projections with the same input
        groups.setdefault(id(statistics), []).append(name)
    return list(groups.values())


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
        x = run_until(block, name, block.window(block.dense_inputs, number), {})  # pyright: ignore[reportArgumentType]
        if not len(x) == len(y) == block.inputs.shape[1]:  # some tokens only, and other ones in the dense model: a = 0
            x = y
        if y.dtype == torch.float16:  # sums over tokens overflow; bfloat16's do not, and its products are fast
            x = x.float()
            y = y.float()
        hessian.add_(y.T @ y, alpha=share)
        cross.add_(x.T @ y, alpha=share)
    if not torch.isfinite(sum_over_ranks(hessian)).all() or not torch.isfinite(sum_over_ranks(cross)).all():
        raise ValueError(f"block {block.index}: the inputs of {name} overflow; {finite_hint(block.inputs.dtype)}")
    return hessian, hessian.lerp(cross, toward_dense)
