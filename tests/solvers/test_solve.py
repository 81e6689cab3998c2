"""What holds for every solver: the contract of solve()."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Status
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SCALES,
    SINGULAR,
    SOLVERS,
    SPECTRA,
    Problem,
    Spectrum,
    dense_solve,
    flat,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    right_hand_scales,
    seeds,
    symmetric,
    tree_hvp,
    trees,
)

every_solver = pytest.mark.parametrize("name", SOLVERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_scale = pytest.mark.parametrize("scale", SCALES)


def counting(hvp: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], list[int]]:
    calls = [0]

    def counted(v: Any) -> Any:
        calls[0] += 1
        return hvp(v)

    return counted, calls


def quietly(*args: Any, **kwargs: Any) -> hypergrad.Solution:
    return hypergrad.solve(*args, on_failure="ignore", **kwargs)


# Right answers ----------------------------------------------------------------------------------


@every_solver
@every_dtype
@every_scale
@pytest.mark.parametrize("spectrum", [*POSITIVE, "half_rank", "rank_one"])
def test_agrees_with_the_dense_solve(
    name: str, dtype: torch.dtype, scale: float, spectrum: str
) -> None:
    problem = symmetric(SPECTRA[spectrum](12), seed=3, scale=scale)
    v, damping = gaussian(12, seed=4).to(dtype), 0.25 * scale
    x = hypergrad.solve(problem.hvp(dtype), v, _accurate(name, dtype), damping=damping).value
    assert x.dtype == dtype
    expected = dense_solve(problem.matrix, v, damping)
    # Condition number 5: an rtol of 1e-9 (1e-6 in float32) costs at most 5 times itself; 100
    # Neumann terms leave (1 - 1/5)^100 = 2e-10; rounding costs condition * eps * sqrt(n) and more.
    assert relative_error(x, expected) <= (1e-7 if dtype == F64 else 1e-4)


def _accurate(name: str, dtype: torch.dtype, n: int = 12) -> hypergrad.Solver:
    return hypergrad.CG(rtol=1e-6) if name == "cg" and dtype == F32 else SOLVERS[name](n)


@quick_and_thorough
@every_solver
@given(problem=problems(POSITIVE | SINGULAR), seed=seeds, tree_seed=st.booleans())
def test_drawn_systems_agree_with_the_dense_solve(
    effort: str, name: str, problem: Problem, seed: int, tree_seed: bool
) -> None:
    damping = 0.25 * (problem.norm or 1.0)
    v = gaussian(problem.n, seed=seed)
    x = hypergrad.solve(problem.hvp(), v, SOLVERS[name](problem.n), damping=damping).value
    assert relative_error(x, dense_solve(problem.matrix, v, damping)) <= 1e-7


@quick_and_thorough
@every_solver
@given(tree=trees(), seed=seeds)
def test_trees_are_solved_as_their_flat_vectors(
    effort: str, name: str, tree: Any, seed: int
) -> None:
    n = len(flat(tree))
    problem = symmetric(torch.linspace(1.0, 0.2, n, dtype=F64), seed=seed)
    solution = hypergrad.solve(tree_hvp(problem.matrix, tree), tree, SOLVERS[name](n), damping=0.25)
    assert type(solution.value) is type(tree)
    expected = dense_solve(problem.matrix, flat(tree), 0.25)
    assert relative_error(flat(solution.value), expected) <= 1e-7


# Scales -----------------------------------------------------------------------------------------


@quick_and_thorough
@every_solver
@given(problem=problems(SPECTRA | {"zero": SINGULAR["zero"]}, max_dim=8), size=right_hand_scales)
def test_answers_do_not_depend_on_the_scale_of_v(
    effort: str, name: str, problem: Problem, size: float
) -> None:
    v, damping = gaussian(problem.n, seed=1), 2.0 * (problem.norm or 1.0)
    solver = SOLVERS[name](problem.n)
    plain = quietly(problem.hvp(), v, solver, damping=damping)
    # A fresh one: its generator has moved on.
    scaled = quietly(problem.hvp(), size * v, SOLVERS[name](problem.n), damping=damping)
    assert scaled.info.status.failed == plain.info.status.failed
    assert scaled.info.num_hvps == plain.info.num_hvps
    # Condition number at most 3; CG may stop at different points below 1e-9.
    assert relative_error(scaled.value / size, plain.value) <= 1e-8


@every_solver
@pytest.mark.parametrize(("dtype", "size"), [(F64, 1e-30), (F64, 1e30), (F32, 1e-20), (F32, 1e15)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_extreme_right_hand_sides(
    name: str, dtype: torch.dtype, size: float, spectrum: str
) -> None:
    problem = symmetric(SPECTRA[spectrum](8), seed=5)
    v = gaussian(8, seed=6).to(dtype)
    answers = [
        quietly(problem.hvp(dtype), right, SOLVERS[name](8), damping=1.5).value / factor
        for right, factor in ((v, 1.0), (v * size, size))
    ]
    assert relative_error(answers[1], answers[0]) <= (1e-8 if dtype == F64 else 1e-6)


@every_solver
@every_dtype
@pytest.mark.parametrize("exponent", [-40, -7, 1, 33])
def test_powers_of_two_change_no_bit(name: str, dtype: torch.dtype, exponent: int) -> None:
    problem = symmetric(SPECTRA["inverse"](9), seed=7)
    v = gaussian(9, seed=8).to(dtype)
    plain = quietly(problem.hvp(dtype), v, SOLVERS[name](9), damping=0.01)
    scaled = quietly(problem.hvp(dtype), v * 2.0**exponent, SOLVERS[name](9), damping=0.01)
    assert torch.equal(scaled.value, plain.value * 2.0**exponent)
    assert scaled.info.residual_norm == plain.info.residual_norm * 2.0**exponent
    assert scaled.info.relative_residual == plain.info.relative_residual


@every_solver
@every_dtype
def test_zero_gives_zero(name: str, dtype: torch.dtype) -> None:
    for spectrum in ("inverse", "zero", "alternating"):
        problem = symmetric(SPECTRA[spectrum](5), seed=1)
        zero = torch.zeros(5, dtype=dtype)
        solution = hypergrad.solve(problem.hvp(dtype), zero, SOLVERS[name](5), damping=2.0)
        assert torch.equal(solution.value, zero)
        assert solution.info.status is Status.CONVERGED
        assert solution.info.relative_residual == 0.0


# Honest reports ---------------------------------------------------------------------------------


@quick_and_thorough
@every_solver
@every_dtype
@pytest.mark.parametrize("family", [POSITIVE, SINGULAR, INDEFINITE], ids=["pos", "sing", "indef"])
@given(data=st.data())
def test_the_report_tells_the_truth(
    effort: str, name: str, dtype: torch.dtype, family: dict[str, Spectrum], data: st.DataObject
) -> None:
    problem = data.draw(problems(family))
    relative = data.draw(st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
    if name == "nystrom" and relative == 0.0:
        relative = 1e-4
    damping = relative * (problem.norm or 1.0)
    v = gaussian(problem.n, seed=data.draw(seeds)).to(dtype)
    stored = problem.matrix.to(dtype).to(F64)
    solver = SOLVERS[name](problem.n)
    try:
        x, info = _value_and_info(quietly(problem.hvp(dtype), v, solver, damping=damping))
    except hypergrad.NonFiniteError:
        # Only an answer beyond the dtype may end so: a singular system in float32.
        assert dtype == F32
        assert relative <= 1e-6
        return
    outside = relative_residual(stored, damping, x, v)
    # What the reporter and the check cannot agree on: the rounding of one product.
    size = float(torch.linalg.vector_norm(x.to(F64))) / float(torch.linalg.vector_norm(v.to(F64)))
    rounding = 8 * problem.n * torch.finfo(dtype).eps * problem.norm * size + 1e-13
    assert abs(outside - info.relative_residual) <= rounding + 1e-6 * outside
    rtol = getattr(solver, "rtol", 0.0)
    if info.status is Status.CONVERGED:
        assert outside <= 2 * rtol + rounding
    assert info.converged == (info.status is Status.CONVERGED)
    assert info.damping == damping
    assert info.solver == solver


def _value_and_info(solution: hypergrad.Solution) -> tuple[Tensor, hypergrad.SolveInfo]:
    return solution.value, solution.info


@every_solver
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [0.3, "auto"])
@pytest.mark.parametrize("batched", [False, True])
def test_every_product_is_counted(name: str, spectrum: str, damping: Any, batched: bool) -> None:
    problem = symmetric(SPECTRA[spectrum](10), seed=2)
    hvp, calls = counting(problem.hvp())
    v = gaussian(3, 10) if batched else gaussian(10)
    info = quietly(hvp, v, SOLVERS[name](10), damping=damping, batched=batched).info
    assert info.num_hvps == calls[0] > 0


@every_solver
def test_every_product_is_counted_with_a_warm_start(name: str) -> None:
    hvp, calls = counting(symmetric(SPECTRA["inverse"](10), seed=2).hvp())
    info = quietly(hvp, gaussian(10), SOLVERS[name](10), damping=0.1, x0=gaussian(10, seed=1)).info
    assert info.num_hvps == calls[0]


def test_costs_are_those_documented() -> None:
    problem = symmetric(SPECTRA["inverse"](30), seed=2)
    v = gaussian(30)
    costs = {
        "exact": (hypergrad.Exact(), 31),
        "neumann": (hypergrad.Neumann(num_terms=7, step_size=0.5), 7),
        "neumann auto": (hypergrad.Neumann(num_terms=7), 17),
        "nystrom": (hypergrad.Nystrom(rank=6), 8),
        "cg fixed": (hypergrad.CG(rtol=0, max_iters=9), 10),
    }
    got = {
        name: quietly(problem.hvp(), v, solver, damping=0.5).info.num_hvps
        for name, (solver, _) in costs.items()
    }
    assert got == {name: cost for name, (_, cost) in costs.items()}


# Batches and warm starts ------------------------------------------------------------------------


@every_solver
@every_dtype
def test_a_batch_is_its_separate_solves(name: str, dtype: torch.dtype) -> None:
    problem = symmetric(SPECTRA["exponential"](12), seed=3)
    rows = gaussian(5, 12, seed=4).to(dtype)
    rows[2] = 0.0
    rows[3] *= 1e-12
    rows[4] = problem.basis[:, 0].to(dtype)  # CG is done with it after one step
    batch = quietly(problem.hvp(dtype), rows, SOLVERS[name](12), damping=1e-3, batched=True)
    assert len(batch.info.columns) == 5
    assert torch.equal(batch.value[2], torch.zeros(12, dtype=dtype))
    for row, column in zip(range(5), batch.info.columns, strict=True):
        one = quietly(problem.hvp(dtype), rows[row], SOLVERS[name](12), damping=1e-3)
        # Block products round differently from single ones: eps times the condition number 1e3.
        scale = 1e3 * torch.finfo(dtype).eps
        assert relative_error(batch.value[row], one.value) <= 50 * scale + 2e-6
        assert column.status is one.info.status
    assert batch.info.converged == all(column.converged for column in batch.info.columns)
    worst = max(column.relative_residual for column in batch.info.columns)
    assert batch.info.relative_residual == worst


@every_solver
def test_surplus_right_hand_sides_are_all_solved(name: str) -> None:
    problem = symmetric(SPECTRA["inverse"](4), seed=3)
    rows = gaussian(11, 4, seed=4)
    batch = hypergrad.solve(problem.hvp(), rows, SOLVERS[name](4), damping=0.25, batched=True)
    expected = torch.linalg.solve(problem.matrix + 0.25 * torch.eye(4, dtype=F64), rows.T).T
    torch.testing.assert_close(batch.value, expected, rtol=1e-6, atol=1e-7)


@every_solver
def test_batches_of_trees(name: str) -> None:
    like = {"w": torch.zeros(2, 2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    problem = symmetric(SPECTRA["inverse"](5), seed=3)
    v = {"w": gaussian(3, 2, 2, seed=1), "b": gaussian(3, seed=2)}
    batch = hypergrad.solve(
        tree_hvp(problem.matrix, like), v, SOLVERS[name](5), damping=0.25, batched=True
    )
    assert batch.value["w"].shape == (3, 2, 2)
    assert batch.value["b"].shape == (3,)
    for row in range(3):
        right = torch.cat([v["w"][row].reshape(-1), v["b"][row].reshape(1)])
        got = torch.cat([batch.value["w"][row].reshape(-1), batch.value["b"][row].reshape(1)])
        assert relative_error(got, dense_solve(problem.matrix, right, 0.25)) <= 1e-7


@every_solver
def test_a_warm_start_does_not_change_the_answer(name: str) -> None:
    problem = symmetric(SPECTRA["inverse"](10), seed=3)
    v, x0 = gaussian(10, seed=4), 10 * gaussian(10, seed=5)
    before = x0.clone()
    x = hypergrad.solve(problem.hvp(), v, SOLVERS[name](10), damping=0.25, x0=x0).value
    assert relative_error(x, dense_solve(problem.matrix, v, 0.25)) <= 1e-6
    assert torch.equal(x0, before)


# Operators of other dtypes and sizes ------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operators(name: str, dtype: torch.dtype) -> None:
    problem = symmetric(torch.linspace(1.0, 0.5, 6, dtype=F64), seed=1)
    v = gaussian(6, seed=2).to(dtype)
    solution = quietly(problem.hvp(dtype), v, SOLVERS[name](6), damping=0.5)
    assert solution.value.dtype == dtype
    # Condition number 1.5; the products and the answer round at eps.
    expected = dense_solve(problem.matrix, v, 0.5)
    assert relative_error(solution.value, expected) <= 6 * torch.finfo(dtype).eps


@every_solver
@every_dtype
@every_scale
def test_dimension_one(name: str, dtype: torch.dtype, scale: float) -> None:
    diagonal = torch.tensor([2.0 * scale], dtype=dtype)
    x = hypergrad.solve(
        lambda u: diagonal * u,
        torch.tensor([3.0], dtype=dtype),
        _accurate(name, dtype, 1),
        damping=scale,
    ).value
    assert float(x) * scale == pytest.approx(1.0, rel=1e-9 if dtype == F64 else 1e-6)


@every_solver
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_a_multiple_of_the_identity_is_inverted_exactly(name: str, factor: float) -> None:
    v = gaussian(7, seed=1)
    damping = 1e-6 * factor
    x = hypergrad.solve(lambda u: factor * u, v, SOLVERS[name](7), damping=damping).value
    assert relative_error(x, v / (factor + damping)) <= 1e-14


@every_solver
def test_global_random_state_is_left_alone(name: str) -> None:
    problem = symmetric(SPECTRA["inverse"](6), seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    hypergrad.solve(problem.hvp(), gaussian(6), SOLVERS[name](6), damping="auto")
    assert torch.equal(torch.get_rng_state(), before)


@every_solver
def test_input_is_not_modified_and_output_not_shared(name: str) -> None:
    v = gaussian(6)
    before = v.clone()
    x = hypergrad.solve(lambda u: u, v, SOLVERS[name](6), damping=1.0).value
    assert not x.requires_grad
    x += 1.0
    assert torch.equal(v, before)


# Damping ----------------------------------------------------------------------------------------


@every_solver
@every_dtype
@every_scale
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_automatic_damping_is_positive_and_scales_with_the_operator(
    name: str, dtype: torch.dtype, scale: float, spectrum: str
) -> None:
    problem = symmetric(SPECTRA[spectrum](10), seed=1, scale=scale)
    solution = quietly(
        problem.hvp(dtype), gaussian(10).to(dtype), SOLVERS[name](10), damping="auto"
    )
    assert torch.isfinite(solution.value).all()
    if problem.norm == 0.0:
        assert solution.info.damping == 1.0
        return
    lowest = 1e-3 * problem.norm
    negative = -1.5 * min(float(problem.eigenvalues.min()), 0.0)
    assert solution.info.damping >= 0.9 * max(lowest, negative)
    # Three times the last eigenvalue of a full sketch is at most three norms.
    assert solution.info.damping <= 3.01 * problem.norm


@pytest.mark.parametrize("name", ["exact", "cg", "neumann"])
def test_no_damping_is_the_default(name: str) -> None:
    assert hypergrad.solve(torch.eye(3), torch.ones(3), SOLVERS[name](3)).info.damping == 0.0


# Failures ---------------------------------------------------------------------------------------

INDEFINITE_MATRIX = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
ONES = torch.ones(2, dtype=F64)


def test_failures_warn_by_default_with_figures_and_causes() -> None:
    with pytest.warns(
        hypergrad.ConvergenceWarning, match=r"not positive definite.*residual about 1e"
    ):
        hypergrad.solve(INDEFINITE_MATRIX, ONES, hypergrad.CG())


@pytest.mark.parametrize("call", ["solve", "verb"])
def test_warnings_point_at_the_line_of_the_caller(call: str) -> None:
    function = hypergrad.solve if call == "solve" else hypergrad.cg_ihvp
    with pytest.warns(hypergrad.ConvergenceWarning) as caught:
        function(INDEFINITE_MATRIX, ONES)
    assert caught[0].filename == __file__


def test_failures_raise_on_request_and_lose_nothing() -> None:
    with pytest.raises(hypergrad.ConvergenceError, match="Raise damping") as caught:
        hypergrad.solve(INDEFINITE_MATRIX, ONES, hypergrad.CG(), on_failure="raise")
    solution = caught.value.solution
    assert isinstance(solution, hypergrad.Solution)
    assert solution.info.status is Status.NEGATIVE_CURVATURE
    assert torch.isfinite(solution.value).all()


def test_failures_are_silent_on_request_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = quietly(INDEFINITE_MATRIX, ONES, hypergrad.CG())
    assert solution.info.status.failed


def test_a_failed_column_fails_the_batch() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=F64)
    with pytest.warns(hypergrad.ConvergenceWarning):
        info = hypergrad.solve(INDEFINITE_MATRIX, rows, hypergrad.CG(), batched=True).info
    assert [column.converged for column in info.columns] == [True, False]
    assert not info.converged
    assert info.status is Status.NEGATIVE_CURVATURE


def test_a_column_of_zeros_does_not_speak_for_a_batch() -> None:
    # Of A = 0 a sketch's answers are exact, and all relative residuals equal.
    v = torch.stack([torch.zeros(3), torch.ones(3), torch.ones(3)]).to(F64)
    solver = hypergrad.Nystrom(1, generator=generator(0))
    zero = torch.zeros(3, 3, dtype=F64)
    info = hypergrad.solve(zero, v, solver, damping=0.5, batched=True).info
    assert [column.converged for column in info.columns] == [True, False, False]
    assert info.status is Status.FIXED_ITERATIONS
    assert not info.converged


def test_statuses_explain_themselves() -> None:
    for status in Status:
        assert len(status.value) > 20
    assert {status for status in Status if not status.failed} == {
        Status.CONVERGED,
        Status.FIXED_ITERATIONS,
    }


def test_an_answer_too_large_for_the_dtype_raises() -> None:
    with pytest.raises(hypergrad.NonFiniteError, match="overflows"):
        hypergrad.solve(torch.eye(2) * 1e-30, torch.full((2,), 1e20), hypergrad.CG())


def test_signatures_keep_their_promise() -> None:
    def parameters(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(hypergrad.solve) == [
        "operator", "v", "solver", "damping", "x0", "batched", "on_failure",
    ]  # fmt: skip
    assert hypergrad.solve(torch.eye(2), torch.ones(2)).info.solver == hypergrad.CG(rtol=1e-5)


def test_solvers_are_values() -> None:
    assert hypergrad.CG(rtol=1e-3) == hypergrad.CG(rtol=1e-3)
    with pytest.raises(AttributeError):
        hypergrad.CG().rtol = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        hypergrad.Nystrom(rank=3).rank = 4  # type: ignore[misc]
    assert hypergrad.Nystrom(3, generator=generator(0)).rank == 3


# What is returned -------------------------------------------------------------------------------


def test_an_answer_too_large_for_a_narrow_leaf_is_refused() -> None:
    v = {"a": torch.full((3,), 100.0).half(), "b": torch.ones(2)}
    with pytest.raises(hypergrad.NonFiniteError, match=r"x overflows torch\.float16"):
        hypergrad.solve(lambda u: {k: 0 * x for k, x in u.items()}, v, damping=1e-4)


def test_an_answer_that_underflows_is_not_called_converged() -> None:
    v = torch.full((3,), 1e-5).half()
    solution = quietly(lambda u: u * 1000.0, v, hypergrad.CG())
    assert not solution.info.converged
    assert solution.info.relative_residual > 0.5


@pytest.mark.parametrize("solver", [hypergrad.CG(rtol=1e-3), hypergrad.MINRES(rtol=1e-3)])
def test_small_residuals_of_float16_products_do_not_underflow(solver: Any) -> None:
    # The multiple of the identity is exact, so that all there is to lose is range.
    v = torch.randn(17, generator=generator(0)).half()
    info = quietly(lambda u: u * 2.0**-7, v, solver, damping=0.0).info
    assert info.status is Status.CONVERGED
    dense = symmetric(torch.ones(17, dtype=F64)).matrix * 0.01
    info = quietly(dense.half(), v, replace(solver, rtol=1e-8)).info
    assert info.status is not Status.NEGATIVE_CURVATURE


@every_solver
def test_an_answer_that_underflows_is_no_negative_curvature(name: str) -> None:
    # Products with an answer of zeros are zero, and prove nothing of the operator.
    v = torch.full((3,), 1e-30)
    for eigenvalues in ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]):
        matrix = symmetric(torch.tensor(eigenvalues, dtype=F64), scale=1e30).matrix.to(F32)
        info = quietly(matrix, v, SOLVERS[name](3), damping=1e27).info
        assert info.status not in (Status.NEGATIVE_CURVATURE, Status.CONVERGED)
        assert info.relative_residual == pytest.approx(1.0)


def test_underflow_of_a_series_that_is_done_early_is_no_negative_curvature() -> None:
    matrix = symmetric(torch.ones(17, dtype=F64), scale=1e30).matrix.to(F32)
    for acceleration in ("none", "chebyshev"):
        solver = hypergrad.Neumann(50, acceleration=acceleration)
        for seed in range(5):
            v = 1e-30 * gaussian(17, seed=seed).to(F32)
            info = quietly(matrix, v, solver, damping=1e27).info
            assert info.status is Status.STAGNATED


@every_solver
def test_the_largest_numbers_have_a_norm_too(name: str) -> None:
    v = torch.full((30,), 1.7e308, dtype=F64)
    x = hypergrad.solve(lambda u: u * 3, v, SOLVERS[name](30), damping=1.0).value
    torch.testing.assert_close(x, v / 4, rtol=1e-5, atol=0)


@every_solver
def test_zero_has_the_answer_zero_whatever_the_warm_start(name: str) -> None:
    problem = symmetric(SPECTRA["inverse"](20), seed=1)
    solution = hypergrad.solve(
        problem.hvp(), torch.zeros(20, dtype=F64), SOLVERS[name](20), damping=0.1, x0=gaussian(20)
    )
    assert torch.equal(solution.value, torch.zeros(20, dtype=F64))
    assert solution.info.relative_residual == 0.0


def test_a_warm_start_worse_than_none_does_no_harm() -> None:
    problem = symmetric(SPECTRA["inverse"](20), seed=1)
    v = gaussian(20)
    solution = hypergrad.solve(problem.hvp(), v, hypergrad.Exact(), x0=1e15 * gaussian(20, seed=3))
    assert relative_error(solution.value, dense_solve(problem.matrix, v, 0.0)) <= 1e-12


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_automatic_damping_follows_the_scale_of_the_operator(scale: float) -> None:
    problem = symmetric(SPECTRA["inverse"](30), seed=1)
    v = gaussian(30)
    for solver in (hypergrad.CG(), hypergrad.Exact(), hypergrad.Nystrom(30)):
        plain = quietly(problem.hvp(), v, solver, damping="auto").info.damping
        scaled = quietly(lambda u: scale * (problem.matrix @ u), v, solver, damping="auto").info
        assert scaled.damping / scale == pytest.approx(plain, rel=1e-6)


def test_damping_that_cancels_an_eigenvalue_is_negative_curvature_and_finite() -> None:
    for solver in (hypergrad.CG(), hypergrad.Nystrom(3)):
        info = quietly(lambda u: -u, torch.ones(3), solver, damping=1.0).info
        assert info.status is Status.NEGATIVE_CURVATURE


def test_exact_solves_well_conditioned_indefinite_systems_in_16_bits() -> None:
    d = torch.ones(200).bfloat16()
    d[0] = -1
    v = torch.ones(200).bfloat16()
    solution = hypergrad.solve(lambda u: d * u, v, hypergrad.Exact())
    assert torch.equal(solution.value, d)


def test_reports_compare_by_identity() -> None:
    first = hypergrad.solve(torch.eye(2), torch.ones(2))
    assert first != hypergrad.solve(torch.eye(2), torch.ones(2))
