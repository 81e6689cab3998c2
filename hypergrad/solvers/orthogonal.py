"""Residuals kept by a recurrence, so that each new one is orthogonal to all of them.

In exact arithmetic the residuals of CG are.  In floating point they cease to be as soon as an
eigenvalue at an end of the spectrum has been found, which is then found again and again: with a few
large eigenvalues and many small ones, as Hessians of networks have, every second or third product
is spent on that (Paige, Linear Algebra Appl. 34, 1980).  To be orthogonal to the root of the
rounding is enough (Simon, Math. Comp. 42, 1984), so what is kept may be of the products' dtype, and
one projection an iteration does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DampedSystem

#: Residuals that there is room for at first; then twice as many, and so on.
_FIRST = 16


class Residuals:
    """What m recurrences side by side have left behind, as rows of unit size.

    With a preconditioner M the residuals are orthogonal by the inner product of M.

    Args:
        system: whose residuals they are.
        preconditioned: whether there is a preconditioner.
        capacity: of residuals a row where that is known; None to grow.
    """

    def __init__(
        self, system: DampedSystem, *, preconditioned: bool, capacity: int | None = None
    ) -> None:
        own, b = system.operator.dtype, system.b
        narrow = own in (torch.float32, torch.float64)
        self.count = 0
        shape = (len(b), capacity or _FIRST, b.shape[1])
        self.rows = b.new_zeros(shape, dtype=own if narrow else b.dtype)
        # M times these; the same without a preconditioner.
        self.duals = torch.zeros_like(self.rows) if preconditioned else self.rows

    def add(self, r: Tensor, z: Tensor, rz: Tensor) -> None:
        """Keep residuals r, shape (m, n), with z = M r and rz = r'z, shape (m,); none of rz = 0."""
        if self.count == self.rows.shape[1]:
            self._grow()
        size = torch.where(rz > 0, rz, torch.ones_like(rz)).sqrt()
        scale = torch.where(rz > 0, 1.0 / size, torch.zeros_like(size))[:, None]
        self.rows[:, self.count] = (r * scale).to(self.rows.dtype)
        if self.duals is not self.rows:
            self.duals[:, self.count] = (z * scale).to(self.rows.dtype)
        self.count += 1

    def add_one(self, r: Tensor, z: Tensor, rz: float) -> None:
        """:meth:`add` of a single row on the host, shape (n,), with r'z > 0."""
        if self.count == self.rows.shape[1]:
            self._grow()
        scale = rz**-0.5
        torch.mul(r, scale, out=self.rows[0, self.count])
        if self.duals is not self.rows:
            torch.mul(z, scale, out=self.duals[0, self.count])
        self.count += 1

    def cleaned(self, r: Tensor) -> Tensor:
        """The rows of r without their parts along what is kept, r - R'(Z r)."""
        rows, duals = self.rows[:, : self.count], self.duals[:, : self.count]
        along = torch.bmm(duals, r.to(rows.dtype)[:, :, None])
        return r - torch.bmm(along.mT, rows)[:, 0].to(r.dtype)

    def clean_one(self, r: Tensor) -> None:
        """:meth:`cleaned` of a single row, shape (n,), in place."""
        rows, duals = self.rows[0, : self.count], self.duals[0, : self.count]
        r.sub_(torch.mv(rows.T, torch.mv(duals, r.to(rows.dtype))))

    def forget(self, mask: Tensor) -> None:
        """Begin afresh for the rows of the mask, shape (m,)."""
        for block in {id(x): x for x in (self.rows, self.duals)}.values():
            block.mul_((~mask).to(block.dtype)[:, None, None])

    def keep(self, index: Tensor) -> None:
        """Go on with these rows alone."""
        shared = self.duals is self.rows
        self.rows = self.rows[index]
        self.duals = self.rows if shared else self.duals[index]

    def _grow(self) -> None:
        shared, room = self.duals is self.rows, torch.zeros_like(self.rows)
        self.rows = torch.cat([self.rows, room], dim=1)
        self.duals = self.rows if shared else torch.cat([self.duals, room], dim=1)
