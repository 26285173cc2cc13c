"""Pruning methods of other authors, by their own code, which the reader fetches: it is never part of this repository.

    method = Admm(sparsity=0.5, peers="peers")  # a folder with admm-pruning; the error says how to fetch it
    besa.prune(model, windows, method)

`besa` walks over the blocks. Code that needs input statistics alone gets ours; a whole loop runs on one block at a
time, with our inputs. Everything is computed in float32, or in mixed precision where their training is (bfloat16 on a
CPU). Defaults are those of the authors. One process only: ranks do not share the windows.

Zeros are counted as in our methods: floor(sparsity * n) of each projection, or of each row where they prune rows. Some
of their thresholds prune a weight more, or all weights that are equal: the largest of these are restored, and the
report notes how many.
"""

import contextlib
import copy
import functools
import importlib
import io
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.config import config
from besa.loop import PatternMethod
from besa.masks import parse_pattern
from besa.walk import Block, PrunedBlock
from reproduce import ROOT


@config
class Peer(PatternMethod):
    """Base of the methods that call a repository's code.

    Args:
        peers: folder that holds the repositories by their names; None takes $BESA_PEERS, or `peers` beside `besa`.
    """

    peers: str | None = None

    repository: ClassVar[str]
    pinned: ClassVar[str]
    """The commit that was tested."""

    @property
    def folder(self) -> Path:
        return ROOT / (self.peers or os.environ.get("BESA_PEERS", "peers")) / self.repository.partition("/")[2]

    @property
    def is_there(self) -> bool:
        return (self.folder / ".git").exists()

    def check(self, model: PreTrainedModel, n_samples: int) -> None:
        super().check(model, n_samples)
        if not self.is_there:
            fetch = f"git clone https://github.com/{self.repository} {self.folder}"
            raise FileNotFoundError(
                f"{self.name} runs its authors' code, which is not here: {fetch} && "
                f"git -C {self.folder} checkout {self.pinned}"
            )

    def config(self) -> dict[str, Any]:
        """Name and fields, and the commit that is checked out instead of its folder; without one, the pinned commit."""
        fields = super().config() | {"commit": self.pinned}
        del fields["peers"]
        if self.is_there:
            describe = ["git", "-C", str(self.folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
            fields["commit"] = subprocess.check_output(describe, text=True).strip()
        return fields

    @property
    def pruned_of(self) -> tuple[int, int]:
        """How many of how many consecutive weights are pruned; zeros without a pattern."""
        n, m = parse_pattern(self.pattern) if self.pattern else (0, 0)
        return m - n, m

    def result(self, block: Block, weights: dict[str, Tensor], by_row: bool = False) -> PrunedBlock:
        """Their weights with exactly as many zeros as asked for."""
        pruned = PrunedBlock()
        for name, projection in block.projections.items():
            dense, new = projection.weight, weights[name].detach().to(projection.weight)
            was_pruned, kept_ones = new == 0, dense.abs().max().float() + new.abs().float()
            scores = torch.where(was_pruned, dense.abs().float(), kept_ones)
            scores = scores if by_row or self.pattern else scores.flatten()[None]
            keep_mask = self.keep_mask(scores, self.sparsity_of(block)).view_as(new)
            pruned.weights[name] = torch.where(was_pruned, dense, new) * keep_mask
            pruned.keep_masks[name] = keep_mask
            moved = int((pruned.weights[name] != new).sum())
            pruned.notes[name] = f"{moved} weights changed for the exact sparsity" if moved else ""
        return pruned


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop what is printed or warned of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


@functools.cache
def imported(folder: Path, name: str) -> ModuleType:
    """A module of a repository. Packages of the same name in others do not see each other."""
    arguments = mock.patch.object(sys, "argv", ["peer"])
    with silence(), arguments, mock.patch.object(sys, "path", [str(folder), *sys.path]):
        try:
            return importlib.import_module(name)
        finally:
            package = name.partition(".")[0]
            for each in [each for each in sys.modules if each.partition(".")[0] == package]:
                del sys.modules[each]


@contextlib.contextmanager
def their_world(device: torch.device, module: ModuleType) -> Iterator[None]:
    """Run a module's code, written for a GPU, where the block is: silently, and from seed 0."""
    move = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return move(tensor, *("cpu" if isinstance(arg, str) and arg[:4] == "cuda" else arg for arg in args), **kwargs)

    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            changes = [(Tensor, "to", to), (torch.cuda, "synchronize", lambda: None)]
            changes += [(kind, "cuda", lambda self, *args, **kwargs: self) for kind in (Tensor, nn.Module)]
            if hasattr(module, "autocast"):
                changes.append((module, "autocast", lambda *_, **__: torch.autocast("cpu", torch.bfloat16)))
            for owner, name, change in changes:
                stack.enter_context(mock.patch.object(owner, name, change))
        stack.enter_context(silence())
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        yield


class Dense(nn.Linear):
    """A linear map that their search for `nn.Linear` passes over."""


def trainable_copy(block: Block) -> nn.Module:
    """The block in float32, called as blocks were when their code was written: the answer is the first of a tuple."""
    theirs, call = copy.deepcopy(block.module).float().requires_grad_(True), block.call
    for name in block.ignored:
        theirs.get_submodule(name).__class__ = Dense
    forward = theirs.forward

    def old_forward(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        output = forward(hidden, *call.args, **call.kwargs)
        return (output[0] if call.in_tuple else output,)

    theirs.forward = old_forward
    return theirs


def run_on(block: Block, module: ModuleType, function: str, settings: dict[str, Any], pattern: tuple[int, int]) -> Any:
    """Run their loop over the blocks of a model on a model of this block alone; returns the block that it changed."""
    theirs, device = trainable_copy(block), block.device
    inputs = block.inputs.to(device, torch.float32)
    model = Namespace(model=Namespace(layers=[theirs]), config=Namespace(use_cache=False), hf_device_map={})
    model.seqlen = inputs.shape[1]
    args = Namespace(nsamples=len(inputs), seqlen=model.seqlen, seed=0, **settings)
    calibration = inputs, torch.empty_like(inputs), torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1)
    ours = {"get_loaders": lambda *_, **__: (inputs, None), "prepare_calibration_input": lambda *_, **__: calibration}
    with their_world(device, module), mock.patch.multiple(module, **ours):
        getattr(module, function)(args, model, None, device, *pattern)
    return model.model.layers[0]


def keep_trained(block: Block, theirs: nn.Module) -> dict[str, Tensor]:
    """Give the block what was trained besides its projections, such as norms; returns the weights of these."""
    weights = {name: theirs.get_submodule(name).weight.detach() for name in block.projections}
    for name, parameter in block.module.named_parameters():
        if name.removesuffix(".weight") not in block.projections:
            parameter.data = theirs.get_parameter(name).detach().to(parameter)
    return weights
