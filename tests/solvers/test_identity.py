from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from tests.strategies import F64, SPECTRA, Problem, gaussian, problems, relative_residual, seeds


@given(problem=problems(SPECTRA), seed=seeds, scale=st.floats(1e-3, 1e3))
def test_is_a_multiple_of_v_with_its_true_residual(
    problem: Problem, seed: int, scale: float
) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.matrix, v, hypergrad.Identity(scale), damping=0.5)
    torch.testing.assert_close(solution.value, scale * v, rtol=1e-15, atol=0)
    expected = relative_residual(problem.matrix, 0.5, scale * v, v)
    assert solution.info.relative_residual == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert solution.info.num_hvps == 1
    assert not solution.info.status.failed


def test_is_exact_for_its_own_multiple_and_for_zero() -> None:
    solution = hypergrad.solve(4.0 * torch.eye(3), torch.ones(3), hypergrad.Identity(0.25))
    assert solution.info.converged
    assert hypergrad.solve(torch.eye(2), torch.zeros(2), hypergrad.Identity()).info.converged


def test_is_one_term_of_the_neumann_series() -> None:
    a, v = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.ones(2, dtype=F64)
    series = hypergrad.Neumann(num_terms=1, step_size=0.2)
    ours = hypergrad.solve(a, v, hypergrad.Identity(0.2))
    assert torch.equal(ours.value, hypergrad.solve(a, v, series).value)


def test_gives_the_hypergradient_of_one_step_at_the_solution() -> None:
    # T1-T2 with the step size for its scale is one-step differentiation, by another way.
    y = gaussian(3)

    def inner(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cosh(w - y).sum() + 0.5 * (w**2).sum()

    def outer(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sin(w).sum()

    step = hypergrad.unrolled_hypergradient(
        inner, outer, torch.zeros(3, dtype=F64), y, num_steps=200, mode="one_step",
        optimizer=hypergrad.SGD(lr=0.1),
    )  # fmt: skip
    got = hypergrad.hypergradient(
        inner, outer, step.inner_params, y, solver=hypergrad.Identity(scale=0.1)
    )
    torch.testing.assert_close(got.grad, step.grad, rtol=1e-9, atol=0)


def test_is_the_first_order_method_for_a_proximal_inner_loss() -> None:
    y, w = gaussian(3, seed=1), gaussian(3, seed=2)

    def inner(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cosh(w).sum() + 0.5 * 4.0 * ((w - y) ** 2).sum()

    got = hypergrad.hypergradient(
        inner, lambda w, y: torch.sin(w).sum(), w, y, solver=hypergrad.Identity(scale=1 / 4.0)
    )
    torch.testing.assert_close(got.grad, torch.cos(w), rtol=1e-15, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), True])
def test_a_bad_scale_is_named(scale: float) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="scale"):
        hypergrad.Identity(scale)
