"""``CG(compile=True)``: one graph, and what eager CG answers.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Status
from hypergrad.operators import compilation
from hypergrad.solvers import compiled_cg
from tests.solvers.compiled import OPERATORS, loss, passes_counted, point, right_hand_side
from tests.strategies import F32, F64, SPECTRA, gaussian, symmetric

pytestmark = pytest.mark.usefixtures("capture_only")

N = 12
GRAPH = hypergrad.CG(rtol=1e-5, compile=True)


def matrix(spectrum: str = "inverse", dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA[spectrum](N), seed=1).matrix.to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_answer_is_that_of_eager_cg(name: str, dtype: torch.dtype) -> None:
    operator, v = OPERATORS[name](dtype), right_hand_side(dtype)
    solver = hypergrad.CG(rtol=1e-6, compile=True)
    found = hypergrad.solve(operator, v, solver, damping=0.5)
    exact = hypergrad.solve(operator, v, hypergrad.Exact(), damping=0.5).value
    assert found.info.status is Status.CONVERGED
    assert found.info.relative_residual <= 1e-6
    for leaf, expected in zip(found.value.values(), exact.values(), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e-4, atol=1e-5)
    assert any(
        graph.what.startswith("CG") and graph.proved for graph in compilation._graphs.values()
    )


def test_a_callable_whose_graph_was_proved_is_not_called() -> None:
    a, v, calls = matrix(dtype=F32), gaussian(N).to(F32), 0

    def product(x: Tensor) -> Tensor:
        nonlocal calls
        if not torch.compiler.is_compiling():
            calls += 1
        return a @ x

    def solve() -> hypergrad.SolveInfo:
        operator = hypergrad.as_operator(product, like=v, batchable=True)
        return hypergrad.solve(operator, v, GRAPH, damping=0.1).info

    solve()
    proved_by = calls
    assert proved_by > 0
    info = solve()
    assert calls == proved_by
    assert info.num_hvps == info.iterations + 1


def test_what_a_callable_reaches_is_found_without_calling_it() -> None:
    """By the graph: the second operator of its kind makes no product by itself."""
    root, v = torch.ones(N, dtype=F64, requires_grad=True), gaussian(N)

    def product(x: Tensor) -> Tensor:
        return (1.0 + root.square()) * x

    for _ in range(2):
        operator = hypergrad.as_operator(product, like=v, batchable=True)
        x = hypergrad.solve(operator, v, GRAPH).value
        (found,) = torch.autograd.grad(x.sum(), root)
        torch.testing.assert_close(found, -2.0 * v / 4.0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("before", ["without gradients", "constant", "neither"])
def test_what_an_operator_was_before_says_nothing_of_what_it_reaches_now(
    before: str, combined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products were constants then; its graph, proved by others, makes them now."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    reached, v = torch.ones(N, dtype=F64), gaussian(N)

    def product(x: Tensor) -> Tensor:
        return (1.0 + reached.square()) * x

    def made() -> hypergrad.LinearOperator:
        operator = hypergrad.as_operator(product, like=v, batchable=True)
        return 0.5 * operator + 0.5 * operator if combined else operator

    hypergrad.solve(made(), v, GRAPH)
    reached.requires_grad_()
    hypergrad.solve(made(), v, GRAPH)
    operator = made()
    if before == "without gradients":
        with torch.no_grad():
            hypergrad.solve(operator, v, GRAPH)
            hypergrad.solve(operator, v, hypergrad.CG())
    elif before == "constant":
        reached.requires_grad_(False)
        hypergrad.solve(operator, v, GRAPH)
        hypergrad.solve(operator, v, hypergrad.CG())
        reached.requires_grad_()
    for _ in range(2):
        x = hypergrad.solve(operator, v, GRAPH).value
        (found,) = torch.autograd.grad(x.sum(), reached)
        torch.testing.assert_close(found, -2.0 * v / 4.0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_a_matrix_and_a_batchable_callable(size: float) -> None:
    a, v = matrix(dtype=F32), gaussian(N).to(F32)
    operators = a, hypergrad.as_operator(lambda x: a @ x, like=v, batchable=True)
    for operator in operators:
        info = hypergrad.solve(operator, size * v, GRAPH, damping=0.1).info
        eager = hypergrad.solve(operator, size * v, hypergrad.CG(rtol=1e-5), damping=0.1).info
        assert info.converged
        assert abs(info.iterations - eager.iterations) <= 1
        # One check of the answer, and one product that proves the graph.
        assert info.num_hvps in (info.iterations + 1, info.iterations + 2)
    found = hypergrad.solve(a, size * v, GRAPH, damping=0.1)
    x = found.value.double()
    residual = size * v.double() - a.double() @ x - 0.1 * x
    # A float32 product of |A x| about |v| is off by 1e-7 |v|, the residual by 1e-5 |v| long.
    assert float(residual.norm()) == pytest.approx(found.info.residual_norm, rel=3e-2)


def test_the_reported_products_are_those_of_the_operator() -> None:
    a, v = matrix(dtype=F64), gaussian(N)
    hypergrad.solve(a, v, GRAPH, damping=0.1)
    info = hypergrad.solve(a, v, GRAPH, damping=0.1).info
    assert info.num_hvps == info.iterations + 1


def test_new_parameters_are_solved_with_by_the_same_graph() -> None:
    v = right_hand_side(F64)
    for seed in range(3):
        operator = hypergrad.hessian(loss, *point(seed), compile=True)
        found = hypergrad.solve(operator, v, GRAPH, damping=3.0)
        exact = hypergrad.solve(operator, v, hypergrad.Exact(), damping=3.0).value
        torch.testing.assert_close(found.value, exact, rtol=1e-3, atol=1e-4)
    assert [graph.what[:2] for graph in compilation._graphs.values()].count("CG") == 1


def test_params_that_were_modified_in_place_are_refused() -> None:
    params, x, y = point(0)
    for kind in range(3):
        hessian: hypergrad.LinearOperator = hypergrad.hessian(loss, params, x, y)
        other = hypergrad.hessian(loss, *point(1))
        operator = (hessian, 2.0 * hessian + 3.0, hessian + other)[kind]
        hypergrad.solve(operator, right_hand_side(F64), GRAPH, damping=3.0)
        with torch.no_grad():
            params["w"] *= 0.9
        with pytest.raises(hypergrad.StaleOperatorError):
            hypergrad.solve(operator, right_hand_side(F64), GRAPH, damping=3.0)


def test_a_warm_start_is_gone_on_from() -> None:
    a, v = matrix(), gaussian(N)
    exact = torch.linalg.solve(a + 0.1 * torch.eye(N, dtype=F64), v)
    near = exact + 1e-4 * gaussian(N, seed=3)
    cold = hypergrad.solve(a, v, GRAPH, damping=0.1).info
    warm = hypergrad.solve(a, v, GRAPH, damping=0.1, x0=near)
    assert warm.info.converged
    assert warm.info.iterations < cold.iterations
    torch.testing.assert_close(warm.value, exact, rtol=1e-3, atol=1e-4)


def test_a_fixed_number_of_iterations_is_done() -> None:
    a, v = matrix(), gaussian(N)
    for compile in (True, False):
        solver = hypergrad.CG(rtol=0.0, max_iters=5, compile=compile)
        found = hypergrad.solve(a, v, solver, damping=0.1)
        assert found.info.status is Status.FIXED_ITERATIONS
        assert found.info.iterations == 5
        if compile:
            first = found.value
    torch.testing.assert_close(first, found.value, rtol=1e-9, atol=1e-9)


def test_a_budget_that_ends_returns_the_best_iterate() -> None:
    values = torch.logspace(0, -6, N, dtype=F64)
    a, v = symmetric(values, seed=1).matrix, gaussian(N)
    for count in range(1, 9):
        solvers = (hypergrad.CG(rtol=1e-10, max_iters=count, compile=c) for c in (True, False))
        mine, eager = (hypergrad.solve(a, v, s, on_failure="ignore").info for s in solvers)
        assert mine.status is eager.status is Status.MAX_ITERATIONS
        assert mine.relative_residual == pytest.approx(eager.relative_residual, rel=1e-6)
        assert mine.iterations == count


@pytest.mark.parametrize("fixed", [True, False])
def test_negative_curvature_is_reported_with_its_direction(fixed: bool) -> None:
    values = torch.linspace(1.0, 3.0, N, dtype=F64)
    values[0] = -2.0
    a, v = symmetric(values, seed=1).matrix, gaussian(N)
    options: dict[str, Any] = {"rtol": 0.0, "max_iters": 10} if fixed else {}
    info = hypergrad.solve(a, v, hypergrad.CG(compile=True, **options), on_failure="ignore").info
    assert info.status is Status.NEGATIVE_CURVATURE
    direction = info.direction
    assert isinstance(direction, Tensor)
    assert float(direction @ a @ direction) <= 0


def test_products_that_are_not_symmetric_are_refused() -> None:
    a = matrix() + torch.triu(gaussian(N, N), 1)
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(a, gaussian(N), GRAPH, damping=20.0)


def test_what_is_not_finite_is_refused() -> None:
    a = matrix(dtype=F32)
    a[2, 3] = torch.nan
    with pytest.raises(hypergrad.NonFiniteError):
        hypergrad.solve(a, gaussian(N).to(F32), GRAPH)


def test_a_tolerance_below_rounding_ends_as_it_does_eagerly() -> None:
    a, v = (
        symmetric(torch.logspace(0, -5, N, dtype=F64), seed=1).matrix.to(F32),
        gaussian(N).to(F32),
    )
    infos = [
        hypergrad.solve(a, v, hypergrad.CG(rtol=1e-12, compile=c), on_failure="ignore").info
        for c in (True, False)
    ]
    assert [info.status for info in infos] == [Status.STAGNATED] * 2
    assert infos[0].relative_residual <= 10 * infos[1].relative_residual


def test_what_cannot_be_one_graph_runs_eagerly_after_a_word() -> None:
    a, v = matrix(), gaussian(N)
    with pytest.warns(hypergrad.CompilationWarning, match="batchable"):
        found = hypergrad.solve(lambda x: a @ x, v, GRAPH, damping=0.1)
    assert found.info.converged
    draws = iter(range(1000))

    def restless(p: Tensor) -> Tensor:
        return (p**2).sum() * (1.0 + next(draws))

    operator = hypergrad.hessian(restless, gaussian(N))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = hypergrad.solve(operator, v, GRAPH, damping=0.1)
    assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
    assert found.info.converged


def test_many_right_hand_sides_are_a_block_of_eager_cg() -> None:
    rows = gaussian(3, N)
    found = hypergrad.solve(matrix(), rows, GRAPH, damping=0.1, batched=True)
    assert found.info.converged
    assert not compilation._graphs


def test_a_preconditioner_and_compile_exclude_each_other() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="preconditioner"):
        hypergrad.CG(preconditioner=torch.eye(N), compile=True)
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        hypergrad.CG(compile="yes")  # type: ignore[arg-type]


def test_a_derivative_is_one_more_solve_by_the_graph() -> None:
    a, v = matrix(), gaussian(N).requires_grad_()
    solution = hypergrad.solve(a, v, hypergrad.CG(rtol=1e-9, compile=True), damping=0.1)
    (gradient,) = torch.autograd.grad(solution.value.sum(), v)
    system = a + 0.1 * torch.eye(N, dtype=F64)
    expected = torch.linalg.solve(system, torch.ones(N, dtype=F64))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_a_tensor_in_a_closure_is_found_where_there_is_no_graph_yet() -> None:
    weight = torch.tensor(1.0, dtype=F64)

    def weighted(p: Tensor, x: Tensor) -> Tensor:
        return weight * torch.cosh(x * p).sum()

    v = torch.ones(3, dtype=F64)
    for _ in range(2):  # the second operator is made without its gradient
        operator = hypergrad.hessian(weighted, torch.ones(3, dtype=F64), v, compile=True)
        assert not hypergrad.solve(operator, v, GRAPH).value.requires_grad
    weight.requires_grad_()
    operator = hypergrad.hessian(weighted, torch.ones(3, dtype=F64), v, compile=True)
    (slope,) = torch.autograd.grad(hypergrad.solve(operator, v, GRAPH).value.sum(), weight)
    torch.testing.assert_close(slope, -3 / torch.cosh(v[0]), rtol=1e-5, atol=1e-5)


def test_generated_code_computes_the_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    counts = passes_counted(monkeypatch)
    operator, v = hypergrad.hessian(loss, *point(0)), right_hand_side(F64)
    found = hypergrad.solve(operator, v, GRAPH, damping=3.0)
    exact = hypergrad.solve(operator, v, hypergrad.Exact(), damping=3.0).value
    torch.testing.assert_close(found.value, exact, rtol=1e-3, atol=1e-4)
    # Once for all products: those of the loop, and the one that checks.
    assert counts == [(1, 0)]


def test_rounds_go_on_from_the_true_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    # A recurrence that stops early is not believed: the next round starts where it ended.
    monkeypatch.setattr(compiled_cg, "_SHARE", 50.0)
    monkeypatch.setattr(compiled_cg, "_GAIN", 1.0)
    info = hypergrad.solve(matrix(), gaussian(N), GRAPH, damping=0.1, on_failure="ignore").info
    assert info.converged
    assert info.relative_residual <= 1e-5


@pytest.mark.parametrize(("of_a", "of_v"), [(1e22, 1e-19), (1e26, 1e-19), (1e36, 1e-10)])
def test_an_answer_that_underflows_is_the_eager_solver_s(of_a: float, of_v: float) -> None:
    a = torch.diag(of_a * torch.linspace(1.0, 3.0, N))
    v = of_v * gaussian(N).to(F32)
    infos = [
        hypergrad.solve(a, v, CG(rtol=1e-5), on_failure="ignore").info
        for CG in (hypergrad.CG, functools.partial(hypergrad.CG, compile=True))
    ]
    assert infos[0].status is infos[1].status is Status.STAGNATED
    assert infos[1].relative_residual == pytest.approx(infos[0].relative_residual)


def test_a_fixed_number_that_solves_exactly_has_converged() -> None:
    for compiled in (False, True):
        solver = hypergrad.CG(rtol=0.0, max_iters=3, compile=compiled)
        info = hypergrad.solve(torch.eye(4), torch.ones(4), solver).info
        assert info.status is Status.CONVERGED
