"""What the Krylov recurrences share: active rows, the best iterates, the true residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PreconditionerError
from ..norms import powers_of_two, row_norms, safe_norms
from ..operators import as_operator
from ..operators.interop import CallableOperator
from .base import DampedSystem, Outcome, Status
from .options import check_option, is_count, is_tolerance
from .skew import allowed_skew, check_skew

#: Enough for rtol = 1e-5 at condition number 1e6 by the classical bound on CG,
#: iterations <= sqrt(condition)/2 * log(2 sqrt(condition) / rtol).
DEFAULT_MAX_ITERS = 10_000
#: The recursively updated residual is compared with the true one this often.
REFRESH = 50
#: Restarts from the true residual that bring no gain before the solve counts as stagnated.
PATIENCE = 3
#: A residual above the least one by so much, far beyond what condition explains, is that of the
#: recurrence alone; it would grow out of the dtype.
LOST = 1e20

#: Antisymmetric parts of products up to this many times eps |A| |p0| |p1| are rounding.
_SKEW_NOISE = 10.0

#: What a preconditioner's products are called in errors.
OUTPUT = "the output of the preconditioner"
#: A symmetric positive definite approximation of (A + damping I)^-1, on rows of shape (m, n).
Precondition = Callable[[Tensor], Tensor]
#: Norms of the rows of (m, n), safe from over- and underflow: ``safe_norms`` or ``row_norms``.
Norms = Callable[[Tensor], Tensor]


def check_krylov_options(rtol: Any, atol: Any, max_iters: Any) -> None:
    """Raise :class:`SolverOptionError` unless tolerances and budget make sense together."""
    check_option(is_tolerance(rtol), "rtol", rtol, "a finite number >= 0")
    check_option(is_tolerance(atol), "atol", atol, "a finite number >= 0")
    good = max_iters is None or is_count(max_iters)
    check_option(good, "max_iters", max_iters, "None or an integer >= 1")
    check_option(
        not (rtol == 0 and atol == 0 and max_iters is None),
        "max_iters",
        None,
        "an integer >= 1 when rtol and atol are both 0 (a fixed number of iterations)",
    )


def where_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where the mask of shape (m,) is set, rows of ``no`` elsewhere."""
    return torch.where(mask[:, None], yes, no)


def over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


class Recurrence(ABC):
    """A recurrence over the rows still active; a row that is done is written out and dropped."""

    #: Everything that has one entry an active row; subclasses add their own.
    state: ClassVar[tuple[str, ...]] = (
        "row", "x", "r", "best_x", "best", "true_x", "true", "fruitless",
    )  # fmt: skip

    def __init__(
        self,
        system: DampedSystem,
        x0: Tensor | None,
        precondition: Precondition | None,
        *,
        rtol: float,
        atol: float,
        max_iters: int | None,
    ) -> None:
        self.system = system
        self.damping = system.resolve_damping()
        self.max_iters = max_iters or DEFAULT_MAX_ITERS
        self.precondition = precondition
        self.rounding = torch.finfo(system.operator.dtype).eps
        self.tolerances = system.tolerances(rtol, atol)
        # Far below any attainable residual, yet safe from underflow: check the recurrence here.
        self.claims = self.tolerances.clamp(min=torch.finfo(system.b.dtype).eps ** 2)
        self.symmetry = SymmetryCheck(system)

        m = len(system.b)
        self.statuses = [Status.CONVERGED] * m
        self.iterations = [0] * m
        self.directions: dict[int, Tensor] = {}
        self.x, self.r = system.begin(x0, self.damping)
        self.row = torch.arange(m, device=system.b.device)
        # The best iterate by the recurrence, and the best whose true residual is known.
        self.best_x, self.best = self.x, row_norms(self.r)
        self.true_x, self.true = self.best_x, self.best
        self.fruitless = torch.zeros_like(self.row)
        self.out_x, self.out_norms = self.x.clone(), self.best.clone()
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Set up the subclass's own state at x and its residual r."""

    @abstractmethod
    def _step(self, iteration: int) -> None:
        """One iteration of all active rows."""

    @abstractmethod
    def _restart(self, index: Tensor, residual: Tensor) -> None:
        """Begin afresh at the x of these rows, whose true residual this is."""

    def run(self) -> Outcome:
        """Iterate until every row has converged or failed."""
        # v = 0, or a warm start within the tolerance.
        self._finish(self.best <= self.tolerances, Status.CONVERGED, 0)
        for iteration in range(1, self.max_iters + 1):
            if len(self.row) == 0:
                break
            self._step(iteration)
        rest = torch.ones_like(self.row, dtype=torch.bool)
        self._finish(rest, Status.MAX_ITERATIONS, self.max_iters)
        return Outcome(
            x=self.out_x,
            residual_norms=self.out_norms,
            statuses=self.statuses,
            iterations=self.iterations,
            damping=self.damping,
            directions=self.directions,
        )

    def _keep_best(self, norms: Tensor, better: Tensor, all_better: bool) -> None:
        self.best = torch.where(better, norms, self.best)
        # x is new in each iteration, so where all rows got better it needs no copy.
        self.best_x = self.x if all_better else where_rows(better, self.x, self.best_x)

    def _due(self, norms: Tensor, iteration: int) -> Tensor:
        """Rows whose recurrence is to be compared with the truth now."""
        if iteration % REFRESH == 0:
            return torch.ones_like(self.row, dtype=torch.bool)
        return norms <= self.claims[self.row]

    def _check(self, index: Tensor, iteration: int) -> None:
        """Compare the recurrence with the true residual; finish rows or restart them."""
        rows = self.row[index]
        residual = self.system.residual(self.x[index], self.damping, rows)
        norms = row_norms(residual)
        drifted = ~(row_norms(residual - self.r[index]) <= 0.1 * norms)  # nan has, too
        gained = norms < 0.9 * self.true[index]
        self._record(index, self.x[index], norms)
        # Where the recurrence drifted, its bests since the last check mean nothing.
        off = torch.nonzero(drifted).flatten()
        if len(off):
            self._forget_bests(index[off])
            self._restart(index[off], residual[off])
        self.fruitless[index] += (drifted & ~gained).long()
        self.fruitless[index] *= (~gained).long()
        done = torch.zeros_like(self.best, dtype=torch.bool)
        done[index] = norms <= self.tolerances[rows]
        hopeless = (self.fruitless >= PATIENCE) & ~done
        self._finish(done, Status.CONVERGED, iteration)
        self._finish(hopeless[~done], Status.STAGNATED, iteration)

    def _record(self, index: Tensor, x: Tensor, norms: Tensor) -> None:
        """Take note of iterates whose true residual norms have been computed."""
        better = norms < self.true[index]
        self.true, self.true_x = self.true.clone(), self.true_x.clone()
        self.true[index] = torch.where(better, norms, self.true[index])
        self.true_x[index] = where_rows(better, x, self.true_x[index])

    def _forget_bests(self, index: Tensor) -> None:
        self.best, self.best_x = self.best.clone(), self.best_x.clone()
        self.best[index], self.best_x[index] = self.true[index], self.true_x[index]

    def _finish(self, done: Tensor, status: Status, iteration: int) -> None:
        """Write out rows with their best iterate and its true residual, and drop them."""
        index = torch.nonzero(done).flatten()
        if not len(index):
            return
        rows, x, norms = self.row[index], self.true_x[index], self.true[index]
        if status is not Status.CONVERGED:
            candidate = self.best_x[index]
            fresh = row_norms(self.system.residual(candidate, self.damping, rows))
            x = where_rows(fresh < norms, candidate, x)
            norms = torch.where(fresh < norms, fresh, norms)
        self.out_x[rows], self.out_norms[rows] = x, norms
        met = (norms <= self.tolerances[rows]).tolist()
        for row, ok in zip(rows.tolist(), met, strict=True):
            self.statuses[row] = Status.CONVERGED if ok else status
            self.iterations[row] = iteration
        self._drop(torch.nonzero(~done).flatten())

    def _drop(self, kept: Tensor) -> None:
        """Go on with the rows of these indices."""
        for name in self.state:
            setattr(self, name, getattr(self, name)[kept])


class SymmetryCheck:
    """p0'A p1 = p1'A p0: the first two products of a recurrence show it at no cost.

    Where they seem to differ, one product more measures |A|, which tells rounding from skew: p0
    and p1 of a well preconditioned recurrence lie where A is small, and all that their products
    hold of it may be rounding, of size eps |A| |p|.
    """

    def __init__(self, system: DampedSystem) -> None:
        self.system = system
        self.first: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, iteration: int, row: Tensor, p: Tensor, image: Tensor, size: Tensor) -> None:
        """Raise :class:`NotSymmetricError` where the products of two iterations show it.

        Args:
            iteration: from 1; only the first two are looked at.
            row: the right-hand side that each row of ``p`` belongs to, ascending.
            p: what was multiplied.
            image: its product, damping included.
            size: norms of the product and of the damped part, added: what rounding is relative to.
        """
        if iteration == 1:
            self.first = (row, p, image, size)
        elif iteration == 2 and self.first is not None:
            row0, p0, image0, size0 = self.first
            if len(row) < len(row0):  # some have finished in between
                still = torch.nonzero(torch.isin(row0, row)).flatten()
                p0, image0, size0 = p0[still], image0[still], size0[still]
            gap = ((p0 * image).sum(1) - (p * image0).sum(1)).abs()
            total = row_norms(p0) * size + row_norms(p) * size0
            dtype = self.system.operator.dtype
            (seems,) = self.system.look((gap > allowed_skew(dtype) * total).any())
            if seems:
                noise = torch.finfo(dtype).eps * self._size() * row_norms(p0) * row_norms(p)
                total = total + _SKEW_NOISE * noise / allowed_skew(dtype)
                check_skew(gap, total, dtype)
            self.first = None

    def _size(self) -> Tensor:
        """The Frobenius norm of A, estimated by a product with a Gaussian vector."""
        b = self.system.b
        source = torch.Generator().manual_seed(0)
        vector = torch.randn(1, b.shape[1], generator=source, device="cpu", dtype=torch.float32)
        vector = vector.to(b)
        return row_norms(self.system.product(vector))


def preconditioning(preconditioner: Any, system: DampedSystem) -> Precondition | None:
    """A user's preconditioner as a map of rows in the working dtype; None for none."""
    if preconditioner is None:
        return None
    layout = system.operator.layout
    like = layout.unflatten(torch.zeros(layout.dim, dtype=layout.dtype, device=layout.device))
    operator = as_operator(preconditioner, like=like)
    if isinstance(operator, CallableOperator):
        operator.name = OUTPUT

    def apply(r: Tensor) -> Tensor:
        # To the size that a narrow dtype holds all digits of.
        scales = powers_of_two(torch.linalg.vector_norm(r, dim=1))[:, None]
        z = operator._apply((r / scales).to(operator.dtype))
        system.expect_finite(z, OUTPUT, later=True)
        return z.to(r.dtype) * scales

    return apply


def preconditioned(
    precondition: Precondition | None, r: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """The preconditioned residual, and the preconditioner's own scale, taken out of it.

    A multiple of a preconditioner makes the same iterates; near the size of one, none of their
    squares leaves the range of the dtype.  The scale, a power of two a row, is that of the first
    product.
    """
    if precondition is None:
        return r, unit
    z = precondition(r)
    first = over(safe_norms(z), torch.linalg.vector_norm(r, dim=1))
    unit = torch.where(unit > 0, unit, powers_of_two(first))
    return z / unit[:, None], unit


def indefinite_preconditioner(rz: Tensor, r: Tensor) -> PreconditionerError:
    """The error for a preconditioner M with r'M r <= 0 for some row r of a block."""
    row = int(torch.nonzero(rz <= 0).flatten()[0])
    return PreconditionerError(
        f"the preconditioner is not positive definite: r'M r = {float(rz[row]):.2e} for a "
        f"residual of norm {float(row_norms(r[row : row + 1])):.2e}, expected > 0. It must be a "
        "symmetric positive definite approximation of the inverse of A + damping I."
    )
