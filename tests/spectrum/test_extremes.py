from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from hypergrad.spectrum import damping_from_extremes
from tests.strategies import (
    DTYPES,
    F64,
    SPECTRA,
    Problem,
    generator,
    problems,
    quick_and_thorough,
    symmetric,
)


@quick_and_thorough
@given(problem=problems(SPECTRA | {}, max_dim=25), steps=st.integers(1, 30))
def test_ritz_values_lie_inside_the_spectrum_and_the_bound_outside(
    effort: str, problem: Problem, steps: int
) -> None:
    ends = hypergrad.extreme_eigenvalues(hypergrad.as_operator(problem.matrix), num_steps=steps)
    low, high = float(problem.eigenvalues.min()), float(problem.eigenvalues.max())
    rounding = 100 * torch.finfo(F64).eps * problem.norm
    assert low - rounding <= ends.smallest <= ends.largest <= high + rounding
    assert ends.num_hvps <= min(steps, problem.n)
    if steps >= problem.n:
        assert ends.smallest == pytest.approx(low, abs=1e-7 * problem.norm)
        assert ends.largest == pytest.approx(high, abs=1e-7 * problem.norm)
    assert ends.largest_bound >= ends.largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_bound_holds_after_ten_steps(dtype: torch.dtype, spectrum: str) -> None:
    problem = symmetric(SPECTRA[spectrum](200), seed=1)
    operator = hypergrad.as_operator(problem.matrix.to(dtype))
    ends = hypergrad.extreme_eigenvalues(operator, num_steps=10)
    high = float(problem.eigenvalues.max())
    assert ends.largest_bound >= high - 1e-6 * problem.norm


def test_is_the_same_every_time_and_leaves_the_global_state_alone() -> None:
    operator = hypergrad.as_operator(symmetric(SPECTRA["inverse"](50), seed=1).matrix)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = hypergrad.extreme_eigenvalues(operator, num_steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert hypergrad.extreme_eigenvalues(operator, num_steps=5) == first
    other = hypergrad.extreme_eigenvalues(operator, num_steps=5, generator=generator(7))
    assert other != first


def test_automatic_damping_by_its_definition() -> None:
    eps = 1e-15
    assert damping_from_extremes(0.0, 0.0, rounding=eps) == 1.0
    assert damping_from_extremes(0.0, 2.0, rounding=eps) == pytest.approx(2e-3)
    assert damping_from_extremes(0.0, 2.0, rounding=eps, tail=0.5) == pytest.approx(1.5)
    assert damping_from_extremes(-1.0, 2.0, rounding=eps) == pytest.approx(1.5)
    # Rounding of a positive semi-definite operator is no negative curvature.
    assert damping_from_extremes(-1e-16, 1.0, rounding=eps) == pytest.approx(1e-3)
    with pytest.raises(hypergrad.NonFiniteError, match="Rescale"):
        damping_from_extremes(0.0, float("inf"), rounding=eps)
