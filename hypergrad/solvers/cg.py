"""Conjugate gradients, many right-hand sides in one recurrence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..norms import powers_of_two, row_norms
from .base import DampedSystem, Outcome, Solver, Status, check_option
from .compiled_cg import run_compiled
from .fixed import FixedWork
from .krylov import (
    DEFAULT_MAX_ITERS,
    REFRESH,
    Precondition,
    Recurrence,
    SymmetryCheck,
    check_krylov_options,
    indefinite_preconditioner,
    over,
    preconditioning,
)
from .traced import safe_norms

#: Rows whose norm is this small, or above its inverse, are summed with care: squares that count
#: could have left the range of the dtype.
_LEAST = {torch.float64: 1e-140, torch.float32: 1e-16}

#: Norms from here to its inverse need no scaling before a product in float32.
_NEAR_ONE = 1e-3


@dataclass(frozen=True)
class CG(Solver):
    """Preconditioned conjugate gradients on (A + damping I) x = v.

    Stops when the true residual, of the answer as it is returned, satisfies
    |v - (A + damping I) x| <= max(rtol |v|, atol).  The recursive residual is checked against
    the true one when it claims convergence and every 50 iterations; where they disagree the
    recurrence restarts from the true one, and three restarts without gain end the solve as
    STAGNATED.  A direction p with p'(A + damping I)p <= 0 (to rounding) ends it as
    NEGATIVE_CURVATURE with the direction in the report; CG never steps along it.  On any failure
    the iterate with the smallest residual is returned (of a fixed number of iterations that met
    negative curvature, the last one before it, or the start if that is better).

    Attributes:
        rtol: tolerance relative to |v|.
        atol: absolute tolerance.  With ``rtol=0, atol=0`` exactly ``max_iters`` iterations are
            done and the status is FIXED_ITERATIONS (or until the residual is exactly zero).
        max_iters: iteration budget; None for 10,000.
        preconditioner: an approximate inverse of A + damping I, symmetric positive definite:
            anything :func:`hypergrad.as_operator` takes.
        compile: whether a solve for one right-hand side is one graph of ``torch.compile``: the
            products, of which the gradient and all that does not depend on the vector is computed
            once, the recurrence, and the check of the answer.  For :func:`hypergrad.hessian`,
            :func:`hypergrad.ggn`, matrices, sums and multiples of them, and callables that
            :func:`hypergrad.as_operator` was told are ``batchable``, in float32 or float64; not
            with a preconditioner.  Vectors are then of the operator's dtype (inner products of
            float32 ones are summed in float64), and rounds go on from the true residual until it
            is within the tolerance.  Operators of the same functions, shapes and dtypes share a
            graph; compiling takes seconds, which the logger ``"hypergrad"`` tells.  What a graph
            cannot settle, such as negative curvature, goes on eagerly.  Several right-hand sides
            in one solve are a block of eager CG.

    Raises (when solving):
        NotSymmetricError: the first two products show an operator that is not symmetric.
        PreconditionerError: r'M r <= 0 for a residual r.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the solve is then an eager one.

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
    compile: bool = False

    def __post_init__(self) -> None:
        check_krylov_options(self.rtol, self.atol, self.max_iters)
        good = isinstance(self.compile, bool)
        check_option(good, "compile", self.compile, "True or False")
        good = not (self.compile and self.preconditioner is not None)
        check_option(good, "compile", self.compile, "False where there is a preconditioner")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        found = run_compiled(self, system, x0) if self.compile else None
        if found is None:
            return run_cg(self, system, x0, preconditioning(self.preconditioner, system))
        if found.statuses != [Status.STAGNATED]:
            return found
        # Something is to be decided, on values and by measurements, that a graph does not decide.
        if self.rtol == 0 and self.atol == 0:
            return run_cg(self, system, x0, None)
        left = max(1, (self.max_iters or DEFAULT_MAX_ITERS) - found.iterations[0])
        outcome = run_cg(replace(self, max_iters=left), system, found.x, None)
        return replace(outcome, iterations=[found.iterations[0] + outcome.iterations[0]])

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.rtol or self.atol:
            return super()._run_traced(system, x0)
        work = FixedWork.begin(system, x0, self.max_iters, traced=True)
        x = _fixed(work, preconditioning(self.preconditioner, system), None).answer
        return x, work.residual_norms(x)


def run_cg(
    config: Any, system: DampedSystem, x0: Tensor | None, precondition: Precondition | None
) -> Outcome:
    """CG with the tolerances and the budget of ``config`` and any preconditioner."""
    if config.rtol == 0 and config.atol == 0:
        work = FixedWork.begin(system, x0, config.max_iters, traced=False)
        return _fixed(work, precondition, SymmetryCheck(system)).outcome()
    return _Recurrence(
        system,
        x0,
        precondition,
        rtol=config.rtol,
        atol=config.atol,
        max_iters=config.max_iters,
    ).run()


class _Recurrence(Recurrence):
    state = (*Recurrence.state, "p", "rz", "unit")

    def _begin(self) -> None:
        self.p = torch.zeros_like(self.r)
        self.rz = torch.zeros_like(self.best)  # rz = 0 marks rows that start afresh
        self.unit = torch.zeros_like(self.best)
        self.least = _LEAST[self.r.dtype]
        # One right-hand side on the CPU: its numbers are read at no cost, and a dozen operations
        # on tensors of one entry would take longer than those on vectors.
        self.on_host = self.r.device.type == "cpu"
        self.numbers: _Numbers | None = None

    def _restart(self, index: Tensor, residual: Tensor) -> None:
        self.r[index] = residual
        self.rz[index] = 0.0

    def _step(self, iteration: int) -> None:
        z, self.unit = _preconditioned(self.precondition, self.r, self.unit)
        if self.on_host and len(self.row) == 1:
            left = self._step_on_host(iteration, z)
            if left is None:
                return
            product, rz = left, torch.linalg.vecdot(self.r, z)
        else:
            rz = torch.linalg.vecdot(self.r, z)
            self.p = torch.addcmul(z, over(rz, self.rz)[:, None], self.p)
            product = self.system.product(self.p)
        image = torch.add(product, self.p, alpha=self.damping) if self.damping else product
        curvature = torch.linalg.vecdot(self.p, image)
        p_norms = torch.linalg.vector_norm(self.p, dim=1)
        # Squares may leave the dtype's range; then once more with care.
        for norms_of in (_plain_norms, row_norms):
            sizes = norms_of(product)
            extreme = ~((sizes > self.least) & (sizes < 1.0 / self.least))
            # What rounding is relative to, also where damping cancels a negative curvature.
            sizes = sizes + self.damping * p_norms
            stuck = curvature <= self.rounding * p_norms * sizes
            alpha = torch.where(stuck, 0.0, over(rz, curvature))[:, None]
            x = torch.addcmul(self.x, alpha, self.p)
            r = torch.addcmul(self.r, alpha, image, value=-1.0)
            norms = _plain_norms(r)
            better = norms < self.best
            due = self._due(norms, iteration)
            # All that is branched on, in one transfer from the device.
            flags = ((rz <= 0).any(), stuck.any(), extreme.any(), due.any(), better.all())
            refused, any_stuck, any_extreme, any_due, all_better = torch.stack(flags).tolist()
            if not any_extreme:
                break
        if refused:
            raise indefinite_preconditioner(rz, self.r)
        self.symmetry(iteration, self.row, self.p, image, sizes)
        self.x, self.r, self.rz = x, r, rz
        self._keep_best(norms, better, all_better)
        if any_stuck:
            for i in torch.nonzero(stuck).flatten().tolist():
                self.directions[int(self.row[i])] = self.p[i] / p_norms[i]
            self._finish(stuck, Status.NEGATIVE_CURVATURE, iteration)
            due = due[~stuck]
            any_due = bool(due.any())  # those that were due may be those that are gone
        if any_due and iteration < self.max_iters:
            self._check(torch.nonzero(due).flatten(), iteration)

    def _step_on_host(self, iteration: int, z: Tensor) -> Tensor | None:
        """One iteration of the only row left, with its scalars as Python's numbers.

        ``z`` is the preconditioned residual.

        None where it is done; the product with the new ``p`` where there is something to decide
        that :meth:`_step` knows better.
        """
        known = self.numbers
        if known is None or known.r is not self.r:
            known = _Numbers(
                r=self.r,
                squared=float(torch.dot(self.r[0], self.r[0])),
                last=float(self.rz),
                best=float(self.best),
                claim=float(self.claims[self.row]),
            )
        self.numbers = None
        rz = known.squared if z is self.r else float(torch.dot(self.r[0], z[0]))
        self.p = torch.add(z, self.p, alpha=rz / known.last if known.last else 0.0)
        p = self.p[0]
        p_norm = math.sqrt(torch.dot(p, p))
        regular = rz > 0 and self.least < p_norm < 1.0 / self.least
        product = self._product(p_norm) if regular else self.system.product(self.p)
        image = torch.add(product, self.p, alpha=self.damping) if self.damping else product
        size = math.sqrt(torch.dot(product[0], product[0]))
        regular = regular and self.least < size < 1.0 / self.least
        size += self.damping * p_norm  # as in _step
        curvature = float(torch.dot(p, image[0]))
        if not (regular and curvature > self.rounding * p_norm * size):
            self._put_back(known)
            return product
        if iteration <= 2:
            self.symmetry(iteration, self.row, self.p, image, torch.full_like(self.best, size))
        alpha = rz / curvature
        self.x = torch.add(self.x, self.p, alpha=alpha)
        self.r = torch.sub(self.r, image, alpha=alpha)
        squared = float(torch.dot(self.r[0], self.r[0]))
        norm = math.sqrt(squared)
        if norm < known.best:  # x is new in each iteration and needs no copy
            known.best, self.best_x = norm, self.x
        known.r, known.squared, known.last = self.r, squared, rz
        if norm <= known.claim or iteration % REFRESH == 0:
            self._put_back(known)
            if iteration < self.max_iters:
                self._check(torch.zeros(1, dtype=torch.long), iteration)
        else:
            self.numbers = known
        return None

    def _product(self, norm: float) -> Tensor:
        """A p for the p of one row, whose norm is known."""
        system = self.system
        if system.operator.dtype is not torch.float32 or self.p.dtype is not torch.float64:
            return system.product(self.p)
        if _NEAR_ONE < norm < 1.0 / _NEAR_ONE:
            return system.narrow_product(self.p.float()).double()
        scale = math.ldexp(1.0, math.frexp(norm)[1])
        return system.narrow_product((self.p / scale).float()).double().mul_(scale)

    def _put_back(self, known: _Numbers) -> None:
        """The numbers into the tensors that everything else reads."""
        self.rz = torch.full_like(self.rz, known.last)
        self.best = torch.full_like(self.best, known.best)


@dataclass
class _Numbers:
    """What the next iteration of a single row on the CPU starts from.

    Attributes:
        r: the residual that they belong to; after a restart or a drop it is another.
        squared: r'r.
        last: r'z of the last iteration, z = r without a preconditioner; 0 where there was none.
        best: the smallest residual norm so far.
        claim: the residual norm that ends the solve.
    """

    r: Tensor
    squared: float
    last: float
    best: float
    claim: float


def _fixed(
    work: FixedWork, precondition: Precondition | None, symmetry: SymmetryCheck | None
) -> FixedWork:
    """A fixed number of iterations without a branch on values; rows that are done are frozen."""
    system, damping = work.system, work.damping
    rounding = torch.finfo(system.operator.dtype).eps
    p, rz = torch.zeros_like(work.r), torch.zeros_like(work.norms)
    unit = torch.zeros_like(work.norms)
    for iteration in range(1, work.count + 1):
        z, unit = _preconditioned(precondition, work.r, unit)
        last, rz = rz, torch.linalg.vecdot(work.r, z)
        if precondition is not None:
            work.refuse(work.live & (rz <= 0), rz)
        live = work.live
        p = torch.addcmul(z, over(rz, last)[:, None], p)
        product = system.product(p)
        p_norms = _plain_norms(p)
        sizes = work.norms_of(product) + damping * p_norms
        image = torch.add(product, p, alpha=damping) if damping else product
        if symmetry is not None:
            symmetry(iteration, work.rows, p, image, sizes)
        curvature = torch.linalg.vecdot(p, image)
        stuck = live & (curvature <= rounding * p_norms * sizes)
        work.freeze(stuck, p, p_norms)
        alpha = torch.where(live & ~stuck, over(rz, curvature), 0.0)[:, None]
        work.advance(
            torch.addcmul(work.x, alpha, p), torch.addcmul(work.r, alpha, image, value=-1.0)
        )
        if iteration % REFRESH == 0 and iteration < work.count:
            rz = torch.where(work.refresh(), 0.0, rz)
    return work


def _preconditioned(
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
    first = over(safe_norms(z), _plain_norms(r))
    unit = torch.where(unit > 0, unit, powers_of_two(first))
    return z / unit[:, None], unit


def _plain_norms(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms
