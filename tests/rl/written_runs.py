"""Run directories of known returns, written without training."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad_rl import make_config
from hypergrad_rl.statistics import Bootstrap

FAST = Bootstrap(resamples=499)
ROLLOUT = 512


def write_run(
    path: Path, algo: str, seed: int, level: float | Sequence[float], *, updates: int = 20,
    **settings: Any,
) -> Path:  # fmt: skip
    """A run in which the episodes of an update return ``level`` (one for all, or one each)."""
    settings = {"total_steps": ROLLOUT * 20, **settings}
    config = make_config(algo, seed=seed, **settings)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"algo": algo, **dataclasses.asdict(config)}))
    levels = np.broadcast_to(level, updates)  # nan where no episode ends
    rows = [
        {"update": i + 1, "env_steps": (i + 1) * ROLLOUT, "seconds": i + 1.0,
         "episodes": 0 if np.isnan(r) else 2, "episode_return": "" if np.isnan(r) else r}
        for i, r in enumerate(levels)
    ]  # fmt: skip
    with (path / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def write_runs(
    root: Path, algo: str, levels: Sequence[float], prefix: str = "", **settings: Any
) -> None:
    for seed, level in enumerate(levels):
        write_run(root / f"{prefix}{algo}-{seed}", algo, seed, level, **settings)
