"""The kernel form: a solve with A = F'F in the dimension of its rows, exactly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import DampingError
from ..norms import powers_of_two, row_norms
from ..operators.root import Root, root_of
from ..spectrum import damping_from_extremes
from .base import DampedSystem, Outcome, Solver, Status
from .memory import refuse_if_too_large
from .options import check_option, is_count, is_tolerance
from .traced import begin_traced, residual_traced, safe_norms

#: Numbers of the factor that are widened at a time.
_WIDENED = 2**22
#: Corrections by the residual; each gains the digits that the Gram matrix has to give.
_CORRECTIONS = 8
#: The smallest unit of the rows, in float64 and float32.  What is much smaller has an F'F of zero.
_LEAST_UNIT, _LEAST_UNIT_NARROW = 2.0**-400, 2.0**-40


@dataclass(frozen=True)
class Gram(Solver):
    """An exact solve with A = F'F of k rows, few beside the dimension n: by the k x k matrix F F'.

    For the Gauss-Newton and Fisher matrices of few samples and many parameters: F has a row for
    each sample and output, and A is never formed.  It takes what :func:`hypergrad.ggn`, ``fisher``,
    ``empirical_fisher`` and ``root_operator`` make, and their sums, positive multiples and shifts.
    With F F' = U S U',

        (F'F + damping I)^-1 v = (v - F' U (S + damping I)^-1 U' F v) / damping.

    Both F F' and what multiplies F are summed in float64 (float32 on devices without it).  The
    difference cancels where the damping is small beside S, so the answer is corrected by the
    residual in F'F until that falls no further: one or two corrections down to a damping of 1e-8
    |A|.  Without damping, the answer is the least-squares solution of smallest norm, F' U S^-2 U'
    F v over the eigenvalues above rounding: CONVERGED when v lies in the range, STAGNATED when it
    does not.  The true residual, by a product with the operator itself, decides on the status.

    Attributes:
        rtol: relative residual above which the status is STAGNATED.
        max_bytes: memory allowed for F and F F'; refused, before computing any row, beyond it.

    Raises (when solving):
        SolverOptionError: the operator has no factor F that is known.
        NegativeCurvatureError: a Gauss-Newton operator's loss is not convex in the outputs.
        NonFiniteError: F holds nan or inf.
        OperatorTooLargeError: F and F F' take more than ``max_bytes``, or than is free.
        DampingError: the operator's own shift and the damping add up to less than 0.

    Cost: the k rows (for a model that treats samples one by one, as much as one gradient of the
    whole batch for each output of a sample; else one for each row; not counted as HVPs), k^2 n
    operations for F F' and about 9 k^3 for its eigenvalues, 8 k n for each correction, and one HVP
    a right-hand side to check the answer; k (n + 3 k) numbers of memory.
    Source: the identity of Woodbury (1950); for neural networks Ren and Goldfarb, arXiv 1906.02353.

    Examples:
        >>> import torch, hypergrad
        >>> model = lambda p, x: torch.tanh(x @ p)
        >>> loss = lambda out, y: ((out - y) ** 2).sum()
        >>> x = torch.linspace(-1, 1, 3000).reshape(3, 1000)
        >>> a = hypergrad.ggn(model, loss, torch.zeros(1000), x, torch.ones(3))
        >>> info = hypergrad.solve(a, torch.ones(1000), hypergrad.Gram(), damping=0.1).info
        >>> info.converged, info.num_hvps
        (True, 1)
    """

    rtol: float = 1e-5
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        check_option(is_tolerance(self.rtol), "rtol", self.rtol, "a finite number >= 0")
        check_option(
            is_count(self.max_bytes), "max_bytes", self.max_bytes, "a positive number of bytes"
        )

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        factored = self._factored(system)
        if system.damping == "auto":
            ends = (factored.smallest, factored.largest)
            system.damping = damping_from_extremes(*ends, rounding=system.rounding)
        damping = float(system.damping)
        total = _total(damping, factored.shift)
        # A direct solve from x0 is one for the correction to it.
        start, target = system.begin(x0, damping)
        x = start + factored.solve(target, total)
        norms = row_norms(system.residual(x, damping))
        met = norms <= system.tolerances(self.rtol, 0.0)
        made = {field.name: getattr(self, field.name) for field in fields(Gram)}
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=[Status.CONVERGED if ok else Status.STAGNATED for ok in met.tolist()],
            iterations=[0] * len(x),
            damping=damping,
            smallest_eigenvalue=factored.smallest,
            backward_solver=_Prepared(**made, made=factored),
        )

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with all eigenvalues and two corrections, whatever the residual."""
        if system.damping == "auto":
            return super()._run_traced(system, x0)
        damping = float(system.damping)
        root = root_of(system.operator, asked_by="Gram")
        factored = _Factored.of(root, system.b)
        start, target = begin_traced(system, x0, damping)
        x = start + factored.solve(target, _total(damping, root.shift), traced=True)
        return x, safe_norms(residual_traced(system, x, damping))

    def _factored(self, system: DampedSystem) -> _Factored:
        root = root_of(system.operator, asked_by="Gram")
        self._check_memory(system, root)
        return _Factored.of(root, system.b)

    def _check_memory(self, system: DampedSystem, root: Root) -> None:
        k, n = root.num_rows, system.operator.layout.dim
        narrow = torch.empty(0, dtype=system.operator.dtype).element_size()
        # Rows are stacked from parts, so that they are there twice for a moment.
        needed = 2 * k * n * narrow + 3 * k * k * system.b.element_size()
        refuse_if_too_large(
            f"a solve with a factor of {k} rows in dimension {n}",
            needed, self.max_bytes, system.b.device,
            instead="CG or Nystrom, fewer samples", solver="Gram",
        )  # fmt: skip


@dataclass(frozen=True)
class _Prepared(Gram):
    """The same configuration with its factor made: what solves again at no new row."""

    made: Any = None

    def _factored(self, system: DampedSystem) -> _Factored:
        assert isinstance(self.made, _Factored)
        return self.made


@dataclass(frozen=True, eq=False)
class _Factored:
    """F and the eigenpairs of F F'.

    Attributes:
        rows: F over ``unit``, shape (k, n), in the operator's dtype.
        unit: a power of two next to the largest entry, or above it where its square would leave
            the range.
        values: eigenvalues of F F' over ``unit`` squared, smallest first, shape (k,).
        vectors: its eigenvectors as columns, shape (k, k).
        shift: the multiple of the identity that the operator has beside F'F.
    """

    rows: Tensor
    unit: Tensor
    values: Tensor
    vectors: Tensor
    shift: float

    @classmethod
    def of(cls, root: Root, like: Tensor) -> _Factored:
        """From the rows, with sums in the dtype of ``like``."""
        rows = root.factor()
        root.parts[0][0].layout.check_finite(rows, "the factor F of the operator")
        largest: Tensor = torch.linalg.vector_norm(rows, ord=torch.inf)
        # Its square is divided by, so it stays far from where that underflows.
        least = _LEAST_UNIT if like.dtype == torch.float64 else _LEAST_UNIT_NARROW
        unit = powers_of_two(largest.to(like.dtype)).clamp(min=least)
        rows = rows / unit.to(rows.dtype)
        k = len(rows)
        gram = like.new_zeros(k, k)
        for part in torch.split(rows, max(1, _WIDENED // k), dim=1):
            wide = part.to(like.dtype)
            gram = gram + wide @ wide.T
        values, vectors = torch.linalg.eigh(gram)
        return cls(rows, unit, values.clamp(min=0.0), vectors, root.shift)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of the operator."""
        return float(self.values[-1] * self.unit**2) + self.shift

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue of the operator: that of F'F is zero where n exceeds k."""
        k, n = self.rows.shape
        return (float(self.values[k - n] * self.unit**2) if k >= n else 0.0) + self.shift

    def solve(self, target: Tensor, damping: float, *, traced: bool = False) -> Tensor:
        """(F'F + damping I)^-1 of each row, corrected until its residual falls no further."""
        # In units of the rows' size squared.
        rho = damping / self.unit.to(target.dtype) ** 2
        solve_once = self._filtered if damping > 0 else self._projected
        x = solve_once(target, rho)
        residual = self._residual(target, x, rho)
        if traced:
            for _ in range(2):
                x = x + solve_once(residual, rho)
                residual = self._residual(target, x, rho)
            return x / self.unit**2
        size = self._size(residual, damping)
        for _ in range(_CORRECTIONS):
            other = x + solve_once(residual, rho)
            residual = self._residual(target, other, rho)
            other_size = self._size(residual, damping)
            better = other_size < size
            x = torch.where(better[:, None], other, x)
            if not bool((other_size < 0.5 * size).any()):
                break
            size = torch.minimum(size, other_size)
        return x / self.unit**2

    def _filtered(self, target: Tensor, rho: Tensor) -> Tensor:
        inner = self._times(target) @ self.vectors
        return (target - self._back((inner / (self.values + rho)) @ self.vectors.T)) / rho

    def _projected(self, target: Tensor, rho: Tensor) -> Tensor:
        """F' U S^-2 U' F v, over the eigenvalues above the rounding of F F'."""
        # As for a dense matrix of that size: see Exact.
        k = len(self.values)
        eps = torch.finfo(self.rows.dtype).eps
        floor = min(k * eps, 4.0 * k**0.5 * eps, 1e-2) * self.values[-1]
        kept = self.values > floor
        safe = torch.where(kept, self.values, torch.ones_like(self.values))
        inverse = torch.where(kept, 1.0 / safe**2, torch.zeros_like(safe))
        return self._back(((self._times(target) @ self.vectors) * inverse) @ self.vectors.T)

    def _residual(self, target: Tensor, x: Tensor, rho: Tensor) -> Tensor:
        return target - self._back(self._times(x)) - rho * x

    def _size(self, residual: Tensor, damping: float) -> Tensor:
        # Without damping, what lies outside the range stays.
        return row_norms(residual if damping > 0 else self._times(residual))

    def _times(self, x: Tensor) -> Tensor:
        """F times each row of x: from (m, n) to (m, k)."""
        if self.rows.dtype == x.dtype:
            return x @ self.rows.T
        size = max(1, _WIDENED // self.rows.shape[1])
        return torch.cat([x @ part.to(x.dtype).T for part in torch.split(self.rows, size)], dim=1)

    def _back(self, y: Tensor) -> Tensor:
        """F' times each row of y: from (m, k) to (m, n)."""
        if self.rows.dtype == y.dtype:
            return y @ self.rows
        size = max(1, _WIDENED // self.rows.shape[1])
        out = y.new_zeros(len(y), self.rows.shape[1])
        for part, own in zip(
            torch.split(self.rows, size), torch.split(y, size, dim=1), strict=True
        ):
            out = torch.addmm(out, own, part.to(y.dtype))
        return out


def _total(damping: float, shift: float) -> float:
    """The multiple of the identity beside F'F in all."""
    if damping + shift < 0:
        raise DampingError(
            f"the operator is F'F shifted by {shift:.3g}, which damping={damping:.3g} does not "
            "make up for: expected a sum >= 0. Raise damping, or use hypergrad.MINRES()."
        )
    return damping + shift
