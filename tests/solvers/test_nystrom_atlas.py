"""What the Nyström solver promises on every spectrum, in float32 as in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Nystrom
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SINGULAR,
    Problem,
    dense_solve,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    relative_error,
    seeds,
    symmetric,
)

KINDS: tuple[Any, ...] = ("gaussian", "columns", "diagonal", "structured")
every_kind = pytest.mark.parametrize("kind", KINDS)

#: Eigenvalues by dimension; "dead rows" lives on a fifth of the coordinates.
ATLAS = {
    "flat": lambda n: torch.linspace(1.0, 0.5, n, dtype=F64),
    "clustered": lambda n: torch.tensor([1.0, 1e-2, 1e-4], dtype=F64)[torch.arange(n) * 3 // n],
    "exponential": lambda n: torch.exp(-torch.arange(n, dtype=F64) / 4),
    "1/i": lambda n: 1.0 / torch.arange(1, n + 1, dtype=F64),
    "rank-deficient": lambda n: torch.logspace(0, -2, n // 4, dtype=F64),
    "indefinite": lambda n: (
        torch.where(torch.arange(n) % 4 == 3, -1.5, 1.5) / (torch.arange(n, dtype=F64) + 1.5)
    ),
    "dead rows": lambda n: torch.logspace(0, -2, n // 5, dtype=F64),
}


class Factored:
    """U diag(l) U' by its rounded factors: in float32 a low rank stays exact."""

    def __init__(self, spectrum: str, n: int, seed: int) -> None:
        values = ATLAS[spectrum](n)
        rows = len(values) if spectrum == "dead rows" else n
        basis = torch.zeros(n, len(values), dtype=F64)
        basis[:rows] = torch.linalg.qr(gaussian(rows, len(values), seed=seed)).Q
        # Both dtypes multiply by the same numbers.
        self.basis, self.values = basis.to(F32), values.to(F32)
        wide = self.basis.to(F64)
        self.matrix = (wide * self.values.to(F64)) @ wide.T

    def hvp(self, dtype: torch.dtype) -> Any:
        basis, values = self.basis.to(dtype), self.values.to(dtype)
        return lambda v: basis @ (values * (basis.T @ v))


@pytest.mark.parametrize("spectrum", ATLAS)
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [4, 12, 20])
def test_float32_is_as_good_as_float64(spectrum: str, relative: float, rank: int) -> None:
    n = 40
    for seed in range(5):
        problem = Factored(spectrum, n, seed)
        v = gaussian(n, seed=seed + 1).to(F32)
        expected = dense_solve(problem.matrix, v, relative)
        errors = []
        for dtype in DTYPES:
            solver = Nystrom(rank, generator=generator(seed))
            x = hypergrad.solve(
                problem.hvp(dtype), v.to(dtype), solver, damping=relative, on_failure="ignore"
            ).value
            errors.append(relative_error(x, expected))
        rounding = 3 * torch.finfo(F32).eps / relative
        # The answer itself is rounded to float32.
        assert errors[0] <= max(2 * errors[1], rounding) + torch.finfo(F32).eps


@quick_and_thorough
@every_kind
@given(
    problem=problems(POSITIVE | SINGULAR), seed=seeds, data=st.data(),
    relative=st.sampled_from([1e-8, 1e-6, 1e-3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    complement=st.sampled_from(["quadrature", "zero"]),
)  # fmt: skip
def test_the_map_is_symmetric_positive_definite_and_bounded_by_the_damping(
    effort: str, kind: Any, problem: Problem, seed: int, data: st.DataObject, relative: float,
    dtype: torch.dtype, complement: Any,
) -> None:  # fmt: skip
    n = problem.n
    rank = data.draw(st.integers(1, n))
    damping = relative * (problem.norm or 1.0)
    made = hypergrad.nystrom_sketch(
        problem.matrix.to(dtype), rank, sketch=kind, generator=generator(seed),
        complement=complement,
    )  # fmt: skip
    inverse = made.solve_block(torch.eye(n, dtype=F64), damping)
    assert float((inverse - inverse.T).norm()) * damping <= 1e-12 * n
    values = torch.linalg.eigvalsh(0.5 * (inverse + inverse.T)) * damping
    assert float(values[-1]) <= 1 + 1e-12 * n
    # 1/(l + damping) with l no more than the largest eigenvalue of A, in the sketch and outside;
    # the first is held to that within a hundredth, for the rounding that an unlucky draw amplifies.
    largest = problem.norm * (1 + 1e-2)
    assert float(values[0]) >= damping / (damping + largest) - 1e-12 * n
    assert made.smallest_eigenvalue >= 0


@quick_and_thorough
@every_kind
@given(problem=problems(POSITIVE | SINGULAR), seed=seeds, data=st.data())
def test_interpolation(
    effort: str, kind: Any, problem: Problem, seed: int, data: st.DataObject
) -> None:
    from hypergrad.solvers.embedding import Embedding

    n = problem.n
    rank = data.draw(st.integers(1, n))
    diagonal = problem.matrix.diagonal() if kind == "diagonal" else None
    made = hypergrad.nystrom_sketch(
        problem.matrix, rank, sketch=kind, generator=generator(seed), diagonal=diagonal,
        complement="zero",
    )  # fmt: skip
    omega = Embedding(kind, generator(seed), n, torch.device("cpu"), F64, diagonal).rows(rank)
    assert float((omega @ omega.T - torch.eye(rank, dtype=F64)).norm()) <= 1e-12 * n
    gap = (omega @ made.basis.T * made.eigenvalues) @ made.basis - omega @ problem.matrix
    # A direction of the core within rounding is dropped, and with it products up to its root.
    assert float(gap.norm()) <= 10 * (n * torch.finfo(F64).eps) ** 0.5 * problem.norm


@quick_and_thorough
@every_kind
@given(problem=problems(POSITIVE | SINGULAR), seed=seeds)
def test_more_rows_never_make_it_worse(effort: str, kind: Any, problem: Problem, seed: int) -> None:
    # A - A_nys is the Schur complement of the rows: more of them, and it falls in every direction.
    from hypergrad.solvers.base import DampedSystem
    from hypergrad.solvers.embedding import Embedding
    from hypergrad.solvers.sketch import bare_system
    from hypergrad.solvers.sketching import _approximate

    n = problem.n
    rows = Embedding(kind, generator(seed), n, torch.device("cpu"), F64, problem.matrix.diagonal())
    omega = torch.zeros(0, n, dtype=F64)
    before = problem.matrix
    slack = 20 * (n * torch.finfo(F64).eps) ** 0.5 * problem.norm
    while len(omega) < n:
        omega = torch.cat([omega, rows.rows(min(1 + len(omega), n - len(omega)))])
        system: DampedSystem = bare_system(problem.matrix)
        found = _approximate(system, omega, system.product(omega), kind)
        rest = problem.matrix - (found.basis.T * found.eigenvalues) @ found.basis
        assert float(torch.linalg.eigvalsh(before - rest)[0]) >= -slack
        before = rest


@quick_and_thorough
@every_kind
@given(
    problem=problems(POSITIVE | SINGULAR | INDEFINITE), seed=seeds, power=st.integers(-90, 90),
    relative=st.sampled_from([1e-4, 1.0]),
)  # fmt: skip
def test_scaling_of_the_operator_scales_the_answer(
    effort: str, kind: Any, problem: Problem, seed: int, power: int, relative: float
) -> None:
    # By powers of two the arithmetic is the same to the bit, but for the damping.
    scale, v = 2.0**power, gaussian(problem.n, seed=seed)
    damping = relative * (problem.norm or 1.0)

    def answer(factor: float) -> Tensor:
        solver = Nystrom(max(1, problem.n // 2), kind, generator(seed))
        return hypergrad.solve(
            factor * problem.matrix, v, solver, damping=factor * damping, on_failure="ignore"
        ).value

    torch.testing.assert_close(scale * answer(scale), answer(1.0), rtol=1e-8, atol=0)


@every_kind
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scaling_of_v_scales_the_answer(kind: Any, scale: float) -> None:
    matrix = symmetric(POSITIVE["inverse"](30), seed=1).matrix
    v = gaussian(30, seed=2)
    base, scaled = (
        hypergrad.solve(
            matrix, factor * v, Nystrom(8, kind, generator(0)), damping=1e-3, on_failure="ignore"
        ).value
        for factor in (1.0, scale)
    )
    torch.testing.assert_close(scaled / scale, base, rtol=1e-10, atol=0)


def test_a_gaussian_sketch_is_the_same_in_every_basis_in_distribution() -> None:
    # Error of the answer for A and for QAQ', two samples: Kolmogorov and Smirnov at 1 in 10,000.
    from scipy.stats import ks_2samp

    n, diagonal = 20, torch.diag(POSITIVE["inverse"](20))
    turn = torch.linalg.qr(gaussian(n, n, seed=5)).Q
    samples = []
    for offset, basis in ((0, torch.eye(n, dtype=F64)), (10_000, turn)):
        matrix = basis @ diagonal @ basis.T
        v = basis @ torch.ones(n, dtype=F64)
        expected = dense_solve(matrix, v, 1e-2)
        samples.append(
            [
                relative_error(
                    hypergrad.solve(
                        matrix, v, Nystrom(4, generator=generator(offset + seed)), damping=1e-2,
                        on_failure="ignore",
                    ).value,
                    expected,
                )
                for seed in range(120)
            ]
        )  # fmt: skip
    assert ks_2samp(*samples).pvalue > 1e-4
    # The same test tells columns apart, which see a diagonal matrix for what it is.
    columns = [
        relative_error(
            hypergrad.solve(
                diagonal, torch.ones(n, dtype=F64), Nystrom(4, "columns", generator(seed)),
                damping=1e-2, on_failure="ignore",
            ).value,
            dense_solve(diagonal, torch.ones(n, dtype=F64), 1e-2),
        )
        for seed in range(120)
    ]  # fmt: skip
    assert ks_2samp(samples[0], columns).pvalue < 1e-4


@every_kind
def test_the_order_of_the_leaves_changes_nothing_at_full_rank(kind: Any) -> None:
    problem = symmetric(POSITIVE["inverse"](5), seed=1)
    order = torch.tensor([3, 4, 0, 1, 2])
    v = gaussian(5, seed=2)
    x = hypergrad.nystrom_ihvp(problem.matrix, v, rank=5, damping=0.1, sketch=kind)
    turned = problem.matrix[order][:, order]
    y = hypergrad.nystrom_ihvp(turned, v[order], rank=5, damping=0.1, sketch=kind)
    torch.testing.assert_close(x[order], y, rtol=1e-10, atol=1e-12)
