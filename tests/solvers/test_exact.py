from __future__ import annotations

import pytest
import torch
from hypothesis import given

import hypergrad
from hypergrad import Exact, Status
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    Problem,
    dense_solve,
    gaussian,
    orthogonal,
    problems,
    quick_and_thorough,
    relative_error,
    seeds,
    symmetric,
)


@quick_and_thorough
@given(problem=problems(), seed=seeds)
def test_accurate_to_rounding_times_condition(effort: str, problem: Problem, seed: int) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, Exact())
    condition = problem.norm / float(problem.eigenvalues.abs().min())
    # Wilkinson's bound with a constant of a few times the dimension.
    bound = 10 * problem.n * torch.finfo(F64).eps * condition
    assert relative_error(solution.value, dense_solve(problem.matrix, v)) <= bound
    assert solution.info.status is Status.CONVERGED


@quick_and_thorough
@given(problem=problems(INDEFINITE), seed=seeds)
def test_indefinite_systems_are_solved_and_reported(
    effort: str, problem: Problem, seed: int
) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, Exact())
    smallest = float(problem.eigenvalues.min())
    assert solution.info.smallest_eigenvalue == pytest.approx(smallest, rel=1e-10)
    condition = problem.norm / float(problem.eigenvalues.abs().min())
    bound = 10 * problem.n * torch.finfo(F64).eps * condition
    assert relative_error(solution.value, dense_solve(problem.matrix, v)) <= bound


def test_the_smallest_eigenvalue_is_that_of_the_operator_without_damping() -> None:
    matrix = torch.diag(torch.tensor([3.0, -2.0], dtype=F64))
    info = hypergrad.solve(matrix, torch.ones(2, dtype=F64), Exact(), damping=0.5).info
    assert info.smallest_eigenvalue == pytest.approx(-2.0, rel=1e-14)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_singular_consistent_systems_get_the_solution_of_smallest_norm(
    seed: int, scale: float
) -> None:
    # Rounding leaves a last pivot of either sign, so that Cholesky succeeds half of the time.
    n = 2 + seed % 7
    basis = orthogonal(n, seed)
    eigenvalues = scale * torch.linspace(1.0, 0.5, n, dtype=F64)
    eigenvalues[-1] = 0.0
    matrix = (basis * eigenvalues) @ basis.T
    x = gaussian(n - 1, seed=seed) @ basis[:, :-1].T
    solution = hypergrad.solve(0.5 * (matrix + matrix.T), matrix @ x, Exact())
    assert solution.info.status is Status.CONVERGED
    assert relative_error(solution.value, x) <= 1e-12
    assert abs(float(basis[:, -1] @ solution.value)) <= 1e-12 * float(x.norm())


@pytest.mark.parametrize("seed", range(20))
def test_singular_inconsistent_systems_get_the_least_squares_solution_and_say_so(seed: int) -> None:
    n = 2 + seed % 7
    basis = orthogonal(n, seed)
    eigenvalues = torch.linspace(1.0, 0.5, n, dtype=F64)
    eigenvalues[-1] = 0.0
    matrix = (basis * eigenvalues) @ basis.T
    v = gaussian(n, seed=seed + 100)
    with pytest.warns(hypergrad.ConvergenceWarning):
        solution = hypergrad.solve(0.5 * (matrix + matrix.T), v, Exact())
    inverse = torch.where(eigenvalues > 0, 1.0 / eigenvalues, 0.0)
    assert solution.info.status is Status.STAGNATED
    assert relative_error(solution.value, (basis * inverse) @ basis.T @ v) <= 1e-12


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", [1e-6, 1e-4])
def test_a_small_damping_is_not_mistaken_for_rounding(dtype: torch.dtype, relative: float) -> None:
    # Outside the range of A the answer is v/damping, however small the damping is.
    for eigenvalues in (torch.zeros(50, dtype=F64), torch.full((50,), -1.0, dtype=F64)):
        eigenvalues[:25] = 1.0
        eigenvalues[-1] = 0.0
        problem = symmetric(eigenvalues, seed=2)
        v = problem.basis[:, -1].to(dtype)
        solution = hypergrad.solve(
            problem.hvp(dtype), v, Exact(), damping=relative, on_failure="ignore"
        )
        # Rounding A itself perturbs the damped eigenvalue by about eps.
        bound = 10 * torch.finfo(dtype).eps / relative
        assert relative_error(solution.value, v / relative) <= max(bound, 1e-9)


def test_the_zero_operator_without_damping() -> None:
    with pytest.warns(hypergrad.ConvergenceWarning):
        solution = hypergrad.solve(torch.zeros(3, 3), torch.ones(3), Exact())
    assert torch.equal(solution.value, torch.zeros(3))
    assert solution.info.relative_residual == pytest.approx(1.0)


def test_more_memory_than_allowed_is_refused_before_any_product() -> None:
    def hvp(v: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no product may be spent")

    with pytest.raises(hypergrad.OperatorTooLargeError, match=r"max_bytes=4800\)"):
        hypergrad.solve(hvp, torch.ones(10), Exact(max_bytes=1000))
    with pytest.raises(hypergrad.OperatorTooLargeError, match="needs 44703"):
        hypergrad.exact_ihvp(hvp, torch.ones(1_000_000))
