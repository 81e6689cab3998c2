"""GMRES: systems whose operator is not symmetric, many right-hand sides in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NotSymmetricError
from ..norms import row_norms
from .base import DampedSystem, Outcome, Solver, Status
from .krylov import (
    DEFAULT_MAX_ITERS,
    PATIENCE,
    check_krylov_options,
    preconditioning,
    where_rows,
)
from .options import check_option, is_count
from .skew import check_skew

#: Basis vectors before a restart: memory for them is restart * n numbers a right-hand side.
_DEFAULT_RESTART = 50
#: A cycle that lowers the residual by less than this, relatively, has gained nothing: at that
#: pace all the cycles of the default budget together would not gain a fifth.
GAIN = 1e-3
#: A step that leaves a residual this many times the best is not taken.
_HARM = 2.0
#: By what the bound below which pivots are dropped grows after such a step, and how far.
_COARSER, _COARSEST = 100.0, 0.1


@dataclass(frozen=True)
class GMRES(Solver):
    """Restarted GMRES on (A + damping I) x = v, for an A that need not be symmetric.

    The one solver here that asks nothing of A: Jacobians of fixed points and of games, which no
    Hessian is.  Over each cycle of ``restart`` iterations the residual norm is the smallest that
    the Krylov space allows, so it never rises.  The preconditioner is applied from the right, so
    that what is minimised is the true residual; it is measured on the answer as it is returned at
    the end of every cycle, and the best answer is kept.  Where three cycles in a row
    gain nothing (a singular system, the rounding of the products, or a restart too short) the
    status is STAGNATED.

    A is multiplied, never its transpose.  For a symmetric A, MINRES or CG need no basis and no
    restarts.

    Attributes:
        rtol: tolerance relative to |v|.
        atol: absolute tolerance.  With ``rtol=0, atol=0`` exactly ``max_iters`` iterations are
            done and the status is FIXED_ITERATIONS (or until the residual is exactly zero).
        max_iters: budget of iterations, over all cycles; None for 10,000.
        restart: iterations a cycle, at most the dimension; a cycle keeps as many vectors of
            memory a right-hand side.  A longer one converges in fewer products, or at all.
        preconditioner: an approximate inverse of A + damping I, not necessarily symmetric:
            anything :func:`hypergrad.as_operator` takes.
        compile: whether a cycle for one right-hand side is one graph of ``torch.compile``, for the
            operators that ``CG(compile=True)`` takes; not with a preconditioner.  The products and
            the check at the end are the graph's; the basis, in the working dtype, and the least
            squares are beside it, and end the cycle where the eager solver would.  What is left
            to that, which begins anew: a cycle that gains nothing, pivots at the rounding of the
            products (a singular system), several right-hand sides.

    Raises (when solving):
        NotSymmetricError: ``damping="auto"`` with an operator that is not symmetric: it is chosen
            from real eigenvalues.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the solve is then an eager one.

    Cost: one HVP an iteration and one a cycle; O(restart n) operations an iteration besides.
    Many right-hand sides share block products; rows that are done take no further part.
    Source: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986), algorithm 4; classical
    Gram-Schmidt done twice after Giraud, Langou, Rozloznik and van den Eshof, Numer. Math. 101
    (2005), theorem 2.

    Examples:
        >>> import torch, hypergrad
        >>> jacobian = torch.tensor([[1.0, -2.0], [2.0, 1.0]])  # a game: players pull both ways
        >>> solution = hypergrad.solve(jacobian, torch.tensor([-3.0, 4.0]), hypergrad.GMRES())
        >>> solution.value.round(decimals=4), solution.info.num_hvps
        (tensor([1., 2.]), 3)
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_iters: int | None = None
    restart: int = _DEFAULT_RESTART
    preconditioner: Any = None
    compile: bool = False

    self_adjoint = False

    def __post_init__(self) -> None:
        check_krylov_options(self.rtol, self.atol, self.max_iters)
        check_option(is_count(self.restart), "restart", self.restart, "an integer >= 1")
        check_option(isinstance(self.compile, bool), "compile", self.compile, "True or False")
        good = not (self.compile and self.preconditioner is not None)
        check_option(good, "compile", self.compile, "False where there is a preconditioner")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if system.damping == "auto":
            _check_symmetric(system)
            system.resolve_damping()
        if self.compile:
            from .compiled_gmres import run_compiled  # with parts of PyTorch that take long

            found = run_compiled(self, system, x0)
            if found is not None:
                return found
        return _Restarts(self, system, x0).run()


class _Restarts:
    """Cycles over the rows still active; a row that is done is written out and dropped."""

    #: Everything that has one entry an active row.
    _state = ("row", "x", "r", "norms", "best_x", "best", "count", "fruitless", "floor")

    def __init__(self, config: GMRES, system: DampedSystem, x0: Tensor | None) -> None:
        self.system = system
        self.damping = system.resolve_damping()
        self.max_iters = config.max_iters or DEFAULT_MAX_ITERS
        self.restart = min(config.restart, system.operator.layout.dim)
        self.fixed = config.rtol == 0 and config.atol == 0
        self.precondition = preconditioning(config.preconditioner, system) or (lambda r: r)
        self.rounding = torch.finfo(system.operator.dtype).eps
        self.tolerances = system.tolerances(config.rtol, config.atol)

        m = len(system.b)
        self.statuses = [Status.CONVERGED] * m
        self.iterations = [0] * m
        self.x, self.r = system.begin(x0, self.damping)
        self.norms = row_norms(self.r)
        self.best_x, self.best = self.x, self.norms
        self.row = torch.arange(m, device=system.b.device)
        self.count = torch.zeros_like(self.row)
        self.fruitless = torch.zeros_like(self.row)
        # Pivots relatively below it are noise.
        self.floor = torch.full_like(self.norms, self.rounding)
        self.out_x, self.out_norms = self.x.clone(), self.best.clone()

    def run(self) -> Outcome:
        # v = 0, or a warm start within the tolerance.
        self._finish(self.norms <= self.tolerances, Status.CONVERGED)
        while len(self.row):
            self._cycle()
        return Outcome(
            x=self.out_x,
            residual_norms=self.out_norms,
            statuses=self.statuses,
            iterations=self.iterations,
            damping=self.damping,
        )

    def _cycle(self) -> None:
        """One cycle of all active rows, each as long as it gains, and what came of it."""
        arnoldi = _Arnoldi(self, min(self.restart, self.max_iters - int(self.count.min())))
        step, used = arnoldi.run()
        self.count = self.count + used
        self.x = self._bounded(self.x + self.precondition(step))
        self.r = self.system.residual(self.x, self.damping, self.row)
        self.norms = row_norms(self.r)
        gained = self.norms < (1.0 - GAIN) * self.best
        better = self.norms < self.best
        self.best = torch.where(better, self.norms, self.best)
        self.best_x = where_rows(better, self.x, self.best_x)
        self.fruitless = torch.where(gained, torch.zeros_like(self.row), self.fruitless + 1)

        self._finish(self.best <= self.tolerances[self.row], Status.CONVERGED)
        end = Status.FIXED_ITERATIONS if self.fixed else Status.MAX_ITERATIONS
        self._finish(self.count >= self.max_iters, end)
        if not self.fixed:
            self._finish(self.fruitless >= PATIENCE, Status.STAGNATED)
        # A step that did harm is taken back.  It came of a pivot of noise (a singular system, or
        # rounding that grew on its way there), so the next cycle drops larger ones.
        harmed = self.norms > _HARM * self.best
        if bool(harmed.any()):
            coarser = (_COARSER * self.floor).clamp(max=_COARSEST)
            self.floor = torch.where(harmed, coarser, self.floor)
            self.x = where_rows(harmed, self.best_x, self.x)
            residual = self.system.residual(self.x[harmed], self.damping, self.row[harmed])
            self.r[harmed], self.norms[harmed] = residual, row_norms(residual)

    def _bounded(self, x: Tensor) -> Tensor:
        """New iterates, but for those that leave the range of the answer's dtype to no avail.

        Where the system is singular such a step is noise, and is not taken.  Where the residual
        falls by it the answer is too large, which is for ``DampedSystem.returned`` to say.
        """
        largest = min(torch.finfo(dtype).max for dtype in self.system.operator.layout.dtypes)
        sizes = x.abs().amax(dim=1)
        large = torch.isfinite(sizes) & (sizes > largest / self.system.scales[self.row])
        if not bool(large.any()):
            return x
        image = self.system.apply(x[large], self.damping)
        noise = row_norms(self.system.b[self.row[large]] - image) >= self.best[large]
        x[large] = where_rows(noise, self.best_x[large], x[large])
        return x

    def _finish(self, done: Tensor, status: Status) -> None:
        """Write out rows with their best iterate, and drop them."""
        ended = torch.nonzero(done).flatten()
        if not len(ended):
            return
        rows = self.row[ended]
        self.out_x[rows], self.out_norms[rows] = self.best_x[ended], self.best[ended]
        for row, count in zip(rows.tolist(), self.count[ended].tolist(), strict=True):
            self.statuses[row] = status
            self.iterations[row] = count
        going = torch.nonzero(~done).flatten()
        for name in self._state:
            setattr(self, name, getattr(self, name)[going])


class _Arnoldi:
    """One cycle: an orthonormal Krylov basis a row, and the least squares on its projection.

    With the basis V_k and A M V_k = V_{k+1} H, the residual of x + M V_k y is
    V_{k+1} (beta e_1 - H y).  Q H = R is kept triangular by one rotation a column, so that the
    norm of the least residual is read off the last entry of beta Q e_1.
    """

    #: Everything that has one entry a row still in the cycle.
    _state = ("place", "beta", "claims", "left", "floor", "basis", "rotations", "triangle")

    def __init__(self, solve: _Restarts, length: int) -> None:
        self.solve, self.length = solve, length
        r, beta = solve.r, solve.norms
        m, n = r.shape
        self.place = torch.arange(m, device=r.device)
        self.beta = beta
        # Beyond the rounding of the products a cycle cannot know its residual: start afresh.
        self.claims = torch.maximum(solve.tolerances[solve.row], solve.rounding * beta)
        self.left = solve.max_iters - solve.count
        self.floor = solve.floor
        self.basis = r.new_empty(m, length + 1, n)
        self.basis[:, 0] = r / beta[:, None]
        self.rotations = torch.eye(length + 1, dtype=r.dtype, device=r.device).repeat(m, 1, 1)
        self.triangle = r.new_zeros(m, length, length)
        self.step = torch.zeros_like(r)
        self.used = torch.zeros_like(solve.row)

    def run(self) -> tuple[Tensor, Tensor]:
        """The step V y of each row, before the preconditioner, and how many iterations it took."""
        for k in range(self.length):
            broke = self._extend(k)
            estimate = self.rotations[:, k + 1, 0].abs() * self.beta
            done = broke | (estimate <= self.claims) | (self.left == k + 1)
            self._close(done if k + 1 < self.length else torch.ones_like(done), k + 1)
            if len(self.place) == 0:
                break
        return self.step, self.used

    def _extend(self, k: int) -> Tensor:
        """Add basis vector k + 1 and column k; True where the space is invariant."""
        z = self.solve.precondition(self.basis[:, k])
        w = self.solve.system.product(z, later=True)
        size = row_norms(w) + self.solve.damping * row_norms(z)
        w = torch.add(w, z, alpha=self.solve.damping)
        known = self.basis[:, : k + 1]
        column = w.new_zeros(len(w), k + 2)
        # Twice is enough: as orthogonal as by Householder, in products with the whole basis.
        for _ in range(2):
            shares = torch.bmm(known, w[:, :, None])
            w = w - torch.bmm(known.mT, shares)[:, :, 0]
            column[:, : k + 1] += shares[:, :, 0]
        outside = row_norms(w)
        broke = outside <= self.solve.rounding * size
        outside = torch.where(broke, torch.zeros_like(outside), outside)
        self.basis[:, k + 1] = w / torch.where(broke, torch.ones_like(outside), outside)[:, None]
        column[:, k + 1] = outside
        self._rotate(column, k)
        return broke

    def _rotate(self, column: Tensor, k: int) -> None:
        """Take the new column through the rotations so far, and make it triangular by one more."""
        turned = torch.bmm(self.rotations[:, : k + 2, : k + 2], column[:, :, None])[:, :, 0]
        a, b = turned[:, k], turned[:, k + 1]
        size = torch.hypot(a, b)
        safe = torch.where(size > 0, size, torch.ones_like(size))
        cos = torch.where(size > 0, a / safe, torch.ones_like(size))[:, None]
        sin = (b / safe)[:, None]
        upper, lower = self.rotations[:, k].clone(), self.rotations[:, k + 1].clone()
        self.rotations[:, k] = cos * upper + sin * lower
        self.rotations[:, k + 1] = cos * lower - sin * upper
        self.triangle[:, :k, k] = turned[:, :k]
        self.triangle[:, k, k] = size

    def _close(self, done: Tensor, k: int) -> None:
        """Solve for the steps of rows whose cycle ends after k iterations, and drop the rows."""
        (any_done,) = self.solve.system.look(done.any())
        if not any_done:
            return
        ended, going = torch.nonzero(done).flatten(), torch.nonzero(~done).flatten()
        target = self.rotations[ended, :k, 0] * self.beta[ended, None]
        y = _solve_triangular(self.triangle[ended, :k, :k], target, self.floor[ended])
        places = self.place[ended]
        self.step[places] = torch.bmm(y[:, None], self.basis[ended, :k])[:, 0]
        self.used[places] = k
        for name in self._state:
            setattr(self, name, getattr(self, name)[going])


def _solve_triangular(triangle: Tensor, target: Tensor, floor: Tensor) -> Tensor:
    """R y = t for each row; by the pseudo-inverse where a pivot is relatively below ``floor``.

    A pivot at the products' rounding comes of a singular system: dividing by it makes a huge step
    of noise.
    """
    pivots = triangle.diagonal(dim1=-2, dim2=-1).abs()
    largest = pivots.amax(dim=1)
    singular = pivots.amin(dim=1) <= floor * largest
    y = torch.empty_like(target)
    if bool(singular.any()):
        # In units of its own size, so that no square over- or underflows.
        size = largest[singular].clamp(min=torch.finfo(target.dtype).tiny)[:, None, None]
        inverse = torch.linalg.pinv(triangle[singular] / size, rtol=floor[singular])
        y[singular] = (torch.bmm(inverse, target[singular][:, :, None]) / size)[:, :, 0]
    if not bool(singular.all()):
        regular, right = triangle[~singular], target[~singular][:, :, None]
        y[~singular] = torch.linalg.solve_triangular(regular, right, upper=True)[:, :, 0]
    return y


def _check_symmetric(system: DampedSystem) -> None:
    """Raise :class:`NotSymmetricError` where u'Aw and w'Au differ for two random vectors."""
    source = torch.Generator().manual_seed(0)
    pair = torch.randn(
        2, system.b.shape[1], generator=source, device="cpu", dtype=torch.float32
    ).to(system.b)
    image = system.product(pair)
    gap = (pair[0] @ image[1] - pair[1] @ image[0]).abs()
    norms, sizes = row_norms(pair), row_norms(image)
    try:
        check_skew(gap, norms[0] * sizes[1] + norms[1] * sizes[0], system.operator.dtype)
    except NotSymmetricError as error:
        raise NotSymmetricError(
            "damping='auto' is chosen from real eigenvalues, and this operator is not symmetric. "
            "Pass a number; GMRES needs no damping for its own sake."
        ) from error
