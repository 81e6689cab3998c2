"""The systems of the atlas: slices through spectrum, condition, damping, dtype and size of v.

A full product would be a hundred thousand solves a solver, most of them alike.  Instead, four
slices:

- ``condition``: five spectra x condition 1 to 1e12, next to no damping (1e-13 |A|: the methods that
  need a positive one stay in);
- ``damping``: seven spectra at their own condition x damping 1e-8 to 1;
- ``size``: |v| from 1e-30 to 1e30 on the 1/i spectrum at damping 1e-2;
- ``curve``: six of these systems, in float64, at products from 5 to 1000.

|A| = 1 throughout, so that a damping is relative to |A|.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SPECTRA = (
    "flat", "clustered", "exponential", "1/i", "rank-deficient", "indefinite", "dead rows",
)  # fmt: skip
#: Those with a condition number to choose.
CONDITIONED = ("flat", "clustered", "exponential", "1/i", "indefinite")
CONDITIONS = (1e0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12)
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2, 1e0)
SIZES = (1e-30, 1e-20, 1e-10, 1e0, 1e10, 1e20, 1e30)
DTYPES = ("float32", "float64")
#: Products allowed in the heat maps: half the dimension.
BUDGET = 100
BUDGETS = (5, 10, 20, 50, 100, 201, 400, 1000)
#: Small beside every eigenvalue of the condition slice.
NEXT_TO_NOTHING = 1e-13


@dataclass(frozen=True)
class Case:
    """One system (A + damping I) x = v.

    Attributes:
        slice: which of the slices it belongs to.
        spectrum: shape of A's spectrum; |A| = 1.
        condition: that of A, or None for the spectrum's own.
        damping: relative to |A|, and so absolute.
        dtype: of the products and of v.
        size: factor on a Gaussian v of norm about 14.
        budgets: products allowed, one solve each.
    """

    slice: str
    spectrum: str
    condition: float | None
    damping: float
    dtype: str
    size: float = 1.0
    budgets: tuple[int, ...] = (BUDGET,)

    @property
    def has_defaults(self) -> bool:
        """Whether solvers are also run at their defaults, at whatever number of products."""
        return self.slice in ("damping", "size")

    @property
    def matrix(self) -> str:
        """Names A; cases that differ in damping or in v share it."""
        condition = "own" if self.condition is None else f"{self.condition:.0e}"
        return f"{self.spectrum}|{condition}|{self.dtype}"


def all_cases() -> Iterator[Case]:
    """Every case, slice by slice."""
    for dtype in DTYPES:
        for spectrum in CONDITIONED:
            for number in CONDITIONS:
                yield Case("condition", spectrum, number, NEXT_TO_NOTHING, dtype)
        for spectrum in SPECTRA:
            for damping in DAMPINGS:
                yield Case("damping", spectrum, None, damping, dtype)
        for size in SIZES:
            yield Case("size", "1/i", None, 1e-2, dtype, size)
    for spectrum, condition, damping in (
        ("flat", 1e4, NEXT_TO_NOTHING),
        ("clustered", 1e6, NEXT_TO_NOTHING),
        ("exponential", None, 1e-4),
        ("1/i", None, 1e-4),
        ("rank-deficient", None, 1e-4),
        ("indefinite", None, 1e-4),
    ):
        yield Case("curve", spectrum, condition, damping, "float64", budgets=BUDGETS)


@dataclass(frozen=True)
class System:
    """A case with its numbers.

    Attributes:
        case: what it is.
        basis: U of A = U diag(values) U', shape (n, r), in the case's dtype.  Products by the
            factors keep the rank and the small eigenvalues that a rounded dense matrix loses.
        values: shape (r,).
        v: shape (n,), in the case's dtype, size included.
        truth: (A + damping I)^-1 v / size, shape (n,), float64.
    """

    case: Case
    basis: Array
    values: Array
    v: Array
    truth: Array

    def dense(self) -> Array:
        """A of these very factors in extended precision, shape (n, n)."""
        basis = self.basis.astype(np.longdouble)
        return (basis * self.values.astype(np.longdouble)) @ basis.T

    def relative_residual(self, x: Array) -> float:
        """|v - (A + damping I) x| / |v| in extended precision."""
        wide, basis = x.astype(np.longdouble), self.basis.astype(np.longdouble)
        image = basis @ (self.values.astype(np.longdouble) * (basis.T @ wide))
        v = self.v.astype(np.longdouble)
        residual = v - image - np.longdouble(self.case.damping) * wide
        return float(np.linalg.norm(residual) / np.linalg.norm(v))

    def relative_error(self, x: Array) -> float:
        """|x - truth| / |truth|."""
        size = np.longdouble(self.case.size)
        gap = x.astype(np.longdouble) / size - self.truth.astype(np.longdouble)
        return float(np.linalg.norm(gap) / np.linalg.norm(self.truth.astype(np.longdouble)))


def make_system(case: Case, basis: Array, values: Array, seed: int = 1) -> System:
    """A system with a seeded Gaussian v, and its solution far below float64 rounding.

    A float64 factorisation alone would be wrong by eps times the condition number, as much as some
    of what it is to judge; iterative refinement with extended residuals is right to the last digit.
    """
    n = len(basis)
    v = (np.random.default_rng(seed).standard_normal(n) * case.size).astype(case.dtype)
    plain = System(case, basis, values, v, np.zeros(n))
    wide = plain.dense() + np.longdouble(case.damping) * np.eye(n)
    target = v.astype(np.longdouble) / np.longdouble(case.size)
    inverse = np.linalg.inv(wide.astype(np.float64))
    x = np.zeros(n, dtype=np.longdouble)
    for _ in range(12):
        x = x + inverse @ (target - wide @ x).astype(np.float64)
    return System(case, basis, values, v, x.astype(np.float64))


def save(systems: list[System], path: Path) -> None:
    """Write systems to one ``.npz`` file; matrices are stored once."""
    arrays: dict[str, Array] = {}
    for number, system in enumerate(systems):
        arrays[f"basis|{system.case.matrix}"] = system.basis
        arrays[f"values|{system.case.matrix}"] = system.values
        arrays[f"v|{number}"], arrays[f"truth|{number}"] = system.v, system.truth
    cases = json.dumps([asdict(system.case) for system in systems])
    np.savez(path, cases=np.array(cases), **arrays)  # type: ignore[arg-type]  # its stub is narrow


def load(path: Path) -> list[System]:
    """Read what :func:`save` wrote."""
    with np.load(path) as file:
        arrays = dict(file)
    systems = []
    for number, fields in enumerate(json.loads(str(arrays["cases"]))):
        case = Case(**{**fields, "budgets": tuple(fields["budgets"])})
        basis, values = arrays[f"basis|{case.matrix}"], arrays[f"values|{case.matrix}"]
        systems.append(
            System(case, basis, values, arrays[f"v|{number}"], arrays[f"truth|{number}"])
        )
    return systems
