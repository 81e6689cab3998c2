"""LiSSA: the Neumann series with a fresh sample of the operator in each term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import DampingError
from ..norms import row_norms
from ..operators import SampledOperator
from .base import DampedSystem, Outcome, Status

#: Fresh products that look for the largest growth, for step_size="auto".
_PROBE_STEPS = 10
#: The step is the inverse of the largest growth seen, times this.
_MARGIN = 2.0
#: A sum of K contractions has at most the norm K eta |v|; one above it by this factor diverges.
_GROWTH = 1e3
#: Products that the residual of a callable is averaged over, at least.
_LEAST_DRAWS = 4


def run_lissa(
    system: DampedSystem,
    x0: Tensor | None,
    num_terms: int,
    step_size: float | Literal["auto"],
    num_samples: int,
) -> Outcome:
    """See :class:`hypergrad.Neumann`."""
    if system.damping == "auto":
        raise DampingError(
            "damping='auto' takes the damping from a Lanczos run, which an operator that differs "
            "from product to product does not allow. Pass a number."
        )
    damping = system.resolve_damping()
    step = _step(system, damping) if step_size == "auto" else float(step_size)
    start = torch.zeros_like(system.b) if x0 is None else x0
    hopeless = _GROWTH * (row_norms(start) + num_terms * step * system.b_norms)
    lost = torch.zeros_like(hopeless, dtype=torch.bool)
    total = torch.zeros_like(system.b)
    for _ in range(num_samples):
        x = start
        for term in range(num_terms):
            if term == 0 and x0 is None:  # A 0 = 0 costs no product
                x = step * system.b
                continue
            x = x + step * (system.b - system.apply(x, damping))
            lost = lost | ~(row_norms(x) <= hopeless)
            if bool(lost.any()):
                x = torch.where(lost[:, None], torch.zeros_like(x), x)
        total += x / num_samples
    x = torch.where(lost[:, None], start, total)
    norms, useless = _residuals(system, x, damping, num_samples)
    if bool(useless.any()):  # no better than nothing: hand back nothing
        x = torch.where(useless[:, None], torch.zeros_like(x), x)
        norms = torch.where(useless, system.b_norms, norms)
    failed = useless | lost
    return Outcome(
        x=x,
        residual_norms=norms,
        statuses=[
            Status.CONVERGED if nothing else (Status.STAGNATED if bad else Status.FIXED_ITERATIONS)
            for nothing, bad in zip((system.b_norms == 0).tolist(), failed.tolist(), strict=True)
        ],
        iterations=[num_terms] * len(x),
        damping=damping,
    )


def _step(system: DampedSystem, damping: float) -> float:
    """The inverse of twice the largest growth in a power iteration with fresh products."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(
        1, system.b.shape[1], generator=generator, device="cpu", dtype=torch.float32
    )
    vector = vector.to(system.b)
    largest = 0.0
    for _ in range(_PROBE_STEPS):
        size = float(row_norms(vector))
        if size == 0.0:
            break
        vector = system.product(vector / size)
        largest = max(largest, float(row_norms(vector)))
    bound = _MARGIN * largest + damping
    return 1.0 / bound if bound > 0 else 1.0


def _residuals(
    system: DampedSystem, x: Tensor, damping: float, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Residual norms, and which of them prove an answer no better than zero."""
    if isinstance(system.operator, SampledOperator):
        parts = len(system.operator.operators)
        whole = DampedSystem(system.operator.mean, system.b, system.scales, damping)
        norms = row_norms(whole.residual(x, damping))
        system.num_hvps += parts * whole.num_hvps
        return norms, ~(norms < system.b_norms) & (system.b_norms > 0)
    # No verdict from these: noise alone can make their mean longer than v, and a few draws do not
    # say how large it is (they may all be the same minibatch).
    count = max(num_samples, _LEAST_DRAWS)
    drawn = torch.stack([system.residual(x, damping) for _ in range(count)])
    norms = row_norms(drawn.mean(dim=0))
    return norms, torch.zeros_like(norms, dtype=torch.bool)
