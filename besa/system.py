"""Device, precision, determinism, processes under torchrun, cost."""

import contextlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor


def resolve_device(device: torch.device | str) -> torch.device:
    """A device with its number; "auto" is the GPU if there is one, else the CPU. torchrun gives each process a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} cannot be used with torch {torch.__version__} here; take 'cpu'")
    if wanted.index is None:
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    torch.cuda.set_device(wanted)
    return wanted


def where_it_fits(stream: Tensor, device: torch.device, n_streams: int) -> torch.device:
    """The device of a block if so many streams of hidden states take at most a quarter of its free memory, else CPU."""
    if device.type == "cuda" and n_streams * stream.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return torch.device("cpu")
    return device


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """A precision by name; None is bfloat16 if the device is fast in it, else float16 (GPU) or float32 (CPU)."""
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype {name!r} is not one of bfloat16, float16, float32")
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    units = torch.cpu.get_capabilities()
    arm = units.get("bf16") and sys.platform != "darwin"  # torch does not use Apple's instructions
    return torch.bfloat16 if arm or units.get("avx512_bf16") or units.get("amx_bf16") else torch.float32


def set_precision(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters, not the buffers: rotary frequencies stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def require(package: str, extra: str) -> None:
    """Name the extra that brings a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"this needs {package}: pip install 'besa-pruning[{extra}]'")


def finite_hint(dtype: torch.dtype) -> str:
    """Advice for a model that yields numbers that are not finite."""
    look = "look for NaN and huge values in the weights"
    return look if dtype.itemsize > 2 else f"try dtype float32, or {look}"


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Compute on a device independently of global settings: default dtype and device, autocast, TF32, kernel choice.

    These settings belong to the process: compute in one thread at a time.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # pyright: ignore
            before = backend.fp32_precision
            if before not in ("none", "ieee"):
                stack.callback(setattr, backend, "fp32_precision", before)
                backend.fp32_precision = "ieee"
        if device.type == "cuda":
            stack.enter_context(deterministic(True))
        yield


@contextlib.contextmanager
def deterministic(wanted: bool, warn_only: bool = False) -> Iterator[None]:
    """Use only deterministic algorithms of torch, or allow the others."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    torch.use_deterministic_algorithms(wanted, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started (gloo on CPUs, nccl on GPUs); a single process needs nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: nccl would wait for ranks that wait for this one


def n_ranks() -> int:
    """Number of processes that share the calibration windows."""
    if dist.is_initialized():
        return dist.get_world_size()
    if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ["WORLD_SIZE"] != "1":
        raise ValueError("torchrun started several processes; join them first: `with besa.system.joined():`")
    return 1


def rank() -> int:
    """Number of this process; rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if n_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    return sum_over_ranks(tensor).div_(n_ranks()) if n_ranks() > 1 else tensor


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank; waits for all."""
    box = [value]
    if n_ranks() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0  # highest allocation on the GPU, or highest resident memory of the process


@contextlib.contextmanager
def measure(device: torch.device | None = None) -> Iterator[Cost]:
    """Measure seconds and peak memory; a `measure` within another restarts the outer peak."""
    cost = Cost()
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_resident()


def _peak_resident() -> int:
    status = Path("/proc/self/status")  # Linux only
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else psutil.Process().memory_info().rss
