from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from hypergrad import MINRES, Status
from tests.solvers.krylov_properties import (
    System,
    check_a_block_is_its_rows,
    check_leaf_order,
    check_scale_invariance,
    check_the_status_never_lies,
    definite_spectra,
    exponents,
    float64_trees,
    indefinite_systems,
    quietly,
)
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SINGULAR,
    SPECTRA,
    dense_solve,
    gaussian,
    orthogonal,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)


def make(rtol: float) -> hypergrad.Solver:
    return MINRES(rtol=rtol)


# Properties -------------------------------------------------------------------------------------


@quick_and_thorough
@given(system=indefinite_systems)
def test_the_status_never_lies(effort: str, system: System) -> None:
    check_the_status_never_lies(system, make)


@quick_and_thorough
@given(system=indefinite_systems, of_v=exponents, of_a=exponents)
def test_scales_do_not_matter(effort: str, system: System, of_v: int, of_a: int) -> None:
    check_scale_invariance(system, make, of_v, of_a)


@quick_and_thorough
@given(like=float64_trees, spectrum=definite_spectra, seed=seeds)
def test_the_order_of_leaves_does_not_matter(
    effort: str, like: Any, spectrum: str, seed: int
) -> None:
    check_leaf_order(like, spectrum, seed, make)


@quick_and_thorough
@given(system=indefinite_systems)
def test_a_block_is_its_rows(effort: str, system: System) -> None:
    check_a_block_is_its_rows(system, make)


# What MINRES is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [*POSITIVE, *INDEFINITE])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_solves_symmetric_systems_of_any_signature(spectrum: str, dtype: torch.dtype) -> None:
    problem = symmetric(SPECTRA[spectrum](40), seed=1)
    v, damping = gaussian(40, seed=2).to(dtype), 0.03
    rtol = 1e-10 if dtype == F64 else 1e-4
    solution = quietly(problem.hvp(dtype), v, MINRES(rtol=rtol), damping=damping)
    assert solution.info.status is Status.CONVERGED
    stored = problem.matrix.to(dtype).to(F64)
    assert relative_residual(stored, damping, solution.value, v) <= rtol * 1.01
    values = problem.eigenvalues + damping
    condition = float(values.abs().max() / values.abs().min())
    assert relative_error(solution.value, dense_solve(stored, v, damping)) <= condition * rtol


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("spectrum", ["alternating", "exponential"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_each_iterate_minimises_the_residual_over_the_krylov_space(
    count: int, spectrum: str, preconditioned: bool
) -> None:
    problem = symmetric(SPECTRA[spectrum](30), seed=1)
    v, damping = gaussian(30, seed=2), 0.05
    a = problem.matrix + damping * torch.eye(30, dtype=F64)
    m, root = torch.eye(30, dtype=F64), torch.eye(30, dtype=F64)
    if preconditioned:
        basis, values = orthogonal(30, 5), torch.logspace(0, -1, 30, dtype=F64)
        m, root = (basis * values) @ basis.T, (basis * values.sqrt()) @ basis.T
    solver = MINRES(rtol=0.0, max_iters=count, preconditioner=m if preconditioned else None)
    solution = hypergrad.solve(problem.hvp(), v, solver, damping=damping)
    assert solution.info.status is Status.FIXED_ITERATIONS
    assert solution.info.iterations == count
    q = (m @ v / (m @ v).norm())[:, None]
    for _ in range(count - 1):
        q = torch.linalg.qr(torch.cat([q, m @ (a @ q[:, -1:])], 1))[0]
    y = torch.linalg.lstsq(root @ a @ q, (root @ v)[:, None], driver="gelsd").solution
    assert relative_error(solution.value, (q @ y)[:, 0]) <= 1e-7


def test_the_residual_never_grows() -> None:
    problem = symmetric(SPECTRA["alternating"](40), seed=1)
    v = gaussian(40, seed=2)
    norms = [
        hypergrad.solve(problem.hvp(), v, MINRES(rtol=0.0, max_iters=k)).info.residual_norm
        for k in range(1, 40)
    ]
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in zip(norms, norms[1:]))  # noqa: B905, RUF007


@pytest.mark.parametrize("spectrum", [*POSITIVE, *INDEFINITE])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_the_smallest_ritz_value_is_reported(spectrum: str, damping: float) -> None:
    problem = symmetric(SPECTRA[spectrum](12), seed=1)
    v = gaussian(12, seed=2)
    info = quietly(problem.hvp(), v, MINRES(rtol=1e-12), damping=damping).info
    lowest = float(problem.eigenvalues.min())
    assert info.smallest_eigenvalue is not None
    assert info.smallest_eigenvalue >= lowest - 1e-12
    assert info.smallest_eigenvalue <= lowest + 1e-3
    # With a preconditioner it is a Rayleigh quotient: inside the spectrum, of the right sign.
    weights = torch.linspace(1.0, 2.0, 12, dtype=F64)
    solver = MINRES(rtol=1e-12, preconditioner=lambda r: weights * r)
    info = quietly(problem.hvp(), v, solver, damping=damping).info
    assert info.smallest_eigenvalue is not None
    assert lowest - 1e-12 <= info.smallest_eigenvalue <= float(problem.eigenvalues.max()) + 1e-12


# Singular systems -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seed", range(5))
def test_a_singular_consistent_system_converges(dtype: torch.dtype, seed: int) -> None:
    eigenvalues = torch.linspace(-1.0, 1.0, 13, dtype=F64)  # 0 in the middle
    eigenvalues[eigenvalues.abs() < 1e-12] = 0.0
    problem = symmetric(eigenvalues, seed=seed)
    x = problem.basis[:, eigenvalues != 0] @ gaussian(12, seed=seed)
    v = (problem.matrix @ x).to(dtype)
    rtol = 1e-10 if dtype == F64 else 1e-4
    solution = quietly(problem.hvp(dtype), v, MINRES(rtol=rtol))
    assert solution.info.status is Status.CONVERGED
    assert relative_error(solution.value, x) <= 20 * rtol


@pytest.mark.parametrize("spectrum", list(SINGULAR))
@pytest.mark.parametrize("n", [3, 12, 60])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_singular_inconsistent_system_gets_the_shortest_least_squares_answer(
    spectrum: str, n: int, seed: int, preconditioned: bool
) -> None:
    problem = symmetric(SPECTRA[spectrum](n), seed=seed)
    v = gaussian(n, seed=seed + 10)
    solver = MINRES(rtol=1e-9, preconditioner=(lambda r: 4.0 * r) if preconditioned else None)
    with pytest.warns(hypergrad.ConvergenceWarning, match="stopped falling"):
        solution = hypergrad.solve(problem.hvp(), v, solver)
    assert solution.info.status is Status.STAGNATED
    kept = problem.eigenvalues != 0
    basis, values = problem.basis[:, kept], problem.eigenvalues[kept]
    expected = basis @ ((basis.T @ v) / values)
    least = float((v - basis @ (basis.T @ v)).norm() / v.norm())
    assert solution.info.relative_residual == pytest.approx(least, rel=1e-6)
    if float(expected.norm()) > 1e-2 * float(v.norm()):
        assert relative_error(solution.value, expected) <= 1e-4


def test_the_zero_operator_stagnates_at_zero() -> None:
    solution = quietly(lambda u: 0.0 * u, gaussian(5), MINRES())
    assert solution.info.status is Status.STAGNATED
    assert torch.equal(solution.value, torch.zeros(5, dtype=F64))


# Breakdowns and hard cases ----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-200, 1e-30, -1.0, 3.0, 1e30, 1e200])
def test_a_multiple_of_the_identity_takes_one_iteration(factor: float) -> None:
    v = gaussian(7, seed=1)
    solution = quietly(lambda u: factor * u, v, MINRES(rtol=1e-12))
    assert solution.info.status is Status.CONVERGED
    assert solution.info.iterations == 1
    assert relative_error(solution.value * factor, v) <= 1e-14


@pytest.mark.parametrize("max_iters", [1, 2])
def test_the_last_step_of_a_budget_is_not_lost(max_iters: int) -> None:
    # Its residual is rounding, which only the true one can tell from a step gone wrong.
    v = gaussian(20, seed=3)
    solver = hypergrad.MINRES(rtol=1e-12, max_iters=max_iters)
    info = hypergrad.solve(torch.eye(20, dtype=F64), v, solver).info
    assert info.converged
    assert info.num_hvps == 2


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_v_in_an_invariant_subspace_is_a_lucky_breakdown(dimension: int) -> None:
    problem = symmetric(SPECTRA["alternating"](20), seed=1)
    v = problem.basis[:, :dimension] @ gaussian(dimension, seed=2)
    info = quietly(problem.hvp(), v, MINRES(rtol=1e-10)).info
    assert info.status is Status.CONVERGED
    assert info.iterations <= dimension


def test_the_saddle_with_a_singular_first_pivot() -> None:
    # v'A v = 0: T begins with a zero, at which a method without the Givens rotations stops.
    matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    x, info = hypergrad.minres_ihvp(matrix, torch.tensor([1.0, 0.0], dtype=F64), return_info=True)
    assert info.converged
    torch.testing.assert_close(x, torch.tensor([0.0, 1.0], dtype=F64))


@pytest.mark.parametrize("spectrum", ["exponential", "clustered"])
def test_float32_stagnates_where_its_rounding_lets_it(spectrum: str) -> None:
    problem = symmetric(SPECTRA[spectrum](40), seed=1)
    v = gaussian(40, seed=2).to(F32)
    solution = quietly(problem.hvp(F32), v, MINRES(rtol=1e-7))
    assert solution.info.status is Status.STAGNATED
    # No x has a smaller residual than the rounding of its product, and none far above is kept.
    stored = problem.matrix.to(F32).to(F64)
    floor = torch.finfo(F32).eps * float(dense_solve(stored, v).norm() / v.norm())
    assert relative_residual(stored, 0.0, solution.value, v) <= 10 * floor


def test_restarts_recover_what_the_recurrence_loses() -> None:
    # At condition number 1e6 the recurrence of one run drifts at about 1e-16 * 1e12 |x|.
    problem = symmetric(SPECTRA["exponential"](60), seed=1)
    v = gaussian(60, seed=2)
    solution = quietly(problem.hvp(), v, MINRES(rtol=1e-9))
    assert solution.info.status is Status.CONVERGED
    assert relative_residual(problem.matrix, 0.0, solution.value, v) <= 1.01e-9


def test_bfloat16_products_with_a_float32_recurrence() -> None:
    basis = orthogonal(20, 1)
    values = torch.linspace(1.0, 0.3, 20, dtype=F64)
    values[::2] *= -1
    matrix = ((basis * values) @ basis.T).to(torch.bfloat16)
    v = gaussian(20, seed=2).to(torch.bfloat16)
    x, info = hypergrad.minres_ihvp(matrix, v, rtol=5e-2, return_info=True)
    assert info.converged
    stored = matrix.to(F64)
    assert relative_residual(0.5 * (stored + stored.T), 0.0, x, v) <= 1e-1


def test_a_skew_part_is_refused() -> None:
    matrix = torch.eye(10, dtype=F64) + torch.triu(gaussian(10, 10, seed=1))
    for solver in (MINRES(), MINRES(rtol=0.0, max_iters=5)):
        with pytest.raises(hypergrad.NotSymmetricError):
            hypergrad.solve(matrix, gaussian(10, seed=2), solver)


def test_too_few_iterations_say_so() -> None:
    problem = symmetric(SPECTRA["exponential"](60), seed=1)
    v = gaussian(60, seed=2)
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_iters was reached"):
        x, info = hypergrad.minres_ihvp(problem.hvp(), v, max_iters=5, return_info=True)
    assert info.status is Status.MAX_ITERATIONS
    assert info.iterations == 5
    outside = relative_residual(problem.matrix, 0.0, x, v)
    assert info.relative_residual == pytest.approx(outside, rel=1e-9)


# Warm starts and preconditioners ----------------------------------------------------------------


def test_warm_starts() -> None:
    problem = symmetric(SPECTRA["alternating"](40), seed=1)
    v = gaussian(40, seed=2)
    exact = dense_solve(problem.matrix, v)
    at = quietly(problem.hvp(), v, MINRES(), x0=exact)
    assert (at.info.iterations, at.info.num_hvps) == (0, 1)
    assert torch.equal(at.value, exact)
    cold = quietly(problem.hvp(), v, MINRES()).info
    near = quietly(problem.hvp(), v, MINRES(), x0=exact * (1 + 1e-4)).info
    assert near.iterations < cold.iterations
    far = quietly(problem.hvp(), v, MINRES(), x0=1e6 * gaussian(40, seed=3)).info
    assert far.status is Status.CONVERGED


class TestPreconditioner:
    problem = symmetric(torch.cat([-torch.logspace(0, -3, 20), torch.logspace(0, -3, 20)]).to(F64))
    v = gaussian(40, seed=2)

    def info(self, preconditioner: Any) -> hypergrad.SolveInfo:
        solver = MINRES(rtol=1e-8, preconditioner=preconditioner)
        solution = hypergrad.solve(self.problem.hvp(), self.v, solver)
        assert relative_residual(self.problem.matrix, 0.0, solution.value, self.v) <= 1.01e-8
        return solution.info

    def absolute(self) -> Tensor:
        return (self.problem.basis / self.problem.eigenvalues.abs()) @ self.problem.basis.T

    def test_the_inverse_of_the_absolute_value_needs_two_iterations(self) -> None:
        # The preconditioned spectrum is {-1, 1}.
        assert self.info(self.absolute()).iterations <= 3
        assert self.info(None).iterations > 20

    @pytest.mark.parametrize("power", [-200, -60, 60, 200])
    def test_its_scale_does_not_matter(self, power: int) -> None:
        absolute = self.absolute()
        plain = self.info(lambda r: absolute @ r).iterations
        assert self.info(lambda r: 2.0**power * (absolute @ r)).iterations == plain

    def test_the_exact_inverse_of_a_definite_one_needs_one(self) -> None:
        problem = symmetric(SPECTRA["inverse"](40), seed=1)
        solver = MINRES(rtol=1e-8, preconditioner=torch.linalg.inv(problem.matrix))
        assert hypergrad.solve(problem.hvp(), self.v, solver).info.iterations == 1

    @pytest.mark.parametrize("sign", [-1.0, 0.0])
    @pytest.mark.parametrize("options", [{}, {"rtol": 0.0, "max_iters": 4}])
    def test_one_that_is_not_positive_definite_is_refused(
        self, sign: float, options: dict[str, Any]
    ) -> None:
        solver = MINRES(preconditioner=lambda r: sign * r, **options)
        with pytest.raises(hypergrad.PreconditionerError, match="symmetric positive definite"):
            hypergrad.solve(self.problem.hvp(), self.v, solver)

    def test_the_indefinite_inverse_is_refused(self) -> None:
        with pytest.raises(hypergrad.PreconditionerError):
            self.info(torch.linalg.inv(self.problem.matrix))


def test_mixed_columns_finish_on_their_own() -> None:
    problem = symmetric(SPECTRA["alternating"](40), seed=1)
    rows = gaussian(5, 40, seed=2)
    rows[1] = 0.0
    rows[2] = problem.basis[:, 3]
    rows[3] *= 1e-300
    info = hypergrad.solve(problem.hvp(), rows, MINRES(rtol=1e-9), batched=True).info
    iterations = [column.iterations for column in info.columns]
    assert info.converged
    assert iterations[1] == 0
    assert iterations[2] == 1
    assert min(iterations[0], iterations[3], iterations[4]) > 10


@pytest.mark.parametrize(
    "options",
    [{"rtol": -1.0}, {"atol": float("nan")}, {"max_iters": 0}, {"rtol": 0.0}, {"rtol": "small"}],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError):
        MINRES(**options)
