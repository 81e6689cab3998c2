"""Conjugate gradients, many right-hand sides in one recurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..norms import plain_norms, row_norms
from ..transforms import tangents
from .base import DampedSystem, Outcome, Solver, Status
from .cg_one import LEAST, OneRow
from .fixed import FixedWork
from .krylov import (
    DEFAULT_MAX_ITERS,
    LOST,
    REFRESH,
    Precondition,
    Recurrence,
    SymmetryCheck,
    check_krylov_options,
    indefinite_preconditioner,
    over,
    preconditioned,
    preconditioning,
    where_rows,
)
from .options import check_option
from .orthogonal import Residuals


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
        reorthogonalize: whether each residual is made orthogonal to all before it, which are kept:
            n numbers an iteration for each right-hand side, of the operator's dtype.  It takes
            another pass over what is kept, and saves products: rounding makes CG find the large
            eigenvalues of Hessians again and again, so that it takes 1.2 to 2.5 times as many (to
            1e-4 in float32 88 instead of 43 for a small convolutional network, 57 instead of 33 and
            176 instead of 70 for critics of 4,545 parameters).  Worth it where a product costs more
            than reading the kept vectors twice.  With ``compile`` the last 64 are kept.
        mixed_precision: whether a compiled solve in float64 makes its products in float32, where
            they take a third to two thirds of the time.  A round is a recurrence that ends where
            the rounding of its steps comes near to its residual; a product in float64 then gives
            the true one, from which the next begins.  So the tolerance is met in float64, or not at
            all.  A round that gains less than two digits (products whose rounding is too much for
            the condition of the system, or that leave the range of float32) is the last, and the
            solve goes on in float64; iterations of either kind count.  ``rtol`` or ``atol`` must be
            positive.  Without effect on systems in float32.

    Raises (when solving):
        NotSymmetricError: the first two products show an operator that is not symmetric.
        PreconditionerError: r'M r <= 0 for a residual r.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the solve is then an eager one.

    Cost: one HVP an iteration, one a check of the true residual, of either dtype.  Many right-hand
    sides share block products; columns that are done take no further part.  One right-hand side on
    the CPU is worked on in place, by two inner products and three updates an iteration besides the
    product.
    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952); residual replacement
    after van der Vorst and Ye, SIAM J. Sci. Comput. 22 (2000); rounds in a narrower dtype are
    iterative refinement, Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12.

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
    reorthogonalize: bool = False
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_krylov_options(self.rtol, self.atol, self.max_iters)
        for name in ("compile", "reorthogonalize", "mixed_precision"):
            value = getattr(self, name)
            check_option(isinstance(value, bool), name, value, "True or False")
        good = not (self.compile and self.preconditioner is not None)
        check_option(good, "compile", self.compile, "False where there is a preconditioner")
        good = not self.mixed_precision or (self.compile and (self.rtol > 0 or self.atol > 0))
        expected = "False without compile=True, and where rtol and atol are both 0"
        check_option(good, "mixed_precision", self.mixed_precision, expected)

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        found = None
        if self.compile:
            from .compiled_cg import run_compiled  # with parts of PyTorch that take long to import

            found = run_compiled(self, system, x0)
        if found is None:
            return run_cg(
                self, system, x0, preconditioning(self.preconditioner, system), self.reorthogonalize
            )
        if found.statuses != [Status.STAGNATED]:
            return found
        # Something is to be decided, on values and by measurements, that a graph does not decide.
        if self.rtol == 0 and self.atol == 0:
            return run_cg(self, system, x0, None, self.reorthogonalize)
        left = max(1, (self.max_iters or DEFAULT_MAX_ITERS) - found.iterations[0])
        rest = replace(self, max_iters=left)
        outcome = run_cg(rest, system, found.x, None, self.reorthogonalize)
        return replace(outcome, iterations=[found.iterations[0] + outcome.iterations[0]])

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.rtol or self.atol:
            return super()._run_traced(system, x0)
        precondition = preconditioning(self.preconditioner, system)
        work = FixedWork.begin(
            system, x0, self.max_iters, traced=True, preconditioned=precondition is not None
        )
        x = _fixed(work, precondition, None, self.reorthogonalize).answer
        return x, work.residual_norms(x)


def run_cg(
    config: Any,
    system: DampedSystem,
    x0: Tensor | None,
    precondition: Precondition | None,
    reorthogonalize: bool = False,
) -> Outcome:
    """CG with the tolerances and the budget of ``config`` and any preconditioner."""
    if config.rtol == 0 and config.atol == 0:
        work = FixedWork.begin(
            system, x0, config.max_iters, traced=False, preconditioned=precondition is not None
        )
        return _fixed(work, precondition, SymmetryCheck(system), reorthogonalize).outcome()
    kept = None
    if reorthogonalize:
        kept = Residuals(system, preconditioned=precondition is not None)
    if len(system.b) == 1 and _on_host(system.b):
        return OneRow.solve(config, system, x0, precondition, kept)
    return _Recurrence(
        system,
        x0,
        precondition,
        kept,
        rtol=config.rtol,
        atol=config.atol,
        max_iters=config.max_iters,
    ).run()


class _Recurrence(Recurrence):
    state = (*Recurrence.state, "p", "rz", "unit")

    def __init__(
        self,
        system: DampedSystem,
        x0: Tensor | None,
        precondition: Precondition | None,
        kept: Residuals | None,
        **options: Any,
    ) -> None:
        self.kept = kept
        super().__init__(system, x0, precondition, **options)

    def _begin(self) -> None:
        self.p = torch.zeros_like(self.r)
        self.rz = torch.zeros_like(self.best)  # rz = 0 marks rows that start afresh
        self.unit = torch.zeros_like(self.best)
        self.least = LEAST[self.r.dtype]

    def _restart(self, index: Tensor, residual: Tensor) -> None:
        self.r[index] = residual
        self.rz[index] = 0.0
        if self.kept is not None:
            self.kept.forget(torch.isin(torch.arange(len(self.r), device=index.device), index))

    def _drop(self, kept: Tensor) -> None:
        super()._drop(kept)
        if self.kept is not None:
            self.kept.keep(kept)

    def _step(self, iteration: int) -> None:
        if len(self.row) == 1 and _on_host(self.r):
            self._alone(iteration)
            return
        z, self.unit = preconditioned(self.precondition, self.r, self.unit)
        rz = torch.linalg.vecdot(self.r, z)
        if self.kept is not None:
            self.kept.add(self.r, z, rz)
        self.p = torch.addcmul(z, over(rz, self.rz)[:, None], self.p)
        product = self.system.product(self.p, later=True)
        image = torch.add(product, self.p, alpha=self.damping) if self.damping else product
        curvature = torch.linalg.vecdot(self.p, image)
        p_norms = torch.linalg.vector_norm(self.p, dim=1)
        # Squares may leave the dtype's range; then once more with care.
        for norms_of in (plain_norms, row_norms):
            sizes = norms_of(product)
            extreme = ~((sizes > self.least) & (sizes < 1.0 / self.least))
            # What rounding is relative to, also where damping cancels a negative curvature.
            sizes = sizes + self.damping * p_norms
            stuck = curvature <= self.rounding * p_norms * sizes
            alpha = torch.where(stuck, 0.0, over(rz, curvature))[:, None]
            x = torch.addcmul(self.x, alpha, self.p)
            r = torch.addcmul(self.r, alpha, image, value=-1.0)
            if self.kept is not None:  # one that stands still is kept itself
                r = torch.where(alpha != 0, self.kept.cleaned(r), r)
            norms = plain_norms(r)
            better = norms < self.best
            lost = ~(norms <= LOST * self.best)  # nan is, too
            due = self._due(norms, iteration) | lost
            # All that is branched on, in one transfer from the device.
            flags = ((rz <= 0).any(), stuck.any(), extreme.any(), due.any(), better.all())
            refused, any_stuck, any_extreme, any_due, all_better = self.system.look(*flags)
            if not any_extreme:
                break
        if refused:
            raise indefinite_preconditioner(rz, self.r)
        self.symmetry(iteration, self.row, self.p, image, sizes)
        self.x, self.r, self.rz = x, r, rz
        self._keep_best(norms, better, all_better)
        if any_due:  # x may have left the dtype where the residual is lost
            self.x = where_rows(lost, self.best_x, self.x)
        if any_stuck:
            for i in torch.nonzero(stuck).flatten().tolist():
                self.directions[int(self.row[i])] = self.p[i] / p_norms[i]
            self._finish(stuck, Status.NEGATIVE_CURVATURE, iteration)
            due = due[~stuck]
            any_due = bool(due.any())  # those that were due may be those that are gone
        if any_due and iteration < self.max_iters:
            self._check(torch.nonzero(due).flatten(), iteration)

    def _alone(self, iteration: int) -> None:
        """All further iterations of the only row left, on the CPU."""
        verdict = OneRow.left_of(self, self.p, float(self.rz), self.unit, self.kept).run(iteration)
        row = int(self.row)
        self.out_x[row], self.out_norms[row] = verdict.x[0], verdict.norm
        self.statuses[row], self.iterations[row] = verdict.status, verdict.iteration
        if verdict.direction is not None:
            self.directions[row] = verdict.direction
        self._drop(self.row[:0])


def _fixed(
    work: FixedWork,
    precondition: Precondition | None,
    symmetry: SymmetryCheck | None,
    reorthogonalize: bool,
) -> FixedWork:
    """A fixed number of iterations without a branch on values; rows that are done are frozen."""
    system, damping = work.system, work.damping
    rounding = torch.finfo(system.operator.dtype).eps
    p, rz = torch.zeros_like(work.r), torch.zeros_like(work.norms)
    unit = torch.zeros_like(work.norms)
    kept = None
    if reorthogonalize:
        kept = Residuals(system, preconditioned=precondition is not None, capacity=work.count)
    for iteration in range(1, work.count + 1):
        z, unit = preconditioned(precondition, work.r, unit)
        last, rz = rz, torch.linalg.vecdot(work.r, z)
        if precondition is not None:
            work.refuse(work.live & (rz <= 0), rz)
        live = work.live
        if kept is not None:
            kept.add(work.r, z, torch.where(live, rz, 0.0))
        p = torch.addcmul(z, over(rz, last)[:, None], p)
        product = system.product(p, later=True)
        p_norms = plain_norms(p)
        sizes = work.norms_of(product) + damping * p_norms
        image = torch.add(product, p, alpha=damping) if damping else product
        if symmetry is not None:
            symmetry(iteration, work.rows, p, image, sizes)
        curvature = torch.linalg.vecdot(p, image)
        stuck = live & (curvature <= rounding * p_norms * sizes)
        work.freeze(stuck, p, p_norms)
        alpha = torch.where(live & ~stuck, over(rz, curvature), 0.0)[:, None]
        x = torch.addcmul(work.x, alpha, p)
        r = torch.addcmul(work.r, alpha, image, value=-1.0)
        if kept is not None:
            r = torch.where(alpha != 0, kept.cleaned(r), r)  # one that stands still is kept itself
            x, r = work.held(x, r)
        work.advance(x, r)
        if iteration % REFRESH == 0 and iteration < work.count:
            drifted = work.refresh()
            rz = torch.where(drifted, 0.0, rz)
            if kept is not None:
                kept.forget(drifted)
    return work


def _on_host(block: Tensor) -> bool:
    """Whether the numbers are where they are read at no cost, and no dual numbers are about.

    Products that carry tangents through a closure cannot be written to preallocated memory.
    """
    return block.device.type == "cpu" and not tangents()
