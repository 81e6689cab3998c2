"""Conjugate gradients for one right-hand side on the CPU: in place, its scalars Python's numbers.

A block of rows decides with masks, on tensors of one entry a row; for one row each of those costs
as much as a pass over ten thousand numbers.  Here an iteration is one product, two inner products
and three updates in place, and what else has to be known follows from their results:

- a nan or an infinity in a product passes into p'Ap, so that no pass looks for it;
- |A p| is needed only to tell curvature from rounding, and (|r| + |r_next|) / alpha bounds it;
- an iterate is copied only where the next one has a larger residual.

What a solve decides, and by which figures, is as in :class:`hypergrad.solvers.krylov.Recurrence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem, Outcome, Status
from .krylov import (
    DEFAULT_MAX_ITERS,
    LOST,
    PATIENCE,
    REFRESH,
    Precondition,
    Recurrence,
    SymmetryCheck,
    indefinite_preconditioner,
    preconditioned,
)
from .orthogonal import Residuals
from .skew import allowed_skew

#: Squares of numbers from here to the inverse, and their sums, are within the range of the dtype.
LEAST = {torch.float64: 1e-140, torch.float32: 1e-16}
#: Norms from here to the inverse need no scaling before a product in float32.
_NEAR_ONE = 1e-6
#: Vectors of so many numbers, and tolerances relative to the first residual from here on, are for
#: float32 recurrences of float32 products.
_LONG, _LOOSE = 2**13, 1e-3
#: How far the bound of |p| |A p| may be from p'Ap before both are computed.
_MARGIN = 4.0


@dataclass
class Verdict:
    """How the row ended: its answer, shape (1, n), with the norm of its true residual."""

    status: Status
    iteration: int
    x: Tensor
    norm: float
    direction: Tensor | None = None

    def outcome(self, damping: float, like: Tensor) -> Outcome:
        """The outcome of a system of this row alone."""
        return Outcome(
            x=self.x,
            residual_norms=like.new_tensor([self.norm]),
            statuses=[self.status],
            iterations=[self.iteration],
            damping=damping,
            directions={} if self.direction is None else {0: self.direction},
        )


class OneRow:
    """The recurrence of one row.

    Args:
        system: what is solved.
        precondition: see :func:`hypergrad.solvers.krylov.preconditioning`.
        symmetry: what decides where the first products seem to differ from symmetric ones.
        tolerance: the norm of the true residual that ends the solve.
        max_iters: iteration budget.
        x: shape (n,), where to begin; None for zero.
        r: shape (n,), the residual there, with norm ``norm``; neither is written to.
        row: shape (1,), the index of the row, where the system has others.
        kept: the residuals so far where new ones are made orthogonal to them.
    """

    def __init__(
        self,
        system: DampedSystem,
        precondition: Precondition | None,
        symmetry: SymmetryCheck,
        tolerance: float,
        max_iters: int,
        x: Tensor | None,
        r: Tensor,
        norm: float,
        row: Tensor | None = None,
        kept: Residuals | None = None,
    ) -> None:
        self.system, self.damping = system, system.resolve_damping()
        self.precondition, self.symmetry = precondition, symmetry
        self.max_iters, self.tolerance = max_iters, tolerance
        # Far below any attainable residual, yet safe from underflow: check the recurrence here.
        self.claim = max(tolerance, torch.finfo(r.dtype).eps ** 2)
        self.row, self.kept = row, kept
        self.rounding = torch.finfo(system.operator.dtype).eps
        # Inner products are off by the root of n roundings or so.
        self.margin = _MARGIN * self.rounding * (1.0 + math.sqrt(len(r)) / 16.0)
        # Where x, and the best x, are counted from; None for zero.
        self.base: Tensor | None = None
        if self._may_be_narrow(r, norm):
            dtype, self.base = system.operator.dtype, x
            self.r, self.x = r.to(dtype), torch.zeros_like(r, dtype=dtype)
        else:
            self.r, self.x = r.clone(), torch.zeros_like(r) if x is None else x.clone()
        # Room for what an iteration does not hand to others: new memory costs more than a pass.
        self.room, self.image = torch.empty_like(self.r), torch.empty_like(self.r)
        self.squared, self.p_squared = self._dot(self.r, self.r), 0.0
        self.p = torch.empty_like(self.r)
        # r'z of the last iteration, 0 where there was none, and the preconditioner's scale.
        self.last, self.unit = 0.0, self.r.new_zeros(1)
        # The smallest residual by the recurrence, and whether it is that of the current x.
        self.best, self.best_x, self.best_is_x = norm, self.x, True
        # The smallest true one; its x is where the solve began while there is none.
        self.true, self.true_x = norm, x
        self.fruitless = 0
        # What the system was asked about last, which remembers it by the object.
        self.looked_at: tuple[Tensor, Tensor] | None = None
        self.first: tuple[Tensor, Tensor, float, float] | None = None

    @classmethod
    def left_of(
        cls, block: Recurrence, p: Tensor, last: float, unit: Tensor, kept: Residuals | None
    ) -> OneRow:
        """The only row left of a block, taken over where that stands.

        ``p`` is its last direction, ``last`` its last r'z, ``unit`` the scale of
        :func:`hypergrad.solvers.krylov.preconditioned`, and ``kept`` its residuals.
        """
        one = cls(
            block.system,
            block.precondition,
            block.symmetry,
            float(block.tolerances[block.row]),
            block.max_iters,
            block.x[0],
            block.r[0],
            float(block.best),
            block.row,
            kept,
        )
        one._widen()
        one.last, one.unit = last, unit
        if last:
            one.p = p[0].clone()
            one.p_squared = one._dot(one.p, one.p)
        one.best_x, one.best_is_x = block.best_x[0], False
        one.true, one.true_x = float(block.true), block.true_x[0]
        one.fruitless = int(block.fruitless)
        return one

    def _may_be_narrow(self, r: Tensor, norm: float) -> bool:
        """Whether vectors of the products' own dtype will do, and are worth it.

        Long ones, which pass by the caches of a core, and a tolerance that is far above float32's
        rounding.
        """
        worth = len(r) >= _LONG and self.claim >= _LOOSE * norm and self.precondition is None
        dtypes = (self.system.operator.dtype, r.dtype)
        return (
            worth
            and dtypes == (torch.float32, torch.float64)
            and self.damping < 1.0 / LEAST[torch.float32]
        )

    def _widen(self) -> None:
        """Go on in the working dtype."""
        wide = self.system.b.dtype
        if self.x.dtype is not wide:
            self.x, self.r, self.p = self._whole(self.x), self.r.to(wide), self.p.to(wide)
            self.room, self.image = torch.empty_like(self.r), torch.empty_like(self.r)
            self.best_x, self.base = self._whole(self.best_x), None

    def _dot(self, a: Tensor, b: Tensor) -> float:
        if a.dtype is torch.float32:  # sums of pairs, which lose fewer digits than those of BLAS
            return torch.mul(a, b, out=self.room).sum().item()
        return torch.dot(a, b).item()

    def _whole(self, x: Tensor) -> Tensor:
        """An iterate counted from zero, in the working dtype."""
        x = x.to(self.system.b.dtype)
        return x if self.base is None else x + self.base

    @classmethod
    def solve(
        cls,
        config: Any,
        system: DampedSystem,
        x0: Tensor | None,
        precondition: Precondition | None,
        kept: Residuals | None,
    ) -> Outcome:
        """Solve a system of one row with the tolerances and the budget of ``config``."""
        damping = system.resolve_damping()
        x, r = None, system.b
        if x0 is not None:
            x, r = system.begin(x0, damping)
        else:
            system.start_norms = system.b_norms
        one = cls(
            system,
            precondition,
            SymmetryCheck(system),
            max(config.rtol * system.b_norms.item(), config.atol / system.scales.item()),
            config.max_iters or DEFAULT_MAX_ITERS,
            None if x is None else x[0],
            r[0],
            float(system.start_norms),
            kept=kept,
        )
        if one.best <= one.tolerance:  # v = 0, or a warm start within the tolerance
            return one._verdict(Status.CONVERGED, 0).outcome(damping, system.b)
        return one.run(1).outcome(damping, system.b)

    def run(self, iteration: int) -> Verdict:
        """Iterate from this iteration on until the row has converged or failed."""
        while iteration <= self.max_iters:
            status = self._step(iteration)
            if status is not None:
                return self._verdict(status, iteration)
            iteration += 1
        return self._verdict(Status.MAX_ITERATIONS, self.max_iters)

    def _step(self, iteration: int) -> Status | None:
        """One iteration; the status that ends the solve, if it does."""
        z, rz = self.r, self.squared
        if self.precondition is not None:
            rows, self.unit = preconditioned(self.precondition, self.r[None], self.unit)
            z = rows[0]
            rz = self._dot(self.r, z)
        if rz <= 0:
            raise indefinite_preconditioner(self.r.new_tensor([rz]), self.r[None])
        if self.kept is not None:
            self.kept.add_one(self.r, z, rz)
        beta = rz / self.last if self.last else 0.0
        if beta:
            torch.add(z, self.p, alpha=beta, out=self.p)
        else:
            self.p.copy_(z)
        if self.precondition is None:  # r is orthogonal to the last direction
            self.p_squared = self.squared + beta * beta * self.p_squared
        else:
            self.p_squared = self._dot(self.p, self.p)
        p_norm = math.sqrt(self.p_squared)
        image = self._image(p_norm)
        image = image.clone() if iteration <= 2 else image  # needed beyond the next product
        curvature = self._dot(self.p, image)
        least = LEAST[self.p.dtype] ** 2
        regular = least < curvature < 1.0 / least
        if not regular:  # a nan, an infinity, no positive curvature, or squares beyond the dtype
            self.system.operator.layout.check_finite(image, "the output of the operator")
            if self._flat(image):
                return Status.NEGATIVE_CURVATURE
            self._widen()  # where it was too narrow
            image = image.to(self.p.dtype)
            curvature = self._dot(self.p.double(), image.double())
        if iteration <= 2:
            self._check_symmetry(iteration, image, curvature)
        alpha = rz / curvature
        self.r.add_(image, alpha=-alpha)
        squared = moved = self._squared()
        if self.kept is not None:
            self.kept.clean_one(self.r)
            squared = self._squared()
        norm = math.sqrt(squared)
        # By alpha A p = r - r_next, with alpha = rz / p'Ap and r_next as it was before it was made
        # orthogonal to others, this is eps |p| |A p| >= p'Ap at most.
        reach = math.sqrt(self.squared) + math.sqrt(moved) + 2.0 * alpha * self.damping * p_norm
        if not rz > self.margin * p_norm * reach and self._flat(image):
            return Status.NEGATIVE_CURVATURE
        if norm < self.best:
            self.best, self.best_is_x = norm, True
        elif self.best_is_x:
            self.best_x, self.best_is_x = self.x.clone(), False
        self.x.add_(self.p, alpha=alpha)
        self.squared, self.last = squared, rz
        lost = not norm <= LOST * self.best  # nan is, too; zero is none
        if lost:  # where x may have left the dtype
            self.x.copy_(self.best_x)
        due = norm <= self.claim or iteration % REFRESH == 0 or lost
        return self._check() if due and iteration < self.max_iters else None

    def _squared(self) -> float:
        """The residual's norm, squared."""
        squared = self._dot(self.r, self.r)
        return squared if math.isfinite(squared) else _norm(self.r) ** 2

    def _image(self, p_norm: float) -> Tensor:
        """(A + damping I) p, not looked at, which the next product may write over."""
        dtype, p, damping = self.system.operator.dtype, self.p, self.damping
        # A copy each time: a callable may write on its argument, and may keep it.
        if dtype is p.dtype:
            image = self.system.passing_product(p.clone())
            return torch.add(image, p, alpha=damping, out=self.image) if damping else image
        near = dtype is torch.float32 and _NEAR_ONE < p_norm < 1.0 / _NEAR_ONE
        scale = 1.0 if near else math.ldexp(1.0, math.frexp(p_norm)[1])
        narrow = p.to(dtype) if near else (p / scale).to(dtype)
        image = self.image.copy_(self.system.passing_product(narrow))
        image = image if near else image.mul_(scale)
        return image.add_(p, alpha=damping) if damping else image

    def _flat(self, image: Tensor) -> bool:
        """Whether p'(A + damping I)p <= 0, to the rounding of the product."""
        p, image = self.p.double(), image.double()
        size = float(self._sizes(p, image))
        return self._dot(p, image) <= self.rounding * _norm(p) * size

    def _check_symmetry(self, iteration: int, image: Tensor, curvature: float) -> None:
        """A look at p0'A p1 = p1'A p0; :class:`SymmetryCheck` decides where they seem to differ."""
        p_norm = math.sqrt(self.p_squared)
        if iteration == 1:
            self.first = (self.p.clone(), image, curvature, p_norm)
            return
        row = torch.zeros(1, dtype=torch.long, device="cpu") if self.row is None else self.row
        if self.first is not None:
            p0, image0, curvature0, p0_norm = self.first
            self.first = None
            gap = abs(self._dot(p0, image) - self._dot(self.p, image0))
            # |A p| >= p'A p / |p|, so that sizes allow more than this.
            total = curvature * p0_norm / p_norm + curvature0 * p_norm / p0_norm
            if gap <= allowed_skew(self.system.operator.dtype) * total:
                return
            self.symmetry(1, row, *self._seen(p0, image0))
        self.symmetry(2, row, *self._seen(self.p, image))

    def _seen(self, p: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A direction, its product and the size of that, as a block has them."""
        p, image = p.to(self.system.b.dtype), image.to(self.system.b.dtype)
        return p[None], image[None], self._sizes(p, image)

    def _sizes(self, p: Tensor, image: Tensor) -> Tensor:
        """What the rounding of a product is relative to, as a block has it; shape (1,)."""
        product = torch.sub(image, p, alpha=self.damping) if self.damping else image
        return row_norms(product[None]) + self.damping * row_norms(p[None])

    def _check(self) -> Status | None:
        """Compare the recurrence with the true residual; the status that this ends it with."""
        x = self._whole(self.x)
        residual = self._residual(x)
        norm = _norm(residual)
        gained = norm < 0.9 * self.true
        if norm < self.true:
            self.true, self.true_x = norm, x
        if norm <= self.tolerance:
            return Status.CONVERGED
        if self.true_x is self.x:  # which moves on
            self.true_x = self.x.clone()
        drifted = _norm(residual - self.r) > 0.1 * norm
        if drifted:
            self._widen()
            # The bests since the last check mean nothing.
            self.best, self.best_is_x = self.true, False
            self.best_x = torch.zeros_like(self.x) if self.true_x is None else self.true_x
            self.r, self.squared, self.last = residual, norm * norm, 0.0
            if self.kept is not None:
                self.kept.forget(torch.ones(1, dtype=torch.bool, device="cpu"))
        self.fruitless = 0 if gained else self.fruitless + drifted
        return Status.STAGNATED if self.fruitless >= PATIENCE else None

    def _residual(self, x: Tensor) -> Tensor:
        self.looked_at = (x, x[None])
        return self.system.residual(self.looked_at[1], self.damping, self.row)[0]

    def _verdict(self, status: Status, iteration: int) -> Verdict:
        x, norm = self.true_x, self.true
        if status is not Status.CONVERGED:
            candidate = self._whole(self.x if self.best_is_x else self.best_x)
            fresh = _norm(self._residual(candidate))
            if fresh < norm:
                x, norm = candidate, fresh
            status = Status.CONVERGED if norm <= self.tolerance else status
        direction = None
        if status is Status.NEGATIVE_CURVATURE:
            direction = self.p.to(self.system.b.dtype)
            direction = direction / _norm(direction)
        if self.looked_at is not None and x is self.looked_at[0]:
            answer = self.looked_at[1]
        else:
            answer = torch.zeros_like(self.system.b[:1]) if x is None else x[None]
        return Verdict(status, iteration, answer, norm, direction)


def _norm(vector: Tensor) -> float:
    return row_norms(vector[None]).item()
