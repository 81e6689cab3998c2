"""``CG(reorthogonalize=True)``: answers of CG in the products that exact arithmetic needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from hypergrad import CG, Status
from hypergrad.operators import compilation
from hypergrad.solvers import compiled_cg, traced_cg
from hypergrad.solvers.base import DampedSystem
from hypergrad.solvers.orthogonal import Residuals
from tests.solvers.krylov_properties import (
    System,
    check_a_block_is_its_rows,
    check_scale_invariance,
    check_the_status_never_lies,
    exponents,
    indefinite_systems,
)
from tests.strategies import (
    F32,
    F64,
    dense_solve,
    gaussian,
    orthogonal,
    quick_and_thorough,
    relative_error,
    symmetric,
)

N, OUTLIERS = 300, 12
DAMPING = 1e-3


def outlying(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A few large eigenvalues above a bulk of ten, each thirty-fold: 22 distinct ones in all."""
    bulk = torch.linspace(3e-2, 1e-2, 10, dtype=F64).repeat_interleave((N - OUTLIERS) // 10 + 1)
    outliers = torch.logspace(0, 1.5, OUTLIERS, dtype=F64)
    values = torch.cat([outliers, bulk])[:N]
    return symmetric(values, seed=3).matrix.to(dtype), gaussian(N, seed=4).to(dtype)


def kept(rtol: float) -> CG:
    return CG(rtol=rtol, reorthogonalize=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "rtol"), [(F32, 1e-3), (F64, 1e-10)])
def test_rounding_costs_no_products(dtype: torch.dtype, rtol: float, rows: int) -> None:
    a, v = outlying(dtype)
    block = torch.stack([v, *(gaussian(N, seed=s).to(dtype) for s in range(1, rows))])
    given_v, batched = (v, False) if rows == 1 else (block, True)

    def hvp(x: Tensor) -> Tensor:
        return a @ x

    plain = hypergrad.solve(hvp, given_v, CG(rtol=rtol), damping=DAMPING, batched=batched).info
    solution = hypergrad.solve(hvp, given_v, kept(rtol), damping=DAMPING, batched=batched)
    assert solution.info.converged
    assert solution.info.iterations <= OUTLIERS + 10 + 1  # as many as distinct eigenvalues
    assert plain.iterations > 1.3 * solution.info.iterations  # or the problem shows nothing
    x = solution.value if batched else solution.value[None]
    for answer, row in zip(x, block, strict=True):
        # The residual over the smallest eigenvalue, and the rounding of a float32 product.
        bound = 3 * (rtol + float(torch.finfo(dtype).eps) * 30 * N**0.5) / (1e-2 + DAMPING)
        assert relative_error(answer, dense_solve(a.double(), row, DAMPING)) <= bound


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1.0, 1e22])
def test_curvature_that_rounding_left_is_none(dtype: torch.dtype, scale: float) -> None:
    """Of rank one, where the second step is along the null space; alone as in a block."""
    a = torch.diag(torch.tensor([1e-8, 0.0, 0.0, 0.0], dtype=dtype))
    rows = scale * gaussian(5, 4, seed=0).to(dtype)
    options: dict[str, Any] = {"damping": 0.0, "on_failure": "ignore"}
    block = hypergrad.solve(lambda v: a @ v, rows, kept(1e-2), batched=True, **options)
    alone = [hypergrad.solve(lambda v: a @ v, v, kept(1e-2), **options).info for v in rows]
    for info in (*block.info.columns, *alone):
        assert info.status is Status.NEGATIVE_CURVATURE
        assert info.iterations == 2


@pytest.mark.parametrize("scale", [1.0, 1e10])
def test_a_recurrence_that_grows_without_bound_is_no_fault_of_the_operator(scale: float) -> None:
    """Of singular systems, where it doubles its digits in a few iterations."""
    found = [1e-8, 1.7783e-9, 3.1623e-10, 5.6234e-11, 1e-11]
    values = torch.tensor([*found, *[0.0] * 5], dtype=F64)
    for seed in range(40):
        a, v = symmetric(values, seed=seed).matrix.to(F32), scale * gaussian(10, seed=seed).to(F32)
        info = hypergrad.solve(a, v, kept(1e-2), damping=0.0, on_failure="ignore").info
        assert info.status in (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
        assert info.relative_residual <= 1.0


@pytest.mark.parametrize(("rtol", "max_iters"), [(1e-6, None), (0.0, 45), (0.0, 300)])
def test_nor_in_a_block_or_of_a_fixed_number_of_iterations(
    rtol: float, max_iters: int | None
) -> None:
    solver = CG(rtol=rtol, max_iters=max_iters, reorthogonalize=True)
    values = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0], dtype=F64)
    for seed in range(25):
        spectrum = values if seed % 2 else values * (values == 1.0)  # or of rank one
        a = symmetric(spectrum, seed=seed).matrix.to(F32)
        rows = gaussian(9, 8, seed=seed).to(F32)
        solution = hypergrad.solve(a, rows, solver, batched=True, on_failure="ignore")
        for info, x, v in zip(solution.info.columns, solution.value, rows, strict=True):
            assert info.status is not Status.CONVERGED
            assert math.isfinite(info.residual_norm)
            left = float(torch.linalg.vector_norm(v.double() - a.double() @ x.double()))
            rounding = 10 * torch.finfo(F32).eps * float(torch.linalg.vector_norm(x))
            assert info.residual_norm == pytest.approx(left, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("rtol", [0.0, 1e-6])
@pytest.mark.parametrize("rows", [1, 3])
def test_with_a_preconditioner(rows: int, rtol: float) -> None:
    a, _ = outlying(F64)
    scale = torch.logspace(0, 2, N, dtype=F64)
    a = scale[:, None] * a * scale
    v = gaussian(rows, N, seed=1)

    def divide(x: Tensor) -> Tensor:
        return x / scale**2

    options: dict[str, Any] = {"rtol": rtol, "max_iters": 26, "preconditioner": divide}
    found = {
        keep: hypergrad.solve(
            a, v, CG(**options, reorthogonalize=keep), damping=0.0, batched=True,
            on_failure="ignore",
        )
        for keep in (False, True)
    }  # fmt: skip
    residuals = {keep: x.info.relative_residual for keep, x in found.items()}
    # 22 distinct eigenvalues of the preconditioned system.
    assert residuals[True] <= 1e-6
    assert residuals[True] < 0.1 * residuals[False]


def test_a_fixed_number_of_iterations_compiled_and_not() -> None:
    a, v = outlying(F64)
    solver = CG(rtol=0.0, max_iters=23, reorthogonalize=True)

    def solve(v: Tensor) -> Tensor:
        return hypergrad.solve(a, v, solver, damping=DAMPING).value

    eager = solve(v)
    compiled = torch.compile(solve, fullgraph=True, backend="eager")(v)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)
    exact = dense_solve(a, v, DAMPING)
    assert relative_error(eager, exact) <= 1e-7
    plain = hypergrad.solve(a, v, CG(rtol=0.0, max_iters=23), damping=DAMPING).value
    assert relative_error(plain, exact) > 1e-4


@quick_and_thorough
@given(system=indefinite_systems)
def test_the_status_never_lies(effort: str, system: System) -> None:
    check_the_status_never_lies(system, kept)


@quick_and_thorough
@given(system=indefinite_systems, of_v=exponents, of_a=exponents)
def test_scales_do_not_matter(effort: str, system: System, of_v: int, of_a: int) -> None:
    check_scale_invariance(system, kept, of_v, of_a)


@quick_and_thorough
@given(system=indefinite_systems)
def test_a_block_is_its_rows(effort: str, system: System) -> None:
    # In the null space the curvature is the rounding of a product, in a block another one.
    undecided = frozenset({Status.NEGATIVE_CURVATURE, Status.STAGNATED})
    check_a_block_is_its_rows(system, kept, undecided=undecided)


def test_a_restart_forgets_what_was_kept() -> None:
    """Products that become others halfway: the true residual restarts a recurrence of its own."""
    a, v = outlying(F64)
    calls = 0

    def changing(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (a if calls > 10 else a + 1e-3 * torch.diag(torch.linspace(0, 1, N, dtype=F64))) @ x

    info = hypergrad.solve(changing, v, kept(1e-9), damping=DAMPING, on_failure="ignore").info
    assert info.converged
    assert calls > 11


@pytest.mark.parametrize("own", [False, True])
def test_what_is_kept(own: bool) -> None:
    """Cleaned rows are orthogonal to it, whatever is added, dropped and forgotten in between."""
    a, q = torch.eye(30, dtype=F64), orthogonal(30, seed=1)
    metric = torch.linspace(1.0, 3.0, 30, dtype=F64)
    b = gaussian(2, 30, seed=2)
    system = DampedSystem(hypergrad.as_operator(a), b, torch.ones(2, dtype=F64), 0.0)
    residuals = Residuals(system, preconditioned=own)
    weights = metric if own else torch.ones_like(metric)
    for k in range(20):  # beyond the first room
        # Orthogonal by the metric.
        r = torch.stack([q[k] / weights.sqrt(), 1e3 * q[29 - k] / weights.sqrt()])
        z = weights * r
        residuals.add(r, z, (r * z).sum(1))
    cleaned = residuals.cleaned(b)
    for row, basis in ((0, q[:20]), (1, q[10:])):
        assert float((basis * weights.sqrt() @ cleaned[row]).abs().max()) <= 1e-13
        rest = b[row] * weights.sqrt() - basis.T @ (basis @ (b[row] * weights.sqrt()))
        torch.testing.assert_close(cleaned[row] * weights.sqrt(), rest, rtol=1e-12, atol=1e-12)
    residuals.forget(torch.tensor([False, True]))
    torch.testing.assert_close(residuals.cleaned(b)[1], b[1])
    residuals.keep(torch.tensor([True, False]))
    one = b[0].clone()
    residuals.clean_one(one)
    torch.testing.assert_close(one, cleaned[0], rtol=1e-12, atol=1e-12)
    residuals.add(torch.ones(1, 30, dtype=F64), torch.ones(1, 30, dtype=F64), torch.zeros(1))
    torch.testing.assert_close(residuals.cleaned(b[:1])[0], cleaned[0], rtol=1e-12, atol=1e-12)


# As one graph ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("capture_only")
@pytest.mark.parametrize(("dtype", "rtol"), [(F32, 1e-3), (F64, 1e-9)])
def test_one_graph_takes_as_few(dtype: torch.dtype, rtol: float) -> None:
    a, v = outlying(dtype)
    graph = CG(rtol=rtol, compile=True, reorthogonalize=True)
    info = hypergrad.solve(a, v, graph, damping=DAMPING).info
    plain = hypergrad.solve(a, v, CG(rtol=rtol, compile=True), damping=DAMPING).info
    assert info.converged
    assert info.iterations <= OUTLIERS + 10 + 1
    assert plain.iterations > 1.3 * info.iterations
    assert any(g.what.startswith("CG") and g.proved for g in compilation._graphs.values())


@pytest.mark.usefixtures("capture_only")
@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_a_fixed_number_of_iterations_as_one_graph(count: int) -> None:
    """Across the loop of a few within the loop, and beyond what is kept."""
    a, v = outlying(F64)
    found = {
        compiled: hypergrad.solve(
            a, v, CG(rtol=0.0, max_iters=count, compile=compiled, reorthogonalize=True),
            damping=0.1,
        )
        for compiled in (False, True)
    }  # fmt: skip
    assert found[True].info.iterations == count
    assert found[True].info.status is Status.FIXED_ITERATIONS
    error = (found[True].value - found[False].value).norm() / found[False].value.norm()
    assert float(error) <= 1e-9


@pytest.mark.usefixtures("capture_only")
@pytest.mark.parametrize("kept", [8, 24, 64])
def test_rows_that_are_not_there_yet_are_not_missed(kept: int) -> None:
    """As many as there are at an iteration: they fill a block from its end, eight at a time."""
    rows = torch.linalg.qr(gaussian(120, 90)).Q.T
    vector = gaussian(120, seed=1)
    few = traced_cg.GATHERED
    clean = torch.compile(traced_cg._orthogonal, backend="eager", fullgraph=True, dynamic=False)
    for k in range(kept + 12):
        block, gathered = vector.new_zeros(kept, 120), vector.new_zeros(few, 120)
        joined, last = rows[: k - k % few][-kept:], rows[k - k % few : k + 1]
        block[kept - len(joined) :] = joined
        gathered[few - len(last) :] = last
        known = torch.cat([joined, last])
        expected = vector - known.T @ (known @ vector)
        found = clean(vector, block, gathered, torch.tensor(k))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("capture_only")
def test_a_graph_keeps_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cg, "_KEPT", 8)
    a, v = outlying(F64)
    few = hypergrad.solve(
        a, v, CG(rtol=1e-9, compile=True, reorthogonalize=True), damping=DAMPING
    ).info
    assert few.converged
    assert few.iterations > OUTLIERS + 10 + 1


@pytest.mark.usefixtures("capture_only")
def test_negative_curvature_goes_on_eagerly() -> None:
    values = torch.linspace(-1.0, 2.0, 20, dtype=F64)
    a = symmetric(values, seed=1).matrix
    solver = CG(compile=True, reorthogonalize=True)
    info = hypergrad.solve(a, gaussian(20), solver, on_failure="ignore").info
    assert info.status is Status.NEGATIVE_CURVATURE
    assert info.direction is not None
    assert float(info.direction @ a @ info.direction) <= 0


def test_wrong_options() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="reorthogonalize is 'yes'"):
        CG(reorthogonalize="yes")  # type: ignore[arg-type]
