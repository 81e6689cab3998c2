"""Checkpoints: written atomically, read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from hypergrad_rl.errors import CheckpointError

FORMAT = "hypergrad_rl checkpoint 2"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) atomically.

    To a temporary file, synced, then renamed: ``path`` always holds a whole checkpoint.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path``.

    Raises:
        CheckpointError: no file, or not a checkpoint of this package.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a run directory made by train")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; the cause is kept
        raise CheckpointError(f"{path} is damaged or foreign ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT!r}; was it written by another version?")
    return state
