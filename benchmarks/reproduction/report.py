"""The report on the finished runs: statistics, pictures, and what the updates did, as files."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduction.arms import ARMS, TASKS
from benchmarks.reproduction.training import PROVENANCE
from hypergrad_rl import BLPOConfig, RunDirectoryError, load_config
from hypergrad_rl.comparison import compare_runs, write_comparison
from hypergrad_rl.report import FIGURES, estimate_text, read_metrics
from hypergrad_rl.runs import Run
from hypergrad_rl.statistics import Bootstrap, probability_of_improvement

RIVALS = ("nested", "ppo")
#: Runs of the authors' program, made by the module of that name; and the arm that is the same.
AUTHORS = Path(__file__).with_name("authors.csv")
SAME = {
    "ppo": "paper_ppo",
    "nested": "paper_nested",
    "nystrom": "paper_nystrom",
    "cg": "paper_cg",
}
Row = dict[str, Any]


def write_report(root: Path, output: Path, mix: Sequence[str] = ()) -> str:
    """The files of :func:`write_comparison`, and those of the page; the table of the comparison.

    arms.csv has what each arm is, TASK.csv its figures, instrumentation.csv what its updates did,
    authors.csv the authors' own program beside it, provenance.csv the code that made each run. All
    of it is of the finished runs below ``root``. ``mix`` names settings that runs of one arm may
    differ in: those that older runs did not record.
    """
    paths = [
        path.parent
        for task in TASKS
        for arm in ARMS
        for path in sorted(root.glob(f"{arm}/{task}/*/{PROVENANCE}"))
    ]
    if not paths:
        raise RunDirectoryError(f"{root} holds no finished run of this comparison")
    results = compare_runs(
        paths,
        label=_arm,
        mix=mix,
        command=f"python -m benchmarks.reproduction report --run-dir {root}"
        + "".join(f" --mix {name}" for name in mix),
    )
    table = write_comparison(results, output)
    _write(output / "provenance.csv", [
        {"task": path.parts[-2], "arm": path.parts[-3], "seed": int(path.name), **_provenance(path)}
        for path in paths
    ])  # fmt: skip
    _write(output / "arms.csv", [
        {"arm": name, "is": arm.what, "settings": " ".join(f"{k}={v}" for k, v in
         {"preset": arm.presets, **arm.settings}.items())} for name, arm in ARMS.items()
    ])  # fmt: skip
    for task, entry in results["tasks"].items():
        arms = entry["algorithms"]
        _write(output / f"{task}.csv", [_summary(arms, arm) for arm in arms])
    _write(output / "instrumentation.csv", _instrumentation(paths))
    if AUTHORS.exists():
        with AUTHORS.open(newline="") as file:
            _write(output / "authors.csv", _beside_authors(results, list(csv.DictReader(file))))
    return table


def _arm(run: Run) -> str:
    return run.path.parts[-3]


def _provenance(run_dir: str | Path) -> Row:
    entry: Row = json.loads((Path(run_dir) / PROVENANCE).read_text())
    return entry


def _summary(arms: Mapping[str, Any], arm: str) -> Row:
    final, area = arms[arm]["final_return"], arms[arm]["area"]
    row = {
        "arm": arm,
        "seeds": len(arms[arm]["runs"]),
        "mean return, last tenth": _number(final["mean"], ".1f"),
        "sd": _number(final["standard_deviation"], ".1f"),
        "interquartile mean": estimate_text(final, 1),
        "area under curve": estimate_text(area, 1),
    }
    for rival, name in itertools.product(RIVALS, FIGURES):
        known = rival in arms and rival != arm
        row[f"P({FIGURES[name]} > {rival})"] = (
            _better(_values(arms[arm], name), _values(arms[rival], name)) if known else ""
        )
    # Of a run that was continued only the last part is known.
    made = [_provenance(run["run_dir"]) for run in arms[arm]["runs"]]
    cpu_seconds = [entry["cpu_seconds"] for entry in made if not entry["resumed"]]
    row["CPU s"] = _number(np.mean(cpu_seconds) if cpu_seconds else None, ".0f")
    return row


def _number(value: Any, form: str) -> str:
    return "" if value is None or np.isnan(value) else format(value, form)


def _values(entry: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    return np.array([run[name] for run in entry["runs"]], float)  # None, unknown, is nan


def _better(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """The probability that a run of x beats one of y."""
    ends = Bootstrap().interval([x, y], probability_of_improvement)
    low, high = (None, None) if ends is None else map(float, ends)
    probability = float(probability_of_improvement(x, y))
    return estimate_text({"p": probability, "low": low, "high": high}, 2, "p")


def _beside_authors(results: Mapping[str, Any], theirs: Sequence[Row]) -> list[Row]:
    """The returns of the authors' program, which has environments of its own, beside ours."""
    rows = []
    for task in TASKS:
        for algorithm, arm in SAME.items():
            made = np.array([
                float(row["final_return"])
                for row in theirs
                if (row["task"], row["algorithm"]) == (task, algorithm)
            ])  # fmt: skip
            entry = results["tasks"].get(task, {}).get("algorithms", {}).get(arm)
            if len(made) == 0:
                continue
            ours = None if entry is None else _values(entry, "final_return")
            row: Row = {
                "task": task, "algorithm": algorithm, "seeds": len(made),
                "mean return, last tenth": _number(made.mean(), ".1f"),
                "lowest": _number(made.min(), ".1f"), "highest": _number(made.max(), ".1f"),
                "arm here": arm,
                "its mean": "" if ours is None else _number(ours.mean(), ".1f"),
                "P(here better)": "" if ours is None else _better(ours, made),
            }  # fmt: skip
            rows.append(row)
    return rows


def _instrumentation(paths: Iterable[Path]) -> list[Row]:
    """What the correction did, per task and arm: medians over the updates of all seeds."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in paths:
        config = load_config(path)
        if isinstance(config, BLPOConfig) and config.solver != "none":
            groups.setdefault((path.parts[-2], path.parts[-3]), []).append(path)
    rows = []
    for (task, arm), members in groups.items():
        metrics = [read_metrics(path) for path in members]
        columns = {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}
        config = load_config(members[0])
        assert isinstance(config, BLPOConfig)
        effects = [_provenance(path).get("solver_effect") for path in members]
        rows.append({
            "task": task, "arm": arm, "seeds": len(members), "bound": config.correction_bound,
            "bound active": _number(np.nanmean(columns["bound_active"]), ".2%"),
            "norm of c over d": _median(columns["correction_ratio"]),
            "cosine of c and d": _median(columns["correction_cosine"]),
            "relative residual": _median(columns["ihvp_relative_residual"]),
            "change of x against v / damping": _median(np.array(effects, float)),
        })  # fmt: skip
    return rows


def _median(values: Any) -> str:
    known = values[~np.isnan(values)]
    return _number(np.median(known) if len(known) else None, ".3g")


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        table = csv.DictWriter(file, list(names), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
