from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

import hypergrad
from hypergrad import Exact, Status
from hypergrad.solvers import memory
from tests.solvers.traced import UncheckedSystem, both_forms
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    Problem,
    dense_solve,
    gaussian,
    orthogonal,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)


@quick_and_thorough
@given(problem=problems(), seed=seeds)
def test_accurate_to_rounding_times_condition(effort: str, problem: Problem, seed: int) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, Exact())
    condition = problem.norm / float(problem.eigenvalues.abs().min())
    # Wilkinson's bound with a constant of a few times the dimension.
    bound = 10 * problem.n * torch.finfo(F64).eps * condition
    assert relative_error(solution.value, dense_solve(problem.matrix, v)) <= bound
    assert solution.info.status is Status.CONVERGED


@quick_and_thorough
@given(problem=problems(INDEFINITE), seed=seeds)
def test_indefinite_systems_are_solved_and_reported(
    effort: str, problem: Problem, seed: int
) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, Exact())
    smallest = float(problem.eigenvalues.min())
    assert solution.info.smallest_eigenvalue == pytest.approx(smallest, rel=1e-10)
    condition = problem.norm / float(problem.eigenvalues.abs().min())
    bound = 10 * problem.n * torch.finfo(F64).eps * condition
    assert relative_error(solution.value, dense_solve(problem.matrix, v)) <= bound


def test_the_smallest_eigenvalue_is_that_of_the_operator_without_damping() -> None:
    matrix = torch.diag(torch.tensor([3.0, -2.0], dtype=F64))
    info = hypergrad.solve(matrix, torch.ones(2, dtype=F64), Exact(), damping=0.5).info
    assert info.smallest_eigenvalue == pytest.approx(-2.0, rel=1e-14)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_singular_consistent_systems_get_the_solution_of_smallest_norm(
    seed: int, scale: float
) -> None:
    # Rounding leaves a last pivot of either sign, so that Cholesky succeeds half of the time.
    n = 2 + seed % 7
    basis = orthogonal(n, seed)
    eigenvalues = scale * torch.linspace(1.0, 0.5, n, dtype=F64)
    eigenvalues[-1] = 0.0
    matrix = (basis * eigenvalues) @ basis.T
    x = gaussian(n - 1, seed=seed) @ basis[:, :-1].T
    solution = hypergrad.solve(0.5 * (matrix + matrix.T), matrix @ x, Exact())
    assert solution.info.status is Status.CONVERGED
    assert relative_error(solution.value, x) <= 1e-12
    assert abs(float(basis[:, -1] @ solution.value)) <= 1e-12 * float(x.norm())


@pytest.mark.parametrize("seed", range(20))
def test_singular_inconsistent_systems_get_the_least_squares_solution_and_say_so(seed: int) -> None:
    n = 2 + seed % 7
    basis = orthogonal(n, seed)
    eigenvalues = torch.linspace(1.0, 0.5, n, dtype=F64)
    eigenvalues[-1] = 0.0
    matrix = (basis * eigenvalues) @ basis.T
    v = gaussian(n, seed=seed + 100)
    with pytest.warns(hypergrad.ConvergenceWarning):
        solution = hypergrad.solve(0.5 * (matrix + matrix.T), v, Exact())
    inverse = torch.where(eigenvalues > 0, 1.0 / eigenvalues, 0.0)
    assert solution.info.status is Status.STAGNATED
    assert relative_error(solution.value, (basis * inverse) @ basis.T @ v) <= 1e-12


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", [1e-6, 1e-4])
def test_a_small_damping_is_not_mistaken_for_rounding(dtype: torch.dtype, relative: float) -> None:
    # Outside the range of A the answer is v/damping, however small the damping is.
    for eigenvalues in (torch.zeros(50, dtype=F64), torch.full((50,), -1.0, dtype=F64)):
        eigenvalues[:25] = 1.0
        eigenvalues[-1] = 0.0
        problem = symmetric(eigenvalues, seed=2)
        v = problem.basis[:, -1].to(dtype)
        solution = hypergrad.solve(
            problem.hvp(dtype), v, Exact(), damping=relative, on_failure="ignore"
        )
        # Rounding A itself perturbs the damped eigenvalue by about eps.
        bound = 10 * torch.finfo(dtype).eps / relative
        assert relative_error(solution.value, v / relative) <= max(bound, 1e-9)


def test_the_zero_operator_without_damping() -> None:
    with pytest.warns(hypergrad.ConvergenceWarning):
        solution = hypergrad.solve(torch.zeros(3, 3), torch.ones(3), Exact())
    assert torch.equal(solution.value, torch.zeros(3))
    assert solution.info.relative_residual == pytest.approx(1.0)


def test_more_memory_than_allowed_is_refused_before_any_product() -> None:
    def hvp(v: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no product may be spent")

    with pytest.raises(hypergrad.OperatorTooLargeError, match=r"max_bytes=4800\)"):
        hypergrad.solve(hvp, torch.ones(10), Exact(max_bytes=1000))
    with pytest.raises(hypergrad.OperatorTooLargeError, match="needs 44703"):
        hypergrad.exact_ihvp(hvp, torch.ones(1_000_000))


def test_more_memory_than_is_free_is_refused_before_any_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hvp(v: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no product may be spent")

    monkeypatch.setattr("hypergrad.solvers.memory.free_bytes", lambda device: 4799)
    with pytest.raises(hypergrad.OperatorTooLargeError, match="cpu has free"):
        hypergrad.solve(hvp, torch.ones(10), Exact())
    for free in (4800, None):  # enough, and a device that does not say
        monkeypatch.setattr("hypergrad.solvers.memory.free_bytes", lambda device, free=free: free)
        assert hypergrad.solve(torch.eye(10), torch.ones(10), Exact()).info.converged


def test_the_memory_that_is_free_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:      7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(cpu) == 7 * 1024
    # A container may have less: its limit, less what is in use and not just cached files.
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert memory.free_bytes(cpu) == 7 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_bytes(cpu) == 2500
    # A system without any of these files still has a physical memory.
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert (memory.free_bytes(cpu) or 0) > 2**28
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_nothing_and_are_kept_to(chunk_size: int) -> None:
    sizes = []

    class Counting(hypergrad.LinearOperator):
        def _apply(self, block: torch.Tensor) -> torch.Tensor:
            sizes.append(len(block))
            return block @ matrix

    matrix, v = symmetric(torch.linspace(1.0, 2.0, 7, dtype=F64), seed=1).matrix, gaussian(7)
    operator = Counting(hypergrad.as_operator(matrix).layout)
    solution = hypergrad.solve(operator, v, Exact(chunk_size=chunk_size))
    assert relative_error(solution.value, dense_solve(matrix, v)) <= 1e-13
    assert max(sizes) == min(chunk_size, 7)
    assert sum(sizes) == solution.info.num_hvps == 8


def test_options_are_checked() -> None:
    for wrong in ({"fallback": "lu"}, {"chunk_size": 0}, {"max_bytes": 0}, {"rtol": -1.0}):
        with pytest.raises(hypergrad.SolverOptionError, match=next(iter(wrong))):
            Exact(**wrong)


@quick_and_thorough
@given(problem=problems(INDEFINITE), seed=seeds)
def test_ldl_is_as_accurate_on_indefinite_systems(effort: str, problem: Problem, seed: int) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, Exact(fallback="ldl"))
    condition = problem.norm / float(problem.eigenvalues.abs().min())
    bound = 10 * problem.n * torch.finfo(F64).eps * condition
    assert relative_error(solution.value, dense_solve(problem.matrix, v)) <= bound
    assert solution.info.converged


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("gap", [0.0, 1e-20, 1e-16, 1e-14, 1e-12, 1e-8, 1e-6])
@pytest.mark.parametrize("fallback", ["eigh", "ldl"])
@pytest.mark.parametrize("seed", range(5))
def test_near_singularity_the_true_residual_decides(
    dtype: torch.dtype, gap: float, fallback: Any, seed: int
) -> None:
    # Indefinite, with one eigenvalue of any closeness to zero and v partly along it.
    n = 12
    eigenvalues = torch.linspace(-1.0, 1.0, n, dtype=F64)
    eigenvalues[5] = gap
    problem = symmetric(eigenvalues, seed=seed)
    v = gaussian(n, seed=seed + 50).to(dtype)
    solution = hypergrad.solve(problem.hvp(dtype), v, Exact(fallback=fallback), on_failure="ignore")
    assert torch.isfinite(solution.value).all()
    outside = relative_residual(problem.matrix.to(dtype).to(F64), 0.0, solution.value, v)
    rounding = 50 * torch.finfo(dtype).eps * float(solution.value.norm() / v.norm())
    assert solution.info.relative_residual == pytest.approx(outside, rel=1e-6, abs=rounding)
    assert solution.info.converged == (solution.info.relative_residual <= 1e-5)
    if gap < torch.finfo(dtype).eps / 10:  # singular to rounding: least squares, not 1 / rounding
        assert float(solution.value.norm() / v.norm()) < 100
        assert solution.info.status is Status.STAGNATED


def test_ldl_leaves_a_positive_matrix_to_cholesky_and_a_singular_one_to_eigenvalues() -> None:
    v, solver = torch.tensor([2.0, 3.0, 0.0], dtype=F64), Exact(fallback="ldl")
    for diagonal, smallest in (
        ([1.0, 2.0, 3.0], None),
        ([1.0, -2.0, 3.0], None),
        ([1.0, -2.0, 0.0], -2.0),
        ([1.0, 2.0, 0.0], 0.0),
    ):
        matrix = torch.diag(torch.tensor(diagonal, dtype=F64))
        info = hypergrad.solve(matrix, v, solver).info
        assert info.converged
        assert info.smallest_eigenvalue == smallest


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("solver", [Exact(), Exact(chunk_size=5)])
def test_compiles_to_one_graph_with_the_same_answers(solver: Exact, start: bool) -> None:
    problem, b = symmetric(INDEFINITE["alternating"](12), seed=1), gaussian(3, 12, seed=2)
    x0 = dense_solve(problem.matrix, b[0], 0.3).expand(3, 12).clone() if start else None
    traced, plain = both_forms(solver, problem.matrix, b, 0.3, x0)
    torch.testing.assert_close(traced[0], plain[0], rtol=1e-12, atol=1e-12)
    assert float(traced[1].max()) <= 1e-12


def test_automatic_damping_cannot_be_compiled_and_says_so() -> None:
    system = UncheckedSystem(hypergrad.as_operator(torch.eye(2)), torch.ones(1, 2), "auto")
    with pytest.raises(hypergrad.SolverOptionError, match="compile"):
        Exact()._run_traced(system, None)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_asymmetry_is_refused_at_every_scale(scale: float) -> None:
    matrix = scale * torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=F64)
    with pytest.raises(hypergrad.NotSymmetricError, match=r"relative size 1\.9e-01"):
        hypergrad.solve(matrix, scale * torch.ones(2, dtype=F64), hypergrad.Exact())
    x = hypergrad.solve(matrix + matrix.T, scale * torch.ones(2, dtype=F64), hypergrad.Exact())
    assert x.info.converged
