"""``GMRES(compile=True)``: cycles as one graph, and what eager GMRES answers.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import GMRES, Status
from hypergrad.operators import compilation
from hypergrad.solvers import compiled_gmres
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
    orthogonal,
    relative_residual,
    seeds,
    symmetric,
)

N = 12
GRAPH = GMRES(compile=True)


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
    """Of each compiled solve, whether the graph answered; else eager GMRES did."""
    return answers_watched(monkeypatch, compiled_gmres)


def general(singular_values: Tensor, *, seed: int = 0) -> Tensor:
    """A matrix of these singular values between unrelated orthogonal bases."""
    n = len(singular_values)
    return (orthogonal(n, seed) * singular_values) @ orthogonal(n, seed + 1).T


def jacobian(n: int = 40, dtype: torch.dtype = F64, size: float = 0.7, seed: int = 1) -> Tensor:
    """Eigenvalues within a disc of this radius around one, but for a few of a random matrix's."""
    return (torch.eye(n, dtype=F64) + size * gaussian(n, n, seed=seed) / n**0.5).to(dtype)


def both(
    operator: Any, v: Any, *, damping: Any = 0.0, batched: bool = False, x0: Any = None,
    **options: Any,
) -> tuple[hypergrad.Solution, hypergrad.Solution]:  # fmt: skip
    """The eager solution and the compiled one."""
    return eager_and_compiled(
        lambda compile: GMRES(**options, compile=compile),
        operator, v, damping=damping, batched=batched, x0=x0,
    )  # fmt: skip


def assert_same(eager: hypergrad.Solution, compiled: hypergrad.Solution, rtol: float) -> None:
    """The reports agree, and the answers as far as iterates near each other do."""
    old, new = eager.info, compiled.info
    assert new.status is old.status
    assert new.damping == old.damping
    assert abs(new.iterations - old.iterations) <= 1
    if new.iterations == old.iterations:
        assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-2, abs=rtol)
    for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
        assert float((leaf - expected).norm()) <= 100 * rtol * float(expected.norm())


def shifted_hessian(seed: int = 0, dtype: torch.dtype = F64) -> hypergrad.LinearOperator:
    return hypergrad.hessian(loss, *point(seed, dtype)) + (-1.0)


# What is answered -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_jacobians_are_answered_as_by_eager_gmres(dtype: torch.dtype, graphs: list[bool]) -> None:
    rtol = 1e-5 if dtype == F32 else 1e-10
    for seed, damping in itertools.product(range(3), [0.0, 0.3]):
        a, v = jacobian(dtype=dtype, seed=seed), gaussian(40, seed=seed + 5).to(dtype)
        eager, compiled = both(a, v, rtol=rtol, damping=damping)
        assert compiled.info.status is Status.CONVERGED
        assert_same(eager, compiled, rtol)
        assert relative_residual(a.double(), damping, compiled.value, v) <= 1.05 * rtol
    assert graphs == [True] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_operators_of_trees(dtype: torch.dtype, graphs: list[bool]) -> None:
    v, rtol = right_hand_side(dtype), 1e-4 if dtype == F32 else 1e-8
    for operator in (shifted_hessian(0, dtype), weighted_sum(dtype) + (-1.5)):
        eager, compiled = both(operator, v, rtol=rtol)
        assert_same(eager, compiled, rtol)
        exact = hypergrad.solve(operator, v, hypergrad.Exact()).value
        for leaf, expected in zip(compiled.value.values(), exact.values(), strict=True):
            torch.testing.assert_close(leaf, expected, rtol=1e3 * rtol, atol=1e3 * rtol)
    assert graphs == [True] * 2


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
    restart=st.sampled_from([3, 50]),
    seed=seeds,
)
def test_the_status_never_lies(
    spectrum: str, of_a: float, of_v: float, dtype: torch.dtype, relative: float, loose: bool,
    restart: int, seed: int,
) -> None:  # fmt: skip
    problem = symmetric(SPECTRA[spectrum](N), seed=seed % 1000, scale=of_a)
    rows = (of_v * gaussian(1, N, seed=seed)).to(dtype)
    rtol = 1e-2 if loose else (1e-4 if dtype == F32 else 1e-8)
    system = System(problem, dtype, relative * problem.norm, rows, rtol)
    a = problem.matrix.to(dtype)

    def solver(rtol: float, compile: bool = True) -> GMRES:
        return GMRES(rtol=rtol, restart=restart, max_iters=300, compile=compile)

    check_the_status_never_lies(system, solver, a)
    try:
        eager = quietly(a, rows[0], solver(rtol, False), damping=system.damping)
    except hypergrad.NonFiniteError:  # the answer is beyond the dtype, in both ways
        return
    compiled = quietly(a, rows[0], solver(rtol), damping=system.damping)
    # A cycle that gains little ends the graph's part: what both do then is the same.
    assert compiled.info.converged or compiled.info.status is eager.info.status


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(0.01, 1.0), min_size=N, max_size=N),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_what_converged_is_near_the_dense_solution(
    values: list[float], dtype: torch.dtype, seed: int
) -> None:
    a = general(torch.tensor(values, dtype=F64), seed=seed).to(dtype)
    v, rtol = gaussian(N, seed=seed + 1).to(dtype), 1e-4 if dtype == F32 else 1e-9
    solution = quietly(a, v, GMRES(rtol=rtol, compile=True))
    assert solution.info.status is Status.CONVERGED
    # Of the product in float32, |A x| is about |v|: its rounding is far below the tolerance.
    assert relative_residual(a.double(), 0.0, solution.value, v) <= 1.05 * rtol
    exact = dense_solve(a.double(), v)
    error = float((solution.value.double() - exact).norm())
    assert error <= 1.1 * rtol * float(v.double().norm()) / min(values)


def test_scales_of_v_and_a_batchable_callable(graphs: list[bool]) -> None:
    a, v = jacobian(dtype=F32), gaussian(40).to(F32)
    operators = a, hypergrad.as_operator(lambda x: a @ x, like=v, batchable=True)
    for operator, of_v in itertools.product(operators, [1e-15, 1.0, 1e15]):
        eager, compiled = both(operator, of_v * v, rtol=1e-4)
        assert compiled.info.converged
        assert_same(eager, compiled, 1e-4)
        outside = relative_residual(a.double(), 0.0, compiled.value, of_v * v)
        assert outside == pytest.approx(compiled.info.relative_residual, rel=3e-2, abs=1e-6)
    assert graphs == [True] * 6


def test_the_residual_is_that_of_the_answer_as_it_is_returned(graphs: list[bool]) -> None:
    # With a damping of 100 it is the rounding of x to float32 that is left of it.
    a, v = jacobian(dtype=F32), gaussian(40, seed=2).to(F32)
    found = hypergrad.solve(a, v, GMRES(rtol=0.0, max_iters=4, compile=True), damping=100.0)
    outside = relative_residual(a.double(), 100.0, found.value, v)
    assert found.info.relative_residual == pytest.approx(outside, rel=0.1)
    assert graphs == [True]


def test_zero_is_answered_by_zero() -> None:
    eager, compiled = both(jacobian(), torch.zeros(40, dtype=F64))
    assert compiled.info.status is Status.CONVERGED
    assert compiled.info.num_hvps == eager.info.num_hvps == 0
    assert torch.equal(compiled.value, torch.zeros(40, dtype=F64))


def test_automatic_damping_is_that_of_eager_gmres(graphs: list[bool]) -> None:
    a, v = matrix("one_negative"), gaussian(N)
    eager, compiled = both(a, v, rtol=1e-8, damping="auto")
    assert graphs == [True]
    assert_same(eager, compiled, 1e-8)
    graph_made = 1  # the proof of a graph is a product
    assert compiled.info.num_hvps in (eager.info.num_hvps, eager.info.num_hvps + graph_made)
    with pytest.raises(hypergrad.NotSymmetricError, match="real eigenvalues"):
        hypergrad.solve(jacobian(), gaussian(40), GRAPH, damping="auto")


# Cycles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restart", [1, 5, 12])
def test_cycles_go_on_from_each_other(restart: int, dtype: torch.dtype, graphs: list[bool]) -> None:
    a, v = jacobian(dtype=dtype), gaussian(40, seed=2).to(dtype)
    rtol = 1e-5 if dtype == F32 else 1e-8
    eager, compiled = both(a, v, rtol=rtol, restart=restart)
    assert graphs == [True]
    assert compiled.info.iterations > restart
    assert_same(eager, compiled, rtol)
    again = hypergrad.solve(a, v, GMRES(rtol=rtol, restart=restart, compile=True)).info
    assert again.num_hvps == eager.info.num_hvps
    assert again.num_hvps >= again.iterations + -(-again.iterations // restart)  # a check a cycle


def test_a_budget_that_ends(graphs: list[bool]) -> None:
    a, v = jacobian(150), gaussian(150, seed=2)
    for max_iters, restart in itertools.product((1, 3, 20, 21), (20, 50)):
        eager, compiled = both(a, v, rtol=1e-9, max_iters=max_iters, restart=restart)
        assert compiled.info.status is eager.info.status is Status.MAX_ITERATIONS
        assert compiled.info.iterations == eager.info.iterations == max_iters
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-9, atol=1e-9)
        old, new = eager.info, compiled.info
        assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-9)
    assert all(graphs)


def test_a_fixed_number_of_iterations_is_done(graphs: list[bool]) -> None:
    a, v = jacobian(150), gaussian(150, seed=2)
    for max_iters, restart in itertools.product((1, 5, 30), (10, 50)):
        eager, compiled = both(a, v, rtol=0.0, max_iters=max_iters, restart=restart)
        for info in (eager.info, compiled.info):
            assert info.status is Status.FIXED_ITERATIONS
            assert info.iterations == max_iters
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-9, atol=1e-9)
        assert compiled.info.residual_norm == pytest.approx(eager.info.residual_norm, rel=1e-9)
    assert all(graphs)


def test_a_cycle_ends_at_the_rounding_of_the_products(graphs: list[bool]) -> None:
    v = gaussian(40).to(F32)
    eager, compiled = both(jacobian(dtype=F32), v, rtol=0.0, max_iters=35)
    again = hypergrad.solve(jacobian(dtype=F32), v, GMRES(rtol=0.0, max_iters=35, compile=True))
    assert graphs == [True] * 2
    assert again.info.num_hvps == eager.info.num_hvps == 35 + 2  # which is two cycles
    assert compiled.info.relative_residual == pytest.approx(eager.info.relative_residual, rel=0.1)


def test_the_basis_stays_orthogonal_on_its_way_to_a_small_residual(graphs: list[bool]) -> None:
    # At condition number 1e10 it would not by one Gram-Schmidt a vector.
    a = general(torch.logspace(0, -10, 60, dtype=F64))
    eager, compiled = both(a, a @ gaussian(60, seed=2), rtol=1e-9, restart=60)
    assert graphs == [True]
    assert compiled.info.iterations == eager.info.iterations < 60
    expected = pytest.approx(eager.info.relative_residual, rel=1e-2)
    assert compiled.info.relative_residual == expected


def test_the_least_residual_over_the_krylov_space(graphs: list[bool]) -> None:
    a, v, count = general(torch.linspace(1.0, 0.1, 40, dtype=F64)), gaussian(40, seed=2), 17
    solution = hypergrad.solve(a, v, GMRES(rtol=0.0, max_iters=count, compile=True))
    q = (v / v.norm())[:, None]
    for _ in range(count - 1):
        q = torch.linalg.qr(torch.cat([q, a @ q[:, -1:]], 1))[0]
    expected = q @ torch.linalg.lstsq(a @ q, v[:, None]).solution[:, 0]
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)
    assert graphs == [True]


def test_a_fixed_number_that_solves_exactly_has_converged() -> None:
    eye = torch.eye(N, dtype=F64)
    eager, compiled = both(eye, eye[0], rtol=0.0, max_iters=3)
    assert compiled.info.status is eager.info.status is Status.CONVERGED
    assert compiled.info.iterations == eager.info.iterations == 1


def test_a_fixed_number_beyond_the_solution_is_done_as_it_is_eagerly(graphs: list[bool]) -> None:
    eager, compiled = both(matrix("outliers"), gaussian(N), rtol=0.0, max_iters=80)
    assert graphs == [False]
    assert compiled.info.status is eager.info.status
    assert compiled.info.iterations == eager.info.iterations
    assert torch.equal(compiled.value, eager.value)


def test_a_warm_start_is_gone_on_from(graphs: list[bool]) -> None:
    a, v = jacobian(), gaussian(40, seed=2)
    exact = dense_solve(a, v)
    cold = hypergrad.solve(a, v, GRAPH).info
    near = hypergrad.solve(a, v, GRAPH, x0=exact + 1e-4 * gaussian(40, seed=3))
    assert graphs == [True] * 2
    assert near.info.converged
    assert near.info.iterations < cold.iterations
    assert near.info.num_hvps == near.info.iterations + 2  # one checks the start
    assert float((near.value - exact).norm()) <= 1e-4 * float(exact.norm())
    at = hypergrad.solve(a, v, GRAPH, x0=exact).info
    assert (at.status, at.iterations) == (Status.CONVERGED, 0)


def test_the_reported_products_are_those_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a graph, and its loop one of Python, each product is seen.
    def loop(going: Any, turn: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        while bool(going(*state)):
            state = turn(*state)
        return state

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled_gmres, "while_loop", loop)
    a, v, made = jacobian(60), gaussian(60), [0]

    def product(x: Tensor) -> Tensor:
        made[0] += 1
        return a @ x

    operator = hypergrad.as_operator(product, like=v, batchable=True)
    start = gaussian(60, seed=1)
    problems: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {}),
        ({"restart": 4}, {"x0": start}),
        ({"rtol": 0.0, "max_iters": 25}, {}),
        ({"rtol": 1e-12, "max_iters": 20}, {}),
        ({"rtol": 1e-30}, {}),  # which eager GMRES does once more
    ]
    for options, rest in problems:
        made[0] = 0
        info = quietly(operator, v, GMRES(**options, compile=True), **rest).info
        assert info.num_hvps == made[0]
    assert made[0] > 120


# What is not ordinary ---------------------------------------------------------------------------


def test_an_invariant_space_ends_with_the_exact_answer(graphs: list[bool]) -> None:
    block = gaussian(3, 3, seed=1) + 3 * torch.eye(3, dtype=F64)
    a = torch.block_diag(block, gaussian(5, 5))  # type: ignore[no-untyped-call]
    v = torch.zeros(8, dtype=F64)
    v[:3] = 1.0
    found = hypergrad.solve(a, v, GMRES(rtol=1e-12, compile=True))
    assert (found.info.status, found.info.iterations) == (Status.CONVERGED, 3)
    assert torch.equal(found.value[3:], torch.zeros(5, dtype=F64))
    assert hypergrad.solve(torch.eye(50), torch.ones(50), GRAPH).info.iterations == 1
    assert graphs == [True] * 2


@pytest.mark.parametrize("restart", [5, 19])
def test_a_restart_too_short_stagnates_as_it_does_eagerly(restart: int, graphs: list[bool]) -> None:
    shift = torch.roll(torch.eye(20, dtype=F64), 1, 0)
    v = torch.zeros(20, dtype=F64)
    v[0] = 1.0
    eager, compiled = both(shift, v, restart=restart)
    assert compiled.info.status is eager.info.status is Status.STAGNATED
    assert compiled.info.iterations == eager.info.iterations
    full = hypergrad.solve(shift, v, GMRES(restart=20, compile=True)).info
    assert (full.status, full.iterations) == (Status.CONVERGED, 20)
    assert graphs == [False, True]


def test_cycles_of_little_gain_stagnate_as_they_do_eagerly(graphs: list[bool]) -> None:
    # For S + d I, S antisymmetric of norm one, a single step divides |r|^2 by 1 + d^2 or so.
    pull = orthogonal(10)
    zero = torch.zeros_like(pull)
    game = torch.cat([torch.cat([zero, pull], 1), torch.cat([-pull.T, zero], 1)])
    eager, compiled = both(game, gaussian(20), damping=0.03, restart=1, max_iters=50)
    assert graphs == [False]
    assert compiled.info.status is eager.info.status is Status.STAGNATED
    assert compiled.info.iterations == eager.info.iterations == 3
    assert torch.equal(compiled.value, eager.value)
    assert both(game, gaussian(20), damping=0.3, restart=1)[1].info.converged  # 4% a step
    assert graphs == [False, True]


SINGULAR: dict[str, Tensor] = {
    "zero": torch.zeros(6, 6, dtype=F64),
    "nilpotent": torch.diag(torch.ones(5, dtype=F64), 1),
    "rank one": torch.outer(gaussian(6, seed=1), gaussian(6, seed=2)),
    "repeated column": gaussian(6, 6)[:, [0, 1, 2, 3, 4, 4]].contiguous(),
    "zero row": torch.cat([gaussian(5, 6), torch.zeros(1, 6, dtype=F64)]),
    "projection": torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)),
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_inconsistent_system_is_the_eager_solver_s(
    name: str, dtype: torch.dtype, graphs: list[bool]
) -> None:
    a = SINGULAR[name]
    left_null = torch.linalg.svd(a)[0][:, -1]
    v = (gaussian(6, seed=3) + 3.0 * left_null).to(dtype)
    eager, compiled = both(a.to(dtype), v)
    assert graphs == [False]
    assert compiled.info.status is eager.info.status is Status.STAGNATED
    assert torch.equal(compiled.value, eager.value)
    assert compiled.info.relative_residual == eager.info.relative_residual
    assert compiled.info.num_hvps > eager.info.num_hvps  # those of the graph are counted


def test_a_cycle_ends_where_the_krylov_space_does(graphs: list[bool]) -> None:
    a, v = SINGULAR["rank one"], gaussian(6, seed=3)
    eager = quietly(a, v, GMRES())
    for _ in range(2):  # the first of a graph is compared with an eager product
        found = quietly(a, v, GRAPH)
    # It does so after two products; a cycle more sees that there is nothing to gain.
    assert graphs == [False] * 2
    assert found.info.num_hvps == eager.info.num_hvps + 2 * (2 + 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_singular_consistent_system_of_index_one(seed: int) -> None:
    core = general(torch.linspace(1.0, 0.2, 8, dtype=F64), seed=seed)
    a = torch.block_diag(core, torch.zeros(4, 4, dtype=F64))  # type: ignore[no-untyped-call]
    basis = gaussian(12, 12, seed=seed)
    a = basis @ a @ torch.linalg.inv(basis)
    v = a @ gaussian(12, seed=seed)
    found = hypergrad.solve(a, v, GMRES(rtol=1e-8, compile=True))
    assert found.info.converged
    assert relative_residual(a, 0.0, found.value, v) <= 1.01e-8


def test_a_pivot_of_noise_is_not_divided_by(graphs: list[bool]) -> None:
    # Of products in float32 the last pivot is rounding, though float64 could divide by it.
    # The step of 1e7 that comes of it lowers the residual, as it happens.
    a = general(torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 1e-8], dtype=F64)).to(F32)
    eager, compiled = both(a, gaussian(6, seed=1).to(F32), max_iters=6)
    assert graphs == [False]
    assert torch.equal(compiled.value, eager.value)
    assert float(compiled.value.norm()) < 10


def test_a_tolerance_below_rounding_ends_as_it_does_eagerly() -> None:
    a, v = jacobian(dtype=F32), gaussian(40).to(F32)
    eager, compiled = both(a, v, rtol=1e-12)
    assert compiled.info.status is eager.info.status is Status.STAGNATED
    assert torch.equal(compiled.value, eager.value)


def test_harm_is_for_the_eager_solver(graphs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled_gmres._Cycle.step
    monkeypatch.setattr(compiled_gmres._Cycle, "step", lambda cycle: -step(cycle))
    for options in ({}, {"rtol": 0.0, "max_iters": 6}, {"max_iters": 6}):
        eager, compiled = both(jacobian(), gaussian(40), **options)
        assert torch.equal(compiled.value, eager.value)
        assert compiled.info.relative_residual == eager.info.relative_residual
    assert graphs == [False] * 3


def test_what_the_operations_beside_the_graph_raise_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(cycle: Any, *_: Any) -> Any:
        raise MemoryError(cycle.done)

    for name, after in (("_rotate", 1), ("step", 11)):
        with monkeypatch.context() as patch:
            patch.setattr(compiled_gmres._Cycle, name, fails)
            with pytest.raises(MemoryError, match=str(after)):
                hypergrad.solve(
                    jacobian(), gaussian(40), GMRES(rtol=0.0, max_iters=11, compile=True)
                )
    assert hypergrad.solve(jacobian(), gaussian(40), GRAPH).info.converged


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    a = jacobian(dtype=F32)
    a[2, 3] = bad
    with pytest.raises(hypergrad.NonFiniteError):
        hypergrad.solve(a, gaussian(40).to(F32), GRAPH)


def test_an_answer_beyond_the_dtype_is_refused() -> None:
    a = 1e-30 * jacobian(dtype=F32)
    with pytest.raises(hypergrad.NonFiniteError, match="overflows"):
        hypergrad.solve(a, 1e12 * gaussian(40).to(F32), GRAPH)


@pytest.mark.parametrize(("of_a", "of_v"), [(1e22, 1e-19), (1e26, 1e-19), (1e36, 1e-10)])
def test_an_answer_that_underflows_is_the_eager_solver_s(of_a: float, of_v: float) -> None:
    a = torch.diag(of_a * torch.linspace(-3.0, 2.0, N))
    eager, compiled = both(a, of_v * gaussian(N).to(F32), rtol=1e-5)
    assert compiled.info.status is eager.info.status is not Status.CONVERGED
    assert compiled.info.relative_residual == eager.info.relative_residual


@pytest.mark.parametrize("of_a", [1e-200, 1e-158, 1e160, 1e300])
def test_squares_beyond_the_dtype_are_the_eager_solver_s(of_a: float) -> None:
    eager, compiled = both(of_a * jacobian(), gaussian(40), rtol=1e-2)
    assert compiled.info.converged
    assert torch.equal(compiled.value, eager.value)


def test_params_that_were_modified_in_place_are_refused() -> None:
    params, x, y = point(0)
    operator = hypergrad.hessian(loss, params, x, y) + (-1.0)
    hypergrad.solve(operator, right_hand_side(), GRAPH)
    with torch.no_grad():
        params["w"] *= 0.9
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.solve(operator, right_hand_side(), GRAPH)


def test_what_cannot_be_one_graph_runs_eagerly_after_a_word(graphs: list[bool]) -> None:
    a, v = jacobian(), gaussian(40)
    with pytest.warns(hypergrad.CompilationWarning, match=r"GMRES.*batchable"):
        found = hypergrad.solve(lambda x: a @ x, v, GRAPH)
    assert found.info.converged
    draws = iter(range(1000))

    def restless(p: Tensor) -> Tensor:
        return (p**2).sum() * (1.0 + next(draws))

    operator = hypergrad.hessian(restless, gaussian(N))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hypergrad.solve(operator, gaussian(N), GRAPH, on_failure="ignore")
    assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
    assert graphs == [False] * 2


def test_a_graph_that_is_another_function_is_not_believed(graphs: list[bool]) -> None:
    a, v = jacobian(), gaussian(40)

    def product(x: Tensor) -> Tensor:
        return 2.0 * a @ x if torch.compiler.is_compiling() else a @ x

    operator = hypergrad.as_operator(product, like=v, batchable=True)
    with pytest.warns(hypergrad.CompilationWarning, match=r"GMRES.*changes what it reads"):
        found = hypergrad.solve(operator, v, GRAPH)
    assert graphs == [False]
    assert relative_residual(a, 0.0, found.value, v) <= GRAPH.rtol


def test_many_right_hand_sides_are_a_block_of_eager_gmres(graphs: list[bool]) -> None:
    eager, compiled = both(jacobian(), gaussian(3, 40), batched=True)
    assert torch.equal(compiled.value, eager.value)
    assert graphs == [False]


def test_leaves_of_two_dtypes_are_eager_gmres_s(graphs: list[bool]) -> None:
    v = {"narrow": gaussian(5).to(F32), "wide": gaussian(7)}
    operator = hypergrad.as_operator(
        lambda t: {k: 2.0 * x for k, x in t.items()}, v, batchable=True
    )
    eager, compiled = both(operator, v)
    assert compiled.info.converged
    assert all(torch.equal(x, y) for x, y in zip(leaves(compiled), leaves(eager), strict=True))
    assert graphs == [False]


def test_options_are_checked() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="preconditioner"):
        GMRES(preconditioner=torch.eye(N), compile=True)
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        GMRES(compile="yes")  # type: ignore[arg-type]


# Graphs -----------------------------------------------------------------------------------------


def test_one_graph_serves_every_matrix_right_hand_side_and_option(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    backend = compilation.Graph._backend

    def counting(graph: compilation.Graph, *args: Any) -> Any:
        compiled.append(graph)
        return backend(graph, *args)

    monkeypatch.setattr(compilation.Graph, "_backend", counting)
    for seed, damping, options in (
        (0, 0.0, {}),
        (1, 0.5, {"rtol": 1e-9}),
        (2, 0.0, {"restart": 3}),
        (3, 0.1, {"max_iters": 5}),
        (4, 0.0, {"rtol": 0.0, "max_iters": 7}),
        (5, 0.0, {"atol": 1e-3, "max_iters": 70, "restart": 60}),
    ):
        a, v = jacobian(61, seed=seed), gaussian(61, seed=seed + 1)
        assert_same(*both(a, v, damping=damping, **options), 1e-9)
    assert graphs == [True] * 6
    assert len(compiled) == 1


def test_new_parameters_are_solved_with_by_the_same_graph(graphs: list[bool]) -> None:
    before = len(compilation._graphs)
    for seed in range(3):
        operator = shifted_hessian(seed)
        found = hypergrad.solve(operator, right_hand_side(), GMRES(rtol=1e-8, compile=True))
        exact = hypergrad.solve(operator, right_hand_side(), hypergrad.Exact()).value
        torch.testing.assert_close(found.value, exact, rtol=1e-5, atol=1e-5)
    assert graphs == [True] * 3
    assert len(compilation._graphs) <= before + 1


def test_a_derivative_is_one_more_solve_by_the_graph_of_the_transpose(graphs: list[bool]) -> None:
    a, v = jacobian().requires_grad_(), gaussian(40).requires_grad_()
    solution = hypergrad.solve(a, v, GMRES(rtol=1e-10, compile=True))
    gradients = torch.autograd.grad(solution.value.sum(), (a, v))
    fixed = a.detach()
    adjoint = dense_solve(fixed.T.contiguous(), torch.ones(40, dtype=F64))
    x = dense_solve(fixed, v.detach())
    torch.testing.assert_close(gradients[1], adjoint, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gradients[0], -torch.outer(adjoint, x), rtol=1e-7, atol=1e-7)
    assert graphs == [True] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("generated")
def test_generated_code_computes_the_gradient_once(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = passes_counted(monkeypatch)
    v = right_hand_side(F32)
    for seed in range(2):
        operator = hypergrad.hessian(loss, *point(seed, F32)) + (-1.0)
        assert_same(*both(operator, v, rtol=1e-4), 1e-4)
    assert graphs == [True] * 2
    # Once for all products: those of the loop, and the one that checks.
    assert counts == [(1, 0)]


@pytest.mark.slow
@pytest.mark.usefixtures("generated")
def test_generated_code_answers_the_same(graphs: list[bool]) -> None:
    for dtype in DTYPES:
        rtol = 1e-5 if dtype == F32 else 1e-10
        for seed in range(3):
            a, v = jacobian(dtype=dtype, seed=seed), gaussian(40, seed=2).to(dtype)
            assert_same(*both(a, v, rtol=rtol, damping=0.3), rtol)
            assert_same(*both(a, v, rtol=rtol, restart=6), rtol)
            assert_same(*both(a, v, rtol=0.0, max_iters=9, restart=5), rtol)
    assert all(graphs)
