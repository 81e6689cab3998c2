from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from hypergrad.spectrum.traces import TraceMethod
from tests.strategies import (
    DTYPES,
    F64,
    SPECTRA,
    Problem,
    generator,
    problems,
    quick_and_thorough,
    seeds,
    symmetric,
)

METHODS = get_args(TraceMethod)
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_is_unbiased_and_knows_its_error(method: TraceMethod, spectrum: str) -> None:
    problem = symmetric(SPECTRA[spectrum](40), seed=1)
    count = 200
    estimates = [
        hypergrad.trace(problem.matrix, num_hvps=18, method=method, generator=generator(seed))
        for seed in range(count)
    ]
    values = torch.tensor([estimate.value for estimate in estimates], dtype=F64)
    spread = float(values.std())
    rounding = 1e-12 * 40
    # Four standard deviations of the mean of all, which is normal: one in 16,000 by chance.
    assert abs(float(values.mean() - problem.eigenvalues.sum())) <= 4 * spread / 200**0.5 + rounding
    claimed = math.sqrt(sum(estimate.standard_error**2 for estimate in estimates) / count)
    # The spread of 200 is known to 5%; leaving one out at a time correlates the samples.
    assert claimed <= 1.3 * spread + rounding
    assert spread <= 1.8 * claimed + rounding


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_is_exact_with_as_many_products_as_columns(method: TraceMethod, dtype: torch.dtype) -> None:
    for n in (1, 2, 7, 300):
        matrix = symmetric(SPECTRA["inverse"](n), seed=n).matrix.to(dtype)
        estimate = hypergrad.trace(matrix, num_hvps=max(n, 3), method=method)
        assert estimate.value == pytest.approx(float(matrix.double().trace()), rel=1e-14)
        assert (estimate.standard_error, estimate.num_hvps) == (0.0, n)


@quick_and_thorough
@given(
    problem=problems(SPECTRA | {}, max_dim=25),
    method=st.sampled_from(METHODS),
    num_hvps=st.integers(3, 30),
    seed=seeds,
)
def test_is_finite_within_its_budget_and_scales_with_the_operator(
    effort: str, problem: Problem, method: TraceMethod, num_hvps: int, seed: int
) -> None:
    def estimate(matrix: torch.Tensor) -> hypergrad.TraceEstimate:
        return hypergrad.trace(matrix, num_hvps=num_hvps, method=method, generator=generator(seed))

    plain, scaled = estimate(problem.matrix), estimate(2.0**-300 * problem.matrix)
    assert math.isfinite(plain.value)
    assert plain.standard_error >= 0.0
    assert plain.num_hvps <= num_hvps
    assert scaled.value == pytest.approx(2.0**-300 * plain.value, rel=1e-9, abs=0.0)
    # No method leaves the numerical range by more than the spread of a quadratic form, n |A|.
    assert abs(plain.value) <= 3.0 * problem.n**2 * problem.norm


def test_xtrace_is_exact_for_a_rank_below_its_sketch() -> None:
    for dtype in DTYPES:
        matrix = symmetric(torch.logspace(0, -2, 5, dtype=F64), seed=1, dead=45).matrix.to(dtype)
        estimate = hypergrad.trace(matrix, num_hvps=14, generator=generator(1))
        eps = torch.finfo(dtype).eps
        assert estimate.value == pytest.approx(float(matrix.double().trace()), abs=500 * eps)
        assert estimate.standard_error <= 500 * eps


def test_xtrace_wins_by_far_where_the_spectrum_falls_and_hutch_stands_between() -> None:
    problem = symmetric(torch.logspace(0, -8, 200, dtype=F64), seed=1)
    exact = float(problem.eigenvalues.sum())
    errors = {
        method: math.sqrt(
            sum(
                (
                    hypergrad.trace(problem.matrix, num_hvps=90, method=method, generator=g).value
                    - exact
                )
                ** 2
                for g in map(generator, range(20))
            )
            / 20
        )
        for method in METHODS
    }
    # Epperly, Tropp, Webber, theorem 1.1: the tail beyond half of the products for XTrace (here
    # 10^(-8 * 45/200) = 1.6e-2 of the top), beyond a third, weakened by 1/sqrt(30), for Hutch++.
    assert errors["xtrace"] < errors["hutch++"] / 2
    assert errors["hutch++"] < errors["hutchinson"] / 2


@every_method
def test_one_sample_does_not_claim_to_know_its_error(method: TraceMethod) -> None:
    least = {"xtrace": 2, "hutch++": 3, "hutchinson": 1}[method]
    matrix = symmetric(SPECTRA["inverse"](30), seed=1).matrix
    assert math.isinf(hypergrad.trace(matrix, num_hvps=least, method=method).standard_error)
    with pytest.raises(hypergrad.SolverOptionError, match="num_hvps"):
        hypergrad.trace(matrix, num_hvps=least - 1, method=method)


def test_needs_a_known_method_and_says_where_a_product_is_not_finite() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="xtrace"):
        hypergrad.trace(torch.eye(3), method="hutch")  # type: ignore[arg-type]
    with pytest.raises(hypergrad.NonFiniteError, match="output of the operator"):
        hypergrad.trace(lambda v: v / 0, like=torch.ones(3))


@every_method
def test_draws_from_the_generator_alone(method: TraceMethod) -> None:
    matrix = symmetric(SPECTRA["alternating"](30), seed=1).matrix
    before = torch.get_rng_state()
    first, again, other = (
        hypergrad.trace(matrix, num_hvps=12, method=method, generator=generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
