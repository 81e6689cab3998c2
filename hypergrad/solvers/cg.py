"""Conjugate gradients, many right-hand sides in one recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PreconditionerError
from ..operators import as_operator
from ..pytree import row_norms
from .base import (
    DampedSystem,
    Outcome,
    Solver,
    Status,
    check_option,
    check_skew,
    is_count,
    is_tolerance,
)

#: Enough for rtol = 1e-5 at condition number 1e6 by the classical bound,
#: iterations <= sqrt(condition)/2 * log(2 sqrt(condition) / rtol).
_DEFAULT_MAX_ITERS = 10_000
#: The recursively updated residual is compared with the true one this often.
_REFRESH = 50
#: Restarts from the true residual that bring no gain before the solve counts as stagnated.
_PATIENCE = 3


@dataclass(frozen=True)
class CG(Solver):
    """Preconditioned conjugate gradients on (A + damping I) x = v.

    Stops when the true residual, of the answer as it is returned, satisfies
    |v - (A + damping I) x| <= max(rtol |v|, atol).  The recursive residual is checked against
    the true one when it claims convergence and every 50 iterations; where they disagree the
    recurrence restarts from the true one, and three restarts without gain end the solve as
    STAGNATED.  A direction p with p'(A + damping I)p <= 0 (to rounding) ends it as
    NEGATIVE_CURVATURE with the direction in the report; CG never steps along it.  On any failure
    the iterate with the smallest residual is returned.

    Attributes:
        rtol: tolerance relative to |v|.
        atol: absolute tolerance.  With ``rtol=0, atol=0`` exactly ``max_iters`` iterations are
            done and the status is FIXED_ITERATIONS (or until the residual is exactly zero).
        max_iters: iteration budget; None for 10,000.
        preconditioner: an approximate inverse of A + damping I, symmetric positive definite:
            anything :func:`hypergrad.as_operator` takes.

    Raises (when solving):
        NotSymmetricError: the first two products show an operator that is not symmetric.
        PreconditionerError: r'M r <= 0 for a residual r.

    Cost: one HVP an iteration, one a check of the true residual.  Many right-hand sides share
    block products; columns that are done take no further part.
    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952); residual replacement
    after van der Vorst and Ye, SIAM J. Sci. Comput. 22 (2000).

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
        >>> v = torch.ones(3, dtype=torch.float64)
        >>> info = hypergrad.solve(a, v, hypergrad.CG(rtol=1e-8)).info
        >>> info.converged, info.iterations, info.num_hvps
        (True, 3, 4)
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_iters: int | None = None
    preconditioner: Any = None

    def __post_init__(self) -> None:
        check_option(is_tolerance(self.rtol), "rtol", self.rtol, "a finite number >= 0")
        check_option(is_tolerance(self.atol), "atol", self.atol, "a finite number >= 0")
        good = self.max_iters is None or is_count(self.max_iters)
        check_option(good, "max_iters", self.max_iters, "None or an integer >= 1")
        fixed_without_count = self.rtol == 0 and self.atol == 0 and self.max_iters is None
        check_option(
            not fixed_without_count,
            "max_iters",
            None,
            "an integer >= 1 when rtol and atol are both 0 (a fixed number of iterations)",
        )

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        return _Recurrence(self, system, x0).run()


class _Recurrence:
    """The recurrence over the rows still active; a row that is done is written out and dropped."""

    #: Everything that has one entry an active row.
    _state = ("row", "x", "r", "p", "rz", "best_x", "best", "true_x", "true", "fruitless")

    def __init__(self, config: CG, system: DampedSystem, x0: Tensor | None) -> None:
        self.system = system
        self.damping = system.resolve_damping()
        self.max_iters = config.max_iters or _DEFAULT_MAX_ITERS
        self.fixed = config.rtol == 0 and config.atol == 0
        self.precondition = _preconditioner(config.preconditioner, system)
        self.rounding = torch.finfo(system.operator.dtype).eps
        self.tolerances = system.tolerances(config.rtol, config.atol)
        # Far below any attainable residual, yet safe from underflow: check the recurrence here.
        self.claims = self.tolerances.clamp(min=torch.finfo(system.b.dtype).eps ** 2)
        self.first: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

        m = len(system.b)
        self.statuses = [Status.CONVERGED] * m
        self.iterations = [0] * m
        self.directions: dict[int, Tensor] = {}
        self.x, self.r = system.begin(x0, self.damping)
        self.row = torch.arange(m, device=system.b.device)
        self.p = torch.zeros_like(self.r)
        self.rz = torch.zeros_like(system.b_norms)
        # The best iterate by the recurrence, and the best whose true residual is known.
        self.best_x, self.best = self.x, row_norms(self.r)
        self.true_x, self.true = self.best_x, self.best
        self.fruitless = torch.zeros_like(self.row)
        self.out_x, self.out_norms = self.x.clone(), self.best.clone()

    def run(self) -> Outcome:
        # v = 0, or a warm start within the tolerance.
        self._finish(self.best <= self.tolerances, Status.CONVERGED, 0)
        for iteration in range(1, self.max_iters + 1):
            if len(self.row) == 0:
                break
            self._direct()
            self._step(iteration)
        rest = torch.ones_like(self.row, dtype=torch.bool)
        end = Status.FIXED_ITERATIONS if self.fixed else Status.MAX_ITERATIONS
        self._finish(rest, end, self.max_iters)
        return Outcome(
            x=self.out_x,
            residual_norms=self.out_norms,
            statuses=self.statuses,
            iterations=self.iterations,
            damping=self.damping,
            directions=self.directions,
        )

    def _direct(self) -> None:
        """The next search direction; rz = 0 marks rows that start afresh."""
        z = self.precondition(self.r)
        rz = torch.linalg.vecdot(self.r, z)
        _check_preconditioned(rz, self.r)
        beta = torch.where(self.rz > 0, rz / self.rz, torch.zeros_like(rz))
        self.p = torch.addcmul(z, beta[:, None], self.p)
        self.rz = rz

    def _step(self, iteration: int) -> None:
        image = self.system.product(self.p)
        # What rounding is relative to, also where damping cancels a negative curvature.
        size = row_norms(image) + self.damping * row_norms(self.p)
        image = torch.add(image, self.p, alpha=self.damping)
        self._check_symmetry(image, size, iteration)
        curvature = torch.linalg.vecdot(self.p, image)
        stuck = curvature <= self.rounding * row_norms(self.p) * size
        if bool(stuck.any()):
            for i in torch.nonzero(stuck).flatten().tolist():
                unit = self.p[i] / torch.linalg.vector_norm(self.p[i])
                self.directions[int(self.row[i])] = unit
            self._finish(stuck, Status.NEGATIVE_CURVATURE, iteration)
            image, curvature = image[~stuck], curvature[~stuck]
        alpha = (self.rz / curvature)[:, None]
        self.x = torch.addcmul(self.x, alpha, self.p)
        self.r = torch.addcmul(self.r, alpha, image, value=-1.0)
        norms = row_norms(self.r)
        better = norms < self.best
        self.best = torch.where(better, norms, self.best)
        # x is new in each iteration, so where all rows got better it needs no copy.
        self.best_x = (
            self.x if bool(better.all()) else torch.where(better[:, None], self.x, self.best_x)
        )
        due = norms <= self.claims[self.row]
        if iteration % _REFRESH == 0:
            due = torch.ones_like(due)
        if bool(due.any()) and iteration < self.max_iters:
            self._check(torch.nonzero(due).flatten(), iteration)

    def _check(self, index: Tensor, iteration: int) -> None:
        """Compare the recurrence with the true residual; finish rows or restart them."""
        rows = self.row[index]
        residual = self.system.residual(self.x[index], self.damping, rows)
        norms = row_norms(residual)
        drifted = row_norms(residual - self.r[index]) > 0.1 * norms
        gained = norms < 0.9 * self.true[index]
        better = norms < self.true[index]
        self.true, self.true_x = self.true.clone(), self.true_x.clone()
        self.true[index] = torch.where(better, norms, self.true[index])
        self.true_x[index] = torch.where(better[:, None], self.x[index], self.true_x[index])
        # Where the recurrence drifted, its bests since the last check mean nothing.
        self.best[index] = torch.where(drifted, self.true[index], self.best[index])
        self.best_x = self.best_x.clone()
        self.best_x[index] = torch.where(drifted[:, None], self.true_x[index], self.best_x[index])
        self.r[index] = torch.where(drifted[:, None], residual, self.r[index])
        self.rz[index] = torch.where(drifted, torch.zeros_like(norms), self.rz[index])
        self.fruitless[index] += (drifted & ~gained).long()
        self.fruitless[index] *= (~gained).long()
        done = torch.zeros_like(self.best, dtype=torch.bool)
        done[index] = norms <= self.tolerances[rows]
        hopeless = (self.fruitless >= _PATIENCE) & ~done & (not self.fixed)
        self._finish(done, Status.CONVERGED, iteration)
        self._finish(hopeless[~done], Status.STAGNATED, iteration)

    def _finish(self, done: Tensor, status: Status, iteration: int) -> None:
        """Write out rows with their best iterate and its true residual, and drop them."""
        if not bool(done.any()):
            return
        rows, x, norms = self.row[done], self.true_x[done], self.true[done]
        if status is not Status.CONVERGED:
            # A fixed number of iterations means the last iterate, whatever its residual.
            last = status is Status.FIXED_ITERATIONS
            candidate = (self.x if last else self.best_x)[done]
            fresh = row_norms(self.system.residual(candidate, self.damping, rows))
            take = torch.ones_like(rows, dtype=torch.bool) if last else fresh < norms
            x = torch.where(take[:, None], candidate, x)
            norms = torch.where(take, fresh, norms)
        self.out_x[rows], self.out_norms[rows] = x, norms
        met = (norms <= self.tolerances[rows]).tolist()
        for row, ok in zip(rows.tolist(), met, strict=True):
            self.statuses[row] = Status.CONVERGED if ok else status
            self.iterations[row] = iteration
        for name in self._state:
            setattr(self, name, getattr(self, name)[~done])

    def _check_symmetry(self, image: Tensor, size: Tensor, iteration: int) -> None:
        """p0'A p1 = p1'A p0: the first two iterations show it at no cost."""
        if iteration == 1:
            self.first = (self.row, self.p, image, size)
        elif iteration == 2 and self.first is not None:
            row0, p0, image0, size0 = self.first
            still = torch.isin(row0, self.row)  # rows may have finished in between
            p0, image0, size0 = p0[still], image0[still], size0[still]
            gap = ((p0 * image).sum(1) - (self.p * image0).sum(1)).abs()
            total = row_norms(p0) * size + row_norms(self.p) * size0
            check_skew(gap, total, self.system.operator.dtype)
            self.first = None


def _preconditioner(preconditioner: Any, system: DampedSystem) -> Callable[[Tensor], Tensor]:
    if preconditioner is None:
        return lambda r: r
    layout = system.operator.layout
    like = layout.unflatten(torch.zeros(layout.dim, dtype=layout.dtype, device=layout.device))
    operator = as_operator(preconditioner, like=like)

    def apply(r: Tensor) -> Tensor:
        z = operator._apply(r.to(operator.dtype))
        layout.check_finite(z, "the output of the preconditioner")
        return z.to(r.dtype)

    return apply


def _check_preconditioned(rz: Tensor, r: Tensor) -> None:
    if bool((rz > 0).all()):
        return
    bad = (rz <= 0) & (row_norms(r) > 0)
    if bool(bad.any()):
        raise PreconditionerError(
            f"the preconditioner is not positive definite: r'M r = {float(rz[bad][0]):.2e} for a "
            f"residual of norm {float(row_norms(r)[bad][0]):.2e}, expected > 0. It must be a "
            "symmetric positive definite approximation of the inverse of A + damping I."
        )
