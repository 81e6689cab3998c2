"""How much memory a device has left, and a refusal of what does not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import OperatorTooLargeError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, or None where nobody says.

    On a GPU also what PyTorch's allocator holds unused.  On Linux what the kernel counts as
    available, or what is left to the container if that is less; on other systems with POSIX
    ``sysconf`` the physical memory, of which some will be in use.
    """
    if device.type != "cpu":
        return _left_to_accelerator(device)
    known = [size for size in (_available(), _left_to_container()) if size is not None]
    return min(known) if known else _physical()


def _left_to_accelerator(device: torch.device) -> int | None:
    if device.type == "mps":
        left = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return max(left, 0)
    module: Any = getattr(torch, device.type, None)  # torch.cuda, torch.xpu
    if not hasattr(module, "mem_get_info"):
        return None
    try:
        free, _ = module.mem_get_info(device)
    except RuntimeError:  # some devices of Intel's do not say
        return None
    return int(free) + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def refuse_if_too_large(
    what: str, needed: int, max_bytes: int, device: torch.device, *, instead: str, solver: str
) -> None:
    """Raise before ``needed`` bytes are asked for that are not allowed or not there.

    Args:
        what: what needs them, the subject of the message.
        needed: bytes.
        max_bytes: the solver's own limit.
        device: where they would be.
        instead: what to do instead, the end of "Use ...".
        solver: its name, for how to allow more.

    Raises:
        OperatorTooLargeError: it does not fit.
    """
    limits = [(max_bytes, "of max_bytes", f"allow it with {solver}(max_bytes={needed})")]
    if (free := free_bytes(device)) is not None:
        limits.append((free, f"that {device} has free", "free memory"))
    for limit, where, remedy in limits:
        if needed > limit:
            raise OperatorTooLargeError(
                f"{what} needs {_gib(needed)} GiB, more than the {_gib(limit)} GiB "
                f"{where}. Use {instead}, or {remedy}."
            )


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.2g}"


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
