"""New values for the weights that a mask, any mask, keeps; the mask stays as it is.

"closed", one projection after the other, without training. With y the projection's input in the model as it is pruned
and reconstructed so far, and x in the dense model, some iterations of ADMM come near to

    min over Z with zeros where nothing is kept of  sum over tokens of ||Z y - W (y + a (x - y))||^2

(Boža 2024, Sec. 3, where a = 0), with H = sum y y^T and T = sum (y + a (x - y)) y^T, on columns scaled to a unit
diagonal of H, from Z = M * W and U = 0 on. V is the unconstrained step, Z the masked one:

    V = (W T + rho (Z - U)) (H + rho I)^-1,    Z = M * (V + U),    U <- U + V - Z

"block", from there: gradient descent on the kept weights of a whole block towards the dense model's own hidden states.
"""

import math
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Bool, Float
from torch import Tensor

from besa.machine.device import advance
from besa.machine.fields import Count, Positive, check_fields, documented
from besa.machine.processes import mean_, n_ranks
from besa.walk import Block, PrunedBlock, token_error


@documented
@dataclass(frozen=True)
class Reconstruct:
    """How the kept weights get new values once a block's mask is chosen."""

    kind: Literal["closed", "block"] = "closed"
    """"closed": each projection by itself, without training, in about SparseGPT's time. "block": closed, then trained
    together on the block's output, in several times BESA's."""
    _: KW_ONLY
    iterations: Count = 20
    """Of ADMM."""
    toward_dense: Annotated[float, Ge(0), Le(1)] = 0.5
    """a: how far a projection also makes up for what was lost before it. 0: it repairs its own pruning alone; 1: it
    aims at the dense model's output, which it cannot reach."""
    rho: Positive = 1.0
    """ADMM's penalty, for a Hessian of unit diagonal."""
    damping: Positive = 0.01
    """Added to the diagonals of H and T, as a fraction of the mean of H's."""
    epochs: Count = 2
    """Passes over the windows that are trained on ("block")."""
    lr: Positive = 5e-4
    """Adam's largest step size, up to which it rises and from which it falls in one cycle ("block")."""
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.125
    """Fraction of the windows that is not trained on, and says which epoch's weights are kept ("block")."""

    __post_init__ = check_fields

    def check(self, n_samples: int, quantized: bool) -> None:
        """Refuse what cannot be reconstructed, before any work.

        Raises:
            ValueError: too few windows to hold one out, or a method that quantizes.
        """
        if quantized:
            raise ValueError("a quantized weight has no value of its own to reconstruct; take quantize=None")
        share = n_samples // n_ranks()
        if self.kind == "block" and self._n_held_out(share) >= share:
            raise ValueError(
                f"{share} window(s) (of each rank) cannot be parted into some to train on and {self.held_out:.1%} held "
                "out; take more windows"
            )

    def config(self) -> dict[str, Any]:
        """Fields, for records."""
        return asdict(self)

    @torch.no_grad()
    def improve(self, block: Block, pruned: PrunedBlock) -> PrunedBlock:
        """The same masks with better weights."""
        if not pruned.weights:  # all projections are ignored
            return pruned
        weights: dict[str, Tensor] = {}
        groups = block.fed_alike()
        for names in groups:
            moments = block.moments(names[0], weights, self.toward_dense, onward=names is groups[-1])
            for name in names:
                weights[name] = self.closed_form(block.projections[name].weight, *moments, pruned.keep_masks[name])
        pruned = replace(pruned, weights=weights)
        return self._train(block, pruned) if self.kind == "block" else pruned

    def closed_form(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        toward: Float[Tensor, "columns columns"],
        keep_mask: Bool[Tensor, "rows columns"],
    ) -> Float[Tensor, "rows columns"]:
        """A masked weight that puts out nearly what is wanted, by ADMM; zeros exactly where nothing is kept.

        Args:
            hessian, toward: H and T, from `Block.moments`; with T = H the projection's own pruning is mended alone.

        Raises:
            ValueError: rho and damping are too small for this Hessian.
        """
        hessian, toward, scale = self._scaled(hessian, toward)
        hessian.diagonal().add_(self.rho)
        inverse = _inverse(hessian)
        w, kept = weight.float() * scale, keep_mask.float()
        wanted, both, sign, dropped = w @ toward, w * kept, self.rho * (2 * kept - 1), 1 - kept
        for _ in range(self.iterations):  # both = Z + U: Z is its kept part, U the rest, so rho (Z - U) = sign * both
            both = torch.addcmul(torch.addcmul(wanted, sign, both) @ inverse, dropped, both)
        found = (both / scale).to(weight.dtype).masked_fill_(~keep_mask, 0)
        if not torch.isfinite(found).all():
            raise ValueError(
                f"no closed form can be computed with rho {self.rho:g} and damping {self.damping:g}; take them nearer "
                "to 1 and 0.01"
            )
        return found

    def _scaled(self, hessian: Tensor, toward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both damped and divided by the roots of H's diagonal, and these."""
        damping = self.damping * hessian.diagonal().mean() + 1e-30
        damped = hessian.clone(), toward.clone()  # columns x columns, the largest there are: no other copy stays
        for moment in damped:
            moment.diagonal().add_(damping)
        scale = damped[0].diagonal().sqrt()
        between = scale[:, None] * scale
        return damped[0].div_(between), damped[1].div_(between), scale

    def _n_held_out(self, n_samples: int) -> int:
        return max(1, round(self.held_out * n_samples))

    def _train(self, block: Block, pruned: PrunedBlock) -> PrunedBlock:
        """Adam on float32 copies of the kept weights, a window (of every rank) at a time; the best epoch's stay."""
        n_samples = len(block.inputs)
        trained = range(n_samples - self._n_held_out(n_samples))
        masters = {
            name: weight.to(torch.float32, copy=True).requires_grad_() for name, weight in pruned.weights.items()
        }
        cast = lambda name, master: (master * pruned.keep_masks[name]).to(pruned.weights[name].dtype)
        current = lambda: {name: cast(name, master) for name, master in masters.items()}
        optimizer = torch.optim.Adam(masters.values(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.epochs * len(trained))
        scaler = torch.amp.GradScaler(block.device.type, enabled=block.inputs.dtype == torch.float16)
        first = self._held_out_error(block, pruned.weights)
        best = first, pruned.weights
        for _ in range(self.epochs):
            for number in block.bar(trained, "reconstruct"):
                optimizer.zero_grad()
                with torch.enable_grad():
                    error = token_error(block.run(number, current()), block.dense_output(number))
                    scaler.scale(error).backward()
                for master in masters.values():
                    mean_(master.grad)
                scaler.step(optimizer)
                scaler.update()
                advance(schedule)
            found = {name: weight.detach() for name, weight in current().items()}
            best = min(best, (self._held_out_error(block, found), found), key=lambda pair: pair[0])
        note = f"held-out error {first:.4g} -> {best[0]:.4g}"
        notes = {name: "; ".join(filter(None, (pruned.notes.get(name), note))) for name in pruned.weights}
        return replace(pruned, weights=best[1], notes=notes)

    def _held_out_error(self, block: Block, weights: dict[str, Tensor]) -> float:
        """Mean error of the windows that are not trained on, of all ranks."""
        n_samples = len(block.inputs)
        numbers = range(n_samples - self._n_held_out(n_samples), n_samples)
        errors = [token_error(block.run(number, weights), block.dense_output(number)) for number in numbers]
        error = float(mean_(torch.stack(errors).mean()))
        return error if math.isfinite(error) else math.inf  # never the best


def _inverse(matrix: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """Of a symmetric positive matrix, or NaN."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_inverse(torch.where(failed > 0, math.nan, lower))
