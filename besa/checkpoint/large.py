"""Models that do not fit in memory as a whole: what a loop over methods asks before it starts, and for every row."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from besa.checkpoint.format import find_checkpoint, precision_of
from besa.checkpoint.plan import bytes_for, gib, n_streams
from besa.checkpoint.run import check_measures_blocks, prune_checkpoint
from besa.decoder import Span, check_model, find_blocks
from besa.inputs.models import load_shapes, weight_bytes
from besa.machine.device import resolve_dtype
from besa.machine.memory import USABLE, free_device
from besa.prune import Method, check_fit
from besa.reconstruct import Reconstruct
from besa.report import Report


def prune_if_large(
    name: str,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method | None,
    work: Path,
    dtype: torch.dtype,
    device: torch.device,
    reconstruct: Reconstruct | None = None,
) -> tuple[str, Report | None]:
    """Prune a model that is too large for the memory, from checkpoint to checkpoint; leave every other one alone.

    Args:
        name: any that `load_model` takes.
        method: None is the dense model, which is never touched.
        work: folder for the pruned checkpoint; one in which an earlier call was interrupted is continued.
        dtype: what the model is to compute in, from `precision_that_fits`.
        reconstruct: give the kept weights new values, as `prune` does.

    Returns:
        What to load, and what pruning did: (work, report), or (name, None) where the model can be pruned in memory.

    Raises:
        ValueError: the model is too large, and stored in another precision than `dtype`.
    """
    if method is None:
        return name, None
    if not work.exists():
        needed = _bytes_needed(load_shapes(name), windows, dtype, device, method, reconstruct)
        if needed <= _room(device):
            return name, None
    _check_stored(name, precision_of(find_checkpoint(name)), dtype, device)
    return str(work), prune_checkpoint(name, work, windows, method, device=str(device), reconstruct=reconstruct)


def precision_that_fits(
    name: str,
    windows: Int64[Tensor, "n_samples seq_len"],
    methods: Iterable[Method | None],
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    reconstruct: Reconstruct | None = None,
) -> torch.dtype:
    """Refuse what `prune` and `prune_if_large` could not finish, before any weight is read.

    Args:
        methods: None stands for the dense model.
        folder: where pruned checkpoints would lie, in folders of their own.
        dtype: None takes what the device computes in, or what the model is stored in if it is too large for memory.
        reconstruct: what gives kept weights new values; of several, the one that takes most memory.

    Returns:
        The precision to compute in.

    Raises:
        ValueError: the model cannot be pruned, or a method does not fit it; or the model is too large for memory, and a
            method must see it whole, it is stored in another precision than the one that was named, or pruned has no
            room on the disk.
    """
    shapes, pruning = load_shapes(name), [method for method in methods if method]
    precision = dtype or resolve_dtype(None, device)
    if pruning:
        check_model(shapes, values=False)
    for method in pruning:
        check_fit(shapes, windows, method, None)
    needed = [_bytes_needed(shapes, windows, precision, device, method, reconstruct) for method in pruning]
    if max(needed, default=0) > _room(device):
        stored = shapes.config.dtype or precision_of(find_checkpoint(name))
        precision = dtype or stored
        for method in pruning:
            check_measures_blocks(method)
        _check_stored(name, stored, precision, device)
        _check_disk(name, weight_bytes(shapes, precision), folder, device)
    return precision


def _room(device: torch.device) -> float:
    """Bytes that a model may take which is pruned as a whole."""
    return USABLE * free_device(device)


def _bytes_needed(
    shapes: PreTrainedModel,
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    method: Method,
    reconstruct: Reconstruct | None,
) -> int:
    """To prune a model as a whole: its weights, the hidden states of all windows, and what a block takes meanwhile."""
    hidden_states = windows.numel() * shapes.config.get_text_config().hidden_size * dtype.itemsize
    block = Span(find_blocks(shapes)[: method.span]).to(dtype)
    working = bytes_for(block, method, device, windows, reconstruct)
    return weight_bytes(shapes, dtype) + n_streams(reconstruct) * hidden_states + working


def _check_stored(name: str, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """A model too large for memory is pruned in the precision that it is stored in."""
    if stored != dtype:
        raise ValueError(
            f"{name} is stored in {stored} and too large to be converted to {dtype} in the memory of {device}; give "
            f"dtype={str(stored).removeprefix('torch.')}, or take a larger machine"
        )


def _check_disk(name: str, needed: int, folder: Path, device: torch.device) -> None:
    free = shutil.disk_usage(folder).free
    free += sum(path.stat().st_size for path in folder.glob(".*/*.safetensors"))  # of interrupted rows
    if needed > USABLE * free:
        raise ValueError(
            f"{name} is too large for the memory of {device}; pruned it takes {gib(needed)} of disk, and "
            f"{gib(free)} are free in {folder}; name another results folder"
        )
