from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from hypergrad import Neumann, Status
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    Problem,
    dense_solve,
    gaussian,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)


@quick_and_thorough
@given(problem=problems(), seed=seeds, num_terms=st.integers(1, 30))
def test_is_the_partial_sum_of_the_series(
    effort: str, problem: Problem, seed: int, num_terms: int
) -> None:
    v, step = gaussian(problem.n, seed=seed), 0.7 / problem.norm
    expected = torch.zeros_like(v)
    for _ in range(num_terms):
        expected = expected + step * (v - problem.matrix @ expected)
    solver = Neumann(num_terms=num_terms, step_size=step)
    solution = hypergrad.solve(problem.hvp(), v, solver, on_failure="ignore")
    if not solution.info.status.failed:
        assert relative_error(solution.value, expected) <= 1e-12
    assert solution.info.num_hvps == num_terms + solution.info.status.failed


@quick_and_thorough
@given(problem=problems(), seed=seeds, num_terms=st.integers(1, 60))
def test_converges_at_the_rate_of_its_condition_number(
    effort: str, problem: Problem, seed: int, num_terms: int
) -> None:
    damping = 0.2 * problem.norm
    v = gaussian(problem.n, seed=seed)
    solver = Neumann(num_terms=num_terms)
    solution = hypergrad.solve(problem.hvp(), v, solver, damping=damping)
    # The step is the inverse of a bound on |A| of at most twice |A|: the contraction is
    # 1 - (0.2 + smallest)/(2 + 0.2), or better.
    residual = relative_residual(problem.matrix, damping, solution.value, v)
    assert residual <= (1 - 0.2 / 2.2) ** num_terms + 1e-12


def test_too_few_terms_are_not_accurate_and_do_not_claim_to_be() -> None:
    problem = symmetric(torch.logspace(0, -3, 30, dtype=F64), seed=1)
    v = gaussian(30, seed=2)
    x, info = hypergrad.neumann_ihvp(problem.hvp(), v, num_terms=3, return_info=True)
    expected = dense_solve(problem.matrix, v)
    assert relative_error(x, expected) > 0.5
    assert not info.converged
    assert info.relative_residual > 0.1
    x, info = hypergrad.neumann_ihvp(problem.hvp(), v, num_terms=12_000, return_info=True)
    # (1 - 1e-3/1.1)^12000 = 2e-5, the step being the inverse of a bound on |A|.
    assert relative_error(x, expected) <= 1e-3


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_residual_is_that_of_the_answer_however_many_terms(dtype: torch.dtype) -> None:
    problem = symmetric(torch.linspace(1.0, 0.5, 10, dtype=F64), seed=1)
    v = gaussian(10, seed=2).to(dtype)
    x, info = hypergrad.neumann_ihvp(problem.hvp(dtype), v, num_terms=400, return_info=True)
    # The recurrence alone would claim 1e-100 here.
    stored = problem.matrix.to(dtype).to(F64)
    eps = torch.finfo(dtype).eps
    assert abs(info.relative_residual - relative_residual(stored, 0.0, x, v)) <= 30 * eps
    assert 1e-2 * eps <= info.relative_residual <= 30 * eps


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("num_terms", [1, 2, 50, 5000])
@pytest.mark.parametrize("spectrum", INDEFINITE)
def test_negative_curvature_is_reported_never_amplified(
    dtype: torch.dtype, num_terms: int, spectrum: str
) -> None:
    problem = symmetric(INDEFINITE[spectrum](10), seed=1, scale=1e-8)
    v = problem.basis[:, int(problem.eigenvalues.argmin())].to(dtype)
    solution = hypergrad.solve(
        problem.hvp(dtype), v, Neumann(num_terms=num_terms), on_failure="ignore"
    )
    assert solution.info.status is Status.NEGATIVE_CURVATURE
    assert solution.info.relative_residual <= 1.0 + 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_step_that_is_too_long_is_reported(dtype: torch.dtype) -> None:
    problem = symmetric(torch.linspace(1.0, 0.5, 10, dtype=F64), seed=1)
    v = gaussian(10, seed=2).to(dtype)
    with pytest.warns(hypergrad.ConvergenceWarning):
        x, info = hypergrad.neumann_ihvp(
            problem.hvp(dtype), v, num_terms=2000, step_size=10.0, return_info=True
        )
    assert info.status is Status.STAGNATED
    assert torch.isfinite(x).all()
    assert info.relative_residual <= 1.0


def test_a_column_that_diverges_does_not_stop_the_others() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64)
    with pytest.warns(hypergrad.ConvergenceWarning):
        solution = hypergrad.solve(
            matrix, rows, Neumann(num_terms=400, step_size=0.1), batched=True
        )
    good, bad = solution.info.columns
    assert not good.status.failed
    assert bad.status is Status.NEGATIVE_CURVATURE
    assert float(solution.value[0, 0]) == pytest.approx(1.0, rel=1e-12)


def test_the_zero_operator_without_damping_is_a_failure() -> None:
    with pytest.warns(hypergrad.ConvergenceWarning):
        x, info = hypergrad.neumann_ihvp(lambda u: 0 * u, torch.ones(3), return_info=True)
    assert torch.equal(x, torch.zeros(3))
    assert info.relative_residual == 1.0
