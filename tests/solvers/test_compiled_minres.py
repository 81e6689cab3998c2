"""``MINRES(compile=True)``: one graph, and what eager MINRES answers.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph

import hypergrad
from hypergrad import MINRES, Status
from hypergrad.operators import compilation, loops
from hypergrad.solvers import compiled_minres
from tests.solvers.compiled import (
    eager_and_compiled,
    leaves,
    loss,
    model,
    point,
    right_hand_side,
    squares,
    weighted_sum,
)
from tests.solvers.krylov_properties import System, check_the_status_never_lies, quietly
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SCALES,
    SPECTRA,
    dense_solve,
    gaussian,
    relative_residual,
    seeds,
    symmetric,
)

pytestmark = pytest.mark.usefixtures("capture_only")

N = 12
GRAPH = MINRES(compile=True)
CALM = ["flat", "inverse", "outliers", *INDEFINITE]


def matrix(spectrum: str = "alternating", n: int = N, dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA[spectrum](n), seed=1).matrix.to(dtype)


def both(
    operator: Any, v: Any, *, damping: float = 0.0, batched: bool = False, x0: Any = None,
    **options: Any,
) -> tuple[hypergrad.Solution, hypergrad.Solution]:  # fmt: skip
    """The eager solution and the compiled one."""
    return eager_and_compiled(
        lambda compile: MINRES(**options, compile=compile),
        operator, v, damping=damping, batched=batched, x0=x0,
    )  # fmt: skip


def assert_same(eager: hypergrad.Solution, compiled: hypergrad.Solution, rtol: float) -> None:
    """The reports agree, and the answers as far as iterates near each other do."""
    old, new = eager.info, compiled.info
    assert new.status is old.status
    assert abs(new.iterations - old.iterations) <= (0 if new.iterations == 0 else 1)
    if new.iterations == old.iterations:
        assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-2, abs=rtol)
        if old.smallest_eigenvalue is None:
            assert new.smallest_eigenvalue is None
        else:
            size = abs(old.smallest_eigenvalue) + old.damping
            assert new.smallest_eigenvalue == pytest.approx(
                old.smallest_eigenvalue, rel=1e-4, abs=1e-4 * size
            )
    for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
        assert float((leaf - expected).norm()) <= 100 * rtol * float(expected.norm())


def ran_as_a_graph() -> bool:
    return [g.proved for g in compilation._graphs.values() if g.what.startswith("MINRES")] == [True]


OPERATORS: dict[str, Callable[[torch.dtype], Any]] = {
    "hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype)),
    "compiled hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype), compile=True),
    "ggn": lambda dtype: hypergrad.ggn(model, squares, *point(0, dtype)) + (-0.7),
    "sum": lambda dtype: weighted_sum(dtype) + (-1.5),
}


# What is answered -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_answer_is_that_of_eager_minres(name: str, dtype: torch.dtype) -> None:
    operator, v = OPERATORS[name](dtype), right_hand_side(dtype)
    rtol = 1e-4 if dtype == F32 else 1e-8
    eager, compiled = both(operator, v, rtol=rtol)
    assert ran_as_a_graph()
    assert compiled.info.status is Status.CONVERGED
    assert compiled.info.smallest_eigenvalue is not None
    assert compiled.info.smallest_eigenvalue < -1e-2  # it is indefinite
    assert_same(eager, compiled, rtol)
    exact = hypergrad.solve(operator, v, hypergrad.Exact()).value
    for leaf, expected in zip(compiled.value.values(), exact.values(), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e3 * rtol, atol=1e3 * rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectra_of_any_signature(dtype: torch.dtype) -> None:
    v, rtol = gaussian(N, seed=2).to(dtype), 1e-4 if dtype == F32 else 1e-9
    for spectrum in [*POSITIVE, *INDEFINITE]:
        a = matrix(spectrum, dtype=dtype)
        eager, compiled = both(a, v, rtol=rtol, damping=0.03)
        assert compiled.info.converged
        assert relative_residual(a.double(), 0.03, compiled.value, v) <= 1.01 * rtol
        assert_same(eager, compiled, 10 * rtol)
    assert ran_as_a_graph()


@settings(max_examples=40)
@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    of_a=st.sampled_from(SCALES),
    of_v=st.sampled_from([1.0, 3.7, 1e-15, 1e15, 1e-22, 1e22]),
    dtype=st.sampled_from(DTYPES),
    relative=st.sampled_from([0.0, 1.0, 1e-2]),
    loose=st.booleans(),
    seed=seeds,
)
def test_the_status_never_lies(
    spectrum: str, of_a: float, of_v: float, dtype: torch.dtype, relative: float, loose: bool,
    seed: int,
) -> None:  # fmt: skip
    problem = symmetric(SPECTRA[spectrum](N), seed=seed % 1000, scale=of_a)
    rows = (of_v * gaussian(1, N, seed=seed)).to(dtype)
    rtol = 1e-2 if loose else (1e-4 if dtype == F32 else 1e-8)
    system = System(problem, dtype, relative * problem.norm, rows, rtol)
    a = problem.matrix.to(dtype)
    check_the_status_never_lies(system, lambda rtol: MINRES(rtol=rtol, compile=True), a)
    try:
        eager = quietly(a, rows[0], MINRES(rtol=rtol), damping=system.damping)
    except hypergrad.NonFiniteError:  # the answer is beyond the dtype, in both ways
        return
    compiled = quietly(a, rows[0], MINRES(rtol=rtol, compile=True), damping=system.damping)
    assert compiled.info.converged or compiled.info.status is eager.info.status
    assert compiled.info.converged or not eager.info.converged


@settings(max_examples=40)
@given(
    values=st.lists(
        st.tuples(st.sampled_from([-1.0, 1.0]), st.floats(0.01, 1.0)), min_size=N, max_size=N
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_what_converged_is_near_the_dense_solution(
    values: list[tuple[float, float]], dtype: torch.dtype, seed: int
) -> None:
    spectrum = torch.tensor([sign * size for sign, size in values], dtype=F64)
    a = symmetric(spectrum, seed=seed).matrix.to(dtype)
    v, rtol = gaussian(N, seed=seed + 1).to(dtype), 1e-4 if dtype == F32 else 1e-9
    solution = quietly(a, v, MINRES(rtol=rtol, compile=True))
    assert solution.info.status is Status.CONVERGED
    # Of the product in float32, |A x| is about |v|: its rounding is far below the tolerance.
    assert relative_residual(a.double(), 0.0, solution.value, v) <= 1.05 * rtol
    exact = dense_solve(a.double(), v)
    error = float((solution.value.double() - exact).norm())
    assert error <= 1.1 * rtol * float(v.double().norm()) / float(spectrum.abs().min())


@pytest.mark.parametrize("of_v", [1e-15, 1.0, 1e15])
def test_scales_of_v_and_a_batchable_callable(of_v: float) -> None:
    a, v = matrix(dtype=F32), gaussian(N).to(F32)
    operators = a, hypergrad.as_operator(lambda x: a @ x, like=v, batchable=True)
    for operator in operators:
        eager, compiled = both(operator, of_v * v, rtol=1e-4)
        assert compiled.info.converged
        assert_same(eager, compiled, 1e-4)
        outside = relative_residual(a.double(), 0.0, compiled.value, of_v * v)
        assert outside == pytest.approx(compiled.info.relative_residual, rel=3e-2, abs=1e-6)


def test_zero_is_answered_by_zero() -> None:
    eager, compiled = both(matrix(), torch.zeros(N, dtype=F64))
    assert compiled.info.status is Status.CONVERGED
    assert compiled.info.num_hvps == eager.info.num_hvps == 0
    assert torch.equal(compiled.value, torch.zeros(N, dtype=F64))


def test_the_saddle_with_a_singular_first_pivot() -> None:
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    found = hypergrad.solve(a, torch.tensor([1.0, 0.0], dtype=F64), GRAPH)
    assert found.info.converged
    torch.testing.assert_close(found.value, torch.tensor([0.0, 1.0], dtype=F64))


# Rounds -----------------------------------------------------------------------------------------


def test_rounds_go_on_from_each_other() -> None:
    n = 150
    a, v = matrix("alternating", n), gaussian(n, seed=2)
    eager, compiled = both(a, v, rtol=1e-8)
    assert ran_as_a_graph()
    assert eager.info.iterations > 100
    assert_same(eager, compiled, 1e-8)
    lowest = float(torch.linalg.eigvalsh(a)[0])
    assert compiled.info.smallest_eigenvalue == pytest.approx(lowest, rel=1e-3)
    again = hypergrad.solve(a, v, MINRES(rtol=1e-8, compile=True)).info
    assert again.num_hvps == again.iterations + -(-again.iterations // 50)


def test_what_the_recurrence_loses_is_recovered_by_a_restart() -> None:
    # At condition number 1e6 the recurrence of one run drifts at about 1e-16 * 1e12 |x|.
    a, v = matrix("exponential", 60), gaussian(60, seed=2)
    begun = compiled_minres._begin
    sizes: list[float] = []

    def counting(residual: Tensor, norm: float, size: float = 0.0) -> list[Tensor]:
        sizes.append(norm)
        return begun(residual, norm, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_minres, "_begin", counting)
        found = hypergrad.solve(a, v, MINRES(rtol=1e-9, compile=True))
    assert ran_as_a_graph()
    assert len(sizes) > 1
    assert all(after <= 0.1 * before for before, after in zip(sizes, sizes[1:], strict=False))
    assert relative_residual(a, 0.0, found.value, v) <= 1.01e-9


def test_a_recurrence_that_claims_too_early_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_minres, "_SHARE", 30.0)
    eager, compiled = both(matrix(), gaussian(N), rtol=1e-8)
    assert compiled.info.converged
    assert compiled.info.relative_residual <= 1e-8
    assert compiled.info.num_hvps != eager.info.num_hvps


@pytest.mark.parametrize("max_iters", [1, 3, 49, 50, 51, 100])
def test_a_budget_that_ends(max_iters: int) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    eager, compiled = both(a, v, rtol=1e-9, max_iters=max_iters)
    assert ran_as_a_graph()
    assert compiled.info.status is eager.info.status is Status.MAX_ITERATIONS
    assert compiled.info.iterations == eager.info.iterations == max_iters
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-7, atol=1e-9)
    assert compiled.info.relative_residual == pytest.approx(eager.info.relative_residual, rel=1e-7)
    assert compiled.info.smallest_eigenvalue == pytest.approx(eager.info.smallest_eigenvalue)


@pytest.mark.parametrize("max_iters", [1, 5, 50, 70])
def test_a_fixed_number_of_iterations_is_done(max_iters: int) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    eager, compiled = both(a, v, rtol=0.0, max_iters=max_iters)
    assert ran_as_a_graph()
    for info in (eager.info, compiled.info):
        assert info.status is Status.FIXED_ITERATIONS
        assert info.iterations == max_iters
        assert info.smallest_eigenvalue is None
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-7, atol=1e-9)
    assert compiled.info.relative_residual == pytest.approx(eager.info.relative_residual, rel=1e-7)


def test_a_fixed_number_that_solves_exactly_has_converged() -> None:
    eager, compiled = both(torch.eye(4), torch.ones(4), rtol=0.0, max_iters=3)
    assert compiled.info.status is eager.info.status is Status.CONVERGED
    assert compiled.info.iterations == eager.info.iterations


def test_a_fixed_number_beyond_the_solution_stands_still_as_it_does_eagerly() -> None:
    eager, compiled = both(matrix("half_rank"), gaussian(N), rtol=0.0, max_iters=80)
    assert compiled.info.status is eager.info.status is Status.FIXED_ITERATIONS
    assert torch.equal(compiled.value, eager.value)


def test_a_warm_start_is_gone_on_from() -> None:
    a, v = matrix(n=40), gaussian(40)
    exact = dense_solve(a, v)
    cold = hypergrad.solve(a, v, GRAPH).info
    near = hypergrad.solve(a, v, GRAPH, x0=exact + 1e-4 * gaussian(40, seed=3))
    assert ran_as_a_graph()
    assert near.info.converged
    assert near.info.iterations < cold.iterations
    assert near.info.num_hvps == near.info.iterations + 2  # the residuals of start and end
    assert float((near.value - exact).norm()) <= 1e-3 * float(exact.norm())
    at = hypergrad.solve(a, v, GRAPH, x0=exact).info
    assert (at.status, at.iterations) == (Status.CONVERGED, 0)


def test_the_reported_products_are_those_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a graph, and its loop one of Python, each product is seen.
    def loop(going: Any, step: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        while bool(going(*state)):
            state = step(*state)
        return state

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled_minres, "while_loop", loop)
    a, v, made = matrix("alternating", 60), gaussian(60), [0]

    def product(x: Tensor) -> Tensor:
        made[0] += 1
        return a @ x

    operator = hypergrad.as_operator(product, like=v, batchable=True)
    start = gaussian(60, seed=1)
    problems: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {}),
        ({}, {"x0": start}),
        ({"rtol": 0.0, "max_iters": 60}, {}),
        ({"rtol": 1e-12, "max_iters": 55}, {}),
        ({"rtol": 1e-30}, {}),  # which eager MINRES does once more
    ]
    for options, rest in problems:
        made[0] = 0
        info = quietly(operator, v, MINRES(**options, compile=True), **rest).info
        assert info.num_hvps == made[0]
    assert made[0] > 120


# What is not ordinary ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_consistent_system(dtype: torch.dtype) -> None:
    problem = symmetric(torch.linspace(-1.0, 1.0, 13, dtype=F64).round(decimals=9), seed=3)
    x = problem.basis[:, problem.eigenvalues != 0] @ gaussian(12, seed=3)
    a, v = problem.matrix.to(dtype), (problem.matrix @ x).to(dtype)
    eager, compiled = both(a, v, rtol=1e-3 if dtype == F32 else 1e-9)
    assert ran_as_a_graph()
    assert compiled.info.status is eager.info.status is Status.CONVERGED
    assert float((compiled.value - x.to(dtype)).norm()) <= 2e-2 * float(x.norm())


@pytest.mark.parametrize("spectrum", ["half_rank", "rank_one", "zero"])
def test_a_singular_inconsistent_system_is_the_eager_solver_s(spectrum: str) -> None:
    for dtype in DTYPES:
        a, v = matrix(spectrum, dtype=dtype), gaussian(N, seed=2).to(dtype)
        eager, compiled = both(a, v, rtol=1e-6)
        assert compiled.info.status is eager.info.status is Status.STAGNATED
        assert torch.equal(compiled.value, eager.value)
        assert compiled.info.relative_residual == eager.info.relative_residual
        assert compiled.info.smallest_eigenvalue == eager.info.smallest_eigenvalue
        assert compiled.info.num_hvps > eager.info.num_hvps  # those of the graph are counted


def test_a_tolerance_below_rounding_ends_as_it_does_eagerly() -> None:
    a, v = matrix("exponential", dtype=F32), gaussian(N).to(F32)
    eager, compiled = both(a, v, rtol=1e-12)
    assert compiled.info.status is eager.info.status is Status.STAGNATED
    assert torch.equal(compiled.value, eager.value)


@pytest.mark.parametrize("options", [{}, {"rtol": 0.0, "max_iters": 5}])
def test_products_that_are_not_symmetric_are_refused(options: dict[str, Any]) -> None:
    a = torch.eye(10, dtype=F64) + torch.triu(gaussian(10, 10, seed=1))
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(a, gaussian(10, seed=2), MINRES(**options, compile=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    a = matrix(dtype=F32)
    a[2, 3] = bad
    with pytest.raises(hypergrad.NonFiniteError):
        hypergrad.solve(a, gaussian(N).to(F32), GRAPH)


@pytest.mark.parametrize(("of_a", "of_v"), [(1e22, 1e-19), (1e26, 1e-19), (1e36, 1e-10)])
def test_an_answer_that_underflows_is_the_eager_solver_s(of_a: float, of_v: float) -> None:
    a = torch.diag(of_a * torch.linspace(-3.0, 2.0, N))
    eager, compiled = both(a, of_v * gaussian(N).to(F32), rtol=1e-5)
    assert compiled.info.status is eager.info.status is not Status.CONVERGED
    assert compiled.info.relative_residual == eager.info.relative_residual


@pytest.mark.parametrize("of_a", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_beyond_the_dtype_are_the_eager_solver_s(of_a: float) -> None:
    a, v = of_a * matrix(n=10), gaussian(10)
    eager, compiled = both(a, v, rtol=1e-8)
    assert compiled.info.converged
    assert torch.equal(compiled.value, eager.value)
    assert compiled.info.smallest_eigenvalue == eager.info.smallest_eigenvalue


def test_params_that_were_modified_in_place_are_refused() -> None:
    params, x, y = point(0)
    operator = hypergrad.hessian(loss, params, x, y)
    hypergrad.solve(operator, right_hand_side(), GRAPH)
    with torch.no_grad():
        params["w"] *= 0.9
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.solve(operator, right_hand_side(), GRAPH)


def test_what_cannot_be_one_graph_runs_eagerly_after_a_word() -> None:
    a, v = matrix(), gaussian(N)
    with pytest.warns(hypergrad.CompilationWarning, match=r"MINRES.*batchable"):
        found = hypergrad.solve(lambda x: a @ x, v, GRAPH)
    assert found.info.converged
    draws = iter(range(1000))

    def restless(p: Tensor) -> Tensor:
        return (p**2).sum() * (1.0 + next(draws))

    operator = hypergrad.hessian(restless, gaussian(N))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = hypergrad.solve(operator, v, GRAPH, on_failure="ignore")
    assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
    assert not ran_as_a_graph()


def test_many_right_hand_sides_are_a_block_of_eager_minres() -> None:
    eager, compiled = both(matrix(), gaussian(3, N), batched=True)
    assert torch.equal(compiled.value, eager.value)
    assert not compilation._graphs


def test_options_are_checked() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="preconditioner"):
        MINRES(preconditioner=torch.eye(N), compile=True)
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        MINRES(compile="yes")  # type: ignore[arg-type]


# Graphs -----------------------------------------------------------------------------------------


def test_new_parameters_are_solved_with_by_the_same_graph() -> None:
    for seed in range(3):
        operator = hypergrad.hessian(loss, *point(seed))
        found = hypergrad.solve(operator, right_hand_side(), MINRES(rtol=1e-8, compile=True))
        exact = hypergrad.solve(operator, right_hand_side(), hypergrad.Exact()).value
        torch.testing.assert_close(found.value, exact, rtol=1e-5, atol=1e-5)
    assert ran_as_a_graph()


def test_a_derivative_is_one_more_solve_by_the_graph() -> None:
    a, v = matrix(), gaussian(N).requires_grad_()
    solution = hypergrad.solve(a, v, MINRES(rtol=1e-9, compile=True))
    (gradient,) = torch.autograd.grad(solution.value.sum(), v)
    torch.testing.assert_close(
        gradient, dense_solve(a, torch.ones(N, dtype=F64)), rtol=1e-6, atol=1e-6
    )
    assert ran_as_a_graph()


def test_generated_code_computes_the_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    counts: list[tuple[int, int]] = []

    class Counting(loops.HoistInvariants):
        def __call__(self, graph: Graph) -> None:
            module = graph.owning_module
            assert module is not None
            super().__call__(graph)
            for node in module.graph.nodes:
                if node.target is torch.ops.higher_order.while_loop:
                    body = getattr(module, str(node.args[1].target))
                    counts.append((_tanhs(module.graph), _tanhs(body.graph)))

        def uuid(self) -> bytes:
            return b"counting"

    monkeypatch.setattr(loops, "HoistInvariants", Counting)
    operator, v = hypergrad.hessian(loss, *point(0, F32)), right_hand_side(F32)
    for _ in range(2):
        eager, compiled = both(operator, v, rtol=1e-4)
        assert_same(eager, compiled, 1e-4)
    assert ran_as_a_graph()
    # Once for all products: those of the loop, and the one that checks.
    assert counts == [(1, 0)]


def _tanhs(graph: Graph) -> int:
    return sum(node.target is torch.ops.aten.tanh.default for node in graph.nodes)


@pytest.mark.slow
def test_generated_code_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    for dtype in DTYPES:
        rtol = 1e-4 if dtype == F32 else 1e-8
        for spectrum in CALM:
            a, v = matrix(spectrum, 150, dtype), gaussian(150, seed=2).to(dtype)
            run = functools.partial(both, a, v, damping=0.03)
            assert_same(*run(rtol=rtol), 10 * rtol)
            assert_same(*run(rtol=0.0, max_iters=60), 10 * rtol)
    assert all(graph.proved for graph in compilation._graphs.values())
