from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import CG, Status
from hypergrad.solvers.base import DampedSystem
from tests.solvers.krylov_properties import (
    System,
    check_a_block_is_its_rows,
    check_leaf_order,
    check_scale_invariance,
    check_the_status_never_lies,
    definite_spectra,
    exponents,
    float64_trees,
    indefinite_systems,
    quietly,
)
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    Problem,
    cg_iterations,
    dense_solve,
    gaussian,
    generator,
    orthogonal,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
)

#: Spectra of condition number 10^p, by n and p.
CONDITIONED: dict[str, Any] = {
    "geometric": lambda n, p: torch.logspace(0, -p, n, dtype=F64),
    "linear": lambda n, p: torch.linspace(1.0, 10.0**-p, n, dtype=F64),
    "two clusters": lambda n, p: torch.cat(
        [
            torch.linspace(1.0, 0.9, n // 2, dtype=F64),
            10.0**-p * torch.linspace(2.0, 1.0, n - n // 2),
        ]
    ),
    "one small": lambda n, p: torch.cat(
        [torch.linspace(1.0, 0.5, n - 1, dtype=F64), torch.tensor([10.0**-p], dtype=F64)]
    ),
    "one large": lambda n, p: torch.cat(
        [torch.ones(1, dtype=F64), 10.0**-p * torch.linspace(2.0, 1.0, n - 1, dtype=F64)]
    ),
    "power law": lambda n, p: torch.arange(1, n + 1, dtype=F64) ** -(p / torch.tensor(n).log10()),
}


@pytest.mark.parametrize("spectrum", CONDITIONED)
@pytest.mark.parametrize("power", [1, 3, 6])
@pytest.mark.parametrize("rtol", [1e-5, 1e-9])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_reaches_its_tolerance_on_the_true_residual(
    spectrum: str, power: int, rtol: float, scale: float
) -> None:
    problem = symmetric(CONDITIONED[spectrum](60, power).to(F64), seed=power, scale=scale)
    v = gaussian(60, seed=9)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, rtol=rtol, return_info=True)
    assert info.status is Status.CONVERGED
    assert relative_residual(problem.matrix, 0.0, x, v) <= rtol * (1 + 1e-6)
    assert info.relative_residual <= rtol
    condition = float(problem.eigenvalues.max() / problem.eigenvalues.min())
    # Rounding delays CG; in exact arithmetic n iterations would do.
    assert info.iterations <= 2 * cg_iterations(condition, rtol)


@quick_and_thorough
@given(problem=problems(max_dim=20), seed=seeds, rtol=st.sampled_from([1e-2, 1e-5, 1e-8]))
def test_drawn_systems_reach_their_tolerance(
    effort: str, problem: Problem, seed: int, rtol: float
) -> None:
    v = gaussian(problem.n, seed=seed)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, rtol=rtol, return_info=True)
    assert info.status is Status.CONVERGED
    assert relative_residual(problem.matrix, 0.0, x, v) <= rtol * (1 + 1e-6)


@quick_and_thorough
@given(problem=problems(INDEFINITE, max_dim=16), seed=seeds)
def test_negative_curvature_is_reported_with_a_direction(
    effort: str, problem: Problem, seed: int
) -> None:
    v = gaussian(problem.n, seed=seed)
    solution = hypergrad.solve(problem.hvp(), v, CG(rtol=1e-9), on_failure="ignore")
    if solution.info.status is Status.CONVERGED:
        # CG may cross an indefinite spectrum without meeting it: then the answer must be right.
        assert relative_residual(problem.matrix, 0.0, solution.value, v) <= 1.1e-9
        assert solution.info.direction is None
        return
    assert solution.info.status is Status.NEGATIVE_CURVATURE
    direction = solution.info.direction
    assert isinstance(direction, Tensor)
    assert float(direction.norm()) == pytest.approx(1.0, rel=1e-12)
    rounding = 10 * problem.n * torch.finfo(F64).eps * problem.norm
    assert float(direction @ problem.matrix @ direction) <= rounding
    # The best iterate is never worse than zero.
    assert solution.info.relative_residual <= 1.0 + 1e-12


@pytest.mark.parametrize("dtype", [F32, F64])
def test_an_indefinite_operator_warns_and_raises(dtype: torch.dtype) -> None:
    problem = symmetric(INDEFINITE["alternating"](20), seed=1)
    v = gaussian(20, seed=2).to(dtype)
    with pytest.warns(hypergrad.ConvergenceWarning, match="not positive definite"):
        _, info = hypergrad.cg_ihvp(problem.hvp(dtype), v, return_info=True)
    assert info.status is Status.NEGATIVE_CURVATURE
    with pytest.raises(hypergrad.ConvergenceError) as caught:
        hypergrad.solve(problem.hvp(dtype), v, CG(), on_failure="raise")
    assert isinstance(caught.value.solution, hypergrad.Solution)
    assert caught.value.solution.info.direction is not None


def test_the_direction_has_the_structure_of_v() -> None:
    v = {"a": torch.ones(1, dtype=F64), "b": torch.ones((), dtype=F64)}
    with pytest.warns(hypergrad.ConvergenceWarning):
        _, info = hypergrad.cg_ihvp(lambda t: {"a": t["a"], "b": -t["b"]}, v, return_info=True)
    assert info.direction["b"].shape == ()
    assert float(info.direction["a"] ** 2 - info.direction["b"] ** 2) <= 1e-15


def test_damping_lifts_negative_curvature() -> None:
    problem = symmetric(INDEFINITE["one_negative"](20), seed=1)
    v = gaussian(20, seed=2)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, damping=0.6, rtol=1e-10, return_info=True)
    assert info.converged
    assert relative_error(x, dense_solve(problem.matrix, v, 0.6)) <= 1e-8
    _, info = hypergrad.cg_ihvp(problem.hvp(), v, damping="auto", return_info=True)
    assert info.converged
    assert info.damping == pytest.approx(0.75, rel=1e-6)


# Tests that must be able to fail ----------------------------------------------------------------


def test_too_few_iterations_say_so() -> None:
    problem = symmetric(CONDITIONED["geometric"](60, 6), seed=1)
    v = gaussian(60, seed=2)
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_iters was reached"):
        x, info = hypergrad.cg_ihvp(problem.hvp(), v, max_iters=5, return_info=True)
    assert info.status is Status.MAX_ITERATIONS
    assert info.iterations == 5
    assert relative_residual(problem.matrix, 0.0, x, v) > 1e-3
    outside = relative_residual(problem.matrix, 0.0, x, v)
    assert info.relative_residual == pytest.approx(outside, rel=1e-9)


def test_an_unattainable_tolerance_stagnates_at_the_attainable_residual() -> None:
    problem = symmetric(CONDITIONED["geometric"](40, 3), seed=1)
    v = gaussian(40, seed=2).to(F32)
    with pytest.warns(hypergrad.ConvergenceWarning, match="stopped falling"):
        x, info = hypergrad.cg_ihvp(problem.hvp(F32), v, rtol=1e-12, return_info=True)
    assert info.status is Status.STAGNATED
    stored = problem.matrix.to(F32).to(F64)
    # Condition number 1e3 and float32: no residual below eps |A||x|/|v|, and none far above it.
    assert relative_residual(stored, 0.0, x, v) <= 10 * torch.finfo(F32).eps * 1e3
    assert info.iterations < 1000


def test_an_inconsistent_singular_system_is_a_failure() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64))
    with pytest.warns(hypergrad.ConvergenceWarning):
        x, info = hypergrad.cg_ihvp(matrix, torch.ones(3, dtype=F64), return_info=True)
    assert info.status.failed
    assert torch.isfinite(x).all()
    assert float(x.norm()) < 10.0


# Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_singular_consistent_system_gets_the_solution_of_smallest_norm(seed: int) -> None:
    eigenvalues = torch.linspace(1.0, 0.1, 12, dtype=F64)
    eigenvalues[6:] = 0.0
    problem = symmetric(eigenvalues, seed=seed)
    expected = problem.basis[:, :6] @ gaussian(6, seed=seed)
    x, info = hypergrad.cg_ihvp(
        problem.hvp(), problem.matrix @ expected, rtol=1e-10, return_info=True
    )
    assert info.converged
    assert relative_error(x, expected) <= 1e-8


def test_the_larger_of_both_tolerances_counts() -> None:
    problem = symmetric(CONDITIONED["geometric"](40, 4), seed=1)
    v = 1e3 * gaussian(40, seed=2)
    norm = float(v.norm())
    absolute = hypergrad.solve(problem.hvp(), v, CG(rtol=0.0, atol=1e-3 * norm)).info
    both = hypergrad.solve(problem.hvp(), v, CG(rtol=1e-3, atol=1e-8 * norm)).info
    assert absolute.status is both.status is Status.CONVERGED
    assert absolute.iterations == both.iterations
    assert 0 < absolute.residual_norm <= 1e-3 * norm
    generous = hypergrad.solve(problem.hvp(), v, CG(atol=2 * norm)).info
    assert generous.iterations == 0
    assert generous.converged


@pytest.mark.parametrize("count", [1, 4, 10])
def test_a_fixed_number_of_iterations_is_no_failure(count: int) -> None:
    problem = symmetric(CONDITIONED["geometric"](40, 4), seed=1)
    v = gaussian(40, seed=2)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, rtol=0.0, max_iters=count, return_info=True)
    assert info.status is Status.FIXED_ITERATIONS
    assert info.iterations == count
    assert not info.converged
    # By theory: the minimiser of the A-norm of the error over the Krylov space.
    q = (v / v.norm())[:, None]
    for _ in range(count - 1):
        q = torch.linalg.qr(torch.cat([q, problem.matrix @ q[:, -1:]], 1))[0]
    expected = q @ torch.linalg.solve(q.T @ problem.matrix @ q, q.T @ v)
    # Later on the residuals lose their orthogonality, as fast as the processor's rounding has it.
    assert relative_error(x, expected) <= 1e-11


def test_a_warm_start_at_the_solution_needs_no_iteration() -> None:
    problem = symmetric(CONDITIONED["geometric"](20, 3), seed=1)
    v = gaussian(20, seed=2)
    x0 = dense_solve(problem.matrix, v)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, x0=x0, return_info=True)
    assert info.iterations == 0
    assert info.num_hvps == 1
    assert info.converged
    assert torch.equal(x, x0)


def test_a_good_warm_start_saves_iterations() -> None:
    problem = symmetric(CONDITIONED["geometric"](60, 4), seed=1)
    v = gaussian(60, seed=2)
    x0 = dense_solve(problem.matrix, v) * (1 + 1e-4)
    cold = hypergrad.solve(problem.hvp(), v, CG()).info
    warm = hypergrad.solve(problem.hvp(), v, CG(), x0=x0).info
    assert warm.iterations < cold.iterations


def test_a_bad_warm_start_still_converges() -> None:
    problem = symmetric(CONDITIONED["linear"](30, 2), seed=1)
    v = gaussian(30, seed=2)
    x, info = hypergrad.cg_ihvp(problem.hvp(), v, x0=1e6 * gaussian(30, seed=3), return_info=True)
    assert info.converged
    assert relative_residual(problem.matrix, 0.0, x, v) <= 1.01e-5


class TestPreconditioner:
    problem = symmetric(CONDITIONED["geometric"](60, 5), seed=1)
    v = gaussian(60, seed=2)

    def info(self, preconditioner: Any) -> hypergrad.SolveInfo:
        solver = CG(rtol=1e-8, preconditioner=preconditioner)
        solution = hypergrad.solve(self.problem.hvp(), self.v, solver)
        assert relative_residual(self.problem.matrix, 0.0, solution.value, self.v) <= 1.01e-8
        return solution.info

    def test_the_identity_changes_nothing(self) -> None:
        assert self.info(lambda r: r).iterations == self.info(None).iterations

    def test_a_multiple_of_the_identity_changes_nothing(self) -> None:
        assert self.info(lambda r: 2.0**-160 * r).iterations == self.info(None).iterations

    def test_the_exact_inverse_needs_one_iteration(self) -> None:
        # One more where rounding at condition number 1e5 leaves more than 1e-8.
        assert self.info(torch.linalg.inv(self.problem.matrix)).iterations <= 2

    def test_products_with_it_are_not_counted_as_hvps(self) -> None:
        info = self.info(torch.linalg.inv(self.problem.matrix))
        assert info.num_hvps <= info.iterations + 2

    @pytest.mark.parametrize("rank", [10, 30, 50])
    def test_a_sketch_needs_as_many_iterations_as_its_condition_number_allows(
        self, rank: int
    ) -> None:
        damping = 1e-4
        sketch = hypergrad.nystrom_sketch(
            self.problem.hvp(), rank, like=self.v, generator=generator(0)
        )
        inverse = sketch.preconditioner(damping).to_dense()
        damped = self.problem.matrix + damping * torch.eye(60, dtype=F64)
        values = torch.linalg.eigvals(inverse @ damped).real
        condition = float(values.max() / values.min())
        solver = CG(rtol=1e-8, preconditioner=sketch.preconditioner(damping))
        info = hypergrad.solve(self.problem.hvp(), self.v, solver, damping=damping).info
        assert info.converged
        plain = hypergrad.solve(self.problem.hvp(), self.v, CG(rtol=1e-8), damping=damping).info
        assert info.iterations < plain.iterations
        # The bound is on the preconditioned norm: the damped condition is the price of the other.
        assert info.iterations <= cg_iterations(condition, 1e-8 / 1e4)

    @pytest.mark.parametrize("sign", [-1.0, 0.0])
    def test_one_that_is_not_positive_definite_is_refused(self, sign: float) -> None:
        with pytest.raises(hypergrad.PreconditionerError, match="symmetric positive definite"):
            hypergrad.cg_ihvp(self.problem.hvp(), self.v, preconditioner=lambda r: sign * r)

    def test_one_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(hypergrad.NonFiniteError, match="output of the preconditioner"):
            hypergrad.cg_ihvp(self.problem.hvp(), self.v, preconditioner=lambda r: r * float("inf"))

    def test_it_may_act_on_trees(self) -> None:
        v = {"a": torch.ones(2), "b": torch.ones(())}
        scales = {"a": torch.tensor([1.0, 100.0]), "b": torch.tensor(1e4)}

        def times(t: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: scales[key] * t[key] for key in t}

        def over(t: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: t[key] / scales[key] for key in t}

        _, info = hypergrad.cg_ihvp(times, v, preconditioner=over, return_info=True)
        assert info.iterations == 1


def test_steep_conditioning_and_refreshes_in_a_batch() -> None:
    problem = symmetric(CONDITIONED["geometric"](80, 6), seed=1)
    rows = gaussian(4, 80, seed=2)
    rows[0] = problem.basis[:, 0]
    solution = hypergrad.solve(problem.hvp(), rows, CG(rtol=1e-10), batched=True)
    assert solution.info.converged
    iterations = [column.iterations for column in solution.info.columns]
    assert iterations[0] == 1
    assert max(iterations) > 100  # refreshed every 50
    for x, v in zip(solution.value, rows, strict=True):
        assert relative_residual(problem.matrix, 0.0, x, v) <= 1.01e-10


def test_bfloat16_products_with_a_float32_recurrence() -> None:
    basis = orthogonal(20, 1)
    matrix = ((basis * torch.linspace(1.0, 0.2, 20, dtype=F64)) @ basis.T).to(torch.bfloat16)
    v = gaussian(20, seed=2).to(torch.bfloat16)
    x, info = hypergrad.cg_ihvp(matrix, v, rtol=3e-2, return_info=True)
    assert info.converged
    stored = matrix.to(F64)
    assert relative_residual(0.5 * (stored + stored.T), 0.0, x, v) <= 6e-2


# Properties -------------------------------------------------------------------------------------


def make(rtol: float) -> hypergrad.Solver:
    return CG(rtol=rtol)


@quick_and_thorough
@given(system=indefinite_systems)
def test_the_status_never_lies(effort: str, system: System) -> None:
    check_the_status_never_lies(system, make)


@quick_and_thorough
@given(system=indefinite_systems, of_v=exponents, of_a=exponents)
def test_scales_do_not_matter(effort: str, system: System, of_v: int, of_a: int) -> None:
    check_scale_invariance(system, make, of_v, of_a)


@quick_and_thorough
@given(like=float64_trees, spectrum=definite_spectra, seed=seeds)
def test_the_order_of_leaves_does_not_matter(
    effort: str, like: Any, spectrum: str, seed: int
) -> None:
    check_leaf_order(like, spectrum, seed, make)


@quick_and_thorough
@given(system=indefinite_systems)
def test_a_block_is_its_rows(effort: str, system: System) -> None:
    check_a_block_is_its_rows(system, make)


def test_negative_curvature_in_the_iteration_of_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    # All rows that were due are finished: nothing is left to check, and no product of nothing made.
    for where in ("krylov", "cg_one"):
        monkeypatch.setattr(f"hypergrad.solvers.{where}.REFRESH", 1)
    signs = torch.tensor([1.0, -1.0], dtype=F64)
    rows = torch.ones(2, 2, dtype=F64)
    for v, batched in ((rows[0], False), (rows, True)):
        info = quietly(lambda u: signs * u, v, CG(), batched=batched).info
        assert info.status is Status.NEGATIVE_CURVATURE


# A fixed number of iterations -------------------------------------------------------------------


@pytest.mark.parametrize("solver", [CG, hypergrad.MINRES])
@pytest.mark.parametrize("spectrum", ["geometric", "one small"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("count", [3, 60])
def test_the_traceable_form_is_the_eager_one(
    solver: Any, spectrum: str, preconditioned: bool, count: int
) -> None:
    problem = symmetric(CONDITIONED[spectrum](30, 3).to(F64), seed=1)
    rows = gaussian(4, 30, seed=2)
    rows[1] = 0.0
    weights = torch.linspace(1.0, 2.0, 30, dtype=F64)
    config = solver(
        rtol=0.0,
        max_iters=count,
        preconditioner=(lambda r: weights * r) if preconditioned else None,
    )
    eager = hypergrad.solve(problem.hvp(), rows, config, damping=1e-3, batched=True)
    operator = hypergrad.as_operator(problem.hvp(), like=rows[0])
    system = DampedSystem(operator, rows, torch.ones(4, dtype=F64), 1e-3)
    x, norms = config._run_traced(system, None)
    # solve() scales by powers of two, which is exact.
    torch.testing.assert_close(x, eager.value, rtol=1e-12, atol=1e-12)
    expected = torch.tensor([c.residual_norm for c in eager.info.columns], dtype=F64)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", [CG, hypergrad.MINRES])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e-32), (F32, 1e32), (F64, 1e-200), (F64, 1e200), (torch.bfloat16, 1e32)],
)
def test_one_graph_at_the_ends_of_the_range(solver: Any, dtype: torch.dtype, scale: float) -> None:
    """Squares of float32's numbers are within float64's range; of others they leave their own."""
    problem = symmetric(CONDITIONED["geometric"](10, 2).to(F64), seed=1)
    matrix = (scale * problem.matrix).to(dtype)
    v = gaussian(10, seed=2).to(dtype)
    config = solver(rtol=0.0, max_iters=6)

    def solved(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = hypergrad.solve(matrix, v, config, damping=1e-2 * scale, on_failure="ignore")
        return found.value, torch.as_tensor(found.info.relative_residual)

    expected, residual = solved(matrix, v)
    torch._dynamo.reset()
    with torch.no_grad():
        found, again = torch.compile(solved, fullgraph=True, backend="eager")(matrix, v)
    eps = torch.finfo(dtype).eps
    found, expected = found.to(F64) * scale, expected.to(F64) * scale  # near to one
    assert expected.isfinite().all()
    assert expected.norm() > 0.1
    assert (found - expected).norm() <= 1e3 * eps * expected.norm()
    torch.testing.assert_close(again.to(F64), residual.to(F64), rtol=0.1, atol=1e2 * eps)


def test_the_traceable_form_needs_a_fixed_amount_of_work() -> None:
    operator = hypergrad.as_operator(torch.eye(3))
    for solver in (CG(), hypergrad.MINRES(), CG(rtol=0.0, max_iters=3)):
        system = DampedSystem(operator, torch.ones(1, 3).double(), torch.ones(1), "auto")
        with pytest.raises(hypergrad.SolverOptionError, match=r"torch\.compile"):
            solver._run_traced(system, None)


@pytest.mark.parametrize("solver", [CG, hypergrad.MINRES])
def test_far_more_iterations_than_needed_do_no_harm(solver: Any) -> None:
    problem = symmetric(CONDITIONED["two clusters"](12, 2).to(F64), seed=1)
    v = gaussian(12, seed=2)
    info = hypergrad.solve(problem.hvp(), v, solver(rtol=0.0, max_iters=400)).info
    assert info.status is Status.FIXED_ITERATIONS
    assert info.iterations == 400
    assert info.relative_residual <= 1e-13


@pytest.mark.parametrize("count", [1, 5, 80])
def test_negative_curvature_in_a_fixed_number_of_iterations(count: int) -> None:
    indefinite = symmetric(INDEFINITE["alternating"](20), seed=1).matrix
    matrix = torch.zeros(21, 21, dtype=F64)
    matrix[:20, :20], matrix[20, 20] = indefinite, 2.0
    rows = gaussian(3, 21, seed=2)
    # A positive eigenvector: solved, whatever the others meet.  Without rounding, for of a residual
    # of noise the next step meets negative curvature, or does not, as the processor has it.
    rows[1] = torch.eye(21, dtype=F64)[-1]
    solution = quietly(matrix, rows, CG(rtol=0.0, max_iters=count), batched=True)
    for v, x, column in zip(rows, solution.value, solution.info.columns, strict=True):
        outside = relative_residual(matrix, 0.0, x, v)
        assert column.relative_residual == pytest.approx(outside, rel=1e-6, abs=1e-12)
        assert (column.direction is not None) == (column.status is Status.NEGATIVE_CURVATURE)
        if column.direction is not None:
            curvature = column.direction @ matrix @ column.direction
            assert float(curvature) <= 1e-12
            assert column.iterations <= count
            assert column.relative_residual <= 1.0 + 1e-12  # the best iterate, not the last
    statuses = [column.status for column in solution.info.columns]
    assert statuses[1] in (Status.FIXED_ITERATIONS, Status.CONVERGED)
    if count == 80:
        assert statuses[0] is statuses[2] is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("power", [-600, -200, 200, 600])
def test_a_preconditioner_of_any_scale(power: int) -> None:
    problem = symmetric(CONDITIONED["geometric"](30, 3).to(F64), seed=1)
    v = gaussian(30, seed=2)
    for config in (CG(rtol=1e-8), CG(rtol=0.0, max_iters=20)):
        plain = hypergrad.solve(problem.hvp(), v, config)
        solver = replace(config, preconditioner=lambda r: 2.0**power * r)
        scaled = hypergrad.solve(problem.hvp(), v, solver)
        assert scaled.info.iterations == plain.info.iterations
        assert relative_error(scaled.value, plain.value) <= 1e-8


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e200])
def test_operators_of_any_scale(factor: float) -> None:
    problem = symmetric(CONDITIONED["geometric"](30, 3).to(F64), seed=1)
    v = gaussian(30, seed=2)
    for solver in (CG(rtol=1e-8), hypergrad.MINRES(rtol=1e-8)):
        plain = hypergrad.solve(problem.hvp(), v, solver)
        scaled = hypergrad.solve(lambda u: factor * (problem.matrix @ u), v, solver)
        assert scaled.info.converged
        assert relative_error(scaled.value * factor, plain.value) <= 1e-4


def test_a_skew_part_is_refused() -> None:
    matrix = torch.eye(10, dtype=F64) + torch.triu(gaussian(10, 10, seed=1)) / 3
    for solver in (CG(), CG(rtol=0.0, max_iters=5)):
        with pytest.raises(hypergrad.NotSymmetricError):
            hypergrad.solve(matrix, gaussian(10, seed=2), solver)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_a_fixed_number_of_iterations_refuses_a_bad_preconditioner(sign: float) -> None:
    solver = CG(rtol=0.0, max_iters=5, preconditioner=lambda r: sign * r)
    with pytest.raises(hypergrad.PreconditionerError, match="symmetric positive definite"):
        hypergrad.solve(torch.eye(3), torch.ones(3), solver)
