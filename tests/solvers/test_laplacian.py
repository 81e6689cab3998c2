"""The Laplacian on a grid, whose eigenvalues and eigenvectors SciPy gives in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LaplacianNd
from torch import Tensor

import hypergrad
from hypergrad import Status
from tests.strategies import F64, gaussian, generator, relative_error

GRIDS = ((60,), (12, 9), (6, 5, 4))
SOLVERS: dict[str, hypergrad.Solver] = {
    "exact": hypergrad.Exact(),
    "cg": hypergrad.CG(rtol=1e-12),
    "minres": hypergrad.MINRES(rtol=1e-12),
    "nystrom_pcg": hypergrad.NystromPCG(rank=30, rtol=1e-12, generator=generator(0)),
}


class Laplacian:
    """Minus SciPy's Laplacian, positive semidefinite, and its inverse by the closed form."""

    def __init__(self, grid: tuple[int, ...], boundary: str) -> None:
        self.operator = -1.0 * LaplacianNd(grid, boundary_conditions=boundary, dtype=np.float64)
        closed = LaplacianNd(grid, boundary_conditions=boundary, dtype=np.float64)
        self.values = torch.from_numpy(-closed.eigenvalues())
        self.vectors = torch.from_numpy(np.array(closed.eigenvectors()))
        self.n = len(self.values)

    def solution(self, v: Tensor, damping: float) -> Tensor:
        """Sum over eigenpairs of <u, v> u / (l + damping), without the null space of either."""
        shifted = self.values + damping
        null = shifted.abs() < 1e-12
        inverse = torch.where(null, 0.0, 1.0 / torch.where(null, 1.0, shifted))
        return self.vectors @ (inverse * (self.vectors.T @ v))


def test_the_closed_form_is_one() -> None:
    for grid in GRIDS:
        for boundary in ("dirichlet", "neumann", "periodic"):
            laplacian = Laplacian(grid, boundary)
            dense = hypergrad.as_operator(laplacian.operator).to_dense()
            rebuilt = (laplacian.vectors * laplacian.values) @ laplacian.vectors.T
            torch.testing.assert_close(rebuilt, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_solvers_agree_with_the_closed_form(
    name: str, grid: tuple[int, ...], boundary: str, damping: float
) -> None:
    if name == "nystrom_pcg" and damping == 0.0:
        damping = 1e-4  # it needs a positive one
    laplacian = Laplacian(grid, boundary)
    v = gaussian(laplacian.n, seed=3)
    if boundary != "dirichlet" and damping == 0.0:
        v = v - v.mean()  # constants are the null space: there is a solution without them only
    solution = hypergrad.solve(laplacian.operator, v, SOLVERS[name], damping=damping)
    assert solution.info.status is Status.CONVERGED
    # The condition number is at most 1e5: residuals of 1e-12 leave errors below 1e-7 at worst;
    # those along the steep directions, where rounding is, are divided by far more.
    assert relative_error(solution.value, laplacian.solution(v, damping)) <= 1e-8


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_minres_finds_the_least_squares_solution_of_an_inconsistent_system(
    grid: tuple[int, ...], boundary: str
) -> None:
    laplacian = Laplacian(grid, boundary)
    v = gaussian(laplacian.n, seed=3) + 1.0
    solution = hypergrad.solve(
        laplacian.operator, v, hypergrad.MINRES(rtol=1e-12), on_failure="ignore"
    )
    assert solution.info.status is Status.STAGNATED
    residual = float(v.mean().abs()) * laplacian.n**0.5
    assert solution.info.residual_norm == pytest.approx(residual, rel=1e-6)
    # The residual determines the answer to the square root of its own accuracy.
    assert relative_error(solution.value, laplacian.solution(v, 0.0)) <= 1e-5


def test_the_smallest_ritz_value_is_the_smallest_eigenvalue() -> None:
    laplacian = Laplacian((60,), "dirichlet")
    v = gaussian(laplacian.n, seed=3)
    for sign, values in ((1.0, laplacian.values), (-1.0, -laplacian.values)):
        info = hypergrad.solve(
            sign * laplacian.operator, v, hypergrad.MINRES(rtol=1e-12), damping=0.0
        ).info
        assert info.smallest_eigenvalue == pytest.approx(float(values.min()), rel=1e-6)


def test_a_shift_does_not_move_the_smallest_ritz_value() -> None:
    laplacian = Laplacian((12, 9), "dirichlet")
    v = gaussian(laplacian.n, seed=3).to(F64)
    info = hypergrad.solve(laplacian.operator, v, hypergrad.MINRES(rtol=1e-12), damping=0.5).info
    assert info.smallest_eigenvalue == pytest.approx(float(laplacian.values.min()), rel=1e-3)
