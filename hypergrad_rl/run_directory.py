"""The directory of a run: held by one process at a time, and what is written into it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hypergrad_rl.checkpoint import load_checkpoint, write_atomically
from hypergrad_rl.config import BLPOConfig, PPOConfig, make_config
from hypergrad_rl.errors import (
    CheckpointError,
    ConfigError,
    HypergradRLError,
    RunDirectoryError,
)
from hypergrad_rl.networks import Networks

Config = PPOConfig | BLPOConfig
CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.csv", "checkpoint.safetensors"
INFO, LOCK = "run_info.json", ".lock"


def load_config(run_dir: str | Path) -> Config:
    """The configuration of a run.

    Raises:
        RunDirectoryError: ``run_dir`` holds no run, or its config.json is damaged.
        ConfigError: config.json has a hyper-parameter that this version does not know.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise RunDirectoryError(f"{run_dir} holds no run: {path} is missing")
    try:
        settings = json.loads(path.read_text())
        return make_config(settings.pop("algo"), **settings)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged or no run's: expected the settings of a run "
            f"({type(error).__name__}: {error})"
        ) from error


def settings_of(config: Config) -> dict[str, Any]:
    """The algorithm and every hyper-parameter, as JSON has them: lists for tuples."""
    settings = {"algo": config.algo, **dataclasses.asdict(config)}
    return {**settings, "hidden": list(config.hidden)}


def difference(run_dir: Path, config: Config) -> str:
    """The first setting in which the run in ``run_dir`` is not one of this configuration, or "".

    Raises:
        RunDirectoryError, ConfigError: see :func:`load_config`.
    """
    own = {"algo": config.algo, **dataclasses.asdict(config)}
    saved = load_config(run_dir)
    for name, value in {"algo": saved.algo, **dataclasses.asdict(saved)}.items():
        if value != own.get(name):
            return (
                f"{run_dir} was trained with {name}={value!r}, and the configuration has "
                f"{own.get(name)!r}"
            )
    return ""


def check_config(run_dir: Path, config: Config) -> None:
    """Raise RunDirectoryError unless ``run_dir`` holds a run, and one of this configuration."""
    if different := difference(run_dir, config):
        raise RunDirectoryError(
            f"{different}: continue it with load_config({str(run_dir)!r}), or choose another "
            "directory"
        )


def load_info(run_dir: Path) -> dict[str, Any]:
    """How a run is run beside its hyper-parameters, and under "ended" why it ended, or None."""
    path = run_dir / INFO
    try:
        return dict(json.loads(path.read_text()) if path.exists() else {})
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from error


def has_ended(run_dir: Path) -> bool:
    """Whether a run is there, and finished."""
    return (run_dir / CONFIG).exists() and load_info(run_dir).get("ended") is not None


def check_networks(run_dir: Path, networks: Networks, parts: Sequence[str]) -> None:
    """Raise RunDirectoryError unless ``networks`` has those of ``parts`` that the run has."""
    own = load_info(run_dir).get("own_networks", [])
    for part in parts:
        if (part in own) != (part in networks.own):
            kind = ("the default network", "a network of one's own")
            raise RunDirectoryError(
                f"{run_dir} was trained with {kind[part in own]} as {part}, and networks= has "
                f"{kind[part in networks.own]}: give, from Python, the networks= that train was "
                "called with"
            )


def check_environment(run_dir: Path, env_fn: object) -> None:
    """Raise RunDirectoryError for a run on environments of one's own without their function."""
    if env_fn is None and load_info(run_dir).get("own_environment", False):
        raise RunDirectoryError(
            f"{run_dir} was trained on environments of one's own, which its config.json only "
            "names: give, from Python, the env_fn= that train was called with"
        )


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make and hold a directory: the operating system lets go of it however the process ends.

    Raises:
        RunDirectoryError: another run has it, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(directory / LOCK, timeout=0))
        except Timeout as error:
            raise RunDirectoryError(
                f"{directory} is in use by a run that is still going; choose another --run-dir"
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write into {directory} ({error.strerror or error}); choose another "
                "--run-dir"
            ) from error
        yield


def begin(directory: Path, config: Config, info: dict[str, Any]) -> None:
    """Write config.json and run_info.json of a new run into a directory that is held.

    Raises:
        RunDirectoryError: the directory already holds a run.
    """
    if (directory / CONFIG).exists():
        raise RunDirectoryError(
            f"{directory} already holds a run, which is left as it is; choose another --run-dir, "
            f"or continue it with `resume {directory}`"
        )
    write_info(directory, info)
    write_atomically(directory / CONFIG, json.dumps(settings_of(config), indent=2).encode())


def write_info(directory: Path, info: dict[str, Any]) -> None:
    """Replace run_info.json."""
    write_atomically(directory / INFO, json.dumps(info, indent=2).encode())


def last_state(directory: Path, config: Config) -> dict[str, Any] | None:
    """The checkpoint of a run; None for a run that was killed before its first one.

    Raises:
        CheckpointError: it cannot be used, or is that of a run with other settings.
    """
    # A checkpoint of another format is not taken for none: its run is not begun anew.
    if not (directory / CHECKPOINT).exists() and not (directory / "checkpoint.pt").exists():
        return None
    state = load_checkpoint(directory / CHECKPOINT)
    # Parameters of the right shapes do not tell: of other environments or another seed, the
    # states would be taken for those of this run.
    own = settings_of(config)
    saved = state.get("settings", own)  # those of before have none
    for name in dict.fromkeys([*saved, *own]):
        if saved.get(name) != own.get(name):
            raise CheckpointError(
                f"{directory / CHECKPOINT} is of another run: its {name} is {saved.get(name)!r}, "
                f"that of {CONFIG} {own.get(name)!r}; expected the {CONFIG} and the checkpoint of "
                "one run"
            )
    return state


class RunLog:
    """metrics.csv, flushed row by row, and the events of TensorBoard and Weights & Biases.

    Rows after the ``first`` ones are those of updates that the checkpoint does not have: they are
    dropped, since the updates are done again.
    """

    def __init__(
        self, directory: Path | None, config: Config, first: int, tensorboard: bool, wandb: Any
    ) -> None:
        self.file: FileIO | None = None
        self.writer: Any = None
        self.wandb: Any = None
        self.opened = contextlib.ExitStack()
        if directory is None:
            return
        self.path = directory / METRICS
        self._keep_rows(first)
        with self._writing(), contextlib.ExitStack() as opened:
            # Unbuffered: what a full disk refused is not tried again when the file is closed.
            self.file = opened.enter_context(self.path.open("ab", buffering=0))
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # seconds to import

                # Its thread hands an error over to the next call, and prints a traceback besides.
                self.hook, threading.excepthook = threading.excepthook, self._quiet
                opened.callback(setattr, threading, "excepthook", self.hook)
                steps = first * config.num_envs * config.num_steps
                self.writer = SummaryWriter(str(directory), purge_step=steps + 1 if first else None)
                opened.callback(self.writer.close)
            if wandb:
                settings = dataclasses.asdict(config)
                self.wandb = begin_wandb(directory, {**wandb, "config": settings})
                opened.callback(self.wandb.finish)
            self.opened = opened.pop_all()

    def _keep_rows(self, first: int) -> None:
        rows = self.path.read_bytes() if first and self.path.exists() else b""
        kept = rows.splitlines(True)[: first + 1]
        if first and (len(kept) <= first or not kept[-1].endswith(b"\n")):
            raise RunDirectoryError(
                f"{self.path} has fewer than the {first} rows of the checkpoint: they are lost"
            )
        write_atomically(self.path, b"".join(kept))
        self.write_header = not first

    def write(self, row: dict[str, float]) -> None:
        """Add the metrics of one update.

        Raises:
            RunDirectoryError: they cannot be written.
        """
        if self.file is None:
            return
        # Counts as they are: eight digits do not hold them for ever.
        cells = [
            "" if np.isnan(v) else f"{v:d}" if isinstance(v, int) else f"{v:.8g}"
            for v in row.values()
        ]
        text = ",".join(cells) + "\n"
        if self.write_header:
            text, self.write_header = ",".join(row) + "\n" + text, False
        known = {name: value for name, value in row.items() if not np.isnan(value)}
        with self._writing():
            left = text.encode()
            while left:  # a write may take a part
                left = left[self.file.write(left) :]
            if self.writer is not None:
                for name, value in known.items():
                    self.writer.add_scalar(name, value, int(row["env_steps"]))
        if self.wandb is not None:
            self.wandb.log(known, step=int(row["env_steps"]))

    def sync(self) -> None:
        """See to it that the rows are on the disk before the checkpoint that counts on them."""
        if self.file is not None:
            with self._writing():
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close what is open."""
        with self._writing():
            self.opened.close()

    def _quiet(self, failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            self.hook(failed)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write into {self.path.parent}: {error.strerror or error}"
            ) from error


def import_wandb() -> Any:
    """Weights & Biases.

    Raises:
        HypergradRLError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise HypergradRLError(
            f"Weights & Biases cannot be imported ({error}): pip install wandb, or train without it"
        ) from error


def begin_wandb(directory: Path, options: dict[str, Any]) -> Any:
    """A run of Weights & Biases, begun or continued.

    Raises:
        HypergradRLError: it does not begin.
    """
    try:
        return import_wandb().init(**options, dir=str(directory), resume="allow")
    except HypergradRLError:
        raise
    except Exception as error:  # theirs are of many kinds
        raise HypergradRLError(
            f"Weights & Biases does not begin a run ({type(error).__name__}: {error}): run `wandb "
            f"login`, or set WANDB_MODE=offline; then `resume {directory}` continues, nothing is "
            "lost"
        ) from error
