"""Several processes as one: torchrun starts them, each holds a share of the samples, sums are taken over all.

Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """For a while, one of the processes that torchrun started, if it did: gloo between CPUs, nccl between GPUs.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or _is_joined():
        yield
        return
    if torch.cuda.is_available():
        ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if ranks > gpus:
            raise ValueError(
                f"{ranks} ranks on a machine with {gpus} GPU(s); take --nproc-per-node {gpus}, or hide the GPUs "
                "(CUDA_VISIBLE_DEVICES=) and compute on CPUs"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not on an error: nccl would wait for ranks that wait for this one


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()  # some builds of torch have no more of it than that


def n_ranks() -> int:
    """How many processes there are.

    Raises:
        ValueError: torchrun started several, which do not know of each other.
    """
    if _is_joined():
        return dist.get_world_size()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes that are not joined; first "
            "torch.distributed.init_process_group('cpu:gloo,cuda:nccl'), or 'gloo' without GPUs"
        )
    return 1


def rank() -> int:
    """Which one this is, from 0; rank 0 writes."""
    return dist.get_rank() if _is_joined() else 0


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if n_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    return sum_(tensor).div_(n_ranks()) if n_ranks() > 1 else tensor


def from_rank_0(value: Any) -> Any:
    """Rank 0's value (anything that pickles) on every rank; waits for all."""
    if n_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    if n_ranks() == 1:
        return [value]
    values: list[Any] = [None] * n_ranks()
    dist.all_gather_object(values, value)
    return values


def check_share(n_samples: int, batch_size: int | None) -> None:
    """Refuse what cannot be shared out evenly.

    Args:
        batch_size: windows per step; None where there are no steps.

    Raises:
        ValueError: the ranks do not divide the windows, or those of a step, or steps do not divide the windows.
    """
    if batch_size and batch_size % n_ranks():
        raise ValueError(
            f"{n_ranks()} ranks cannot share the {batch_size} window(s) of a step; take a batch_size that is a "
            f"multiple of {n_ranks()}: a step then means that many windows, on however many ranks"
        )
    if n_samples % (batch_size or n_ranks()):
        whole = f"steps of {batch_size}" if batch_size else f"shares for {n_ranks()} ranks"
        raise ValueError(f"{n_samples} windows do not divide into {whole}; take n_samples a multiple of it")
