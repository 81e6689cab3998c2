"""Sketches too large to be held several times, made small here: the same sketch in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from benchmarks.benchmarks.memory import peak_bytes, wide_model
from hypergrad.solvers import streamed
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SPECTRA,
    dense_solve,
    gaussian,
    generator,
    relative_error,
    symmetric,
)

N, RANK = 60, 12


@pytest.fixture(autouse=True)
def _streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_WORTH_STREAMING", 0)
    monkeypatch.setattr(streamed, "_SLICE", 7 * RANK)  # the last slice is a short one


def matrix(name: str, dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA[name](N), seed=1).matrix.to(dtype)


def low_rank(values: Tensor, dtype: torch.dtype) -> Any:
    """A as its factors: a dense matrix once rounded has full rank."""
    q = torch.linalg.qr(gaussian(N, len(values), seed=2)).Q.to(dtype)
    return (lambda v: q @ (values.to(dtype) * (q.T @ v))), (q.double() * values) @ q.double().T


def sketched(a: Any, dtype: torch.dtype, **options: Any) -> hypergrad.NystromSketch:
    like = torch.zeros(N, dtype=dtype)
    return hypergrad.nystrom_sketch(a, RANK, like=like, **{"generator": generator(3), **options})


def image(sketch: hypergrad.NystromSketch) -> Tensor:
    basis = sketch.basis.double()
    return basis.T @ (sketch.eigenvalues.double()[:, None] * basis)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("name", [*POSITIVE, *INDEFINITE])
def test_a_basis_is_orthonormal_to_the_rounding_of_its_dtype(name: str, dtype: Any) -> None:
    sketch = sketched(matrix(name, dtype), dtype)
    expected = F32 if dtype == torch.bfloat16 else dtype
    assert sketch.basis.dtype == expected
    basis = sketch.basis.double()
    gap = basis @ basis.T - torch.eye(sketch.rank, dtype=F64)
    assert float(torch.linalg.matrix_norm(gap, 2)) <= 3 * RANK * torch.finfo(expected).eps


@pytest.mark.parametrize("name", POSITIVE)
def test_a_sketch_of_a_positive_operator_lies_below_it(name: str) -> None:
    a = matrix(name)
    sketch = sketched(a, F64)
    gap = torch.linalg.eigvalsh(a - image(sketch))
    assert float(gap[0]) >= -1e-12 * float(torch.linalg.matrix_norm(a, 2))
    assert sketch.trace_estimate is not None


@pytest.mark.parametrize("name", INDEFINITE)
def test_ritz_values_stay_inside_the_spectrum(name: str) -> None:
    a = matrix(name)
    values = torch.linalg.eigvalsh(a)
    sketch = sketched(a, F64)
    slack = 1e-12 * float(values.abs().max())
    assert float(values[0]) - slack <= sketch.smallest_eigenvalue < 0
    assert float(sketch.eigenvalues.max()) <= float(values[-1]) + slack
    # The coupling of the basis to what is outside, by the Frobenius norm.
    coupled = a @ sketch.basis.T - sketch.basis.T * sketch.eigenvalues
    assert sketch.tail == pytest.approx(float(torch.linalg.matrix_norm(coupled)), rel=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_an_operator_of_lower_rank_is_found_whole(dtype: Any, signs: float) -> None:
    values = torch.logspace(0, -3, RANK - 4, dtype=F64)
    values[1::2] *= signs
    a, dense = low_rank(values, dtype)
    eps = torch.finfo(dtype).eps
    sketches = [sketched(a, dtype, generator=generator(seed)) for seed in range(9)]
    errors = [float(torch.linalg.matrix_norm(image(x) - dense, 2)) for x in sketches]
    assert sorted(errors)[4] <= 50 * eps
    # With bad luck the test matrix amplifies the rounding of products, up to what is worth a pass.
    assert max(errors) <= 2 * (3 * eps + eps**0.6)
    sketch = sketches[errors.index(sorted(errors)[4])]
    v, damping = gaussian(N, seed=5).to(dtype), 2.0
    x = sketch.solve(v, damping)
    assert relative_error(x.double(), dense_solve(dense, v.double(), damping)) <= 100 * eps


@pytest.mark.parametrize("dtype", [F32, F64])
def test_what_a_sketch_is_used_for(dtype: Any) -> None:
    a = matrix("exponential", dtype)
    sketch = sketched(a, dtype)
    v = gaussian(N, seed=5).to(dtype)
    solver = hypergrad.CG(rtol=1e-5, preconditioner=sketch.preconditioner(1e-2))
    assert hypergrad.solve(a, v, solver, damping=1e-2).info.converged
    ends = sketch.error_estimate(a)
    gap = float(torch.linalg.matrix_norm(a.double() - image(sketch), 2))
    assert ends.largest <= gap * (1 + 1e-3)
    exact = float(a.double().trace())
    assert sketch.trace(a, num_probes=50, generator=generator(1)) == pytest.approx(exact, rel=0.3)
    assert sketch.update(1.01 * a, generator=generator(2)).rank == sketch.rank
    _, info = hypergrad.nystrom_ihvp(
        a, v, rank=RANK, damping=0.1, generator=generator(3), return_info=True
    )
    assert info.relative_residual < 1.0


@pytest.mark.parametrize("policy", ["keep", "absolute", "clip"])
def test_solves_of_indefinite_operators(policy: Any) -> None:
    a = matrix("alternating", F32)
    solver = hypergrad.Nystrom(RANK, generator=generator(3), negative_curvature=policy)
    v = gaussian(N, seed=5).to(F32)
    solution = hypergrad.solve(a, v, solver, damping="auto", on_failure="ignore")
    assert bool(torch.isfinite(solution.value).all())
    assert solution.info.smallest_eigenvalue is not None
    assert solution.info.smallest_eigenvalue < 0


def test_the_complement_is_that_of_the_sketch_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrix("inverse")
    narrow = sketched(a, F64, complement="quadrature").complement
    monkeypatch.setattr(streamed, "_WORTH_STREAMING", 2**60)
    whole = sketched(a, F64, complement="quadrature").complement
    assert narrow is not None
    assert whole is not None
    # Means over the same complement but for the random test matrix and start.
    assert narrow.inverse(1e-2) == pytest.approx(whole.inverse(1e-2), rel=0.5)


def test_nothing_is_made_of_the_zero_operator() -> None:
    sketch = sketched(lambda v: 0.0 * v, F32)
    assert sketch.rank == 0
    assert torch.equal(sketch.solve(torch.ones(N), damping=2.0), torch.full((N,), 0.5))


def test_asymmetry_is_refused() -> None:
    a = matrix("inverse")
    skew = torch.triu(torch.ones(N, N, dtype=F64), 1)
    with pytest.raises(hypergrad.NotSymmetricError):
        sketched(a + skew - skew.T, F64)


def test_a_nan_is_named() -> None:
    like = {"w": torch.zeros(N // 2), "b": torch.zeros(N // 2)}
    with pytest.raises(hypergrad.NonFiniteError, match=r"leaf \['b'\]"):
        hypergrad.nystrom_sketch(lambda v: {"w": v["w"], "b": v["b"] * torch.nan}, RANK, like=like)


def vectors_of_a_sketch(width: int, dtype: torch.dtype) -> float:
    loss, params, x, y = wide_model(width, dtype=dtype)
    operator = hypergrad.hessian(loss, params, x, y)
    size = operator.layout.dim * x.element_size()
    g = generator(1)
    return peak_bytes(lambda: hypergrad.nystrom_sketch(operator, rank=10, generator=g)) / size


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_sketch_of_rank_ten_takes_fourteen_vectors(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SLICE", 2**12)
    assert vectors_of_a_sketch(150, dtype) <= 14.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_sketch_of_ten_million_parameters(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert vectors_of_a_sketch(2200, dtype) <= 14.0


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F64, 2.0**-660), (F64, 2.0**660), (torch.bfloat16, 2.0**-76), (torch.bfloat16, 2.0**76)],
)
@pytest.mark.parametrize("name", [*POSITIVE, *INDEFINITE])
def test_the_scale_of_the_operator_changes_nothing(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    # Squares of its products, of their rounding, and of what they miss, are beyond the range.
    plain, other = (sketched(a * matrix(name, dtype), dtype) for a in (1.0, scale))
    close = 1e-8 if dtype == F64 else 1e-2  # LAPACK scales by no power of two
    torch.testing.assert_close(other.eigenvalues / scale, plain.eigenvalues, rtol=0, atol=close)
    assert other.tail / scale == pytest.approx(plain.tail, abs=close)
    assert other.auto_damping() / scale == pytest.approx(plain.auto_damping(), abs=close)
    above = torch.triu(torch.ones(N, N, dtype=dtype), 1)
    with pytest.raises(hypergrad.NotSymmetricError):
        sketched(scale * (matrix(name, dtype) + above - above.T), dtype)
