"""``MINRES(compile=True)``: one graph, and what eager MINRES answers.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import MINRES, Status
from hypergrad.operators import compilation
from hypergrad.solvers import compiled_minres
from tests.solvers.compiled import (
    answers_watched,
    capturing,
    eager_and_compiled,
    generating,
    leaves,
    loss,
    matrix,
    passes_counted,
    point,
    right_hand_side,
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

N = 12
GRAPH = MINRES(compile=True)
CALM = ["flat", "inverse", "outliers", *INDEFINITE]


@pytest.fixture(scope="module", autouse=True)
def captured() -> Iterator[None]:
    """Graphs are captured and run, without code from them; the tests here share them."""
    with capturing():
        yield


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code is generated from graphs, and the graphs are the test's own."""
    with generating(monkeypatch):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each compiled solve, whether the graph answered; else eager MINRES did."""
    return answers_watched(monkeypatch, compiled_minres)


def both(
    operator: Any, v: Any, *, damping: float = 0.0, batched: bool = False, x0: Any = None,
    **options: Any,
) -> tuple[hypergrad.Solution, hypergrad.Solution]:  # fmt: skip
    """The eager solution and the compiled one."""
    return eager_and_compiled(
        lambda compile: MINRES(**options, compile=compile),
        operator, v, damping=damping, batched=batched, x0=x0,
    )  # fmt: skip


def assert_same(
    eager: hypergrad.Solution, compiled: hypergrad.Solution, rtol: float, near: int = 1
) -> None:
    """The reports agree, and the answers as far as iterates near each other do."""
    old, new = eager.info, compiled.info
    assert new.status is old.status
    assert abs(new.iterations - old.iterations) <= (0 if new.iterations == 0 else near)
    if new.iterations == old.iterations:
        assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-2, abs=rtol)
        if old.smallest_eigenvalue is None:
            assert new.smallest_eigenvalue is None
        else:
            assert new.smallest_eigenvalue == pytest.approx(
                old.smallest_eigenvalue, rel=1e-3, abs=1e-5
            )
    for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
        assert float((leaf - expected).norm()) <= 100 * rtol * float(expected.norm())


def shifted_hessian(seed: int = 0, dtype: torch.dtype = F64) -> hypergrad.LinearOperator:
    return hypergrad.hessian(loss, *point(seed, dtype)) + (-1.0)


OPERATORS: dict[str, Callable[[torch.dtype], Any]] = {
    "hessian": lambda dtype: shifted_hessian(0, dtype),
    "sum": lambda dtype: weighted_sum(dtype) + (-1.5),
}


# What is answered -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("hessian", F64), ("sum", F32)])
def test_the_answer_is_that_of_eager_minres(
    name: str, dtype: torch.dtype, graphs: list[bool]
) -> None:
    operator, v = OPERATORS[name](dtype), right_hand_side(dtype)
    rtol = 1e-4 if dtype == F32 else 1e-8
    eager, compiled = both(operator, v, rtol=rtol)
    assert graphs == [True]
    assert compiled.info.status is Status.CONVERGED
    assert compiled.info.smallest_eigenvalue is not None
    assert compiled.info.smallest_eigenvalue < -1e-2  # it is indefinite
    assert_same(eager, compiled, rtol)
    exact = hypergrad.solve(operator, v, hypergrad.Exact()).value
    for leaf, expected in zip(compiled.value.values(), exact.values(), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e3 * rtol, atol=1e3 * rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectra_of_any_signature(dtype: torch.dtype, graphs: list[bool]) -> None:
    v, rtol = gaussian(N, seed=2).to(dtype), 1e-4 if dtype == F32 else 1e-9
    for spectrum in [*POSITIVE, *INDEFINITE]:
        a = matrix(spectrum, dtype=dtype)
        eager, compiled = both(a, v, rtol=rtol, damping=0.03)
        assert compiled.info.converged
        assert relative_residual(a.double(), 0.03, compiled.value, v) <= 1.01 * rtol
        assert_same(eager, compiled, 10 * rtol)
    assert all(graphs)


@settings(max_examples=25)
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


@settings(max_examples=25)
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


def test_scales_of_v_and_a_batchable_callable(graphs: list[bool]) -> None:
    a, v = matrix(dtype=F32), gaussian(N).to(F32)
    operators = a, hypergrad.as_operator(lambda x: a @ x, like=v, batchable=True)
    for operator, of_v in itertools.product(operators, [1e-15, 1.0, 1e15]):
        eager, compiled = both(operator, of_v * v, rtol=1e-4)
        assert compiled.info.converged
        assert_same(eager, compiled, 1e-4)
        outside = relative_residual(a.double(), 0.0, compiled.value, of_v * v)
        assert outside == pytest.approx(compiled.info.relative_residual, rel=3e-2, abs=1e-6)
    assert graphs == [True] * 6


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


def test_rounds_go_on_from_each_other(graphs: list[bool]) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    eager, compiled = both(a, v, rtol=1e-6)
    assert eager.info.iterations > 100
    assert_same(eager, compiled, 1e-6)
    lowest = float(torch.linalg.eigvalsh(a)[0])
    assert compiled.info.smallest_eigenvalue == pytest.approx(lowest, rel=1e-3)
    again = hypergrad.solve(a, v, MINRES(rtol=1e-6, compile=True)).info
    assert again.num_hvps == again.iterations + 3  # a check a round
    assert graphs == [True] * 2


def test_what_the_recurrence_loses_is_recovered_by_a_restart(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At condition number 1e6 the recurrence of one run drifts at about 1e-16 * 1e12 |x|.
    a, v = matrix("exponential", 60), gaussian(60, seed=2)
    begun = compiled_minres._begin
    sizes: list[float] = []

    def counting(residual: Tensor, norm: float, size: float = 0.0) -> list[Tensor]:
        sizes.append(norm)
        return begun(residual, norm, size)

    monkeypatch.setattr(compiled_minres, "_begin", counting)
    found = hypergrad.solve(a, v, MINRES(rtol=1e-9, compile=True))
    assert graphs == [True]
    assert len(sizes) > 1
    assert all(after <= 0.1 * before for before, after in itertools.pairwise(sizes))
    assert relative_residual(a, 0.0, found.value, v) <= 1.01e-9


def test_a_claim_that_the_true_residual_does_not_meet_is_gone_on_from(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    after = hypergrad.solve(a, v, MINRES(rtol=0.0, max_iters=20)).info.relative_residual
    solver = MINRES(rtol=1.0001 * after / compiled_minres._SHARE, compile=True)
    assert hypergrad.solve(a, v, solver).info.iterations == 20
    read = compiled_minres._Round.read
    norms: list[float] = []

    def off(numbers: Tensor, before: int) -> Any:
        """What rounding makes of it, the first time: a true residual just above the tolerance."""
        found = read(numbers, before)
        found.norm *= 1.0 if norms else 1.08
        norms.append(found.norm)
        return found

    monkeypatch.setattr(compiled_minres._Round, "read", off)
    found = hypergrad.solve(a, v, solver)
    assert graphs == [True] * 2
    assert len(norms) > 1
    assert found.info.iterations > 20
    assert relative_residual(a, 0.0, found.value, v) <= solver.rtol


def test_a_budget_that_ends(graphs: list[bool]) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    for max_iters in (1, 3, 49, 50, 51, 70):
        eager, compiled = both(a, v, rtol=1e-9, max_iters=max_iters)
        assert compiled.info.status is eager.info.status is Status.MAX_ITERATIONS
        assert compiled.info.iterations == eager.info.iterations == max_iters
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-7, atol=1e-9)
        old, new = eager.info, compiled.info
        assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-6)
        assert new.smallest_eigenvalue == pytest.approx(old.smallest_eigenvalue)
    assert all(graphs)


def test_a_budget_that_ends_after_a_step_of_rounding_is_the_eager_solver_s(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Along a null space x may be long, and its residual smaller by chance.
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    read = compiled_minres._Round.read

    def risky(numbers: Tensor, before: int) -> Any:
        found = read(numbers, before)
        found.risky = found.done == 50
        return found

    monkeypatch.setattr(compiled_minres._Round, "read", risky)
    eager, compiled = both(a, v, rtol=1e-9, max_iters=70)
    assert graphs == [False]
    assert compiled.info.status is Status.MAX_ITERATIONS
    assert torch.equal(compiled.value, eager.value)
    assert both(a, v, rtol=1e-5)[1].info.converged  # that is to be believed all the same
    assert graphs == [False, True]


def test_a_fixed_number_of_iterations_is_done(graphs: list[bool]) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    for max_iters in (1, 5, 50, 70):
        eager, compiled = both(a, v, rtol=0.0, max_iters=max_iters)
        for info in (eager.info, compiled.info):
            assert info.status is Status.FIXED_ITERATIONS
            assert info.iterations == max_iters
            assert info.smallest_eigenvalue is None
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-7, atol=1e-9)
        assert compiled.info.residual_norm == pytest.approx(eager.info.residual_norm, rel=1e-7)
    assert all(graphs)


def test_a_fixed_number_that_solves_exactly_has_converged() -> None:
    eager, compiled = both(
        torch.eye(N, dtype=F64), torch.eye(N, dtype=F64)[0], rtol=0.0, max_iters=3
    )
    assert compiled.info.status is eager.info.status is Status.CONVERGED
    assert compiled.info.iterations == eager.info.iterations


def test_a_fixed_number_beyond_the_solution_stands_still_as_it_does_eagerly(
    graphs: list[bool],
) -> None:
    eager, compiled = both(matrix("outliers"), gaussian(N), rtol=0.0, max_iters=80)
    assert graphs == [False]
    assert compiled.info.status is eager.info.status is Status.FIXED_ITERATIONS
    assert torch.equal(compiled.value, eager.value)


def test_a_warm_start_is_gone_on_from(graphs: list[bool]) -> None:
    a, v = matrix("alternating", 150), gaussian(150, seed=2)
    exact = dense_solve(a, v)
    cold = hypergrad.solve(a, v, GRAPH).info
    near = hypergrad.solve(a, v, GRAPH, x0=exact + 1e-4 * gaussian(150, seed=3))
    assert graphs == [True] * 2
    assert near.info.converged
    assert near.info.iterations < cold.iterations
    rounds = -(-near.info.iterations // 50)
    assert near.info.num_hvps == near.info.iterations + rounds + 1  # which checks the start
    assert float((near.value - exact).norm()) <= 1e-4 * float(exact.norm())
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
def test_a_singular_consistent_system(dtype: torch.dtype, graphs: list[bool]) -> None:
    values = torch.linspace(-1.0, 1.0, N, dtype=F64)
    values[N // 2] = 0.0
    problem = symmetric(values, seed=3)
    x = problem.basis[:, values != 0] @ gaussian(N - 1, seed=3)
    a, v = problem.matrix.to(dtype), (problem.matrix @ x).to(dtype)
    eager, compiled = both(a, v, rtol=1e-3 if dtype == F32 else 1e-9)
    assert graphs == [True]
    assert compiled.info.status is eager.info.status is Status.CONVERGED
    assert float((compiled.value - x.to(dtype)).norm()) <= 2e-2 * float(x.norm())


@pytest.mark.parametrize("spectrum", ["half_rank", "rank_one", "zero"])
def test_a_singular_inconsistent_system_is_the_eager_solver_s(spectrum: str) -> None:
    for dtype in DTYPES:
        a, v = matrix(spectrum, dtype=dtype), gaussian(N, seed=2).to(dtype)
        eager, compiled = both(a, v, rtol=1e-5)
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


@pytest.mark.parametrize("options", [{}, {"rtol": 0.0, "max_iters": 9}])
def test_products_that_are_not_symmetric_are_refused(options: dict[str, Any]) -> None:
    a = torch.eye(N, dtype=F64) + torch.triu(gaussian(N, N, seed=1))
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(a, gaussian(N, seed=2), MINRES(**options, compile=True))


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


@pytest.mark.parametrize("of_a", [1e-200, 1e-158, 1e160, 1e300])
def test_squares_beyond_the_dtype_are_the_eager_solver_s(of_a: float) -> None:
    a, v = of_a * matrix(), gaussian(N)
    eager, compiled = both(a, v, rtol=1e-2)
    assert compiled.info.converged
    assert torch.equal(compiled.value, eager.value)
    assert compiled.info.smallest_eigenvalue == eager.info.smallest_eigenvalue


def test_params_that_were_modified_in_place_are_refused() -> None:
    params, x, y = point(0)
    operator = hypergrad.hessian(loss, params, x, y) + (-1.0)
    hypergrad.solve(operator, right_hand_side(), GRAPH)
    with torch.no_grad():
        params["w"] *= 0.9
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.solve(operator, right_hand_side(), GRAPH)


def test_what_cannot_be_one_graph_runs_eagerly_after_a_word(graphs: list[bool]) -> None:
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
    assert graphs == [False] * 2


def test_many_right_hand_sides_are_a_block_of_eager_minres(graphs: list[bool]) -> None:
    eager, compiled = both(matrix(), gaussian(3, N), batched=True)
    assert torch.equal(compiled.value, eager.value)
    assert graphs == [False]


def test_options_are_checked() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="preconditioner"):
        MINRES(preconditioner=torch.eye(N), compile=True)
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        MINRES(compile="yes")  # type: ignore[arg-type]


# Graphs -----------------------------------------------------------------------------------------


def test_new_parameters_are_solved_with_by_the_same_graph(graphs: list[bool]) -> None:
    before = len(compilation._graphs)
    for seed in range(3):
        operator = shifted_hessian(seed)
        found = hypergrad.solve(operator, right_hand_side(), MINRES(rtol=1e-8, compile=True))
        exact = hypergrad.solve(operator, right_hand_side(), hypergrad.Exact()).value
        torch.testing.assert_close(found.value, exact, rtol=1e-5, atol=1e-5)
    assert graphs == [True] * 3
    assert len(compilation._graphs) <= before + 1


def test_a_derivative_is_one_more_solve_by_the_graph(graphs: list[bool]) -> None:
    a, v = matrix(), gaussian(N).requires_grad_()
    solution = hypergrad.solve(a, v, MINRES(rtol=1e-9, compile=True))
    (gradient,) = torch.autograd.grad(solution.value.sum(), v)
    torch.testing.assert_close(
        gradient, dense_solve(a, torch.ones(N, dtype=F64)), rtol=1e-6, atol=1e-6
    )
    assert graphs == [True] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("generated")
def test_generated_code_computes_the_gradient_once(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = passes_counted(monkeypatch)
    v = right_hand_side(F32)
    for seed in range(2):
        operator = hypergrad.hessian(loss, *point(seed, F32))
        eager, compiled = both(operator, v, rtol=1e-4)
        assert_same(eager, compiled, 1e-4)
    assert graphs == [True] * 2
    # Once for all products: those of the loop, and the one that checks.
    assert counts == [(1, 0)]


@pytest.mark.slow
@pytest.mark.usefixtures("generated")
def test_generated_code_answers_the_same(graphs: list[bool]) -> None:
    for dtype in DTYPES:
        rtol = 1e-4 if dtype == F32 else 1e-8
        for spectrum in CALM:
            a, v = matrix(spectrum, 40, dtype), gaussian(40, seed=2).to(dtype)
            # Float32 products have their own kernels, whose rounding counts over fifty steps.
            near = 3 if dtype == F32 else 1
            assert_same(*both(a, v, rtol=rtol, damping=0.3), 10 * rtol, near)
            if spectrum in INDEFINITE:  # others are solved, or stand still, before
                assert_same(*both(a, v, rtol=0.0, max_iters=4, damping=0.3), 10 * rtol)
    assert all(graphs)
