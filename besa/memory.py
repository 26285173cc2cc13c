"""Memory that can be had, on the host and on a GPU."""

import gc
import os
from pathlib import Path

import psutil
import torch

USABLE = 0.9
"""Of what is free: the rest is for what nobody counted."""


def free_device(device: torch.device) -> int:
    """Free memory of the device that computes, in bytes; what torch keeps there for later counts as free."""
    if device.type != "cuda":
        return free_host()
    gc.collect()  # a model spread by accelerate refers to itself
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def total_device(device: torch.device) -> int:
    """All memory of the device that computes, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def free_host() -> int:
    """Host memory that can be had, in bytes, within the limits of the control groups around this process."""
    free = psutil.virtual_memory().available
    for group in _control_groups():
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
        if limit != "max":
            used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(used["inactive_file"]) + int(used["active_file"])  # files that were read: dropped at need
            free = min(free, int(limit) - int((group / "memory.current").read_text()) + cached)
    return free


def neighbours() -> int:
    """Processes of the same run that share this host's memory, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _control_groups() -> list[Path]:
    """This process's (version 2) and those around it, any of which may have a limit."""
    own, top = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    names = [line.split("::/", 1)[1] for line in own.read_text().split("\n") if "::/" in line] if own.is_file() else []
    innermost = top / names[0] if names else top
    return [group for group in (innermost, *innermost.parents) if group == top or top in group.parents]
