"""The Nyström sketch: a low-rank approximation of A, solved with at any damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DampingError
from ..operators import LinearOperator
from ..pytree import Tree, TreeLayout
from ..spectrum import damping_from_extremes
from .base import Damping, check_damping

SketchKind = Literal["gaussian", "columns"]
NegativeCurvature = Literal["keep", "absolute", "clip", "raise"]


@dataclass(frozen=True)
class NystromSketch:
    """A rank-r approximation U diag(L) U' of A, made once and solved with at any damping.

    Made by :func:`nystrom_sketch`.

    Attributes:
        eigenvalues: L, shape (r,), largest first.
        basis: U', orthonormal rows of shape (r, n) in the flat coordinates of ``layout``.
        layout: of the trees that A acts on.
        operator_dtype: dtype of A's products.
        smallest_eigenvalue: smallest eigenvalue seen: the smallest Ritz value where there is
            negative curvature, else that of the sketch (0 when it is complete below its rank).
        tail: size of what the sketch does not see: its last eigenvalue when the rank was used
            up; with negative curvature, the norm of A's coupling of the basis to the rest; 0
            when the operator had no more to show.
        num_hvps: products used.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
        >>> sketch = hypergrad.nystrom_sketch(a, rank=3)
        >>> [round(x, 4) for x in sketch.eigenvalues.tolist()]
        [5.0, 1.0]
        >>> sketch.solve(torch.ones(4), damping=1.0)
        tensor([0.1667, 0.5000, 1.0000, 1.0000])
        >>> round(sketch.effective_dimension(1.0), 4)
        1.3333
    """

    eigenvalues: Tensor
    basis: Tensor
    layout: TreeLayout
    operator_dtype: torch.dtype
    smallest_eigenvalue: float
    tail: float
    num_hvps: int
    negative_curvature: NegativeCurvature

    @property
    def rank(self) -> int:
        """r, the number of eigenpairs kept; at most the rank asked for."""
        return len(self.eigenvalues)

    def auto_damping(self) -> float:
        """The value of ``damping="auto"``; see :func:`hypergrad.spectrum.damping_from_extremes`."""
        if self.rank == 0:
            return damping_from_extremes(0.0, 0.0, rounding=0.0)
        keep = self.negative_curvature == "keep"
        return damping_from_extremes(
            min(self.smallest_eigenvalue, 0.0) if keep else 0.0,
            float(self.eigenvalues.abs().max()),
            rounding=10.0 * torch.finfo(self.operator_dtype).eps,
            tail=self.tail,
        )

    def solve(self, v: Tree, damping: Damping = "auto") -> Tree:
        """(U diag(L) U' + damping I)^-1 v, with no further HVP.

        Symmetric positive definite with norm at most 1/damping whenever L >= 0, by construction.

        Raises:
            DampingError: damping is not positive.
            TreeStructureError, LeafTypeError, DeviceError: v does not fit the operator.
        """
        rho = self.auto_damping() if damping == "auto" else positive_damping(damping)
        vector = self.layout.flatten(v)
        self.layout.check_finite(vector, "v")
        x = self.solve_block(vector.to(self.basis.dtype)[None], rho).to(self.layout.dtype)
        x = self.layout.narrowed(x)[0]
        self.layout.check_finite(x, "the answer")
        return self.layout.unflatten(x)

    def solve_block(self, block: Tensor, damping: float) -> Tensor:
        """:meth:`solve` for rows of shape (m, n) in the dtype of :attr:`basis`.

        x = (v + U [(damping / (L + damping) - 1) U'v]) / damping.  The Woodbury form is the same
        in exact arithmetic, but subtracts numbers (L + damping)/damping times larger than the
        answer.
        """
        if self.rank == self.layout.dim:  # nothing lies outside, so nothing needs to cancel there
            return ((block @ self.basis.T) / self._damped(damping)) @ self.basis
        shrink = damping / self._damped(damping) - 1.0
        return (block + ((block @ self.basis.T) * shrink) @ self.basis) / damping

    def _damped(self, damping: float) -> Tensor:
        """L + damping, kept away from zero by the rounding of the sum.

        Only negative L can cancel the damping; the solve then reports negative curvature.
        """
        total = self.eigenvalues + damping
        least = torch.finfo(total.dtype).eps * self.eigenvalues.abs().clamp(min=damping)
        return torch.where(total.abs() < least, least, total)

    def effective_dimension(self, damping: float) -> float:
        """The sum of L/(L + damping): how many directions the damping leaves to be learned."""
        rho = positive_damping(damping)
        positive = self.eigenvalues.clamp(min=0.0)
        return float((positive / (positive + rho)).sum())

    def preconditioner(self, damping: float) -> LinearOperator:
        """P^-1 = (l + damping) U (L + damping)^-1 U' + (I - U U'), with l the last of L.

        Source: Frangella, Tropp, Udell, arXiv 2110.02820, equation (5.3).  Negative L enter by
        their absolute value, so that it is always positive definite.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(torch.logspace(0, 4, 50, dtype=torch.float64))
            >>> v = torch.ones(50, dtype=torch.float64)
            >>> sketch = hypergrad.nystrom_sketch(a, rank=40)
            >>> plain = hypergrad.solve(a, v, hypergrad.CG(), damping=1e-3).info
            >>> better = hypergrad.CG(preconditioner=sketch.preconditioner(1e-3))
            >>> hypergrad.solve(a, v, better, damping=1e-3).info.iterations < plain.iterations
            True
        """
        return _Preconditioner(self, positive_damping(damping))


class _Preconditioner(LinearOperator):
    def __init__(self, sketch: NystromSketch, damping: float) -> None:
        super().__init__(sketch.layout)
        self.basis = sketch.basis
        size = sketch.eigenvalues.abs()
        last = float(size.min()) if sketch.rank else 0.0
        self.weights = (last + damping) / (size + damping) - 1.0

    def _apply(self, block: Tensor) -> Tensor:
        wide = block.to(self.basis.dtype)
        return (wide + ((wide @ self.basis.T) * self.weights) @ self.basis).to(block.dtype)


def positive_damping(damping: Any) -> float:
    """``damping`` as a positive float, or :class:`DampingError`."""
    value = check_damping(damping)
    if value == "auto" or value == 0.0:
        raise DampingError(
            f"Nyström needs a positive damping, got {damping!r}: outside the sketch its answer is "
            "v/damping. Pass a positive number, damping='auto' where the call takes it, or use CG "
            "or Exact."
        )
    return float(value)
