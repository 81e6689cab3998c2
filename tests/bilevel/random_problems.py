"""Strongly convex bilevel problems at random, solved in part, with their true hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import hypergrad
from tests.strategies import F64, generator

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RandomProblem:
    """Two losses, a point short of the inner solution, and the derivatives at the solution."""

    inner: Loss
    outer: Loss
    start: Tensor
    y: Tensor
    star: Tensor
    truth: Tensor
    strong_convexity: float

    def descended(self, steps: int) -> Tensor:
        """Inner parameters after gradient descent that stopped early."""
        w = self.start
        hessian = torch.func.hessian(self.inner)(self.star, self.y)
        lr = 0.5 / float(torch.linalg.eigvalsh(hessian)[-1])
        for _ in range(steps):
            w = w - lr * torch.func.grad(self.inner)(w, self.y)
        return w


def random_problem(seed: int) -> RandomProblem:
    source = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=F64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=source))

    n, m, rows = integer(1, 12), integer(1, 6), integer(2, 30)
    features, labels = draw(rows, n), (draw(rows) > 0).to(F64)
    # Curvatures over up to three orders of magnitude.
    features = features * 10.0 ** (-1.5 * torch.rand(n, generator=source, dtype=F64))
    to_weights, to_ridge, pull = draw(rows, m), 0.5 * draw(n, m), draw(n, m)
    ridge = 10.0 ** float(-3 * torch.rand((), generator=source))
    kind = integer(0, 2)

    def inner(w: Tensor, y: Tensor) -> Tensor:
        margins = features @ w
        if kind == 0:  # weighted logistic regression
            losses = torch.nn.functional.softplus(margins) - labels * margins
        elif kind == 1:  # a robust regression
            losses = torch.sqrt(1 + (margins - 2 * labels) ** 2)
        else:  # a quadratic
            losses = 0.5 * (margins - labels) ** 2
        weights = torch.sigmoid(to_weights @ y)
        penalties = ridge * (1 + torch.exp(to_ridge @ y))
        return (weights * losses).mean() + 0.5 * (penalties * w**2).sum() + 0.1 * w @ pull @ y

    target, slope = draw(n), draw(n)

    def outer(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((w - target) ** 2).mean() + torch.sin(slope @ w) + 0.1 * (y**2).sum()

    y, w = 0.5 * draw(m), draw(n)
    start = w
    for _ in range(200):
        gradient = torch.func.grad(inner)(w, y)
        step = torch.linalg.solve(torch.func.hessian(inner)(w, y), gradient)
        scale, size = 1.0, float(gradient.norm())
        while scale > 1e-6 and float(torch.func.grad(inner)(w - scale * step, y).norm()) > size:
            scale /= 2
        w = w - scale * step
        if float(step.norm()) <= 1e-15 * float(w.norm()):
            break
    assert float(torch.func.grad(inner)(w, y).norm()) < 1e-11
    return RandomProblem(inner, outer, start, y, w, _implicit(inner, outer, w, y), ridge)


def _implicit(inner: Loss, outer: Loss, w: Tensor, y: Tensor) -> Tensor:
    """The implicit theorem with dense derivatives."""
    hessian = torch.func.hessian(inner)(w, y)
    mixed = torch.func.jacfwd(torch.func.grad(inner), argnums=1)(w, y)
    of_w, of_y = torch.func.grad(outer, argnums=(0, 1))(w, y)
    return of_y - mixed.T @ torch.linalg.solve(hessian, of_w)


def partial_hypergradient(
    problem: RandomProblem, seed: int
) -> tuple[Tensor, hypergrad.Hypergradient]:
    """Inner parameters and a hypergradient after solves of random, mostly early, ends."""
    source = generator(seed + 1)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=source))

    w = problem.descended([0, 3, 10, 30, 100, 300, 1000][integer(0, 6)])
    if integer(0, 9) == 0:
        w = problem.star
    damping = [0.0, 0.0, 1e-3, 1e-1][integer(0, 3)]
    solver: hypergrad.Solver = hypergrad.CG(rtol=0.0, max_iters=integer(1, 8))
    if integer(0, 2) == 0:
        solver = hypergrad.Neumann(num_terms=integer(1, 30))
    got = hypergrad.hypergradient(
        problem.inner, problem.outer, w, problem.y, solver=solver, damping=damping
    )
    return w, got
