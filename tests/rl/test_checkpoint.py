"""Checkpoints: what they hold, and what is noticed of damaged and foreign ones."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hypergrad_rl import CheckpointError, RunDirectoryError
from hypergrad_rl.checkpoint import load_checkpoint, save_checkpoint
from tests.rl.small import leaves


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"update": 1, "x": torch.arange(3)})

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        match call:
            case "write":
                patch.setattr(Path, "open", full)
            case "fsync":
                patch.setattr(os, "fsync", full)
            case "replace":
                patch.setattr(Path, "replace", full)
        with pytest.raises(RunDirectoryError, match=r"cannot write .*: No space left on device"):
            save_checkpoint(path, {"update": 2, "x": torch.arange(3)})
    assert load_checkpoint(path)["update"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


STATE: dict[str, Any] = {
    "update": 3,
    "seconds": 0.1 + 0.2,
    "nothing": None,
    "empty": {},
    "agent": {
        "b": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "a": torch.tensor(2, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 3, dtype=torch.float64),
        "big": 2**127 + 1,
        "list": [float("nan"), float("inf"), "text", [1, 2]],
    },
}


def test_checkpoints_round_trip_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    view = torch.arange(4.0)
    save_checkpoint(path, {**STATE, "views": {"whole": view, "part": view[1:3]}})
    state = load_checkpoint(path)
    assert list(state) == [*STATE, "views"]
    assert list(state["agent"]) == list(STATE["agent"])  # also the order
    for name, value in STATE["agent"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state["agent"].pop(name), value, rtol=0, atol=0)
        else:
            np.testing.assert_equal(state["agent"][name], value)
    assert state["views"]["part"].tolist() == [1.0, 2.0]
    assert state["seconds"] == 0.1 + 0.2


def test_any_changed_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    places = np.linspace(0, len(whole) - 1, 60).astype(int)
    for place in places:
        path.write_bytes(whole[:place])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            continue
        np.testing.assert_equal(leaves(state), leaves(STATE))  # a byte that pads the header


def test_foreign_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        load_checkpoint(path)
    safetensors.torch.save_file({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="without a format"):
        load_checkpoint(path)
    safetensors.torch.save_file({}, path, {"format": "hypergrad_rl checkpoint 99"})
    with pytest.raises(CheckpointError, match=r"checkpoint 99.*written by another version"):
        load_checkpoint(path)
