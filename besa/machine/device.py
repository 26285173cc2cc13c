"""The device that computes and the precision it computes in, by name; results that repeat to the bit."""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bfloat16 natively; elsewhere that is many times slower than float32.

    True also of a Xeon with AVX-512's bfloat16 and no AMX, where it runs at half of float32's rate: for long runs there
    ask for float32, unless they continue rows in bfloat16.
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
        if device == "cpu" and _has_idle_gpu():
            _tell_that_a_gpu_is_idle()
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


def _has_idle_gpu() -> bool:
    """Whether Linux shows an NVIDIA GPU that its user has not hidden."""
    shown = re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    return bool(shown) and any(Path("/dev").glob("nvidia[0-9]*"))


@functools.cache
def _tell_that_a_gpu_is_idle() -> None:
    why = "the driver is too old (CUDA 13 wants 580 or later), or out of order"
    if torch.version.cuda is None:
        why = "this torch is built for CPUs; install one for CUDA"
    warnings.warn(
        f"there is an NVIDIA GPU that torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use, so that the "
        f"CPU computes: {why}. device='cpu' asks for it without this warning",
        stacklevel=3,
    )


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
        raise ValueError(f"dtype {name!r} is not one of bfloat16, float16, float32; leave it out for what is fast here")
    return getattr(torch, name)


def way_out(dtype: torch.dtype) -> str:
    """What to do where a model of a precision makes numbers that are not finite."""
    look = "look for NaN and huge values in its weights"
    return f"{look}: it is in {dtype} already" if dtype.itemsize > 2 else f"try dtype float32, or {look}"


def advance(schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """The next learning rate, without torch's warning where float16 has skipped the optimizer's first step."""
    is_first = schedule.last_epoch == 0
    with warnings.catch_warnings(action="ignore") if is_first else contextlib.nullcontext():
        schedule.step()


@contextlib.contextmanager
def unaltered(device: torch.device) -> Iterator[None]:
    """For a while, what is computed on a device does not depend on what its caller set or ran before.

    A number without a type is float32 and without a place on the CPU, no product is in another precision than its
    operands (autocast, TF32), and on a GPU sums are in the same order every time, as on a CPU they always are.

    Raises:
        ValueError: as `check_repeats`.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for products in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            if (before := products.fp32_precision) not in ("none", "ieee"):
                stack.callback(setattr, products, "fp32_precision", before)
                products.fp32_precision = "ieee"
        if device.type == "cuda":
            check_repeats(device)
            stack.enter_context(deterministic(True))
        yield


def check_repeats(device: torch.device) -> None:
    """Refuse what torch would refuse at the first product: it looks once a process at how cuBLAS was started.

    Raises:
        ValueError: cuBLAS was started without what it needs to give the same sums every time.
    """
    try:
        with deterministic(True):
            torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise ValueError(
            f"products on {device} would not repeat, for cuBLAS was started otherwise (CUBLAS_WORKSPACE_CONFIG="
            f"{os.environ.get('CUBLAS_WORKSPACE_CONFIG')!r}); start again, and import besa before anything is computed "
            "on the GPU, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 before"
        ) from error


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
