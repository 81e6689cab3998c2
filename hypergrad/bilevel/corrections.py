"""Newton corrections of an inner point, and the hypergradient that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..norms import row_norms
from ..precision import working_dtype
from ..pytree import Tree
from ..solvers import CG, Solution, Status, solve
from ..spectrum import lanczos_extremes
from .hypergradient import BilevelPoint, Loss, filled

#: Lanczos steps for the norm of the mixed derivative.
_MIXED_STEPS = 10
#: What remains to be corrected may be this part of the error at most, before corrections end ...
_REMAINDER = 0.1
#: ... and the inner gradient must have fallen to this part.
_SOLVED = 1e-5
#: A Newton step near enough to a minimum leaves this part of the inner gradient at most.
_SUPERLINEAR = 0.1
#: What remains is taken for this much more than the changes along the Newton steps say.
_SAFETY = 10.0


class InnerPoint:
    """One inner point: its derivatives, and flat vectors in the working dtype."""

    def __init__(
        self, inner_loss: Loss, outer_loss: Loss, inner_params: Tree, outer_params: Tree
    ) -> None:
        self._at: Callable[[Tree], InnerPoint] = lambda params: InnerPoint(
            inner_loss, outer_loss, params, outer_params
        )
        self.derivatives = BilevelPoint(inner_loss, outer_loss, inner_params, outer_params)
        self.layout = self.derivatives.inner_layout
        self.dtype = working_dtype(self.layout.dtype, self.layout.device)
        self.eps = max(torch.finfo(dtype).eps for dtype in self.layout.dtypes)
        self.params = self.widened(self.layout.flatten(inner_params))
        self.stationarity = norm(self.flat(self.derivatives.inner_gradient))

    def widened(self, flat: Tensor) -> Tensor:
        """A vector in the working dtype."""
        return flat.to(self.dtype)

    def flat(self, inner: Tree) -> Tensor:
        """An inner tree as a vector."""
        return self.widened(self.layout.flatten(inner))

    def outer_flat(self, leaves: Sequence[Tensor | None]) -> Tensor:
        """Leaves of the outer parameters as a vector, with zeros for None."""
        layout = self.derivatives.outer_layout
        full = filled(leaves, self.derivatives.outer)
        return self.widened(layout.flatten(layout.unflatten_leaves(full)))

    def moved(self, step: Tensor) -> InnerPoint:
        """The point at w - step, in the parameters' own dtypes."""
        return self._at(self.layout.unflatten((self.params - step).to(self.layout.dtype)))

    def residual(self, x: Tree) -> tuple[float, float]:
        """|v - H x| without damping, and |v|.  Cost: one product."""
        v = self.flat(self.derivatives.v)
        return norm(v - self.flat(self.derivatives.curvature @ x)), norm(v)

    def tight(self, v: Tree, x0: Tree | None = None) -> Solution:
        """H^-1 v as closely as products in this dtype allow."""
        solver = CG(rtol=max(1e-10, 10.0 * self.eps))
        with torch.no_grad():  # only the value is of use
            return solve(self.derivatives.curvature, v, solver, x0=x0, on_failure="ignore")

    def mixed_norm(self) -> float:
        """|M|, M = d2 g / dy dw, from above in practice: Lanczos on M M'."""
        layout = self.derivatives.outer_layout

        def product(u: Tensor) -> Tensor:
            back = self.derivatives.mixed_transposed(layout.unflatten(u.to(layout.dtype)))
            return self.outer_flat(self.derivatives.mixed(back))

        ends = lanczos_extremes(product, layout.dim, _MIXED_STEPS, self.dtype, layout.device)
        return math.sqrt(max(ends.largest_bound, 0.0))


class Newton:
    """Corrections of the inner point, and the hypergradient at each by tight solves.

    Attributes:
        exact: the hypergradients, that at the given point first.
        margin: bound on what separates the last from the true one.
        reason: why there is no such bound, or None.
        num_corrections: steps done.
        num_hvps: products done.
    """

    def __init__(
        self, point: InnerPoint, judged: Tensor, mixed_norm: float, mu: float, max_corrections: int
    ) -> None:
        self.point, self.judged = point, judged
        self.mixed_norm, self.mu, self.max_corrections = mixed_norm, mu, max_corrections
        self.reason: str | None = None
        self.num_corrections = self.num_hvps = 0
        self.x: Tree = None
        self.floor = 0.0
        self.sensitivity = 0.0
        self.inner_margin = 0.0
        self.exact = [self._exact(point)]

    @property
    def margin(self) -> float:
        """See the class."""
        return math.inf if self.reason is not None else self.inner_margin + self.floor

    def run(self) -> Newton:
        """Correct until the hypergradient has stopped changing, or cannot be corrected."""
        if self.reason is None and not self.mu > 0:
            self.reason = f"the smallest curvature of the inner loss there is {self.mu:.1e}"
        first = self.point.stationarity
        while self.reason is None and self.point.stationarity > 0:
            if self.num_corrections == self.max_corrections:
                if self.inner_margin == math.inf:
                    self.reason = (
                        f"{self.max_corrections} Newton steps from the inner parameters leave an "
                        f"inner gradient of {self.point.stationarity:.1e}"
                    )
                break
            if self._correct():
                break
            enough = max(_REMAINDER * norm(self.judged - self.exact[-1]), self.floor)
            if self.point.stationarity <= _SOLVED * first and self.inner_margin <= enough:
                break
        return self

    def _correct(self) -> bool:
        """One Newton step; whether it met the rounding of the inner gradient."""
        here = self.point
        solution = here.tight(here.derivatives.inner_gradient)
        self.num_hvps += solution.info.num_hvps
        if self._indefinite(solution):
            return True
        step = here.flat(solution.value)
        size = norm(step)
        there, scale = self._decreased(step)
        tiny = size <= here.eps**0.25 * norm(here.params)
        if tiny and (there is None or there.stationarity > 0.5 * here.stationarity):
            # As close as rounding lets Newton's method come: the full step is an error bar.
            there = there or here.moved(step)
            x = self.x
            self._exact(there)
            self.inner_margin = 2.0 * self._change(here, there, x)
            return True
        if there is None:
            self.reason = "no part of a Newton step makes the inner gradient smaller"
            return True
        self.point, x = there, self.x
        self.exact.append(self._exact(there))
        self.num_corrections += 1
        change = self._change(here, there, x)
        self.sensitivity = max(self.sensitivity, change / (scale * size))
        ratio = there.stationarity / here.stationarity
        self.inner_margin = math.inf
        # Near a minimum of positive curvature the ratio itself goes to zero.  One that stays is
        # that of a degenerate minimum, or of a loss that falls for ever: exp(w) has 1/e.
        if ratio <= _SUPERLINEAR:
            # The changes to come are a geometric series at worst; and they are those of a way of
            # length |grad_w g| / mu.
            series = change * ratio / (1.0 - ratio)
            way = self.sensitivity * there.stationarity / self.mu
            self.inner_margin = _SAFETY * max(series, way)
        return False

    def _change(self, here: InnerPoint, there: InnerPoint, x: Tree) -> float:
        """How far the hypergradient could have changed between two points, ``x`` being the first's.

        The norms of what changed in it, term by term.  The change of their sum would not do: for
        one outer parameter it is zero by chance somewhere along the way.
        """
        old, new = here.derivatives, there.derivatives
        of_direct = there.outer_flat(new.direct) - there.outer_flat(old.direct)
        of_mixed = there.outer_flat(new.mixed(x)) - there.outer_flat(old.mixed(x))
        of_x = there.flat(self.x) - here.flat(x)
        return norm(of_direct) + norm(of_mixed) + self.mixed_norm * norm(of_x)

    def _decreased(self, step: Tensor) -> tuple[InnerPoint | None, float]:
        """The first of the halved steps that makes the inner gradient smaller, and its scale."""
        for halvings in range(7):
            scale = 0.5**halvings
            try:
                there = self.point.moved(scale * step)
            except NonFiniteError:  # outside of the losses' domain: a shorter step may be inside
                continue
            if there.stationarity < self.point.stationarity:
                return there, scale
        return None, 0.0

    def _exact(self, point: InnerPoint) -> Tensor:
        solution = point.tight(point.derivatives.v, self.x)
        self.num_hvps += solution.info.num_hvps
        self.x = solution.value
        if self._indefinite(solution):
            return torch.full_like(self.judged, math.nan)
        grad = point.derivatives.assemble(solution).grad
        residual = solution.info.residual_norm
        slack = 2.0 * residual / self.mu if self.mu > 0 else math.inf
        rounding = (
            10.0
            * point.eps
            * (
                norm(point.outer_flat(point.derivatives.direct))
                + self.mixed_norm * norm(point.flat(solution.value))
            )
        )
        self.floor = self.mixed_norm * slack + rounding
        return point.widened(point.derivatives.outer_layout.flatten(grad))

    def _indefinite(self, solution: Solution) -> bool:
        if solution.info.status is Status.NEGATIVE_CURVATURE:
            self.reason = "the inner loss has a direction without positive curvature there"
            return True
        return False


def norm(vector: Tensor) -> float:
    """Euclidean norm of a vector, safe from overflow and underflow."""
    return float(row_norms(vector[None]))
