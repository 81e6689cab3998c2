"""What every solver shares: the damped system on flat vectors, the outcome, and its report."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverOptionError
from ..norms import plain_norms, powers_of_two, row_norms
from ..operators import LinearOperator
from ..pytree import Tree
from ..spectrum import damping_from_extremes, lanczos_extremes
from ..tracing import compiling, far
from .options import Damping

#: Rows of a smaller norm, or of one above its inverse, are scaled before a product in a narrower
#: dtype.  The smallest normal number of float16, 6e-5, leaves room for scaled rows only.
_SMALL = {torch.float16: 1.0}
_SMALL_ELSE = 1e-6


class Status(enum.Enum):
    """How a solve ended; ``.value`` is a sentence with the likely causes and what to do."""

    CONVERGED = "the true residual is within the tolerance"
    FIXED_ITERATIONS = "the requested work was done; no tolerance was asked for"
    MAX_ITERATIONS = (
        "max_iters was reached before the tolerance: the system is ill-conditioned for this budget."
        " Raise max_iters or damping, loosen rtol, or precondition"
    )
    NEGATIVE_CURVATURE = (
        "the operator plus damping is not positive definite: negative or zero curvature was met."
        " Raise damping (or pass damping='auto'), use a Gauss-Newton operator, or solve the inner"
        " problem further"
    )
    STAGNATED = (
        "the residual stopped falling above the tolerance: the rounding of the products, a"
        " singular operator or an approximation too coarse. Raise damping or rank, loosen rtol, or"
        " use a wider dtype"
    )
    #: Never in a report of this library, which raises :class:`hypergrad.NonFiniteError` instead.
    NON_FINITE = "a product or the answer holds nan or inf"

    @property
    def failed(self) -> bool:
        """Whether the answer is not what was asked for."""
        return self not in (Status.CONVERGED, Status.FIXED_ITERATIONS)


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class SolveInfo:
    """How right an answer is and what it cost.

    For a batch of right-hand sides the scalar fields describe the worst column and ``columns``
    holds each column's own report.

    Attributes:
        status: how the solve ended.
        converged: whether the true residual met a tolerance (``status`` is CONVERGED).
        residual_norm: |v - (A + damping I) x|, recomputed from the answer that is returned (unless
            :class:`hypergrad.Nystrom` was told to estimate it, or to do without).
        relative_residual: the same over |v|; 0 when v = 0.
        iterations: iterations of the recurrence; 0 for direct solvers.
        num_hvps: products with A, all in all (the operator's, the check's, the probe's).
        damping: the damping that was used; what ``"auto"`` came to.
        solver: the configuration that ran.
        rank: rank kept by a sketch, None for other solvers.
        smallest_eigenvalue: smallest eigenvalue or Ritz value seen, where the solver sees one; 0
            for a sketch that was complete below its rank.
        direction: a unit tree of non-positive curvature, when CG met one.
        columns: one report a right-hand side, for a batch; else empty.
        reason: why this solver ran, where ``solver="auto"`` chose it, or what became of the sketch
            of a :class:`hypergrad.ReusedSketch`; else None.
        sketch_hvps: of a :class:`hypergrad.ReusedSketch`, the products that went into a new or
            refreshed sketch: 0 where that of an earlier solve served.  None for other solvers.
    """

    status: Status
    converged: bool
    residual_norm: float
    relative_residual: float
    iterations: int
    num_hvps: int
    damping: float
    solver: Solver
    rank: int | None = None
    smallest_eigenvalue: float | None = None
    direction: Tree | None = None
    columns: tuple[SolveInfo, ...] = ()
    reason: str | None = None
    sketch_hvps: int | None = None

    @property
    def message(self) -> str:
        """One sentence for people, with the status, its likely causes and the figures."""
        return (
            f"{type(self.solver).__name__}: {self.status.value}"
            f" (relative residual {self.relative_residual:.2e}, damping {self.damping:.3g},"
            f" {self.iterations} iterations, {self.num_hvps} HVPs)."
        )


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer with its report.

    Attributes:
        value: x, with the structure, dtype and device of v.
        info: how right it is and what it cost.
        backward: the report of each solve that differentiating ``value`` has taken so far, in the
            order in which they ran: one a backward pass, of any order, or forward-mode tangent.
    """

    value: Tree
    info: SolveInfo
    backward: list[SolveInfo] = field(default_factory=list)


@dataclass
class Outcome:
    """What a solver hands back, on flat vectors and relative to the scaled right-hand sides.

    Attributes:
        x: shape (m, n), the answers.
        residual_norms: shape (m,), true residual norms of ``x`` as it will be returned.
        statuses: one a row.
        iterations: one a row.
        damping: the damping used.
        rank: see :class:`SolveInfo`.
        smallest_eigenvalue: see :class:`SolveInfo`.
        directions: unit vectors of non-positive curvature by row.
        solver: what ran, where the configuration chose another.
        reason: why it did.
        sketch_hvps: see :class:`SolveInfo`.
        backward_solver: what solves the system once more when the answer is differentiated, with
            all that was prepared, such as a sketch; None for the same configuration.
    """

    x: Tensor
    residual_norms: Tensor
    statuses: list[Status]
    iterations: list[int]
    damping: float
    rank: int | None = None
    smallest_eigenvalue: float | None = None
    directions: dict[int, Tensor] = field(default_factory=dict)
    solver: Solver | None = None
    reason: str | None = None
    sketch_hvps: int | None = None
    backward_solver: Solver | None = None


class DampedSystem:
    """(A + damping I) X = B on blocks of flat vectors in the working dtype.

    Counts the products, widens and narrows around them, and raises on nan and inf.

    Attributes:
        operator: A.
        b: shape (m, n), working dtype: right-hand sides scaled by powers of two to a norm of
            about one, so that no answer depends on the scale of v.
        tolerances: shape (m,): absolute tolerance on the scaled residuals, with rtol and atol.
        damping: the damping, or "auto" until :meth:`resolve_damping`.
        num_hvps: products so far.
        start_norms: shape (m,): the residual norms that the last solve began with.
    """

    def __init__(
        self, operator: LinearOperator, b: Tensor, scales: Tensor, damping: Damping
    ) -> None:
        self.operator, self.b, self.scales, self.damping = operator, b, scales, damping
        # Scaled as they are, no square that counts leaves the dtype's range.  Far away they are
        # rounded as norms of residuals are, so that equal rows have equal norms.
        self.b_norms = row_norms(b) if far(b) else torch.linalg.vector_norm(b, dim=1)
        self.start_norms = self.b_norms
        self.num_hvps = 0
        self._delivered: tuple[Tensor, int, Tensor] | None = None
        #: Where what was multiplied had entries that are not finite, by what it is called.
        self._unseen: dict[str, Tensor] = {}
        #: Whether any had, of no dimension; None where there were none.
        self._spoilt: Tensor | None = None

    @property
    def roomy(self) -> bool:
        """Whether squares of the products' numbers are far within the range of the working dtype.

        Those of float32 are, in float64.
        """
        wide, narrow = torch.finfo(self.b.dtype).max, torch.finfo(self.operator.dtype).max
        return bool(narrow < wide**0.25)

    def tolerances(self, rtol: float, atol: float) -> Tensor:
        """Absolute tolerances on the scaled residuals, shape (m,): the larger of the two."""
        return torch.maximum(rtol * self.b_norms, atol / self.scales)

    def product(self, x: Tensor, *, passing: bool = False, later: bool = False) -> Tensor:
        """A times each row of ``x``, shape (m, n), without damping.

        Args:
            x: shape (m, n).
            passing: for a product that is used at once; see :meth:`LinearOperator._passing`.
            later: whether nan and inf may wait for the next :meth:`look`.
        """
        scales = None
        if x.dtype != self.operator.dtype:
            # Residuals fall far below one.  Narrowed as they are, their entries would lose digits
            # to the narrow dtype's smallest numbers, and such numbers are slow to multiply.
            if not compiling() and far(x):
                scales = powers_of_two(torch.linalg.vector_norm(x, torch.inf, dim=1))[:, None]
            else:
                norms = plain_norms(x) if compiling() and self.roomy else row_norms(x)
                small = _SMALL.get(self.operator.dtype, _SMALL_ELSE)
                out_of_range = (norms < small) | (norms > 1.0 / small)
                if compiling() or bool(out_of_range.any()):
                    scales = powers_of_two(norms)[:, None]
            if scales is not None:
                x = x * scales.reciprocal()  # as exact as the quotient, and quicker
        if passing and len(x) == 1:
            out = self.operator._passing(x[0].to(self.operator.dtype, copy=True))[None]
        else:
            out = self.operator._apply(x.to(self.operator.dtype))
        self.num_hvps += x.shape[0]
        self.expect_finite(out, "the output of the operator", later=later)
        return out.to(self.b.dtype) if scales is None else out.to(self.b.dtype) * scales

    def expect_finite(self, rows: Tensor, what: str, *, later: bool = False) -> None:
        """Raise :class:`NonFiniteError` unless ``rows``, shape (m, n), are finite.

        With ``later``, and where the host would wait for that, it is left to :meth:`look`.
        """
        if not (later and far(rows)) or compiling():
            try:
                self.operator.layout.check_finite(rows, what)
            except NonFiniteError as error:
                found = error
            else:
                return
            self.look()  # what follows from what was not finite is not at fault
            raise found
        bad = ~torch.isfinite(rows).all(dim=0)
        if self._spoilt is not None:  # what follows, of whatever name, is bad by that
            bad &= ~self._spoilt
        first = self._unseen.get(what)
        self._unseen[what] = bad if first is None else first | bad
        self._spoilt = bad.any() if self._spoilt is None else self._spoilt | bad.any()

    def look(self, *flags: Tensor) -> list[bool]:
        """The values of ``flags``, each of no dimension, in one transfer from the device.

        Raises:
            NonFiniteError: what :meth:`expect_finite` was given since the last look is not finite.
        """
        unseen, self._unseen, self._spoilt = self._unseen, {}, None
        every = (*flags, *(bad.any() for bad in unseen.values()))
        values: list[bool] = torch.stack(every).tolist() if every else []
        for (what, bad), found in zip(unseen.items(), values[len(flags) :], strict=True):
            if found:
                self.operator.layout.check_finite(torch.where(bad, torch.nan, 0.0), what)
        return values[: len(flags)]

    def narrow_product(self, x: Tensor) -> Tensor:
        """A times each row of ``x``, both in the operator's dtype: for rows of size about one."""
        out = self.operator._apply(x)
        self.num_hvps += len(x)
        self.operator.layout.check_finite(out, "the output of the operator")
        return out

    def passing_product(self, x: Tensor) -> Tensor:
        """A times one vector in the operator's dtype, by :meth:`LinearOperator._passing`.

        For a caller that looks for nan and inf itself, and scales rows that are far from one.
        """
        self.num_hvps += 1
        return self.operator._passing(x)

    def apply(self, x: Tensor, damping: float, *, later: bool = False) -> Tensor:
        """(A + damping I) times each row of ``x``; ``later`` as in :meth:`product`."""
        return torch.add(self.product(x, later=later), x, alpha=damping)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` as the operator will multiply it: rounded to its dtype."""
        return x.to(self.operator.dtype).to(self.b.dtype)

    def returned(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """``x`` as the caller will receive it: in its own scale, each leaf in its own dtype.

        Raises:
            NonFiniteError: the answer is too large for a leaf's dtype.
        """
        scales = factors(self.scales if rows is None else self.scales[rows])
        return self._answer(x, rows).to(self.b.dtype, copy=True).div_(scales)

    def delivered(self, x: Tensor) -> Tensor:
        """:meth:`returned` in its own scale and the operator's dtype."""
        return self._answer(x, None)

    def _answer(self, x: Tensor, rows: Tensor | None) -> Tensor:
        known = self._delivered  # what has been checked is asked for again
        if rows is None and known is not None and known[0] is x and known[1] == x._version:
            return known[2]
        scales = factors(self.scales if rows is None else self.scales[rows])
        answer = self.operator.layout.narrowed((x * scales).to(self.operator.dtype))
        if compiling():
            return answer
        # A nan or an infinity passes into the sum: one pass, unless finite entries overflow it.
        if not math.isfinite(answer.sum()) and not bool(torch.isfinite(answer).all()):
            self.look()  # by a product that was not finite
            raise NonFiniteError(
                f"x overflows {min(self.operator.layout.dtypes, key=lambda d: torch.finfo(d).max)}:"
                " the answer is too large for the dtype of v. Raise damping, rescale the problem, "
                "or use a wider dtype."
            )
        if rows is None:
            self.note_delivered(x, answer)
        return answer

    def note_delivered(self, x: Tensor, answer: Tensor) -> None:
        """Take note that ``x`` is ``answer`` as the caller will receive it, and finite."""
        if not x.is_inference():
            self._delivered = (x, x._version, answer)

    def residual(self, x: Tensor, damping: float, rows: Tensor | None = None) -> Tensor:
        """True residual b - (A + damping I) x of ``x`` as it will be returned."""
        b = self.b if rows is None else self.b[rows]
        x = self.returned(x, rows)
        residual = b - self.product(x, passing=True)
        return residual.sub_(x, alpha=damping) if damping else residual

    def begin(self, x0: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
        """Where to start, and the residual there; a warm start no better than zero is not used."""
        zero = torch.zeros_like(self.b)
        if x0 is None:
            self.start_norms = self.b_norms
            return zero, self.b.clone()
        residual = self.residual(x0, damping)
        norms = row_norms(residual)
        self.start_norms = torch.minimum(norms, self.b_norms)
        better = (norms < self.b_norms)[:, None]
        return torch.where(better, x0, zero), torch.where(better, residual, self.b)

    def resolve_damping(self) -> float:
        """The damping as a number; ``"auto"`` costs a Lanczos run of at most 20 products."""
        if self.damping == "auto":
            ends = lanczos_extremes(
                lambda vector: self.product(vector[None])[0],
                self.operator.layout.dim,
                20,
                self.b.dtype,
                self.b.device,
            )
            self.damping = damping_from_extremes(
                ends.smallest, ends.largest, rounding=self.rounding
            )
        assert not isinstance(self.damping, str)
        return self.damping

    @property
    def rounding(self) -> float:
        """Relative rounding of a product, generously: a few eps of the operator's dtype."""
        return 10.0 * torch.finfo(self.operator.dtype).eps


class Solver(ABC):
    """A solver's configuration: a frozen dataclass, validated when it is made."""

    #: Damping when the caller names none.
    default_damping: Damping = 0.0
    #: Whether A must be symmetric; the adjoint system is then the system itself.
    self_adjoint: ClassVar[bool] = True

    @abstractmethod
    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        """Solve the system; ``x0`` has the shape of ``system.b``, or is None for zero."""

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """A fixed amount of work as pure tensor code: x and its true residual norms.

        For ``torch.compile``: no branch, count or message may depend on a tensor's values.
        Solvers that can do a fixed amount of work override it.
        """
        raise SolverOptionError(
            f"{self} decides on values as it goes, which torch.compile cannot trace. Compile a "
            "solve with a fixed amount of work, such as CG(rtol=0.0, max_iters=20), or call solve "
            "outside the compiled function."
        )


def factors(scales: Tensor) -> Tensor | float:
    """What rows are to be multiplied by, for one scale a row; a number is quicker for one row."""
    if len(scales) == 1 and scales.device.type == "cpu" and not compiling():
        number: float = scales.tolist()[0]
        return number
    return scales[:, None]
