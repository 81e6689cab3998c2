"""What runs say: summary figures, learning curves, the comparison of several runs.

Two figures are read from metrics.csv, always in the same way:

- the mean return over the last tenth of training: the mean over all episodes that ended in updates
  whose env_steps lie beyond 0.9 of the last one, every episode counting once;
- the area under the curve: the mean over updates of the latest episode_return (an update in which
  no episode ended repeats the one before), so a step of training counts the same whenever it is.

Both are training returns of the stochastic policy; ``evaluate`` measures the greedy one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hypergrad_rl.errors import RunDirectoryError

Metrics = dict[str, NDArray[np.float64]]


def read_metrics(run_dir: str | Path) -> Metrics:
    """metrics.csv as columns; an empty cell (no episode ended) is nan.

    Raises:
        RunDirectoryError: no metrics there.
    """
    path = Path(run_dir) / "metrics.csv"
    if not path.is_file():
        raise RunDirectoryError(f"{run_dir} holds no run: {path} is missing")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise RunDirectoryError(f"{path} has no rows yet; let the run do one update")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


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


def learning_curve(metrics: Metrics, points: int = 100) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and mean return of the episodes that ended in each of ``points`` equal intervals."""
    steps, episodes = metrics["env_steps"], metrics["episodes"]
    edges = np.linspace(0, steps[-1], min(points, len(steps)) + 1)
    bins = np.searchsorted(edges, steps, side="left") - 1
    totals = np.bincount(bins, np.nan_to_num(metrics["episode_return"]) * episodes, len(edges) - 1)
    counts = np.bincount(bins, episodes, len(edges) - 1)
    means = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return edges[1:], _forward_fill(means)


def _forward_fill(values: NDArray[np.float64]) -> NDArray[np.float64]:
    index = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
    return np.where(index >= 0, values[index], np.nan)


def plot_run(run_dir: str | Path) -> Path:
    """Write learning_curve.png of one run; its path."""
    metrics = read_metrics(run_dir)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps", ylabel="episode return")
    axes.plot(metrics["env_steps"], metrics["episode_return"], ".", ms=2, alpha=0.4)
    axes.plot(*learning_curve(metrics, 50))
    path = Path(run_dir) / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path


def plot_comparison(runs: Mapping[str, Sequence[Metrics]], path: str | Path, title: str) -> None:
    """Learning curves of several algorithms: the mean over seeds.

    The band is +- one standard error; a single seed has none.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps", ylabel="episode return", title=title)
    for name, seeds in runs.items():
        curves = [learning_curve(metrics) for metrics in seeds]
        length = min(len(steps) for steps, _ in curves)
        steps, values = curves[0][0][:length], np.stack([c[1][:length] for c in curves])
        mean = values.mean(0)
        (line,) = axes.plot(steps, mean, label=f"{name} ({len(seeds)} seeds)")
        if len(seeds) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(seeds))
            axes.fill_between(
                steps, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0
            )
    axes.legend()
    figure.savefig(path, dpi=120)


def comparison_table(runs: Mapping[str, Sequence[Metrics]]) -> str:
    """One line per algorithm: mean +- standard deviation over seeds of each summary figure."""
    header = ("algorithm", "seeds", "return, last tenth", "area under curve", "steps/s")
    lines = [header]
    for name, seeds in runs.items():
        summaries = [summarize(metrics) for metrics in seeds]
        lines.append(
            (
                name,
                str(len(seeds)),
                _spread([s.final_return for s in summaries], 1),
                _spread([s.area for s in summaries], 1),
                _spread([s.steps_per_second for s in summaries], 0),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(_row(line, widths) for line in lines)


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"
