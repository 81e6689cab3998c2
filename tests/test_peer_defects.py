"""Wrong answers that other libraries were seen to give, each restated as a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, Status
from tests.strategies import (
    F32,
    F64,
    SOLVERS,
    dense_solve,
    gaussian,
    generator,
    relative_error,
    relative_residual,
    symmetric,
)

every_solver = pytest.mark.parametrize("name", SOLVERS)


def test_cg_steps_along_fresh_residuals() -> None:
    # With the residual of the step before, the error after 20 steps at condition 10 is over one.
    problem = symmetric(torch.linspace(1.0, 10.0, 50, dtype=F64), seed=1)
    v = gaussian(50, seed=2)
    x = hypergrad.solve(problem.hvp(), v, CG(rtol=0.0, max_iters=20)).value
    # 2 sqrt(k) ((sqrt(k) - 1)/(sqrt(k) + 1))^20 for condition number k = 10.
    root = 10.0**0.5
    bound = 2 * root * ((root - 1) / (root + 1)) ** 20
    assert relative_error(x, dense_solve(problem.matrix, v)) <= bound


def test_cg_has_no_step_size_to_get_wrong() -> None:
    problem = symmetric(torch.linspace(1.0, 10.0, 50, dtype=F64), seed=1)
    for scale in (0.1, 1.0, 10.0):
        x = hypergrad.cg_ihvp(scale * problem.matrix, gaussian(50, seed=2), rtol=1e-10)
        expected = dense_solve(scale * problem.matrix, gaussian(50, seed=2))
        assert relative_error(x, expected) <= 1e-9


@pytest.mark.parametrize("curvature", [0.1, 1.0, 10.0])
def test_the_last_update_of_cg_is_not_dropped(curvature: float) -> None:
    # One iteration solves H = cI; without its update the implicit gradient is exactly zero.
    y = gaussian(4, seed=1)
    got = hypergrad.hypergradient(
        lambda w, y: 0.5 * curvature * (w**2).sum() - y @ w,
        lambda w, y: w.sum(),
        y / curvature,
        y,
        solver=CG(rtol=0.0, max_iters=1),
    )
    torch.testing.assert_close(got.implicit, torch.full((4,), 1 / curvature, dtype=F64))


def test_two_clusters_take_two_iterations() -> None:
    eigenvalues = torch.tensor([1.0] * 10 + [100.0] * 10, dtype=F64)
    problem = symmetric(eigenvalues, seed=1)
    v = gaussian(20, seed=2)
    x = hypergrad.solve(problem.hvp(), v, CG(rtol=0.0, max_iters=2)).value
    assert relative_error(x, dense_solve(problem.matrix, v)) <= 1e-12


@every_solver
@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-30, 1e-200])
def test_a_small_right_hand_side_is_not_zero(name: str, size: float) -> None:
    problem = symmetric(torch.linspace(1.0, 2.0, 8, dtype=F64), seed=1)
    v = gaussian(8, seed=2)
    x = hypergrad.solve(problem.hvp(), size * v, SOLVERS[name](8), damping=0.1).value
    assert relative_error(x / size, dense_solve(problem.matrix, v, 0.1)) <= 1e-7


@every_solver
def test_all_blocks_of_the_operator_count_not_the_diagonal_ones(name: str) -> None:
    block = 0.9 * torch.linalg.qr(gaussian(3, 3, seed=1))[0]
    eye = torch.eye(3, dtype=F64)
    matrix = torch.cat([torch.cat([eye, block], 1), torch.cat([block.T, eye], 1)])
    v = {"a": gaussian(3, seed=2), "b": gaussian(3, seed=3)}

    def hvp(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": t["a"] + block @ t["b"], "b": block.T @ t["a"] + t["b"]}

    x = hypergrad.solve(hvp, v, SOLVERS[name](6), damping=0.3).value
    expected = dense_solve(matrix, torch.cat([v["a"], v["b"]]), 0.3)
    assert relative_error(torch.cat([x["a"], x["b"]]), expected) <= 1e-6


@every_solver
def test_a_0d_parameter_has_a_gradient(name: str) -> None:
    got = hypergrad.hypergradient(
        lambda w, y: 0.5 * (w - y) ** 2,
        lambda w, y: w**2,
        torch.tensor(3.0, dtype=F64),
        torch.tensor(3.0, dtype=F64),
        solver=SOLVERS[name](1),
        damping=1e-8,
    )
    assert float(got.grad) == pytest.approx(6.0, rel=1e-6)


@every_solver
@pytest.mark.parametrize("damping", [0.5, 3.0])
def test_damping_is_applied_exactly_once(name: str, damping: float) -> None:
    x = hypergrad.solve(lambda u: u, torch.ones(3, dtype=F64), SOLVERS[name](3), damping=damping)
    torch.testing.assert_close(x.value, torch.full((3,), 1 / (1 + damping), dtype=F64))
    assert x.info.damping == damping


def test_the_default_tolerance_is_one_that_is_meant_and_reached() -> None:
    problem = symmetric(torch.logspace(0, -4, 60, dtype=F64), seed=1)
    v = gaussian(60, seed=2)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, return_info=True)
    assert info.solver.rtol == 1e-5
    assert info.converged
    assert relative_residual(problem.matrix, 0.0, x, v) <= 1.001e-5


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seed", range(25))
def test_nystrom_on_an_indefinite_hessian_stays_inside_the_spectrum(
    sketch: Any, dtype: torch.dtype, seed: int
) -> None:
    # Shifting and clipping the core gives eigenvalues of 1e12 for a matrix of norm one.
    problem = symmetric(torch.linspace(1.0, -1.0, 30, dtype=F64), seed=seed)
    made = hypergrad.nystrom_sketch(
        problem.matrix.to(dtype), 1 + seed % 10, sketch=sketch, generator=generator(seed)
    )
    assert float(made.eigenvalues.abs().max()) <= 1.01


@every_solver
def test_surplus_right_hand_sides_are_not_zero(name: str) -> None:
    problem = symmetric(torch.linspace(1.0, 2.0, 3, dtype=F64), seed=1)
    rows = gaussian(9, 3, seed=2)
    x = hypergrad.solve(problem.hvp(), rows, SOLVERS[name](3), damping=0.1, batched=True).value
    assert x.shape == (9, 3)
    for row, v in zip(x, rows, strict=True):
        assert relative_error(row, dense_solve(problem.matrix, v, 0.1)) <= 1e-6


def test_a_rank_above_the_dimension_is_explained() -> None:
    with pytest.raises(hypergrad.RankError, match=r"rank is 7, .* dimension 3; expected 1 <= rank"):
        hypergrad.nystrom_ihvp(lambda u: u, torch.ones(3), rank=7)


class TestRawWoodbury:
    """v/rho - C'(W + C C'/rho)^-1 C v/rho^2 in float32 loses everything at small damping."""

    problem = symmetric(
        torch.cat([torch.logspace(0, -3, 15, dtype=F64), torch.zeros(25, dtype=F64)]), seed=1
    )

    @pytest.mark.parametrize("damping", [1e-4, 1e-5])
    @pytest.mark.parametrize("seed", range(10))
    def test_errors_stay_at_rounding(self, damping: float, seed: int) -> None:
        v = gaussian(40, seed=seed).to(F32)
        x = hypergrad.nystrom_ihvp(
            self.problem.hvp(F32), v, rank=25, damping=damping, generator=generator(seed)
        )
        expected = dense_solve(self.problem.matrix, v, damping)
        assert relative_error(x, expected) <= 1e-4 + 3 * torch.finfo(F32).eps / damping

    @pytest.mark.parametrize("damping", [1e-4, 1e-6, 1e-8])
    def test_the_inverse_is_positive_definite_and_bounded(self, damping: float) -> None:
        made = hypergrad.nystrom_sketch(self.problem.matrix.to(F32), 25, generator=generator(0))
        inverse = made.solve_block(torch.eye(40, dtype=F64), damping)
        values = torch.linalg.eigvalsh(0.5 * (inverse + inverse.T))
        assert float(values[0]) > 0
        assert float(values[-1]) * damping <= 1 + 1e-10

    @pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")  # eight of 20 columns
    def test_a_singular_core_is_no_error(self) -> None:
        for seed in range(20):
            problem = symmetric(torch.linspace(1, 0.1, 5, dtype=F64), seed=seed, dead=15)
            x = hypergrad.nystrom_ihvp(
                problem.hvp(F32), gaussian(20).to(F32), rank=8, sketch="columns", damping=0.1,
                generator=generator(seed),
            )  # fmt: skip
            assert torch.isfinite(x).all()


def test_nan_raises_and_is_not_turned_into_zero() -> None:
    v = torch.tensor([1.0, float("nan")])
    for name, make in SOLVERS.items():
        with pytest.raises(hypergrad.NonFiniteError, match="v holds nan or inf"):
            hypergrad.solve(torch.eye(2), v, make(2), damping=0.1)
        assert name


def test_a_tolerance_that_is_not_reached_is_not_ignored() -> None:
    problem = symmetric(torch.logspace(0, -5, 60, dtype=F64), seed=1)
    with pytest.warns(hypergrad.ConvergenceWarning):
        _, info = hypergrad.cg_ihvp(
            problem.hvp(), gaussian(60), rtol=1e-10, max_iters=10, return_info=True
        )
    assert info.status is Status.MAX_ITERATIONS
