"""Sweeps: the points of a grid trained, those that are finished ranked, the ranking written.

What ranks a point is what ``report`` compares: the interquartile mean over its seeds of the mean
return over the last tenth of training, with its bootstrap interval.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hypergrad_rl.comparison import FEW_SEEDS, describe_runs, write_csv
from hypergrad_rl.config import setting_text
from hypergrad_rl.errors import RunDirectoryError
from hypergrad_rl.grid import Point
from hypergrad_rl.report import FIGURES, draw_intervals, estimate_text
from hypergrad_rl.run_directory import CONFIG, difference, has_ended
from hypergrad_rl.runs import find_runs, train_all, train_command
from hypergrad_rl.statistics import Bootstrap

SHOWN = 25  # points that are printed and drawn by name; the files have all
_UNKNOWN = {"iqm": None, "low": None, "high": None, "mean": None, "standard_deviation": None}
_NOTHING: dict[str, Any] = {  # is known of a point without a finished run
    **dict.fromkeys(FIGURES, _UNKNOWN), "steps_per_second": None, "runs": []
}  # fmt: skip


def train_points(
    points: Sequence[Point], jobs: int, tensorboard: bool
) -> dict[Path, BaseException]:
    """Train the runs of all points that are not finished; those that have begun go on.

    Returns:
        What the runs that failed raised.

    Raises:
        RunDirectoryError: a directory holds a run of other settings; nothing is trained then.
    """
    runs = {path: config for point in points for path, config in point.runs.items()}
    begun = [path for path in runs if (path / CONFIG).exists()]
    for path in begun:
        if different := difference(path, runs[path]):
            raise RunDirectoryError(
                f"{different}: give the flags that this sweep began with, or another --run-dir"
            )
    ended = {path for path in begun if has_ended(path)}
    left = {path: config for path, config in runs.items() if path not in ended}
    steps = next(iter(runs.values())).total_steps
    done = f", {len(ended)} of them finished and {len(begun) - len(ended)} begun" if begun else ""
    counts = [f"{len(things)} {name}{'s' * (len(things) > 1)}"
              for name, things in (("point", points), ("run", runs))]  # fmt: skip
    print(f"{', '.join(counts)} of {steps:,} steps{done}; {jobs} at a time", flush=True)
    return train_all(left, jobs, tensorboard, set(begun) - ended) if left else {}


def rank_points(
    points: Sequence[Point], *, command: str | None = None, bootstrap: Bootstrap | None = None
) -> dict[str, Any]:
    """The points by the return of their finished runs, best first: what is written and drawn.

    A point that lacks runs comes after all that have theirs: those that fail are seldom the best,
    and the seeds that are left would look better than the setting is.

    Raises:
        RunDirectoryError: no run is finished, or one cannot be read.
    """
    bootstrap = bootstrap or Bootstrap()
    finished = [path for point in points for path in point.runs if has_ended(path)]
    if not finished:
        raise RunDirectoryError("no run of the sweep is finished; the same command continues it")
    found = {run.path: run for run in find_runs(finished)[0]}
    entries = []
    for point in points:
        runs = [found[path] for path in point.runs if path in found]
        known = describe_runs(runs, bootstrap) if runs else _NOTHING
        entries.append({
            "point": point.name, "values": point.values, "seeds": len(point.runs), **known,
            "command": shlex.join(_command(point)),
        })  # fmt: skip
    entries.sort(key=_place)
    return {
        "command": command, "confidence": bootstrap.confidence, "resamples": bootstrap.resamples,
        "settings": list(points[0].values), "points": entries, "notes": _notes(entries),
    }  # fmt: skip


def _place(entry: Mapping[str, Any]) -> tuple[bool, float]:
    value = entry["final_return"]["iqm"]
    return len(entry["runs"]) < entry["seeds"], math.inf if value is None else -value


def _command(point: Point) -> list[str]:
    """Trains with these settings once more, on a seed that the ranking has not seen."""
    path, config = next(iter(point.runs.items()))
    seed = 1 + max(config.seed for config in point.runs.values())
    settings = {"algo": config.algo, **vars(config), "seed": seed}
    return train_command(settings, path.with_name(f"{path.name.rpartition('-')[0]}-{seed}"))


def _notes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    best, *others = entries
    notes = []
    if lacking := [entry for entry in entries if len(entry["runs"]) < entry["seeds"]]:
        notes.append(f"{len(lacking)} of {len(entries)} points lack runs, which failed: they stand "
                     "after the others")  # fmt: skip
    if any(entry["runs"] and entry["final_return"]["iqm"] is None for entry in entries):
        notes.append("unknown: no episode ended in the last tenth of a run")
    low = best["final_return"]["low"]
    if best["seeds"] == 1:
        notes.append("a point of 1 seed has no interval; that takes at least 2")
    elif low is not None and (close := sum(_reaches(other, low) for other in others)):
        notes.append(f"the intervals of {close} of {len(others)} other points reach that of the "
                     "best: these seeds do not tell them apart")  # fmt: skip
    for name, value in best["values"].items():
        tried = {entry["values"][name] for entry in entries}
        numbers = sorted(x for x in tried if _is_number(x))
        if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
            edge = "lowest" if value == numbers[0] else "highest"
            notes.append(f"{name}={setting_text(value)}, of the best, is the {edge} that was "
                         "tried: there may be better ones beyond")  # fmt: skip
    if 1 < best["seeds"] < 5:
        notes.append(FEW_SEEDS)
    if others:
        notes.append("the best of many looks better than it is, having been chosen for its return: "
                     "its command trains on a seed that was not among these")  # fmt: skip
    return notes


def _reaches(entry: Mapping[str, Any], low: float) -> bool:
    high = entry["final_return"]["high"]
    return high is not None and bool(high >= low)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sweep_table(results: Mapping[str, Any], shown: int | None = None) -> str:
    """The ranking as a table in Markdown, of the best ``shown`` points."""
    entries, names = results["points"], results["settings"]
    header = ["place", *names, "seeds", *FIGURES.values(), "steps/s"]
    rows = [
        [str(place), *(setting_text(entry["values"][name]) for name in names), _seeds(entry),
         *(estimate_text(entry[name], 1) for name in FIGURES),
         f"{entry['steps_per_second']:.0f}" if entry["runs"] else ""]
        for place, entry in enumerate(entries[:shown], 1)
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, [f"{'-' * (width - 1)}:" for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(c.rjust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def _seeds(entry: Mapping[str, Any]) -> str:
    finished, seeds = len(entry["runs"]), entry["seeds"]
    return str(seeds) if finished == seeds else f"{finished} of {seeds}"


def write_sweep(results: Mapping[str, Any], output: Path) -> str:
    """Write sweep.json, sweep.csv, sweep.md and sweep.png; what is to be printed.

    Raises:
        RunDirectoryError: ``output`` cannot be written.
    """
    entries, names = results["points"], results["settings"]
    best = entries[0]
    title = f"interquartile mean over seeds [{results['confidence']:.0%} bootstrap interval]"
    notes = [f"note: {note}" for note in results["notes"]]
    trains = f"best: {best['point']}"
    again = shlex.join(["python", "-m", "hypergrad_rl", "report", str(output),
                        *(word for name in names for word in ("--by", name))])  # fmt: skip
    page = [
        "# Sweep", f"`{results['command']}`", title.capitalize(), sweep_table(results),
        *notes, f"{trains}\n\n    {best['command']}", "![the points by rank](sweep.png)",
    ]  # fmt: skip
    rows = [
        {"place": place, **{name: setting_text(entry["values"][name]) for name in names},
         "seeds": entry["seeds"], "finished": len(entry["runs"]),
         **{f"{name}_{key}": value for name in FIGURES for key, value in entry[name].items()},
         "steps_per_second": entry["steps_per_second"], "command": entry["command"]}
        for place, entry in enumerate(entries, 1)
    ]  # fmt: skip
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
        (output / "sweep.json").write_text(text + "\n")
        write_csv(output / "sweep.csv", rows)
        (output / "sweep.md").write_text("\n\n".join(page) + "\n")
        plot_sweep(results, output / "sweep.png")
    except OSError as error:
        raise RunDirectoryError(f"cannot write the sweep into {output}: {error}") from error
    rest = len(entries) - SHOWN
    curves = f"; curves: {again}" if rest <= 0 else ""  # of very many they are not told apart
    more = [f"and {rest} more, in {output / 'sweep.md'}"] if rest > 0 else []
    return "\n\n".join([
        title, "\n".join([sweep_table(results, SHOWN), *more]), "\n".join(notes),
        f"{trains}\n{best['command']}",
        f"picture: {output / 'sweep.png'}; all points, and the command of each: "
        f"{output / 'sweep.md'}, sweep.csv, sweep.json{curves}",
    ])  # fmt: skip


def plot_sweep(results: Mapping[str, Any], path: str | Path) -> None:
    """The best points with every run and their intervals, and a panel for what varies.

    One setting: every point by its value. Two: a map of both. More: by each setting every point,
    and the best and the median of each value.
    """
    entries = results["points"]
    varied = [
        name for name in results["settings"]
        if len({setting_text(entry["values"][name]) for entry in entries}) > 1
    ]  # fmt: skip
    best = entries[:SHOWN]
    panels = 1 if len(varied) <= 2 else len(varied)
    columns = 1 if panels < 4 else 2
    lines = math.ceil(panels / columns)
    height = max(3.8, 1.4 + 0.28 * len(best), 0.8 + 2.4 * lines)
    figure = Figure(figsize=(7 + 3.6 * columns, height), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[6, 1 + 3.6 * columns])
    left, right = parts
    _draw_ranking(left.subplots(), best, varied)
    many = f"the best {SHOWN} of {len(entries)} points" if len(entries) > SHOWN else "points"
    left.suptitle(f"{many} by {FIGURES['final_return']}\ninterquartile mean over seeds, "
                  f"{results['confidence']:.0%} bootstrap interval", fontsize="medium")  # fmt: skip
    if len(varied) == 2:
        right.suptitle("interquartile mean of each point", fontsize="medium")
        _draw_map(right.subplots(), entries, *varied)
    elif varied:
        right.suptitle("interquartile mean of each point by value"
                       + "\norange: the best of each value, dashed: their median"
                       * (panels > 1), fontsize="medium")  # fmt: skip
        places = right.subplots(lines, columns, squeeze=False).flat
        for place in places[panels:]:
            place.set_axis_off()
        for place, name in zip(places, varied, strict=False):
            _draw_setting(place, entries, name)
    figure.savefig(path, dpi=120)


def _draw_ranking(axes: Axes, entries: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> None:
    whole = [len(entry["runs"]) == entry["seeds"] for entry in entries]
    colours = ["C0" if has_all else "C7" for has_all in whole]
    colours[0] = "C1"
    by_name = dict(zip([entry["point"] for entry in entries], colours, strict=True))
    draw_intervals(axes, {e["point"]: e for e in entries}, "final_return", by_name)
    names = []
    for entry, has_all in zip(entries, whole, strict=True):
        name = ", ".join(setting_text(entry["values"][key]) for key in varied) or entry["point"]
        names.append(name if has_all else f"{name} ({_seeds(entry)} seeds)")
    axes.set_yticks(range(len(entries)), names, fontsize="small")
    axes.set(xlabel="return", ylabel=", ".join(varied))


def _values(entries: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The values of a setting by their texts, numbers from the lowest to the highest."""
    values = {setting_text(entry["values"][name]): entry["values"][name] for entry in entries}
    return dict(sorted(values.items(), key=lambda item: _order(item[1])))


def _order(value: Any) -> tuple[int, Any]:
    if _is_number(value):
        return 0, value
    return (1, value) if isinstance(value, tuple) else (2, setting_text(value))


def _draw_setting(axes: Axes, entries: Sequence[Mapping[str, Any]], name: str) -> None:
    values = list(_values(entries, name))
    returns: list[list[float]] = [[] for _ in values]
    for entry in entries:
        if (value := entry["final_return"]["iqm"]) is not None:
            returns[values.index(setting_text(entry["values"][name]))].append(value)
    for place, known in enumerate(returns):
        axes.plot([place] * len(known), known, "o", ms=4, alpha=0.5, color="C0")
    middle = [np.median(known) if known else np.nan for known in returns]
    if max(map(len, returns)) > 1:
        axes.plot(range(len(values)), [max(r, default=np.nan) for r in returns], color="C1")
        axes.plot(range(len(values)), middle, "--", color="C0")
    else:
        axes.plot(range(len(values)), middle, color="C0")
    axes.set_xticks(range(len(values)), values, fontsize="small")
    axes.set(xlabel=name, ylabel="return", xlim=(-0.5, len(values) - 0.5))
    axes.grid(alpha=0.2)


def _draw_map(axes: Axes, entries: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    across, up = list(_values(entries, x)), list(_values(entries, y))
    returns = np.full((len(up), len(across)), np.nan)
    for entry in entries:
        place = (up.index(setting_text(entry["values"][y])),
                 across.index(setting_text(entry["values"][x])))  # fmt: skip
        value = entry["final_return"]["iqm"]
        returns[place] = np.nan if value is None else value
    image = axes.imshow(returns, origin="lower", aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="return")
    if returns.size <= 64:  # more would not be read
        known = returns[~np.isnan(returns)]
        middle = (known.min() + known.max()) / 2 if len(known) else 0.0
        for (row, column), value in np.ndenumerate(returns):
            text = "unknown" if np.isnan(value) else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize="small",
                      color="white" if value < middle else "black")  # fmt: skip
    axes.set_xticks(range(len(across)), across, fontsize="small")
    axes.set_yticks(range(len(up)), up, fontsize="small")
    axes.set(xlabel=x, ylabel=y)
