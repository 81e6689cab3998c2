"""What is special to conjugate gradients on one right-hand side, which work in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, Status
from hypergrad.solvers import cg_one
from tests.solvers.krylov_properties import quietly
from tests.strategies import (
    F32,
    F64,
    dense_solve,
    gaussian,
    relative_error,
    relative_residual,
    symmetric,
)

Hvp = Callable[[Tensor], Tensor]

#: Long enough for vectors in float32.
LONG = cg_one._LONG


def diagonal(n: int, power: float, dtype: torch.dtype) -> Tensor:
    return torch.logspace(0, -power, n, dtype=F64).to(dtype)


def overwriting(values: Tensor) -> Hvp:
    def hvp(x: Tensor) -> Tensor:
        product = values * x
        x.fill_(float("nan"))
        return product

    return hvp


def in_place(values: Tensor) -> Hvp:
    return lambda x: x.mul_(values)


def reusing(values: Tensor) -> Hvp:
    memory = torch.empty_like(values)
    return lambda x: torch.mul(values, x, out=memory)


@pytest.mark.parametrize("n", [50, LONG])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("damping", [0.0, 0.125])
@pytest.mark.parametrize("make", [overwriting, in_place, reusing])
def test_what_a_product_does_with_its_memory_is_its_own_affair(
    n: int, dtype: torch.dtype, damping: float, make: Callable[[Tensor], Hvp]
) -> None:
    values, v = diagonal(n, 2, dtype), gaussian(n, seed=1).to(dtype)
    kept = v.clone()
    plain = hypergrad.solve(lambda x: values * x, v, CG(rtol=1e-3), damping=damping)
    other = hypergrad.solve(make(values), v, CG(rtol=1e-3), damping=damping)
    assert plain.info.status is other.info.status is Status.CONVERGED
    assert plain.info.num_hvps == other.info.num_hvps
    assert torch.equal(plain.value, other.value)
    assert torch.equal(v, kept)


def test_the_symmetry_check_may_multiply_once_more_into_the_same_memory() -> None:
    # A preconditioner that leaves rounding only for the first products to show: the check
    # estimates |A| by a product, and the step goes on with the product that it had.
    values = torch.logspace(0, -12, 40, dtype=F64)
    v = gaussian(40, seed=1)
    solver = CG(rtol=1e-2, max_iters=30, preconditioner=lambda r: r / values)
    plain = quietly(lambda x: values * x, v, solver)
    other = quietly(reusing(values), v, solver)
    assert torch.equal(plain.value, other.value)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_callable_may_keep_its_arguments(dtype: torch.dtype) -> None:
    values, v = diagonal(30, 2, dtype), gaussian(30, seed=1).to(dtype)
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def hvp(x: Tensor) -> Tensor:
        kept.append(x)
        copies.append(x.clone())
        return values * x

    hypergrad.solve(hvp, v, CG(rtol=1e-3))
    assert len(kept) > 5
    for now, then in zip(kept, copies, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("n", [50, LONG])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_product_that_is_not_finite_is_found_and_its_leaf_named(
    bad: float, at: int, n: int, dtype: torch.dtype
) -> None:
    values, calls = diagonal(n, 2, dtype), [0]

    def hvp(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        calls[0] += 1
        product = {"a": tree["a"].clone(), "b": values * tree["b"]}
        if calls[0] == at:
            product["b"][7] = bad
        return product

    v = {"a": gaussian(3, seed=1).to(dtype), "b": gaussian(n, seed=2).to(dtype)}
    with pytest.raises(hypergrad.NonFiniteError, match=r"output of the operator.*leaf \['b'\]"):
        hypergrad.solve(hvp, v, CG(rtol=1e-3))
    assert calls[0] == at


def test_a_check_whose_product_is_not_finite_raises() -> None:
    calls = [0]

    def hvp(x: Tensor) -> Tensor:
        calls[0] += 1
        return x if calls[0] == 1 else x / 0.0

    with pytest.raises(hypergrad.NonFiniteError, match="output of the operator"):
        hypergrad.solve(hvp, gaussian(9, seed=1), CG())
    assert calls[0] == 2


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("power", [2, 6])
def test_more_iterations_never_return_a_larger_residual(dtype: torch.dtype, power: int) -> None:
    # The residuals of CG go up and down at such conditions; the best iterate is what counts.
    problem = symmetric(torch.logspace(0, -power, 40, dtype=F64), seed=1)
    v, matrix = gaussian(40, seed=2).to(dtype), problem.matrix.to(dtype)
    last = 1.0
    for count in range(1, 30):
        solution = quietly(matrix, v, CG(rtol=1e-9, max_iters=count))
        outside = relative_residual(matrix.double(), 0.0, solution.value, v)
        # The report's own product is rounded: by a few eps |A| |x|.
        rounding = 8 * torch.finfo(dtype).eps * float(solution.value.norm() / v.norm())
        reported = solution.info.relative_residual
        assert reported == pytest.approx(outside, rel=1e-12, abs=rounding)
        assert outside <= last + 2 * rounding
        last = outside


# Vectors in float32 -----------------------------------------------------------------------------


def mirrored(values: Tensor) -> Hvp:
    """A product of O(n) operations whose eigenvectors are not unit vectors."""
    unit = gaussian(len(values), seed=3)
    unit = (unit / unit.norm()).to(values.dtype)

    def mirror(x: Tensor) -> Tensor:
        return torch.addcmul(x, unit, 2.0 * torch.dot(unit, x), value=-1.0)

    return lambda x: mirror(values * mirror(x))


def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cg_one, "_LONG", 10**9)


@pytest.mark.parametrize("spectrum", ["geometric", "power law"])
@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3])
def test_narrow_vectors_cost_few_iterations(
    spectrum: str, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = LONG
    values = diagonal(n, 3, F32)
    if spectrum == "power law":
        values = torch.arange(1, n + 1, dtype=F64).pow(-0.8).to(F32)
    v, hvp = gaussian(n, seed=1).to(F32), mirrored(values)
    narrow = hypergrad.solve(hvp, v, CG(rtol=rtol))
    wide(monkeypatch)
    expected = hypergrad.solve(hvp, v, CG(rtol=rtol))
    assert narrow.info.status is Status.CONVERGED
    image = mirrored(values.double())(narrow.value.double())
    # The products of the two differ by their rounding.
    assert float((image - v).norm() / v.norm()) <= rtol * 1.01
    assert narrow.info.num_hvps <= 1.15 * expected.info.num_hvps + 2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_narrow_vectors_at_any_scale_of_v(scale: float) -> None:
    values, v = diagonal(LONG, 2, F32), gaussian(LONG, seed=1).to(F32)
    plain = hypergrad.solve(lambda x: values * x, v, CG(rtol=1e-2))
    scaled = hypergrad.solve(lambda x: values * x, v * scale, CG(rtol=1e-2))
    assert scaled.info.iterations == plain.info.iterations
    assert relative_error(scaled.value.double() / scale, plain.value) <= 1e-4


@pytest.mark.parametrize("factor", [1e-20, 1e20, 1e-30])
def test_narrow_vectors_at_any_scale_of_the_operator(factor: float) -> None:
    # Where squares leave the range of float32 the vectors turn wide.
    values, v = diagonal(LONG, 1, F32), gaussian(LONG, seed=1).to(F32)
    plain = hypergrad.solve(lambda x: values * x, v, CG(rtol=1e-2))
    scaled = hypergrad.solve(lambda x: factor * (values * x), v, CG(rtol=1e-2))
    assert scaled.info.status is Status.CONVERGED
    assert abs(scaled.info.iterations - plain.info.iterations) <= 1
    assert relative_error(scaled.value.double() * factor, plain.value) <= 1e-1


def test_narrow_vectors_meet_negative_curvature() -> None:
    values, v = diagonal(LONG, 2, F32), gaussian(LONG, seed=1).to(F32)
    values[::7] *= -1.0
    info = quietly(lambda x: values * x, v, CG(rtol=1e-2)).info
    assert info.status is Status.NEGATIVE_CURVATURE
    direction = info.direction
    assert isinstance(direction, Tensor)
    assert float(direction.double().norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(direction.double() @ (values * direction).double()) <= 0.0
    assert info.relative_residual <= 1.0 + 1e-6


def test_narrow_vectors_from_a_warm_start() -> None:
    values, v = diagonal(LONG, 3, F32), gaussian(LONG, seed=1).to(F32)
    x0 = v / values * (1.0 + 0.1 * gaussian(LONG, seed=2)).to(F32)
    solution = hypergrad.solve(lambda x: values * x, v, CG(rtol=1e-2), x0=x0)
    cold = hypergrad.solve(lambda x: values * x, v, CG(rtol=1e-2))
    assert solution.info.status is Status.CONVERGED
    assert 0 < solution.info.iterations < cold.info.iterations
    assert float((values * solution.value - v).norm() / v.norm()) <= 1.01e-2


@pytest.mark.parametrize("spectrum", ["linear", "geometric"])
@pytest.mark.parametrize("rtol", [1e-4, 3e-6])
def test_narrow_vectors_turn_wide_where_they_are_too_coarse(
    spectrum: str, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.linspace(1.0, 0.1, 60, dtype=F64)
    if spectrum == "geometric":
        values = torch.logspace(0, -1, 60, dtype=F64)
    matrix = symmetric(values, seed=1).matrix.to(F32)
    v = gaussian(60, seed=2).to(F32)
    expected = hypergrad.solve(matrix, v, CG(rtol=rtol)).info
    monkeypatch.setattr(cg_one, "_LONG", 0)
    monkeypatch.setattr(cg_one, "_LOOSE", 0.0)
    x, info = hypergrad.cg_ihvp(matrix, v, rtol=rtol, return_info=True)
    assert info.status is expected.status is Status.CONVERGED
    assert relative_residual(matrix.double(), 0.0, x, v) <= 1.01 * rtol
    assert info.num_hvps <= 2 * expected.num_hvps


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_an_unattainable_tolerance_by_narrow_vectors(
    damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cg_one, "_LONG", 0)
    monkeypatch.setattr(cg_one, "_LOOSE", 0.0)
    problem = symmetric(torch.logspace(0, -3, 40, dtype=F64), seed=1)
    matrix, v = problem.matrix.to(F32), gaussian(40, seed=2).to(F32)
    solution = quietly(matrix, v, CG(rtol=1e-12), damping=damping)
    assert solution.info.status is Status.STAGNATED
    # The same bound as for wide vectors: eps |A| |x| / |v|, and little above.
    outside = relative_residual(matrix.double(), damping, solution.value, v)
    assert outside <= 10 * torch.finfo(F32).eps * 1e3
    assert solution.info.relative_residual <= 10 * torch.finfo(F32).eps * 1e3


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("ends", [(1.0, 16.0), (1.0, 1.0), (4.0, 64.0)])
def test_a_residual_of_zero_is_that_of_the_iterate(
    ends: tuple[float, float], others: int, dtype: torch.dtype
) -> None:
    """Also after one that was larger than the first, and as the last row of a block."""
    values = torch.tensor(ends, dtype=dtype)
    rows = torch.zeros(1 + others, 2, dtype=dtype)
    rows[0] = torch.tensor([2.0, 1.0], dtype=dtype)
    solution = quietly(lambda u: values * u, rows, CG(max_iters=3), batched=True)
    first = solution.info.columns[0]
    count = len(set(ends))
    assert (first.status, first.iterations, first.num_hvps) == (Status.CONVERGED, count, count + 1)
    assert torch.equal(values * solution.value, rows)


# The last row of a block ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_last_row_of_a_block_goes_on_as_it_would_have_alone(
    dtype: torch.dtype, preconditioned: bool
) -> None:
    problem = symmetric(torch.logspace(0, -1, 40, dtype=F64), seed=1)
    rows = gaussian(3, 40, seed=2)
    rows[0], rows[2] = problem.basis[:, 3], 0.0  # done after one iteration, and before any
    rows = rows.to(dtype)
    weights = torch.linspace(1.0, 2.0, 40, dtype=dtype)
    inverse: Any = (lambda r: weights * r) if preconditioned else None
    solver = CG(rtol=1e-4, preconditioner=inverse)
    matrix = problem.matrix.to(dtype)
    block = hypergrad.solve(matrix, rows, solver, batched=True)
    alone = hypergrad.solve(matrix, rows[1], solver)
    assert block.info.converged
    one = block.info.columns[1]
    assert one.iterations > 5
    assert abs(one.iterations - alone.info.iterations) <= 1
    assert relative_residual(matrix.double(), 0.0, block.value[1], rows[1]) <= 1.01e-4
    assert relative_error(block.value[1], dense_solve(problem.matrix, rows[1].double())) <= 1.1e-3


def test_the_last_row_of_a_block_shows_a_skew_part() -> None:
    # The first row is done after the iteration whose products the next ones are compared with.
    matrix = torch.eye(10, dtype=F64)
    matrix[1:, 1:] += torch.triu(gaussian(9, 9, seed=1)) / 3
    rows = gaussian(2, 10, seed=2)
    rows[0], rows[1, 0] = torch.eye(10, dtype=F64)[0], 0.0
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(matrix, rows, CG(), batched=True)


def test_negative_curvature_in_the_last_row_of_a_block() -> None:
    signs = torch.tensor([1.0, 1.0, -2.0], dtype=F64)
    rows = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 1.0]], dtype=F64)
    solution = quietly(lambda u: signs * u, rows, CG(), batched=True)
    first, second = solution.info.columns
    assert first.status is Status.CONVERGED
    assert second.status is Status.NEGATIVE_CURVATURE
    assert first.direction is None
    assert isinstance(second.direction, Tensor)
    assert float(signs @ second.direction.square()) <= 1e-15
