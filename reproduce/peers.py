"""Pruning methods of other authors, by their own code, which the reader fetches: it is never part of this repository.

    method = Admm(sparsity=0.5, peers="peers")  # a folder with admm-pruning; the error says how to fetch it
    besa.prune(model, windows, method)

`besa` walks over the blocks. Code that needs input statistics alone gets ours; a whole loop runs on one block at a
time, with our inputs. Everything is computed in float32, or in mixed precision where their training is (bfloat16 on a
CPU). Defaults are those of the authors. One process only: ranks do not share the windows.

Zeros are counted as in our methods: floor(sparsity * n) of each projection, or of each row where they prune rows. Some
of their thresholds prune one weight more, and all ties: the largest come back, and the report notes how many did.
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
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.config import config
from besa.importance import wanda
from besa.loop import PatternMethod
from besa.masks import parse_pattern
from besa.walk import Block, PrunedBlock
from reproduce.tables import ROOT


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


@config
class Admm(Peer):
    """ADMM (Bosa 2024): mask and weights of a projection in turn; the pattern 2:4 alone.

    Args:
        iterations: of ADMM.
        choosing: of these, how many choose the mask.
        per_row: choose it in each row, with a sparsity that grows.
    """

    iterations: PositiveInt = 20
    choosing: PositiveInt = 15
    per_row: bool = False

    name: ClassVar[str] = "admm"
    needs_hessian: ClassVar[bool] = True
    repository: ClassVar[str] = "fmfi-compbio/admm-pruning"
    pinned: ClassVar[str] = "80392084a939dff5b15a160fb46499b478905506"

    def prune_block(self, block: Block) -> PrunedBlock:
        weights, options = {}, {"iters": self.iterations, "iterative_prune": self.choosing, "per_out": self.per_row}
        module = imported(self.folder, "lib.admm")
        with their_world(block.device, module):
            for name, projection in block.projections.items():
                pruner = module.AdmmPruner(copy.deepcopy(projection))
                pruner.XX = block.statistics[name].hessian * (block.n_samples / 2)
                pruner.fasterprune(self.sparsity_of(block), *self.pruned_of, percdamp=0.1, **options)
                weights[name] = pruner.layer.weight
        return self.result(block, weights, self.per_row)


@config
class Alps(Peer):
    """ALPS (Meng et al. 2024): ADMM with a growing penalty, then conjugate gradients.

    Args:
        iterations: of ADMM, at most.
        rho: first penalty.
    """

    iterations: PositiveInt = 300
    rho: PositiveFloat = 0.1

    name: ClassVar[str] = "alps"
    needs_hessian: ClassVar[bool] = True
    repository: ClassVar[str] = "mazumder-lab/ALPS"
    pinned: ClassVar[str] = "8af9e6b5c8b1b06a028bde6065e5c38829df3a19"

    def prune_block(self, block: Block) -> PrunedBlock:
        module, weights, (n, m) = imported(self.folder, "alps"), {}, self.pruned_of
        with their_world(block.device, module), mock.patch.object(module, "dev", block.device):
            for name, projection in block.projections.items():
                pruner = module.ALPS_prune(copy.deepcopy(projection), *block.inputs.shape[:2])
                pruner.XtX = block.statistics[name].hessian * (block.n_samples / 2)
                pruner.ALPS_admm(self.sparsity_of(block), m - n, m, rho=self.rho, max_iter=self.iterations)
                weights[name] = pruner.layer.weight
        return self.result(block, weights)


@config
class Ria(Peer):
    """RIA (Zhang et al. 2024): importance relative to the row and the column, times the input norm to a power.

    Args:
        power: of the norm.
        per_row: compare the weights of a row, not of the projection.
    """

    power: NonNegativeFloat = 0.5
    per_row: bool = False

    name: ClassVar[str] = "ria"
    repository: ClassVar[str] = "biomedical-cybernetics/Relative-importance-and-activation-pruning"
    pinned: ClassVar[str] = "7bc55b06924659ea977f7804b773ce3ef0d55c2f"

    def prune_block(self, block: Block) -> PrunedBlock:
        settings = {"model": "llama", "prune_method": "ria", "calib_dataset": "", "a": self.power}
        settings |= {"sparsity_ratio": self.sparsity_of(block), "per_outneuron": self.per_row, "reconstruction": False}
        settings |= {"gptq": False, "reallocation": False, "semi_sparse_acc": False}
        module = imported(self.folder, "lib.prune")
        theirs = run_on(block, module, "prune_ria", settings, self.pruned_of)
        return self.result(block, keep_trained(block, theirs), self.per_row)


@config
class DSnoT(Peer):
    """DSnoT (Zhang et al. 2024) on Wanda: weights of a row change places until its mean error is small.

    Args:
        cycles: changes per row, at most.
        skip: leaves Wanda's mask as it is in "mlp" (their default), in "self_attn", or nowhere ("no_skip").
    """

    cycles: NonNegativeInt = 50
    skip: str = "mlp"

    name: ClassVar[str] = "dsnot"
    repository: ClassVar[str] = "zyxxmu/DSnoT"
    pinned: ClassVar[str] = "4c029dfa66cae3dba7f4a77c78a524e272fc638c"

    def prune_block(self, block: Block) -> PrunedBlock:
        settings = {"initial_method": "wanda", "skip_layer": self.skip, "skip_sub_layer": "no_skip"}
        settings |= {"sparsity_ratio": self.sparsity_of(block), "max_cycle_time": self.cycles, "update_threshold": 0.1}
        settings |= {"pow_of_var_regrowing": 1, "pow_of_var_pruning": 1, "without_same_sign": True}
        settings |= {"without_DSnoT": False, "get_time_overhead": False}
        module = imported(self.folder, "lib.prune")
        theirs = run_on(block, module, "prune_DSnoT", settings, self.pruned_of)
        return self.result(block, keep_trained(block, theirs), by_row=True)


@config
class Ebft(Peer):
    """EBFT (Guo et al. 2024) on Wanda's mask: trains a block, norms too, to give the outputs that it gave before.

    Args:
        epochs: over the windows.
        windows_per_step: their 256 windows make 32 steps an epoch; 32, at 1, as many.
        lr: step size.
    """

    epochs: PositiveInt = 10
    windows_per_step: PositiveInt = 8
    lr: PositiveFloat = 2e-4

    name: ClassVar[str] = "ebft"
    repository: ClassVar[str] = "sunggo/EBFT"
    pinned: ClassVar[str] = "76ded250dde8e3f7081d7a8b7d34de2754c46008"

    @torch.enable_grad()
    def prune_block(self, block: Block) -> PrunedBlock:
        theirs, masked = trainable_copy(block), imported(self.folder, "lib.linear_type")
        for name, projection in block.projections.items():
            keep_mask = self.keep_mask(wanda(projection.weight, block.statistics[name]), self.sparsity_of(block))
            linear = theirs.get_submodule(name)
            linear.__class__, linear.prune_rate = masked.LinearMasked, 0.5  # any but 0
            linear.mask = nn.Parameter(keep_mask.float(), requires_grad=False)
        changed = {"learning_rate": self.lr, "epochs": self.epochs, "batch_size": self.windows_per_step}
        data = block.inputs.float(), block.targets.float(), range(len(block.inputs))
        finetune, args = imported(self.folder, "lib.finetune"), Namespace(**vars(masked.args) | changed)
        plots = mock.patch.multiple(finetune, plt=mock.DEFAULT, os=mock.DEFAULT)
        with their_world(block.device, finetune), plots:
            finetune.train(theirs, *data, args, block.device, torch.zeros(1, 1, 1, 1), None)
        weights = keep_trained(block, theirs)
        for name in weights:
            weights[name] = weights[name] * theirs.get_submodule(name).mask
        return self.result(block, weights, by_row=True)


@config
class Safe(Peer):
    """SAFE (Lee et al. 2025): trains a block, norms too, toward a flat minimum near the sparse weights.

    Args:
        plus: SAFE+, which chooses weights by Wanda's importance.
        epochs: over the windows.
        windows_per_step: their 128 windows make 16 steps an epoch; 32, at 2, as many.
        lr: step size.
    """

    plus: bool = False
    epochs: PositiveInt = 30
    windows_per_step: PositiveInt = 8
    lr: PositiveFloat = 2e-4

    name: ClassVar[str] = "safe"
    repository: ClassVar[str] = "LOG-postech/safe-torch"
    pinned: ClassVar[str] = "1a976734051b203dac90ea9cf5a4de9c10221dcd"

    def prune_block(self, block: Block) -> PrunedBlock:
        settings = {"dataset": "", "learning_rate": self.lr, "lmda": 1e-3, "rho": 2e-4, "interval": 32, "beta1": 0.9}
        settings |= {"beta2": 0.95, "epochs": self.epochs, "warmup_epochs": 2, "batch_size": self.windows_per_step}
        settings |= {"accumulation_steps": 1, "activation": self.plus, "sparsity_ratio": self.sparsity_of(block)}
        module = imported(self.folder / "language", "lib.prune")
        theirs = run_on(block, module, "prune_safe", settings, self.pruned_of)
        return self.result(block, keep_trained(block, theirs))
