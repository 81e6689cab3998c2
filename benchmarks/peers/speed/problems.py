"""The systems of the comparison as arrays in one file.  NumPy only: any process can read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: The errors that times are taken to, and the dtype everybody computes in for each.
LEVELS = {1e-2: "float32", 1e-4: "float32", 1e-8: "float64"}


@dataclass(frozen=True)
class Facts:
    """What is known of a problem beside its arrays.

    Attributes:
        name: as it is shown.
        kind: which loss or product it is: logistic, mlp, cnn, dense or mirror.
        widths: of the layers, for an mlp.
        size: number of unknowns.
        damping: added to A.
        norm: |A|, for the methods that want a step size of their user.
        smallest: smallest eigenvalue of A; damping exceeds its negative part.
        error_bound: bound on the relative error of the reference solution.
        words: for the table.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    size: int
    damping: float
    norm: float
    smallest: float
    error_bound: float
    words: str


@dataclass(frozen=True)
class Problem:
    """A system (A + damping I) x = v; A is the Hessian of a loss at ``arrays["params"]``, or given.

    Attributes:
        facts: see :class:`Facts`.
        arrays: what A is made of: params, inputs and targets; a matrix; or values and mirror.  Real
            ones are in the dtype of the problem and hold float32 numbers in either, so that both
            dtypes have the same solution.
        v: shape (n,).
        truth: shape (n,), float64.
    """

    facts: Facts
    arrays: dict[str, Array]
    v: Array
    truth: Array

    @property
    def dtype(self) -> str:
        """The dtype of the arrays."""
        return str(self.v.dtype)

    def as_dtype(self, dtype: str) -> Problem:
        """The same problem with its real arrays in another dtype."""
        arrays = {
            name: array.astype(dtype) if array.dtype.kind == "f" else array
            for name, array in self.arrays.items()
        }
        return Problem(self.facts, arrays, self.v.astype(dtype), self.truth)

    def relative_error(self, x: Array) -> float:
        """|x - truth| / |truth|; infinite for an answer that is not finite."""
        if x.shape != self.truth.shape or not bool(np.isfinite(x).all()):
            return float("inf")
        wide = x.astype(np.float64)
        return float(np.linalg.norm(wide - self.truth) / np.linalg.norm(self.truth))


def save(problems: Iterable[Problem], path: Path) -> None:
    """Write problems to one file."""
    arrays: dict[str, Array] = {}
    for problem in problems:
        name = problem.facts.name
        arrays[f"{name}|facts"] = np.array(json.dumps(asdict(problem.facts)))
        arrays[f"{name}|v"], arrays[f"{name}|truth"] = problem.v, problem.truth
        arrays |= {f"{name}|array {key}": array for key, array in problem.arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> dict[str, Problem]:
    """Read what :func:`save` wrote, by name."""
    problems = {}
    with np.load(path) as file:
        for entry in file.files:
            name, what = entry.split("|")
            if what != "facts":
                continue
            facts = json.loads(str(file[entry]))
            prefix = f"{name}|array "
            problems[name] = Problem(
                Facts(**{**facts, "widths": tuple(facts["widths"])}),
                {key[len(prefix) :]: file[key] for key in file.files if key.startswith(prefix)},
                file[f"{name}|v"],
                file[f"{name}|truth"],
            )
    return problems
