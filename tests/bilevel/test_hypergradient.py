from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from tests.strategies import (
    F64,
    flat,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    seeds,
    tree_like,
    trees,
)

Loss = Callable[[Any, Any], Tensor]

#: By the dimension of the inner problem, accurate enough for a relative error of 1e-6.
SOLVERS: dict[str, Callable[[int], hypergrad.Solver]] = {
    "exact": lambda n: hypergrad.Exact(),
    "cg": lambda n: hypergrad.CG(rtol=1e-11),
    "neumann": lambda n: hypergrad.Neumann(num_terms=250),
    "nystrom": lambda n: hypergrad.Nystrom(n, generator=generator(0)),
}
#: Nyström needs a positive damping; so small a one is not seen.
DAMPING = {"nystrom": 1e-7}
every_solver = pytest.mark.parametrize("name", SOLVERS)


def solve_inner(inner_loss: Loss, start: Any, outer: Any) -> Any:
    """Newton's method to a stationary point, in flat float64 coordinates."""
    w = flat(start).clone()

    def loss(vector: Tensor) -> Tensor:
        return inner_loss(tree_like(start, vector), outer)

    for _ in range(60):
        gradient = torch.func.grad(loss)(w)
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w), gradient)
        if float(gradient.norm()) < 1e-13:
            break
    return tree_like(start, w)


def finite_difference(
    inner_loss: Loss, outer_loss: Loss, start: Any, outer: Any, direction: Tensor
) -> float:
    """Central difference of F along a direction, the inner problem solved anew on either side."""
    point, h, values = flat(outer), 1e-5, []
    for sign in (1.0, -1.0):
        y = tree_like(outer, point + sign * h * direction)
        values.append(float(outer_loss(solve_inner(inner_loss, start, y), y)))
    return (values[0] - values[1]) / (2 * h)


def couple(inner: Any, outer: Any) -> Tensor:
    """A strongly convex inner loss, not quadratic, in which everything meets everything."""
    w, y = flat(inner), flat(outer)
    mix = torch.cos(torch.arange(len(w) * len(y), dtype=w.dtype)).reshape(len(w), len(y))
    pull = mix @ torch.tanh(y)
    scale = 1.0 + 0.3 * torch.sigmoid(y).mean()
    return 0.5 * scale * (w**2).sum() - pull @ w + torch.logsumexp(w, 0) + 0.1 * w.sum() ** 2


def judge(inner: Any, outer: Any) -> Tensor:
    w, y = flat(inner), flat(outer)
    return torch.sin(w).sum() + 0.5 * (w**2).mean() + (y**2).mean() * w.mean()


@every_solver
@quick_and_thorough
@given(inner=trees(), outer=trees(), seed=seeds)
def test_agrees_with_finite_differences_over_any_trees(
    effort: str, name: str, inner: Any, outer: Any, seed: int
) -> None:
    star = solve_inner(couple, inner, outer)
    n = len(flat(inner))
    got = hypergrad.hypergradient(
        couple, judge, star, outer, solver=SOLVERS[name](n), damping=DAMPING.get(name)
    )
    direction = gaussian(len(flat(outer)), seed=seed)
    expected = finite_difference(couple, judge, star, outer, direction)
    # Central differences with h = 1e-5: truncation h^2 and rounding eps/h, both about 1e-10,
    # times third derivatives and values of order a hundred.
    size = 1.0 + float(flat(got.grad).norm() * direction.norm())
    assert abs(float(flat(got.grad) @ direction) - expected) <= 1e-6 * size
    assert torch.allclose(flat(got.grad), flat(got.direct) + flat(got.implicit))


@every_solver
def test_ridge_regression_has_its_closed_form(name: str) -> None:
    x, y = gaussian(30, 4, seed=1), gaussian(30, seed=2)
    x_val, y_val = gaussian(20, 4, seed=3), gaussian(20, seed=4)
    log_ridge = torch.tensor(0.3, dtype=F64)
    ridge = math.exp(0.3)
    gram = x.T @ x + ridge * torch.eye(4, dtype=F64)
    star = torch.linalg.solve(gram, x.T @ y)

    def inner(w: Tensor, log_ridge: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * log_ridge.exp() * (w**2).sum()

    def outer(w: Tensor, log_ridge: Tensor) -> Tensor:
        return 0.5 * ((x_val @ w - y_val) ** 2).mean()

    gradient = x_val.T @ (x_val @ star - y_val) / 20
    # dw/d(log ridge) = -ridge G^-1 w.
    expected = -ridge * gradient @ torch.linalg.solve(gram, star)
    got = hypergrad.hypergradient(
        inner, outer, star, log_ridge, solver=SOLVERS[name](4), damping=DAMPING.get(name)
    )
    assert got.grad.shape == ()
    assert float(got.grad) == pytest.approx(
        float(expected), rel=1e-8 if name != "nystrom" else 1e-6
    )
    assert float(got.direct) == 0.0
    assert relative_error(got.ihvp, torch.linalg.solve(gram, gradient)) <= (
        1e-8 if name != "nystrom" else 1e-6
    )


@every_solver
@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e4])
def test_a_multiple_of_the_identity_is_exactly_right(name: str, curvature: float) -> None:
    # g = c/2 |w|^2 - y'w has w* = y/c, so F(y) = |y/c|^2/2 has the gradient y/c^2.
    y = gaussian(5, seed=1)

    def inner(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * curvature * (w**2).sum() - y @ w

    got = hypergrad.hypergradient(
        inner, lambda w, y: 0.5 * (w**2).sum(), y / curvature, y, solver=SOLVERS[name](5),
        damping=DAMPING.get(name) and curvature * 1e-7,
    )  # fmt: skip
    # Damping itself, and what rounding makes of a difference that it divides.
    tolerance = 1e-14 if name != "nystrom" else 3e-7
    assert relative_error(got.grad, y / curvature**2) <= tolerance


def quadratic() -> tuple[Loss, Tensor, Tensor]:
    basis = torch.linalg.qr(gaussian(4, 4, seed=1))[0]
    matrix = (basis * torch.linspace(1, 3, 4, dtype=F64)) @ basis.T

    def inner(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * w @ matrix @ w - y @ w

    y = gaussian(4, seed=2)
    return inner, torch.linalg.solve(matrix, y), y


def test_an_outer_loss_with_only_a_direct_dependence() -> None:
    inner, star, y = quadratic()
    with pytest.warns(hypergrad.UnusedParameterWarning, match="outer_loss does not depend"):
        got = hypergrad.hypergradient(inner, lambda w, y: (y**3).sum(), star, y)
    torch.testing.assert_close(got.grad, 3 * y**2)
    assert torch.equal(got.implicit, torch.zeros(4, dtype=F64))
    assert got.info.converged


def test_an_outer_loss_with_only_an_indirect_dependence() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(inner, lambda w, y: w.sum(), star, y, solver=hypergrad.Exact())
    assert torch.equal(got.direct, torch.zeros(4, dtype=F64))
    assert torch.equal(got.grad, got.implicit)


def test_damping_is_applied_once_and_reported() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(
        inner, lambda w, y: w.sum(), star, y, solver=hypergrad.Exact(), damping=0.7
    )
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)
    expected = torch.linalg.solve(matrix + 0.7 * torch.eye(4, dtype=F64), torch.ones(4).double())
    torch.testing.assert_close(got.grad, expected)
    assert got.info.damping == 0.7


def test_outer_leaves_that_nothing_uses_get_zeros_and_are_named() -> None:
    inner, star, y = quadratic()
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]") as caught:
        got = hypergrad.hypergradient(
            lambda w, p: inner(w, p["y"]),
            lambda w, p: w.sum(),
            star,
            {"y": y, "unused": torch.ones(2, 3, dtype=F64)},
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(got.grad["unused"], torch.zeros(2, 3, dtype=F64))
    assert float(got.grad["y"].norm()) > 0


def test_an_inner_loss_without_the_outer_parameters_has_no_implicit_part() -> None:
    with pytest.warns(hypergrad.UnusedParameterWarning, match="gradient of inner_loss"):
        got = hypergrad.hypergradient(
            lambda w, y: 0.5 * ((w - 1) ** 2).sum(), lambda w, y: (w * y).sum(), torch.ones(3),
            torch.full((3,), 2.0),
        )  # fmt: skip
    assert got.implicit.tolist() == [0.0, 0.0, 0.0]
    assert got.grad.tolist() == [1.0, 1.0, 1.0]


def test_inner_parameters_of_a_module() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    x, target = gaussian(20, 3, seed=1), gaussian(20, 1, seed=2)
    weights = gaussian(20, seed=3)

    def inner(params: Any, weights: Tensor) -> Tensor:
        error = torch.func.functional_call(model, params, x) - target
        penalty = sum((p**2).sum() for p in params.values())
        return (torch.sigmoid(weights) * error[:, 0] ** 2).mean() + 0.05 * penalty

    def outer(params: Any, weights: Tensor) -> Tensor:
        return (torch.func.functional_call(model, params, x[:5]) - target[:5]).pow(2).mean()

    params = {k: p.detach() for k, p in model.named_parameters()}
    star = solve_inner(inner, params, weights)
    for own, found in zip(model.parameters(), star.values(), strict=True):
        own.data.copy_(found)
    named = dict(model.named_parameters())
    got = hypergrad.hypergradient(inner, outer, named, weights, solver=hypergrad.CG(rtol=1e-10))
    for i in range(20):
        direction = torch.eye(20, dtype=F64)[i]
        expected = finite_difference(inner, outer, star, weights, direction)
        assert float(got.grad[i]) == pytest.approx(expected, abs=1e-8)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert list(got.ihvp) == list(named)


def test_a_warm_start_from_the_step_before_saves_products() -> None:
    star = solve_inner(couple, gaussian(12, seed=1), gaussian(3, seed=2))
    y = gaussian(3, seed=2)
    cold = hypergrad.hypergradient(couple, judge, star, y, solver=hypergrad.CG(rtol=1e-8))
    warm = hypergrad.hypergradient(
        couple, judge, star, y, solver=hypergrad.CG(rtol=1e-8), x0=cold.ihvp
    )
    assert warm.info.iterations == 0
    assert torch.equal(warm.ihvp, cold.ihvp)
    torch.testing.assert_close(warm.grad, cold.grad)


def test_caller_is_untouched_and_no_grad_does_not_matter() -> None:
    inner, star, y = quadratic()
    star, y = star.requires_grad_(), y.clone().requires_grad_()
    y.grad = torch.full((4,), 7.0, dtype=F64)
    with torch.no_grad():
        got = hypergrad.hypergradient(inner, lambda w, y: (w * y).sum(), star, y)
    assert torch.equal(y.grad, torch.full((4,), 7.0, dtype=F64))
    assert star.grad is None
    assert not got.grad.requires_grad
    enabled = hypergrad.hypergradient(inner, lambda w, y: (w * y).sum(), star, y)
    assert torch.equal(got.grad, enabled.grad)


def test_a_failed_solve_warns_and_returns_its_report() -> None:
    y = gaussian(2)
    with pytest.warns(hypergrad.ConvergenceWarning) as caught:
        got = hypergrad.hypergradient(
            lambda w, y: 0.5 * (w[0] ** 2 - w[1] ** 2) - y @ w, lambda w, y: w.sum(), gaussian(2), y
        )
    assert caught[0].filename == __file__
    assert got.info.status is hypergrad.Status.NEGATIVE_CURVATURE


def test_an_unused_inner_leaf_is_reported() -> None:
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]") as caught:
        got = hypergrad.hypergradient(
            lambda w, y: 0.5 * ((w["used"] - y) ** 2).sum(),
            lambda w, y: w["used"].sum(),
            {"used": torch.ones(2), "unused": torch.ones(1)},
            torch.ones(2),
        )
    assert caught[0].filename == __file__
    torch.testing.assert_close(got.grad, torch.ones(2))


def test_mixed_dtypes_on_the_two_levels() -> None:
    got = hypergrad.hypergradient(
        lambda w, y: 0.5 * ((w - y.float()) ** 2).sum(), lambda w, y: (w**3).sum(), torch.ones(2),
        torch.ones(2, dtype=F64),
    )  # fmt: skip
    assert got.grad.dtype == F64
    assert got.ihvp.dtype == torch.float32
    torch.testing.assert_close(got.grad, torch.full((2,), 3.0, dtype=F64), rtol=1e-6, atol=0)


def test_an_outer_loss_of_another_model_is_refused() -> None:
    model = torch.nn.Linear(3, 1)
    x = gaussian(5, 3).float()
    with pytest.raises(hypergrad.LossError, match="functional_call"):
        hypergrad.hypergradient(
            lambda w, y: ((w["weight"] - y) ** 2).sum(),
            lambda w, y: (model(x) ** 2).mean(),
            {"weight": model.weight},
            torch.tensor(0.0),
        )


def test_a_part_that_is_not_finite_is_named() -> None:
    with pytest.raises(hypergrad.NonFiniteError, match="the implicit part"):
        hypergrad.hypergradient(
            lambda w, y: ((w - 1) ** 2).sum() + (y.sqrt() * w).sum(),
            lambda w, y: (w**2).sum(),
            torch.ones(2),
            torch.zeros(2),
        )


def test_results_carry_no_graph() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(inner, lambda w, y: w.sum(), star, y.requires_grad_())
    tensors = (got.grad, got.direct, got.implicit, got.ihvp, got.outer_value)
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_outer_losss_value_is_that_at_the_parameters_given(dtype: torch.dtype) -> None:
    inner, star, y = quadratic()
    star, y = star.to(dtype), y.to(dtype)
    calls = []

    def outer(w: Tensor, y: Tensor) -> Tensor:
        calls.append(w)
        return torch.sin(w).sum() * y.exp().sum()

    got = hypergrad.hypergradient(
        lambda w, y: inner(w.to(F64), y.to(F64)), outer, star, y, solver=hypergrad.Exact()
    )
    assert len(calls) == 1  # the value is that of the call which the gradient is of
    assert torch.equal(got.outer_value, torch.sin(star).sum() * y.exp().sum())
    assert got.outer_value.shape == ()
    assert got.outer_value.dtype == dtype


def test_the_warning_of_an_unused_leaf_is_shown_once_a_place() -> None:
    inner, star, y = quadratic()
    outer = {"y": y, "unused": torch.ones(2, dtype=F64)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            hypergrad.hypergradient(
                lambda w, p: inner(w, p["y"]), lambda w, p: w.sum(), star, outer
            )
    assert len(caught) == 1
