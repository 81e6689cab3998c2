"""What is carried from outer step to outer step: the answer, and a sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import F64, gaussian, generator, relative_error

N, ROWS = 40, 120
#: Features of very different sizes: a condition number of some 1e4 for the inner Hessian.
X = gaussian(ROWS, N, seed=1) * torch.logspace(0, -2, N, dtype=F64)
T = X @ gaussian(N, seed=2) + 0.1 * gaussian(ROWS, seed=3)
X_VAL = gaussian(ROWS, N, seed=4) * torch.logspace(0, -2, N, dtype=F64)
T_VAL = X_VAL @ gaussian(N, seed=2)
DAMPING = 1e-6


def inner_loss(w: Tensor, y: Tensor) -> Tensor:
    """Ridge regression with a weight an example, which turns the Hessian as it is learned."""
    return 0.5 * (torch.sigmoid(y) * (X @ w - T) ** 2).mean() + 0.5e-5 * (w**2).sum()


def outer_loss(w: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((X_VAL @ w - T_VAL) ** 2).mean()


def solve_inner(y: Tensor) -> Tensor:
    weighted = torch.sigmoid(y)[:, None] * X / ROWS
    return torch.linalg.solve(X.T @ weighted + 1e-5 * torch.eye(N, dtype=F64), weighted.T @ T)


@dataclass
class Walk:
    """The products of an outer loop, those for sketches, and its last report."""

    num_hvps: int
    sketch_hvps: list[Any]
    info: hypergrad.SolveInfo


def walk(solver: hypergrad.Solver, steps: int = 10) -> Walk:
    """Outer descent; at each step the answer must be that of an exact solve."""
    y = torch.zeros(ROWS, dtype=F64)
    total, sketches = 0, []
    for _ in range(steps):
        w = solve_inner(y)
        got = hypergrad.hypergradient(inner_loss, outer_loss, w, y, solver=solver, damping=DAMPING)
        exact = hypergrad.hypergradient(
            inner_loss, outer_loss, w, y, solver=hypergrad.Exact(), damping=DAMPING
        )
        # CG at 1e-8 on a condition number of 1e4.
        assert relative_error(got.grad, exact.grad) <= 1e-4
        total += got.info.num_hvps
        sketches.append(got.info.sketch_hvps)
        y = y - 1e4 * got.grad
    return Walk(total, sketches, got.info)


def pcg() -> hypergrad.NystromPCG:
    return hypergrad.NystromPCG(rank=25, rtol=1e-8, generator=generator(0))


def test_a_sketch_carried_over_outer_steps_saves_products_at_equal_answers() -> None:
    afresh = walk(pcg())
    reused = walk(hypergrad.ReusedSketch(pcg()))
    plain = walk(hypergrad.CG(rtol=1e-8))
    assert reused.sketch_hvps[0] >= 25
    assert sum(cost == 0 for cost in reused.sketch_hvps) >= 7
    assert plain.sketch_hvps == afresh.sketch_hvps == [None] * 10
    assert reused.num_hvps < 0.7 * afresh.num_hvps
    assert reused.num_hvps < 0.7 * plain.num_hvps


def test_a_warm_start_saves_products_over_outer_steps() -> None:
    solver = hypergrad.CG(rtol=1e-6)
    counts = []
    for warm in (False, True):
        y, x0, total = torch.zeros(ROWS, dtype=F64), None, 0
        for _ in range(8):
            w = solve_inner(y)
            got = hypergrad.hypergradient(inner_loss, outer_loss, w, y, solver=solver, x0=x0)
            total += got.info.num_hvps
            x0 = got.ihvp if warm else None
            y = y - 1e3 * got.grad
        counts.append(total)
    assert counts[1] < 0.9 * counts[0]


def test_backward_passes_of_implicit_share_a_sketch() -> None:
    carried = hypergrad.ReusedSketch(pcg())
    solve = hypergrad.implicit(inner_loss, carried, DAMPING)(lambda init, y: solve_inner(y))
    start, y = torch.zeros(N, dtype=F64), torch.zeros(ROWS, dtype=F64)
    costs: list[Any] = []
    for _ in range(4):
        attached = y.clone().requires_grad_()
        solution = solve.solution(start, attached)
        outer_loss(solution.value, attached).backward()  # type: ignore[no-untyped-call]
        costs.append(solution.backward[0].sketch_hvps)
        assert attached.grad is not None
        exact = hypergrad.hypergradient(
            inner_loss, outer_loss, solution.value.detach(), y, solver=hypergrad.Exact(),
            damping=DAMPING,
        )  # fmt: skip
        assert relative_error(attached.grad, exact.grad) <= 1e-4
        y = y - 1e4 * attached.grad
    assert costs[0] >= 25
    assert costs[1:] == [0, 0, 0]


@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_a_direct_sketch_is_kept_within_its_bound(bound: float) -> None:
    solver = hypergrad.ReusedSketch(
        hypergrad.Nystrom(rank=35, generator=generator(0)), max_residual=bound
    )
    y, costs = torch.zeros(ROWS, dtype=F64), []  # type: tuple[Tensor, list[Any]]
    for _ in range(6):
        w = solve_inner(y)
        got = hypergrad.hypergradient(inner_loss, outer_loss, w, y, solver=solver, damping=1e-3)
        assert got.info.converged
        assert got.info.relative_residual <= bound
        costs.append(got.info.sketch_hvps)
        y = y - 1e4 * got.grad
    # The first step turns the Hessian most: by less than half of v, and by more than a twentieth.
    assert costs[0] >= 35
    refreshed = sum(cost > 0 for cost in costs[1:])
    assert refreshed == 0 if bound == 0.5 else 1 <= refreshed <= 2
