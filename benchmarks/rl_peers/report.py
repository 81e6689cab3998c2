"""The tables and the picture of a comparison, from its runs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .contestants import OURS, Program
from .measure import Run

FIELDS = (
    "group", "program", "steps/s", "CPU, us a step", "median", "wall, us a step", "CPU / ours",
    "of medians", "CPU / its PPO", "first start, CPU s", "next start, CPU s", "rounds", "versions",
    "processor",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A program in figures.

    Attributes:
        runs: by round.
        ours: the runs of ours that they are divided by; () where there are none.
        ppo: those of PPO by the same authors, in a group of several algorithms.
    """

    program: Program
    runs: tuple[Run, ...]
    ours: tuple[Run, ...]
    ppo: tuple[Run, ...]

    @property
    def least(self) -> float:
        """CPU microseconds of a step, in the round that other work disturbed least."""
        return min(run.step_cpu for run in self.runs)

    def over(self, others: Sequence[Run], of: str = "least") -> float | None:
        """The ratio of CPU times of a step, of minima or medians over the rounds."""
        if not others:
            return None
        quotient = Row(self.program, tuple(others), (), ())
        return getattr(self, of) / getattr(quotient, of)  # type: ignore[no-any-return]

    @property
    def median(self) -> float:
        """The same, in the middle one."""
        return statistics.median(run.step_cpu for run in self.runs)

    def cells(self) -> dict[str, str]:
        """By ``FIELDS``; what does not exist is blank."""
        first, *later = (run.start_cpu for run in self.runs)
        compiles = self.program.compiles
        return {
            "group": self.program.group,
            "program": self.program.name,
            "steps/s": f"{1e6 / self.least:,.0f}",
            "CPU, us a step": _time(self.least),
            "median": _time(self.median),
            "wall, us a step": _time(min(run.step_wall for run in self.runs)),
            "CPU / ours": _ratio(self.over(self.ours)),
            "of medians": _ratio(self.over(self.ours, "median")),
            "CPU / its PPO": _ratio(self.over(self.ppo)),
            "first start, CPU s": f"{first:.1f}" if compiles else "",
            "next start, CPU s": f"{min(later):.1f}" if compiles and later else "",
            "rounds": str(len(self.runs)),
            "versions": self.runs[-1].versions,
            "processor": self.runs[-1].processor,
        }


def _time(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def rows(runs: Sequence[Run], programs: Sequence[Program]) -> list[Row]:
    """The programs that have run, in the order in which they are declared."""

    def of(program: Program | None) -> tuple[Run, ...]:
        if program is None:
            return ()
        mine = [run for run in runs if (run.group, run.program) == (program.group, program.name)]
        return tuple(sorted(mine, key=lambda run: run.round))

    found = []
    for program in programs:
        group = [other for other in programs if other.group == program.group]
        several = len({other.algorithm for other in group}) > 1
        ours = [
            p for p in group if p.environment == OURS and p.algorithm == program.algorithm
        ]  # fmt: skip
        ppo = [
            p for p in group if p.environment == program.environment and p.algorithm == "PPO"
        ] if several else []  # fmt: skip
        if mine := of(program):
            found.append(Row(program, mine, of(next(iter(ours), None)), of(next(iter(ppo), None))))
    return found


def markdown(found: Sequence[Row], left_out: Mapping[str, str]) -> str:
    """A table a group, and what is in none."""
    rounds = sorted({len(row.runs) for row in found})
    many = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else rounds[0] if rounds else "no"
    places = sorted({run.processor for row in found for run in row.runs if run.processor})
    where = f", on {' and '.join(places)}" if places else ""
    parts = [f"Least and median of the rounds, {many} a program{where}."]
    for group in dict.fromkeys(row.program.group for row in found):
        cells = [row.cells() for row in found if row.program.group == group]
        shown = [
            field for field in FIELDS
            if field not in ("group", *FIELDS[-3:]) and any(row[field] for row in cells)
        ]  # fmt: skip
        lines = [f"**{group}**", "", _line(shown), "|---" * len(shown) + "|"]
        parts.append("\n".join([*lines, *(_line([row[f] for f in shown]) for row in cells)]))
    if left_out:
        lines = [f"- {name}: {why}" for name, why in left_out.items()]
        parts.append("\n".join(["Left out:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(found: Sequence[Row], left_out: Mapping[str, str], directory: Path) -> str:
    """``rl_peers.csv``, ``.md`` and ``.png``; the text of the second."""
    with (directory / "rl_peers.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(row.cells() for row in found)
    text = markdown(found, left_out)
    (directory / "rl_peers.md").write_text(text, encoding="utf-8")
    if found:
        draw(found, directory / "rl_peers.png")
    return text


def draw(found: Sequence[Row], path: Path) -> None:
    """CPU time of a step, a panel a group: the least of the rounds, and each as a line."""
    import matplotlib.pyplot as plt  # half a second

    names = list(dict.fromkeys(row.program.group for row in found))
    groups = [[row for row in found if row.program.group == name] for name in names]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.9 * len(groups) + 0.3 * len(found)), squeeze=False,
        sharex=True, layout="constrained", height_ratios=[len(group) + 0.6 for group in groups],
    )  # fmt: skip
    for axis, name, group in zip(axes[:, 0], names, groups, strict=True):
        for place, row in enumerate(group):
            mine = row.program.environment == OURS
            colour = "C0" if mine else "0.45"
            for run in row.runs:
                axis.plot(run.step_cpu, place, "|", markersize=9, color=colour, alpha=0.6)
            axis.plot(row.least, place, "o", markersize=7, color=colour)
            ratio = row.over(row.ours)
            words = f"{1e6 / row.least:,.0f} steps/s"
            words += "" if ratio is None or row.ours == row.runs else f"; {ratio:.2g} x ours"
            right = max(run.step_cpu for run in row.runs)
            axis.text(1.25 * right, place, words, va="center", fontsize=8)
        axis.set_yticks(range(len(group)), [row.program.name for row in group], fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_ylim(len(group) - 0.5, -0.5)
    least, most = min(row.least for row in found), max(r.step_cpu for x in found for r in x.runs)
    axes[0, 0].set_xlim(least / 2, most * 6)  # room for the words
    axes[-1, 0].set_xlabel("CPU time of an environment step, learning included (microseconds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
