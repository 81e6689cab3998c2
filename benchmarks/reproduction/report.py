"""The report on the finished runs: statistics, pictures, and what the updates did, as files."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reproduction.arms import ARMS, TASKS
from benchmarks.reproduction.training import PROVENANCE
from hypergrad_rl import BLPOConfig, RunDirectoryError, load_config
from hypergrad_rl.blpo import inverse_hvp, outer_gradients, sketch_rows
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.comparison import compare_runs, write_comparison
from hypergrad_rl.envs import VectorEnv
from hypergrad_rl.functional import flatten
from hypergrad_rl.report import estimate_text, read_metrics
from hypergrad_rl.rollout import Collector
from hypergrad_rl.run_directory import CHECKPOINT
from hypergrad_rl.runs import Run
from hypergrad_rl.trainer import make_agent

RIVALS = ("nested", "ppo")
Row = dict[str, Any]


def write_report(root: Path, output: Path) -> str:
    """The files of :func:`write_comparison`, and those of the page; the table of the comparison.

    arms.csv has what each arm is, TASK.csv its figures, instrumentation.csv what its updates did,
    provenance.csv the code that made each run. All of it is of the finished runs below ``root``.
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
        paths, label=_arm, command=f"python -m benchmarks.reproduction report --run-dir {root}"
    )
    table = write_comparison(results, output)
    provenance = [
        {"task": path.parts[-2], "arm": path.parts[-3], "seed": int(path.name),
         **json.loads((path / PROVENANCE).read_text())}
        for path in paths
    ]  # fmt: skip
    _write(output / "provenance.csv", provenance)
    _write(output / "arms.csv", [
        {"arm": name, "": arm.what, "settings": " ".join(f"{k}={v}" for k, v in
         {"preset": arm.presets, **arm.settings}.items())} for name, arm in ARMS.items()
    ])  # fmt: skip
    for task, entry in results["tasks"].items():
        rows = [
            _summary(results, task, arm, figures, provenance)
            for arm, figures in entry["algorithms"].items()
        ]
        _write(output / f"{task}.csv", rows)
    _write(output / "instrumentation.csv", _instrumentation(paths))
    return table


def _arm(run: Run) -> str:
    return run.path.parts[-3]


def _summary(
    results: Mapping[str, Any], task: str, arm: str, entry: Mapping[str, Any], made: Sequence[Row]
) -> Row:
    final, area = entry["final_return"], entry["area"]
    cpu = [
        row["cpu_seconds"]
        for row in made
        if (row["task"], row["arm"], row["resumed"]) == (task, arm, False)
    ]
    return {
        "arm": arm,
        "seeds": len(entry["runs"]),
        "mean return, last tenth": _number(final["mean"], ".1f"),
        "standard deviation": _number(final["standard_deviation"], ".1f"),
        "interquartile mean": estimate_text(final, 1),
        **{
            f"P(better than {rival})": _improvement(results, task, arm, rival, "final_return")
            for rival in RIVALS
        },
        "area under the curve": estimate_text(area, 1),
        "P(larger area than nested)": _improvement(results, task, arm, "nested", "area"),
        "CPU s": _number(np.mean(cpu) if cpu else None, ".0f"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None or np.isnan(value) else format(value, form)


def _improvement(results: Mapping[str, Any], task: str, arm: str, rival: str, name: str) -> str:
    """Of ``arm`` over ``rival``, whichever of the two the comparison lists first."""
    for pair in results["improvement"]:
        if pair["env"] == task and {pair["x"], pair["y"]} == {arm, rival}:
            estimate = pair[name]
            if pair["y"] == arm:
                estimate = {
                    key: None if estimate[other] is None else 1 - estimate[other]
                    for key, other in (
                        ("probability", "probability"), ("low", "high"), ("high", "low")
                    )
                }  # fmt: skip
            return estimate_text(estimate, 2, "probability")
    return ""


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
        effects = np.array([solver_effect(path) for path in members])
        rows.append({
            "task": task, "arm": arm, "seeds": len(members), "bound": config.correction_bound,
            "bound active": _number(np.nanmean(columns["bound_active"]), ".2%"),
            "norm of c over d": _median(columns["correction_ratio"]),
            "cosine of c and d": _median(columns["correction_cosine"]),
            "relative residual": _median(columns["ihvp_relative_residual"]),
            "change of x against v / damping": _median(effects),
        })  # fmt: skip
    return rows


def _median(values: Any) -> str:
    known = values[~np.isnan(values)]
    return _number(np.median(known) if len(known) else None, ".3g")


def solver_effect(run_dir: Path) -> float:
    """|x - v / damping| / |v / damping| for the trained agent: the median over the trajectories
    of one rollout, with x in the space of the critic's parameters."""
    config = load_config(run_dir)
    assert isinstance(config, BLPOConfig)
    state, generator = load_checkpoint(run_dir / CHECKPOINT), torch.Generator().manual_seed(0)
    env = VectorEnv(config.env, config.num_envs)
    agent, collector = make_agent(config, env, generator), Collector(env, config, generator)
    agent.load_state_dict(state["agent"])
    collector.load_statistics(state["collector"])
    batch = agent.make_batch(collector.collect(agent.actor)[0])
    env.close()
    # The system in the parameters, as for the published cross term: there the answer is x itself.
    whole = dataclasses.replace(config, cross_term="paper")
    size, changes = agent.critic_state.params.numel(), []
    for i in range(config.num_envs):
        trajectory = batch.select(torch.tensor([i]))
        v = outer_gradients(env.policy, agent.actor, agent.critic, trajectory, config)[1]
        omega = sketch_rows(whole, config.num_steps, size, generator)
        x, null = flatten(inverse_hvp(agent.critic, trajectory, v, whole, omega)[0]), flatten(v)
        changes.append(float((config.damping * x - null).norm() / null.norm()))
    return float(np.median(changes))


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["arm"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
