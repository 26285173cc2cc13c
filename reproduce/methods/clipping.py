"""Wanda with the learned clipping of joint BESA."""

from typing import ClassVar

import torch

import besa
from besa.besa import Parameters
from besa.config import config
from besa.losses import reconstruction_error
from besa.quantize import CLIPPING_LR, CLIPPING_START
from besa.walk import Block, PrunedBlock


@config
class LearnedClipping(besa.Wanda):
    """Wanda's mask of the quantized weights, the clipping of the quantization learned as in joint BESA (Eqn. 7)."""

    name: ClassVar[str] = "learned-clipping"

    @torch.enable_grad()
    def prune_block(self, block: Block) -> PrunedBlock:
        pruned, quantize = super().prune_block(block), self.quantize
        weights = {name: linear.weight.detach() for name, linear in block.projections.items()}
        shapes = {name: quantize.clipping_shape(weight) for name, weight in weights.items()}
        clipping = Parameters(shapes, CLIPPING_START, block.device)
        optimizer = torch.optim.Adam([clipping.flat], lr=CLIPPING_LR)
        for window in block.progress(range(len(block.inputs)), "learn"):
            learned = clipping.by_name()
            masked = {n: quantize.fake(w, learned[n]) * pruned.keep_masks[n] for n, w in weights.items()}
            optimizer.zero_grad()
            reconstruction_error(block.run(window, masked), block.window(block.targets, window)).backward()
            optimizer.step()
        for name, values in clipping.by_name().items():
            codes = quantize.codes(weights[name], values.detach()).pruned(pruned.keep_masks[name])
            pruned.weights[name] = codes.dequantize(weights[name].dtype)
        return pruned
