"""The identity in place of the inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem, Outcome, Solver, Status
from .options import check_option, is_tolerance


@dataclass(frozen=True)
class Identity(Solver):
    """x = scale v: the inverse taken for a multiple of the identity, as in T1-T2.

    No attempt at solving, and the cheapest hypergradient there is.  Right to a factor only where
    the curvature is the same in all directions; the sign of the hypergradient's entries is often
    right for less (Luketina et al. train regularisation with it).  ``info`` reports the true
    residual, which is mostly not small: that is what the approximation costs.

    Attributes:
        scale: in place of the inverse curvature, > 0.  One step of gradient descent, one-step
            differentiation and the Neumann series of one term have it at their step size.  For a
            proximal inner loss, ... + (lambda / 2) |w - y|^2 as in iMAML, 1 / lambda makes the
            implicit part grad_w outer_loss itself: the plain first-order method.

    Cost: one HVP, for the residual in the report (and 20 to resolve ``damping="auto"``).
    Source: Luketina, Berglund, Greff, Raiko, arXiv 1511.06727, section 2.2.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, 2.0]))
        >>> solution = hypergrad.solve(a, torch.ones(2), hypergrad.Identity(scale=0.5))
        >>> solution.value, round(solution.info.relative_residual, 4)
        (tensor([0.5000, 0.5000]), 0.3536)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        good = is_tolerance(self.scale) and self.scale > 0
        check_option(good, "scale", self.scale, "a finite number > 0")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        x = self.scale * system.b
        damping = system.resolve_damping()
        norms = row_norms(system.residual(x, damping))
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=[
                Status.CONVERGED if norm == 0 else Status.FIXED_ITERATIONS
                for norm in norms.tolist()
            ],
            iterations=[0] * len(x),
            damping=damping,
        )

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.scale * system.b
        damping = system.damping
        assert not isinstance(damping, str)
        residual = system.b - system.apply(x, damping)
        return x, torch.linalg.vector_norm(residual, dim=1)
