"""Joint compression: min-max quantization of weights with learnable clipping (paper Eqn. 7).

    Q(W) = clamp(round(W / h) + z, 0, 2^N - 1)
    h = (gamma1 max W - gamma0 min W) / (2^N - 1),   z = -round(gamma0 min W / h)

over the columns that share a scale h and a zero-point z. The range includes 0. Code Q stands for the weight h (Q - z).
Weights are quantized first and then pruned: a pruned weight is 0, which code z stands for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float16, Float32, UInt8
from pydantic import PositiveInt
from torch import Tensor

from besa.config import config
from besa.shapes import Matrix

Clipping = Float32[Tensor, "2 rows groups"]

CLIPPING_START = 4.0  # clipping logits before training: gamma = sigmoid(4) = 0.98
CLIPPING_LR = 0.2  # Adam's step size for them; the paper names none


@dataclass(frozen=True)
class QuantizedWeight:
    """A projection's weight in N bits: codes Q, scale h, zero-point z."""

    codes: UInt8[Tensor, "rows columns"]
    scale: Float16[Tensor, "rows groups"]
    zero_point: UInt8[Tensor, "rows groups"]

    def dequantize(self, dtype: torch.dtype) -> Matrix:
        """h (Q - z), computed in float32."""
        steps = self.codes.view(*self.scale.shape, -1).float() - self.zero_point[..., None]
        return (self.scale.float()[..., None] * steps).view(self.codes.shape).to(dtype)


@config
class Quantize:
    """Asymmetric min-max quantization of the weights of every projection.

    Args:
        bits: N.
        group_size: columns that share a scale and a zero-point; None: a whole row.
    """

    bits: Literal[2, 3, 4] = 4
    group_size: PositiveInt | None = None

    def clipping_shape(self, weight: Matrix) -> tuple[int, int, int]:
        """Shape of the clipping logits: (2, rows, groups), for gamma0 and gamma1."""
        rows, columns = weight.shape
        if columns % (self.group_size or columns):
            raise ValueError(f"{columns} columns do not divide into groups of {self.group_size} (group_size)")
        return 2, rows, columns // (self.group_size or columns)

    def fake(self, weight: Matrix, clipping: Clipping) -> Matrix:
        """h (Q(W) - z), differentiable in the clipping logits; rounding is straight through."""
        scale, lowest = self._grid(weight, clipping)
        grouped = weight.float().view(*scale.shape, -1)
        scale, zero_point = scale[..., None], _round(-lowest / scale)[..., None]
        codes = (_round(grouped / scale) + zero_point).clamp(0, self.levels)
        return (scale * (codes - zero_point)).view(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def codes(self, weight: Matrix, clipping: Clipping | None = None) -> QuantizedWeight:
        """Q(W) of Eqn. 7, with scales rounded to float16 first. Without clipping gamma0 = gamma1 = 1."""
        scale, lowest = self._grid(weight, clipping)
        scale = scale.half().clamp_min(2.0**-24)
        zero_point = (-lowest / scale.float()).round().clamp(0, self.levels)
        grouped = weight.float().view(*scale.shape, -1)
        codes = ((grouped / scale.float()[..., None]).round() + zero_point[..., None]).clamp(0, self.levels)
        return QuantizedWeight(codes.view(weight.shape).byte(), scale, zero_point.byte())

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    def _grid(self, weight: Matrix, clipping: Clipping | None) -> tuple[Tensor, Tensor]:
        """h and gamma0 min W, (rows, groups)."""
        grouped = weight.float().view(*self.clipping_shape(weight)[1:], -1)
        lowest, highest = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        if clipping is not None:
            gamma = clipping.sigmoid()
            lowest, highest = gamma[0] * lowest, gamma[1] * highest
        return ((highest - lowest) / self.levels).clamp_min(1e-8), lowest


def _round(x: Tensor) -> Tensor:
    """Round; the gradient is the identity's."""
    return x + (x.round() - x).detach()
