"""What holds for every Krylov solver on drawn systems; each solver's own file runs these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Status
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SINGULAR,
    SPECTRA,
    Problem,
    Spectrum,
    flat,
    generator,
    problems,
    relative_residual,
    seeds,
    tree_hvp,
    trees,
)

#: Of v: the ends of what each dtype can hold, with room for the division by A.
V_SCALES = {
    F64: (1.0, 3.7, 1e-200, 1e-30, 1e30, 1e200),
    F32: (1.0, 3.7, 1e-22, 1e-12, 1e12, 1e22),
}

#: From a tolerance to a solver; NystromPCG draws its rank itself.
Make = Callable[[float], hypergrad.Solver]


@dataclass(frozen=True)
class System:
    """A drawn matrix, right-hand sides for it, and how accurately it can be solved."""

    problem: Problem
    dtype: torch.dtype
    damping: float
    rows: Tensor
    rtol: float

    @property
    def stored(self) -> Tensor:
        """The matrix that is multiplied, in float64."""
        return self.problem.matrix.to(self.dtype).to(F64)

    def rounding(self, x: Tensor, v: Tensor) -> float:
        """The rounding of one product with x relative to |v|."""
        unit = float(v.abs().max()) or 1.0
        size = float((x.to(F64) / unit).norm()) / (float((v.to(F64) / unit).norm()) or 1.0)
        eps = torch.finfo(self.dtype).eps
        return 8 * self.problem.n * eps * (self.problem.norm + self.damping) * size

    def gap(self, x: Tensor, y: Tensor, v: Tensor) -> float:
        """|(A + damping I)(x - y)| / |v|: how far two answers are apart, as residuals go."""
        unit = float(v.abs().max()) or 1.0
        difference = x.to(F64) / unit - y.to(F64) / unit
        image = self.stored @ difference + self.damping * difference
        return float(image.norm()) / (float((v.to(F64) / unit).norm()) or 1.0)

    def is_singular(self) -> bool:
        """Whether an eigenvalue is zero, and there is no damping."""
        return self.damping == 0 and bool((self.problem.eigenvalues == 0).any())

    def singular_by_rounding(self) -> bool:
        """Whether the damping cancels an eigenvalue: what is left of it is rounding."""
        values = self.problem.eigenvalues
        left = (values + self.damping).abs()
        return self.damping > 0 and bool((left <= 1e-12 * (values.abs() + self.damping)).any())


@st.composite
def systems(
    draw: st.DrawFn, spectra: dict[str, Spectrum] = POSITIVE, *, damped: bool = False
) -> System:
    """Spectra x scales of A x scales of v x dtypes x dampings."""
    problem = draw(problems(spectra, max_dim=10))
    dtype = draw(st.sampled_from(DTYPES))
    choices = [1.0, 1e-2, 1e-4] if damped else [0.0, 1.0, 1e-2]
    damping = draw(st.sampled_from(choices)) * (problem.norm or 1.0)
    source = generator(draw(seeds))
    rows = torch.randn(3, problem.n, generator=source, dtype=F64)
    scale = draw(st.sampled_from(V_SCALES[dtype]))
    rtol = draw(st.sampled_from([1e-2, 1e-4] if dtype == F32 else [1e-2, 1e-5, 1e-8]))
    return System(problem, dtype, damping, (rows * scale).to(dtype), rtol)


def quietly(hvp: Any, v: Any, solver: hypergrad.Solver, **options: Any) -> hypergrad.Solution:
    return hypergrad.solve(hvp, v, solver, on_failure="ignore", **options)


def check_the_status_never_lies(system: System, make: Make, operator: Any = None) -> None:
    v, operator = system.rows[0], system.problem.hvp(system.dtype) if operator is None else operator
    try:
        solution = quietly(operator, v, make(system.rtol), damping=system.damping)
    except hypergrad.NonFiniteError as error:
        # Only where the answer itself is beyond the dtype.
        if system.dtype == F32 and "overflows" in str(error):
            return
        raise
    x, info = solution.value, solution.info
    assert bool(torch.isfinite(x).all())
    assert math.isfinite(info.residual_norm + info.relative_residual)
    outside = relative_residual(system.stored, system.damping, x, v)
    rounding = system.rounding(x, v) + 1e-13
    assert abs(outside - info.relative_residual) <= rounding + 1e-6 * outside
    if info.status is Status.CONVERGED:
        assert outside <= 2 * system.rtol + rounding
    else:
        assert info.status in (
            Status.STAGNATED, Status.NEGATIVE_CURVATURE, Status.MAX_ITERATIONS
        )  # fmt: skip
        assert info.relative_residual > system.rtol
        assert info.relative_residual <= 1.0 + 1e-6 + rounding


def check_scale_invariance(
    system: System, make: Make, of_v: int, of_a: int, *, exact: bool = True
) -> None:
    """Powers of two scale exactly: the same iterations, the same answer to the bit.

    But for a sketch, which takes roots of A: then the answers agree as their tolerance says.
    """
    v, matrix = system.rows[0].double().div(float(system.rows[0].abs().max())), system.stored
    plain = quietly(lambda u: matrix @ u, v, make(system.rtol), damping=system.damping)
    scaled = quietly(
        lambda u: 2.0**of_a * (matrix @ u),
        2.0**of_v * v,
        make(system.rtol),
        damping=2.0**of_a * system.damping,
    )
    assert scaled.info.status is plain.info.status
    back = scaled.value * 2.0 ** (of_a - of_v)
    if exact:
        assert scaled.info.iterations == plain.info.iterations
        assert torch.equal(back, plain.value)
    else:
        rounding = system.rounding(back, v)
        assert system.gap(back, plain.value, v) <= 2.1 * system.rtol + rounding


def check_leaf_order(like: Any, spectrum: str, seed: int, make: Make, damping: float = 0.0) -> None:
    """A dict with its keys in another order is the same vector in another order."""
    n = len(flat(like))
    values = SPECTRA[spectrum](max(n, 2))[:n] + 0.1
    q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=F64))[0]
    matrix = (q * values) @ q.T
    both = {"one": like, "other": torch.ones(2, dtype=F64)}
    turned = {"other": both["other"], "one": like}
    hvp = tree_hvp(matrix, like)

    def times(tree: Any) -> Any:
        return {"one": hvp(tree["one"]), "other": 2.0 * tree["other"]}

    first = quietly(times, both, make(1e-8), damping=damping)
    second = quietly(times, turned, make(1e-8), damping=damping)
    assert list(second.value) == ["other", "one"]
    assert first.info.status is second.info.status is Status.CONVERGED
    difference = flat(first.value["one"]) - flat(second.value["one"])
    size = float(flat(both).norm())
    assert float((matrix @ difference + damping * difference).norm()) <= 2.1e-8 * size
    assert float((first.value["other"] - second.value["other"]).norm()) <= 2.1e-8 * size


def check_a_block_is_its_rows(
    system: System, make: Make, *, undecided: frozenset[Status] = frozenset()
) -> None:
    """``undecided``: of these, rounding decides which a singular system without damping ends in."""
    hvp = system.problem.hvp(system.dtype)
    rows = system.rows.clone()
    rows[1] = 0.0  # a zero column among the others
    try:
        block = quietly(hvp, rows, make(system.rtol), damping=system.damping, batched=True)
    except hypergrad.NonFiniteError:
        assert system.dtype == F32
        return
    assert torch.equal(block.value[1], torch.zeros_like(rows[1]))
    for v, x, column in zip(rows, block.value, block.info.columns, strict=True):
        one = quietly(hvp, v, make(system.rtol), damping=system.damping)
        if column.status is Status.CONVERGED and one.info.status is Status.CONVERGED:
            rounding = system.rounding(x, v) + system.rounding(one.value, v)
            assert system.gap(x, one.value, v) <= 2.1 * system.rtol + rounding
        elif system.dtype == F64 and system.rtol >= 1e-5 and not system.singular_by_rounding():
            ends = {column.status, one.info.status}
            assert len(ends) == 1 or (system.is_singular() and ends <= undecided)


positive_systems = systems()
damped_systems = systems(POSITIVE | SINGULAR, damped=True)
indefinite_systems = st.one_of(systems(POSITIVE), systems(SINGULAR), systems(INDEFINITE))
exponents = st.integers(-60, 60)
float64_trees = trees(F64)
definite_spectra = st.sampled_from(list(POSITIVE))
