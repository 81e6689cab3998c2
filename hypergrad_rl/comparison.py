"""The comparison of finished runs, from their directories, whenever and wherever they were made.

Returns of different tasks are never averaged: tasks stand beside one another, and what is said of
all of them is a probability of improvement, which needs no scale, or is made of returns normalised
by ranges that the user states.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypergrad_rl.errors import ConfigError, RunDirectoryError
from hypergrad_rl.report import (
    ALL_TASKS,
    FIGURES,
    comparison_table,
    learning_curve,
    plot_comparison,
)
from hypergrad_rl.runs import Run, Tasks, find_runs, group_runs
from hypergrad_rl.statistics import Bootstrap, interquartile_mean, probability_of_improvement

FEW_SEEDS = (
    "intervals of fewer than 5 seeds are too short: 95% ones hold the truth about 50% of the time "
    "with 2, 75% with 3, 87% with 4"
)


def compare_runs(
    paths: Sequence[str | Path],
    *,
    by: Sequence[str] = (),
    mix: Sequence[str] = (),
    label: Callable[[Run], str] | None = None,
    steps: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    bootstrap: Bootstrap | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Compare the runs in ``paths``: what results.json holds.

    Args:
        paths: see :func:`find_runs`.
        by: see :func:`group_runs`.
        mix: see :func:`group_runs`.
        label: see :func:`group_runs`.
        steps: see :func:`find_runs`; needed where trainings on a task differ in length.
        ranges: of each task the returns that count as 0 and 1, for figures over all tasks.
        bootstrap: of every interval.
        command: that made this comparison, to be recorded.

    Raises:
        RunDirectoryError, ConfigError: see both; also trainings of different lengths on one task,
            and ranges that are empty or of other tasks.
    """
    bootstrap = bootstrap or Bootstrap()
    runs, left_out = find_runs(paths, steps)
    grouped = group_runs(runs, by, mix, label)
    notes = [f"left out, not finished: {text}" for text in left_out]
    tasks = {}
    for env, algorithms in grouped.items():
        members = [run for runs in algorithms.values() for run in runs]
        lengths = {run.settings["total_steps"]: run for run in members}
        if len(lengths) > 1 and steps is None:
            texts = (f"{n} steps in {run.path}" for n, run in sorted(lengths.items()))
            raise ConfigError(
                f"trainings on {env} differ in length: {', '.join(texts)}; compare them at a "
                f"length that all reached: --steps {min(lengths)}"
            )
        horizon = min(run.metrics["env_steps"][-1] for run in members)
        known = [int((run.metrics["env_steps"] <= horizon).sum()) for run in members]
        points = max(1, min(100, *known))
        tasks[env] = {
            "env_steps": int(horizon),
            "algorithms": {
                label: _describe(runs, points, horizon, bootstrap)
                for label, runs in algorithms.items()
            },
        }
        early = [r for r in members if r.metrics["env_steps"][-1] < r.settings["total_steps"]]
        if early and steps is None:
            notes.append(
                f"{env}: {len(early)} of {len(members)} runs ended early, the first at "
                f"{horizon:,.0f} steps; curves end there, figures are of each run's own length: "
                "--steps compares at one length"
            )
        notes += [note for label, runs in algorithms.items() for note in _notes(env, label, runs)]
    sizes = {len(runs) for algorithms in grouped.values() for runs in algorithms.values()}
    if any(1 < size < 5 for size in sizes):
        notes.append(FEW_SEEDS)
    improvement = _improvement(grouped, bootstrap)
    if any(pair[name]["probability"] in (0, 1) for pair in improvement for name in FIGURES):
        notes.append("where no run of one algorithm comes up to any of the other, the interval of "
                     "the probability has no width, however few the runs")  # fmt: skip
    return {
        "command": command,
        "confidence": bootstrap.confidence, "resamples": bootstrap.resamples,
        "by": list(by), "mix": list(mix), "steps": steps,
        "ranges": {env: list(ends) for env, ends in (ranges or {}).items()},
        "notes": notes,
        "tasks": tasks,
        "aggregate": _aggregate(grouped, ranges, bootstrap) if ranges else None,
        "improvement": improvement,
    }  # fmt: skip


def _returns(runs: Sequence[Run], name: str) -> NDArray[np.float64]:
    return np.array([getattr(run, name) for run in runs])


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)  # JSON has no nan


def _ends(interval: tuple[Any, Any] | None) -> dict[str, float | None]:
    low, high = interval or (np.nan, np.nan)
    return {"low": _number(low), "high": _number(high)}


def describe_runs(runs: Sequence[Run], bootstrap: Bootstrap) -> dict[str, Any]:
    """Both figures of the runs of one thing, with intervals, and those of every run."""
    entry: dict[str, Any] = {}
    for name in FIGURES:
        values = _returns(runs, name)
        entry[name] = {
            "iqm": _number(interquartile_mean(values)),
            **_ends(bootstrap.interval([values])),
            "mean": _number(values.mean()),
            "standard_deviation": _number(values.std(ddof=1)) if len(values) > 1 else None,
        }
    entry["steps_per_second"] = float(_returns(runs, "steps_per_second").mean())
    entry["runs"] = [
        {
            "run_dir": str(run.path), "seed": run.settings["seed"],
            **{name: _number(getattr(run, name)) for name in FIGURES},
            "steps_per_second": run.steps_per_second, "command": run.command,
        }
        for run in runs
    ]  # fmt: skip
    return entry


def _describe(
    runs: Sequence[Run], points: int, horizon: float, bootstrap: Bootstrap
) -> dict[str, Any]:
    entry = describe_runs(runs, bootstrap)
    curves = [learning_curve(run.metrics, points, horizon) for run in runs]
    values = np.stack([returns for _, returns in curves], axis=-1)
    band = bootstrap.interval([values])
    entry["curve"] = {
        "env_steps": curves[0][0].tolist(),
        "iqm": [_number(v) for v in interquartile_mean(values)],
        "low": None if band is None else [_number(v) for v in band[0]],
        "high": None if band is None else [_number(v) for v in band[1]],
    }
    return entry


def _notes(env: str, label: str, runs: Sequence[Run]) -> Iterable[str]:
    if len(runs) == 1:
        yield f"{label} on {env}: 1 seed, so no interval is given; that takes at least 2"
    silent = [run for run in runs if np.isnan(run.final_return)]
    if silent:
        yield (f"{label} on {env}: no episode ended in the last tenth of {len(silent)} of "
               f"{len(runs)} runs, the first {silent[0].path}")  # fmt: skip


def _everywhere(grouped: Tasks) -> list[str]:
    """The algorithms that have runs on every task."""
    first, *rest = grouped.values()
    return [label for label in first if all(label in algorithms for algorithms in rest)]


def _aggregate(
    grouped: Tasks, ranges: Mapping[str, tuple[float, float]], bootstrap: Bootstrap
) -> dict[str, Any]:
    """The interquartile mean of the normalised returns of all runs, drawn anew within tasks."""
    if set(ranges) != set(grouped):
        raise ConfigError(
            f"ranges are given for {', '.join(ranges)}, and the runs are on "
            f"{', '.join(grouped)}: give one --range for each task, or none"
        )
    for env, (low, high) in ranges.items():
        if not -np.inf < low < high < np.inf:
            raise ConfigError(f"--range {env} {low:g} {high:g}: expected a low and a higher return")
    entries: dict[str, Any] = {}
    for label in _everywhere(grouped):
        counts = {env: len(algorithms[label]) for env, algorithms in grouped.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"{label} has {', '.join(f'{n} runs on {env}' for env, n in counts.items())}: a "
                "task of more runs would weigh more; give the same number, or no --range"
            )
        entries[label] = {}
        for name in FIGURES:
            samples = [
                (_returns(grouped[env][label], name) - low) / (high - low)
                for env, (low, high) in ranges.items()
            ]
            entries[label][name] = {
                "iqm": _number(interquartile_mean(*samples)),
                **_ends(bootstrap.interval(samples)),
            }
    return entries


def _improvement(grouped: Tasks, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    scopes = {env: ([algorithms], list(algorithms)) for env, algorithms in grouped.items()}
    if len(grouped) > 1:
        scopes[ALL_TASKS] = (list(grouped.values()), _everywhere(grouped))
    pairs = []
    for scope, (tasks, labels) in scopes.items():
        for x, y in itertools.combinations(labels, 2):
            pair: dict[str, Any] = {"env": scope, "x": x, "y": y}
            for name in FIGURES:
                samples = [_returns(task[label], name) for label in (x, y) for task in tasks]
                ends = bootstrap.interval(samples, probability_of_improvement)
                probability = _number(probability_of_improvement(*samples))
                pair[name] = {"probability": probability, **_ends(ends)}
            pairs.append(pair)
    return pairs


def write_comparison(results: Mapping[str, Any], output: str | Path) -> str:
    """Write results.json, results.csv, runs.csv, comparison.txt and comparison.png; the table.

    They are made anew from runs at any time, so files of an earlier comparison are replaced.

    Raises:
        RunDirectoryError: ``output`` cannot be written.
    """
    output, table = Path(output), comparison_table(results)
    runs = [
        {"env": env, "algorithm": label, **run}
        for env, task in results["tasks"].items()
        for label, entry in task["algorithms"].items()
        for run in entry["runs"]
    ]
    scopes = {env: task["algorithms"] for env, task in results["tasks"].items()}
    scopes[ALL_TASKS] = results["aggregate"] or {}
    figures = [
        {"env": env, "algorithm": label, "seeds": len(entry.get("runs", ())) or None,
         "figure": name, **entry[name]}
        for env, algorithms in scopes.items()
        for label, entry in algorithms.items()
        for name in FIGURES
    ]  # fmt: skip
    commands = "\n".join(run["command"] for run in runs)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_csv(output / "results.csv", figures)
        write_csv(output / "runs.csv", runs)
        (output / "comparison.txt").write_text(f"{table}\n\ncommands of the runs:\n{commands}\n")
        plot_comparison(results, output / "comparison.png")
    except OSError as error:
        raise RunDirectoryError(f"cannot write the comparison into {output}: {error}") from error
    return table


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, named in the first line."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
