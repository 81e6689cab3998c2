"""The cases that SciPy keeps for its own iterative solvers, those it skips included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg._isolve.tests import test_iterative as scipys
from torch import Tensor

import hypergrad
from hypergrad import CG, MINRES, Status


def _dense(case: Any) -> np.ndarray:
    return case.A.toarray() if scipy.sparse.issparse(case.A) else np.asarray(case.A)


def _is_symmetric_and_real(case: Any) -> bool:
    matrix = _dense(case)
    # "nonsymposdef-F" is a real matrix that SciPy stores as a complex one.
    return np.isrealobj(matrix) and bool((matrix == matrix.T).all())


def _is_definite(case: Any) -> bool:
    return bool(np.linalg.eigvalsh(_dense(case).astype(np.float64))[0] > 0)


SYMMETRIC = [case for case in scipys.IterativeParams().cases if _is_symmetric_and_real(case)]
every_case = pytest.mark.parametrize("case", SYMMETRIC, ids=lambda case: case.name)


def system_of(case: Any) -> tuple[Any, Tensor, float]:
    """The matrix as SciPy made it, the right-hand side in its precision, SciPy's tolerance."""
    single = case.A.dtype == np.float32
    v = torch.from_numpy(case.b).to(torch.float32 if single else torch.float64)
    return case.A, v, 1e-2 if single else 1e-8


def true_relative_residual(case: Any, x: Tensor) -> float:
    residual = case.b - _dense(case).astype(np.float64) @ x.numpy().astype(np.float64)
    return float(np.linalg.norm(residual) / np.linalg.norm(case.b))


def test_the_cases_are_those_that_are_known() -> None:
    names = {case.name for case in SYMMETRIC}
    assert names >= {
        "poisson1d", "poisson1d-F", "neg-poisson1d", "neg-poisson1d-F", "poisson2d", "poisson2d-F",
        "rand-diag", "rand-diag-F", "rand-sym", "rand-sym-F", "rand-sym-pd", "rand-sym-pd-F",
        "sym-nonpd",
    }  # fmt: skip
    definite = {case.name for case in SYMMETRIC if _is_definite(case)}
    assert definite == {
        "poisson1d", "poisson1d-F", "poisson2d", "poisson2d-F", "rand-sym-pd", "rand-sym-pd-F",
    }  # fmt: skip


@every_case
def test_minres_converges(case: Any) -> None:
    matrix, v, rtol = system_of(case)
    solution = hypergrad.solve(matrix, v, MINRES(rtol=rtol), on_failure="raise")
    assert solution.info.status is Status.CONVERGED
    assert true_relative_residual(case, solution.value) <= rtol * (1 + 1e-4)


@every_case
def test_cg_converges_or_reports_negative_curvature(case: Any) -> None:
    matrix, v, rtol = system_of(case)
    solution = hypergrad.solve(matrix, v, CG(rtol=rtol), on_failure="ignore")
    if _is_definite(case):
        assert solution.info.status is Status.CONVERGED
        assert true_relative_residual(case, solution.value) <= rtol * (1 + 1e-4)
    else:
        assert solution.info.status is Status.NEGATIVE_CURVATURE
        assert isinstance(solution.info.direction, Tensor)
        direction = solution.info.direction.double().numpy()
        assert direction @ _dense(case).astype(np.float64) @ direction <= 1e-6


@every_case
@pytest.mark.parametrize("solver", [CG, MINRES])
def test_one_iteration_of_many_is_reported_as_too_few(case: Any, solver: Any) -> None:
    # SciPy's test_maxiter: rtol = 1e-12 is out of reach of one iteration.
    matrix, v, _ = system_of(case)
    info = hypergrad.solve(matrix, v, solver(rtol=1e-12, max_iters=1), on_failure="ignore").info
    assert info.status in (Status.MAX_ITERATIONS, Status.NEGATIVE_CURVATURE)
    assert info.iterations == 1


@every_case
def test_the_exact_solution_as_warm_start_needs_no_iteration(case: Any) -> None:
    matrix, v, rtol = system_of(case)
    x0 = torch.from_numpy(np.linalg.solve(_dense(case).astype(np.float64), case.b)).to(v.dtype)
    for solver in (CG(rtol=rtol), MINRES(rtol=rtol)):
        info = hypergrad.solve(matrix, v, solver, x0=x0).info
        assert info.status is Status.CONVERGED
        assert info.iterations == 0
