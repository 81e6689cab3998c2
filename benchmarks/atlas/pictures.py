"""The atlas as heat maps and curves that people can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from PIL import Image

from .cases import BUDGET, CONDITIONED, CONDITIONS, DAMPINGS, DTYPES, SIZES, SPECTRA
from .records import Record

#: One scale for every heat map: dark is accurate, bright is wrong, also without red-green vision
#: and in grey.
ERRORS = plt.get_cmap("viridis")
SCALE = Normalize(-16, 0)
NO_ANSWER = "0.85"
MINUS = "\N{MINUS SIGN}"
#: Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in print.
LINES = (
    ("#000000", "s"), ("#0072B2", "o"), ("#D55E00", "v"), ("#E69F00", "^"), ("#009E73", "D"),
    ("#CC79A7", "P"), ("#56B4E9", "X"), ("#F0E442", "<"), ("#5E3C99", ">"), ("#8C564B", "*"),
)  # fmt: skip

Key = Callable[[Record], object]


def power(value: float) -> str:
    """10^k for people."""
    exponent = round(math.log10(value))
    return rf"$10^{{{exponent}}}$"


def _signed(number: str) -> str:
    """With a proper minus, and without one on zero."""
    return number.lstrip("+-") if float(number) == 0 else number.replace("-", MINUS)


def _paint(axis: Axes, row: int, column: int, record: Record) -> None:
    """One cell: its colour, its exponent, and a black corner on a silent failure."""
    corners = [(column - 0.5, row - 0.5), (column + 0.5, row - 0.5),
               (column + 0.5, row + 0.5), (column - 0.5, row + 0.5)]  # fmt: skip
    if math.isfinite(record.error):
        exponent = math.log10(max(record.error, 1e-17))
        red, green, blue, _ = ERRORS(SCALE(exponent))
        text = _signed(f"{exponent:.0f}") if exponent < 99.5 else ">99"
        face: Any = (red, green, blue)
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
    else:
        face, ink, text = NO_ANSWER, "0.3", "none"
    axis.add_patch(Polygon(corners, facecolor=face, edgecolor="white", linewidth=0.6))
    size = 7 if len(text) < 4 else 5
    axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    if record.silent:
        right, top = column + 0.5, row - 0.5
        corner = [(right - 0.42, top), (right, top), (right, top + 0.42)]
        axis.add_patch(Polygon(corners_inside(corner), facecolor="black", edgecolor="none"))


def corners_inside(corner: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A corner's triangle, a hair inside the cell."""
    return [(x - 0.02, y + 0.02) for x, y in corner]


def heat_map(
    axis: Axes, records: Sequence[Record], rows: Sequence[object], columns: Sequence[object],
    row_of: Key, column_of: Key,
) -> None:  # fmt: skip
    """One panel; a cell without a record stays blank."""
    for record in records:
        row, column = row_of(record), column_of(record)
        if row in rows and column in columns:
            _paint(axis, rows.index(row), columns.index(column), record)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), [""] * len(columns))
    axis.set_yticks(range(len(rows)), [""] * len(rows))
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _colour_bar(figure: Figure, axes: Any) -> None:
    bar = figure.colorbar(
        ScalarMappable(SCALE, ERRORS), ax=axes, extend="max", shrink=0.7, aspect=30, pad=0.01
    )
    bar.set_ticks([-16, -12, -8, -4, 0])
    bar.set_label(r"cell: $\log_{10}$ of the relative error", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    # Few colours, so a palette is a third of the size and looks the same. It has to cover them all:
    # chosen by counting pixels it makes a thin line grey, and bands of the colour bar.
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(
            256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
        )
    small.save(path, optimize=True)


NOTE = (
    "black corner: silent failure, wrong and not said so        "
    "none: an exception, or no finite answer"
)


def panels(records: Sequence[Record], path: Path, title: str, across: str, wide: int = 4) -> None:
    """One panel a solver: spectra against condition or damping."""
    rows = list(CONDITIONED if across == "condition" else SPECTRA)
    columns = list(CONDITIONS if across == "condition" else DAMPINGS)
    names = list(dict.fromkeys((record.owner, record.solver) for record in records))
    high = math.ceil(len(names) / wide)
    size = (1.5 + wide * (0.42 + 0.3 * len(columns)), 0.9 + high * (0.55 + 0.26 * len(rows)))
    figure, grid = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for place, axis in enumerate(grid.flat):
        if place >= len(names):
            axis.set_axis_off()
            continue
        owner, name = names[place]
        mine = [record for record in records if (record.owner, record.solver) == (owner, name)]
        heat_map(
            axis, mine, rows, columns, lambda record: record.spectrum,
            lambda record: getattr(record, across),
        )  # fmt: skip
        spent = {record.hvps for record in mine}
        above = "" if max(spent) <= BUDGET else f" ({max(spent)} HVPs)"
        axis.set_title(
            (name if owner == "hypergrad" else f"{owner} {name}") + above,
            fontsize=9 if owner == "hypergrad" else 7.5,
        )
        if place % wide == 0:
            axis.set_yticks(range(len(rows)), rows)
        if place + wide >= len(names):
            axis.set_xticks(range(len(columns)), [power(float(column)) for column in columns])
            axis.set_xlabel(
                "condition number of A" if across == "condition" else "damping / |A|", fontsize=8
            )
    _colour_bar(figure, grid)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(NOTE, fontsize=8, color="0.3")
    _save(figure, path)


def rows_of_solvers(
    records: Sequence[Record], path: Path, title: str, columns: Sequence[object],
    labels: Sequence[str], column_of: Key, xlabel: str,
) -> None:  # fmt: skip
    """One row a solver, ours above the peers', one panel a dtype."""
    names = list(dict.fromkeys((record.owner, record.solver) for record in records))
    size = (3.6 + 2 * 0.46 * len(columns), 1.6 + 0.26 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axis, dtype in zip(axes, DTYPES, strict=True):
        mine = [record for record in records if record.dtype == dtype]
        heat_map(
            axis,
            mine,
            names,
            list(columns),
            lambda record: (record.owner, record.solver),
            column_of,
        )
        axis.set_xticks(range(len(columns)), labels)
        if any(len(label) > 9 and "$" not in label for label in labels):
            axis.tick_params(axis="x", rotation=45)
            plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
        axis.set_title(dtype, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        ours = sum(owner == "hypergrad" for owner, _ in names)
        if 0 < ours < len(names):
            axis.axhline(ours - 0.5, color="black", linewidth=1.2)
    axes[0].set_yticks(
        range(len(names)),
        [name if owner == "hypergrad" else f"{owner} {name}" for owner, name in names],
    )
    _colour_bar(figure, axes)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(NOTE, fontsize=8, color="0.3")
    _save(figure, path)


def curves(ours: Sequence[Record], peers: Sequence[Record], path: Path) -> None:
    """Error against products: the library in colour, every peer as a thin grey line."""
    records = [record for record in (*ours, *peers) if record.slice == "curve"]
    cells = list(dict.fromkeys(record.cell for record in records))
    names = list(dict.fromkeys(record.solver for record in ours if record.slice == "curve"))
    wide = 3
    high = math.ceil(len(cells) / wide)
    figure, grid = plt.subplots(
        high, wide, figsize=(11, 0.9 + 3.1 * high), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, cell in zip(grid.flat, cells, strict=False):
        here = [record for record in records if record.cell == cell]
        for owner, solver in dict.fromkeys((r.owner, r.solver) for r in here):
            mine = [r for r in here if (r.owner, r.solver) == (owner, solver)]
            mine = sorted((r for r in mine if math.isfinite(r.error)), key=lambda r: r.hvps)
            xs = [record.hvps for record in mine]
            ys = [min(max(record.error, 1e-17), 1e3) for record in mine]
            if owner == "hypergrad":
                colour, marker = LINES[names.index(solver) % len(LINES)]
                axis.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.3)
            else:
                axis.plot(xs, ys, color="0.6", linewidth=0.7, zorder=1)
        first = here[0]
        condition = "" if first.condition is None else f", condition {power(first.condition)}"
        axis.set_title(f"{first.spectrum}{condition}, damping {power(first.damping)}", fontsize=9)
        axis.set(xscale="log", yscale="log", ylim=(1e-17, 3e3))
        axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.set_xticks([5, 20, 100, 400, 1000], ["5", "20", "100", "400", "1000"])
        axis.minorticks_off()
    for axis in grid[-1]:
        axis.set_xlabel("HVPs spent", fontsize=9)
    for axis in grid[:, 0]:
        axis.set_ylabel("relative error", fontsize=9)
    handles = [
        Line2D([], [], color=LINES[i % len(LINES)][0], marker=LINES[i % len(LINES)][1],
               markersize=4, label=name)
        for i, name in enumerate(names)
    ]  # fmt: skip
    if peers:
        handles.append(
            Line2D([], [], color="0.6", linewidth=0.7, label="other packages, a line each")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle("Error against HVPs, n = 200, float64 (dotted: as wrong as x = 0)", fontsize=11)
    _save(figure, path)


def advantage(ours: Sequence[Record], peers: Sequence[Record], path: Path) -> None:
    """Digits between the best of the library and the best of the peers within the budget."""
    colours, scale = plt.get_cmap("PuOr"), Normalize(-6, 6)
    figure, grid = plt.subplots(2, 2, figsize=(9.5, 5.4), layout="constrained")
    for down, dtype in enumerate(DTYPES):
        for across, what in enumerate(("condition", "damping")):
            axis = grid[down, across]
            rows = list(CONDITIONED if what == "condition" else SPECTRA)
            columns = list(CONDITIONS if what == "condition" else DAMPINGS)
            table = np.full((len(rows), len(columns)), np.nan)
            for i, spectrum in enumerate(rows):
                for j, column in enumerate(columns):
                    logs = [
                        _best(records, what, dtype, spectrum, column) for records in (peers, ours)
                    ]
                    table[i, j] = logs[0] - logs[1]
            axis.imshow(table, cmap=colours, norm=scale, aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                ink = "white" if abs(value) > 4 else "black"
                axis.text(
                    j, i, _signed(f"{value:+.1f}"), ha="center", va="center", fontsize=7, color=ink
                )
            axis.set_xticks(range(len(columns)), [power(column) for column in columns])
            axis.set_yticks(range(len(rows)), rows)
            axis.tick_params(length=0, labelsize=8)
            axis.spines[:].set_visible(False)
            label = "condition number of A" if what == "condition" else "damping / |A|"
            axis.set_xlabel(label, fontsize=8)
            axis.set_title(dtype, fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=grid, extend="both", shrink=0.7)
    bar.set_label("correct digits beyond those of the best other package", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(
        f"The library's best against the best of the others, {BUDGET} HVPs each", fontsize=11
    )
    _save(figure, path)


def _best(records: Sequence[Record], what: str, dtype: str, spectrum: str, column: float) -> float:
    """The log of the smallest error within the budget, 0 (x = 0) if there is none below one."""
    errors = [
        record.error
        for record in records
        if (record.slice, record.dtype, record.spectrum) == (what, dtype, spectrum)
        and getattr(record, what) == column
        and record.hvps <= BUDGET
        and record.mode == "budget"
    ]
    return math.log10(min(1.0, *errors, 1.0) or 1e-17) if errors else 0.0


def draw_all(ours: Sequence[Record], peers: Sequence[Record], output: Path) -> None:
    """Every picture for which there are records."""
    halves = {"ours": ours, "peers": peers}
    for half, records in halves.items():
        for across in ("condition", "damping"):
            for dtype in DTYPES:
                chosen = [
                    record
                    for record in records
                    if (record.slice, record.dtype, record.mode) == (across, dtype, "budget")
                ]
                if chosen:
                    what = "no damping to speak of" if across == "condition" else "own condition"
                    title = f"Relative error, {BUDGET} HVPs, n = 200, {dtype}, {what}"
                    panels(chosen, output / f"{half}_{across}_{dtype}.png", title, across)
    both = [*ours, *peers]
    sizes = [record for record in both if (record.slice, record.mode) == ("size", "budget")]
    if sizes:
        rows_of_solvers(
            sizes, output / "size.png",
            f"Relative error, {BUDGET} HVPs, by the size of v (1/i spectrum, damping $10^{{-2}}$)",
            SIZES, [power(size) for size in SIZES], lambda record: record.size, "factor on v",
        )  # fmt: skip
    defaults = [
        record
        for record in both
        if (record.slice, record.mode, record.damping) == ("damping", "default", 1e-4)
    ]
    if defaults:
        rows_of_solvers(
            defaults, output / "defaults.png",
            r"Relative error at the defaults (damping $10^{-4}$ |A|; HVPs as many as they take)",
            SPECTRA, SPECTRA, lambda record: record.spectrum, "",
        )  # fmt: skip
    if any(record.slice == "curve" for record in ours):
        curves(ours, peers, output / "curves.png")
    if ours and peers:
        advantage(ours, peers, output / "advantage.png")
