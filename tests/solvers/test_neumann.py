from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Neumann, Status
from hypergrad.solvers.neumann import Acceleration
from tests.solvers.traced import UncheckedSystem, both_forms
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


@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
@pytest.mark.parametrize("step_size", ["auto", 0.3])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_negative_curvature_does_not_overflow_a_narrow_dtype(
    acceleration: Any, step_size: Any, size: float
) -> None:
    matrix, v = -torch.eye(3, dtype=torch.float16), size * torch.ones(3, dtype=torch.float16)
    for num_terms in (2, 15, 100):
        solver = Neumann(num_terms=num_terms, step_size=step_size, acceleration=acceleration)
        info = hypergrad.solve(matrix, v, solver, on_failure="ignore").info
        assert info.status is Status.NEGATIVE_CURVATURE
        assert info.relative_residual <= 1.0


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


# The bound on the step ---------------------------------------------------------------------------


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanczos starts in the span of all coordinates but the last three."""

    def start(dim: int, dtype: torch.dtype, device: torch.device, source: Any) -> Tensor:
        vector = torch.ones(dim, dtype=dtype, device=device)
        vector[-3:] = 0.0
        return vector

    monkeypatch.setattr("hypergrad.spectrum.extremes._start", start)


def _unseen(n: int, *tops: float) -> Tensor:
    eigenvalues = torch.ones(n, dtype=F64)
    eigenvalues[-len(tops) :] = torch.tensor(tops, dtype=F64)
    return torch.diag(eigenvalues)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32, F64])
@pytest.mark.parametrize("tops", [(3.0,), (1e2,), (1e4,), (1e8,), (5.0, 1e2, 1e6)])
def test_a_top_that_lanczos_could_not_see_is_found_when_it_grows(
    acceleration: Any, dtype: torch.dtype, tops: tuple[float, ...]
) -> None:
    n, num_terms = 50, 100
    operator = hypergrad.as_operator(_unseen(n, *tops).to(dtype))
    # The adversary does what he says.
    assert hypergrad.extreme_eigenvalues(operator, num_steps=10).largest_bound < 1.01
    top, unit = max(tops), torch.eye(n, dtype=F64)[-1]
    for v in (gaussian(n, seed=5), unit, gaussian(n, seed=6) + 1e-9 * unit):
        solver = Neumann(num_terms=num_terms, acceleration=acceleration)
        info = hypergrad.solve(operator, v.to(dtype), solver, on_failure="ignore").info
        if top * torch.finfo(dtype).eps > 1:  # the rounding of a product hides all but the top
            assert info.relative_residual <= 1.0
            assert info.status is not Status.NEGATIVE_CURVATURE
            continue
        assert not info.status.failed
        assert info.relative_residual < 1.0
        assert num_terms + 1 <= info.num_hvps <= num_terms + 1 + 10 * len(tops) + 10
        # No worse than the right step along the smallest eigenvalue, for the terms that are left.
        left = (1 - 1 / top) ** (num_terms - 30)
        assert info.relative_residual <= left + 30 * torch.finfo(dtype).eps


@quick_and_thorough
@given(
    bulk=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=12),
    tops=st.lists(st.floats(0.9999, 1.0), min_size=1, max_size=4),
    spike=st.sampled_from([1.0, 10.0, 1e5]),
    seed=seeds,
    num_terms=st.integers(1, 60),
    acceleration=st.sampled_from(["none", "chebyshev"]),
)
def test_no_residual_grows_without_negative_curvature(
    effort: str,
    bulk: list[float],
    tops: list[float],
    spike: float,
    seed: int,
    num_terms: int,
    acceleration: Any,
) -> None:
    eigenvalues = torch.tensor([*bulk, *(spike * top for top in tops)], dtype=F64)
    n = len(eigenvalues)
    problem = symmetric(eigenvalues, seed=seed)
    # A right-hand side in the bulk but for rounding, which any growth would make visible.
    v = problem.basis[:, : len(bulk)] @ gaussian(len(bulk), seed=seed)
    solver = Neumann(num_terms=num_terms, acceleration=acceleration)
    info = hypergrad.solve(problem.hvp(), v, solver, damping=1e-3, on_failure="ignore").info
    assert info.status in (Status.FIXED_ITERATIONS, Status.CONVERGED)
    assert info.relative_residual < 1.0
    assert info.num_hvps <= num_terms + 10 + 2 * min(n, 10)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
def test_each_row_backs_off_on_its_own(acceleration: Any) -> None:
    matrix, unit = _unseen(30, 50.0), torch.eye(30, dtype=F64)
    rows = torch.stack([gaussian(30, seed=1), unit[-1], unit[0], torch.zeros(30, dtype=F64)])
    solver = Neumann(num_terms=40, acceleration=acceleration)
    together = hypergrad.solve(matrix, rows, solver, batched=True)
    for row, x, info in zip(rows, together.value, together.info.columns, strict=True):
        alone = hypergrad.solve(matrix, row, solver)
        assert relative_error(x, alone.value) <= 1e-10
        assert info.status is alone.info.status
        assert info.relative_residual == pytest.approx(alone.info.relative_residual, abs=1e-12)


def test_the_probe_reports_the_smallest_ritz_value() -> None:
    problem = symmetric(INDEFINITE["one_negative"](10), seed=1)
    info = hypergrad.solve(problem.hvp(), gaussian(10), Neumann(), on_failure="ignore").info
    assert info.smallest_eigenvalue == pytest.approx(-0.5, rel=1e-9)


# Acceleration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [30.0, 100.0, 1000.0])
def test_chebyshev_needs_the_root_of_the_condition_number(condition: float) -> None:
    eigenvalues = torch.linspace(0.0, 1.0, 40, dtype=F64)
    problem, damping, rtol = symmetric(eigenvalues, seed=1), 1.0 / condition, 1e-4
    v = problem.basis.sum(dim=1)  # a share of 1/40 along the smallest eigenvector

    def residual(num_terms: float, acceleration: Any) -> float:
        solver = Neumann(num_terms=math.ceil(num_terms), acceleration=acceleration)
        return hypergrad.solve(problem.hvp(), v, solver, damping=damping).info.relative_residual

    # |p_K| <= 2 exp(-2 K sqrt(a/b)) on [a, b], with the Lanczos bound b at most twice |A|.
    enough = math.sqrt(2 * (condition + 1)) / 2 * math.log(2 / rtol)
    assert residual(enough, "chebyshev") <= rtol
    # And not by far fewer: this is a rate, not an accident of the spectrum.
    assert residual(enough / 4, "chebyshev") > rtol
    # (1 - a/b)^K / sqrt(40) along the smallest eigenvector.
    assert residual(enough, "none") > 10 * rtol
    assert residual(0.5 * condition * math.log(0.15 / rtol), "none") > rtol


def test_twenty_plain_terms_are_too_few_where_a_hundred_do() -> None:
    problem = symmetric(torch.linspace(0.0, 1.0, 30, dtype=F64), seed=1)
    v, tolerance = gaussian(30, seed=2), 1e-3

    def residual(num_terms: int, acceleration: Any = "none") -> float:
        solver = Neumann(num_terms=num_terms, acceleration=acceleration)
        x = hypergrad.solve(problem.hvp(), v, solver, damping=0.1).value
        return relative_residual(problem.matrix, 0.1, x, v)

    assert residual(20) > 20 * tolerance
    assert residual(100) <= tolerance
    assert residual(20, "chebyshev") <= tolerance


@quick_and_thorough
@given(problem=problems(), seed=seeds, num_terms=st.integers(1, 60))
def test_chebyshev_is_its_polynomial(
    effort: str, problem: Problem, seed: int, num_terms: int
) -> None:
    # The residual is p_K(A) v with p_K(x) = T_K((b + a - 2x)/(b - a)) / T_K((b + a)/(b - a)).
    damping, upper = 0.1 * problem.norm, 1.2 * problem.norm
    v = gaussian(problem.n, seed=seed)
    solver = Neumann(num_terms=num_terms, step_size=1 / upper, acceleration="chebyshev")
    solution = hypergrad.solve(problem.hvp(), v, solver, damping=damping)
    lower = max(damping, upper / num_terms**2)
    if lower < upper:
        points = (upper + lower - 2 * (problem.eigenvalues + damping)) / (upper - lower)
        centre = torch.tensor((upper + lower) / (upper - lower), dtype=F64)
        values = _chebyshev(num_terms, points) / _chebyshev(num_terms, centre)
    else:
        values = (1 - (problem.eigenvalues + damping) / upper) ** num_terms
    expected = problem.basis @ (values * (problem.basis.T @ v))
    residual = v - problem.matrix @ solution.value - damping * solution.value
    assert float((residual - expected).norm()) <= 1e-11 * float(v.norm())


def _chebyshev(degree: int, x: Tensor) -> Tensor:
    previous, current = torch.ones_like(x), x
    for _ in range(degree - 1):
        previous, current = current, 2 * x * current - previous
    return current


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_a_lower_bound_that_is_wrong_costs_terms_only(condition: float) -> None:
    # One eigenvalue far below all others, which ten Lanczos steps do not resolve.
    eigenvalues = torch.cat(
        [torch.tensor([1 / condition], dtype=F64), torch.linspace(0.5, 1.0, 400, dtype=F64)]
    )
    problem = symmetric(eigenvalues, seed=1)
    v = problem.basis[:, 0] + 0.1 * gaussian(401, seed=2) / 20
    previous = 1.0
    for num_terms in (10, 40, 160, 640):
        residuals = {
            name: hypergrad.solve(
                problem.hvp(), v, Neumann(num_terms=num_terms, acceleration=name)
            ).info.relative_residual
            for name in get_args(Acceleration)
        }
        assert residuals["chebyshev"] <= previous * (1 + 1e-9)
        assert residuals["chebyshev"] <= residuals["none"]
        previous = residuals["chebyshev"]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
def test_compiles_to_one_graph_with_the_same_answers(acceleration: Any, start: bool) -> None:
    problem, b = symmetric(torch.linspace(1.0, 0.1, 12, dtype=F64), seed=1), gaussian(3, 12, seed=2)
    solver = Neumann(num_terms=8, step_size=0.5, acceleration=acceleration)
    # Rows of which one is a good start, one a bad one.
    x0 = torch.stack([dense_solve(problem.matrix, b[0], 0.3), 9 * b[1], b[2]]) if start else None
    traced, plain = both_forms(solver, problem.matrix, b, 0.3, x0)
    torch.testing.assert_close(traced[0], plain[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traced[1], plain[1], rtol=1e-10, atol=1e-12)


def test_what_decides_on_values_cannot_be_compiled_and_says_so() -> None:
    for solver in (Neumann(), Neumann(step_size=0.1, num_samples=3)):
        system = UncheckedSystem(hypergrad.as_operator(torch.eye(2)), torch.ones(1, 2), 0.0)
        with pytest.raises(hypergrad.SolverOptionError, match="compile"):
            solver._run_traced(system, None)
