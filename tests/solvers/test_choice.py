from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import CG, GMRES, MINRES, Auto, Exact, NystromPCG, Status
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    SPECTRA,
    Problem,
    dense_solve,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)


def quietly(operator: Any, v: Any, solver: Any = "auto", **options: Any) -> hypergrad.Solution:
    return hypergrad.solve(operator, v, solver, on_failure="ignore", **options)


def counting(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls = [0]

    def hvp(v: Tensor) -> Tensor:
        calls[0] += 1
        return matrix @ v

    return hvp, calls


def _outliers(n: int) -> Tensor:
    return torch.cat([torch.linspace(1.0, 0.1, 30), torch.linspace(1e-6, 1e-5, n - 30)]).to(F64)


def _low_rank(n: int) -> Tensor:
    return torch.cat([torch.logspace(0, -2, 20), torch.zeros(n - 20)]).to(F64)


#: Spectra of norm one, by dimension.
TABLE: dict[str, Callable[[int], Tensor]] = {
    "flat": SPECTRA["flat"],
    "condition 10": lambda n: torch.linspace(0.1, 1.0, n, dtype=F64),
    "condition 1000": lambda n: torch.linspace(1e-3, 1.0, n, dtype=F64),
    "geometric": lambda n: torch.logspace(0, -6, n, dtype=F64),
    "1/i": SPECTRA["inverse"],
    "1/i^2": lambda n: torch.arange(1, n + 1, dtype=F64) ** -2.0,
    "outliers": _outliers,
    "low rank": _low_rank,
    "indefinite": SPECTRA["alternating"],
    "one negative": SPECTRA["one_negative"],
}
#: What the choice may cost beside the best candidate, found by running them all: a probe, and a
#: factor of two (measured: 1.4 at worst in 174 cells of spectrum, n, m and damping).
FACTOR, PROBE = 2.0, 40


@pytest.mark.parametrize("spectrum", TABLE)
@pytest.mark.parametrize(
    ("n", "m"),
    [(60, 1), (60, 32), (300, 1), (300, 8)],
)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_choice_costs_little_more_than_the_best_candidate(
    spectrum: str, n: int, m: int, damping: float
) -> None:
    problem = symmetric(TABLE[spectrum](n), seed=1)
    operator, v = hypergrad.as_operator(problem.matrix), gaussian(m, n, seed=3)
    # A thousand iterations are no bargain at these dimensions.
    candidates: list[hypergrad.Solver] = [CG(max_iters=1000), MINRES(max_iters=1000), Exact()]
    if damping > 0:
        candidates += [NystromPCG(rank, generator=generator(0)) for rank in (10, 40)]
    costs = []
    for candidate in candidates:
        info = quietly(operator, v, candidate, damping=damping, batched=True).info
        if info.converged:
            costs.append(info.num_hvps)
    solution = quietly(operator, v, damping=damping, batched=True)
    info = solution.info
    if not costs:  # a singular system with nothing to be found
        assert info.status.failed
        return
    assert info.converged
    assert info.num_hvps <= FACTOR * min(costs) + PROBE
    for x, row in zip(solution.value, v, strict=True):
        assert relative_residual(problem.matrix, damping, x, row) <= 1.01e-5


# Which one, and why -----------------------------------------------------------------------------

CHOICES: dict[str, tuple[Tensor, int, float, type[hypergrad.Solver]]] = {
    "small": (SPECTRA["inverse"](30), 1, 0.0, Exact),
    "moderate condition": (TABLE["condition 10"](400), 1, 0.0, CG),
    "moderate condition, damped": (TABLE["condition 10"](400), 1, 1e-3, CG),
    "one right-hand side, fast decay": (TABLE["1/i^2"](400), 1, 1e-2, CG),
    "indefinite": (TABLE["indefinite"](400), 1, 0.0, MINRES),
    "ill-conditioned, small enough": (TABLE["geometric"](300), 8, 0.0, Exact),
    "as many right-hand sides as rows": (TABLE["condition 1000"](200), 200, 0.0, Exact),
    "low rank, many right-hand sides": (_low_rank(400), 32, 1e-4, NystromPCG),
    "outliers, many right-hand sides": (_outliers(400), 32, 1e-3, NystromPCG),
}


@pytest.mark.parametrize("name", CHOICES)
def test_chooses_and_says_why(name: str) -> None:
    eigenvalues, m, damping, expected = CHOICES[name]
    problem = symmetric(eigenvalues, seed=1)
    v = gaussian(m, problem.n, seed=3)
    info = hypergrad.solve(problem.matrix, v, "auto", damping=damping, batched=True).info
    assert type(info.solver) is expected
    assert info.reason is not None
    assert info.reason.startswith(f"{expected.__name__}: n = {problem.n}, {m} right-hand side")
    if expected is not Exact or problem.n > 40:
        assert f"damping {damping:.3g}; " in info.reason
        assert f"predicted HVPs: {expected.__name__} " in info.reason
    for column in info.columns:
        assert column.reason == info.reason


def test_other_solvers_give_no_reason() -> None:
    assert hypergrad.solve(torch.eye(3), torch.ones(3), CG()).info.reason is None


def test_an_operator_that_is_not_symmetric_goes_to_gmres() -> None:
    matrix = gaussian(200, 200) / 14 + 2 * torch.eye(200, dtype=F64)
    v = gaussian(200, seed=1)
    for dtype in DTYPES:
        solution = hypergrad.solve(matrix.to(dtype), v.to(dtype), "auto")
        assert isinstance(solution.info.solver, GMRES)
        assert solution.info.reason is not None
        assert "not symmetric" in solution.info.reason
        assert relative_residual(matrix.to(dtype).to(F64), 0.0, solution.value, v.to(dtype)) <= 2e-5
    with pytest.raises(hypergrad.NotSymmetricError, match="damping='auto'"):
        hypergrad.solve(matrix, v, "auto", damping="auto")


def test_random_products_are_refused_and_not_given_to_gmres() -> None:
    source = generator(0)
    with pytest.raises(hypergrad.NotSymmetricError, match="differ from call to call"):
        hypergrad.solve(
            lambda u: u * torch.rand(100, generator=source, dtype=F64), gaussian(100), "auto"
        )


# Second thoughts --------------------------------------------------------------------------------


def test_negative_curvature_that_the_probe_missed_hands_over() -> None:
    eigenvalues = 1.0 / torch.arange(1, 401, dtype=F64)
    eigenvalues[-1] = -1e-3
    problem = symmetric(eigenvalues, seed=2)
    v = gaussian(2, 400, seed=3)
    hvp, calls = counting(problem.matrix)
    solution = hypergrad.solve(hvp, v, Auto(rtol=1e-7, probe_steps=6), batched=True)
    info = solution.info
    assert info.converged
    assert isinstance(info.solver, MINRES | Exact)
    assert info.reason is not None
    assert info.reason.startswith("CG, then ")
    assert "met negative curvature after" in info.reason
    assert info.num_hvps == calls[0]
    for x, row in zip(solution.value, v, strict=True):
        assert relative_residual(problem.matrix, 0.0, x, row) <= 1.01e-7


def test_a_recurrence_slower_than_predicted_hands_over() -> None:
    # Fast at first, in the cluster; then an iteration for each of the eighty others, and more.
    cluster = torch.linspace(0.9, 1.0, 220, dtype=F64)
    problem = symmetric(torch.cat([cluster, torch.logspace(-1, -5, 80, dtype=F64)]), seed=2)
    v = problem.matrix @ gaussian(300, seed=3)
    hvp, calls = counting(problem.matrix)
    info = hypergrad.solve(hvp, v, Auto(rtol=1e-10)).info
    assert info.num_hvps == calls[0]
    assert info.converged
    assert isinstance(info.solver, Exact)
    assert info.reason is not None
    assert info.reason.startswith("CG, then Exact: ")
    assert "CG had not converged after" in info.reason
    assert info.iterations > 0  # those of CG
    best = hypergrad.solve(problem.matrix, v, Exact(rtol=1e-10)).info.num_hvps
    assert info.num_hvps <= FACTOR * best + PROBE


def test_the_matrix_is_not_assembled_beyond_the_memory_allowed() -> None:
    problem = symmetric(TABLE["geometric"](300), seed=1)
    v = gaussian(16, 300, seed=3)
    assert isinstance(hypergrad.solve(problem.matrix, v, "auto", batched=True).info.solver, Exact)
    frugal = Auto(max_bytes=6 * 299**2 * 8)
    info = quietly(problem.matrix, v, frugal, batched=True).info
    assert isinstance(info.solver, CG)
    assert "Exact" not in str(info.reason)


# Budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [20, 60, 200, 1000])
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_budget_is_kept_to(budget: int, m: int, damping: float) -> None:
    problem = symmetric(TABLE["geometric"](300), seed=1)
    v = gaussian(m, 300, seed=3)
    info = quietly(problem.matrix, v, Auto(max_hvps=budget), batched=True, damping=damping).info
    # At the least: an iteration a right-hand side and its checks.
    assert info.num_hvps <= max(budget, budget // 4 + 3 * m) + 2 * m
    assert info.status in (Status.CONVERGED, Status.MAX_ITERATIONS)
    assert info.relative_residual <= 1.0
    if budget == 1000:
        assert info.converged
    elif not info.converged:
        assert f"of which a budget of {budget} allows none" in str(info.reason)


# The contract of solve --------------------------------------------------------------------------


@quick_and_thorough
@settings(max_examples=2000 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 200)
@given(
    problem=problems(SPECTRA, max_dim=60),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    relative=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    m=st.sampled_from([1, 3]),
)
def test_the_status_never_lies(
    effort: str, problem: Problem, seed: int, dtype: torch.dtype, relative: float, m: int
) -> None:
    damping = relative * (problem.norm or 1.0)
    v = gaussian(m, problem.n, seed=seed).to(dtype)
    stored = problem.matrix.to(dtype).to(F64)
    solution = quietly(problem.hvp(dtype), v, Auto(probe_steps=4), damping=damping, batched=True)
    for x, row, info in zip(solution.value, v, solution.info.columns, strict=True):
        assert torch.isfinite(x).all()
        outside = relative_residual(stored, damping, x, row)
        size = float(torch.linalg.vector_norm(x.to(F64)) / torch.linalg.vector_norm(row.to(F64)))
        rounding = 8 * problem.n * torch.finfo(dtype).eps * (problem.norm + damping) * size + 1e-13
        assert abs(outside - info.relative_residual) <= rounding + 1e-6 * outside
        if info.converged:
            assert outside <= 2e-5 + rounding
        if relative == 1.0 and dtype == F64 and float(problem.eigenvalues.min()) >= 0:
            assert info.converged


def test_one_right_hand_side_goes_on_from_its_probe() -> None:
    problem = symmetric(TABLE["condition 10"](400), seed=1)
    v = gaussian(400, seed=3)
    plain = hypergrad.solve(problem.matrix, v, CG()).info
    info = hypergrad.solve(problem.matrix, v, "auto").info
    assert info.num_hvps <= plain.num_hvps + 2


def test_a_warm_start_that_will_do_costs_its_check() -> None:
    problem = symmetric(TABLE["condition 10"](100), seed=1)
    v = gaussian(100, seed=3)
    x0 = dense_solve(problem.matrix, v)
    solution = hypergrad.solve(problem.matrix, v, "auto", x0=x0)
    assert solution.info.num_hvps == 2
    assert torch.equal(solution.value, x0)
    near = hypergrad.solve(problem.matrix, v, "auto", x0=x0 * (1 + 1e-3)).info
    assert near.num_hvps < hypergrad.solve(problem.matrix, v, "auto").info.num_hvps


def test_zero_is_answered_at_no_cost() -> None:
    solution = hypergrad.solve(torch.eye(100), torch.zeros(100), "auto")
    assert torch.equal(solution.value, torch.zeros(100))
    assert solution.info.num_hvps == 0


@pytest.mark.parametrize("m", [1, 3])
def test_automatic_damping_is_that_of_the_other_solvers(m: int) -> None:
    for spectrum in ("inverse", "one_negative"):
        problem = symmetric(SPECTRA[spectrum](100), seed=1)
        v = gaussian(m, 100, seed=3)
        expected = hypergrad.solve(problem.matrix, v, CG(), damping="auto", batched=True).info
        info = hypergrad.solve(problem.matrix, v, "auto", damping="auto", batched=True).info
        assert info.converged
        assert info.damping == pytest.approx(expected.damping, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_the_operator_changes_no_choice(scale: float) -> None:
    problem = symmetric(TABLE["1/i"](200), seed=1)
    v = gaussian(200, seed=3)
    plain = hypergrad.solve(problem.matrix, v, "auto").info
    scaled = hypergrad.solve(scale * problem.matrix, v * 1e-30, "auto").info
    assert type(scaled.solver) is type(plain.solver)
    assert scaled.converged


def test_every_product_is_counted_and_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for spectrum in TABLE:
        problem = symmetric(TABLE[spectrum](100), seed=1)
        for damping in (0.0, 1e-2, "auto"):
            for x0 in (None, gaussian(100, seed=5)):
                hvp, calls = counting(problem.matrix)
                info = quietly(hvp, gaussian(100, seed=3), damping=damping, x0=x0).info
                assert info.num_hvps == calls[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("damping", [1e-40, 1e-200, 5e-324])
def test_a_damping_far_below_the_spectrum_is_a_damping(damping: float, m: int) -> None:
    # A condition number whose root is one above or below it, to rounding, or infinite.
    matrix, v = torch.diag(1.0 / torch.arange(1, 61, dtype=F64)), gaussian(m, 60)
    solution = hypergrad.solve(matrix, v, "auto", damping=damping, batched=True)
    assert solution.info.converged
    assert relative_error(solution.value, v / matrix.diagonal()) < 1e-3


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    problem = symmetric(torch.linspace(0.5, 1.0, 100, dtype=F64), seed=1)
    v = gaussian(100, seed=3).to(dtype)
    rtol = 4 * torch.finfo(dtype).eps
    solution = hypergrad.solve(problem.hvp(dtype), v, Auto(rtol=rtol))
    assert solution.value.dtype == dtype
    assert solution.info.converged


def test_gradients_flow_through_the_solver_that_was_chosen() -> None:
    matrix = gaussian(60, 60) / 8 + 2 * torch.eye(60, dtype=F64)
    for start in (matrix, matrix @ matrix.T):
        leaf = start.clone().requires_grad_()
        v = gaussian(60, seed=1).requires_grad_()
        weights = gaussian(60, seed=2)
        x = hypergrad.solve(leaf, v, Auto(rtol=1e-12)).value
        got = torch.autograd.grad((x * weights).sum(), (leaf, v))
        exact = torch.linalg.solve(leaf, v)
        expected = torch.autograd.grad((exact * weights).sum(), (leaf, v))
        for mine, theirs in zip(got, expected, strict=True):
            assert relative_error(mine, theirs) <= 1e-8


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": -1.0},
        {"rtol": 0.0},
        {"atol": float("nan")},
        {"max_hvps": 0},
        {"max_bytes": 0},
        {"probe_steps": 1},
    ],
)
def test_options_are_checked_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError):
        Auto(**options)


def test_another_name_is_refused_with_the_remedy() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="or 'auto'"):
        hypergrad.solve(torch.eye(2), torch.ones(2), "cg")  # type: ignore[arg-type]
