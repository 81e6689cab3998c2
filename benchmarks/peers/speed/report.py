"""Tables of ratios and the picture, from the CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .problems import LEVELS
from .turns import Row

OURS, JAX = "hypergrad", "JAX"
#: What the library means to be, in the time of the others over its own.
WANTED = {"PyTorch": 2.0, "JAX": 1.0}


def append(rows: Iterable[Row], path: Path) -> None:
    """Add lines to a CSV; a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        for row in rows:
            figures = {
                name: f"{value:.4g}" if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
            writer.writerow(figures)


def read(path: Path) -> list[Row]:
    """Read what :func:`append` wrote; nothing where there is nothing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                line["problem"], float(line["level"]), line["dtype"], line["owner"],
                line["solver"], line["knob"], int(line["work"]), float(line["seconds"]),
                float(line["median"]), float(line["error"]),
                int(line["hvps"]) if line["hvps"] else None, float(line["products"]),
                float(line["compiled"]), line["note"],
            )
            for line in csv.DictReader(file)
        ]  # fmt: skip


def best(rows: Iterable[Row]) -> Row | None:
    """The quickest of those that arrive."""
    arrived = [row for row in rows if math.isfinite(row.seconds)]
    return min(arrived, key=lambda row: row.seconds, default=None)


def ratio_table(rows: Sequence[Row]) -> str:
    """Markdown: the best of each owner over the best of the library, a line a problem and level."""
    owners = [owner for owner in dict.fromkeys(row.owner for row in rows) if owner != OURS]
    lines = [
        "| | error | library, ms | " + " | ".join(owners) + " |",
        "|" + "---|" * (len(owners) + 3),
    ]
    for name, level in _cells(rows):
        here = [row for row in rows if (row.problem, row.level) == (name, level)]
        mine = best(row for row in here if row.owner == OURS)
        cells = []
        for owner in owners:
            theirs = best(row for row in here if row.owner == owner)
            if theirs is None:
                reached = min((row.error for row in here if row.owner == owner), default=math.nan)
                cells.append(f"no ({reached:.0e})" if math.isfinite(reached) else "no")
            elif mine is None:
                cells.append(f"{1e3 * theirs.seconds:.3g} ms")
            else:
                cells.append(f"{theirs.seconds / mine.seconds:.2g}")
        own = "not reached" if mine is None else f"{1e3 * mine.seconds:.3g}, {mine.solver}"
        lines.append(f"| {name} | {_power(level)} | {own} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of each of the library's solvers."""
    mine = [row for row in rows if row.owner == OURS]
    solvers = list(dict.fromkeys(row.solver for row in mine))
    lines = ["| | error | " + " | ".join(solvers) + " |", "|" + "---|" * (len(solvers) + 2)]
    for name, level in _cells(rows):
        cells = []
        for solver in solvers:
            found = best(
                row for row in mine if (row.problem, row.level, row.solver) == (name, level, solver)
            )
            cells.append("no" if found is None else f"{1e3 * found.seconds:.3g}")
        lines.append(f"| {name} | {_power(level)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_of(rows: Sequence[Row]) -> str:
    """Markdown: where the library is not as quick as it means to be, and what its time goes to."""
    lines = [
        "| | error | against | ratio | the library's time | products, plain PyTorch | theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, level in _cells(rows):
        here = [row for row in rows if (row.problem, row.level) == (name, level)]
        mine = best(row for row in here if row.owner == OURS)
        for what, wanted in WANTED.items():
            theirs = best(
                row for row in here if row.owner != OURS and (row.owner == JAX) == (what == "JAX")
            )
            if theirs is None or (mine and theirs.seconds >= wanted * mine.seconds):
                continue
            other = f"{theirs.owner} {theirs.solver}, {1e3 * theirs.seconds:.3g} ms"
            other += "" if theirs.hvps is None else f" for {theirs.hvps} HVPs"
            if mine is None:
                lines.append(f"| {name} | {_power(level)} | {what} | | not reached | | {other} |")
                continue
            lines.append(
                f"| {name} | {_power(level)} | {what} | {theirs.seconds / mine.seconds:.2g} | "
                f"{mine.solver}, {1e3 * mine.seconds:.3g} ms | {mine.hvps} HVPs, "
                f"{1e3 * mine.products:.3g} ms | {other} |"
            )
    return "\n".join(lines)


def compiled_table(rows: Sequence[Row]) -> str:
    """Markdown: seconds of compilation, which no time of the other tables holds."""
    lines = ["| | solver | compilation, s |", "|---|---|---|"]
    for name in dict.fromkeys(row.problem for row in rows):
        slow: dict[str, float] = {}
        for row in rows:
            if row.problem == name and row.compiled > 0.5:
                who = f"{row.owner} {row.solver}"
                slow[who] = max(row.compiled, slow.get(who, 0.0))
        lines += [f"| {name} | {who} | {seconds:.1f} |" for who, seconds in slow.items()]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time over the library's best, a panel a level, a row a problem."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = list(dict.fromkeys(row.problem for row in rows))
    owners = [owner for owner in dict.fromkeys(row.owner for row in rows) if owner != OURS]
    colours = {owner: f"C{i}" for i, owner in enumerate(owners)}
    figure, axes = plt.subplots(
        1, len(LEVELS), figsize=(11, 1.6 + 0.55 * len(names)), sharey=True, sharex=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, (level, dtype) in zip(axes[0], LEVELS.items(), strict=True):
        axis.axvspan(1.0, WANTED["PyTorch"], color="0.93", zorder=0)
        axis.axvline(1.0, color="black", linewidth=1.0)
        for i, name in enumerate(names):
            here = [row for row in rows if (row.problem, row.level) == (name, level)]
            mine = best(row for row in here if row.owner == OURS)
            for j, owner in enumerate(owners):
                theirs = best(row for row in here if row.owner == owner)
                if mine is None or theirs is None:
                    continue
                height = i + 0.7 * ((j + 0.5) / len(owners) - 0.5)
                axis.plot(
                    theirs.seconds / mine.seconds, height, color=colours[owner],
                    marker="D" if owner == JAX else "o", markersize=5, linestyle="",
                    label=owner,
                )  # fmt: skip
        axis.set(xscale="log", title=f"error {_power(level)}, {dtype}")
        axis.set_yticks(range(len(names)), names)
        axis.xaxis.set_major_locator(LogLocator(base=2))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, axis="x")
        axis.tick_params(labelsize=8)
    axes[0, 0].invert_yaxis()
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        found, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=8, frameon=False
    )
    figure.supxlabel(
        "time of the package's best / time of the library's best (right of the line: slower than "
        "the library; grey: less than twice)", fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(output: Path) -> None:
    """Tables and picture of all rows so far."""
    rows = read(output / "times.csv")
    if not rows:
        return
    parts = {
        "Ratios": ratio_table(rows),
        "The library's solvers, ms": own_table(rows),
        "Short of twice PyTorch, or of JAX": short_of(rows),
        "Compilation, not in the times": compiled_table(rows),
    }
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())
    (output / "ratios.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(rows, output / "ratios.png")


def _cells(rows: Sequence[Row]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((row.problem, row.level) for row in rows))


def _power(level: float) -> str:
    return f"$10^{{{round(math.log10(level))}}}$"
