"""Every exact route to the same number: closed forms, and problems with known optima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

import hypergrad
from tests.bilevel.test_hypergradient import quadratic
from tests.bilevel.test_unroll import logistic, mlp, ridge
from tests.strategies import F32, F64, flat, generator, relative_error

#: Solvers, by the relative residual to ask for, and the damping that they need.  A damping of
#: 1e-13 moves the answer by as much over the smallest curvature, which is about one here.
SOLVERS: dict[str, tuple[Callable[[float], Any], float | None]] = {
    "exact": (lambda rtol: hypergrad.Exact(), None),
    "cg": (lambda rtol: hypergrad.CG(rtol=rtol), None),
    "minres": (lambda rtol: hypergrad.MINRES(rtol=rtol), None),
    "gmres": (lambda rtol: hypergrad.GMRES(rtol=rtol), None),
    "neumann": (lambda rtol: hypergrad.Neumann(num_terms=100), None),
    "chebyshev": (lambda rtol: hypergrad.Neumann(num_terms=60, acceleration="chebyshev"), None),
    "nystrom": (lambda rtol: hypergrad.Nystrom(4, generator=generator(0)), 1e-13),
    "nystrom_pcg": (lambda rtol: hypergrad.NystromPCG(2, rtol, generator=generator(0)), 1e-13),
    "reused": (
        lambda rtol: hypergrad.ReusedSketch(hypergrad.NystromPCG(2, rtol, generator=generator(0))),
        1e-13,
    ),
    "auto": (lambda rtol: hypergrad.Auto(rtol=rtol), None),
}
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-4)])


@dataclass(frozen=True, eq=False)
class Example:
    """Two losses, the outer parameters, the inner solution and the gradient there."""

    inner: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]
    y: Tensor
    star: Tensor
    expected: Tensor


def ridge_example() -> Example:
    inner, outer, log_ridge, star, expected = ridge()
    return Example(inner, outer, log_ridge, star, expected)


def quadratic_example() -> Example:
    inner, star, y = quadratic()
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)

    def cast(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * w @ matrix.to(w.dtype) @ w - y @ w

    expected = star + torch.linalg.solve(matrix, 3 * star**2 + y)
    return Example(cast, lambda w, y: (w**3).sum() + (w * y).sum(), y, star, expected)


EXAMPLES = {"ridge": ridge_example, "quadratic": quadratic_example}
every_example = pytest.mark.parametrize("example", EXAMPLES)
every_solver = pytest.mark.parametrize("name", SOLVERS)


@precisions
@every_solver
@every_example
def test_closed_forms_by_the_implicit_theorem(
    example: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    problem = EXAMPLES[example]()
    make, damping = SOLVERS[name]
    solver = make(1e-13 if dtype == F64 else 1e-6)
    star, y = problem.star.to(dtype), problem.y.to(dtype)
    got = hypergrad.hypergradient(
        problem.inner, problem.outer, star, y, solver=solver, damping=damping
    )
    assert relative_error(got.grad, problem.expected) <= tolerance
    # The same through the decorator, from a solver that is a closed form.
    attached = y.clone().requires_grad_()
    solve = hypergrad.implicit(problem.inner, solver, damping)(lambda init, y: star)
    problem.outer(solve(None, attached), attached).backward()  # type: ignore[no-untyped-call]
    assert attached.grad is not None
    assert attached.grad.dtype == dtype
    assert relative_error(attached.grad, problem.expected) <= tolerance


@precisions
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@every_example
def test_closed_forms_by_unrolling_to_convergence(
    example: str, mode: Any, dtype: torch.dtype, tolerance: float
) -> None:
    problem = EXAMPLES[example]()
    got = hypergrad.unrolled_hypergradient(
        problem.inner, problem.outer, torch.zeros(4, dtype=dtype), problem.y.to(dtype),
        num_steps=60, optimizer=hypergrad.SGD(lr=0.5), mode=mode,
    )  # fmt: skip
    assert relative_error(got.grad, problem.expected) <= tolerance


@pytest.mark.parametrize(("problem", "lr", "steps"), [(logistic, 1.0, 120), (mlp, 0.5, 100)])
def test_the_decorator_agrees_with_the_other_routes(problem: Any, lr: float, steps: int) -> None:
    inner, outer, start, y = problem()
    unrolled = hypergrad.unrolled_hypergradient(
        inner, outer, start, y, num_steps=steps, optimizer=hypergrad.SGD(lr=lr, momentum=0.5)
    )
    star = unrolled.inner_params
    layout = torch_pytree.tree_flatten(y)[1]

    @hypergrad.implicit(inner, hypergrad.MINRES(rtol=1e-11))
    def solve(init: Any, y: Any) -> Any:
        return star

    leaves = [leaf.clone().requires_grad_() for leaf in torch_pytree.tree_leaves(y)]
    attached = torch_pytree.tree_unflatten(leaves, layout)
    loss = outer(solve(start, attached), attached)
    grads = flat(torch.autograd.grad(loss, leaves))
    assert relative_error(grads, flat(unrolled.grad)) <= 1e-6
    for solver, damping in (
        (hypergrad.GMRES(rtol=1e-11), None),
        (hypergrad.NystromPCG(4, rtol=1e-11, generator=generator(0)), 1e-10),
    ):
        got = hypergrad.hypergradient(inner, outer, star, y, solver=solver, damping=damping)
        assert relative_error(grads, flat(got.grad)) <= 1e-6


# Problems of the BOLIB library ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bolib:
    """A problem without constraints, its optimum (x, y), and how a plain loop solves it.

    The library's upper and lower level are called F(x, y) and f(x, y); x is ours to choose.
    """

    upper: Callable[[Tensor, Tensor], Tensor]
    lower: Callable[[Tensor, Tensor], Tensor]
    optimum: tuple[float, float]
    #: Optimal values of both levels as the library's table gives them, and its digits.
    listed: tuple[float, float, float]
    inner_lr: float
    outer_lr: float


#: All problems without constraints ([.. 0 0] in their headers) of BOLIB, the "Bilevel
#: Optimization LIBrary of test problems" (Zhou, Zemkoho and Tin, 2018, with the table of best
#: known values, and its version 2 of 2019).  Each optimum follows from the response y(x):
BOLIB = {
    # Macal and Hurter, "Dependence of bilevel mathematical programs on irrelevant constraints",
    # Computers and Operations Research 24 (1997): y = 50 x - 500, so that 2 (x - 1) +
    # 100 (50 x - 501) = 0.  f = -y^2/2 there is -0.3360; the table has -0.333, at three digits.
    "MacalHurter1997": Bolib(
        lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        (25051 / 2501, 50 * 25051 / 2501 - 500),
        (81.327, -0.333, 4e-3),
        0.5,
        2e-4,
    ),
    # Henrion and Surowiec, "On calmness conditions in convex bilevel programming", Applicable
    # Analysis 90 (2011), with their parameter c = 0: y = x.
    "HenrionSurowiec2011": Bolib(
        lambda x, y: x**2 + 0.0 * y,
        lambda x, y: 0.5 * y**2 - x * y,
        (0.0, 0.0),
        (0.0, 0.0, 1e-8),
        0.5,
        0.25,
    ),
    # Lampariello and Sagratella, "A bridge between bilevel programs and Nash games", J. Optim.
    # Theory Appl. 174 (2017), example 3.2: y = 1 - x.
    "LamparielloSagratella2017Ex32": Bolib(
        lambda x, y: x**2 + y**2,
        lambda x, y: (x + y - 1) ** 2,
        (0.5, 0.5),
        (0.5, 0.0, 1e-8),
        0.25,
        0.2,
    ),
}


@pytest.mark.parametrize("name", BOLIB)
def test_problems_of_bolib_are_solved_to_their_known_optima(name: str) -> None:
    problem = BOLIB[name]
    x, y = torch.ones((), dtype=F64), torch.ones((), dtype=F64)  # the library's starting point
    for _ in range(40):
        for _ in range(30):  # plain gradient descent on the lower level
            y = y - problem.inner_lr * torch.func.grad(problem.lower, argnums=1)(x, y)
        got = hypergrad.hypergradient(
            lambda y, x: problem.lower(x, y), lambda y, x: problem.upper(x, y), y, x
        )
        x = x - problem.outer_lr * got.grad
    best_x, best_y = problem.optimum
    assert abs(float(x) - best_x) <= 1e-8 * (1 + abs(best_x))
    assert abs(float(y) - best_y) <= 1e-6 * (1 + abs(best_y))
    upper, lower, digits = problem.listed
    assert abs(float(problem.upper(x, y)) - upper) <= digits
    assert abs(float(problem.lower(x, y)) - lower) <= digits
    check = hypergrad.check_stackelberg(problem.upper, problem.lower, x, y)
    assert check.is_equilibrium, check.message
