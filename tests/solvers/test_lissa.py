"""The stochastic form of the Neumann series: one sample of the operator a term."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Neumann, SampledOperator, Status
from tests.strategies import (
    F32,
    F64,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    relative_residual,
    symmetric,
)

N, TERMS, STEP = 6, 12, 0.4


def _parts(count: int = 8, spread: float = 0.8) -> list[Tensor]:
    """Positive matrices of norm at most about two."""
    shared = symmetric(torch.linspace(1.0, 0.3, N, dtype=F64), seed=1).matrix
    parts = []
    for seed in range(count):
        u = gaussian(N, seed=seed + 10)
        parts.append((1 - spread) * shared + spread * torch.outer(u, u) / (u @ u))
    return parts


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(dim=0)


def _series(matrix: Tensor, v: Tensor, terms: int = TERMS, step: float = STEP) -> Tensor:
    x = torch.zeros_like(v)
    for _ in range(terms):
        x = x + step * (v - matrix @ x)
    return x


def _fresh(parts: list[Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """A callable that draws a minibatch for each product, as a user writes it."""
    source = generator(seed)

    def hvp(v: Tensor) -> Tensor:
        drawn = int(torch.randint(len(parts), (), generator=source))
        return parts[drawn].to(v.dtype) @ v

    return hvp


def _runs(num_samples: int, count: int, fresh: bool) -> Tensor:
    parts, v = _parts(), gaussian(N, seed=2)
    solver = Neumann(num_terms=TERMS, step_size=STEP, num_samples=num_samples)
    answers = []
    for seed in range(count):
        drawn: Any = SampledOperator(parts, generator=generator(seed))
        operator = _fresh(parts, seed) if fresh else drawn
        answers.append(hypergrad.solve(operator, v, solver).value)
    return torch.stack(answers)


@quick_and_thorough
@pytest.mark.parametrize("fresh", [False, True])
def test_is_unbiased_for_the_truncated_series_of_the_mean(effort: str, fresh: bool) -> None:
    count = 150 if effort == "quick" else 4000
    answers = _runs(2, count, fresh)
    expected = _series(_mean(_parts()), gaussian(N, seed=2))
    errors = (answers.mean(dim=0) - expected) / (answers.std(dim=0) / count**0.5)
    # Six entries within 4.5 standard deviations: one miss in 25,000 by chance.
    assert float(errors.abs().max()) <= 4.5


@quick_and_thorough
def test_the_variance_falls_with_the_repetitions(effort: str) -> None:
    count = 150 if effort == "quick" else 3000
    one, nine = (float(_runs(r, count, False).var(dim=0).sum()) for r in (1, 9))
    # A variance of six correlated entries from 150 runs is known to about 15%.
    assert one / nine == pytest.approx(9.0, rel=0.45 if effort == "quick" else 0.12)


def test_one_operator_is_the_series_itself() -> None:
    (matrix,), v = _parts(1), gaussian(N, seed=2)
    lissa = Neumann(num_terms=TERMS, step_size=STEP, num_samples=3)
    for operator in (matrix, SampledOperator([matrix])):
        solution = hypergrad.solve(operator, v, lissa)
        plain = hypergrad.solve(matrix, v, Neumann(num_terms=TERMS, step_size=STEP))
        assert relative_error(solution.value, plain.value) <= 1e-13
        assert solution.info.relative_residual == pytest.approx(plain.info.relative_residual)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_residual_is_that_of_the_mean_where_it_is_known(dtype: torch.dtype) -> None:
    parts, v = [part.to(dtype) for part in _parts()], gaussian(N, seed=2).to(dtype)
    drawn = SampledOperator(parts, generator=generator(1))
    solver = Neumann(num_terms=40, step_size=STEP, num_samples=5)
    x, info = _value_and_info(hypergrad.solve(drawn, v, solver, damping=0.1))
    assert x.dtype == dtype
    outside = relative_residual(_mean([part.to(F64) for part in parts]), 0.1, x, v)
    assert info.relative_residual == pytest.approx(outside, rel=1e-3)
    assert info.status is Status.FIXED_ITERATIONS
    # r (K - 1) of one minibatch each, and one of each of the eight for the residual.
    assert info.num_hvps == 5 * 39 + 8


def _value_and_info(solution: hypergrad.Solution) -> tuple[Tensor, hypergrad.SolveInfo]:
    return solution.value, solution.info


def test_the_residual_of_a_callable_is_never_too_small_on_average() -> None:
    parts, v = _parts(), gaussian(N, seed=2)
    solver = Neumann(num_terms=TERMS, step_size=STEP, num_samples=4)
    claimed, true = [], []
    for seed in range(60):
        x, info = _value_and_info(hypergrad.solve(_fresh(parts, seed), v, solver))
        assert info.status is Status.FIXED_ITERATIONS
        assert info.num_hvps == 4 * (TERMS - 1) + 4
        claimed.append(info.relative_residual**2)
        true.append(relative_residual(_mean(parts), 0.0, x, v) ** 2)
    assert sum(claimed) >= sum(true)


def test_noise_raises_no_false_alarm() -> None:
    # The mean is the identity; each product is wrong by three times its size.
    def hvp(v: Tensor) -> Tensor:
        return v + 3.0 * torch.randn(v.shape, generator=source, dtype=v.dtype) * v.norm() / N**0.5

    for seed in range(20):
        source = generator(seed)
        solver = Neumann(num_terms=20, step_size=0.05, num_samples=2)
        solution = hypergrad.solve(hvp, gaussian(N, seed=seed), solver, on_failure="raise")
        assert torch.isfinite(solution.value).all()


def test_the_automatic_step_does_not_diverge_on_minibatches() -> None:
    for seed in range(5):
        drawn = SampledOperator(_parts(), generator=generator(seed))
        solver = Neumann(num_terms=100, num_samples=6)
        info = hypergrad.solve(drawn, gaussian(N, seed=seed), solver, on_failure="raise").info
        assert info.relative_residual < 0.5
        assert info.num_hvps == 10 + 6 * 99 + 8


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_divergence_is_reported_and_not_returned(fresh: bool, warm: bool) -> None:
    parts, v = _parts(), gaussian(2, N, seed=2)
    v[1] = 0.0
    operator: Any = _fresh(parts, 0) if fresh else SampledOperator(parts, generator=generator(0))
    solver = Neumann(num_terms=400, step_size=20.0, num_samples=2)
    x0 = 0.5 * v if warm else None
    solution = hypergrad.solve(operator, v, solver, batched=True, x0=x0, on_failure="ignore")
    bad, nothing = solution.info.columns
    assert torch.isfinite(solution.value).all()
    assert bad.status is Status.STAGNATED
    assert float(solution.value[0].norm()) <= 0.5 * float(v[0].norm()) + 1e-12
    assert nothing.status is Status.CONVERGED
    assert torch.equal(solution.value[1], torch.zeros(N, dtype=F64))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_scales_of_v_and_of_the_operator(scale: float) -> None:
    v = gaussian(N, seed=2)
    solver = Neumann(num_terms=30, num_samples=2)

    def run(a: float, b: float) -> Tensor:
        parts = [a * part for part in _parts()]
        drawn = SampledOperator(parts, generator=generator(1))
        return hypergrad.solve(drawn, b * v, solver).value

    plain = run(1.0, 1.0)
    assert relative_error(run(1.0, scale) / scale, plain) <= 1e-12
    assert relative_error(run(scale, 1.0) * scale, plain) <= 1e-12


def test_one_dimension_and_one_term() -> None:
    solver = Neumann(num_terms=1, step_size=0.5, num_samples=1)
    info = hypergrad.solve(SampledOperator([torch.ones(1, 1)]), torch.ones(1), solver).info
    assert (info.num_hvps, info.relative_residual) == (1, 0.5)


def test_what_needs_one_operator_is_refused() -> None:
    drawn, v = SampledOperator(_parts()), gaussian(N, seed=2)
    with pytest.raises(hypergrad.SolverOptionError, match="num_samples"):
        hypergrad.solve(drawn, v, Neumann())
    with pytest.raises(hypergrad.DampingError, match="Lanczos"):
        hypergrad.solve(drawn, v, Neumann(num_samples=2), damping="auto")
    with pytest.raises(hypergrad.SolverOptionError, match="amplify"):
        Neumann(num_samples=2, acceleration="chebyshev")
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(hypergrad.SolverOptionError, match="num_samples"):
            Neumann(num_samples=wrong)  # type: ignore[arg-type]


def test_influence_of_a_regression_by_fresh_minibatches() -> None:
    x, y, params = gaussian(64, 4, seed=1), gaussian(64, seed=2), torch.zeros(4, dtype=F64)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y) ** 2).mean()

    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    drawn = SampledOperator(
        [hypergrad.hessian(loss, params, *batch) for batch in batches], generator=generator(0)
    )
    v = gaussian(4, seed=3)
    solver = Neumann(num_terms=150, step_size=0.1, num_samples=10)
    answer = hypergrad.solve(drawn, v, solver, damping=0.01).value
    whole = hypergrad.hessian(loss, params, x, y)
    exact = hypergrad.exact_ihvp(whole, v, damping=0.01)
    # SGD's stationary noise: variance about step * |H^-1| times that of the steps, over 10 runs.
    assert relative_error(answer, exact) <= math.sqrt(0.1 / 10)
