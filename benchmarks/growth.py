"""Scaling curves of time and peak memory, measured in one run, with fitted exponents.

    python -m benchmarks.growth [--output runs/growth] [--only rank batch] [--trial]

Writes ``points.csv``, ``exponents.json``, ``growth.md`` (the table of the documentation) and
``growth.png``.  The sizes of a curve take turns; times are minima of the processor time of this
process on one thread.  An exponent is the slope of the least-squares line through the logarithms
over the upper half of the range, with the standard error that the scatter about the line gives.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

from .benchmarks.growth import CURVES, Curve, Work
from .benchmarks.memory import peak_bytes
from .benchmarks.timing import seconds, single_threaded

#: Turns of each size, and the seconds of all its turns after which two of them are enough.
TURNS, ENOUGH = 7, 3.0
#: A turn of work that is quick is many runs, of which the quickest counts.
TURN_SECONDS = 0.02
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Point:
    """One piece of work at one size; bytes are those of the tensors it makes, at most at once."""

    curve: str
    work: str
    size: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """value = factor * size^exponent over the upper half of a range.

    Attributes:
        error: standard error of the exponent, from the scatter about the line.
        first: the smallest size that was fitted.
    """

    exponent: float
    error: float
    factor: float
    first: float


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """The slope of log value over log size, of the sizes from the middle of the log range on.

    Raises:
        ValueError: fewer than three such sizes, which leave no scatter to judge by, or a value
            that is not positive.
    """
    if min(values) <= 0:
        raise ValueError(f"the values are {list(values)}, expected positive ones: they have logs")
    first = math.sqrt(min(sizes) * max(sizes)) * (1 - 1e-9)
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if x >= first]
    if len(points) < 3:
        raise ValueError(f"{len(points)} sizes of {list(sizes)} are in the upper half, expected 3")
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    error = math.sqrt(residual / (len(points) - 2) / spread)
    return Fit(slope, error, math.exp(mean_y - slope * mean_x), math.exp(points[0][0]))


def least_seconds(works: dict[int, Work]) -> dict[int, float]:
    """Least time of each size; they take turns, each turn in the other direction."""
    least, spent = dict.fromkeys(works, math.inf), dict.fromkeys(works, 0.0)
    for turn in range(TURNS):
        for size in list(works)[:: 1 if turn % 2 else -1]:
            begun = spent[size]
            while spent[size] <= begun + (TURN_SECONDS if turn < 2 or begun < ENOUGH else -1.0):
                took = seconds(works[size])
                spent[size] += took
                least[size] = min(least[size], took)
    return least


def measure(name: str, curve: Curve, sizes: Sequence[int]) -> list[Point]:
    """All points of a curve; the first run of each, which nobody times, counts its memory."""
    points = []
    for work in tqdm(curve.theory, desc=name, unit="work"):
        works = {size: curve.works(size)[work] for size in sizes}
        bytes_of = {size: peak_bytes(run) for size, run in works.items()}
        for size, least in least_seconds(works).items():
            points.append(Point(name, work, size, least, bytes_of[size]))
    return points


def column(
    points: Sequence[Point], curve: str, work: str, key: str
) -> tuple[list[int], list[float]]:
    mine = [point for point in points if (point.curve, point.work) == (curve, work)]
    return [point.size for point in mine], [float(getattr(point, key)) for point in mine]


def exponents(points: Sequence[Point]) -> list[dict[str, object]]:
    """A row for each piece of work: what was fitted and what theory gives."""
    rows: list[dict[str, object]] = []
    for curve, work in dict.fromkeys((point.curve, point.work) for point in points):
        theory = CURVES[curve].theory[work]
        row: dict[str, object] = {"curve": curve, "work": work}
        for name, key, expected in (
            ("time", "seconds", theory.time),
            ("memory", "peak_bytes", theory.memory),
        ):
            row[name] = asdict(fit(*column(points, curve, work, key))) | {"theory": expected}
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, object]], points: Sequence[Point]) -> str:
    lines = [
        "| over | from, to | work | time | theory | peak memory | theory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        curve, work = str(row["curve"]), str(row["work"])
        sizes = column(points, curve, work, "seconds")[0]
        cells = [curve, f"{sizes[0]:,} to {sizes[-1]:,}", work]
        for name in ("time", "memory"):
            found = row[name]
            assert isinstance(found, dict)
            exponent = f"{found['exponent']:.2f} ± {found['error']:.2f}".replace(
                "-", "\N{MINUS SIGN}"
            )
            cells += [exponent, f"{found['theory']:g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """Time above, memory below, a column for each curve; the fitted lines are dashed."""
    curves = list(dict.fromkeys(point.curve for point in points))
    figure, axes = plt.subplots(
        2, len(curves), figsize=(3.3 * len(curves), 6.4), sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, curve in zip(axes.T, curves, strict=True):
        works = list(dict.fromkeys(p.work for p in points if p.curve == curve))
        for work, colour in zip(works, COLOURS, strict=False):
            _line(axis[0], points, (curve, work, "seconds"), 1e3, colour)
            _line(axis[1], points, (curve, work, "peak_bytes"), 1e-6, colour)
        for part in axis:
            _at_least_two_decades(part)
        axis[0].set_title(curve)
        axis[1].set_xlabel(curve)
    axes[0][0].set_ylabel("processor time, ms")
    axes[1][0].set_ylabel("peak memory of tensors, MB")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(
    axis: Axes, points: Sequence[Point], which: tuple[str, str, str], unit: float, colour: str
) -> None:
    curve, work, key = which
    sizes, values = column(points, curve, work, key)
    found = fit(sizes, values)
    fitted = [size for size in sizes if size >= 0.999 * found.first]
    label = f"{work}: {found.exponent:.2f} ± {found.error:.2f}"
    axis.plot(sizes, [unit * y for y in values], "o", color=colour, markersize=4, label=label)
    line = [unit * found.factor * size**found.exponent for size in fitted]
    axis.plot(fitted, line, "--", color=colour, linewidth=1)
    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, fontsize=7, loc="upper left")
    axis.grid(alpha=0.25)


def _at_least_two_decades(axis: Axes) -> None:
    """So that what is constant looks constant, with room for the legend above."""
    low, high = axis.dataLim.intervaly
    wider = max(1.0, math.sqrt(100 * low / high))
    axis.set_ylim(0.7 * low / wider, 6 * high * wider)


def write_csv(points: Sequence[Point], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(points[0])))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/growth"))
    parser.add_argument("--only", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--trial", action="store_true", help="the five smallest sizes of each")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    single_threaded()
    mpl.use("Agg")

    points: list[Point] = []
    for name in options.only:
        curve = CURVES[name]
        points += measure(name, curve, curve.sizes[:5] if options.trial else curve.sizes)
        write_csv(points, options.output / "points.csv")  # each curve as soon as it is there
    rows = exponents(points)
    record = {"torch": torch.__version__, "machine": platform.machine(), "exponents": rows}
    (options.output / "exponents.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    table = markdown(rows, points)
    (options.output / "growth.md").write_text(table, encoding="utf-8")
    draw(points, options.output / "growth.png")
    print(table)
    for name in options.only:
        print(f"{name}: {CURVES[name].why}.")
    print(f"\nThe points, the exponents and a picture are in {options.output}.")


if __name__ == "__main__":
    main()
