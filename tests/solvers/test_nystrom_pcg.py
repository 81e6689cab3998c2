from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from hypergrad import CG, NystromPCG, Status
from tests.solvers.krylov_properties import (
    Make,
    System,
    check_a_block_is_its_rows,
    check_leaf_order,
    check_scale_invariance,
    check_the_status_never_lies,
    damped_systems,
    definite_spectra,
    exponents,
    float64_trees,
    quietly,
)
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SINGULAR,
    SPECTRA,
    dense_solve,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)


def of_rank(rank: int) -> Make:
    return lambda rtol: NystromPCG(rank=rank, rtol=rtol, generator=generator(0))


def half_of(n: int) -> Make:
    return of_rank(max(1, n // 2))


# Properties -------------------------------------------------------------------------------------


@quick_and_thorough
@given(system=damped_systems)
def test_the_status_never_lies(effort: str, system: System) -> None:
    check_the_status_never_lies(system, half_of(system.problem.n))


@quick_and_thorough
@given(system=damped_systems, of_v=exponents, of_a=exponents)
def test_scales_do_not_matter(effort: str, system: System, of_v: int, of_a: int) -> None:
    check_scale_invariance(system, half_of(system.problem.n), of_v, of_a, exact=False)


@quick_and_thorough
@given(like=float64_trees, spectrum=definite_spectra, seed=seeds)
def test_the_order_of_leaves_does_not_matter(
    effort: str, like: Any, spectrum: str, seed: int
) -> None:
    check_leaf_order(like, spectrum, seed, of_rank(2), damping=0.1)


@quick_and_thorough
@given(system=damped_systems)
def test_a_block_is_its_rows(effort: str, system: System) -> None:
    check_a_block_is_its_rows(system, half_of(system.problem.n))


# How many iterations ----------------------------------------------------------------------------

N, RANK = 1000, 100
INDEX = torch.arange(1, N + 1, dtype=F64)
#: Eigenvalues from 1 to 1e-6.
STEEP: dict[str, Tensor] = {
    # 100 outliers down to 1e-3, or all the way to the flat tail.
    "100 outliers": torch.where(INDEX <= 100, 10.0 ** (-3 * (INDEX - 1) / 99), 1e-6),
    "100 outliers, no gap": torch.where(INDEX <= 100, 10.0 ** (-5 * (INDEX - 1) / 99), 1e-6),
    # 1/i would have the condition number 1e3 at this dimension: its power that has 1e6.
    "power of 1/i": INDEX**-2.0,
}


def pcg_and_cg(values: Tensor, seed: int) -> tuple[hypergrad.SolveInfo, hypergrad.SolveInfo]:
    v = gaussian(N, seed=seed)
    solver = NystromPCG(rank=RANK, generator=generator(seed))
    # Diagonal: a Gaussian sketch and a Gaussian v do not see in which basis.
    ours = hypergrad.solve(lambda u: values * u, v, solver, damping=1e-6).info
    plain = hypergrad.solve(lambda u: values * u, v, CG(), damping=1e-6).info
    return ours, plain


@pytest.mark.parametrize("spectrum", STEEP)
@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_the_iterations_of_cg(spectrum: str, seed: int) -> None:
    ours, plain = pcg_and_cg(STEEP[spectrum], seed)
    assert ours.converged
    assert plain.converged
    assert ours.iterations <= 0.25 * plain.iterations


def test_nearly_as_good_as_exact_eigenvectors() -> None:
    # On 1/i itself CG is quick (condition number 1e3), and even the 100 leading eigenvectors only
    # just quarter its iterations: 18 of 74.
    values = 1.0 / INDEX
    ours, plain = pcg_and_cg(values, 0)
    weights = torch.where(INDEX <= RANK, (values[RANK - 1] + 1e-6) / (values + 1e-6), 1.0)
    solver = CG(preconditioner=lambda r: weights * r)
    ideal = hypergrad.solve(lambda u: values * u, gaussian(N), solver, damping=1e-6).info
    assert ours.iterations <= 2 * ideal.iterations
    assert ours.iterations <= 0.5 * plain.iterations
    assert ideal.iterations > 0.2 * plain.iterations


@pytest.mark.parametrize("rank", [5, 20, 60])
@pytest.mark.parametrize("spectrum", ["exponential", "outliers"])
def test_every_product_is_counted(rank: int, spectrum: str) -> None:
    problem = symmetric(SPECTRA[spectrum](60), seed=1)
    calls = [0]

    def hvp(u: Tensor) -> Tensor:
        calls[0] += 1
        return problem.matrix @ u

    solver = NystromPCG(rank=rank, generator=generator(0))
    info = hypergrad.solve(hvp, gaussian(60), solver, damping=1e-3).info
    assert info.num_hvps == calls[0] > info.iterations + rank
    assert info.rank is not None
    assert info.rank <= rank


# Right answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [*POSITIVE, *SINGULAR])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_agrees_with_the_dense_solve(spectrum: str, dtype: torch.dtype, sketch: Any) -> None:
    problem = symmetric(SPECTRA[spectrum](40), seed=1)
    v, damping = gaussian(40, seed=2).to(dtype), 1e-2
    rtol = 1e-10 if dtype == F64 else 1e-5
    solver = NystromPCG(rank=10, rtol=rtol, sketch=sketch, generator=generator(0))
    solution = quietly(problem.hvp(dtype), v, solver, damping=damping)
    assert solution.info.status is Status.CONVERGED
    stored = problem.matrix.to(dtype).to(F64)
    assert relative_residual(stored, damping, solution.value, v) <= 1.1 * rtol
    assert relative_error(solution.value, dense_solve(stored, v, damping)) <= 101 * rtol


def test_the_automatic_damping_is_the_sketch_s() -> None:
    problem = symmetric(SPECTRA["exponential"](40), seed=1)
    v = gaussian(40, seed=2)
    sketch = hypergrad.nystrom_sketch(problem.hvp(), 10, like=v, generator=generator(0))
    choices: tuple[None, Literal["auto"]] = (None, "auto")
    for damping in choices:
        solver = NystromPCG(rank=10, generator=generator(0))
        info = hypergrad.solve(problem.hvp(), v, solver, damping=damping).info
        assert info.converged
        assert info.damping == sketch.auto_damping()


@pytest.mark.parametrize("spectrum", ["alternating", "negative"])
def test_negative_curvature_is_reported(spectrum: str) -> None:
    problem = symmetric(INDEFINITE[spectrum](30), seed=1)
    v = gaussian(30, seed=2)
    with pytest.warns(hypergrad.ConvergenceWarning, match="not positive definite"):
        _, info = hypergrad.nystrom_pcg_ihvp(
            problem.hvp(), v, rank=10, damping=1e-3, generator=generator(0), return_info=True
        )
    assert info.status is Status.NEGATIVE_CURVATURE
    direction = info.direction
    assert isinstance(direction, Tensor)
    assert float(direction @ problem.matrix @ direction) + 1e-3 <= 1e-12
    assert info.smallest_eigenvalue < 0
    lifted = hypergrad.solve(
        problem.hvp(), v, NystromPCG(rank=10, generator=generator(0)), damping=1.5
    ).info
    assert lifted.converged


def test_many_right_hand_sides_share_one_sketch() -> None:
    problem = symmetric(SPECTRA["exponential"](40), seed=1)
    rows = gaussian(6, 40, seed=2)
    rows[1] = 0.0
    solver = NystromPCG(rank=15, rtol=1e-9, generator=generator(0))
    solution = hypergrad.solve(problem.hvp(), rows, solver, damping=1e-5, batched=True)
    assert solution.info.converged
    for row, x in zip(rows, solution.value, strict=True):
        assert relative_residual(problem.matrix, 1e-5, x, row) <= 1.01e-9
    one = hypergrad.solve(
        problem.hvp(), rows[0], NystromPCG(rank=15, rtol=1e-9, generator=generator(0)), damping=1e-5
    ).info
    steps = sum(column.iterations for column in solution.info.columns)
    assert solution.info.num_hvps <= (one.num_hvps - one.iterations) + steps + 4 * 6


def test_warm_starts_and_fixed_iterations() -> None:
    problem = symmetric(SPECTRA["exponential"](40), seed=1)
    v = gaussian(40, seed=2)
    exact = dense_solve(problem.matrix, v, 1e-3)
    x, info = hypergrad.nystrom_pcg_ihvp(
        problem.hvp(), v, rank=5, damping=1e-3, x0=exact, generator=generator(0), return_info=True
    )
    assert info.iterations == 0
    assert torch.equal(x, exact)
    solver = NystromPCG(rank=5, rtol=0.0, max_iters=4, generator=generator(0))
    info = hypergrad.solve(problem.hvp(), v, solver, damping=1e-3).info
    assert (info.status, info.iterations) == (Status.FIXED_ITERATIONS, 4)


# Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, None, "most"])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    with pytest.raises(hypergrad.RankError):
        NystromPCG(rank=rank)


def test_a_rank_above_the_dimension_is_refused() -> None:
    with pytest.raises(hypergrad.RankError):
        hypergrad.nystrom_pcg_ihvp(torch.eye(3), torch.ones(3), rank=4, damping=1.0)


def test_damping_must_be_positive() -> None:
    with pytest.raises(hypergrad.DampingError):
        hypergrad.nystrom_pcg_ihvp(torch.eye(3), torch.ones(3), rank=2, damping=0.0)


@pytest.mark.parametrize("options", [{"rtol": -1.0}, {"sketch": "none"}, {"generator": 3}])
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError):
        NystromPCG(rank=2, **options)


@pytest.mark.parametrize("tail", [0.0, 1e-9])
@pytest.mark.parametrize("damping", [1e-7, 1e-8])
def test_rounding_is_not_taken_for_an_operator_that_is_not_symmetric(
    damping: float, tail: float
) -> None:
    # The directions of a preconditioned recurrence lie where A is small: below a damping of
    # eps |A|, what float32 products hold of it there is rounding, which has no symmetry.
    values = torch.full((50,), tail, dtype=F64)
    values[:16] = 1.0
    matrix = symmetric(values).matrix.to(F32)
    v = gaussian(50).to(F32)
    sketch = hypergrad.nystrom_sketch(matrix, 21, damping=damping, generator=generator(0))
    inverse = sketch.preconditioner(damping)
    for solver in (
        NystromPCG(21, generator=generator(0), max_iters=60),
        CG(preconditioner=inverse, max_iters=60),
        CG(rtol=0.0, preconditioner=inverse, max_iters=5),
        hypergrad.MINRES(preconditioner=inverse, max_iters=60),
    ):
        info = quietly(matrix, v, solver, damping=damping).info
        # Of a fixed number of CG iterations the last is returned, whatever its residual.
        assert info.relative_residual <= 1.0 or solver.rtol == 0.0, solver


@pytest.mark.parametrize("solver", [CG, hypergrad.MINRES])
def test_an_operator_that_is_not_symmetric_is_found_with_a_preconditioner(solver: Any) -> None:
    matrix = symmetric(torch.logspace(0, -1, 50, dtype=F64)).matrix
    sketch = hypergrad.nystrom_sketch(matrix, 10, damping=0.1, generator=generator(0))
    skewed = matrix + 0.3 * torch.triu(matrix, 1)
    configured = solver(preconditioner=sketch.preconditioner(0.1))
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(skewed, gaussian(50), configured, damping=0.1)


def test_a_preconditioner_is_positive_definite_at_any_damping() -> None:
    # (L + damping)^-1 (l + damping) next to one: 1e-8, less than float32 adds to one.
    matrix = symmetric(1.0 / torch.arange(1.0, 51.0, dtype=F64)).matrix.to(torch.bfloat16)
    v = gaussian(50).to(torch.bfloat16)
    for damping in (1e-6, 1e-7, 1e-8):
        for rank in (50, "auto"):
            solver = NystromPCG(rank, generator=generator(0), max_iters=60)
            quietly(matrix, v, solver, damping=damping)
    sketch = hypergrad.nystrom_sketch(
        symmetric(torch.ones(20, dtype=F64)).matrix, 20, generator=generator(0)
    )
    r = gaussian(5, 20).to(F64)
    assert bool(((sketch.preconditioner(1e-18)._apply(r) * r).sum(1) > 0).all())
