"""Peers: pruning methods of other authors, by their own code (`peer.py` says how it is run)."""

import copy
from argparse import Namespace
from typing import ClassVar
from unittest import mock

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from besa.config import config
from besa.importance import wanda
from besa.walk import Block, PrunedBlock
from reproduce.methods.peer import Peer, imported, keep_trained, run_on, their_world, trainable_copy


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
