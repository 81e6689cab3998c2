"""The tests of `tests/elsewhere`, each file in a process of its own.

They register a device with PyTorch, which cannot be taken back, and the rest of the tests are to
run without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "elsewhere").glob("test_*.py"))
#: These do without float64, too.
WITHOUT = ("test_bilevel", "test_defaults", "test_operators", "test_solvers", "test_solving")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_device_that_is_not_the_cpu(file: Path) -> None:
    check(file, "1")


@pytest.mark.parametrize("name", WITHOUT)
def test_on_a_device_without_float64(name: str) -> None:
    check(Path(__file__).parent / "elsewhere" / f"{name}.py", "float32")


def check(file: Path, device: str) -> None:
    """The tests of ``file``, with the device that ``device`` asks for, pass."""
    environment = {**os.environ, "HYPERGRAD_ELSEWHERE": device}
    for name in [x for x in environment if x.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr[-2_000:]
    assert " passed" in found.stdout
