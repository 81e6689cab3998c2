"""The truncated Neumann series, plain, with Chebyshev acceleration, or over fresh minibatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..norms import row_norms
from ..operators import SampledOperator
from ..spectrum import lanczos_extremes
from .base import DampedSystem, Outcome, Solver, Status
from .lissa import run_lissa
from .options import check_option, is_count, is_one_of, is_tolerance
from .traced import begin_traced, residual_traced, safe_norms

Acceleration = Literal["none", "chebyshev"]

#: Lanczos steps that bound the largest eigenvalue for step_size="auto".
_PROBE_STEPS = 10
#: A residual that has grown by this factor is not followed any further.
_GROWTH = 1e6


@dataclass(frozen=True)
class Neumann(Solver):
    """x_K = eta * sum over j < K of (I - eta (A + damping I))^j v.

    The residual of a partial sum is the next term of the series over eta, so K - 1 products give
    K terms; one more gives the true residual of the answer as it is returned.  The series
    converges when the spectrum of A + damping I lies in (0, 2/eta).

    ``step_size="auto"`` takes 1/eta = a Lanczos bound on its largest eigenvalue.  Should the bound
    be too small (a start that hardly sees the top of the spectrum), a residual grows; Lanczos is
    then run anew along the step that made it grow, and the series resumes from its best partial
    sum with the larger bound, or a negative Ritz value proves that no step would do.  (A residual
    r grows only if |Hr|^2 > (2/eta) r'Hr, and for positive H that ratio bounds the new 1/eta
    from below, which so doubles at least.)  Only negative curvature can make it diverge.
    A series whose residual is no smaller than v is not returned: the best partial sum is, with
    status NEGATIVE_CURVATURE or STAGNATED.

    ``acceleration="chebyshev"`` replaces the powers by Chebyshev polynomials on [a, b]: b = 1/eta,
    a = the larger of the damping, a Lanczos estimate of the smallest eigenvalue less its
    residual, and b/K^2, below which K terms reach nothing.  Then about sqrt(b/a) log(2/tol) / 2
    terms bring the residual to tol |v|, where the plain series needs (b/a) log(1/tol).  Eigenvalues
    below a are damped more slowly, never amplified, so that a wrong a costs terms only.

    ``num_samples=r`` is LiSSA, for operators that differ from product to product: a
    :class:`hypergrad.SampledOperator`, or a callable that draws a fresh minibatch each time.  The
    answer is the mean of r independent repetitions of x <- x + eta (v - (A_j + damping I) x) with a
    fresh A_j in each step: unbiased for the truncated series of the mean operator, with variance
    like 1/r.  ``"auto"`` then takes 1/eta = twice the largest growth seen in ten fresh products,
    which is no guarantee: repetitions that diverge end as STAGNATED.  The residual in the report is
    that of the mean operator where it is known (:class:`hypergrad.SampledOperator`); for a
    callable it is the norm of the mean of max(r, 4) residuals with fresh products each, which
    noise makes too large on average, never too small, and from which no status follows.

    Attributes:
        num_terms: K, terms of the series.
        step_size: eta > 0, or ``"auto"``.
        acceleration: ``"none"`` or ``"chebyshev"``.
        num_samples: None for one and the same operator in each product; r >= 1 for LiSSA.
        compile: whether the series is one graph of ``torch.compile``: the products, of which the
            gradient and all that does not depend on the vector is computed once, and the check of
            the answer.  For operators that ``CG(compile=True)`` takes; the answer is the eager one
            to rounding.  A residual that grows under ``step_size="auto"`` or ends no smaller than
            v, and negative curvature, have the series done again eagerly.

    Raises (when solving):
        SolverOptionError: a :class:`hypergrad.SampledOperator` without ``num_samples``.
        DampingError: ``damping="auto"`` with ``num_samples``.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the series is then an eager one.

    Cost: K HVPs, at most 10 more for ``step_size="auto"`` (and for each new bound), one to check a
    diverged answer.  With ``num_samples=r``: r (K - 1), at most 10 for ``"auto"``, and the check:
    max(r, 4), or one of each of the minibatches.
    Sources: Lorraine, Vicol, Duvenaud, arXiv 1911.02590, equation (8); Saad, "Iterative Methods
    for Sparse Linear Systems" (2003), algorithm 12.1 (Chebyshev); Agarwal, Bullins, Hazan, arXiv
    1602.03943, and Koh and Liang, arXiv 1703.04730, section 3 (LiSSA).

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, 2.0]))
        >>> hypergrad.solve(a, torch.ones(2), hypergrad.Neumann(num_terms=50)).value
        tensor([1.0000, 0.5000])
        >>> slow = torch.diag(torch.logspace(0, -3, 100, dtype=torch.float64))
        >>> v = torch.ones(100, dtype=torch.float64)
        >>> for name in ("none", "chebyshev"):
        ...     solver = hypergrad.Neumann(num_terms=200, acceleration=name)
        ...     info = hypergrad.solve(slow, v, solver, damping=1e-3).info
        ...     print(f"{info.relative_residual:.0e}")
        3e-01
        2e-05
    """

    num_terms: int = 20
    step_size: float | Literal["auto"] = "auto"
    acceleration: Acceleration = "none"
    num_samples: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_option(is_count(self.num_terms), "num_terms", self.num_terms, "an integer >= 1")
        good = is_one_of(self.step_size, ("auto",)) or (
            is_tolerance(self.step_size) and self.step_size > 0  # type: ignore[operator]
        )
        check_option(good, "step_size", self.step_size, "a finite number > 0 or 'auto'")
        good = is_one_of(self.acceleration, get_args(Acceleration))
        check_option(good, "acceleration", self.acceleration, f"one of {get_args(Acceleration)}")
        good = self.num_samples is None or is_count(self.num_samples)
        check_option(good, "num_samples", self.num_samples, "None or an integer >= 1")
        check_option(
            self.num_samples is None or self.acceleration == "none",
            "acceleration",
            self.acceleration,
            "'none' with num_samples: Chebyshev polynomials amplify the noise of the samples",
        )
        good = isinstance(self.compile, bool)
        check_option(good, "compile", self.compile, "True or False")
        good = not (self.compile and self.num_samples is not None)
        check_option(good, "compile", self.compile, "False with num_samples")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if self.num_samples is not None:
            return run_lissa(system, x0, self.num_terms, self.step_size, self.num_samples)
        check_option(
            not isinstance(system.operator, SampledOperator),
            "num_samples",
            None,
            "an integer >= 1 for an operator that draws a fresh minibatch for each product",
        )
        series = Series(self, system, x0)
        if self.compile:
            from .compiled_neumann import run_compiled  # with parts that take long to import

            found = run_compiled(series)
            if found is not None:
                return found
        return series.run()

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.step_size == "auto" or system.damping == "auto" or self.num_samples is not None:
            return super()._run_traced(system, x0)
        damping, eta = float(system.damping), float(self.step_size)
        x, residual = begin_traced(system, x0, damping)
        step, ratio = self._centre(damping, 1.0 / eta)
        weight, direction = 1.0, step * residual
        for _ in range(1, self.num_terms):
            x = x + direction
            residual = residual - system.apply(direction, damping)
            following = 1.0 / (2.0 - ratio**2 * weight)
            direction = (
                ratio**2 * weight * following * direction + 2.0 * following * step * residual
            )
            weight = following
        x = x + direction
        return x, safe_norms(residual_traced(system, x, damping))

    def _centre(self, lower: float, upper: float) -> tuple[float, float]:
        """1/c and q of :class:`Series` for a spectrum in [lower, upper]."""
        if self.acceleration == "none":
            return 1.0 / upper, 0.0
        # Of eigenvalues below upper / K^2 polynomials of degree K make nothing.
        lower = min(max(lower, upper / self.num_terms**2), upper)
        return 2.0 / (lower + upper), (upper - lower) / (lower + upper)


class Series:
    """The partial sums of all rows, with each row's own step.

    With c and h the centre and half the length of [a, b], q = h/c and w_0 = 1, Chebyshev's
    directions are d_0 = r_0 / c, then w_k = 1 / (2 - q^2 w_(k-1)) and
    d_k = q^2 w_(k-1) w_k d_(k-1) + (2 w_k / c) r_k; the plain series is the case q = 0, c = 1/eta.
    """

    def __init__(self, config: Neumann, system: DampedSystem, x0: Tensor | None) -> None:
        self.config, self.system = config, system
        self.damping = system.resolve_damping()
        self.auto = config.step_size == "auto"
        self.smallest: float | None = None
        self.x, self.residual = system.begin(x0, self.damping)
        self.norms = row_norms(self.residual)
        self.direction = torch.zeros_like(self.residual)
        self.weight = torch.ones_like(self.norms)
        self.step, self.ratio = torch.ones_like(self.norms), torch.zeros_like(self.norms)
        self.upper = torch.zeros_like(self.norms)
        self.fresh = torch.ones_like(self.norms, dtype=torch.bool)
        self.best_x, self.best_residual, self.best = self.x, self.residual, self.norms
        # What no residual exceeds but for negative curvature or a bound that is too small: the
        # smallest one so far, or for Chebyshev, whose residuals ripple, that of its start.
        self.reference = self.norms
        self.watched = torch.full_like(self.fresh, self.auto)
        self.negative, self.abandoned = torch.zeros_like(self.fresh), torch.zeros_like(self.fresh)
        self.lost = self.abandoned
        self.curvature = torch.ones_like(self.norms)
        self._first_bounds()

    def run(self) -> Outcome:
        """All terms, or fewer where every row is abandoned."""
        system, damping, num_terms = self.system, self.damping, self.config.num_terms
        start = torch.maximum(self.norms, system.b_norms)
        hopeless = min(_GROWTH, torch.finfo(system.operator.dtype).max ** 0.5) * start
        for term in range(1, num_terms + 1):
            self._direct()
            self.x = self.x + self.direction
            last = term == num_terms
            if not last:
                image = system.apply(self.direction, damping, later=True)
                following = self.residual - image
            else:
                # |r_k|^2 is a sum of powers with exponent k, hence convex: above its start it only
                # grows, and the sum may be too large for its dtype.  The best one is judged.
                self.lost = self.norms > (1.0 + system.rounding) * start
                self.x = torch.where(self.lost[:, None], self.best_x, self.x)
                # The recurrence drifts and does not know the answer's rounding: look at x itself.
                following = system.residual(self.x, damping)
                image = self.residual - following
            # Curvature along a residual that has grown tells why it grows.
            along = torch.linalg.vecdot(self.direction, image)
            still = self.abandoned | self.lost | (self.norms == 0)
            self.curvature = torch.where(still, self.curvature, along)
            if last:  # an answer that underflowed has no product, and its residual proves nothing
                vanished = self.x.any(dim=1) & ~system.returned(self.x).any(dim=1)
                self.curvature = torch.where(vanished, 1.0, self.curvature)
            norms = torch.where(self.abandoned, self.norms, row_norms(following))
            grew = (norms > (1.0 + system.rounding) * self.reference) & self.watched
            # A term is a power of one operator: what has grown like this never comes back.
            gone = ~(norms <= hopeless)
            flags = grew.any(), gone.any(), (norms < self.best).all()
            any_grew, any_gone, all_better = system.look(*flags)
            if any_grew and not last:
                for row in torch.nonzero(grew).flatten().tolist():
                    if self._bound_again(row):
                        following[row], norms[row] = self.best_residual[row], self.best[row]
                gone = ~(norms <= hopeless)
                all_better = bool((norms < self.best).all())
            self.residual, self.norms = following, norms
            self._keep_best(all_better)
            if any_gone and self._abandon(gone):
                break
        return self._outcome(term)

    def _direct(self) -> None:
        if self.config.acceleration == "none":
            self.direction = self.step[:, None] * self.residual
            return
        ratio2 = self.ratio**2
        following = 1.0 / (2.0 - ratio2 * self.weight)
        following = torch.where(self.fresh, torch.ones_like(following), following)
        old = torch.where(self.fresh, torch.zeros_like(following), ratio2 * self.weight * following)
        new = torch.where(self.fresh, self.step, 2.0 * following * self.step)
        self.direction = old[:, None] * self.direction + new[:, None] * self.residual
        self.weight = following
        self.fresh = torch.zeros_like(self.fresh)

    def _keep_best(self, all_better: bool) -> None:
        better = self.norms < self.best
        if all_better:  # x and the residual are new tensors in each term
            self.best_x, self.best_residual, self.best = self.x, self.residual, self.norms
        else:
            self.best_x = torch.where(better[:, None], self.x, self.best_x)
            self.best_residual = torch.where(better[:, None], self.residual, self.best_residual)
            self.best = torch.where(better, self.norms, self.best)
        if self.config.acceleration == "none":
            self.reference = self.best

    def _abandon(self, gone: Tensor) -> bool:
        """Follow these rows no further; whether none is left."""
        self.abandoned = self.abandoned | gone
        self.watched = self.watched & ~gone
        stopped = self.abandoned[:, None]
        self.residual = torch.where(stopped, torch.zeros_like(self.residual), self.residual)
        self.direction = torch.where(stopped, torch.zeros_like(self.direction), self.direction)
        return bool(self.abandoned.all())

    def _first_bounds(self) -> None:
        lower = self.damping
        if self.auto:
            system = self.system
            ends = lanczos_extremes(
                lambda vector: system.product(vector[None])[0],
                system.operator.layout.dim,
                _PROBE_STEPS,
                system.b.dtype,
                system.b.device,
            )
            self.smallest = ends.smallest
            # |A| bounds a negative end too; the zero operator without damping gets any step.
            upper = max(abs(ends.largest_bound), abs(ends.smallest)) + self.damping
            upper = upper if upper > 0 else 1.0
            lower = max(lower, ends.smallest_bound + self.damping)
            rounding = system.rounding * max(abs(ends.smallest), abs(ends.largest))
            self.negative |= ends.smallest + self.damping < -rounding
        else:
            upper = 1.0 / float(self.config.step_size)
        self.lower = lower
        for row in range(len(self.norms)):
            self._set_bound(row, upper)

    def _set_bound(self, row: int, upper: float) -> None:
        self.upper[row] = upper
        self.step[row], self.ratio[row] = self.config._centre(self.lower, upper)

    def _bound_again(self, row: int) -> bool:
        """Ask Lanczos along the step that made the residual grow; whether the bound was at fault.

        If it was, the row goes back to its best partial sum.  The Krylov space holds the step d and
        its image Hd.  Unless H has a negative Ritz value there, its largest one is at least
        |Hd|^2 / d'Hd, at which no plain step makes this residual grow.
        """
        system = self.system
        ends = lanczos_extremes(
            lambda vector: system.apply(vector[None], self.damping)[0],
            system.operator.layout.dim,
            _PROBE_STEPS,
            system.b.dtype,
            system.b.device,
            start=self.direction[row],
        )
        assert self.smallest is not None
        self.smallest = min(self.smallest, ends.smallest - self.damping)
        if ends.smallest < -system.rounding * abs(ends.largest):
            self.negative[row], self.watched[row] = True, False
            return False
        if not ends.largest_bound > (1.0 + system.rounding) * float(self.upper[row]):
            self.watched[row] = False  # neither: the rounding of the products
            return False
        self._set_bound(row, ends.largest_bound)
        self.fresh[row] = True
        self.x[row] = self.best_x[row]
        self.reference = self.reference.clone()
        self.reference[row] = self.best[row]
        return True

    def _outcome(self, terms: int) -> Outcome:
        system = self.system
        x, norms = self.x, self.norms
        diverged = (self.lost | ~(norms < system.b_norms)) & (system.b_norms > 0)
        if bool(diverged.any()):
            x = torch.where(diverged[:, None], self.best_x, x)
            fresh = row_norms(system.residual(x[diverged], self.damping, diverged))
            norms = norms.masked_scatter(diverged, fresh)
        bent = (self.curvature <= 0) | self.negative
        statuses = []
        for norm, bad, down in zip(norms.tolist(), diverged.tolist(), bent.tolist(), strict=True):
            status = Status.NEGATIVE_CURVATURE if down else Status.STAGNATED
            status = status if bad else Status.FIXED_ITERATIONS
            statuses.append(Status.CONVERGED if norm == 0 else status)
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=statuses,
            iterations=[terms] * len(x),
            damping=self.damping,
            smallest_eigenvalue=self.smallest,
        )
