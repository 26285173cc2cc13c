"""BESA with another unit of reconstruction: a projection, attention and MLP, or two blocks."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import besa
from besa.besa import Learner
from besa.config import config
from besa.decoder import BlockCall, find_blocks, projections
from besa.walk import Block, PrunedBlock


@config
class BesaByPart(besa.Besa):
    """BESA that reconstructs the output of each projection, or of attention and MLP, one after the other.

    Args:
        unit: "projection" or "sublayer".
    """

    unit: Literal["projection", "sublayer"]

    name: ClassVar[str] = "besa-by-part"

    def prune_block(self, block: Block) -> PrunedBlock:
        pruned = PrunedBlock()
        parts = dict.fromkeys(name.partition(".")[0] for name in block.projections)
        names = [name for name, _ in block.module.named_children() if name in parts]
        for name in list(block.projections) if self.unit == "projection" else names:
            part = part_of(block, name, pruned.weights)
            learner = Learner(self, part)
            learned = learner.result(self.learn(learner, part))
            pruned.weights |= learned.weights
            pruned.keep_masks |= learned.keep_masks
            pruned.steps += learned.steps
        return pruned


def besa_with(name: str, value: Any, **fields: Any) -> besa.Besa:
    """BESA with another value of a field, or with a unit of reconstruction: "projection", "sublayer" or 2 blocks."""
    if name != "unit":
        return besa.Besa(**fields | {name: value})
    return BesaByPair(**fields) if value == 2 else BesaByPart(**fields, unit=value)


@dataclass
class Part(Block):
    """A submodule of a block, as a block whose projections have their names in the whole block."""

    prefix: str = ""

    @property
    def projections(self) -> dict[str, nn.Linear]:
        return {f"{self.prefix}.{name}".strip("."): linear for name, linear in projections(self.module).items()}

    def run(self, number: int, weights: dict[str, Tensor] | None = None) -> Tensor:
        own = {f"{name.removeprefix(self.prefix)}.weight".strip("."): w for name, w in (weights or {}).items()}
        inputs = self.window(self.inputs, number), *self.call.args
        output = torch.func.functional_call(self.module, own, inputs, self.call.kwargs)
        return output[0] if self.call.in_tuple else output


@torch.no_grad()
def part_of(block: Block, name: str, weights: dict[str, Tensor]) -> Part:
    """A part with its own outputs as targets; `weights` replace those of the rest of the block."""
    module, inputs, outputs, calls = block.module.get_submodule(name), [], [], []
    signature = inspect.signature(module.forward)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs)  # the hidden states come first, whatever their name
        calls.append(BlockCall(bound.args[1:], bound.kwargs, isinstance(output, tuple)))
        inputs.append(bound.args[0].view(block.inputs.shape[1], -1))  # some families flatten windows and tokens
        outputs.append((output[0] if calls[-1].in_tuple else output).view(block.inputs.shape[1], -1))

    with module.register_forward_hook(record, with_kwargs=True):
        for number in range(len(block.inputs)):
            block.run(number, weights)
    shared = None, block.ignored, block.n_samples, block.bar
    part = Part(block.index, module, calls[0], torch.stack(inputs), *shared, prefix=name)
    part.targets, part.statistics = torch.stack(outputs), block.statistics
    return part


@config
class BesaByPair(besa.Besa):
    """BESA that reconstructs the output of every two consecutive blocks together, of models like Llama."""

    name: ClassVar[str] = "besa-by-pair"

    def prepared(self, model: PreTrainedModel, windows: Tensor) -> "BesaByPair":
        """Join the blocks of the model in pairs; the model computes the same."""
        blocks = find_blocks(model)
        pairs = [Pair(blocks[i : i + 2]) for i in range(0, len(blocks), 2)]
        model.base_model.layers, model.config.num_hidden_layers = nn.ModuleList(pairs), len(pairs)
        model._no_split_modules = [*model._no_split_modules, "Pair"]
        return self


class Pair(nn.ModuleList):
    """Two blocks that are called alike."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self:
            hidden = block(hidden, *args, **kwargs)
        return hidden
