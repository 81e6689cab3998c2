"""A fixed number of Krylov iterations as pure tensor code, for ``torch.compile`` and for reports.

Nothing in the iterations depends on a tensor's values but through masks: a row that is done, or
that met negative curvature, is frozen and its further products are of no effect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..norms import plain_norms, row_norms
from ..tracing import far
from .base import DampedSystem, Outcome, Status
from .krylov import LOST, indefinite_preconditioner, where_rows
from .traced import residual_traced, safe_norms


@dataclass
class FixedWork:
    """The iterates of a fixed number of iterations, and what happened to their rows.

    Attributes:
        system: what is solved.
        damping: as a number.
        count: iterations to be done.
        traced: whether values cannot be looked at, not even to report them.
        x: shape (m, n), current iterates.
        r: shape (m, n), their residuals by the recurrence.
        norms: shape (m,), norms of ``r``.
        frozen: shape (m,), rows that are not stepped any further until a refresh.
        stuck: shape (m,), rows that met negative curvature.
        direction: shape (m, n), where they met it.
        iterations: shape (m,), steps taken.
        start_x: shape (m, n), where the iterations began, with residual norms ``start``.
        refused: shape (m,), rows at which the preconditioner was found not positive definite.
        roomy: whether no square of a number of the products', or near one, leaves the range of the
            working dtype.
    """

    system: DampedSystem
    damping: float
    count: int
    traced: bool
    x: Tensor
    r: Tensor
    norms: Tensor
    frozen: Tensor
    stuck: Tensor
    direction: Tensor
    iterations: Tensor
    start_x: Tensor
    start: Tensor
    refused: Tensor
    refused_rz: Tensor
    roomy: bool

    @classmethod
    def begin(
        cls,
        system: DampedSystem,
        x0: Tensor | None,
        count: int | None,
        *,
        traced: bool,
        preconditioned: bool,
    ) -> FixedWork:
        """Start at x0 where that is better than zero.

        A preconditioner's numbers may be of any size; the others are near those of the products.
        """
        assert count is not None
        if traced and isinstance(system.damping, str):
            raise SolverOptionError(
                "damping is 'auto', which torch.compile cannot trace; expected a number. Take it "
                "from a solve outside the compiled function: its info.damping."
            )
        damping = system.resolve_damping()
        x, zero = torch.zeros_like(system.b), torch.zeros_like(system.b_norms)
        none = torch.zeros_like(zero, dtype=torch.bool)
        work = cls(
            system=system,
            damping=damping,
            count=count,
            traced=traced,
            x=x,
            r=system.b,
            norms=zero,
            frozen=none,
            stuck=none,
            direction=torch.zeros_like(x),
            iterations=torch.zeros_like(zero, dtype=torch.long),
            start_x=x,
            start=zero,
            refused=none,
            refused_rz=zero,
            roomy=system.roomy and not preconditioned,
        )
        work.norms = work.start = work.norms_of(system.b)  # rounded as the others are
        if x0 is not None:
            residual = work.residual(x0)
            better = work.norms_of(residual) < work.norms
            work.x = work.start_x = where_rows(better, x0, x)
            work.r = where_rows(better, residual, work.r)
            work.norms = work.start = work.norms_of(work.r)
        return work

    @property
    def rows(self) -> Tensor:
        """The index of each row."""
        return torch.arange(len(self.x), device=self.x.device)

    @property
    def live(self) -> Tensor:
        """Rows still stepped: those not frozen whose residual is above any that counts."""
        # Far below what a working precision attains, yet safe from underflow.
        least = torch.finfo(self.r.dtype).eps ** 2
        return ~self.frozen & ~self.stuck & ~self.refused & (self.norms > least)

    def refuse(self, mask: Tensor, rz: Tensor) -> None:
        """Note rows at which r'M r <= 0."""
        self.refused_rz = torch.where(mask & ~self.refused, rz, self.refused_rz)
        self.refused = self.refused | mask

    def freeze(self, stuck: Tensor, direction: Tensor, norms: Tensor) -> None:
        """Stop rows that met negative curvature along the rows of ``direction``."""
        look = not self.traced and not far(stuck)
        if look and not bool(stuck.any()):  # the usual case, at no pass over the rows
            return
        # Of a residual that is rounding itself, the curvature is no news of the operator.
        rounding = 10.0 * torch.finfo(self.system.operator.dtype).eps * self.system.b_norms
        news = stuck & (self.norms > rounding)
        self.direction = where_rows(news, direction / norms[:, None], self.direction)
        self.stuck, self.frozen = self.stuck | news, self.frozen | stuck

    def held(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """These next iterates; where the recurrence is lost the start, until a refresh.

        There the residual would grow out of the dtype, and nan would go into the products.
        """
        lost = ~(self.norms_of(r) <= LOST * self.start)  # nan is, too
        self.frozen = self.frozen | lost
        return where_rows(lost, self.start_x, x), where_rows(lost, self.r, r)

    def advance(self, x: Tensor, r: Tensor) -> None:
        """Go on from these iterates, which have moved where rows are live only."""
        self.iterations = self.iterations + self.live
        self.x, self.r, self.norms = x, r, self.norms_of(r)

    def norms_of(self, block: Tensor) -> Tensor:
        """Norms of the rows; without a branch on values where they are traced, or far."""
        if not self.traced and not far(block):
            return row_norms(block)
        return plain_norms(block) if self.roomy else safe_norms(block)

    def residual(self, x: Tensor) -> Tensor:
        """The true residual of x; without a look at values where they are traced."""
        if self.traced:
            return residual_traced(self.system, x, self.damping)
        return self.system.residual(x, self.damping)

    def refresh(self) -> Tensor:
        """Replace residuals that drifted by the true ones; which did, shape (m,)."""
        residual = self.residual(self.x)
        norms = self.norms_of(residual)
        drifted = self.norms_of(residual - self.r) > 0.1 * norms
        self.r = where_rows(drifted, residual, self.r)
        self.norms = torch.where(drifted, norms, self.norms)
        self.frozen = self.frozen & ~drifted
        return drifted

    @property
    def answer(self) -> Tensor:
        """The last iterates; the start where negative curvature was met further from v."""
        return where_rows(self.stuck & (self.norms > self.start), self.start_x, self.x)

    def residual_norms(self, x: Tensor) -> Tensor:
        """True residual norms of x as it will be returned."""
        return self.norms_of(self.residual(x))

    def outcome(self) -> Outcome:
        """What an eager solve hands back."""
        (refused,) = self.system.look(self.refused.any())
        if refused:
            raise indefinite_preconditioner(torch.where(self.refused, self.refused_rz, 1.0), self.r)
        x = self.answer
        norms = self.residual_norms(x)
        stuck = self.stuck.tolist()
        statuses = [
            Status.CONVERGED
            if norm == 0
            else (Status.NEGATIVE_CURVATURE if bad else Status.FIXED_ITERATIONS)
            for norm, bad in zip(norms.tolist(), stuck, strict=True)
        ]
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=statuses,
            iterations=[
                self.count if status is Status.FIXED_ITERATIONS else steps + bad
                for status, steps, bad in zip(
                    statuses, self.iterations.tolist(), stuck, strict=True
                )
            ],
            damping=self.damping,
            directions={row: self.direction[row] for row, bad in enumerate(stuck) if bad},
        )
