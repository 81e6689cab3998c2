from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg._isolve.tests.test_iterative import IterativeParams
from torch import Tensor

import hypergrad
from hypergrad import GMRES, Status
from hypergrad.errors import DifferentiationError
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    SPECTRA,
    dense_solve,
    gaussian,
    orthogonal,
    quick_and_thorough,
    relative_error,
    relative_residual,
    right_hand_scales,
    seeds,
    symmetric,
)


def quietly(operator: Any, v: Any, solver: GMRES, **options: Any) -> hypergrad.Solution:
    return hypergrad.solve(operator, v, solver, on_failure="ignore", **options)


def general(singular_values: Tensor, *, seed: int = 0) -> Tensor:
    """A matrix of these singular values between unrelated orthogonal bases."""
    n = len(singular_values)
    return (orthogonal(n, seed) * singular_values) @ orthogonal(n, seed + 1).T


# SciPy's own cases ------------------------------------------------------------------------------


def _scipy_cases() -> dict[str, Any]:
    """All cases that are real; of nonsymposdef-F SciPy makes a complex matrix of real entries."""
    return {
        case.name: case
        for case in IterativeParams().cases
        if case.A.dtype.kind == "f" or abs(case.A.imag).max() == 0
    }


SCIPY_CASES = _scipy_cases()


def _real(case: Any) -> tuple[Any, Tensor, float]:
    """Matrix, right-hand side and tolerance, as SciPy's test_convergence takes them."""
    matrix = case.A
    if matrix.dtype.kind == "c":
        matrix = matrix.real.astype(np.float32)
    rtol = 1e-8 if matrix.dtype.char in "dD" else 1e-2
    return matrix, torch.from_numpy(case.b.astype(matrix.dtype)), rtol


def test_scipy_has_the_cases_that_are_meant() -> None:
    assert {"rand", "rand-F", "nonsymposdef", "nonsymposdef-F", "sym-nonpd"} <= set(SCIPY_CASES)
    assert len(SCIPY_CASES) == 17


@pytest.mark.parametrize("name", SCIPY_CASES)
def test_solves_the_cases_of_scipy_at_their_tolerance(name: str) -> None:
    case = SCIPY_CASES[name]
    matrix, b, rtol = _real(case)
    solution = hypergrad.solve(matrix, b, GMRES(rtol=rtol))
    assert solution.info.status is Status.CONVERGED
    dense = matrix.toarray() if scipy.sparse.issparse(matrix) else np.asarray(matrix)
    residual = np.linalg.norm(dense.astype(float) @ solution.value.double().numpy() - case.b)
    assert residual <= rtol * np.linalg.norm(case.b)


@pytest.mark.parametrize("name", SCIPY_CASES)
def test_uses_no_more_products_than_scipy(name: str) -> None:
    matrix, b, rtol = _real(SCIPY_CASES[name])
    products = 0

    def count(x: Any) -> Any:
        nonlocal products
        products += 1
        return matrix @ x

    theirs = scipy.sparse.linalg.LinearOperator(matrix.shape, count, dtype=matrix.dtype)
    _, failed = scipy.sparse.linalg.gmres(theirs, b.numpy(), rtol=rtol, restart=50)
    assert failed == 0
    info = hypergrad.solve(matrix, b, GMRES(rtol=rtol)).info
    # Both are GMRES(50); where the estimate meets the tolerance to the last digit, rounding
    # decides whether one more step is taken.
    assert info.num_hvps <= products + 1


# Against theory and the dense solution ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0, 2, 4])
def test_the_error_is_that_of_the_residual_and_the_condition(
    dtype: torch.dtype, power: int
) -> None:
    matrix = general(torch.logspace(0, -power, 40, dtype=F64), seed=power).to(dtype)
    v = gaussian(40, seed=1).to(dtype)
    rtol = 1e-10 if dtype == F64 else 1e-3
    solution = hypergrad.solve(matrix, v, GMRES(rtol=rtol))
    assert solution.info.converged
    stored = matrix.to(F64)
    assert relative_residual(stored, 0.0, solution.value, v) <= 1.01 * rtol
    if dtype == F64:
        expected = dense_solve(stored, v)
        assert relative_error(solution.value, expected) <= 1.01 * rtol * 10**power


@pytest.mark.parametrize("count", [1, 4, 17])
def test_a_fixed_number_of_iterations_minimises_over_the_krylov_space(count: int) -> None:
    matrix = general(torch.linspace(1.0, 0.1, 40, dtype=F64))
    v = gaussian(40, seed=2)
    solution = hypergrad.solve(matrix, v, GMRES(rtol=0.0, max_iters=count))
    assert solution.info.status is Status.FIXED_ITERATIONS
    assert solution.info.iterations == count
    assert solution.info.num_hvps == count + 1
    q = (v / v.norm())[:, None]
    for _ in range(count - 1):
        q = torch.linalg.qr(torch.cat([q, matrix @ q[:, -1:]], 1))[0]
    expected = q @ torch.linalg.lstsq(matrix @ q, v[:, None]).solution[:, 0]
    assert relative_error(solution.value, expected) <= 1e-8


def test_the_residual_never_rises() -> None:
    matrix = general(torch.linspace(1.0, 0.01, 30, dtype=F64))
    v = gaussian(30, seed=2)
    norms = [
        hypergrad.solve(matrix, v, GMRES(rtol=0.0, max_iters=count, restart=7)).info.residual_norm
        for count in range(1, 40)
    ]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(norms, norms[1:]))  # noqa: B905, RUF007
    assert norms[0] > norms[6] > norms[20]


def test_a_fixed_point_and_a_game() -> None:
    # x = f(x) with f linear: dx/dt solves (I - J) y = df/dt.
    jacobian = 0.9 * orthogonal(30, seed=3)
    v = gaussian(30, seed=4)
    solution = hypergrad.solve(lambda u: u - jacobian @ u, v, GMRES(rtol=1e-10))
    assert solution.info.converged
    expected = torch.linalg.solve(torch.eye(30, dtype=F64) - jacobian, v)
    assert relative_error(solution.value, expected) <= 1e-9
    # A bilinear game: antisymmetric up to damping, for which CG has no meaning.
    pull = gaussian(15, 15, seed=5)
    zero = torch.zeros_like(pull)
    game = torch.cat([torch.cat([zero, pull], 1), torch.cat([-pull.T, zero], 1)])
    x = hypergrad.solve(game, v, GMRES(rtol=1e-10), damping=0.5).value
    assert relative_error(x, dense_solve(game, v, 0.5)) <= 1e-9
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(game, v, hypergrad.CG(), damping=0.5)


# Breakdown, stagnation, singular systems --------------------------------------------------------


def test_an_invariant_space_ends_the_cycle_with_the_exact_answer() -> None:
    matrix = torch.block_diag(gaussian(3, 3, seed=1) + 3 * torch.eye(3), gaussian(5, 5)).to(F64)  # type: ignore[no-untyped-call]
    v = torch.zeros(8, dtype=F64)
    v[:3] = 1.0
    solution = hypergrad.solve(matrix, v, GMRES(rtol=1e-12))
    assert solution.info.converged
    assert solution.info.iterations == 3
    assert torch.equal(solution.value[3:], torch.zeros(5, dtype=F64))


def test_the_identity_takes_one_iteration() -> None:
    info = hypergrad.solve(torch.eye(50), torch.ones(50), GMRES()).info
    assert (info.iterations, info.num_hvps) == (1, 2)


@pytest.mark.parametrize("restart", [5, 19])
def test_a_cyclic_shift_stagnates_below_a_full_cycle(restart: int) -> None:
    # The residual of e_1 stays 1 until the Krylov space is everything (Nachtigal, Reddy,
    # Trefethen, SIAM J. Matrix Anal. Appl. 13, 1992, example B).
    shift = torch.roll(torch.eye(20, dtype=F64), 1, 0)
    v = torch.zeros(20, dtype=F64)
    v[0] = 1.0
    info = quietly(shift, v, GMRES(restart=restart)).info
    assert info.status is Status.STAGNATED
    assert info.relative_residual == 1.0
    assert info.iterations == 3 * restart
    full = hypergrad.solve(shift, v, GMRES(restart=20)).info
    assert (full.status, full.iterations) == (Status.CONVERGED, 20)


SINGULAR: dict[str, Tensor] = {
    "zero": torch.zeros(6, 6, dtype=F64),
    "nilpotent": torch.diag(torch.ones(5, dtype=F64), 1),
    "rank one": torch.outer(gaussian(6, seed=1), gaussian(6, seed=2)),
    "repeated column": gaussian(6, 6)[:, [0, 1, 2, 3, 4, 4]].contiguous(),
    "zero row": torch.cat([gaussian(5, 6), torch.zeros(1, 6, dtype=F64)]),
    "projection": torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)),
}
#: Products of 16 bits cannot tell a pivot of noise from one of information.
NARROW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("dtype", [F64, F32, *NARROW])
def test_an_inconsistent_singular_system_stagnates_at_a_finite_answer(
    name: str, dtype: torch.dtype
) -> None:
    matrix = SINGULAR[name].to(dtype)
    left_null = torch.linalg.svd(matrix.to(F64))[0][:, -1]
    v = (gaussian(6, seed=3) + 3.0 * left_null).to(dtype)
    solution = quietly(matrix, v, GMRES())
    assert solution.info.status is Status.STAGNATED
    assert torch.isfinite(solution.value).all()
    assert solution.info.relative_residual <= 1.0
    size = float(torch.linalg.vector_norm(solution.value.to(F64)) / v.to(F64).norm())
    rounding = 4 * torch.finfo(dtype).eps * size * float(torch.linalg.matrix_norm(matrix.to(F64)))
    outside = relative_residual(matrix.to(F64), 0.0, solution.value, v)
    assert abs(outside - solution.info.relative_residual) <= rounding + 1e-6
    # No answer is better than the part of v outside the range.
    assert outside >= abs(float(left_null @ v.to(F64))) / float(v.to(F64).norm()) - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_consistent_singular_system_of_index_one_is_solved(seed: int) -> None:
    # Range and null space meet in zero only (Brown and Walker, SIAM J. Matrix Anal. Appl. 18,
    # 1997, theorem 2.6).
    core = general(torch.linspace(1.0, 0.2, 8, dtype=F64), seed=seed)
    matrix = torch.block_diag(core, torch.zeros(4, 4, dtype=F64))  # type: ignore[no-untyped-call]
    basis = gaussian(12, 12, seed=seed)
    matrix = basis @ matrix @ torch.linalg.inv(basis)
    v = matrix @ gaussian(12, seed=seed)
    solution = hypergrad.solve(matrix, v, GMRES(rtol=1e-8))
    assert solution.info.converged
    assert relative_residual(matrix, 0.0, solution.value, v) <= 1.01e-8


def test_an_unattainable_tolerance_stagnates_near_the_attainable_residual() -> None:
    matrix = general(torch.logspace(0, -3, 40, dtype=F64)).to(F32)
    v = gaussian(40, seed=1).to(F32)
    solution = quietly(matrix, v, GMRES(rtol=1e-12))
    assert solution.info.status is Status.STAGNATED
    eps = torch.finfo(F32).eps
    # eps |A||x|/|v| is what rounding the answer alone costs.
    size = float(solution.value.to(F64).norm() / v.to(F64).norm())
    assert relative_residual(matrix.to(F64), 0.0, solution.value, v) <= 4 * eps * size
    assert solution.info.iterations < 1000


def test_too_few_iterations_say_so() -> None:
    matrix = general(torch.logspace(0, -4, 60, dtype=F64))
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_iters was reached"):
        info = hypergrad.solve(matrix, gaussian(60), GMRES(max_iters=7)).info
    assert info.status is Status.MAX_ITERATIONS
    assert info.iterations == 7


# Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": -1.0},
        {"rtol": float("nan")},
        {"atol": float("inf")},
        {"max_iters": 0},
        {"restart": 0},
        {"restart": 2.5},
        {"restart": None},
        {"rtol": 0.0, "atol": 0.0},
    ],
)
def test_options_are_checked_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError):
        GMRES(**options)


class TestPreconditioner:
    matrix = general(torch.logspace(0, -4, 40, dtype=F64), seed=2) + 0.01 * torch.eye(40).double()
    v = gaussian(40, seed=3)

    def solution(self, preconditioner: Any, matrix: Tensor | None = None) -> hypergrad.Solution:
        matrix = self.matrix if matrix is None else matrix
        return hypergrad.solve(matrix, self.v, GMRES(rtol=1e-8, preconditioner=preconditioner))

    def test_the_exact_inverse_needs_one_iteration(self) -> None:
        info = self.solution(torch.linalg.inv(self.matrix)).info
        assert info.converged
        assert info.iterations <= 2  # a second one where rounding leaves more than 1e-8

    def test_it_is_applied_from_the_right_and_not_transposed(self) -> None:
        # A triangular one: with its transpose, or from the left, two iterations would not do.
        upper = torch.triu(gaussian(40, 40, seed=4), 1) * 0.1 + torch.eye(40, dtype=F64)
        info = self.solution(torch.linalg.inv(upper), upper).info
        assert info.iterations == 1

    @pytest.mark.parametrize("scale", [1e-20, -1.0, 1e20])
    def test_its_scale_and_sign_do_not_matter(self, scale: float) -> None:
        plain = self.solution(None)
        scaled = self.solution(lambda r: scale * r)
        assert scaled.info.iterations == plain.info.iterations
        assert relative_error(scaled.value, plain.value) <= 1e-6

    def test_one_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(hypergrad.NonFiniteError, match="output of the preconditioner"):
            self.solution(lambda r: r / 0.0)

    def test_a_singular_one_stagnates(self) -> None:
        mask = (torch.arange(40) < 20).double()
        solver = GMRES(rtol=1e-8, preconditioner=lambda r: mask * r)
        info = quietly(self.matrix, self.v, solver).info
        assert info.status is Status.STAGNATED
        assert info.relative_residual < 1.0


def test_automatic_damping_is_for_symmetric_operators() -> None:
    problem = symmetric(SPECTRA["one_negative"](20), seed=1)
    info = hypergrad.solve(problem.hvp(), gaussian(20), GMRES(), damping="auto").info
    assert info.damping == pytest.approx(0.75, rel=1e-6)
    with pytest.raises(hypergrad.NotSymmetricError, match="damping='auto'"):
        hypergrad.solve(gaussian(20, 20), gaussian(20), GMRES(), damping="auto")


def test_a_warm_start_saves_iterations_and_every_product_is_counted() -> None:
    matrix = general(torch.logspace(0, -3, 40, dtype=F64))
    v, calls = gaussian(40, seed=2), 0

    def count(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix @ u

    x0 = dense_solve(matrix, v) * (1 + 1e-6)
    info = hypergrad.solve(count, v, GMRES(rtol=1e-5), x0=x0).info
    assert (info.iterations, info.num_hvps, calls) == (0, 1, 1)
    info = quietly(count, v, GMRES(rtol=1e-12, restart=13), x0=gaussian(40)).info
    assert info.num_hvps == calls - 1


# Many right-hand sides --------------------------------------------------------------------------


def test_a_batch_is_its_separate_solves_and_drops_what_is_done() -> None:
    matrix = general(torch.logspace(0, -2, 30, dtype=F64)) + 0.3 * torch.eye(30, dtype=F64)
    values, vectors = torch.linalg.eig(matrix)
    real = int(values.imag.abs().argmin())
    rows = gaussian(6, 30, seed=4)
    rows[1] = 0.0
    rows[2] *= 1e-12
    if values[real].imag == 0:
        rows[3] = vectors[:, real].real
    products = 0

    def count(u: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ u

    solver = GMRES(rtol=1e-9, restart=11)
    batch = hypergrad.solve(count, rows, solver, batched=True)
    assert batch.info.num_hvps == products
    singles = [hypergrad.solve(matrix, row, solver) for row in rows]
    assert products == sum(single.info.num_hvps for single in singles)
    for x, column, single in zip(batch.value, batch.info.columns, singles, strict=True):
        assert column.status is single.info.status
        assert column.iterations == single.info.iterations
        # Both within rtol of the same answer, at condition number 1e2.
        assert relative_error(x, single.value) <= 2e-9 * 1e2
    assert torch.equal(batch.value[1], torch.zeros(30, dtype=F64))


def test_a_failed_row_leaves_the_others_alone() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64))
    rows = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=F64)
    solution = quietly(matrix, rows, GMRES(), batched=True)
    assert [c.status for c in solution.info.columns] == [Status.CONVERGED, Status.STAGNATED]
    torch.testing.assert_close(solution.value[0], torch.tensor([1.0, 0.5, 0.0], dtype=F64))


# Properties -------------------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn, max_dim: int = 10) -> Tensor:
    """Real matrices of every kind: dense, normal, triangular, nilpotent, singular, symmetric."""
    n = draw(st.integers(1, max_dim))
    kind = draw(
        st.sampled_from(["general", "drawn", "normal", "shift", "triangular", "rank", "symmetric"])
    )
    seed = draw(seeds)
    power = draw(st.integers(0, 6))
    if kind == "general":
        matrix = general(torch.logspace(0, -power, n, dtype=F64), seed=seed)
    elif kind == "drawn":
        entries = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, 1e-6])
        matrix = torch.tensor(draw(st.lists(entries, min_size=n * n, max_size=n * n)), dtype=F64)
        matrix = matrix.reshape(n, n)
    elif kind == "normal":
        matrix = orthogonal(n, seed)
    elif kind == "shift":
        matrix = torch.roll(torch.eye(n, dtype=F64), 1, 0)
    elif kind == "triangular":
        matrix = torch.triu(gaussian(n, n, seed=seed), draw(st.integers(0, 1)))
    elif kind == "rank":
        rank = draw(st.integers(0, n))
        matrix = gaussian(n, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)
    else:
        matrix = symmetric(SPECTRA[draw(st.sampled_from(sorted(SPECTRA)))](max(n, 2))).matrix
    return matrix * draw(st.sampled_from([1.0, 1e-8, 1e8]))


@quick_and_thorough
@settings(max_examples=2500 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 200)
@given(
    matrix=matrices(),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    rtol=st.sampled_from([1e-2, 1e-5, 1e-9]),
    restart=st.sampled_from([1, 3, 50]),
    relative_damping=st.sampled_from([0.0, 0.0, 1e-3, 1.0]),
    scale=right_hand_scales,
)
def test_the_status_never_lies(
    effort: str,
    matrix: Tensor,
    seed: int,
    dtype: torch.dtype,
    rtol: float,
    restart: int,
    relative_damping: float,
    scale: float,
) -> None:
    stored = matrix.to(dtype).to(F64)
    norm = float(torch.linalg.matrix_norm(stored, ord=2))
    damping = relative_damping * norm
    v = (gaussian(len(matrix), seed=seed) * scale).to(dtype)
    solver = GMRES(rtol=rtol, restart=restart, max_iters=60)
    try:
        solution = quietly(matrix.to(dtype), v, solver, damping=damping)
    except hypergrad.NonFiniteError as error:
        # An answer of norm |v|/|A| can leave the range of float32, and says so.
        assert "overflows" in str(error)  # noqa: PT017
        assert dtype == F32
        return
    x, info = solution.value, solution.info
    assert torch.isfinite(x).all()
    assert info.converged == (info.status is Status.CONVERGED)
    outside = relative_residual(stored, damping, x, v)
    size = float(x.to(F64).abs().max() / v.to(F64).abs().max()) * len(matrix)
    rounding = 4 * len(matrix) * torch.finfo(dtype).eps * (norm + damping) * size
    assert outside <= 1.0 + rounding + 1e-12  # never worse than zero
    assert abs(outside - info.relative_residual) <= rounding + 1e-6 * outside + 1e-15
    if info.converged:
        assert outside <= 2 * rtol + rounding
    elif info.status is Status.MAX_ITERATIONS:
        assert info.iterations == 60
    else:
        assert info.status is Status.STAGNATED


@quick_and_thorough
@settings(max_examples=2000 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 80)
@given(matrix=matrices(), seed=seeds, shift=st.integers(-60, 60), operator_shift=st.integers(-9, 9))
def test_scaling_by_powers_of_two_scales_the_answer_exactly(
    effort: str, matrix: Tensor, seed: int, shift: int, operator_shift: int
) -> None:
    v = gaussian(len(matrix), seed=seed)
    solver = GMRES(rtol=1e-8, max_iters=40)
    plain = quietly(matrix, v, solver)
    scaled = quietly(matrix, 2.0**shift * v, solver)
    assert torch.equal(scaled.value, 2.0**shift * plain.value)
    assert scaled.info.status is plain.info.status
    scaled = quietly(2.0**operator_shift * matrix, v, solver)
    assert torch.equal(scaled.value * 2.0**operator_shift, plain.value)
    assert scaled.info.iterations == plain.info.iterations


@quick_and_thorough
@settings(max_examples=2000 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 60)
@given(matrix=matrices(), seed=seeds, m=st.integers(1, 5), restart=st.sampled_from([2, 50]))
def test_a_block_equals_its_single_solves(
    effort: str, matrix: Tensor, seed: int, m: int, restart: int
) -> None:
    rows = gaussian(m, len(matrix), seed=seed)
    solver = GMRES(rtol=1e-6, restart=restart, max_iters=30)
    batch = quietly(matrix, rows, solver, batched=True)
    for row, x, column in zip(rows, batch.value, batch.info.columns, strict=True):
        single = quietly(matrix, row, solver)
        # Sums of a block round differently: what decides between two ends may tip, but not
        # whether the answer is as good as it says.
        size = float(x.norm() / row.norm()) * float(torch.linalg.matrix_norm(matrix))
        limit = max(2e-6, 100 * torch.finfo(F64).eps * size)
        got = relative_residual(matrix, 0.0, x, row)
        expected = relative_residual(matrix, 0.0, single.value, row)
        assert got <= limit or got == pytest.approx(expected, rel=0.5) or not column.converged
        if column.converged and single.info.converged:
            gap = matrix @ (x - single.value)
            assert float(gap.norm() / row.norm()) <= 2.1e-6


# Derivatives ------------------------------------------------------------------------------------


def test_derivatives_solve_with_the_transpose() -> None:
    matrix = (gaussian(5, 5, seed=1) + 4 * torch.eye(5, dtype=F64)).requires_grad_()
    v = gaussian(5, seed=2).requires_grad_()

    def answer(matrix: Tensor, v: Tensor) -> Tensor:
        return hypergrad.solve(matrix, v, GMRES(rtol=1e-13), damping=0.5).value

    assert torch.autograd.gradcheck(answer, (matrix, v))
    assert torch.autograd.gradgradcheck(answer, (matrix, v))
    jacobian = torch.func.jacrev(lambda u: answer(matrix.detach(), u))(v.detach())
    inverse = torch.linalg.inv(matrix.detach() + 0.5 * torch.eye(5, dtype=F64))
    torch.testing.assert_close(jacobian, inverse, rtol=1e-9, atol=1e-12)


def test_a_callable_without_a_transpose_says_so() -> None:
    v = gaussian(5, seed=2).requires_grad_()
    matrix = gaussian(5, 5, seed=1) + 4 * torch.eye(5, dtype=F64)
    x = hypergrad.solve(lambda u: matrix @ u, v, GMRES()).value
    with pytest.raises(DifferentiationError, match="transpose"):
        x.sum().backward()


def test_hessians_are_their_own_transpose() -> None:
    target = gaussian(5, seed=3).requires_grad_()
    v = gaussian(5, seed=2)

    def loss(p: Tensor, target: Tensor) -> Tensor:
        return ((p - target) ** 4).sum() / 12 + (p**2).sum()

    makes = (
        lambda: hypergrad.hessian(loss, torch.zeros(5, dtype=F64), target),
        lambda: hypergrad.ggn(torch.mul, loss, torch.ones(5, dtype=F64), torch.tensor(2.0), target),
    )
    for make in makes:
        grads = []
        for solver in (GMRES(rtol=1e-12), hypergrad.CG(rtol=1e-12)):
            x = hypergrad.solve(make(), v, solver, damping=1.0).value
            grads.append(torch.autograd.grad(x.sum(), target)[0])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=0)
        assert bool((grads[0] != 0).any())
