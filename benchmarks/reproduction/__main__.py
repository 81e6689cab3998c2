"""``python -m benchmarks.reproduction run`` trains every arm, ``report`` writes the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduction.arms import ARMS, TASKS, plan
from benchmarks.reproduction.report import write_report
from benchmarks.reproduction.training import train_all, unfinished
from hypergrad_rl import HypergradRLError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("run", help="train what is not finished yet")
    sub.add_argument("--tasks", nargs="+", choices=TASKS, default=["CartPole-v1", "Acrobot-v1"])
    sub.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that a task has")
    sub.add_argument("--seeds", nargs="+", default=["0..9"], help="numbers and ranges: 0..9")
    sub.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    sub.add_argument("--run-dir", type=Path, default=Path("runs/reproduction"))
    sub.add_argument("--total-steps", type=int, help="a trial: shorter, and never compiled")
    sub = commands.add_parser("report", help="report on the finished runs")
    sub.add_argument("--run-dir", type=Path, default=Path("runs/reproduction"))
    sub.add_argument("--output", type=Path, default=Path("runs/reproduction/report"))
    sub.add_argument("--mix", nargs="+", default=[], help="settings that older runs lack")
    args = parser.parse_args(argv)
    try:
        if args.command == "report":
            print(write_report(args.run_dir, args.output, args.mix))
            return 0
        trial = {"total_steps": args.total_steps, "compile": False}
        # Of so many trainings even the short ones repay compiling, once the cache has it.
        settings = {"compile": True} if args.total_steps is None else trial
        runs = plan(args.run_dir, args.tasks, _seeds(args.seeds), args.arms, **settings)
        pending = unfinished(runs)
        print(f"{len(runs) - len(pending)} of {len(runs)} runs are finished", file=sys.stderr)
        train_all(pending, args.jobs)
    except HypergradRLError as error:
        print(f"reproduction: {error}", file=sys.stderr)
        return 2
    return 0


def _seeds(words: Sequence[str]) -> list[int]:
    seeds: list[int] = []
    for word in words:
        first, _, last = word.partition("..")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


if __name__ == "__main__":
    sys.exit(main())
