"""What runs say: summary figures, learning curves, and the files of a comparison.

Two figures are read from metrics.csv, always in the same way:

- the mean return over the last tenth of training: the mean over all episodes that ended in updates
  whose env_steps lie beyond 0.9 of the last one, every episode counting once;
- the area under the curve: the mean over updates of the latest episode_return (an update in which
  no episode ended repeats the one before), so a step of training counts the same whenever it is.

Both are training returns of the stochastic policy; ``evaluate`` measures the greedy one. What a
comparison of runs holds is made in ``comparison``; here it is drawn and written.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from hypergrad_rl.errors import RunDirectoryError

Metrics = dict[str, NDArray[np.float64]]
FIGURES = {"final_return": "return, last tenth", "area": "area under curve"}
ALL_TASKS = "all tasks"
MANY = 6  # algorithms whose legend would hide their curves: the names beside are in their colours


def read_metrics(run_dir: str | Path) -> Metrics:
    """metrics.csv as columns; an empty cell (no episode ended) is nan.

    A last line without an end, which a run that is being written or was killed may have, is no row.

    Raises:
        RunDirectoryError: no metrics there, or none that can be read.
    """
    path = Path(run_dir) / "metrics.csv"
    if not path.is_file():
        raise RunDirectoryError(f"{run_dir} holds no run: {path} is missing")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    if not rows:
        raise RunDirectoryError(f"{path} has no rows yet; let the run do one update")
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from error


def to_metrics(rows: Sequence[Mapping[str, float]]) -> Metrics:
    """The metrics of a :class:`TrainResult` as columns, as ``read_metrics`` returns them."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Summary:
    """One run in figures; see the module's documentation."""

    final_return: float
    area: float
    steps_per_second: float


def summarize(metrics: Metrics) -> Summary:
    """The summary of a run; nan where no episode has ended."""
    steps, episodes = metrics["env_steps"], metrics["episodes"]
    last = (steps > 0.9 * steps[-1]) & (episodes > 0)
    final = np.nan
    if last.any():
        final = float(np.average(metrics["episode_return"][last], weights=episodes[last]))
    latest = _forward_fill(metrics["episode_return"])
    known = latest[~np.isnan(latest)]
    return Summary(
        final_return=final,
        area=float(known.mean()) if len(known) else np.nan,
        steps_per_second=float(steps[-1] / metrics["seconds"][-1]),
    )


def learning_curve(
    metrics: Metrics, points: int = 100, horizon: float | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and mean return of the episodes that ended in each of ``points`` equal intervals.

    The intervals end at ``horizon`` (default: the last step), are no more than there are updates,
    and repeat the one before where no episode ended.
    """
    horizon = metrics["env_steps"][-1] if horizon is None else horizon
    within = metrics["env_steps"] <= horizon
    steps, episodes = metrics["env_steps"][within], metrics["episodes"][within]
    points = max(1, min(points, len(steps)))
    bins = np.ceil(steps * points / horizon).astype(int) - 1
    returns = np.nan_to_num(metrics["episode_return"][within])
    totals = np.bincount(bins, returns * episodes, points)
    counts = np.bincount(bins, episodes, points)
    means = np.divide(totals, counts, out=np.full(points, np.nan), where=counts > 0)
    return horizon / points * np.arange(1, points + 1), _forward_fill(means)


def _forward_fill(values: NDArray[np.float64]) -> NDArray[np.float64]:
    index = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
    return np.where(index >= 0, values[index], np.nan)


def plot_run(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the learning curve of one run (default: its learning_curve.png); its path."""
    metrics = read_metrics(run_dir)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(
        metrics["env_steps"], metrics["episode_return"], ".", ms=3, alpha=0.6,
        label="mean over the episodes of an update",
    )  # fmt: skip
    axes.plot(*learning_curve(metrics, 50), label="mean over those of a fiftieth of the run")
    axes.legend(
        fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
    )
    path = Path(run_dir) / "learning_curve.png" if path is None else Path(path)
    figure.savefig(path, dpi=120)
    return path


def plot_comparison(results: Mapping[str, Any], path: str | Path) -> None:
    """A row of panels per task: sample-efficiency curves with their band, and both figures.

    A panel of a figure shows every run as a dot, and the interquartile mean with its interval.
    """
    tasks = results["tasks"]
    height = 1.2 + 2.6 * len(tasks)
    figure = Figure(figsize=(11, max(3.8, height)), layout="constrained")
    panels = figure.subplots(len(tasks), 3, squeeze=False, width_ratios=[2, 1, 1])
    labels = list(dict.fromkeys(label for task in tasks.values() for label in task["algorithms"]))
    pairs = matplotlib.colormaps["tab20"]  # ten colours, each dark and light: the dark ones first
    colours = {label: pairs((2 * i + i // 10) % 20) for i, label in enumerate(labels)}
    for (env, task), row in zip(tasks.items(), panels, strict=True):
        _draw_curves(row[0], task["algorithms"], colours)
        row[0].set(xlabel="environment steps", ylabel="episode return", title=env)
        row[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k: six digits overlap
        for axes, (name, title) in zip(row[1:], FIGURES.items(), strict=True):
            draw_intervals(axes, task["algorithms"], name, colours)
            axes.set_title(title)
    band = f"interquartile mean over seeds, {results['confidence']:.0%} bootstrap interval"
    figure.suptitle(band, fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, algorithms: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    for label, entry in algorithms.items():
        curve, seeds = entry["curve"], len(entry["runs"])
        steps, iqm = curve["env_steps"], np.array(curve["iqm"], float)  # None, unknown, is nan
        seeds_text = f"{seeds} seed" + "s" * (seeds > 1)
        axes.plot(steps, iqm, color=colours[label], label=f"{label} ({seeds_text})")
        if curve["low"] is not None:
            low, high = np.array(curve["low"], float), np.array(curve["high"], float)
            axes.fill_between(steps, low, high, color=colours[label], alpha=0.2, lw=0)
    if len(algorithms) <= MANY:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.2)


def draw_intervals(
    axes: Axes, algorithms: Mapping[str, Any], name: str, colours: Mapping[str, Any]
) -> None:
    """A line for each algorithm: its runs as dots, the interquartile mean and the interval."""
    for place, (label, entry) in enumerate(algorithms.items()):
        figure, values = entry[name], np.array([run[name] for run in entry["runs"]], float)
        axes.plot(values, [place - 0.22] * len(values), "o", ms=3, alpha=0.5, color=colours[label])
        if figure["low"] is not None:
            axes.plot([figure["low"], figure["high"]], [place] * 2, lw=6, alpha=0.4,
                      color=colours[label], solid_capstyle="butt")  # fmt: skip
        if figure["iqm"] is not None:
            axes.plot(figure["iqm"], place, "|", ms=14, mew=2, color=colours[label])
    seeds = [f"{label} ({len(entry['runs'])})" for label, entry in algorithms.items()]
    names = seeds if len(algorithms) > MANY else list(algorithms)
    axes.set_yticks(range(len(algorithms)), names, fontsize="small")
    for text, label in zip(axes.get_yticklabels(), algorithms, strict=True):
        text.set_color(colours[label])
    axes.set_ylim(len(algorithms) - 0.5, -0.5)  # in the order of the table
    axes.grid(alpha=0.2, axis="x")


def comparison_table(results: Mapping[str, Any]) -> str:
    """The comparison as text: a table per task, the probabilities of improvement, the notes."""
    percent = f"{results['confidence']:.0%}"
    parts = [f"interquartile mean over seeds [{percent} bootstrap interval]"]
    for env, task in results["tasks"].items():
        header = (env, "seeds", *FIGURES.values(), "steps/s")
        rows = [
            (label, str(len(entry["runs"])), *(estimate_text(entry[name], 1) for name in FIGURES),
             f"{entry['steps_per_second']:.0f}")
            for label, entry in task["algorithms"].items()
        ]  # fmt: skip
        parts.append(f"{_aligned([header, *rows])}\nat {task['env_steps']:,} steps")
    if results["aggregate"] is not None:
        header = (f"{ALL_TASKS}, normalised", *FIGURES.values())
        parts.append(_aligned([
            header,
            *((label, *(estimate_text(entry[name], 3) for name in FIGURES))
              for label, entry in results["aggregate"].items()),
        ]))  # fmt: skip
    if results["improvement"]:
        header = ("probability that a run of the first beats one of the second", *FIGURES.values())
        rows = [
            (f"{pair['env']}: {pair['x']} over {pair['y']}",
             *(estimate_text(pair[name], 2, "probability") for name in FIGURES))
            for pair in results["improvement"]
        ]  # fmt: skip
        parts.append(_aligned([header, *rows]))
    if results["notes"]:
        parts.append("\n".join(f"note: {note}" for note in results["notes"]))
    return "\n\n".join(parts)


def estimate_text(estimate: Mapping[str, float | None], digits: int, key: str = "iqm") -> str:
    """A figure of a comparison with its interval, as text."""
    value, low, high = estimate[key], estimate["low"], estimate["high"]
    if value is None:
        return "unknown"
    if low is None or high is None:
        return f"{value:.{digits}f} (no interval)"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(_row(line, widths) for line in lines)


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])
