"""``Neumann(compile=True)``: one graph, and what the eager series answers.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import warnings
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Neumann, Status
from hypergrad.operators import compilation
from hypergrad.solvers.neumann import Acceleration
from tests.solvers.compiled import (
    eager_and_compiled,
    leaves,
    loss,
    model,
    point,
    right_hand_side,
    squares,
)
from tests.strategies import F32, F64, SPECTRA, gaussian, symmetric

pytestmark = pytest.mark.usefixtures("capture_only")

N = 12
ACCELERATIONS = get_args(Acceleration)


def matrix(spectrum: str = "inverse", dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA[spectrum](N), seed=1).matrix.to(dtype)


def both(
    operator: Any, v: Any, damping: float = 0.1, *, batched: bool = False, **options: Any
) -> tuple[hypergrad.Solution, hypergrad.Solution]:
    """The eager solution and the compiled one."""
    x0 = options.pop("x0", None)
    return eager_and_compiled(
        lambda compile: Neumann(**options, compile=compile),
        operator, v, damping=damping, x0=x0, batched=batched,
    )  # fmt: skip


def assert_same(eager: hypergrad.Solution, compiled: hypergrad.Solution) -> None:
    old, new = eager.info, compiled.info
    assert new.status is old.status
    assert [x.status for x in new.columns] == [x.status for x in old.columns]
    assert new.iterations == old.iterations
    assert new.smallest_eigenvalue == old.smallest_eigenvalue
    assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-4, abs=1e-5)
    for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
        assert float((leaf - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(("dtype", "acceleration"), [(F32, "none"), (F64, "chebyshev")])
def test_the_answer_is_that_of_the_eager_series(dtype: torch.dtype, acceleration: Any) -> None:
    v = right_hand_side(dtype)
    operator: hypergrad.LinearOperator = hypergrad.hessian(loss, *point(0, dtype)) + 4.0
    if dtype == F64:
        operator = hypergrad.ggn(model, squares, *point(1, dtype))
    chosen: tuple[dict[str, Any], ...] = ({"step_size": 0.1}, {}, {"num_terms": 1})
    for options in chosen:
        eager, compiled = both(operator, v, acceleration=acceleration, **options)
        assert_same(eager, compiled)
    assert compiled.info.num_hvps == eager.info.num_hvps  # when the graph is proved
    assert [graph.proved for graph in compilation._graphs.values()] == [True]  # for all of them


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(-0.3, 2.0), min_size=N, max_size=N),
    step=st.sampled_from(["auto", 0.2, 0.9, 1.5]),
    terms=st.integers(1, 30),
    acceleration=st.sampled_from(ACCELERATIONS),
    seed=st.integers(0, 100),
)
def test_it_decides_as_the_eager_series_does(
    values: list[float], step: Any, terms: int, acceleration: Any, seed: int
) -> None:
    a = symmetric(torch.tensor(values, dtype=F64), seed=1).matrix
    options: dict[str, Any] = {"step_size": step, "num_terms": terms}
    assert_same(*both(a, gaussian(N, seed=seed), acceleration=acceleration, **options))


def test_what_diverges_is_done_again_eagerly() -> None:
    values = torch.linspace(1.0, 3.0, N, dtype=F64)
    a, v = symmetric(values, seed=1).matrix, gaussian(N)
    eager, compiled = both(a, v, step_size=1.0)
    assert compiled.info.status is Status.STAGNATED
    assert_same(eager, compiled)
    values[0] = -2.0
    eager, compiled = both(symmetric(values, seed=1).matrix, v)
    assert compiled.info.status is Status.NEGATIVE_CURVATURE
    assert_same(eager, compiled)


def test_many_right_hand_sides_zero_and_warm_starts() -> None:
    rows = torch.cat([torch.zeros(1, N, dtype=F64), gaussian(3, N)])
    eager, compiled = both(matrix(), rows, batched=True)
    assert compiled.info.columns[0].status is Status.CONVERGED
    assert_same(eager, compiled)
    exact = torch.linalg.solve(matrix() + 0.1 * torch.eye(N, dtype=F64), rows[1])
    assert_same(*both(matrix(), rows[1], x0=exact + 1e-3 * rows[2], step_size=0.5))
    # A start that the products cannot tell from the solution: neither may make it worse.
    assert_same(*both(matrix(), rows[1], x0=exact, step_size=0.5))


def test_what_cannot_be_one_graph_runs_eagerly_after_a_word() -> None:
    a, v = matrix(), gaussian(N)
    with pytest.warns(hypergrad.CompilationWarning, match="batchable"):
        _, compiled = both(lambda x: a @ x, v)
    assert compiled.info.status is Status.FIXED_ITERATIONS
    draws = iter(range(1000))

    def restless(p: Tensor) -> Tensor:
        return (p**2).sum() * (1.0 + next(draws) / 100)

    operator = hypergrad.hessian(restless, gaussian(N))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        both(operator, v, step_size=0.1)
    assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
    with pytest.raises(hypergrad.SolverOptionError, match="num_samples"):
        Neumann(num_samples=2, compile=True)
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        Neumann(compile="yes")  # type: ignore[arg-type]


def test_what_is_not_finite_or_stale_is_refused() -> None:
    a = matrix(dtype=F32)
    a[2, 3] = torch.nan
    solver = Neumann(step_size=0.1, compile=True)
    with pytest.raises(hypergrad.NonFiniteError):
        hypergrad.solve(a, gaussian(N).to(F32), solver)
    params, x, y = point(0)
    operator = hypergrad.hessian(loss, params, x, y)
    v = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    hypergrad.solve(operator, v, solver, damping=4.0)
    with torch.no_grad():
        params["w"] *= 0.9
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.solve(operator, v, solver, damping=4.0)


@pytest.mark.slow
def test_generated_code_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    v = {name: leaf + 1 for name, leaf in point(7, F32)[0].items()}
    for acceleration in ACCELERATIONS:
        for _ in range(2):
            operator = hypergrad.hessian(loss, *point(0, F32), compile=True)
            assert_same(*both(operator, v, 4.0, step_size=0.1, acceleration=acceleration))
    assert all(graph.proved for graph in compilation._graphs.values())
