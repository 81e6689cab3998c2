"""Install other packages, each in an environment of its own, and run them on the atlas.

    python -m benchmarks.peers [--output runs/atlas] [--environments .peers] [--only SciPy ...]

Needs ``cases.npz`` in the output directory (``python -m benchmarks.atlas``).  Writes
``peers/<package>.csv`` and ``peers/versions.csv``; a package that does not install is named there,
with pip's reason, and has no CSV.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Package:
    """A package of the comparison.

    Attributes:
        name: the distribution whose version is reported.
        requirement: what pip is asked for.
        adapter: its module in ``adapters``, and the name of its CSV.
        needs_torch: whether PyTorch goes with it, at the version of ``constraints.txt``.
        beside: what pip is asked for besides.
    """

    name: str
    requirement: str
    adapter: str
    needs_torch: bool = True
    beside: tuple[str, ...] = ()


PACKAGES = (
    Package("scipy", "scipy", "scipy", needs_torch=False),
    Package("linear_operator", "linear_operator", "linear_operator"),
    Package("curvlinops-for-pytorch", "curvlinops-for-pytorch", "curvlinops"),
    # Its influence functions are an extra; older releases without it would install as well.
    Package("pyDVL", "pyDVL[influence]>=0.10", "pydvl"),
    Package("torchopt", "torchopt", "torchopt"),
    Package("betty-ml", "betty-ml", "betty"),
    Package("torchsolve", "torchsolve", "torchsolve"),
)


def pinned_torch() -> str:
    """The PyTorch that the library is tested with."""
    found = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert found, "constraints.txt pins no torch"
    return found[0]


def install(package: Package, directory: Path) -> str:
    """Make the environment; "" when it is there, else pip's reason."""
    done = directory / ".installed"
    # NumPy is what the systems come in; not every package brings it.
    torch = [pinned_torch()] if package.needs_torch else []
    wanted = [package.requirement, *package.beside, "numpy", *torch]
    if done.is_file() and done.read_text("utf-8").split() == wanted:
        return ""
    print(f"{package.name}: installing into {directory}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    command = [_python(directory), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    result = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        return errors[-1] if errors else f"pip ended with {result.returncode}"
    done.write_text("\n".join(wanted), encoding="utf-8")
    return ""


def solve(package: Package, directory: Path, output: Path) -> str:
    """Run the adapter in its environment; "" when its CSV is there, else the reason."""
    target = output / "peers" / f"{package.adapter}.csv"
    target.unlink(missing_ok=True)
    arguments = [package.adapter, str(output / "cases.npz"), str(target)]
    result = subprocess.run(
        [_python(directory), "-m", "benchmarks.peers.run", *arguments],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = result.stderr.strip().splitlines()
    if result.returncode:
        return lines[-1] if lines else f"it ended with {result.returncode}"
    return ""


def version(name: str, python: str) -> str:
    """The version that an interpreter has."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _python(directory: Path) -> str:
    return str((directory / "bin" / "python").absolute())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/atlas"))
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--only", nargs="+", choices=[package.name for package in PACKAGES])
    options = parser.parse_args(argv)
    output = options.output.absolute()
    if not (output / "cases.npz").is_file():
        sys.exit(f"{options.output}/cases.npz is not there; run `python -m benchmarks.atlas` first")
    (output / "peers").mkdir(exist_ok=True)
    rows = []
    for package in PACKAGES:
        if options.only and package.name not in options.only:
            continue
        directory = options.environments / package.name
        reason = install(package, directory) or solve(package, directory, output)
        number = version(package.name, _python(directory))
        torch = version("torch", _python(directory)) if package.needs_torch else ""
        rows.append(
            {"package": package.name, "version": number, "torch": torch, "left out": reason}
        )
        print(f"{package.name} {number}: {reason or 'done'}", flush=True)
    with (output / "peers" / "versions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["package", "version", "torch", "left out"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
