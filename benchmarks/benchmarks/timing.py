"""Ratios of times that other work on the machine does not move."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def single_threaded() -> None:
    """One thread, so that a figure does not depend on how many cores are idle."""
    torch.set_num_threads(1)


#: Processor time of this process: on one thread the time of the work alone, without the waits
#: that other processes cause.
clock = time.process_time


def seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def ratio(work: Callable[[], object], yardstick: Callable[[], object], repeats: int) -> float:
    """Time of ``work`` in units of ``yardstick``: minima of ``repeats`` interleaved runs.

    What other processes do to caches and clocks only ever adds time, so the minimum is the
    estimate least moved by them; and taking turns keeps a slow minute of the machine from
    falling on one of the two alone.
    """
    work()  # the first call of a PyTorch function allocates and dispatches for all later ones
    yardstick()
    pairs = [(seconds(work), seconds(yardstick)) for _ in range(repeats)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)
