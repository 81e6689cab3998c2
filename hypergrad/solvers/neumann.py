"""The truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..pytree import row_norms
from ..spectrum import lanczos_extremes
from .base import DampedSystem, Outcome, Solver, Status, check_option, is_count, is_tolerance

#: Lanczos steps that bound the largest eigenvalue for step_size="auto".
_PROBE_STEPS = 10
#: A residual that has grown by this factor is not followed any further.
_GROWTH = 1e6


@dataclass(frozen=True)
class Neumann(Solver):
    """x_K = eta * sum over j < K of (I - eta (A + damping I))^j v.

    The residual of a partial sum is the next term of the series over eta, so K - 1 products give
    K terms; one more gives the true residual of the answer as it is returned.  The series
    converges when the spectrum of A + damping I lies in (0, 2/eta); ``"auto"`` takes 1/eta = the
    Lanczos bound on its largest eigenvalue, so that only negative curvature can make it diverge.
    A series whose residual is no smaller than v is not returned: the best partial sum is, with
    status NEGATIVE_CURVATURE or STAGNATED.

    Attributes:
        num_terms: K, terms of the series.
        step_size: eta > 0, or ``"auto"``.

    Cost: K HVPs, at most 10 more for ``step_size="auto"``, one to check a diverged answer.
    Source: Lorraine, Vicol, Duvenaud, arXiv 1911.02590, equation (8).

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, 2.0]))
        >>> hypergrad.solve(a, torch.ones(2), hypergrad.Neumann(num_terms=50)).value
        tensor([1.0000, 0.5000])
    """

    num_terms: int = 20
    step_size: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_option(is_count(self.num_terms), "num_terms", self.num_terms, "an integer >= 1")
        good = self.step_size == "auto" or (is_tolerance(self.step_size) and self.step_size > 0)
        check_option(good, "step_size", self.step_size, "a finite number > 0 or 'auto'")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        damping = system.resolve_damping()
        step = self._step(system, damping)
        x, residual = system.begin(x0, damping)
        norms = row_norms(residual)
        best_x, best = x, norms
        hopeless = _GROWTH * torch.maximum(norms, system.b_norms)
        abandoned = torch.zeros_like(norms, dtype=torch.bool)
        curvature = torch.ones_like(norms)
        for term in range(1, self.num_terms + 1):
            x = x + step * residual
            if term < self.num_terms:
                following = residual - step * system.apply(residual, damping)
            else:  # the recurrence drifts and does not know the answer's rounding: look at x itself
                following = system.residual(x, damping)
            # Curvature along a residual that has grown tells why it grows.
            along = (residual * (residual - following)).sum(1)
            curvature = torch.where(abandoned | (norms == 0), curvature, along)
            residual, norms = following, torch.where(abandoned, norms, row_norms(following))
            better = (norms < best) & ~abandoned
            best_x = torch.where(better[:, None], x, best_x)
            best = torch.where(better, norms, best)
            # A term is a power of one operator: what has grown like this never comes back.
            abandoned = abandoned | ~(norms <= hopeless)
            if bool(abandoned.all()):
                break
            residual = torch.where(abandoned[:, None], torch.zeros_like(residual), residual)
        diverged = ~(norms < system.b_norms) & (system.b_norms > 0)
        if bool(diverged.any()):
            x = torch.where(diverged[:, None], best_x, x)
            fresh = row_norms(system.residual(x[diverged], damping, diverged))
            norms = norms.masked_scatter(diverged, fresh)
        statuses = [
            Status.FIXED_ITERATIONS
            if not bad
            else (Status.NEGATIVE_CURVATURE if along <= 0 else Status.STAGNATED)
            for bad, along in zip(diverged.tolist(), curvature.tolist(), strict=True)
        ]
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=[
                Status.CONVERGED if norm == 0 else status
                for norm, status in zip(norms.tolist(), statuses, strict=True)
            ],
            iterations=[term] * len(x),
            damping=damping,
        )

    def _step(self, system: DampedSystem, damping: float) -> float:
        if self.step_size != "auto":
            return float(self.step_size)
        ends = lanczos_extremes(
            lambda vector: system.product(vector[None])[0],
            system.operator.layout.dim,
            _PROBE_STEPS,
            system.b.dtype,
            system.b.device,
        )
        # |A| bounds a negative end too; the zero operator without damping gets any step.
        bound = max(abs(ends.largest_bound), abs(ends.smallest)) + damping
        return 1.0 / bound if bound > 0 else 1.0
