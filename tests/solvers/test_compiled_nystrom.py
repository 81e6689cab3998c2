"""``Nystrom(compile=True)``: one graph, and what the eager solver answers and decides.

But where said otherwise the backend runs the captured graph without generating code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Status
from hypergrad.operators import compilation
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
from tests.strategies import F32, F64, SPECTRA, gaussian, generator, symmetric

pytestmark = pytest.mark.usefixtures("capture_only")

N, RANK = 60, 6


def matrix(spectrum: str = "exponential", dtype: torch.dtype = F32) -> Tensor:
    return symmetric(SPECTRA[spectrum](N), seed=1).matrix.to(dtype)


OPERATORS: dict[str, Callable[[torch.dtype], Any]] = {
    "hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype)),
    "compiled hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype), compile=True),
    "reverse": lambda dtype: hypergrad.hessian(loss, *point(0, dtype), mode="reverse_over_reverse"),
    "ggn": lambda dtype: hypergrad.ggn(model, squares, *point(0, dtype)),
    "sum": weighted_sum,
}


def both(
    operator: Any, v: Any, damping: Any = "auto", *, rank: int = RANK, seed: int = 3, **options: Any
) -> tuple[hypergrad.Solution, hypergrad.Solution]:
    """The eager solution and the compiled one."""
    batched = options.pop("batched", False)
    return eager_and_compiled(
        lambda compile: hypergrad.Nystrom(
            rank, generator=generator(seed), compile=compile, **options
        ),
        operator, v, damping=damping, batched=batched,
    )  # fmt: skip


def assert_same(eager: hypergrad.Solution, compiled: hypergrad.Solution) -> None:
    """The same answer to the rounding of float32, and the same report but for the products."""
    old, new = eager.info, compiled.info
    assert new.status is old.status
    assert new.rank == old.rank
    assert new.damping == pytest.approx(old.damping, rel=1e-4)
    assert new.smallest_eigenvalue == pytest.approx(old.smallest_eigenvalue, rel=1e-3, abs=1e-6)
    assert new.relative_residual == pytest.approx(old.relative_residual, rel=1e-2, abs=1e-4)
    for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
        size = float(expected.norm())
        assert float((leaf - expected).norm()) <= 1e-3 * size


def graphs() -> list[compilation.Graph]:
    return [g for g in compilation._graphs.values() if g.what.startswith("Nystr")]


@pytest.mark.parametrize(("name", "dtype"), [*((name, F32) for name in OPERATORS), ("ggn", F64)])
def test_the_answer_is_that_of_the_eager_solver(name: str, dtype: torch.dtype) -> None:
    for damping in ("auto", 0.5):
        assert_same(*both(OPERATORS[name](dtype), right_hand_side(dtype), damping))
    if dtype == F64:  # of which the products are looked at in another way
        assert not graphs()
    else:
        assert [graph.proved for graph in graphs()] == [True]


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(-0.2, 1.0), min_size=N, max_size=N),
    decay=st.floats(0.0, 3.0),
    negative=st.integers(0, 3),
    damping=st.sampled_from(["auto", 1e-2, 0.3, 3.0]),
    seed=st.integers(0, 100),
)
def test_it_decides_as_the_eager_solver_does(
    values: list[float], decay: float, negative: int, damping: Any, seed: int
) -> None:
    size = torch.tensor(values, dtype=F64).abs() * torch.arange(1.0, N + 1, dtype=F64) ** -decay
    size[:negative] *= -1.0
    a = symmetric(size, seed=1).matrix.to(F32)
    eager, compiled = both(a, gaussian(N, seed=seed).to(F32), damping, seed=seed)
    assert compiled.info.status is eager.info.status
    assert_same(eager, compiled)


def test_a_product_is_spent_on_the_answer_and_none_on_the_graph() -> None:
    a, v = matrix(), gaussian(N).to(F32)
    eager, first = both(a, v)
    assert all(graph.proved for graph in graphs())
    assert first.info.num_hvps == eager.info.num_hvps + 2  # once: its products against eager ones
    _, compiled = both(a, v)
    assert compiled.info.num_hvps == eager.info.num_hvps == RANK + 1


@pytest.mark.parametrize("policy", ["keep", "absolute", "clip"])
def test_negative_curvature_goes_on_eagerly(policy: str) -> None:
    values = SPECTRA["exponential"](N)
    values[0] = -2.0
    a, v = symmetric(values, seed=1).matrix.to(F32), gaussian(N).to(F32)
    for damping in ("auto", 0.3):
        eager, compiled = both(a, v, damping, negative_curvature=policy)
        assert compiled.info.smallest_eigenvalue == pytest.approx(-2.0, rel=0.1)
        assert_same(eager, compiled)
    solver = hypergrad.Nystrom(RANK, negative_curvature="raise", compile=True)
    with pytest.raises(hypergrad.NegativeCurvatureError):
        hypergrad.solve(a, v, solver)


def test_a_doubted_answer_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypergrad.solvers import nystrom

    a, v = matrix("inverse"), gaussian(N).to(F32)
    _, usual = both(a, v, 0.5)
    monkeypatch.setattr("hypergrad.solvers.compiled_nystrom.NO_DOUBT", 0.0)
    monkeypatch.setattr(nystrom, "NO_DOUBT", 0.0)
    eager, doubted = both(a, v, 0.5)
    assert_same(eager, doubted)
    assert doubted.info.num_hvps == eager.info.num_hvps  # one with the largest eigenvector
    assert doubted.info.num_hvps > usual.info.num_hvps - 2


@pytest.mark.parametrize("check", [False, "estimate"])
def test_checks_are_left_out_where_asked(check: Any) -> None:
    a, v = matrix(), gaussian(N).to(F32)
    for _ in range(2):
        eager, compiled = both(a, v, 0.5, check=check)
        for leaf, expected in zip(leaves(compiled), leaves(eager), strict=True):
            torch.testing.assert_close(leaf, expected, rtol=1e-4, atol=1e-5)
    assert compiled.info.num_hvps == eager.info.num_hvps == RANK
    assert compiled.info.residual_norm == pytest.approx(
        eager.info.residual_norm, rel=1e-3, nan_ok=True
    )


@pytest.mark.parametrize("count", [1, 3])
def test_many_right_hand_sides_share_a_graph(count: int) -> None:
    rows = gaussian(count, N).to(F32)
    for _ in range(2):
        eager, compiled = both(matrix(), rows, 0.5, batched=True)
        assert_same(eager, compiled)
    assert compiled.info.num_hvps == eager.info.num_hvps
    assert len(graphs()) == 1
    zero = torch.cat([torch.zeros(1, N), rows])
    _, compiled = both(matrix(), zero, 0.5, batched=True)
    assert compiled.info.columns[0].status is Status.CONVERGED
    assert not compiled.value[0].any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_answer_scales_with_v(size: float) -> None:
    a, v = matrix(), gaussian(N).to(F32)
    scaled = 2.0 ** round(torch.tensor(size).log2().item())
    _, usual = both(a, v, 0.5)
    _, compiled = both(a, scaled * v, 0.5)
    assert torch.equal(compiled.value, scaled * usual.value)


def test_a_small_damping_makes_a_large_answer() -> None:
    values = torch.zeros(N, dtype=F64)
    values[:3] = torch.tensor([1.0, 0.5, 0.25])
    a, v = symmetric(values, seed=1).matrix.to(F32), gaussian(N).to(F32)
    assert_same(*both(a, v, 1e-9))
    with pytest.raises(hypergrad.NonFiniteError, match="overflows"):
        both(a, 1e35 * v, 1e-9)


def test_an_answer_that_overflows_does_not_speak_against_the_graph() -> None:
    values = torch.zeros(N, dtype=F64)
    values[:3] = torch.tensor([1.0, 0.5, 0.25])
    a, v = symmetric(values, seed=1).matrix.to(F32), gaussian(N).to(F32)
    solver = hypergrad.Nystrom(RANK, generator=generator(3), compile=True)
    with pytest.raises(hypergrad.NonFiniteError, match="overflows"):
        hypergrad.solve(a, 1e35 * v, solver, damping=1e-9)
    assert [(graph.compiled is None, graph.proved) for graph in graphs()] == [(False, False)]
    assert_same(*both(a, v, 0.5))


def test_the_zero_operator_and_v_zero() -> None:
    v = gaussian(N).to(F32)
    assert_same(*both(torch.zeros(N, N), v))
    _, compiled = both(matrix(), 0 * v)
    assert compiled.info.status is Status.CONVERGED
    assert not compiled.value.any()


def test_what_is_not_finite_or_not_symmetric_is_refused() -> None:
    a, v = matrix(), gaussian(N).to(F32)
    for _ in range(2):  # before the graph is proved, and after
        broken = a.clone()
        broken[2, 3] = torch.nan
        with pytest.raises(hypergrad.NonFiniteError):
            both(broken, v)[1]
        solver = hypergrad.Nystrom(RANK, compile=True)
        with pytest.raises(hypergrad.NonFiniteError):
            hypergrad.solve(broken, v, solver)
        with pytest.raises(hypergrad.NotSymmetricError):
            hypergrad.solve(a + 5 * torch.triu(gaussian(N, N).to(F32), 1), v, solver)
        both(a, v)
    assert [graph.proved for graph in graphs()] == [True]


def test_params_that_were_modified_in_place_are_refused() -> None:
    params, x, y = point(0, F32)
    solver = hypergrad.Nystrom(RANK, compile=True)
    operator = hypergrad.hessian(loss, params, x, y)
    hypergrad.solve(operator, right_hand_side(F32), solver, on_failure="ignore")
    with torch.no_grad():
        params["w"] *= 0.9
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.solve(operator, right_hand_side(F32), solver)


def test_new_parameters_are_solved_with_by_the_same_graph() -> None:
    for seed in range(2):
        operator = hypergrad.hessian(loss, *point(seed, F32))
        assert_same(*both(operator, right_hand_side(F32), 1.0))
    assert len(graphs()) == 1


def test_an_operator_with_compiled_products_has_the_named_call_compiled() -> None:
    v = right_hand_side(F32)
    for compile in (False, True):
        operator = hypergrad.hessian(loss, *point(0, F32), compile=compile)
        x = hypergrad.nystrom_ihvp(operator, v, rank=RANK, damping=1.0, generator=generator(3))
        assert len(graphs()) == compile
        told = both(operator, v, 1.0)[0].value
        torch.testing.assert_close(x, told, rtol=1e-4, atol=1e-4)
        compilation.forget_compiled()


def test_a_derivative_goes_through_the_same_sketch() -> None:
    a = matrix()
    gradients: list[Tensor] = []
    for compile in (False, True):
        v = gaussian(N).to(F32).requires_grad_()
        solver = hypergrad.Nystrom(RANK, generator=generator(3), compile=compile)
        solution = hypergrad.solve(a, v, solver, damping=0.5)
        gradients += torch.autograd.grad(solution.value.square().sum(), v)
        assert solution.backward[0].num_hvps == 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_what_has_no_graph_runs_eagerly() -> None:
    a, v = matrix(), gaussian(N).to(F32)
    usual: dict[str, Any] = {"rank": RANK, "generator": generator(3), "compile": True}
    others: tuple[dict[str, Any], ...] = (
        {"sketch": "columns"},
        {"rank": "auto", "max_rank": 12},
        {"rank": N // 2},
        {"test_matrix": gaussian(RANK, N).to(F32), "complement": "zero", "generator": None},
    )
    for options in others:
        solver = hypergrad.Nystrom(**{**usual, **options})
        hypergrad.solve(a, v, solver, damping=0.5, on_failure="ignore")
        assert not graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypergrad.solvers.compiled_nystrom._LARGEST", RANK * N - 1)
        hypergrad.solve(a, v, hypergrad.Nystrom(**usual), damping=0.5)
    assert not graphs()
    x0 = torch.ones(N)
    solver = hypergrad.Nystrom(RANK, generator=generator(3), compile=True)
    hypergrad.solve(a, v, solver, damping=0.5, x0=x0)
    assert not graphs()
    with pytest.warns(hypergrad.CompilationWarning, match="batchable"):
        found = hypergrad.solve(lambda x: a @ x, v, solver, damping=0.5)
    assert found.info.relative_residual < 1
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        hypergrad.Nystrom(RANK, compile="yes")  # type: ignore[arg-type]


def test_a_graph_that_cannot_be_had_draws_no_second_test_matrix() -> None:
    calls = iter(range(1000))
    scales = 1.0 / torch.arange(1.0, N + 1)

    def restless(p: Tensor) -> Tensor:
        return (scales * p**2).sum() * (1.0 + 1e-3 * next(calls))

    def branching(p: Tensor) -> Tensor:
        return (scales * p**2).sum() if bool(p[0] > 0) else (p**4).sum()

    v = gaussian(N).to(F32)
    for function in (restless, branching):
        operator = hypergrad.hessian(function, torch.ones(N))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            eager, compiled = both(operator, v, 0.5)
        assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error", hypergrad.CompilationWarning)
            both(operator, v, 0.5)


def test_generated_code_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    a, v = matrix(), gaussian(N).to(F32)
    for _ in range(2):
        assert_same(*both(a, v))
    assert [graph.proved for graph in graphs()] == [True]
    # What is wrong does not pass through it, but around.
    skewed = a + 5 * torch.triu(gaussian(N, N).to(F32), 1)
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(skewed, v, hypergrad.Nystrom(RANK, compile=True))
    assert len(graphs()) == 1


@pytest.mark.slow
def test_generated_code_for_a_hessian_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    operator, v = hypergrad.hessian(loss, *point(0, F32), compile=True), right_hand_side(F32)
    for _ in range(2):
        assert_same(*both(operator, v))
    assert [graph.proved for graph in graphs()] == [True]
