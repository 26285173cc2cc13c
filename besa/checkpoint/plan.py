"""Before long work: what it will need, in memory and on disk, and where the hidden states go."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from besa.decoder import projections
from besa.machine.fields import documented
from besa.machine.memory import USABLE, free_device, free_host, neighbours
from besa.machine.processes import n_ranks
from besa.prune import Method
from besa.reconstruct import Reconstruct

HiddenStates = Literal["device", "host", "file"]

BESIDE = 2**30
"""Bytes for everything that is not counted: libraries, fragmentation."""


@documented
@dataclass(frozen=True)
class Plan:
    """What a run needs and finds, on each rank, in bytes."""

    hidden_states: HiddenStates
    """Where they lie: on the device, in (pinned) host memory, or in a file beside the output."""
    block_bytes: int
    """Memory of the device that computes, beside the hidden states."""
    streams_bytes: int
    """Hidden states of this rank's windows: what enters a block and what it must reproduce; with `reconstruct` three
    more."""
    device_free: int
    """Free where it computes."""
    host_free: int
    """Free host memory."""
    disk_bytes: int
    """Shards, and the hidden states where they lie in a file."""
    disk_free: int
    """Free where the output lies."""
    n_blocks: int
    """Still to be pruned."""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"memory: {gib(self.block_bytes)} for a block, {gib(self.device_free)} are free where it computes",
                f"hidden states: {gib(self.streams_bytes)} per rank in {_PLACES[self.hidden_states]}; "
                f"{gib(self.host_free)} of host memory are free",
                f"disk: {gib(self.disk_bytes)} to write for {self.n_blocks} blocks, {gib(self.disk_free)} are free",
            ]
        )


_PLACES = {"device": "the memory where it computes", "host": "pinned host memory", "file": "a file beside the output"}


def bytes_for(
    block: nn.Module, method: Method, device: torch.device, windows: Tensor, reconstruct: Reconstruct | None = None
) -> int:
    """Memory of the device that computes while a block, or a span of blocks, is pruned.

    For each weight: its masked copy and its gradient, 2 bytes for its rank and 1 for its candidate; on a GPU the
    weight itself, which a CPU reads from the mapped file; quantized, some 24 bytes in float32. Hessians take a matrix
    of columns x columns in float32 for each projection's inputs, four more while one is factorized; reconstruction
    takes six more, and eight copies of the largest projection, and to train a block 20 bytes for each weight. Scores
    that BESA learns take another 20 bytes for each weight. What enters and leaves each projection is kept for one
    window, to learn from; of parts that are learned by themselves the inputs and outputs of all windows are there, too,
    and twice while they are gathered.

    Args:
        windows: this rank's.
    """
    weights = [projection.weight for projection in projections(block).values()]
    n_weights, itemsize = sum(weight.numel() for weight in weights), weights[0].element_size()
    per_weight = 2 * itemsize + 3 + itemsize * (device.type == "cuda") + 24 * (method.quantize is not None)
    per_weight += 20 * (reconstruct is not None and reconstruct.kind == "block")
    per_weight += 20 * method.learns_scores
    total = n_weights * per_weight + BESIDE
    total += windows.shape[1] * itemsize * sum(sum(weight.shape) for weight in weights)
    if reconstruct or method.needs_hessian:
        squares = [4 * weight.shape[1] ** 2 for weight in weights]
        total += sum(squares) + (6 if reconstruct else 4) * max(squares)
        total += 32 * max(weight.numel() for weight in weights) * (reconstruct is not None)
    if isinstance(getattr(method, "reconstruct", None), str):
        total += 2 * windows.numel() * itemsize * max(sum(weight.shape) for weight in weights)
    return total


def n_streams(reconstruct: Reconstruct | None) -> int:
    """How often the hidden states of all windows are held."""
    return 5 if reconstruct else 2


def make_plan(
    *,
    block_bytes: int,
    n_windows: int,
    window_bytes: int,
    shard_bytes: int,
    n_blocks: int,
    device: torch.device,
    output: Path,
    n_streams: int,
    wanted: HiddenStates | Literal["auto"],
) -> Plan:
    """Where the hidden states go, and whether everything fits.

    Args:
        n_windows: of this rank.
        window_bytes: of one window's hidden states.
        shard_bytes: still to be written.
        n_blocks: still to be pruned.
        n_streams: how often the hidden states of all windows are held.
        wanted: "auto" takes the first that fits of device, host and file.

    Raises:
        ValueError: something does not fit; says what is needed, what is free, and what to change.
    """
    pinned, streams = n_streams * _power_of_2(n_windows * window_bytes), n_streams * n_windows * window_bytes
    device_free, host_free, disk_free = free_device(device), free_host(), shutil.disk_usage(output).free
    room = {"device": USABLE * device_free / (neighbours() if device.type == "cpu" else 1) - block_bytes}
    if device.type == "cuda":
        room["host"] = USABLE * host_free / neighbours()
    elif wanted == "host":
        raise ValueError("hidden_states='host' is for GPUs, whose memory is another; take 'device', 'file' or 'auto'")
    room["file"] = (USABLE * disk_free - shard_bytes) / n_ranks()
    if room["file"] < 0:
        raise ValueError(
            f"the output does not fit: {gib(shard_bytes)} are still to be written and {gib(disk_free)} are free in "
            f"{output}, of which besa fills {USABLE:.0%}; make room or name another folder"
        )
    needed = {"host": pinned}
    places = [p for p, free in room.items() if wanted in ("auto", p) and needed.get(p, streams) <= free]
    if room["device"] < 0 or not places:
        found = ", ".join(f"{gib(max(0.0, free))} in {_PLACES[place]}" for place, free in room.items())
        raise ValueError(
            f"a block takes {gib(block_bytes)} of the {gib(device_free)} that are free on {device}, and the hidden "
            f"states of {n_windows} windows {gib(streams)}; there is room for {found} (hidden_states={wanted!r}). "
            "Take fewer or shorter windows, hidden_states='auto', more ranks or a larger machine"
        )
    on_disk = shard_bytes + streams * (places[0] == "file")
    return Plan(places[0], block_bytes, streams, device_free, host_free, on_disk, disk_free, n_blocks)


def _power_of_2(n: int) -> int:
    """What torch takes of pinned memory for n bytes."""
    return 1 << (n - 1).bit_length()


def gib(n: int | float) -> str:
    """A number of bytes as a person reads it: in GiB, below a quarter of one in MiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.0f} MiB"
