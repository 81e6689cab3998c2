"""What the traceable forms of direct solvers and series share: residuals without branches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norms import safe_norms as safe_norms
from .base import DampedSystem


def residual_traced(system: DampedSystem, x: Tensor, damping: float) -> Tensor:
    """The residual b - (A + damping I) x, for x rounded as the operator multiplies it.

    :meth:`DampedSystem.residual` looks at values, to refuse an answer that overflows.
    """
    return system.b - system.apply(system.rounded(x), damping)


def begin_traced(system: DampedSystem, x0: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """:meth:`DampedSystem.begin`: a warm start no better than zero is not used."""
    zero = torch.zeros_like(system.b)
    if x0 is None:
        return zero, system.b
    residual = residual_traced(system, x0, damping)
    better = (safe_norms(residual) < safe_norms(system.b))[:, None]
    return torch.where(better, x0, zero), torch.where(better, residual, system.b)
