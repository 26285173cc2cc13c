"""The blocks of a decoder one after the other, with what enters each and what must leave it.

    for block in walk(model, windows):
        block.finish(method.prune_block(block))

Every block sees what the already pruned blocks before it put out. One at a time is in memory where `load` copies it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.decoder import (
    BlockCall,
    Remembered,
    device_of,
    embed,
    find_blocks,
    inputs_shared,
    locate,
    projections,
    pruned_projections,
    record_calls,
    record_part,
    run_block,
    run_past,
    run_until,
    spans,
    to_device_of,
)
from besa.importance import InputStatistics, collect_statistics
from besa.machine.device import unaltered, way_out
from besa.machine.processes import mean_, n_ranks, rank, sum_
from besa.quantize import QuantizedWeight
from besa.report import Report

Targets = Literal["pruned", "dense"]


@dataclass(frozen=True)
class PrunedBlock:
    """What a method makes of a block: by projection, its new weight and which of its weights are kept."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    keep_masks: dict[str, Bool[Tensor, "rows columns"]] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    """Loss, reconstruction error and expected sparsity of each training step."""
    notes: dict[str, str] = field(default_factory=dict)
    """A remark by projection."""
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    """Where weights were quantized: what reproduces them."""


def walk(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    targets: Targets = "pruned",
    span: int = 1,
    *,
    take_dense: bool = False,
    ignore: Sequence[str] = (),
    load: Callable[[nn.Module], nn.Module] = lambda block: block,
    room: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    progress: bool = True,
) -> Iterator["Block"]:
    """Yield every block, or every `span` of blocks as one; each must be finished before the next comes.

    Under torchrun every rank walks with its share of the windows. Call it within `frozen(model)`.

    Args:
        windows: token ids, the same on every rank.
        targets: what a pruned block must reproduce: "pruned", the unpruned block's output on the same inputs, which the
            pruned blocks before it made; or "dense", the dense model's own hidden states.
        take_dense: take the dense model's hidden states along whatever the targets, for `Block.moments`.
        ignore: names of projections or blocks that stay dense (`besa.decoder.pruned_projections`).
        load: what to work on in a block's stead, such as a copy of it on another device.
        room: makes room for the hidden states of all windows, given shape and precision; by default where the model is.
    """
    mine, progress = windows[rank() :: n_ranks()], progress and rank() == 0
    calls = record_calls(model, mine[:1])
    inputs = _enter(model, mine, room)
    more_room = lambda: (room or inputs.new_empty)(tuple(inputs.shape), dtype=inputs.dtype)
    outputs = more_room() if targets == "pruned" else None
    along = more_room().copy_(inputs) if take_dense or targets == "dense" else None
    ahead = more_room() if take_dense and targets == "dense" else None
    parts = (more_room(), more_room()) if take_dense else None
    together, pruned = spans(find_blocks(model), calls, span), pruned_projections(model, ignore)
    for index, (module, call) in tqdm(together.items(), desc="prune", unit="block", disable=not progress):
        module = load(module)
        ignored = frozenset(name for name in projections(module) if locate(index, module, name) not in pruned)
        call = call.to(device_of(module))
        about = {"n_samples": len(windows), "progress": progress, "ignored": ignored}
        block = Block(index, module, call, inputs, outputs, along, ahead, parts, **about)
        del module  # the block alone holds it, and gives it up before the next one comes
        yield block
        block.leave()
        if ahead is not None:
            along, ahead = ahead, along


def _enter(model: PreTrainedModel, windows: Tensor, room: Callable[..., Tensor] | None) -> Tensor:
    """What enters the first block, for every window."""
    first = embed(model, windows[:1])
    inputs = (room or first.new_empty)((len(windows), *first.shape[1:]), dtype=first.dtype)
    for number, window in enumerate(windows.split(1)):
        inputs[number] = embed(model, window)[0]
    return inputs


class Block:
    """A block, a span of blocks, or a part of a block, to be pruned: its module, what enters and what must leave it."""

    def __init__(
        self,
        index: int,
        module: nn.Module,
        call: BlockCall,
        inputs: Float[Tensor, "n_samples seq_len n_in"],
        outputs: Float[Tensor, "n_samples seq_len n_out"] | None,
        dense: Float[Tensor, "n_samples seq_len n_in"] | None,
        ahead: Float[Tensor, "n_samples seq_len n_in"] | None,
        parts: tuple[Tensor, Tensor] | None = None,
        *,
        n_samples: int,
        progress: bool,
        observed: bool = False,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            index: of the block in the model, of a span's first.
            inputs: hidden states of this rank's windows; they move on in place.
            outputs: room for what the unpruned block makes of them; None where the dense model's are the targets.
            dense: the dense model's hidden states that enter the block, if they are taken along.
            ahead: room for what the dense model's block makes of them; None: they move on in place.
            parts: room for what enters the last projection of the block's first part, for `moments`.
            n_samples: windows on all ranks.
            observed: `outputs` are there already.
            ignored: projections that stay dense.
        """
        self.index, self.module, self.call, self.inputs = index, module, call, inputs
        self._outputs, self._observed = outputs, observed
        self._dense, self._ahead, self._moved = dense, dense if ahead is None else ahead, False
        self._parts, self._remembered = parts, []
        self.n_samples, self.progress, self.ignored = n_samples, progress, ignored
        self._finished, self._start = False, time.perf_counter()

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps to prune, by name, without the ignored; their weights stay dense until `finish`."""
        return {name: linear for name, linear in projections(self.module).items() if name not in self.ignored}

    @torch.no_grad()
    def statistics(self, hessian: bool = False) -> dict[str, InputStatistics]:
        """Of what enters the unpruned block's projections, by name, over the windows of all ranks.

        Args:
            hessian: gather second moments too, and not only norms.

        Raises:
            ValueError: a projection is never called, or what enters it or leaves the block is not finite.
        """
        if not self.projections:  # all are ignored
            return {}
        with collect_statistics(self.projections, self.n_samples, hessian) as statistics:
            broken = self._run_unpruned()
        for name in self.projections:
            if name not in statistics:
                raise ValueError(f"{self._named(name)}: never called; conditional projections are not supported")
        for shared in {id(statistic): statistic for statistic in statistics.values()}.values():
            shared.sum_over_ranks()
        for name, statistic in statistics.items():
            if not statistic.is_finite():
                raise self._not_finite(f"{self._named(name)}: its inputs hold")
        self._refuse(broken)
        return statistics

    @property
    def targets(self) -> Float[Tensor, "n_samples seq_len n_out"]:
        """What the pruned block must put out, for every window."""
        if self._outputs is None:
            return self.dense_outputs
        self._observe()
        return self._outputs

    @property
    def dense_outputs(self) -> Float[Tensor, "n_samples seq_len n_out"]:
        """What the dense model's block puts out in the dense model, for every window.

        Raises:
            RuntimeError: they are not taken along: `walk(..., take_dense=True)`.
        """
        if self._dense is None:
            raise RuntimeError(f"block {self.index}: the dense model is not taken along: walk(take_dense=True)")
        self._move_dense()
        return self._ahead

    def _observe(self) -> None:
        """Make the targets, while the block is still unpruned, once."""
        if self._outputs is not None and not self._observed:
            self._refuse(self._run_unpruned())

    @torch.no_grad()
    def _move_dense(self) -> None:
        """The dense model's hidden states move on to the block's output, once."""
        if not self._moved:
            for number in self.bar(range(len(self._dense)), "advance"):
                with self._recalling(1, number, {}):
                    self._ahead[number] = run_block(self.module, self._here(self._dense, number), self.call)[0]
            self._moved = True

    def fed_alike(self) -> list[list[str]]:
        """Names of the projections in the order in which the block calls them, those that share an input together."""
        return inputs_shared(self.module, self._here(self.inputs, 0), self.call, self.projections)

    @torch.no_grad()
    def moments(
        self, name: str, weights: dict[str, Tensor], toward_dense: float, onward: bool = False
    ) -> tuple[Float32[Tensor, "columns columns"], Float32[Tensor, "columns columns"]]:
        """Second moments H = sum y y^T and T = sum (y + a (x - y)) y^T of a projection's inputs, all ranks' windows.

        y enters the projection in this block with `weights` in it, x in the dense model; `toward_dense` is a.

        Args:
            onward: these are the last to be asked for: the dense model's hidden states move on in the same runs.

        Raises:
            ValueError: the inputs are not finite.
            RuntimeError: the dense model's hidden states are not taken along, or have moved on in place.
        """
        if self._dense is None or (self._moved and self._ahead is self._dense):
            raise RuntimeError(f"block {self.index}: the dense model's inputs are gone: walk(take_dense=True)")
        if not self._remembered:
            part = name.partition(".")[0]
            self._remembered = [Remembered(self.module, part, room) for room in self._parts or ()]
        columns = self.module.get_submodule(name).weight.shape[1]
        hessian = torch.zeros(columns, columns, device=self.device)
        cross, share, onward = torch.zeros_like(hessian), 1 / self.n_samples, onward and not self._moved
        for number in self.bar(range(len(self.inputs)), "observe"):
            y = self._entering(name, number, 0, weights).flatten(0, -2)
            x = self._entering(name, number, 1, {}, onward).flatten(0, -2)
            if y.dtype == torch.float16:  # sums over tokens overflow; bfloat16's do not, and its products are fast
                x, y = x.float(), y.float()
            hessian.add_(y.T @ y, alpha=share)
            cross.add_(x.T @ y, alpha=share)
        self._moved |= onward
        if not torch.isfinite(sum_(hessian)).all() or not torch.isfinite(sum_(cross)).all():
            raise self._not_finite(f"{self._named(name)}: its inputs hold")
        return hessian, hessian.lerp(cross, toward_dense)

    def _entering(
        self, name: str, number: int, stream: int, weights: dict[str, Tensor], onward: bool = False
    ) -> Tensor:
        """What enters a projection, of a window of `inputs` (0) or of `dense` (1), which may move on with it."""
        hidden = self._here((self.inputs, self._dense)[stream], number)
        with self._recalling(stream, number, weights):
            if onward:
                entered, output = run_past(self.module, name, hidden.clone(), self.call)
                self._ahead[number] = output[0]
            else:
                entered = run_until(self.module, name, hidden, self.call, weights)
        for remembered in self._remembered[stream : stream + 1]:
            remembered.note(number, name, entered, weights)
        return entered

    def _recalling(self, stream: int, number: int, weights: dict[str, Tensor]) -> contextlib.AbstractContextManager:
        """While active, what `moments` has run of a window of `inputs` (0) or of `dense` (1) is not run again."""
        return self._remembered[stream].of(number, weights) if self._remembered else contextlib.nullcontext()

    @torch.no_grad()
    def _run_unpruned(self) -> Tensor:
        """Run the unpruned block over all windows, as targets where they are its outputs; counts those not finite."""
        broken = torch.zeros((), dtype=torch.int32, device=device_of(self.module))
        for number in self.bar(range(len(self.inputs)), "observe"):
            output = self.run(number)
            broken += ~torch.isfinite(output).all()
            if self._outputs is not None:
                self._outputs[number] = output[0]
        self._observed = True
        return broken

    def _refuse(self, broken: Tensor) -> None:
        if sum_(broken):
            raise self._not_finite(f"block {self.index}: its output holds")

    def _not_finite(self, what: str) -> ValueError:
        return ValueError(f"{what} NaN or infinity; {way_out(self.inputs.dtype)}")

    def _named(self, name: str) -> str:
        return f"block {self.index}, {name}"

    def run(self, number: int, weights: dict[str, Tensor] | None = None) -> Float[Tensor, "1 seq_len n_out"]:
        """What the block makes of one window, with some projections' weights replaced for this once."""
        return run_block(self.module, self._here(self.inputs, number), self.call, weights)

    def target(self, number: int) -> Float[Tensor, "1 seq_len n_out"]:
        """What the pruned block must make of one window."""
        return self._here(self.targets, number)

    def dense_output(self, number: int) -> Float[Tensor, "1 seq_len n_out"]:
        """What the block puts out in the dense model, for one window."""
        return self._here(self.dense_outputs, number)

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return device_of(self.module)

    def _here(self, stream: Tensor, number: int) -> Tensor:
        """One window where the block computes."""
        return to_device_of(self.module, stream[number : number + 1])

    def bar(self, steps: Sequence[Any], what: str) -> Iterable[Any]:
        """The same with a progress bar, once it has taken a second."""
        return _patient_bar(steps, what) if self.progress else steps

    @torch.no_grad()
    def part(self, name: str, weights: dict[str, Tensor]) -> "Block":
        """A submodule as a block: fed by this block with `weights` in it, it must reproduce its own output."""
        inputs, call, outputs = record_part(self.module, name, self.inputs, self.call, weights)
        module = self.module.get_submodule(name)
        ignored = frozenset(each.removeprefix(f"{name}.") for each in self.ignored if each.startswith(f"{name}."))
        about = {"n_samples": self.n_samples, "progress": self.progress, "observed": True, "ignored": ignored}
        return Block(self.index, module, call, inputs, outputs, None, None, **about)

    @torch.no_grad()
    def finish(self, pruned: PrunedBlock) -> Report:
        """Take the pruned weights; the hidden states move on to what the pruned block makes of them.

        Returns:
            What this did to the block.
        """
        self._observe()
        if self._dense is not None:
            self._move_dense()
        errors = []
        with _projection_errors(self.projections, pruned.weights) as projection_errors:
            for number in self.bar(range(len(self.inputs)), "advance"):
                # the first window runs whole, for the errors of all projections
                with self._recalling(0, number, pruned.weights) if number else contextlib.nullcontext():
                    output = self.run(number, pruned.weights)
                errors.append(reconstruction_error(output, self.target(number)))
                self.inputs[number] = output[0]
        error = float(mean_(torch.stack(errors).mean()))
        for name in self.projections.keys() - projection_errors.keys():
            raise ValueError(f"{self._named(name)}: never called; conditional projections are not supported")
        if not math.isfinite(error):
            raise self._not_finite(f"block {self.index}: pruned, its output holds")
        for name, projection in self.projections.items():
            projection.weight.data = pruned.weights[name].detach()  # no copy: the old ones may be mapped from a file
        self._finished = True
        whole = lambda name: torch.ones_like(self.module.get_submodule(name).weight, dtype=torch.bool)
        kept = {name: whole(name) for name in self.ignored}  # they count, as kept
        notes = pruned.notes | dict.fromkeys(kept, "ignored")
        pruned = replace(pruned, keep_masks=pruned.keep_masks | kept, notes=notes)
        projection_errors |= dict.fromkeys(kept, 0.0)
        seconds = time.perf_counter() - self._start
        return Report.of_block(self.index, self.module, pruned, error, projection_errors, seconds)

    @torch.no_grad()
    def skip(self, state: dict[str, Tensor]) -> None:
        """Take the tensors that an earlier run left, by their names in the module, and move on."""
        if self._dense is not None:
            self._move_dense()  # by the unpruned block
        self.module.load_state_dict(state, assign=True)
        for number in self.bar(range(len(self.inputs)), "advance"):
            self.inputs[number] = self.run(number)[0]
        self._finished = True

    def leave(self) -> None:
        """Give up the module and the hidden states.

        Raises:
            RuntimeError: the block was not finished: the next one would see the wrong inputs.
        """
        if not self._finished:
            raise RuntimeError(f"block {self.index} was not finished: call block.finish(method.prune_block(block))")
        del self.module, self.call, self.inputs, self._outputs, self._dense, self._ahead, self._parts, self._remembered


def _patient_bar(steps: Sequence[Any], what: str) -> Iterator[Any]:
    """A bar is made late: in a notebook each one is a widget, which takes longer than a short pass."""
    start, bar = time.perf_counter(), None
    for number, step in enumerate(steps):
        if bar is None and time.perf_counter() - start > 1:
            bar = tqdm(total=len(steps), initial=number, desc=what, leave=False)
        yield step
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def reconstruction_error(
    output: Float[Tensor, "1 seq_len hidden"], target: Float[Tensor, "1 seq_len hidden"]
) -> Float32[Tensor, ""]:
    """Block loss of one window (Eqn. 1): sum(((target - output) / ||target||_2)^2) / hidden, no unit.

    The norm is taken per channel over the window's tokens, as in the released code; the paper writes the plain
    squared norm of the difference.
    """
    target = target.float()
    norm = target.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (1, 1, hidden)
    return ((target - output.float()) / norm).square().sum() / target.shape[-1]


def token_error(
    output: Float[Tensor, "1 seq_len hidden"], target: Float[Tensor, "1 seq_len hidden"]
) -> Float32[Tensor, ""]:
    """The mean over tokens of ||target - output||^2 / ||target||^2, no unit: every token counts alike."""
    target = target.float()
    lost, whole = (target - output.float()).square().sum(-1), target.square().sum(-1)  # (1, seq_len)
    return (lost / whole.clamp_min(1e-12)).mean()


@contextlib.contextmanager
def _projection_errors(linear: dict[str, nn.Linear], weights: dict[str, Tensor]) -> Iterator[dict[str, float]]:
    """While active, ||(W - W')x||^2 / ||Wx||^2 of each projection over the first window (of this rank) that passes."""
    errors: dict[str, float] = {}
    before = {name: projection.weight for name, projection in linear.items()}

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in errors:
            x = inputs[0]
            output = nn.functional.linear(x, before[name]).float()
            lost = nn.functional.linear(x, before[name] - weights[name]).float()
            errors[name] = float(lost.square().sum() / output.square().sum().clamp_min(1e-30))

    with contextlib.ExitStack() as hooks:
        for name, projection in linear.items():
            hooks.enter_context(projection.register_forward_pre_hook(partial(hook, name)))
        yield errors


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout for a while; behind it every module is in the mode that it was in."""
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in zip(model.modules(), training, strict=True):
            module.training = was_training


@contextlib.contextmanager
def frozen(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, whatever else is set around it (`unaltered`).

    Args:
        device: what computes; the model's own by default.

    Raises:
        ValueError: sums would not repeat on this GPU.
    """
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model), torch.no_grad(), unaltered(device or model.device):
            yield
    finally:
        for parameter, requires_grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)
