"""What a device can do, how long work takes on it, and how often the host waits for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..benchmarks.timing import seconds

CPU = torch.device("cpu")
#: As PyTorch's debug mode for synchronisations says it.
SYNC = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Rates:
    """What the device does in a second, measured: floating-point operations, bytes moved."""

    flops: float
    bytes: float


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is timed on the CPU, by processor time; references may use all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def least_seconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The least of some runs after two to warm up, by CUDA events or by processor time."""
    run()
    run()
    least, spent = math.inf, 0.0
    for _ in range(repeats):
        took = _event_seconds(run) if device.type == "cuda" else seconds(run)
        least, spent = min(least, took), spent + took
        if spent > 2.0:
            break
    return least


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def measured_rates(device: torch.device) -> Rates:
    """Of a large float32 matrix product, and of a large copy (which reads and writes)."""
    dim, entries = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b = torch.randn(2, dim, dim, device=device)
    product = least_seconds(partial(torch.mm, a, b), device, repeats=10)
    source = torch.ones(entries, device=device)
    copy = least_seconds(partial(torch.empty_like(source).copy_, source), device, repeats=10)
    return Rates(2 * dim**3 / product, 2 * 4 * entries / copy)


class _Looks(TorchFunctionMode):
    """Counts the calls that read a value: on a CUDA device the host would wait for each."""

    names = frozenset(
        {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu",
         "nonzero", "equal", "allclose"}
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


def host_syncs(run: Callable[[], object], device: torch.device) -> int:
    """How often the host waits: as PyTorch's debug mode reports it; on the CPU, reads of values."""
    if device.type != "cuda":
        looks = _Looks()
        with looks:
            run()
        return looks.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in caught)
