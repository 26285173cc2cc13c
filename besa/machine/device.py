"""The device that computes and the precision it computes in, by name; results that repeat to the bit."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bfloat16 natively; elsewhere that is many times slower than float32.

    A Xeon whose AMX the host hides has instructions for it, too, at half of float32's rate: what is computed there for
    long had better be in float32, unless it continues rows in bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu.get_capabilities()
    arm = ("bf16",) if sys.platform != "darwin" else ()  # Apple's have instructions that torch does not use
    return any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16", *arm))


def resolve_device(device: str) -> torch.device:
    """A device by name; "auto" takes the GPU where there is one, under torchrun each process its own.

    Raises:
        ValueError: it cannot be used here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        place = torch.empty(0, device=device).device  # with its number, for threads that start with another one
        if place.type not in ("cpu", "cuda"):
            raise RuntimeError("besa computes on processors and on CUDA's or ROCm's GPUs")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here ({error}); take 'auto', 'cpu' or 'cuda'") from error
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """A precision by name; None takes bfloat16 where the device computes in it, else float16 (GPU) or float32 (CPU).

    Raises:
        ValueError: not one of bfloat16, float16, float32.
    """
    if dtype is None:
        other = torch.float16 if device.type == "cuda" else torch.float32  # a CPU is slow in float16
        return torch.bfloat16 if computes_bfloat16(device) else other
    name = str(dtype).removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype {name!r} is not one of bfloat16, float16, float32")
    return getattr(torch, name)


def way_out(dtype: torch.dtype) -> str:
    """What to do where a model of a precision makes numbers that are not finite."""
    look = "look for NaN and huge values in its weights"
    return f"{look}: it is in {dtype} already" if dtype.itemsize > 2 else f"try dtype float32, or {look}"


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """For a while, torch's algorithms that give the same bits every time, or those that may not.

    Warnings alone (`warn_only`) would leave attention on a GPU a backward pass that sums in any order. An algorithm
    that no GPU has in that kind is then an error of torch's, which names it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
