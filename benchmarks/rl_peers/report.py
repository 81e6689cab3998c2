"""The tables and the picture of a comparison, from its runs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .contestants import PROGRAMS, Program
from .measure import Run

#: Ratios of CPU time of one step to that of the first name, both programs of one author.
WITHIN = ()

HEADER = (
    "program", "steps/s", "CPU, us a step", "its median", "wall, us a step",
    "CPU over the first row's", "of medians", "start, CPU s", "again, CPU s",
)  # fmt: skip


def groups(runs: Sequence[Run], programs: Sequence[Program] = PROGRAMS) -> dict[str, list[Program]]:
    """The programs that have run, by group, in the order in which they are declared."""
    ran = {(run.group, run.program) for run in runs}
    found: dict[str, list[Program]] = {}
    for program in programs:
        if (program.group, program.name) in ran:
            found.setdefault(program.group, []).append(program)
    return found


def of(runs: Sequence[Run], program: Program) -> list[Run]:
    """A program's runs, by round."""
    mine = [run for run in runs if (run.group, run.program) == (program.group, program.name)]
    return sorted(mine, key=lambda run: run.round)


def least(runs: Sequence[Run]) -> float:
    """CPU microseconds of a step where other work disturbed least."""
    return min(run.step_cpu for run in runs)


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.step_cpu for run in runs)


def table(runs: Sequence[Run], programs: Sequence[Program]) -> list[tuple[str, ...]]:
    """The rows of one group, under ``HEADER``."""
    first = of(runs, programs[0])
    rows = []
    for program in programs:
        mine = of(runs, program)
        cold, *warm = mine
        again = min((run.start_cpu for run in warm), default=None)
        compiles = program.compiles
        rows.append(
            (
                f"{program.name} ({program.settings})" if program.settings else program.name,
                f"{1e6 / least(mine):,.0f}",
                f"{least(mine):.3g}",
                f"{median(mine):.3g}",
                f"{min(run.step_wall for run in mine):.3g}",
                f"{least(mine) / least(first):.2f}",
                f"{median(mine) / median(first):.2f}",
                f"{cold.start_cpu:.1f}" if compiles else "",
                f"{again:.1f}" if compiles and again is not None else "",
            )
        )
    return rows


def markdown(runs: Sequence[Run], left_out: Mapping[str, str]) -> str:
    """All groups, and what is not among them."""
    parts = []
    for group, programs in groups(runs).items():
        lines = [f"**{group}**", "", _line(HEADER), "|---" * len(HEADER) + "|"]
        parts.append("\n".join([*lines, *(_line(row) for row in table(runs, programs))]))
    if left_out:
        lines = [f"- {name}: {why}" for name, why in left_out.items()]
        parts.append("\n".join(["Left out:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
