from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from torch import Tensor

import hypergrad
from tests.bilevel.test_hypergradient import couple, judge, solve_inner
from tests.strategies import (
    F32,
    F64,
    flat,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    trees,
)

TIGHT = hypergrad.CG(rtol=1e-13)
TIGHT_GMRES = hypergrad.GMRES(rtol=1e-13)

X, T = gaussian(30, 5, seed=1), gaussian(30, seed=2)
LOG_PENALTIES = torch.linspace(-1, 1, 5, dtype=F64)
ZERO = torch.zeros(5, dtype=F64)


def ridge_loss(w: Tensor, log_penalties: Tensor) -> Tensor:
    x, t = X.to(w.dtype), T.to(w.dtype)
    return 0.5 * ((x @ w - t) ** 2).sum() + 0.5 * (log_penalties.exp() * w**2).sum()


def ridge_solution(log_penalties: Tensor) -> Tensor:
    x, t = X.to(log_penalties.dtype), T.to(log_penalties.dtype)
    return torch.linalg.solve(x.T @ x + torch.diag(log_penalties.exp()), x.T @ t)


@hypergrad.implicit(ridge_loss, solver=TIGHT)
def ridge(init: Any, log_penalties: Tensor) -> Tensor:
    return ridge_solution(log_penalties)


def of(solve: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A solver as a function of the outer parameters alone."""
    return lambda outer: solve(None, outer)


def autograd_jacobian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    return lambda at: torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
        function, at
    )


# Roots in five dimensions, with a Jacobian that is not symmetric.
MATRIX = gaussian(5, 5, seed=3) + 4 * torch.eye(5, dtype=F64)


def root_map(w: Tensor, y: Tensor) -> Tensor:
    return MATRIX @ w + 0.1 * torch.tanh(w) * y.exp() - y.sin()


def contraction(w: Tensor, y: Tensor) -> Tensor:
    return w - 0.2 * root_map(w, y)


def newton(init: Any, y: Tensor) -> Tensor:
    w = torch.zeros_like(y)
    for _ in range(20):
        w = w - torch.linalg.solve(torch.func.jacrev(root_map)(w, y), root_map(w, y))
    return w


ROOT = hypergrad.implicit(root=root_map, solver=TIGHT_GMRES)(newton)
FIXED_POINT = hypergrad.implicit(fixed_point=contraction, solver=TIGHT_GMRES)(newton)


def root_jacobian(y: Tensor) -> Tensor:
    w = newton(None, y)
    of_w, of_y = torch.func.jacrev(root_map, argnums=(0, 1))(w, y)
    return -torch.linalg.solve(of_w, of_y)


# Right ------------------------------------------------------------------------------------------


def test_the_jacobian_of_a_ridge_solution_in_its_regularisation() -> None:
    # The condition number is below 100 and CG is at 1e-13, so that 1e-10 is generous.
    expected = torch.func.jacrev(ridge_solution)(LOG_PENALTIES)
    got = autograd_jacobian(of(ridge))(LOG_PENALTIES)
    assert relative_error(got, expected) <= 1e-10
    assert relative_error(torch.func.jacrev(of(ridge))(LOG_PENALTIES), expected) <= 1e-10
    assert relative_error(torch.func.jacfwd(of(ridge))(LOG_PENALTIES), expected) <= 1e-10


def test_one_penalty_for_all_features_has_its_closed_form() -> None:
    # dw/d(penalty) = -(X'X + penalty I)^-1 w.
    @hypergrad.implicit(lambda w, p: 0.5 * ((X @ w - T) ** 2).sum() + 0.5 * p * (w**2).sum(), TIGHT)
    def solve(init: Tensor, penalty: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ X + penalty * torch.eye(5, dtype=F64), X.T @ T)

    penalty = torch.tensor(10.0, dtype=F64)
    gram = X.T @ X + 10.0 * torch.eye(5, dtype=F64)
    expected = -torch.linalg.solve(gram, torch.linalg.solve(gram, X.T @ T))
    got = torch.func.jacrev(lambda p: solve(ZERO, p))(penalty)
    assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("solve", [ROOT, FIXED_POINT], ids=["root", "fixed_point"])
def test_a_root_in_five_dimensions(solve: hypergrad.ImplicitFunction) -> None:
    expected = root_jacobian(LOG_PENALTIES)
    # A symmetric one would not tell the adjoint system from the system.
    assert relative_error(expected.T, expected) > 0.1
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert relative_error(jacobian(of(solve))(LOG_PENALTIES), expected) <= 1e-10
    got = autograd_jacobian(of(solve))(LOG_PENALTIES)
    assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("solve", [ridge, ROOT, FIXED_POINT], ids=["loss", "root", "fixed_point"])
def test_derivatives_of_both_orders_agree_with_finite_differences(
    solve: hypergrad.ImplicitFunction,
) -> None:
    y = LOG_PENALTIES.clone().requires_grad_()
    assert torch.autograd.gradcheck(of(solve), y, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of(solve), y)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_second_derivatives_of_a_ridge_solution(outer: Any, inner: Any) -> None:
    expected = torch.func.hessian(ridge_solution)(LOG_PENALTIES)
    assert relative_error(outer(inner(of(ridge)))(LOG_PENALTIES), expected) <= 1e-9


def test_second_derivatives_by_plain_autograd() -> None:
    def loss(solution: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return (solution(y) ** 3).sum() + (y**2).sum()

    expected = torch.func.hessian(lambda y: loss(ridge_solution, y))(LOG_PENALTIES)
    got = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        lambda y: loss(of(ridge), y), LOG_PENALTIES
    )
    assert relative_error(got, expected) <= 1e-9


def test_third_derivatives() -> None:
    def third(solution: Callable[[Tensor], Tensor]) -> Tensor:
        def size(y: Tensor) -> Tensor:
            return solution(y).square().sum()

        derivative = torch.func.hessian(torch.func.grad(size))
        result: Tensor = derivative(LOG_PENALTIES)
        return result

    assert relative_error(third(of(ridge)), third(ridge_solution)) <= 1e-8


def test_vmap_over_outer_parameters_and_over_starts() -> None:
    rows = torch.stack([LOG_PENALTIES, LOG_PENALTIES + 1, ZERO])
    batched = torch.func.vmap(of(ridge))
    assert relative_error(batched(rows), torch.func.vmap(ridge_solution)(rows)) <= 1e-14
    expected = torch.func.vmap(torch.func.jacrev(ridge_solution))(rows)
    got = torch.func.vmap(torch.func.jacrev(of(ridge)))(rows)
    assert relative_error(got, expected) <= 1e-10
    expected = torch.func.jacrev(torch.func.vmap(ridge_solution))(rows)
    assert relative_error(torch.func.jacrev(batched)(rows), expected) <= 1e-10
    # What comes of the start has no derivative in it, whatever the solver does with it.
    starts = torch.func.vmap(lambda start: ridge(start, LOG_PENALTIES))(rows)
    assert torch.equal(starts, ridge_solution(LOG_PENALTIES).expand(3, 5))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_backward_through_a_bilevel_loss(dtype: torch.dtype) -> None:
    x_val, t_val = gaussian(20, 5, seed=4).to(dtype), gaussian(20, seed=5).to(dtype)

    def outer_loss(w: Tensor, y: Tensor) -> Tensor:
        return ((x_val @ w - t_val) ** 2).mean() + 0.1 * (y**2).sum()

    solve = hypergrad.implicit(ridge_loss, solver=hypergrad.CG(rtol=1e-6))(
        lambda init, y: ridge_solution(y)
    )
    y = LOG_PENALTIES.to(dtype, copy=True).requires_grad_()
    outer_loss(solve(ZERO.to(dtype), y), y).backward()  # type: ignore[no-untyped-call]
    explicit = LOG_PENALTIES.to(dtype, copy=True).requires_grad_()
    outer_loss(ridge_solution(explicit), explicit).backward()  # type: ignore[no-untyped-call]
    assert y.grad is not None
    assert explicit.grad is not None
    assert relative_error(y.grad, explicit.grad) <= (1e-4 if dtype == F32 else 1e-5)
    assert y.grad.dtype == dtype


SOLVERS: dict[str, tuple[Any, float | None]] = {
    "exact": (hypergrad.Exact(), None),
    "minres": (hypergrad.MINRES(rtol=1e-12), None),
    "gmres": (hypergrad.GMRES(rtol=1e-12), None),
    "neumann": (hypergrad.Neumann(num_terms=400), None),
    "nystrom": (hypergrad.Nystrom(5, generator=generator(0)), 1e-9),
    "auto": ("auto", None),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_serves(name: str) -> None:
    solver, damping = SOLVERS[name]
    solve = hypergrad.implicit(ridge_loss, solver, damping)(lambda init, y: ridge_solution(y))
    expected = torch.func.jacrev(ridge_solution)(LOG_PENALTIES)
    # "auto" may take CG with its own rtol of 1e-5, which the condition number multiplies.
    assert relative_error(torch.func.jacrev(of(solve))(LOG_PENALTIES), expected) <= 1e-4
    if name != "auto":
        assert relative_error(autograd_jacobian(of(solve))(LOG_PENALTIES), expected) <= 1e-7


@quick_and_thorough
@given(inner=trees(), outer=trees())
def test_agrees_with_hypergradient_over_any_trees(effort: str, inner: Any, outer: Any) -> None:
    star = solve_inner(couple, inner, outer)
    expected = hypergrad.hypergradient(couple, judge, star, outer, solver=hypergrad.Exact())
    leaves = [leaf.clone().requires_grad_() for leaf in torch_pytree.tree_leaves(outer)]
    attached = torch_pytree.tree_unflatten(leaves, torch_pytree.tree_flatten(outer)[1])
    solve = hypergrad.implicit(couple, solver=hypergrad.Exact())(lambda init, y: star)
    loss = judge(solve(inner, attached), attached)
    grads = torch.autograd.grad(loss, leaves)
    assert relative_error(flat(grads), flat(expected.grad)) <= 1e-9


def test_damping_is_that_of_the_system() -> None:
    # 0.5 |w - y|^2 has A = I, so that dw/dy = 1/(1 + damping).
    solve = hypergrad.implicit(lambda w, y: 0.5 * ((w - y) ** 2).sum(), damping=1.0)(
        lambda init, y: y.clone()
    )
    got = torch.func.jacrev(of(solve))(LOG_PENALTIES)
    torch.testing.assert_close(got, 0.5 * torch.eye(5, dtype=F64))


# Any solver -------------------------------------------------------------------------------------


def by_loop(init: Tensor, y: Tensor) -> Tensor:
    w = init
    lr = 1.0 / float(torch.linalg.eigvalsh(X.T @ X)[-1] + y.exp().max())
    for _ in range(400):
        w = w - lr * torch.func.grad(ridge_loss)(w, y)
    return w


def by_torch_optim(init: Tensor, y: Tensor) -> Tensor:
    w = init.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ridge_loss(w, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return w


def by_scipy(init: Tensor, y: Tensor) -> Tensor:
    def value_and_gradient(flat: Any) -> Any:
        w = torch.from_numpy(flat)
        gradient, value = torch.func.grad_and_value(ridge_loss)(w, y)
        return value.item(), gradient.numpy()

    found = scipy.optimize.minimize(
        value_and_gradient, init.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("transform", [False, True], ids=["backward", "jacrev"])
@pytest.mark.parametrize("inner_solver", [by_loop, by_torch_optim, by_scipy])
def test_whatever_the_solver_does(inner_solver: Any, transform: bool) -> None:
    solve = hypergrad.implicit(ridge_loss, solver=TIGHT)(inner_solver)
    jacobian = torch.func.jacrev if transform else autograd_jacobian
    got = jacobian(lambda y: solve(ZERO, y))(LOG_PENALTIES)
    # The solvers end with gradients of 1e-9 or less.
    assert relative_error(got, torch.func.jacrev(ridge_solution)(LOG_PENALTIES)) <= 1e-7
    assert solve.__name__ == inner_solver.__name__


def test_parameters_of_a_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    source = generator(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source, dtype=F64)
    inputs, targets = gaussian(20, 3, seed=6), gaussian(20, 1, seed=7)

    def inner_loss(params: dict[str, Tensor], outer: dict[str, Tensor]) -> Tensor:
        errors = torch.func.functional_call(model, params, (inputs,)) - targets
        ridge = sum((p**2).sum() for p in params.values())
        return (outer["weights"].sigmoid() * errors[:, 0] ** 2).mean() + outer[
            "ridge"
        ].exp() * ridge

    def train(params: dict[str, Tensor], outer: dict[str, Tensor]) -> dict[str, Tensor]:
        model.load_state_dict(params)  # trained in place, as most code does
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=1000,
            tolerance_grad=1e-12,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = inner_loss(dict(model.named_parameters()), outer)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return dict(model.named_parameters())

    solve = hypergrad.implicit(inner_loss, solver=hypergrad.Exact())(train)
    outer = {
        "weights": torch.zeros(20, dtype=F64, requires_grad=True),
        "ridge": torch.tensor(-1.0, dtype=F64, requires_grad=True),
        "unused": torch.ones(2, dtype=F64, requires_grad=True),
    }
    init = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in init.items()}

    def outer_loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (inputs.flip(1),)).sin().sum()

    params = solve(init, outer)
    assert list(params) == list(init)
    outer_loss(params).backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(init[name], before[name]) for name in init)

    # The solver stalls at gradients of 1e-8, which h divides; the truncation is h^2.
    h = 1e-3
    direction = gaussian(20, seed=8)
    values = []
    for sign in (1, -1):
        moved = {key: leaf.detach() for key, leaf in outer.items()}
        moved["weights"] = moved["weights"] + sign * h * direction
        values.append(float(outer_loss(train(params, moved)).detach()))
    expected = (values[0] - values[1]) / (2 * h)
    assert outer["weights"].grad is not None
    assert outer["unused"].grad is not None
    assert float(outer["weights"].grad @ direction) == pytest.approx(expected, rel=3e-4)
    assert torch.equal(outer["unused"].grad, torch.zeros(2, dtype=F64))


def test_trees_on_both_levels() -> None:
    # 0.5 |a - y0 y1|^2 + 0.5 |b - y1|^2, of which nothing depends on y2.
    def inner_loss(w: Any, y: Any) -> Tensor:
        pull = ((w["a"] - y[0] * y[1]["k"]) ** 2).sum() + ((w["b"][0] - y[1]["k"]) ** 2).sum()
        return 0.5 * pull

    def closed_form(init: Any, y: Any) -> Any:
        return {"b": (y[1]["k"].clone(),), "a": y[0] * y[1]["k"]}  # keys in another order

    solve = hypergrad.implicit(inner_loss)(closed_form)
    init = {"a": torch.zeros(2, dtype=F64), "b": (torch.zeros((), dtype=F64),)}
    leaves = [gaussian(2, seed=1), torch.tensor(3.0, dtype=F64), gaussian(4, seed=2)]
    y0, k, unused = (leaf.requires_grad_() for leaf in leaves)
    w = solve(init, [y0, {"k": k}, unused])
    assert list(w) == ["a", "b"]
    (w["a"].sum() ** 2 + w["b"][0] ** 2).backward()
    total = float((y0 * k).sum().detach())
    torch.testing.assert_close(y0.grad, torch.full((2,), 2 * total * 3.0, dtype=F64))
    expected = 2 * total * float(y0.sum().detach()) + 2 * 3.0
    assert k.grad is not None
    assert float(k.grad) == pytest.approx(expected, rel=1e-5)
    assert unused.grad is not None
    assert torch.equal(unused.grad, torch.zeros(4, dtype=F64))


def test_leaves_of_different_dtypes() -> None:
    def inner_loss(w: Any, y: Tensor) -> Tensor:
        return 0.5 * ((w["a"] - y) ** 2).sum() + 0.5 * ((w["b"] - y.double() ** 2) ** 2).sum()

    solve = hypergrad.implicit(inner_loss)(lambda init, y: {"a": y.clone(), "b": y.double() ** 2})
    y = torch.tensor([2.0, 3.0], requires_grad=True)
    w = solve({"a": torch.zeros(2), "b": torch.zeros(2, dtype=F64)}, y)
    assert w["a"].dtype == F32
    assert w["b"].dtype == F64
    (w["a"].sum() + w["b"].sum()).backward()
    torch.testing.assert_close(y.grad, torch.tensor([5.0, 7.0]))
