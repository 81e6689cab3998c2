"""Time to an inverse-Hessian-vector product of a given accuracy, beside other packages.

    python -m benchmarks.peers.speed [--output runs/peers_speed] [--environments .peers]
        [--only SciPy ...] [--problems CNN ...] [--python NAME=PATH ...]

Each package runs in an environment of its own, which the first run makes; ``--python`` names an
interpreter that has the package instead, for one that pip cannot install.  One that is neither
installed nor given is named in the table and left out.  Writes ``times.csv`` (a row as soon as
there is one, so that a run that is cut short goes on with the problems that are missing),
``versions.csv``, ``ratios.md`` and ``ratios.png``.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..__main__ import PACKAGES, Package, install, version
from . import making, report
from .problems import load, save
from .turns import Worker, compare

#: lineax and jaxopt come with it; the three share a process, as they share a compiler.
JAX = Package("jax", "jax", "jax_peers", needs_torch=False, beside=("lineax", "jaxopt"))
OURS = "hypergrad"
NAMES = (OURS, "jax", *(package.name for package in PACKAGES))


def environment(package: Package, directory: Path, given: dict[str, str]) -> tuple[str, str]:
    """The interpreter that has a package, or "" and the reason."""
    if package.name in given:
        found = given[package.name]
        return (found, "") if Path(found).is_file() else ("", f"{found} is no interpreter")
    if package.name == "scipy":  # the library needs it itself, and its products are PyTorch's
        return sys.executable, ""
    reason = install(package, directory)
    return ("", reason) if reason else (str((directory / "bin" / "python").absolute()), "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/peers_speed"))
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--problems", nargs="+", help="by the names in the table")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="interpreters to use as they are",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds that a solve may take")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="the same, in multiples of the best so far"
    )
    parser.add_argument("--trial", action="store_true", help="the smallest problem of each kind")
    parser.add_argument("--draw-only", action="store_true", help="tables and picture of a last run")
    options = parser.parse_args(argv)
    output = options.output.absolute()
    if not options.draw_only:
        run(options, output)
    report.write(output)


def run(options: argparse.Namespace, output: Path) -> None:
    """Measure what is not in ``times.csv`` yet."""
    makers = making.SMALL if options.trial else making.FULL
    wanted = options.problems or list(makers)
    if unknown := set(wanted) - set(makers):
        sys.exit(f"no such problem: {', '.join(unknown)}; there are: {', '.join(makers)}")
    path = output / "problems.npz"
    known = load(path) if path.is_file() else {}
    new = {name: makers[name] for name in wanted if name not in known}
    if new:
        save([*known.values(), *making.make_all(new)], path)
    done = {row.problem for row in report.read(output / "times.csv")}
    names = [name for name in wanted if name not in done]
    workers = start(options, output, path)
    try:
        for name in names:
            rows = compare(
                name, workers, rounds=options.rounds, limit=options.limit, patience=options.patience
            )
            report.append(rows, output / "times.csv")
    finally:
        for worker in workers:
            worker.close()


def start(options: argparse.Namespace, output: Path, problems: Path) -> list[Worker]:
    """A process for each package, ours first; ``versions.csv`` says which there are."""
    given = dict(item.split("=", 1) for item in options.python)
    # All on one core: they take turns, and none profits from another's.
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    workers: list[Worker] = []
    rows = []
    ours = Package(OURS, "", "ours")
    for package in (ours, *PACKAGES, JAX):
        if package.name not in options.only:
            continue
        python, reason = sys.executable, ""
        if package is not ours:
            python, reason = environment(package, options.environments / package.name, given)
        numbers = {"version": "", "torch": ""}
        if python:
            worker = Worker(python, package.adapter, problems, core)
            try:
                worker.ask({"do": "members", "problem": next(iter(load(problems)))})
            except ConnectionError as error:
                reason = str(error)
            else:
                workers.append(worker)
            numbers["version"] = version(package.name, python) if package is not ours else ""
            numbers["torch"] = version("torch", python) if package is not JAX else ""
        print(f"{package.name} {numbers['version']}: {reason or 'ready'}", flush=True)
        rows.append({"package": package.name, **numbers, "left out": reason})
    output.mkdir(parents=True, exist_ok=True)
    with (output / "versions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["package", "version", "torch", "left out"])
        writer.writeheader()
        writer.writerows(rows)
    return workers


if __name__ == "__main__":
    main()
