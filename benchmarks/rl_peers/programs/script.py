"""A program of one file, CleanRL's or LeanRL's, run as it is with its own flags.

python -m benchmarks.rl_peers.programs.script FILE MARKED_BY STEPS_AN_UPDATE [FLAGS]

Its trackers (TensorBoard, Weights & Biases) are stand-ins that keep nothing. Times are marked where
it reports its speed to TensorBoard after an update (``tensorboard``), or where its progress bar
moves on to the next one (``tqdm``).
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium  # noqa: F401  # before the clock starts, as the others
import torch
import tqdm
import tyro  # noqa: F401

from benchmarks.rl_peers.marks import Marks


def ignore(*_: Any, **__: Any) -> None:
    """What a tracker is told."""


def stand_ins(marks: Marks, marked_by: str, update: int) -> dict[str, types.ModuleType]:
    """The trackers, one of which marks the updates."""

    class SummaryWriter:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def add_scalar(self, name: str, value: Any, step: int) -> None:
            if marked_by == "tensorboard" and name == "charts/SPS":
                marks.at(step)

        add_text = close = ignore

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, iterable: Iterable[Any], *args: Any, **settings: Any) -> None:
            super().__init__(iterable, *args, **settings)

        def __iter__(self) -> Iterator[Any]:
            for done, item in enumerate(super().__iter__()):
                if done:
                    marks.at(done * update)
                yield item
            marks.at(int(self.n) * update)

    tensorboard: Any = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    wandb: Any = types.ModuleType("wandb")
    wandb.init = wandb.log = ignore
    if marked_by == "tqdm":
        tqdm.tqdm = Bar  # type: ignore[misc, assignment]
    return {"torch.utils.tensorboard": tensorboard, "wandb": wandb}


def main(file: str, marked_by: str, update: str, *flags: str) -> None:
    torch.set_num_threads(1)
    marks = Marks()
    sys.modules |= stand_ins(marks, marked_by, int(update))
    sys.argv = [file, *flags]
    runpy.run_path(file, run_name="__main__")
    marks.report("torch", "gymnasium")


if __name__ == "__main__":
    main(*sys.argv[1:])
