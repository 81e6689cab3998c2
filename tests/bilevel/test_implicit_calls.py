"""What a call of an implicitly differentiated solver leaves alone, reports, warns of, refuses."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.bilevel.test_implicit import (
    LOG_PENALTIES,
    TIGHT,
    ZERO,
    by_loop,
    of,
    ridge,
    ridge_loss,
    ridge_solution,
    root_map,
)
from tests.strategies import F32, F64, gaussian, relative_error

# What it is not -----------------------------------------------------------------------------------


def test_another_gradient_than_that_of_a_detached_or_a_truncated_solver() -> None:
    def outer_loss(w: Tensor, y: Tensor) -> Tensor:
        return (w**3).sum() + (y**2).sum()

    def gradient(solution: Callable[[Tensor], Tensor]) -> Tensor:
        y = LOG_PENALTIES.clone().requires_grad_()
        outer_loss(solution(y), y).backward()  # type: ignore[no-untyped-call]
        assert y.grad is not None
        return y.grad

    def last_step(y: Tensor) -> Tensor:
        w = by_loop(ZERO, y.detach())
        return w - 1e-3 * torch.func.grad(ridge_loss)(w, y)

    expected = gradient(ridge_solution)
    assert relative_error(gradient(of(ridge)), expected) <= 1e-10
    assert relative_error(gradient(lambda y: ridge_solution(y.detach())), expected) > 1e-3
    assert relative_error(gradient(last_step), expected) > 1e-3


def test_the_start_has_no_gradient_and_nothing_is_modified() -> None:
    def in_place(init: Tensor, y: Tensor) -> Tensor:
        init.copy_(ridge_solution(y))
        y.zero_()
        return init

    solve = hypergrad.implicit(ridge_loss, solver=TIGHT)(in_place)
    init = torch.ones(5, dtype=F64, requires_grad=True)
    y = LOG_PENALTIES.clone().requires_grad_()
    solve(init, y).sum().backward()
    assert init.grad is None
    assert torch.equal(init.detach(), torch.ones(5, dtype=F64))
    assert torch.equal(y.detach(), LOG_PENALTIES)
    expected = torch.func.jacrev(ridge_solution)(LOG_PENALTIES).sum(0)
    assert y.grad is not None
    assert relative_error(y.grad, expected) <= 1e-10
    assert not torch.func.grad(lambda start: solve(start, y.detach()).sum())(init.detach()).any()


def test_no_graph_of_the_solver_is_kept() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def unrolled(init: Tensor, y: Tensor) -> Tensor:
        w = init.requires_grad_()
        for _ in range(3):
            w = w - 0.5 * (w - y)
            kept.append(weakref.ref(w))
        return w + (y - w).detach()

    solve = hypergrad.implicit(lambda w, y: 0.5 * ((w - y) ** 2).sum())(unrolled)
    y = LOG_PENALTIES.clone().requires_grad_()
    gc.disable()  # so that cycles would be seen
    try:
        solution = solve.solution(ZERO, y)
        assert not any(ref() is not None for ref in kept)
        value = weakref.ref(solution.value)
        solution.value.sum().backward()
        del solution
        assert value() is None
    finally:
        gc.enable()


def test_without_grad_mode_nothing_is_attached_and_the_condition_is_not_looked_at() -> None:
    calls = 0

    def counted(w: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return ridge_loss(w, y)

    solve = hypergrad.implicit(counted)(lambda init, y: ridge_solution(y))
    with torch.no_grad():
        solution = solve.solution(None, LOG_PENALTIES.clone().requires_grad_())
    assert not solution.value.requires_grad
    assert solution.residual_norm is None
    assert calls == 0


# Reports ----------------------------------------------------------------------------------------


def test_backward_passes_report() -> None:
    y = LOG_PENALTIES.clone().requires_grad_()
    solution = ridge.solution(None, y)
    assert solution.backward == []
    assert solution.residual_norm is not None
    assert solution.residual_norm < 1e-12
    (grad,) = torch.autograd.grad(solution.value.sum(), y, create_graph=True)
    assert [info.converged for info in solution.backward] == [True]
    assert solution.backward[0].solver == TIGHT
    assert solution.backward[0].num_hvps > 0
    grad.sum().backward()  # type: ignore[no-untyped-call]
    # Once more through w* in the system and in F, and once through the solve itself.
    assert len(solution.backward) >= 3
    assert all(info.converged for info in solution.backward)
    assert ridge.solution(None, y).backward == []


def test_a_failed_linear_solve_does_what_was_asked() -> None:
    short = hypergrad.CG(rtol=1e-12, max_iters=1)
    y = LOG_PENALTIES.clone().requires_grad_()
    decorated = hypergrad.implicit(ridge_loss, solver=short)(lambda init, y: ridge_solution(y))
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_iters"):
        decorated(None, y).sum().backward()
    decorated = hypergrad.implicit(ridge_loss, solver=short, on_failure="raise")(
        lambda init, y: ridge_solution(y)
    )
    with pytest.raises(hypergrad.ConvergenceError, match="max_iters"):
        decorated(None, y).sum().backward()


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_an_inner_problem_that_is_not_solved_warns(steps: int) -> None:
    def descend(init: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            init = init - 0.005 * torch.func.grad(ridge_loss)(init, y)
        return init

    def run(kind: dict[str, Any], start: Tensor) -> Tensor:
        result: Tensor = hypergrad.implicit(**kind)(descend)(start, LOG_PENALTIES)
        return result

    gradient = torch.func.grad(ridge_loss)
    kinds: list[dict[str, Any]] = [
        {"inner_loss": ridge_loss},
        {"root": gradient},
        {"fixed_point": lambda w, y: w - 0.005 * gradient(w, y)},
    ]
    for kind in kinds:
        if steps == 1000:
            run(kind, ZERO)  # warnings are errors here
            continue
        with pytest.warns(hypergrad.InnerProblemWarning, match="visibly not solved"):
            run(kind, 5 * torch.ones(5, dtype=F64))


def test_a_solution_of_zero_is_one() -> None:
    # Nothing is small compared with a solution of 1e-9; the way there is what counts.
    def in_place(init: Tensor, y: Tensor) -> Tensor:
        return init.mul_(1e-9).add_(y)

    solve = hypergrad.implicit(lambda w, y: 0.5 * ((w - y) ** 2).sum())(in_place)
    solve(torch.ones(5, dtype=F64), ZERO.clone().requires_grad_())
    with pytest.warns(hypergrad.InnerProblemWarning):
        hypergrad.implicit(pull)(lambda init, y: init)(ZERO + 1e-9, ZERO)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_rounding_does_not_warn(dtype: torch.dtype) -> None:
    solve = hypergrad.implicit(ridge_loss)(lambda init, y: ridge_solution(y))
    for scale in (-20.0, 0.0, 20.0):
        solve(None, (LOG_PENALTIES + scale).to(dtype))
    # Centred columns tell nothing of a constant: the solution is zero, up to rounding.
    x = gaussian(30, 4, seed=1).to(dtype)
    x = x - x.mean(0)
    solve = hypergrad.implicit(
        lambda w, y: 0.5 * ((x @ w - 3.0) ** 2).sum() + 0.5 * y * (w**2).sum()
    )(lambda init, y: torch.linalg.solve(x.T @ x + y * torch.eye(4, dtype=dtype), 3.0 * x.sum(0)))
    assert 0 < float(solve(None, torch.ones((), dtype=dtype)).norm()) < 1e-5


# Bad input --------------------------------------------------------------------------------------


def pull(w: Any, y: Tensor) -> Tensor:
    return 0.5 * ((w - y) ** 2).sum()


BAD_RESULTS: list[tuple[str, Callable[[Any, Tensor], Any], type[Exception], str]] = [
    ("structure", lambda init, y: {"w": y}, hypergrad.TreeStructureError, r"unexpected \['w'\]"),
    (
        "shape",
        lambda init, y: y[:2],
        hypergrad.TreeStructureError,
        r"expected \(5,\)",
    ),
    ("array", lambda init, y: y.numpy(), hypergrad.LeafTypeError, "ndarray, expected a torch"),
    ("nothing", lambda init, y: None, hypergrad.LeafTypeError, "NoneType"),
    (
        "dtype",
        lambda init, y: y.float(),
        hypergrad.LeafTypeError,
        "expected torch.float64",
    ),
    ("nan", lambda init, y: y * math.nan, hypergrad.NonFiniteError, "5 of 5 entries"),
    ("inf", lambda init, y: y / 0, hypergrad.NonFiniteError, "holds nan or inf"),
]


@pytest.mark.parametrize(
    ("result", "error", "match"), [x[1:] for x in BAD_RESULTS], ids=[x[0] for x in BAD_RESULTS]
)
def test_bad_results_of_the_solver_are_named(result: Any, error: Any, match: str) -> None:
    solve = hypergrad.implicit(pull)(result)
    with pytest.raises(error, match=f"the inner solver's result.*{match}"):
        solve(ZERO, LOG_PENALTIES)


def test_a_module_is_no_inner_solution() -> None:
    solve = hypergrad.implicit(pull)(lambda init, y: torch.nn.Linear(2, 2))
    with pytest.raises(hypergrad.LeafTypeError, match="named_parameters"):
        solve(None, LOG_PENALTIES)


def test_a_solver_is_any_and_what_it_raises_is_its_own() -> None:
    def broken(init: Any, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hypergrad.implicit(pull)(broken)(None, LOG_PENALTIES)


def test_conditions_that_are_none() -> None:
    with pytest.raises(hypergrad.LossError, match="got none of them"):
        hypergrad.implicit()
    with pytest.raises(hypergrad.LossError, match="exactly one of"):
        hypergrad.implicit(pull, root=root_map)
    with pytest.raises(hypergrad.LossError, match="root=3"):
        hypergrad.implicit(root=3)  # type: ignore[arg-type]
    solve = hypergrad.implicit(root=lambda w, y: (w - y).detach())(lambda init, y: y)
    with pytest.raises(hypergrad.LossError, match="root does not depend on its arguments"):
        solve(None, LOG_PENALTIES)
    solve = hypergrad.implicit(root=pull)(lambda init, y: y)
    with pytest.raises(hypergrad.TreeStructureError, match="the output of root"):
        solve(None, LOG_PENALTIES)
    solve = hypergrad.implicit(lambda w, y: w - y)(lambda init, y: y)
    with pytest.raises(hypergrad.LossError, match="inner_loss has shape"):
        solve(None, LOG_PENALTIES)
    solve = hypergrad.implicit(root=lambda w, y: (w - y) / 0)(lambda init, y: y)
    with pytest.raises(hypergrad.NonFiniteError, match=r"optimality condition \(root\)"):
        solve(None, LOG_PENALTIES)


def test_bad_options() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="solver is 'cg'"):
        hypergrad.implicit(pull, solver="cg")  # type: ignore[arg-type]
    with pytest.raises(hypergrad.SolverOptionError, match="on_failure is 'stop'"):
        hypergrad.implicit(pull, on_failure="stop")  # type: ignore[arg-type]
    with pytest.raises(hypergrad.DampingError, match="-1"):
        hypergrad.implicit(pull, damping=-1.0)
    with pytest.raises(hypergrad.LossError, match="inference"), torch.inference_mode():
        hypergrad.implicit(pull)(lambda init, y: y)(None, LOG_PENALTIES)
    with pytest.raises(hypergrad.LeafTypeError, match="outer_params has dtype"):
        hypergrad.implicit(pull)(lambda init, y: y)(None, torch.ones(3, dtype=torch.long))


CONDITIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "inner_loss": lambda y: {"inner_loss": lambda w, _: pull(w, y)},
    "root": lambda y: {"root": lambda w, _: w - y},
    "fixed_point": lambda y: {"fixed_point": lambda w, _: 0.5 * (w + y)},
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_closures_are_refused_and_not_left_out(kind: str) -> None:
    def value(y: Tensor) -> Tensor:
        solve = hypergrad.implicit(**CONDITIONS[kind](y))(lambda init, _: LOG_PENALTIES.clone())
        result: Tensor = solve(None, LOG_PENALTIES).sum()
        return result

    with pytest.raises(hypergrad.DifferentiationError, match=f"{kind} depends.*closure"):
        value(LOG_PENALTIES.clone().requires_grad_())
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(hypergrad.DifferentiationError, match=f"{kind} depends.*closure"):
            transform(value)(LOG_PENALTIES)
    with pytest.raises(hypergrad.DifferentiationError, match=f"{kind} depends.*closure"):
        torch.func.vmap(value)(LOG_PENALTIES.expand(2, 5))
    with torch.no_grad():
        value(LOG_PENALTIES.clone().requires_grad_())
