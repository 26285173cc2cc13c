"""Iterate over decoder blocks, yielding each with its calibration inputs and reconstruction targets.

    with frozen(model):
        for block in walk(model, windows):
            block.finish(method.prune_block(block))

Every block sees the outputs of the already pruned blocks before it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa import decoder
from besa.decoder import BlockCall
from besa.importance import InputStatistics, collect_statistics
from besa.losses import reconstruction_error
from besa.masks import zeros_before
from besa.shapes import HiddenStates, KeepMask, Window
from besa.system import finite_hint, mean_over_ranks, n_ranks, rank, repeatable, sum_over_ranks, where_it_fits

Match = Literal["block", "model"]


@dataclass
class PrunedBlock:
    """New weights and keep-masks of a block, by projection."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    keep_masks: dict[str, KeepMask] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    """Loss, reconstruction error and expected sparsity of each training step."""
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """Errors and zeros of a block that is finished, by projection."""

    block_error: float
    """Reconstruction error (Eqn. 1), mean over the windows of all ranks."""
    projection_errors: dict[str, float]
    """||(W - W')x||^2 / ||Wx||^2 on the first window."""
    zeros: dict[str, int]
    """Weights that are pruned, now or before this run."""


def walk(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    *,
    match: Match = "block",
    dense: bool = False,
    hessian: bool = False,
    ignore: Sequence[str] = (),
    place: Callable[[nn.Module], nn.Module] | None = None,
    stored: Callable[[int], Callable[[nn.Module], None] | None] | None = None,
    hidden_device: torch.device | None = None,
    progress: bool = True,
) -> Iterator["Block"]:
    """Yield every block, within `frozen(model)`; finish it before taking the next one. Ranks share the windows.

    Args:
        match: what pruned blocks must reproduce: the output of the unpruned block for the same inputs ("block"), or the
            hidden states of the dense model ("model").
        dense: keep the dense model's hidden states in either case.
        hessian: collect second moments of the inputs, not only norms.
        ignore: projections that stay dense, as in `decoder.pruned_projections`.
        place: returns the module to work on, such as a copy on another device.
        stored: returns a function that loads a block that was pruned before, which is then not yielded.
        hidden_device: keep the hidden states of the windows there; None takes the block's device if they fit.
    """
    local_windows = windows[rank() :: n_ranks()]
    calls = decoder.record_calls(model, local_windows[:1])
    inputs = torch.cat([decoder.embed(model, window) for window in local_windows.split(1)])
    broken = ~inputs.isfinite().all(-1)
    if broken.any():
        token = int(local_windows[broken.cpu()][0])
        raise ValueError(f"the embedding of token {token} is NaN or infinite; {finite_hint(inputs.dtype)}")
    pruned = decoder.pruned_projections(model, ignore)
    options = {"desc": "prune", "unit": "block", "smoothing": 0, "disable": not progress or rank() > 0}
    dense_inputs = None
    bar = tqdm(decoder.find_blocks(model), **options)
    for index, module in enumerate(bar):
        module = place(module) if place else module
        if index == 0:
            keep_dense = dense or match == "model"
            n_streams = 2 + keep_dense + (dense and match == "block")
            inputs = inputs.to(hidden_device or where_it_fits(inputs, decoder.device_of(module), n_streams))
            dense_inputs = inputs.clone() if keep_dense else None
        ignored = frozenset(name for name in decoder.projections(module) if (index, name) not in pruned)
        call = calls[index].to(decoder.device_of(module))
        block = Block(index, module, call, inputs, dense_inputs, ignored, len(windows), bar)
        load = stored(index) if stored else None
        if load is not None:
            block.skip(load)
        else:
            block.observe(match, hessian)
            yield block
        if not block.is_finished:
            raise RuntimeError(f"block {index} is not finished: call block.finish(method.prune_block(block))")
        dense_inputs = block.dense_outputs
        vars(block).clear()  # the caller still holds it while the next one is loaded


@dataclass
class Block:
    """A block with its calibration inputs and targets."""

    index: int
    module: nn.Module
    call: BlockCall
    inputs: HiddenStates
    """Hidden states of this rank's windows; `finish` replaces them by the pruned block's outputs."""
    dense_inputs: HiddenStates | None
    ignored: frozenset[str]
    n_samples: int
    """Windows of all ranks."""
    bar: tqdm | None
    targets: HiddenStates = field(init=False)
    """Outputs that the pruned block must reproduce."""
    statistics: dict[str, InputStatistics] = field(init=False)
    """Of the inputs of each projection of the unpruned block, over the windows of all ranks."""
    dense_outputs: HiddenStates | None = None
    is_finished: bool = False
    started: float = field(default_factory=time.perf_counter)

    @torch.no_grad()
    def observe(self, match: Match, hessian: bool) -> None:
        """Run the unpruned block once over all windows, for statistics and targets."""
        outputs = torch.empty_like(self.inputs) if match == "block" else None
        n_broken = torch.zeros((), dtype=torch.int32, device=self.device)
        with collect_statistics(self.projections, self.n_samples, hessian) as self.statistics:
            for number in self.progress(range(len(self.inputs)), "observe"):
                output = self.run(number)
                n_broken += ~torch.isfinite(output).all()
                if outputs is not None:
                    outputs[number] = output[0]
        for shared in {id(each): each for each in self.statistics.values()}.values():
            for moment in (shared.squared_norm, shared.hessian, shared.tokens):
                if moment is not None:
                    sum_over_ranks(moment)
            if shared.tokens == 0:  # as of inputs of norm 1: weights go by magnitude
                shared.squared_norm.fill_(1)
                if shared.hessian is not None:
                    shared.hessian.fill_diagonal_(1)
        for name in self.projections:
            if name not in self.statistics:
                raise ValueError(
                    f"block {self.index}: {name} is never called; conditional projections cannot be pruned"
                )
            if not torch.isfinite(self.statistics[name].squared_norm).all():
                raise self._not_finite(f"the inputs of {name} are")
        if sum_over_ranks(n_broken):
            raise self._not_finite("the output is")
        self._run_dense()
        self.targets = self.dense_outputs if outputs is None else outputs  # pyright: ignore[reportAttributeAccessIssue]

    def _run_dense(self) -> None:
        if self.dense_inputs is not None:
            self.dense_outputs = torch.empty_like(self.dense_inputs)
            for number in self.progress(range(len(self.dense_inputs)), "observe dense"):
                window = self.window(self.dense_inputs, number)
                self.dense_outputs[number] = decoder.run_block(self.module, window, self.call)[0]

    def _not_finite(self, what: str) -> ValueError:
        return ValueError(f"block {self.index}: {what} NaN or infinite; {finite_hint(self.inputs.dtype)}")

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps to prune, by their name in the block; their weights stay dense until `finish`."""
        linears = decoder.projections(self.module)
        return {name: linear for name, linear in linears.items() if name not in self.ignored}

    @property
    def device(self) -> torch.device:
        return decoder.device_of(self.module)

    def window(self, stream: HiddenStates, number: int) -> Window:
        """One window of a stream of hidden states, on the block's device."""
        return stream[number : number + 1].to(self.device, non_blocking=True)

    def run(self, number: int, weights: dict[str, Tensor] | None = None) -> Window:
        """Output for one window; `weights` replace those of some projections."""
        return decoder.run_block(self.module, self.window(self.inputs, number), self.call, weights)

    def batches(self, batch_size: int, epochs: int) -> list[range]:
        """This rank's windows of each training step; any number of ranks together take the same ones."""
        size = batch_size // n_ranks()
        return [range(start, start + size) for start in range(0, len(self.inputs), size)] * epochs

    def progress(self, items: Sequence[Any], description: str) -> Iterable[Any]:
        """Show the running pass beside the bar over blocks."""
        for number, item in enumerate(items):
            if self.bar and number % 8 == 0:
                self.bar.set_postfix_str(f"{description} {number}/{len(items)}")
            yield item

    @torch.no_grad()
    def finish(self, pruned: PrunedBlock) -> Outcome:
        """Put in the pruned weights, and replace the inputs by the pruned block's outputs."""
        errors = []
        with _projection_errors(self.projections, pruned.weights) as projection_errors:
            for number in self.progress(range(len(self.inputs)), "advance"):
                output = self.run(number, pruned.weights)
                errors.append(reconstruction_error(output, self.window(self.targets, number)))
                self.inputs[number] = output[0]
        error = float(mean_over_ranks(torch.stack(errors).mean()))
        if not math.isfinite(error):
            raise self._not_finite("after pruning, the output is")
        zeros = {}
        for name, projection in self.projections.items():
            still_zero = zeros_before(projection.weight) & (pruned.weights[name] == 0)
            zeros[name] = int((still_zero | ~pruned.keep_masks[name]).sum())
            projection.weight.data = pruned.weights[name].detach()  # no copy: the old one may be mapped from a file
        self.is_finished = True
        return Outcome(error, projection_errors, zeros)

    def skip(self, load: Callable[[nn.Module], None]) -> None:
        """Load a block that was pruned before, and advance the inputs."""
        self._run_dense()
        load(self.module)
        for number in self.progress(range(len(self.inputs)), "advance"):
            self.inputs[number] = self.run(number)[0]
        self.is_finished = True


@contextlib.contextmanager
def _projection_errors(linears: dict[str, nn.Linear], weights: dict[str, Tensor]) -> Iterator[dict[str, float]]:
    """Measure ||(W - W')x||^2 / ||Wx||^2 of each projection on the first window that passes."""
    errors: dict[str, float] = {}
    dense = {name: linear.weight for name, linear in linears.items()}

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in errors:
            x = inputs[0]
            output = nn.functional.linear(x, dense[name]).float()
            difference = nn.functional.linear(x, dense[name] - weights[name]).float()
            errors[name] = float(difference.square().sum() / output.square().sum().clamp_min(1e-30))

    with contextlib.ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(hook, name)))
        yield errors


@contextlib.contextmanager
def frozen(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, repeatable on `device` (by default the model's)."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad(), repeatable(device or model.device):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
