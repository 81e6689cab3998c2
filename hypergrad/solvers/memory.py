"""How much memory a device has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, or None where nobody says.

    On a GPU also what PyTorch's allocator holds unused.  On Linux what the kernel counts as
    available, or what is left to the container if that is less; on other systems with POSIX
    ``sysconf`` the physical memory, of which some will be in use.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(cached)
    if device.type != "cpu":
        return None
    known = [size for size in (_available(), _left_to_container()) if size is not None]
    return min(known) if known else _physical()


def _available() -> int | None:
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _left_to_container() -> int | None:
    """What a control group (version 2) allows beyond what it uses and cannot give up."""
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        used = int((_CGROUP / "memory.current").read_text("ascii"))
        statistics = (_CGROUP / "memory.stat").read_text("ascii").split()
    except OSError:  # no such group, or none that this process may look at
        return None
    if limit == "max":
        return None
    numbers = dict(zip(statistics[::2], statistics[1::2], strict=True))
    return max(int(limit) - used + int(numbers.get("inactive_file", 0)), 0)


def _physical() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
