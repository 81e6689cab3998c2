"""What is trained: the arms of the comparison, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypergrad_rl import BLPOConfig, ConfigError, PPOConfig, make_config, preset

Config = PPOConfig | BLPOConfig


@dataclass(frozen=True)
class Arm:
    """An algorithm and its settings: over the task's preset, or over the plain defaults."""

    what: str
    algo: str
    settings: dict[str, Any] = field(default_factory=dict)
    presets: bool = True
    style: str = "tuned"


#: The published update (arXiv 2505.11714), where all else is a default; its bound is a task's own.
#: As in the public code, a time limit ends an episode like any other end, the core of the sketch is
#: shifted by 1, and the columns are drawn once.
PUBLISHED: dict[str, Any] = {
    "cross_term": "paper", "outer_objective": "advantage", "curvature": "hessian",
    "damping": 50.0, "nested_steps": 10, "bootstrap_truncated": False,
}  # fmt: skip
COLUMNS = {"sketch": "columns", "rank": 5, "sketch_shift": 1.0, "redraw_sketch": False}
BOUNDS = {"CartPole-v1": 1.4, "Acrobot-v1": 0.5}

# CG with a fixed number of iterations, as published, looks at no value: it compiles whole.
ARMS = {
    "ppo_paper_rate": Arm(
        "PPO, the actor's rate for the critic too", "ppo", {"critic_learning_rate": 2.5e-4}
    ),
    "ppo": Arm("PPO with BLPO's networks and critic rate", "ppo"),
    "nested": Arm("BLPO without the correction", "nested"),
    "blpo": Arm("BLPO by default: Nyström, Gauss-Newton, return objective", "blpo"),
    "blpo_cg": Arm("the same by 20 steps of CG", "blpo", {"solver": "cg", "cg_rtol": 0.0}),
    "identity": Arm("the same with x = v / damping", "blpo", {"solver": "identity"}),
    "fast": Arm(
        "the fast settings: one epoch, by five steps of CG; Acrobot four, solved exactly",
        "blpo", style="fast",
    ),
    "paper_ppo": Arm(
        "PPO at the actor's rate, where time limits are ends, as published", "ppo",
        {"critic_learning_rate": 2.5e-4, "bootstrap_truncated": False}, presets=False,
    ),
    "paper_nested": Arm(
        "Nested PPO, where time limits are ends, as published", "nested",
        {"bootstrap_truncated": False}, presets=False,
    ),
    "paper_nystrom": Arm(
        "the published update: 5 columns of the Hessian", "blpo",
        {**PUBLISHED, **COLUMNS, "solver": "nystrom"}, presets=False,
    ),
    "paper_cg": Arm(
        "the published update by 20 steps of CG", "blpo",
        {**PUBLISHED, "solver": "cg", "cg_rtol": 0.0}, presets=False,
    ),
}  # fmt: skip
#: The tasks, their length for arms without presets, and the arms that they are compared by.
TASKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "CartPole-v1": (500_000, tuple(ARMS)),
    "Acrobot-v1": (400_000, tuple(ARMS)),
    "Hopper-v5": (1_000_000, ("ppo", "nested", "blpo")),
    "HalfCheetah-v5": (1_000_000, ("ppo", "nested", "blpo", "fast")),
}


def arm_config(arm: str, task: str, seed: int, **settings: Any) -> Config:
    """The configuration of a run; ``settings`` override the arm's."""
    declared = ARMS[arm]
    settings = {**declared.settings, "seed": seed, **settings}
    if declared.presets:
        return preset(declared.algo, task, declared.style, **settings)
    settings = {"total_steps": TASKS[task][0], **settings}
    if declared.algo == "blpo":
        settings = {"correction_bound": BOUNDS[task], **settings}
    return make_config(declared.algo, env=task, **settings)


def plan(
    root: Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    arms: Sequence[str] | None = None,
    **settings: Any,
) -> dict[Path, Config]:
    """The runs, ROOT/ARM/TASK/SEED each: seed by seed, so that a part of them is balanced."""
    for task in tasks:
        absent = [arm for arm in arms or () if arm not in TASKS[task][1]]
        if absent:
            raise ConfigError(
                f"{', '.join(absent)}: not compared on {task}; expected some of "
                f"{', '.join(TASKS[task][1])}"
            )
    return {
        root / arm / task / str(seed): arm_config(arm, task, seed, **settings)
        for seed in seeds
        for task in tasks
        for arm in arms or TASKS[task][1]
    }
