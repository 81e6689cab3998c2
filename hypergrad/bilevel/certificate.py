"""How wrong a hypergradient can be: what the inner and the linear solve have left of an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import InnerProblemWarning, SolverOptionError, warn
from ..pytree import Tree
from ..solvers.options import check_option, is_count, is_tolerance
from ..spectrum import extreme_eigenvalues
from .corrections import InnerPoint, Newton, norm
from .hypergradient import Hypergradient, Loss
from .unroll import UnrolledHypergradient

#: Lanczos steps for the ends of the inner curvature.
_CURVATURE_STEPS = 30
#: Relative error from the inner problem above which it is visibly not solved.
_VISIBLE = 0.1


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class HypergradientCertificate:
    """How far a hypergradient is from that at the inner solution, with the figures behind it.

    Attributes:
        relative_error: bound on |grad - true| / |true|; infinite where none can be given.
        error: bound on |grad - true|: ``linear_error + inner_error + margin`` or a little less.
        corrected: the better hypergradient that ``grad`` was compared with, after
            ``num_corrections`` Newton steps on the inner problem and with tight linear solves.
        linear_error: the part of the error from the linear solve, damping included (for an
            unrolled gradient, from the steps): |grad - grad of a tight solve at inner_params|.
        inner_error: the part from the inner problem: |that - corrected|.
        margin: bound on |corrected - true|, by an estimate of what further corrections change.
        linear_bound: |M| |r| / ``smallest_curvature``, with M the mixed derivative and r the
            residual of ``ihvp`` without damping; needs no correction.  None without an ``ihvp``.
        linear_residual: |r| / |grad_w f|, or None as above.
        inner_gradient_norm: |grad_w g| at the inner parameters that were given.
        inner_distance: ``inner_gradient_norm / smallest_curvature``, a bound on the distance to
            the inner solution.
        smallest_curvature: the strong convexity that was given; else the smallest Ritz value of
            the inner Hessian, which is never below its smallest eigenvalue.
        largest_curvature: largest Ritz value.
        curvature_given: whether ``smallest_curvature`` was given.
        num_corrections: Newton steps done.
        num_hvps: products with the inner Hessian, all in all.
        reason: why there is no bound, or None.
    """

    relative_error: float
    error: float
    corrected: Tree
    linear_error: float
    inner_error: float
    margin: float
    linear_bound: float | None
    linear_residual: float | None
    inner_gradient_norm: float
    inner_distance: float
    smallest_curvature: float
    largest_curvature: float
    curvature_given: bool
    num_corrections: int
    num_hvps: int
    reason: str | None

    @property
    def certified(self) -> bool:
        """Whether there is a bound at all."""
        return math.isfinite(self.relative_error)

    @property
    def message(self) -> str:
        """One sentence for people."""
        figures = (
            f"inner gradient {self.inner_gradient_norm:.1e}, curvature from "
            f"{self.smallest_curvature:.1e} to {self.largest_curvature:.1e}"
        )
        if self.reason is not None:
            return f"No bound on the hypergradient's error: {self.reason} ({figures})."
        inner, linear = self.inner_error, self.linear_error
        own = "the gradient's own steps" if self.linear_residual is None else "the linear solve"
        most = "the inner problem" if inner > linear else own
        return (
            f"The hypergradient is within {100 * self.relative_error:.2g}% of the true one; most "
            f"of the error comes from {most} (inner {inner:.1e}, linear {linear:.1e}, margin "
            f"{self.margin:.1e}; {figures})."
        )


def hypergradient_certificate(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Tree,
    outer_params: Tree,
    gradient: Hypergradient | UnrolledHypergradient | Tree,
    *,
    strong_convexity: float | None = None,
    max_corrections: int = 10,
) -> HypergradientCertificate:
    """Bound the distance of a hypergradient from the exact one at the inner solution.

    The error has two sources, a linear system that is solved in part (or damped) and inner
    parameters short of the solution.  Both are corrected, and the hypergradient is compared with
    the corrected one: tight linear solves, and Newton steps w - H^-1 grad_w g until the
    hypergradient stops changing.  What is left is bounded by the margin.

    What is certain and what is estimated:

    - ``linear_bound`` and ``inner_distance`` are bounds (for w in the whole segment to w*) if
      ``strong_convexity`` is given and true.  Without it the curvature is a Ritz value, which may
      be too large where curvatures are many and the smallest ones hide: then both are estimates.
    - ``error`` rests on the comparison.  Its ``margin`` takes the changes of the hypergradient's
      terms along the Newton steps for its sensitivity to w, with a factor of ten.  That is an
      estimate, made to matter little: it multiplies the inner gradient that is left, 1e-5 of
      what it was or less.
    - Everything is about the minimum that Newton's method finds from ``inner_params``; that the
      inner problem has one minimum is the caller's knowledge.

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``.  The same at each
            call: for a stochastic loss, fix the data.
        outer_loss: f, called the same way.
        inner_params: where the inner solver ended.
        outer_params: y.
        gradient: what to judge: the result of :func:`hypergrad.hypergradient` or
            :func:`hypergrad.unrolled_hypergradient`, or any tree shaped like ``outer_params``.
        strong_convexity: a known lower bound > 0 on the inner curvature, such as a ridge penalty.
        max_corrections: Newton steps allowed.

    Raises:
        SolverOptionError: an option outside its range, or a ``strong_convexity`` that products
            with the Hessian contradict.
        HypergradError: see :func:`hypergrad.hypergradient`.

    Warns:
        InnerProblemWarning: the inner problem is visibly not solved: its part of the error is
            over a tenth of the hypergradient, or there is no minimum near.

    Cost: 30 HVPs for the curvature, up to 20 mixed products, and two tight CG solves a
    correction, of which there are two or three: some ten times the hypergradient itself.
    Source: the two parts are those of Pedregosa, arXiv 1602.02355, theorem 2; the comparison by
    correction is Newton's method with the usual a posteriori estimate.

    Examples:
        >>> import torch, hypergrad
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> inner = lambda w, y: ((w - y) ** 2).sum()
        >>> outer = lambda w, y: (w**3).sum()
        >>> w = 0.99 * y  # a solver that stopped early: the gradient is 3 w^2, and not 3 y^2
        >>> got = hypergrad.hypergradient(inner, outer, w, y)
        >>> certificate = hypergrad.hypergradient_certificate(
        ...     inner, outer, w, y, got, strong_convexity=2.0)
        >>> round(certificate.relative_error, 4), certificate.corrected
        (0.0199, tensor([ 3., 12.], dtype=torch.float64))
    """
    check_option(is_count(max_corrections), "max_corrections", max_corrections, "an integer >= 1")
    if strong_convexity is not None:
        good = is_tolerance(strong_convexity) and strong_convexity > 0
        check_option(good, "strong_convexity", strong_convexity, "None or a finite number > 0")
    point = InnerPoint(inner_loss, outer_loss, inner_params, outer_params)
    layout = point.derivatives.outer_layout
    tree = getattr(gradient, "grad", None) if _is_result(gradient) else gradient
    judged = point.widened(layout.flatten(tree, name="gradient"))
    layout.check_finite(judged, "gradient")

    ends = extreme_eigenvalues(point.derivatives.curvature, num_steps=_CURVATURE_STEPS)
    mu = _curvature(strong_convexity, ends.smallest, ends.largest, point)
    mixed_norm = point.mixed_norm()
    linear_residual, linear_bound, hvps = None, None, ends.num_hvps
    if isinstance(gradient, Hypergradient):
        residual, size = point.residual(gradient.ihvp)
        hvps += 1
        linear_residual = residual / size if size > 0 else 0.0
        linear_bound = mixed_norm * residual / mu if mu > 0 else math.inf

    newton = Newton(point, judged, mixed_norm, mu, max_corrections).run()
    start, corrected = newton.exact[0], newton.exact[-1]
    error, relative = math.inf, math.inf
    reason = newton.reason
    if reason is None:
        error = norm(judged - corrected) + newton.margin
        least = norm(corrected) - newton.margin
        relative = error / least if least > 0 else math.inf
        if error == 0.0:
            relative = 0.0
        elif not math.isfinite(relative):
            reason = "the true hypergradient cannot be told from zero"
    inner_error = norm(start - corrected)
    certificate = HypergradientCertificate(
        relative_error=relative,
        error=error,
        corrected=layout.unflatten(corrected.to(layout.dtype)),
        linear_error=norm(judged - start),
        inner_error=inner_error,
        margin=newton.margin,
        linear_bound=linear_bound,
        linear_residual=linear_residual,
        inner_gradient_norm=point.stationarity,
        inner_distance=point.stationarity / mu if mu > 0 else math.inf,
        smallest_curvature=mu,
        largest_curvature=ends.largest,
        curvature_given=strong_convexity is not None,
        num_corrections=newton.num_corrections,
        num_hvps=hvps + newton.num_hvps,
        reason=reason,
    )
    if newton.reason is not None:
        warn(f"the inner problem is visibly not solved: {newton.reason}.", InnerProblemWarning)
    elif inner_error > _VISIBLE * norm(corrected) + newton.margin:
        # Few digits, so that Python shows the warning once a place and not at each outer step.
        part = f"about {inner_error / norm(corrected):.0e}" if certificate.certified else "most"
        warn(
            f"the inner problem is visibly not solved: that alone moves the hypergradient by {part}"
            " of itself. Run the inner solver further.",
            InnerProblemWarning,
        )
    return certificate


def _is_result(gradient: Any) -> bool:
    return isinstance(gradient, Hypergradient | UnrolledHypergradient)


def _curvature(given: float | None, smallest: float, largest: float, point: InnerPoint) -> float:
    """The strong convexity that was given, unless products contradict it; else the Ritz value."""
    if given is None:
        return smallest
    if smallest < given - 10.0 * point.eps * max(abs(smallest), abs(largest)):
        raise SolverOptionError(
            f"strong_convexity is {given}, but inner_loss has a direction of curvature "
            f"{smallest:.3g} at inner_params. Pass a lower bound on the curvature, or None."
        )
    return given
