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

import torch
from torch import Tensor

from ..norms import row_norms
from .base import Status, allowed_skew
from .krylov import PATIENCE, REFRESH, Recurrence, indefinite_preconditioner, preconditioned

#: Squares of numbers from here to the inverse, and their sums, are within the range of the dtype.
LEAST = {torch.float64: 1e-140, torch.float32: 1e-16}
#: Norms from here to the inverse need no scaling before a product in float32.
_NEAR_ONE = 1e-6
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


class OneRow:
    """The row that is left of a recurrence, taken over where that stands.

    Args:
        block: the recurrence, of one row; its tensors are left as they are.
        p: shape (1, n), the last direction.
        last: r'z of the last iteration; 0 where there was none.
        unit: see :func:`hypergrad.solvers.krylov.preconditioned`.
    """

    def __init__(self, block: Recurrence, p: Tensor, last: float, unit: Tensor) -> None:
        self.system, self.damping = block.system, block.damping
        self.precondition, self.symmetry = block.precondition, block.symmetry
        self.max_iters, self.rounding = block.max_iters, block.rounding
        self.row = block.row
        # None spares the selection of rows, and lets the system remember what it has checked.
        self.rows = None if len(self.system.b) == 1 else block.row
        self.tolerance = float(block.tolerances[block.row])
        self.claim = float(block.claims[block.row])
        self.last, self.unit = last, unit
        # The smallest residual by the recurrence, which may be that of the current x.
        self.best, self.best_x = float(block.best), block.best_x[0]
        self.best_is_x = block.best_x is block.x
        self.true, self.true_x = float(block.true), block.true_x[0]
        self.fruitless = int(block.fruitless)
        # Inner products in float32 are off by the root of n roundings or so.
        self.margin = _MARGIN * self.rounding * (1.0 + math.sqrt(block.x.shape[1]) / 16.0)
        # Where x, and the best x, are counted from; None where from zero.
        self.base: Tensor | None = None
        if self._may_be_narrow(block):
            dtype = self.system.operator.dtype
            self.base, self.x = block.x[0], torch.zeros_like(block.x[0], dtype=dtype)
            self.r, self.p = block.r[0].to(dtype), torch.empty_like(self.x)
        else:
            self.x, self.r, self.p = block.x[0].clone(), block.r[0].clone(), p[0].clone()
        self.squared = _dot(self.r, self.r)
        self.p_squared = _dot(self.p, self.p) if last else 0.0
        # What the system was asked about last, which remembers it by the object.
        self.looked_at = (block.x[0], block.x)
        self.first: tuple[Tensor, Tensor, float, float] | None = None

    def _may_be_narrow(self, block: Recurrence) -> bool:
        """Whether vectors of the products' own dtype do for a start."""
        fresh = self.last == 0.0 and self.best_is_x and self.precondition is None
        wanted = (torch.float32, torch.float64)
        dtypes = (self.system.operator.dtype, block.r.dtype)
        return fresh and dtypes == wanted and self.damping < 1.0 / LEAST[torch.float32]

    def _widen(self) -> None:
        """Go on in the working dtype."""
        if self.base is None:
            return
        self.x, self.r, self.p = self._whole(self.x), self.r.double(), self.p.double()
        if not self.best_is_x:
            self.best_x = self._whole(self.best_x)
        self.base = None

    def _whole(self, x: Tensor) -> Tensor:
        """An iterate counted from zero, in the working dtype."""
        return x if self.base is None else self.base + x

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
            rz = _dot(self.r, z)
        if rz <= 0:
            raise indefinite_preconditioner(self.r.new_tensor([rz]), self.r[None])
        beta = rz / self.last if self.last else 0.0
        self.p = self.p.mul_(beta).add_(z) if beta else z.clone()
        if self.precondition is None:  # r is orthogonal to the last direction
            self.p_squared = self.squared + beta * beta * self.p_squared
        else:
            self.p_squared = _dot(self.p, self.p)
        p_norm = math.sqrt(self.p_squared)
        image = self._image(p_norm)
        image = image.clone() if iteration <= 2 else image  # needed beyond the next product
        curvature = _dot(self.p, image)
        least = LEAST[self.p.dtype] ** 2
        regular = least < curvature < 1.0 / least
        if not regular:  # a nan, an infinity, no positive curvature, or squares beyond the dtype
            self.system.operator.layout.check_finite(image, "the output of the operator")
            if self._flat(image):
                return Status.NEGATIVE_CURVATURE
            self._widen()
            image = image.to(self.p.dtype)
            curvature = _dot(self.p.double(), image.double())
        if iteration <= 2:
            self._check_symmetry(iteration, image, curvature)
        alpha = rz / curvature
        self.r.add_(image, alpha=-alpha)
        squared = _dot(self.r, self.r)
        if not math.isfinite(squared):
            squared = _norm(self.r) ** 2
        norm = math.sqrt(squared)
        # By alpha A p = r - r_next, with alpha = rz / p'Ap, this is eps |p| |A p| >= p'Ap at most.
        reach = math.sqrt(self.squared) + norm + 2.0 * alpha * self.damping * p_norm
        if not rz > self.margin * p_norm * reach and self._flat(image):
            return Status.NEGATIVE_CURVATURE
        if norm < self.best:
            self.best, self.best_is_x = norm, True
        elif self.best_is_x:
            self.best_x, self.best_is_x = self.x.clone(), False
        self.x.add_(self.p, alpha=alpha)
        self.squared, self.last = squared, rz
        due = norm <= self.claim or iteration % REFRESH == 0
        return self._check() if due and iteration < self.max_iters else None

    def _image(self, p_norm: float) -> Tensor:
        """(A + damping I) p, not looked at."""
        dtype, p = self.system.operator.dtype, self.p
        near = dtype is p.dtype is torch.float64 or _NEAR_ONE < p_norm < 1.0 / _NEAR_ONE
        if near and dtype is not torch.float16:
            image = self.system.passing_product(p.to(dtype, copy=True))
        else:
            scale = math.ldexp(1.0, math.frexp(p_norm)[1])
            image = self.system.passing_product((p / scale).to(dtype)).to(p.dtype) * scale
        if dtype is p.dtype and near:  # it may belong to others
            return torch.add(image, p, alpha=self.damping) if self.damping else image
        image = image.to(p.dtype)
        return image.add_(p, alpha=self.damping) if self.damping else image

    def _flat(self, image: Tensor) -> bool:
        """Whether p'(A + damping I)p <= 0, to the rounding of the product."""
        p, image = self.p.double(), image.double()
        size = float(self._sizes(p, image))
        return _dot(p, image) <= self.rounding * _norm(p) * size

    def _check_symmetry(self, iteration: int, image: Tensor, curvature: float) -> None:
        """A look at p0'A p1 = p1'A p0; :class:`SymmetryCheck` decides where they seem to differ."""
        p_norm = math.sqrt(self.p_squared)
        if iteration == 1:
            self.first = (self.p.clone(), image, curvature, p_norm)
            return
        if self.first is not None:
            p0, image0, curvature0, p0_norm = self.first
            self.first = None
            gap = abs(_dot(p0, image) - _dot(self.p, image0))
            # |A p| >= p'A p / |p|, so that sizes allow more than this.
            total = curvature * p0_norm / p_norm + curvature0 * p_norm / p0_norm
            if gap <= allowed_skew(self.system.operator.dtype) * total:
                return
            self.symmetry(1, self.row, *self._seen(p0, image0))
        self.symmetry(2, self.row, *self._seen(self.p, image))

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
            self.best, self.best_x, self.best_is_x = self.true, self.true_x, False
            self.r, self.squared, self.last = residual, norm * norm, 0.0
        self.fruitless = 0 if gained else self.fruitless + drifted
        return Status.STAGNATED if self.fruitless >= PATIENCE else None

    def _residual(self, x: Tensor) -> Tensor:
        self.looked_at = (x, x[None])
        return self.system.residual(self.looked_at[1], self.damping, self.rows)[0]

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
        known, rows = self.looked_at
        return Verdict(status, iteration, rows if x is known else x[None], norm, direction)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a, b).item()


def _norm(vector: Tensor) -> float:
    return row_norms(vector[None]).item()
