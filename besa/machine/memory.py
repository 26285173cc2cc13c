"""Memory that can be had, on the host and on a GPU, and what a piece of work takes of it and of time."""

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

USABLE = 0.9
"""Of what is free: the rest is for what nobody counted."""


def free_device(device: torch.device) -> int:
    """Free memory of the device that computes, in bytes; what torch keeps there for later counts as free."""
    if device.type != "cuda":
        return free_host()
    gc.collect()  # a model spread by accelerate refers to itself
    torch.cuda.empty_cache()
    torch.accelerator.empty_host_cache()  # pinned memory, of which `free_host` is asked next
    return torch.cuda.mem_get_info(device)[0]


def free_host() -> int:
    """Host memory that can be had, in bytes, within the limits of the control groups around this process."""
    free = psutil.virtual_memory().available
    for group in _control_groups():
        for most, current, before in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
            path = group / f"memory.{most}"
            limit = path.read_text().strip() if path.is_file() else "max"
            if limit != "max":
                used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # files that were read: dropped at need
                cached = int(used[f"{before}inactive_file"]) + int(used[f"{before}active_file"])
                free = min(free, int(limit) - int((group / f"memory.{current}").read_text()) + cached)
    return free


def neighbours() -> int:
    """Processes of the same run that share this host's memory, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _control_groups() -> list[Path]:
    """This process's and those around it, of version 2 and of version 1; any may have a limit."""
    own, groups = Path("/proc/self/cgroup"), []
    named = dict(line.split(":", 2)[1:] for line in own.read_text().splitlines()) if own.is_file() else {}
    for controller in ("", "memory"):
        top = Path("/sys/fs/cgroup", controller)
        innermost = top / named.get(controller, "").lstrip("/")
        groups += [group for group in (innermost, *innermost.parents) if group == top or top in group.parents]
    return groups


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0
    """Highest resident memory of the process, or on a GPU highest allocation there; of `watch_anonymous`, anonymous."""


@contextlib.contextmanager
def measure(device: torch.device | None = None) -> Iterator[Cost]:
    """Time a piece of work and take its peak memory, on the device that computes; None is the CPU.

    Within another `measure`, it resets that one's `peak_bytes`.
    """
    cost, on_gpu = Cost(), device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    _reset_peak_resident()
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_resident()


def give_back() -> None:
    """Ask for what earlier work freed, which glibc keeps; others have no such function, Windows no such library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_resident() -> None:
    give_back()
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is the whole process's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    if peak := _status("VmHWM"):
        return peak
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def watch_anonymous() -> Iterator[Cost]:
    """Take the peak of the process's anonymous memory: on the host, and not backed by a file (Linux only, else 0).

    It looks every 20 ms: unlike for resident memory, the kernel keeps no peak.
    """
    cost, done = Cost(peak_bytes=_status("RssAnon")), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            cost.peak_bytes = max(cost.peak_bytes, _status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        done.set()
        watcher.join()


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is none: not Linux, or a sandbox that says less."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def prefer_large_pages(tensor: Tensor) -> None:
    """Ask Linux to hold a tensor in pages of 2 MB: what streams through it waits less for page tables.

    Worth a third of the speed of a packed product where transparent huge pages are "madvise"; nothing happens
    elsewhere, for small tensors, and where the kernel refuses.
    """
    page = 2**21
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if sys.platform == "linux" and tensor.device.type == "cpu" and size > 0:
        madvise = ctypes.CDLL(None).madvise
        for advice in (14, 25):  # MADV_HUGEPAGE: from now on; MADV_COLLAPSE (Linux 6.1): what is there already
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
