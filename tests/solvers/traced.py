"""A damped system without checks on values, as ``torch.compile`` needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hypergrad
from hypergrad.solvers.base import DampedSystem, Solver
from hypergrad.solvers.options import Damping


class UncheckedSystem(DampedSystem):
    """The same products, with nothing looked at."""

    def __init__(self, operator: Any, b: Tensor, damping: Damping) -> None:
        self.operator, self.b, self.damping = operator, b, damping
        self.scales, self.num_hvps = torch.ones_like(b[:, 0]), 0

    def product(self, x: Tensor, *, passing: bool = False, later: bool = False) -> Tensor:
        return self.operator._apply(x.to(self.operator.dtype)).to(self.b.dtype)


def compiled(
    solver: Solver, matrix: Tensor, b: Tensor, damping: float, x0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x and its residual norms, from one graph."""

    def run(matrix: Tensor, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        operator = hypergrad.as_operator(matrix)
        return solver._run_traced(UncheckedSystem(operator, b, damping), x0)

    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend="eager")(matrix, b, x0)


def both_forms(
    solver: Solver, matrix: Tensor, b: Tensor, damping: float, x0: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x and its residual norms, compiled and as the solver runs otherwise."""
    system = DampedSystem(hypergrad.as_operator(matrix), b, torch.ones_like(b[:, 0]), damping)
    outcome = solver._run(system, x0)
    return compiled(solver, matrix, b, damping, x0), (outcome.x, outcome.residual_norms)
