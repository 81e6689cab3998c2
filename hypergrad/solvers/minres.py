"""MINRES, many right-hand sides in one recurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem, Outcome, Solver, Status
from .fixed import FixedWork
from .krylov import (
    PATIENCE,
    REFRESH,
    Precondition,
    Recurrence,
    SymmetryCheck,
    check_krylov_options,
    indefinite_preconditioner,
    over,
    preconditioning,
    where_rows,
)
from .lanczos_step import DRIFT, RISK, Lanczos, lanczos_step, smallest_ritz_value
from .options import check_option

#: Rounding of a product with x, at most, in eps |A| |x|.
_NOISE = 1.0
#: A residual this much smaller is no work of rounding.
_SURE = 0.1
#: Least-squares answers whose residuals differ relatively by less are equals.
_EQUAL = 1e-6


@dataclass(frozen=True)
class MINRES(Solver):
    """Preconditioned MINRES on (A + damping I) x = v, for symmetric A of any signature.

    Of all x in the Krylov space it takes the one of smallest residual, in the norm
    (r'M r)^(1/2) of the preconditioner M (the Euclidean norm without one).  It stops when the true
    residual, of the answer as it is returned, satisfies
    |v - (A + damping I) x| <= max(rtol |v|, atol) in the Euclidean norm.  The recursive residual
    is checked against the true one when it claims convergence, every 50 iterations, and at every
    step so long that the rounding of its product could outweigh the residual; where they
    disagree, the method restarts from the better of the two iterates.  A restart that gains
    nothing, three that gain little, or a singular system without a solution end it as STAGNATED.

    Negative curvature is no failure: the smallest Ritz value of A is in the report.  A singular
    system is solved where v lies in the range of A + damping I; where it does not, the answer
    (STAGNATED) is a least-squares solution, without a component along its residual, which makes it
    the one of smallest norm (up to the rounding of the products, and in the norms of M).

    Attributes:
        rtol: tolerance relative to |v|.
        atol: absolute tolerance.  With ``rtol=0, atol=0`` exactly ``max_iters`` iterations are
            done and the status is FIXED_ITERATIONS (or until the residual is exactly zero).
        max_iters: iteration budget; None for 10,000.
        preconditioner: a symmetric positive definite M close to the inverse of |A + damping I|:
            anything :func:`hypergrad.as_operator` takes.
        compile: whether a solve for one right-hand side is one graph of ``torch.compile``, as by
            ``CG(compile=True)``, for the same operators; not with a preconditioner.  At most 50
            iterations are a round, which ends with the true residual; the next goes on with the
            recurrence, or, where that is lost, begins at the true residual while each restart
            divides it by ten.  Vectors are of the working dtype, in products of the operator's.
            What is left to eager MINRES, which begins anew: a singular system without a solution,
            a tolerance below rounding, products that are not symmetric, several right-hand sides.

    Raises (when solving):
        NotSymmetricError: the first two products show an operator that is not symmetric.
        PreconditionerError: u'M u <= 0 for a vector u.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the solve is then an eager one.

    Cost: one HVP an iteration, one a check of the true residual; nine vectors of memory a
    right-hand side, eleven with a preconditioner.  Many right-hand sides share block products;
    columns that are done take no further part.
    Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975); preconditioned after Elman,
    Silvester and Wathen, Finite Elements and Fast Iterative Solvers (2014), algorithm 4.1; the
    least-squares solution of smallest norm after Liu, Milzarek and Roosta, arXiv 2309.17096.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64))
        >>> v = torch.ones(3, dtype=torch.float64)
        >>> solution = hypergrad.solve(a, v, hypergrad.MINRES(rtol=1e-8))
        >>> solution.value
        tensor([ 1.0000, -0.5000,  0.2500], dtype=torch.float64)
        >>> solution.info.iterations, round(solution.info.smallest_eigenvalue, 6)
        (3, -2.0)
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_iters: int | None = None
    preconditioner: Any = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_krylov_options(self.rtol, self.atol, self.max_iters)
        check_option(isinstance(self.compile, bool), "compile", self.compile, "True or False")
        good = not (self.compile and self.preconditioner is not None)
        check_option(good, "compile", self.compile, "False where there is a preconditioner")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if self.compile:
            from .compiled_minres import run_compiled  # with parts of PyTorch that take long

            found = run_compiled(self, system, x0)
            if found is not None:
                return found
        precondition = preconditioning(self.preconditioner, system)
        if self.rtol == 0 and self.atol == 0:
            work = FixedWork.begin(
                system, x0, self.max_iters, traced=False, preconditioned=precondition is not None
            )
            return _fixed(work, precondition, SymmetryCheck(system)).outcome()
        return _Recurrence(
            system, x0, precondition, rtol=self.rtol, atol=self.atol, max_iters=self.max_iters
        ).run()

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.rtol or self.atol:
            return super()._run_traced(system, x0)
        precondition = preconditioning(self.preconditioner, system)
        work = FixedWork.begin(
            system, x0, self.max_iters, traced=True, preconditioned=precondition is not None
        )
        x = _fixed(work, precondition, None).answer
        return x, work.residual_norms(x)


class _Recurrence(Recurrence):
    state = (*Recurrence.state, "norms", "origin", "null_x", "null")

    def _begin(self) -> None:
        self.lanczos = Lanczos.begin(self.precondition, self.r, row_norms)
        self.norms = self.best
        self.origin = self.true.clone()  # true residual norms at the last (re)start
        # The iterate whose residual was nearest to the null space, and |A r| / (|A| |r|) there,
        # plus what the residual owes to rounding.
        self.null_x, self.null = self.x, torch.ones_like(self.best)
        #: Diagonal and off-diagonal of T by iteration, with the rows they belong to.
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rayleigh = torch.full((), float("inf"), dtype=self.r.dtype, device=self.r.device)

    def _drop(self, kept: Tensor) -> None:
        super()._drop(kept)
        self.lanczos = self.lanczos.select(kept)

    def _restart(self, index: Tensor, residual: Tensor) -> None:
        self.r[index] = residual
        self.norms = row_norms(self.r)
        fresh = Lanczos.begin(self.precondition, self.r, row_norms)
        fresh.size = self.lanczos.size
        chosen = torch.zeros_like(self.row, dtype=torch.bool)
        chosen[index] = True
        self.lanczos = fresh.where(chosen, self.lanczos)

    def _step(self, iteration: int) -> None:
        step = lanczos_step(self.lanczos, self.system, self.damping, self.precondition, row_norms)
        self.symmetry(iteration, self.row, self.lanczos.z, step.image, step.sizes)
        self.entries.append((self.row, step.delta, self.lanczos.gamma))
        self.rayleigh = torch.minimum(self.rayleigh, step.rayleigh.min())
        self.lanczos = step.state
        before = self.x
        # A long x has a residual of rounding, which may be nearer to the null space by chance.
        noise = self.rounding * step.state.size * row_norms(before)
        null = step.null + over(noise, self.norms)
        nearer = null < 0.5 * self.null
        self.x = torch.addcmul(self.x, step.length[:, None], step.state.w)
        r = where_rows(step.broken, self.r, step.residual(self.r))
        norms = torch.linalg.vector_norm(r, dim=1)
        # The rounding of the step's product.
        risky = self.rounding * step.state.size * step.move > RISK * norms
        better = (norms < self.best) & ~risky
        due = self._due(norms, iteration) | risky | step.broken
        flags = ((step.state.theta <= 0).any(), nearer.any(), due.any(), better.all())
        refused, any_nearer, any_due, all_better = self.system.look(*flags)
        if refused:
            raise indefinite_preconditioner(step.state.theta, step.state.p)
        if any_nearer:
            self.null = torch.where(nearer, null, self.null)
            self.null_x = where_rows(nearer, before, self.null_x)
        self.r, self.norms = r, norms
        self._keep_best(norms, better, all_better)
        if any_due and iteration < self.max_iters:
            self._judge(due, step.broken, iteration)
        elif any_due:
            self._look_last(due & ~better & ~step.broken, iteration)

    def _record(self, index: Tensor, x: Tensor, norms: Tensor) -> None:
        """Take note of true residuals, unless they are less than what they owe to rounding.

        Where a system has no solution, huge steps along its null space change the residual by the
        rounding of their products only, now and then for the better.
        """
        noise, true = self._noise(index, x), self.true[index]
        sure = (norms + noise < true) | (norms < _SURE * true)
        sure |= norms <= self.tolerances[self.row[index]]
        super()._record(index, x, torch.where(sure, norms, torch.inf))

    def _noise(self, index: Tensor, x: Tensor) -> Tensor:
        """The rounding of the product with these iterates."""
        return _NOISE * self.rounding * self.lanczos.size[index] * row_norms(x)

    def _judge(self, due: Tensor, broken: Tensor, iteration: int) -> None:
        """Compare the recurrence with the true residual; finish rows or restart them."""
        index = torch.nonzero(due).flatten()
        residual = self.system.residual(self.x[index], self.damping, self.row[index])
        norms = row_norms(residual)
        lost = (row_norms(residual - self.r[index]) > DRIFT * norms) | broken[index]
        self._record(index, self.x[index], norms)
        lost &= self.true[index] > self.tolerances[self.row[index]]
        if bool(lost.any()):
            index = index[lost]
            # The best by the recurrence: before a step that went wrong, it was the right one.
            before = self.best_x[index]
            norms = row_norms(self.system.residual(before, self.damping, self.row[index]))
            self._record(index, before, norms)
            self._start_over(index)
        done = torch.zeros_like(due)
        done[torch.nonzero(due).flatten()] = True
        done &= self.true <= self.tolerances[self.row]
        hopeless = (self.fruitless >= PATIENCE) & ~done
        if bool(hopeless.any()):
            self._settle(torch.nonzero(hopeless).flatten())
        self._finish(done, Status.CONVERGED, iteration)
        self._finish(hopeless[~done], Status.STAGNATED, iteration)

    def _look_last(self, unknown: Tensor, iteration: int) -> None:
        """With the budget spent, see whether a step that may be rounding was for the better."""
        index = torch.nonzero(unknown).flatten()
        if len(index):
            residual = self.system.residual(self.x[index], self.damping, self.row[index])
            self._record(index, self.x[index], row_norms(residual))
            done = unknown & (self.true <= self.tolerances[self.row])
            self._finish(done, Status.CONVERGED, iteration)

    def _start_over(self, index: Tensor) -> None:
        """Begin afresh at the best true iterates, unless that was tried and gained nothing."""
        true, origin = self.true[index], self.origin[index]
        gained = true < 0.9 * origin
        count = torch.where(gained, 0, self.fruitless[index] + 1)
        # From the same start the same would follow.
        self.fruitless[index] = torch.where(true >= origin, PATIENCE, count)
        self.origin[index] = true
        self._forget_bests(index)
        index = index[self.fruitless[index] < PATIENCE]
        if len(index):
            self.x = self.x.clone()
            self.x[index] = self.true_x[index]
            residual = self.system.residual(self.x[index], self.damping, self.row[index])
            self._restart(index, residual)

    def _settle(self, index: Tensor) -> None:
        """Put a least-squares answer of small norm in the place of one of equal residual.

        Past a least-squares solution, steps along the null space are long and gain nothing, so
        that of equals the iterate is taken whose residual r was nearest to it.  There A M r = 0,
        and x may lose its component along M r (r without a preconditioner): the residual stays
        what it is, and what remains is the least-squares solution of smallest norm (Liu, Milzarek
        and Roosta).
        """
        x, rows = self.null_x[index], self.row[index]
        residual = self.system.residual(x, self.damping, rows)
        self._replace(index, x, row_norms(residual))
        null = residual if self.precondition is None else self.precondition(residual)
        along = over(torch.linalg.vecdot(residual, x), torch.linalg.vecdot(residual, null))
        shorter = torch.addcmul(x, along[:, None], null, value=-1.0)
        self._replace(index, shorter, row_norms(self.system.residual(shorter, self.damping, rows)))
        self._forget_bests(index)

    def _replace(self, index: Tensor, x: Tensor, norms: Tensor) -> None:
        """Take iterates whose residuals are no larger than the best, to rounding."""
        allowed = self.true[index] * (1.0 + _EQUAL) + self._noise(index, self.true_x[index])
        good = norms <= torch.minimum(allowed, self.system.b_norms[self.row[index]])
        self.true_x[index] = where_rows(good, x, self.true_x[index])
        self.true[index] = torch.where(good, norms, self.true[index])

    def run(self) -> Outcome:
        """Iterate until every row has converged or failed; report the smallest Ritz value."""
        outcome = super().run()
        return replace(outcome, smallest_eigenvalue=self._smallest_eigenvalue())

    def _smallest_eigenvalue(self) -> float | None:
        """The smallest Ritz value of A; with a preconditioner, the smallest Rayleigh quotient."""
        if not self.entries:
            return None
        if self.precondition is not None:
            return float(self.rayleigh) - self.damping
        m = len(self.out_x)
        rows, deltas, gammas = (torch.cat(parts).cpu() for parts in zip(*self.entries, strict=True))
        counts = rows.new_tensor([len(row) for row, _, _ in self.entries])
        at = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        shape = (2, len(counts), m)
        steps = torch.full(shape, float("nan"), dtype=torch.float64, device="cpu")
        smallest = []
        steps[0, at, rows], steps[1, at, rows] = deltas.double(), gammas.double()
        for column in range(m):
            taken = ~steps[0, :, column].isnan()
            diagonal, beside = steps[0, taken, column], steps[1, taken, column]
            if len(diagonal):
                smallest.append(smallest_ritz_value(diagonal, beside) - self.damping)
        return min(smallest, default=None)


def _fixed(
    work: FixedWork, precondition: Precondition | None, symmetry: SymmetryCheck | None
) -> FixedWork:
    """A fixed number of iterations without a branch on values; rows that are done are frozen.

    So are rows whose next step is so long that the rounding of its product would outweigh the
    residual: past the least-squares solution of a singular system, steps have no meaning.
    """
    rounding = torch.finfo(work.system.operator.dtype).eps
    lanczos = Lanczos.begin(precondition, work.r, work.norms_of)
    for iteration in range(1, work.count + 1):
        step = lanczos_step(lanczos, work.system, work.damping, precondition, work.norms_of)
        if symmetry is not None:
            symmetry(iteration, work.rows, lanczos.z, step.image, step.sizes)
        lanczos = step.state
        work.refuse(work.live & (lanczos.theta <= 0), lanczos.theta)
        meaningless = rounding * lanczos.size * step.move > work.norms
        work.frozen = work.frozen | (work.live & (step.broken | meaningless))
        live = work.live
        length = torch.where(live, step.length, 0.0)[:, None]
        work.advance(
            torch.addcmul(work.x, length, lanczos.w),
            where_rows(live, step.residual(work.r), work.r),
        )
        if iteration % REFRESH == 0 and iteration < work.count:
            drifted = work.refresh()
            lanczos = Lanczos.begin(precondition, work.r, work.norms_of).where(drifted, lanczos)
    return work
