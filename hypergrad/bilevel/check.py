"""Is this hypergradient right?  Central differences through the user's own inner solver."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from ..solvers import Solver
from ..solvers.options import Damping, check_option, is_count, is_tolerance
from .certificate import HypergradientCertificate, hypergradient_certificate
from .corrections import norm
from .hypergradient import BilevelPoint, Hypergradient, Loss, hypergradient, layouts
from .unroll import UnrolledHypergradient

#: Step sizes tried for a direction before its best answer stands.
_TRIES = 4
#: From one try to the next, towards where the larger part of the uncertainty is smaller.
_CHANGE = 4.0


class Verdict(enum.Enum):
    """What a check found; ``.value`` is a sentence."""

    PASSED = "the differences agree with the hypergradient within the tolerance"
    FAILED = (
        "the differences contradict the hypergradient. Likely causes: a loss that does not use its"
        " arguments, a solver that minimises another inner loss, too loose a linear solve, damping,"
        " or inner parameters short of the solution (see the certificate)"
    )
    INCONCLUSIVE = (
        "the differences cannot tell at this tolerance, mostly because the re-solved points are not"
        " near enough to inner solutions. Let solve_inner run further (and see that it minimises"
        " inner_loss), raise rtol, use float64, or pass step_size"
    )


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class HypergradientCheck:
    """Central differences against a hypergradient, and what is known of both.

    Attributes:
        verdict: PASSED, FAILED or INCONCLUSIVE.
        relative_error: the largest |difference - slope| over the slope's size, over directions.
        resolution: the largest uncertainty of a difference, relative to the same.
        rtol: the tolerance.
        slopes: <grad, u> by direction u.
        differences: the central difference of the outer loss along each.
        uncertainties: of each difference: from the inner error at both ends, the rounding and
            the curvature of the outer loss along the way.
        step_sizes: the step on either side, by direction.
        inner_error: the largest |grad_w inner_loss| / curvature at a re-solved point.
        num_solves: calls of ``solve_inner``.
        certificate: the error bound at ``inner_params`` itself.
    """

    verdict: Verdict
    relative_error: float
    resolution: float
    rtol: float
    slopes: tuple[float, ...]
    differences: tuple[float, ...]
    uncertainties: tuple[float, ...]
    step_sizes: tuple[float, ...]
    inner_error: float
    num_solves: int
    certificate: HypergradientCertificate

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASSED."""
        return self.verdict is Verdict.PASSED

    @property
    def message(self) -> str:
        """One sentence for people, with the figures."""
        directions = f"{len(self.slopes)} direction{'s' * (len(self.slopes) != 1)}"
        return (
            f"{self.verdict.name}: {self.verdict.value} (relative error"
            f" {self.relative_error:.1e} +- {self.resolution:.1e}, rtol {self.rtol:.1e}, inner"
            f" error {self.inner_error:.1e}, {directions}, {self.num_solves}"
            " inner solves)."
        )


def check_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Tree,
    outer_params: Tree,
    *,
    solve_inner: Callable[[Tree, Tree], Tree],
    gradient: Hypergradient | UnrolledHypergradient | Tree | None = None,
    solver: Solver | None = None,
    damping: Damping | None = None,
    rtol: float = 1e-2,
    num_directions: int = 3,
    step_size: float | None = None,
    strong_convexity: float | None = None,
    generator: torch.Generator | None = None,
) -> HypergradientCheck:
    """Compare a hypergradient with central differences of F(y) = f(w*(y), y), by re-solving.

    Along a random unit direction u, D(h) = (F(y + h u) - F(y - h u)) / 2h, with the inner problem
    solved anew by ``solve_inner`` at both ends.  What D(h) may be wrong by is

    - ``|grad_w f| |grad_w g| / mu / h``: the ends are inner solutions to ``|grad_w g| / mu`` only
      (to first order; no bound where that is longer than the way between them),
    - the rounding of f over h, and
    - ``|D(2h) - D(h)|``: three times the truncation, for a smooth F.

    h is chosen where these balance, from the inner error that is seen, and changed up to three
    times where one of them is too large.  A direction passes if its error and that uncertainty
    together are below ``rtol`` times the size of the slope, and fails if the error is above it
    even without the uncertainty.

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``, the same at each call.
        outer_loss: f, called the same way.
        inner_params: the inner solution at ``outer_params``.
        outer_params: y.
        solve_inner: your inner solver, ``solve_inner(init, outer_params) -> inner_params``; it is
            given copies.
        gradient: what to check, as for :func:`hypergrad.hypergradient_certificate`; None for
            :func:`hypergrad.hypergradient` at ``inner_params`` with ``solver`` and ``damping``.
        solver: see ``gradient``.
        damping: see ``gradient``.
        rtol: relative to the larger of |<grad, u>|, |D| and |grad| / sqrt(dim), the size of a
            typical slope.
        num_directions: how many random directions.
        step_size: h, where the choice does not fit (a narrow domain); None to choose.
        strong_convexity: a known lower bound on the inner curvature; None to estimate it.
        generator: source of the directions; the default is seeded.

    Returns:
        A :class:`HypergradientCheck`; ``print(check.message)``.

    Raises:
        SolverOptionError: an option outside its range.
        NonFiniteError: ``solve_inner`` returned nan or inf, or a loss is.
        TreeStructureError, LeafTypeError, DeviceError: what ``solve_inner`` returned does not
            look like ``inner_params``.
        HypergradError: see :func:`hypergrad.hypergradient_certificate`.

    Warns:
        InnerProblemWarning: the inner problem is visibly not solved at ``inner_params``.

    Cost: the certificate, and 4 to 16 inner solves a direction.

    Examples:
        >>> import torch, hypergrad
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> check = hypergrad.check_hypergradient(
        ...     lambda w, y: 0.5 * ((w - y) ** 2).sum(), lambda w, y: (w**3).sum(), y.clone(), y,
        ...     solve_inner=lambda init, y: y.clone())
        >>> check.passed, check.relative_error < 1e-6
        (True, True)
    """
    check_option(is_tolerance(rtol) and rtol > 0, "rtol", rtol, "a finite number > 0")
    check_option(is_count(num_directions), "num_directions", num_directions, "an integer >= 1")
    good = step_size is None or (is_tolerance(step_size) and step_size > 0)
    check_option(good, "step_size", step_size, "None or a finite number > 0")
    if gradient is None:
        gradient = hypergradient(
            inner_loss, outer_loss, inner_params, outer_params, solver=solver, damping=damping
        )
    certificate = hypergradient_certificate(
        inner_loss,
        outer_loss,
        inner_params,
        outer_params,
        gradient,
        strong_convexity=strong_convexity,
    )
    is_result = isinstance(gradient, Hypergradient | UnrolledHypergradient)
    tree = gradient.grad if is_result else gradient
    differences = _Differences(
        inner_loss, outer_loss, inner_params, outer_params, solve_inner, certificate
    )
    grad = differences.layout.flatten(tree, name="gradient").to(differences.dtype)
    generator = generator or torch.Generator().manual_seed(0)
    typical = norm(grad) / math.sqrt(len(grad))

    found, slopes, sizes = [], [], []
    for _ in range(num_directions):
        direction = torch.randn(len(grad), generator=generator, device=generator.device)
        direction = direction.to(grad)
        direction = direction / norm(direction)
        slope = float(grad @ direction)
        difference = differences.along(direction, step_size, rtol * max(abs(slope), typical))
        found.append(difference)
        slopes.append(slope)
        sizes.append(max(abs(slope), abs(difference.value), typical))
    errors = [abs(d.value - slope) for d, slope in zip(found, slopes, strict=True)]
    rows = list(zip(errors, found, sizes, strict=True))
    if any(error - d.uncertainty > rtol * size for error, d, size in rows):
        verdict = Verdict.FAILED
    elif all(error + d.uncertainty <= rtol * size for error, d, size in rows):
        verdict = Verdict.PASSED
    else:
        verdict = Verdict.INCONCLUSIVE
    return HypergradientCheck(
        verdict=verdict,
        relative_error=max(_over(error, size) for error, _, size in rows),
        resolution=max(_over(d.uncertainty, size) for _, d, size in rows),
        rtol=rtol,
        slopes=tuple(slopes),
        differences=tuple(d.value for d in found),
        uncertainties=tuple(d.uncertainty for d in found),
        step_sizes=tuple(d.step for d in found),
        inner_error=differences.inner_error,
        num_solves=differences.num_solves,
        certificate=certificate,
    )


@dataclass(frozen=True)
class _Difference:
    """A central difference, what it may be wrong by, and its step."""

    value: float
    noise: float
    truncation: float
    step: float

    @property
    def uncertainty(self) -> float:
        return self.noise + self.truncation


@dataclass(frozen=True, eq=False)
class _End:
    """F where the inner problem was solved anew: its error from that, its rounding, and w."""

    value: float
    error: float
    rounding: float
    w: Tensor
    distance: float


class _Differences:
    """F at outer points, by the user's solver, with the error that the solver leaves."""

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        inner_params: Tree,
        outer_params: Tree,
        solve_inner: Callable[[Tree, Tree], Tree],
        certificate: HypergradientCertificate,
    ) -> None:
        self.inner_loss, self.outer_loss, self.solve_inner = inner_loss, outer_loss, solve_inner
        self.inner_params, self.mu = inner_params, certificate.smallest_curvature
        self.inner_layout, self.layout = layouts(inner_params, outer_params)
        self.dtype = working_dtype(self.layout.dtype, self.layout.device)
        self.y = self.layout.flatten(outer_params).to(self.dtype)
        dtypes = (*self.layout.dtypes, *self.inner_layout.dtypes)
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.inner_error = 0.0
        self.num_solves = 0

    def solved(self, y: Tensor) -> _End:
        """F(y) by the user's solver, and what it may be wrong by."""
        outer = self.layout.unflatten(y.to(self.layout.dtype))
        init = _copies(self.inner_layout, self.inner_params)
        with torch.enable_grad():
            solved = self.solve_inner(init, _copies(self.layout, outer))
        self.num_solves += 1
        leaves = self.inner_layout.leaves(solved, name="the result of solve_inner")
        params = self.inner_layout.unflatten_leaves([leaf.detach() for leaf in leaves])
        point = BilevelPoint(self.inner_loss, self.outer_loss, params, outer)
        w, gradient, v = (
            self.inner_layout.flatten(tree).to(self.dtype)
            for tree in (params, point.inner_gradient, point.v)
        )
        distance = norm(gradient) / self.mu if self.mu > 0 else math.inf
        self.inner_error = max(self.inner_error, distance)
        value, slope = float(point.outer_value), norm(v)
        error = 0.0 if slope == 0 else slope * distance
        return _End(value, error, 10.0 * self.eps * abs(value), w, distance)

    def along(self, direction: Tensor, step: float | None, wanted: float) -> _Difference:
        """The best central difference along a unit direction."""
        if step is not None:
            return self._central(direction, step)
        scale = max(norm(self.y), 1.0)
        end = self.solved(self.y)
        # Noise over h against h^2 third derivatives, with F of its own size over ``scale``.
        noise = end.error + end.rounding
        size = max(abs(end.value), wanted * scale, noise)
        part = noise / size if 0 < size < math.inf else 1.0
        best = self._central(direction, scale * min(max(part, self.eps) ** (1 / 3), 0.1))
        for _ in range(_TRIES - 1):
            if best.uncertainty <= 0.3 * wanted:
                break
            smaller = math.isfinite(best.noise) and best.truncation > best.noise
            step = best.step / _CHANGE if smaller else min(best.step * _CHANGE, scale)
            other = self._central(direction, step)
            if not other.uncertainty < best.uncertainty:
                break
            best = other
        return best

    def _central(self, direction: Tensor, step: float) -> _Difference:
        slopes, noises = [], []
        for h in (step, 2.0 * step):
            up, down = (self.solved(self.y + sign * h * direction) for sign in (1.0, -1.0))
            slopes.append((up.value - down.value) / (2.0 * h))
            error = up.error + down.error
            if error > 0 and up.distance + down.distance > norm(up.w - down.w):
                error = math.inf  # the ends are nowhere near solutions: first order says nothing
            noises.append((error + up.rounding + down.rounding) / (2.0 * h))
        return _Difference(slopes[0], noises[0], abs(slopes[1] - slopes[0]), step)


def _copies(layout: TreeLayout, tree: Tree) -> Tree:
    return layout.unflatten_leaves([leaf.detach().clone() for leaf in layout.leaves(tree)])


def _over(part: float, size: float) -> float:
    if size == 0:
        return 0.0 if part == 0 else math.inf
    return part / size
