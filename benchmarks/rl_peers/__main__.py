"""PPO and BLPO training beside other programs: CPU and wall time of a step, on one core.

    python -m benchmarks.rl_peers [--only hypergrad_rl stable-baselines3] [--rounds 3]

Every program runs once a round, in turns, from the first to the last and back. A program that is
not there is skipped, with a word on how to get it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import measure, report
from .contestants import ENVIRONMENTS, OURS, PROGRAMS, Program
from .places import Place, find


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/rl_peers"))
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), help="whose programs")
    parser.add_argument("--groups", nargs="+", help="groups whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, help="the processor that all run on (the last)")
    for word, what in (("checkout", "a program's files"), ("python", "an interpreter to use")):
        parser.add_argument(
            f"--{word}", action="append", default=[], type=_named, metavar="NAME=PATH", help=what
        )
    parser.add_argument("--draw-only", action="store_true", help="from runs.csv of a former run")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    left, failed = options.output / "left_out.json", False
    if not options.draw_only:
        if shutil.which("taskset") is None:
            sys.exit("taskset is not there: it belongs to util-linux (apt install util-linux)")
        places, left_out = _places(options)
        programs = [
            program for program in PROGRAMS
            if program.environment in places
            and (not options.groups or any(word in program.group for word in options.groups))
        ]  # fmt: skip
        left.write_text(json.dumps(left_out, indent=1), encoding="utf-8")
        failures = _run(programs, places, options)
        left.write_text(json.dumps(left_out | failures, indent=1), encoding="utf-8")
        failed = bool(failures)
    runs = measure.load(options.output / "runs.csv")
    words = json.loads(left.read_text("utf-8"))
    print("\n" + report.write(report.rows(runs, PROGRAMS), words, options.output))
    return 1 if failed else 0


def _run(
    programs: Sequence[Program], places: Mapping[str, Place], options: argparse.Namespace
) -> dict[str, str]:
    """Every program once a round, into runs.csv; the names of those that failed, and why."""
    core = max(os.sched_getaffinity(0)) if options.core is None else options.core
    work = (options.output / "work").absolute()
    shutil.rmtree(work, ignore_errors=True)  # so that the first round compiles everything
    runs: list[measure.Run] = []
    failures: dict[str, str] = {}
    for number in range(1, options.rounds + 1):
        made: dict[object, measure.Run] = {}
        for program in programs if number % 2 else programs[::-1]:
            name = f"{program.group}: {program.name}"
            if name in failures:
                continue
            # What is in two groups runs once a round, and compiles once.
            key = (program.environment, program.command)
            first = [(other.environment, other.command) for other in PROGRAMS].index(key)
            place, directory = places[program.environment], work / str(first)
            try:
                if key not in made:
                    made[key] = measure.launch(program, place, core, directory, number)
            except measure.ProgramError as error:
                failures[name] = str(error)
                print(f"{name}: failed: {error}", flush=True)
                continue
            run = replace(made[key], group=program.group, program=program.name)
            runs.append(run)
            print(
                f"round {number}, {name}: {run.step_cpu:.3g} us a step (wall {run.step_wall:.3g}), "
                f"start {run.start_cpu:.1f} s of CPU",
                flush=True,
            )
            measure.write(runs, options.output / "runs.csv")
    measure.write(runs, options.output / "runs.csv")
    if not failures:  # what they wrote to stderr is there
        shutil.rmtree(work, ignore_errors=True)
    return failures


def _named(text: str) -> tuple[str, Path]:
    name, given, path = text.partition("=")
    if not given or name not in ENVIRONMENTS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=PATH with a name of {', '.join(ENVIRONMENTS)}"
        )
    return name, Path(path)


def _places(options: argparse.Namespace) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the programs are, and what is missing of the others."""
    places: dict[str, Place] = {}
    missing: dict[str, str] = {}
    pythons = {name: str(path.absolute()) for name, path in options.python}
    for name in ENVIRONMENTS:
        # Ours is what the others are divided by.
        if not options.only or name in options.only or name == OURS:
            place = find(name, options.environments, dict(options.checkout), pythons)
            if place.missing:
                missing[name] = place.missing
                print(f"{name}: skipped: {place.missing}", flush=True)
            else:
                places[name] = place
    return places, missing


if __name__ == "__main__":
    sys.exit(main())
