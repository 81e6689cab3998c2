from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from hypergrad import Verdict
from tests.bilevel.test_hypergradient import couple, judge, quadratic, solve_inner
from tests.strategies import F32, F64, gaussian, trees


def newton(init: Any, outer: Any) -> Any:
    return solve_inner(couple, init, outer)


def passes(inner: Any, outer: Any) -> None:
    star = newton(inner, outer)
    check = hypergrad.check_hypergradient(
        couple, judge, star, outer, solve_inner=newton, solver=hypergrad.Exact(), rtol=1e-3,
        num_directions=1,
    )  # fmt: skip
    assert check.passed, check.message
    assert check.relative_error + check.resolution <= 1e-3
    assert check.certificate.certified


def test_a_right_hypergradient_of_trees_passes() -> None:
    inner = {"w": gaussian(2, 2, seed=1), "b": [gaussian(3, seed=2)[0]]}
    passes(inner, (gaussian(2, seed=3), {"c": gaussian(1, 2, seed=4)}))


@pytest.mark.slow
@given(inner=trees(), outer=trees())
def test_a_right_hypergradient_passes_over_any_trees(inner: Any, outer: Any) -> None:
    passes(inner, outer)


def descent(steps: int) -> Any:
    """Gradient descent on the quadratic, whose curvatures are 1 to 3."""
    inner, star, y = quadratic()
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)

    def solve(init: Tensor, y: Tensor) -> Tensor:
        w = init
        for _ in range(steps):
            w = w - 0.5 * (matrix @ w - y)
        return w

    return solve


def outer_loss(w: Tensor, y: Tensor) -> Tensor:
    return torch.sin(w).sum() + 0.1 * (y**2).sum()


@pytest.mark.parametrize(
    ("steps", "verdict"), [(60, Verdict.PASSED), (12, Verdict.PASSED), (2, Verdict.INCONCLUSIVE)]
)
def test_the_inner_solvers_tolerance_is_taken_into_account(steps: int, verdict: Verdict) -> None:
    # The inner error falls by 2 at each step: with 2 of them it hides what is looked for.
    inner, star, y = quadratic()
    check = hypergrad.check_hypergradient(
        inner, outer_loss, star, y, solve_inner=descent(steps), rtol=5e-2
    )
    assert check.verdict is verdict, check.message
    assert check.inner_error > 0 or steps == 60


@pytest.mark.parametrize("factor", [1.1, -1.0, 0.0])
def test_a_wrong_hypergradient_fails(factor: float) -> None:
    inner, star, y = quadratic()
    right = hypergrad.hypergradient(inner, outer_loss, star, y, solver=hypergrad.Exact())
    check = hypergrad.check_hypergradient(
        inner, outer_loss, star, y, solve_inner=descent(80), gradient=factor * right.grad
    )
    assert check.verdict is Verdict.FAILED
    assert check.message.startswith("FAILED")
    assert not check.passed


def test_a_forgotten_part_fails() -> None:
    inner, star, y = quadratic()
    right = hypergrad.hypergradient(inner, outer_loss, star, y)
    check = hypergrad.check_hypergradient(
        inner, outer_loss, star, y, solve_inner=descent(80), gradient=right.direct
    )
    assert check.verdict is Verdict.FAILED


def test_a_solver_of_another_inner_loss_does_not_pass() -> None:
    inner, star, y = quadratic()
    check = hypergrad.check_hypergradient(
        inner, outer_loss, star, y, solve_inner=lambda w, y: 0.5 * y
    )
    # Its points are no inner solutions, and the check says so instead of blaming the gradient.
    assert check.verdict is Verdict.INCONCLUSIVE
    assert check.inner_error > 0.1


def test_heavy_damping_fails_and_the_certificate_says_why() -> None:
    inner, star, y = quadratic()
    check = hypergrad.check_hypergradient(
        inner, outer_loss, star, y, solve_inner=descent(80), solver=hypergrad.Exact(), damping=1.0
    )
    assert check.verdict is Verdict.FAILED
    assert check.certificate.linear_error > 100 * check.certificate.inner_error


def test_an_inner_solution_that_is_none_is_announced_and_fails() -> None:
    inner, star, y = quadratic()
    with pytest.warns(hypergrad.InnerProblemWarning, match="Run the inner solver"):
        check = hypergrad.check_hypergradient(
            inner, outer_loss, star + 1.0, y, solve_inner=descent(80)
        )
    assert check.verdict is Verdict.FAILED
    assert check.certificate.inner_error > 100 * check.certificate.linear_error


def test_in_float32_a_right_hypergradient_passes() -> None:
    x, target = gaussian(40, 3, seed=1).to(F32), gaussian(40, seed=2).to(F32)

    def ridge(w: Tensor, log_ridge: Tensor) -> Tensor:
        return 0.5 * ((x @ w - target) ** 2).mean() + 0.5 * (log_ridge.exp() * w**2).sum()

    def solve(init: Tensor, log_ridge: Tensor) -> Tensor:
        gram = x.T @ x / 40 + torch.diag(log_ridge.exp())
        return torch.linalg.solve(gram, x.T @ target / 40)

    y = torch.tensor([-1.0, 0.0, 0.5])
    check = hypergrad.check_hypergradient(
        ridge, lambda w, y: ((x[:9] @ w - target[:9]) ** 2).mean(), solve(y, y), y,
        solve_inner=solve, rtol=5e-2,
    )  # fmt: skip
    assert check.passed, check.message


def test_the_difference_is_within_its_uncertainty() -> None:
    # The figures themselves, over step sizes from far too small to far too large.
    inner, star, y = quadratic()
    right = hypergrad.hypergradient(inner, outer_loss, star, y, solver=hypergrad.Exact())
    for h in (1e-13, 1e-9, 1e-5, 1e-3, 1e-1, 0.5):
        check = hypergrad.check_hypergradient(
            inner, outer_loss, star, y, solve_inner=descent(40), gradient=right, step_size=h
        )
        assert check.step_sizes == (h,) * 3
        for slope, difference, error in zip(
            check.slopes, check.differences, check.uncertainties, strict=True
        ):
            assert abs(slope - difference) <= error + 1e-12
        assert check.num_solves == 12


def test_directions_come_from_the_generator_and_the_default_is_fixed() -> None:
    inner, star, y = quadratic()

    def run(source: torch.Generator | None) -> Any:
        return hypergrad.check_hypergradient(
            inner, outer_loss, star, y, solve_inner=descent(60), generator=source
        ).slopes

    assert run(None) == run(None)
    assert run(torch.Generator().manual_seed(5)) != run(None)


def test_the_solver_may_do_what_it_likes_to_its_arguments() -> None:
    inner, star, y = quadratic()
    kept = star.clone(), y.clone()

    def in_place(w: Tensor, y: Tensor) -> Tensor:
        w.requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.5)
        for _ in range(60):
            (w.grad,) = torch.autograd.grad(inner(w, y), w)
            optimizer.step()
        y.zero_()
        return w

    with torch.no_grad():
        check = hypergrad.check_hypergradient(inner, outer_loss, star, y, solve_inner=in_place)
    assert check.passed, check.message
    assert torch.equal(star, kept[0])
    assert torch.equal(y, kept[1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rtol": 0.0}, hypergrad.SolverOptionError),
        ({"num_directions": 0}, hypergrad.SolverOptionError),
        ({"step_size": -1.0}, hypergrad.SolverOptionError),
        ({"solve_inner": lambda w, y: torch.ones(3, dtype=F64)}, hypergrad.TreeStructureError),
        ({"solve_inner": lambda w, y: None}, hypergrad.LeafTypeError),
        ({"solve_inner": lambda w, y: w * float("nan")}, hypergrad.NonFiniteError),
    ],
)
def test_bad_input_is_named(options: Any, error: type[Exception]) -> None:
    inner, star, y = quadratic()
    with pytest.raises(error):
        hypergrad.check_hypergradient(
            inner, outer_loss, star, y, **({"solve_inner": descent(10)} | options)
        )


def test_without_a_minimum_the_check_is_inconclusive() -> None:
    def saddle(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (w[0] ** 2 - w[1] ** 2) - y @ w

    y = gaussian(2)
    star = y * torch.tensor([1.0, -1.0], dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.InnerProblemWarning)
        check = hypergrad.check_hypergradient(
            saddle, lambda w, y: (w**2).sum(), star, y, solver=hypergrad.Exact(),
            solve_inner=lambda w, y: y * torch.tensor([1.0, -1.0], dtype=F64),
        )  # fmt: skip
    assert check.verdict is Verdict.INCONCLUSIVE
