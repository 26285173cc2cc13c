"""Before long work: what it will need, in memory, disk and time, and where the hidden states go."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.machine.memory import USABLE, anonymous_bytes, free_device, free_host, measure, neighbours
from besa.machine.processes import n_ranks
from besa.prune import InModel, Method, enter, prune_span, repeatable
from besa.walk import Spans

HiddenStates = Literal["device", "host", "file"]


@dataclass(frozen=True)
class Trial:
    """What pruning the first block on a window or two took."""

    seconds_once: float
    """Per block, however many windows: copying, ranking, writing back."""
    seconds_per_window: float
    """Per block and window: observing, training, advancing."""
    bytes: int
    """Memory of the device that computes, beside the hidden states: weights, ranks, gradients, activations."""


@dataclass(frozen=True)
class Plan:
    """What a run needs and finds, on each rank; bytes and seconds."""

    hidden_states: HiddenStates
    """Where they lie: on the device, in (pinned) host memory, or in a file beside the output."""
    trial: Trial
    streams_bytes: int
    """Hidden states of this rank's windows, twice: what enters a block, and what it must reproduce."""
    device_free: int
    host_free: int
    disk_bytes: int
    """Shards, and the hidden states where they lie in a file."""
    disk_free: int
    n_blocks: int
    seconds: float
    """Of the whole run."""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"memory: {_gib(self.trial.bytes)} for a block, {_gib(self.device_free)} are free where it computes",
                f"hidden states: {_gib(self.streams_bytes)} per rank in {_PLACES[self.hidden_states]}; "
                f"{_gib(self.host_free)} of host memory are free",
                f"disk: {_gib(self.disk_bytes)} to write, {_gib(self.disk_free)} are free",
                f"time: {self.seconds / max(1, self.n_blocks):.1f} s for each of {self.n_blocks} blocks, "
                f"{self.seconds / 60:.1f} min in all, by a trial on the first",
            ]
        )


_PLACES = {"device": "the memory where it computes", "host": "pinned host memory", "file": "a file beside the output"}


def make_plan(
    trial: Trial,
    n_windows: int,
    window_bytes: int,
    shard_bytes: int,
    n_blocks: int,
    device: torch.device,
    output: Path,
    wanted: HiddenStates | Literal["auto"] = "auto",
) -> Plan:
    """Where the hidden states go, and whether everything fits.

    Args:
        n_windows: of this rank.
        window_bytes: of one window's hidden states.
        shard_bytes: still to be written.
        n_blocks: still to be pruned.
        wanted: "auto" takes the first that fits of device, host and file.

    Raises:
        ValueError: something does not fit; says what is needed, what is free, and what to change.
    """
    streams, pinned = 2 * n_windows * window_bytes, 2 * _power_of_2(n_windows * window_bytes)
    device_free, host_free, disk_free = free_device(device), free_host(), shutil.disk_usage(output).free
    room = {"device": USABLE * device_free / (neighbours() if device.type == "cpu" else 1) - trial.bytes}
    if device.type == "cuda":
        room["host"] = USABLE * host_free / neighbours()
    elif wanted == "host":
        raise ValueError("hidden_states='host' is for GPUs, whose memory is another; take 'device', 'file' or 'auto'")
    room["file"] = (USABLE * disk_free - shard_bytes) / n_ranks()
    if room["file"] < 0:
        raise ValueError(
            f"the output does not fit: {_gib(shard_bytes)} are still to be written and {_gib(disk_free)} are free in "
            f"{output}, of which besa fills {USABLE:.0%}; make room or name another folder"
        )
    needed = {"host": pinned}
    places = [p for p, free in room.items() if wanted in ("auto", p) and needed.get(p, streams) <= free]
    if room["device"] < 0 or not places:
        found = ", ".join(f"{_gib(max(0.0, free))} in {_PLACES[place]}" for place, free in room.items())
        raise ValueError(
            f"a block takes {_gib(trial.bytes)} of the {_gib(device_free)} that are free on {device}, and the hidden "
            f"states of {n_windows} windows {_gib(streams)}; there is room for {found} (hidden_states={wanted!r}). "
            "Take fewer or shorter windows, hidden_states='auto', more ranks or a larger machine"
        )
    on_disk = shard_bytes + streams * (places[0] == "file")
    seconds = n_blocks * (trial.seconds_once + n_windows * trial.seconds_per_window)
    return Plan(places[0], trial, streams, device_free, host_free, on_disk, disk_free, n_blocks, seconds)


def _power_of_2(n: int) -> int:
    """What torch takes of pinned memory for n bytes."""
    return 1 << (n - 1).bit_length()


def _gib(n: int | float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.0f} MiB"


@torch.no_grad()
def try_out(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    together: Spans,
    returns_tuple: bool,
    store: InModel,
) -> Trial:
    """Prune a copy of the first block, or span of blocks, on as few windows as show what one more would cost.

    Args:
        windows: of this rank.

    Raises:
        ValueError: not even that fits.
    """
    few = windows[: 2 * max(1, (method.batch_size or 1) // n_ranks())]
    ticks: list[float] = []

    def tick() -> None:
        if store.device.type == "cuda":
            torch.cuda.synchronize(store.device)
        ticks.append(time.perf_counter())

    with _fitting(few, store.device), repeatable(store.device):
        streams = enter(model, few, returns_tuple, InModel(store.device))
        with measure() as cost:
            before = anonymous_bytes()
            block, call = store.load(together, 0)
            prune_span(0, block, call, streams, method, n_ranks() * len(few), tick)
    # Observing, every pass of training and advancing tick once per window. The first tick of a phase comes after its
    # preparation; what lies between the others, every further window will take.
    n = len(few)
    between = [late - early for i, (early, late) in enumerate(itertools.pairwise(ticks), 1) if i % n]
    per_window = sum(between) / (n - 1) if n > 1 else cost.seconds
    used = cost.peak_bytes if store.device.type == "cuda" else cost.peak_anonymous_bytes - before
    return Trial(max(0.0, cost.seconds - n * per_window), per_window, max(0, used))


@contextlib.contextmanager
def _fitting(windows: Tensor, device: torch.device) -> Iterator[None]:
    """Turn too little memory into an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a block and {len(windows)} windows of {windows.shape[1]} tokens do not fit on {device} "
            f"({_gib(free_device(device))} are free now): {str(error).splitlines()[0]}. Take shorter windows, a method "
            "without batch_size > 1 or reconstruct > 1, or a larger device"
        ) from error
