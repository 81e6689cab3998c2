from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Nystrom, NystromPCG, ReusedSketch, Status
from tests.strategies import F64, dense_solve, gaussian, generator, orthogonal, relative_error

N = 60
BASIS = orthogonal(N)
DECAY = torch.logspace(0, -5, N, dtype=F64)
V = gaussian(N, seed=1)
#: A rotation's logarithm, of norm about one.
TURN = (gaussian(N, N, seed=2) - gaussian(N, N, seed=2).T) / (2 * N**0.5)


def moved(time: float) -> Tensor:
    """The operator after its eigenvectors have turned for a while."""
    basis = torch.matrix_exp(time * TURN) @ BASIS
    matrix = (basis * DECAY) @ basis.T
    return 0.5 * (matrix + matrix.T)


def direct(rank: int = 40, **options: Any) -> ReusedSketch:
    return ReusedSketch(Nystrom(rank, generator=generator(0)), **options)


def preconditioned(rank: int = 40, **options: Any) -> ReusedSketch:
    return ReusedSketch(NystromPCG(rank, rtol=1e-8, generator=generator(0)), **options)


def cost(info: hypergrad.SolveInfo) -> int:
    """The products that went into a sketch."""
    assert info.sketch_hvps is not None
    return info.sketch_hvps


def solved(carried: ReusedSketch, time: float, **options: Any) -> hypergrad.SolveInfo:
    options = {"damping": 1e-2} | options
    return hypergrad.solve(moved(time), V, carried, **options).info


@pytest.mark.parametrize("make", [direct, preconditioned])
def test_a_still_operator_is_sketched_once(make: Any) -> None:
    carried = make()
    first = solved(carried, 0.0)
    assert first.sketch_hvps == carried.sketch.num_hvps > 40
    assert "a sketch was made" in str(first.reason)
    for count in range(1, 4):
        info = solved(carried, 0.0)
        assert info.sketch_hvps == 0
        assert info.num_hvps == first.num_hvps - cost(first)
        assert info.relative_residual == pytest.approx(first.relative_residual, rel=1e-6)
        assert carried.age == count
        assert f"the sketch of {count} solves ago served" in str(info.reason)
    assert carried.num_refreshes == 0


def test_the_first_solve_is_that_of_the_solver_itself() -> None:
    plain = hypergrad.solve(moved(0.0), V, Nystrom(40, generator=generator(0)), damping=1e-2)
    carried = hypergrad.solve(moved(0.0), V, direct(), damping=1e-2)
    assert torch.equal(plain.value, carried.value)
    assert plain.info.num_hvps == carried.info.num_hvps


def test_a_residual_above_the_bound_refreshes_at_once() -> None:
    carried = direct(max_residual=0.1)
    assert solved(carried, 0.0).converged
    kept = solved(carried, 0.001)
    assert kept.converged
    assert kept.sketch_hvps == 0
    info = solved(carried, 0.5)
    # Converged within the bound again, after one more sketch, whose cost is told.
    assert info.converged
    assert info.status is Status.CONVERGED
    assert info.relative_residual <= 0.1
    assert cost(info) > 0
    assert info.num_hvps == cost(info) + 2  # and one look at each answer
    assert carried.num_refreshes == 1
    assert carried.age == 0
    assert "after a relative residual of" in str(info.reason)
    assert solved(carried, 0.5).sketch_hvps == 0
    # The stated bound is what decides.
    patient = direct(max_residual=1e6)
    for time in (0.0, 0.5, 1.0):
        info = solved(patient, time)
    assert info.sketch_hvps == 0
    assert patient.num_refreshes == 0


def test_an_update_comes_first_and_a_new_sketch_where_it_does_not_serve() -> None:
    carried = direct(max_residual=0.05)
    solved(carried, 0.0)
    info = solved(carried, 0.1)
    assert "a sketch was updated" in str(info.reason)
    # Another operator altogether: its eigenvectors are nowhere in the old basis.
    other = orthogonal(N, seed=5)
    matrix = (other * DECAY) @ other.T
    info = hypergrad.solve(0.5 * (matrix + matrix.T), V, carried, damping=1e-2).info
    assert info.converged
    assert cost(info) >= 40


def test_a_rank_that_cannot_serve_is_announced_and_not_paid_for_again() -> None:
    carried = direct(rank=10, max_residual=1e-3)
    with pytest.warns(hypergrad.ConvergenceWarning):
        first = solved(carried, 0.0, damping=1e-1)
    assert first.status is Status.STAGNATED
    assert not first.converged
    with pytest.warns(hypergrad.ConvergenceWarning):
        second = solved(carried, 0.0, damping=1e-1)
    assert second.status is Status.STAGNATED
    assert second.sketch_hvps == 0
    # A larger damping, at which it does serve, forgets that.
    assert solved(carried, 0.0, damping=1e4).converged


def test_a_preconditioner_that_slows_down_is_refreshed_before_the_next_solve() -> None:
    carried = preconditioned(max_slowdown=2.0)
    fresh = solved(carried, 0.0, damping=1e-4)
    slow = solved(carried, 0.6, damping=1e-4)
    assert slow.converged  # whatever the sketch
    assert slow.iterations > 2 * fresh.iterations
    assert slow.sketch_hvps == 0
    info = solved(carried, 0.6, damping=1e-4)
    assert info.converged
    assert cost(info) > 0
    assert info.iterations < slow.iterations
    assert carried.num_refreshes == 1
    patient = preconditioned(max_slowdown=1e6)
    assert [solved(patient, t).sketch_hvps for t in (0.0, 0.6, 0.6)][1:] == [0, 0]


def test_a_warm_start_near_the_answer_does_not_look_like_a_slow_one() -> None:
    # Few digits are left to gain: what counts is the iterations for each.
    carried = preconditioned()
    x0 = None
    for _ in range(4):
        solution = hypergrad.solve(moved(0.0), V, carried, damping=1e-4, x0=x0)
        x0 = solution.value + 1e-6 * gaussian(N, seed=3)
    assert carried.num_refreshes == 0
    assert solution.info.converged


def test_a_failed_solve_refreshes_at_once_and_does_so_once() -> None:
    carried = ReusedSketch(
        NystromPCG(40, rtol=1e-8, max_iters=25, generator=generator(0)), max_slowdown=1e6
    )
    assert solved(carried, 0.0, damping=1e-3).converged
    info = solved(carried, 1.0, damping=1e-3)
    assert info.converged
    assert cost(info) > 0
    assert "after a failed solve after 25 iterations" in str(info.reason)
    # Where not even a new sketch serves, each later solve tries an update alone.
    hopeless = ReusedSketch(NystromPCG(2, rtol=1e-12, max_iters=3, generator=generator(0)))
    costs = []
    for _ in range(3):
        with pytest.warns(hypergrad.ConvergenceWarning):
            costs.append(cost(solved(hopeless, 0.0, damping=1e-4)))
    assert costs[1] <= 4
    assert costs[2] <= 4


def test_the_answers_are_those_of_the_operator_at_hand() -> None:
    carried = preconditioned()
    for time in (0.0, 0.1, 0.3, 1.0):
        x = hypergrad.solve(moved(time), V, carried, damping=1e-2).value
        assert relative_error(x, dense_solve(moved(time), V, 1e-2)) <= 1e-5


@pytest.mark.parametrize("make", [direct, preconditioned])
def test_automatic_damping_is_that_of_the_sketch(make: Any) -> None:
    carried = make()
    first = solved(carried, 0.0, damping=None)
    second = solved(carried, 0.001, damping="auto")
    assert second.sketch_hvps == 0
    assert second.damping == first.damping == carried.sketch.auto_damping()


def test_many_right_hand_sides_share_it() -> None:
    carried = direct()
    block = gaussian(3, N, seed=4)
    for _ in range(2):
        solution = hypergrad.solve(moved(0.0), block, carried, damping=1e-2, batched=True)
    assert solution.info.sketch_hvps == 0
    assert [column.sketch_hvps for column in solution.info.columns] == [0, 0, 0]
    assert all(column.converged for column in solution.info.columns)


def test_derivatives_go_through_the_sketch_that_solved() -> None:
    matrix = moved(0.0).requires_grad_()
    v = V.clone().requires_grad_()
    carried = preconditioned()
    solution = hypergrad.solve(matrix, v, carried, damping=1e-2)
    (gradient,) = torch.autograd.grad(solution.value.sum(), v)
    expected = dense_solve(moved(0.0), torch.ones(N, dtype=F64), 1e-2)
    assert relative_error(gradient, expected) <= 1e-6
    assert solution.backward[0].num_hvps < 40


def test_reset_forgets_and_zero_is_solved() -> None:
    carried = direct()
    solved(carried, 0.0)
    carried.reset()
    assert carried.sketch is None
    assert solved(carried, 0.0).sketch_hvps is not None
    info = hypergrad.solve(moved(0.0), torch.zeros_like(V), carried, damping=1e-2).info
    assert info.converged
    empty = direct(rank=5)
    for _ in range(2):
        solution = hypergrad.solve(torch.zeros(N, N, dtype=F64), V, empty, damping=1.0)
        torch.testing.assert_close(solution.value, V)


def test_other_solvers_say_nothing_of_sketches() -> None:
    info = hypergrad.solve(moved(0.0), V, hypergrad.CG(), damping=1.0).info
    assert info.sketch_hvps is None


def test_bad_use_is_named() -> None:
    carried = direct()
    solved(carried, 0.0)
    with pytest.raises(hypergrad.TreeStructureError, match="the kept sketch and the operator"):
        hypergrad.solve(torch.eye(3, dtype=F64), V[:3], carried, damping=1.0)
    with pytest.raises(hypergrad.DampingError):
        solved(carried, 0.0, damping=0.0)
    with pytest.raises(hypergrad.SolverOptionError, match="solver is CG"):
        ReusedSketch(hypergrad.CG())  # type: ignore[arg-type]
    for options in ({"max_residual": 0.0}, {"max_slowdown": 0.5}):
        with pytest.raises(hypergrad.SolverOptionError, match=next(iter(options))):
            ReusedSketch(Nystrom(1), **options)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_reported_is_true_along_any_way(seed: int) -> None:
    # Steps of very different sizes, with and without a warm start.
    source = generator(seed)
    bound = 0.05 + 0.4 * float(torch.rand((), generator=source))
    carried = direct(max_residual=bound)
    time, x0 = 0.0, None
    for _ in range(8):
        time += 10.0 ** float(-3 * torch.rand((), generator=source))
        before = carried.sketch
        solution = hypergrad.solve(
            moved(time), V, carried, damping=1e-2, x0=x0, on_failure="ignore"
        )
        info, x = solution.info, solution.value
        residual = float((V - moved(time) @ x - 1e-2 * x).norm() / V.norm())
        assert info.relative_residual == pytest.approx(residual, rel=1e-6)
        assert info.converged == (residual <= bound)
        # A sketch that served was kept, at no cost; another one was paid for.
        assert (carried.sketch is before) == (info.sketch_hvps == 0)
        x0 = x if bool(torch.rand((), generator=source) < 0.5) else None
