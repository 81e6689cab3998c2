"""Checkpoints: written atomically, read without executing anything.

One safetensors file: tensors flat by path ("agent/actor/weight0"), everything else as JSON in the
metadata, with the format's version and a checksum (safetensors itself checks lengths only).
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hypergrad_rl.errors import CheckpointError, RunDirectoryError

FORMAT = "hypergrad_rl checkpoint 3"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: at any moment, a power cut included, it is old or new, whole.

    Raises:
        RunDirectoryError: it cannot be written (a full disk); then ``path`` is as it was.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the new name is safe once its directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):  # what matters is why it could not be written
            temporary.unlink(missing_ok=True)
        raise RunDirectoryError(f"cannot write {path}: {error.strerror or error}") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` atomically: nested dicts of tensors and of what JSON can hold.

    Raises:
        RunDirectoryError: it cannot be written; the previous checkpoint is as it was.
    """
    tensors: dict[str, Tensor] = {}

    def split(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for key, value in node.items():
            if isinstance(value, Tensor):  # copies: some are views of one another
                tensors[prefix + key] = value.detach().clone().contiguous()
                value = None  # keeps the place of the key
            elif isinstance(value, dict):
                value = split(value, f"{prefix}{key}/")
            rest[key] = value
        return rest

    text = json.dumps(split(state, ""))
    metadata = {"format": FORMAT, "state": text, "checksum": _checksum(text, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path``.

    Raises:
        CheckpointError: no file, or not a whole checkpoint of this version of the format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a run directory made by train")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or foreign ({error}); expected a {FORMAT!r}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a {FORMAT!r} but {metadata.get('format', 'without a format')!r}; was "
            "it written by another version?"
        )
    if metadata.get("checksum") != _checksum(metadata.get("state", ""), tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not agree with its content")
    state: dict[str, Any] = json.loads(metadata["state"])
    for name, tensor in tensors.items():
        *parents, key = name.split("/")
        node = state
        for parent in parents:
            node = node[parent]
        node[key] = tensor
    return state


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data.data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
