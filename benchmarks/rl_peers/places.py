"""Interpreters and checkouts: made by pip, or named by the user."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..peers.__main__ import pinned_torch
from .contestants import ENVIRONMENTS, Environment


@dataclass(frozen=True)
class Place:
    """An interpreter, and the checkout that goes with it; or the reason why there is none."""

    python: str = ""
    checkout: str = ""
    missing: str = ""


def find(name: str, root: Path, checkouts: Mapping[str, Path], pythons: Mapping[str, str]) -> Place:
    """What ``ENVIRONMENTS[name]`` needs, made in ``root`` where it is not there."""
    environment = ENVIRONMENTS[name]
    checkout = checkouts.get(name, root / "checkouts" / name).absolute()
    if environment.source and not (checkout / environment.file).is_file():
        return Place(
            missing=f"no {environment.file} in {checkout}: git clone {environment.source} "
            f"{root / 'checkouts' / name}, or --checkout {name}=PATH"
        )
    if not environment.requirements:
        return Place(sys.executable, str(checkout))
    if name in pythons:
        return Place(pythons[name], str(checkout))
    directory = (root / name).absolute()
    reason = _install(name, environment, directory)
    python = str(directory / "bin" / "python")
    return Place(missing=reason) if reason else Place(python, str(checkout))


def _install(name: str, environment: Environment, directory: Path) -> str:
    """Make the environment; "" when it is there, else pip's reason."""
    done = directory / ".installed"
    wanted = [*environment.requirements, *([pinned_torch()] if environment.with_torch else [])]
    if done.is_file() and done.read_text("utf-8").split("\n") == wanted:
        return ""
    print(f"{name}: installing into {directory}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    python = str(directory / "bin" / "python")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        return errors[-1] if errors else f"pip ended with {result.returncode}"
    done.write_text("\n".join(wanted), encoding="utf-8")
    return ""
