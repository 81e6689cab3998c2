"""Grids of hyper-parameters: read from words, and laid out as run directories.

A point of a grid is one combination of values. Its runs, a seed each, lie in a directory named by
the values, in the configuration's order: the same point has the same directory in every grid.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypergrad_rl.config import hyper_parameters, read_setting, setting_text
from hypergrad_rl.errors import ConfigError
from hypergrad_rl.presets import preset
from hypergrad_rl.run_directory import Config

#: What a grid does not have, and why.
_ELSEWHERE = {
    "env": "returns of different tasks are not ranked; sweep each task by itself",
    "seed": "the seeds of every point are given by --seeds",
    "algo": "an algorithm is given by --algo; `compare` sets several side by side",
    "total_steps": "trainings of different length are not ranked; the length of all is given by "
    "--total-steps",
}
LONGEST = 255  # bytes of a directory's name, in the file systems of today


@dataclass(frozen=True)
class Point:
    """One combination of values: what it sets, and a configuration for each run directory."""

    values: dict[str, Any]
    runs: dict[Path, Config]

    @property
    def name(self) -> str:
        """The settings as words."""
        return " ".join(f"{name}={setting_text(value)}" for name, value in self.values.items())


def read_grid(algo: str, words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each hyper-parameter, from words as ``nested_steps=1,5,10``.

    Raises:
        ConfigError: a word of another form, a name that ``algo`` does not have, a value that the
            hyper-parameter cannot have, or one that is given twice.

    >>> read_grid("blpo", ["solver=cg,exact", "nested-steps=1,5"])
    {'nested_steps': [1, 5], 'solver': ['cg', 'exact']}
    """
    known = hyper_parameters(algo)
    if not words:
        raise ConfigError("--grid: expected one or more, such as --grid learning_rate=1e-4,3e-4")
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, texts = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ConfigError(f"--grid {word}: expected NAME=VALUE,VALUE")
        if name in _ELSEWHERE:
            raise ConfigError(f"--grid {word}: {_ELSEWHERE[name]}")
        if name not in known:
            raise ConfigError(f"--grid {word}: {_no_such(name, algo, known)}")
        if name in grid:
            raise ConfigError(f"--grid {word}: {name} is given twice; expected all values in one")
        try:
            values = [read_setting(algo, name, text.strip()) for text in texts.split(",")]
        except ConfigError as error:
            raise ConfigError(f"--grid {word}: {error}") from error
        if len(set(values)) < len(values):
            widths = " (widths of one network are joined as in 64x64)" * (name == "hidden")
            raise ConfigError(f"--grid {word}: expected each value once{widths}")
        grid[name] = values
    return {name: grid[name] for name in known if name in grid}


def _no_such(name: str, algo: str, known: Sequence[str]) -> str:
    open_to = [other for other in known if other not in _ELSEWHERE]
    # lr is what most others call it.
    whole = "_".join("learning_rate" if part == "lr" else part for part in name.split("_"))
    near = difflib.get_close_matches(whole, open_to, cutoff=0.65)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(open_to)}"
    return f"{algo} has no hyper-parameter {name}; {hint}"


def plan(
    words: Sequence[str], run_dir: Path, seeds: Sequence[int], *, algo: str, env: str, style: str,
    fixed: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """Every point of a grid, the values of the last hyper-parameter changing first.

    Args:
        words: see :func:`read_grid`.
        run_dir: the directory above those of the points.
        seeds: of the runs of each point.
        algo: "ppo", "nested" or "blpo".
        env: the environment's id.
        style: of the preset.
        fixed: hyper-parameters of all points.

    Raises:
        ConfigError: see :func:`read_grid` and :func:`preset`; also a hyper-parameter that is in the
            grid and fixed.
    """
    grid = read_grid(algo, words)
    for name in grid:
        if name in fixed:
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} is in the grid and given as --{flag}: expected one of both")
    points = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        directory = ",".join(f"{name}={setting_text(value)}" for name, value in values.items())
        if len(directory) > LONGEST:
            raise ConfigError(
                f"a grid of {len(grid)} hyper-parameters, {directory}: expected at most {LONGEST} "
                "characters in the name of a point; sweep fewer at a time"
            )
        runs: dict[Path, Config] = {
            run_dir / directory / f"{algo}-{seed}":
            preset(algo, env, style, seed=seed, **fixed, **values)
            for seed in seeds
        }  # fmt: skip
        points.append(Point(values, runs))
    return points
