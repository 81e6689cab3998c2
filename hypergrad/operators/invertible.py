"""Operators whose damped inverse is at hand: what preconditions a solve with another one."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from ..errors import DampingError
from ..pytree import Tree, TreeLayout
from .base import LinearOperator


class InvertibleOperator(LinearOperator):
    """An operator B that gives (B + damping I)^-1 exactly, without a solver.

    Made by :func:`hypergrad.block_diagonal` and :func:`hypergrad.kfac`.
    """

    @abstractmethod
    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The map of rows, shape (m, n), to those of (B + damping I)^-1."""

    def preconditioner(self, damping: float) -> LinearOperator:
        """(B + damping I)^-1 as an operator: for ``CG(preconditioner=...)`` and its like.

        Args:
            damping: that of the system to be solved, a number >= 0.

        Raises:
            DampingError: ``damping`` is no finite number >= 0, or zero where that makes B singular.
            NegativeCurvatureError: B + damping I is not positive definite.
        """
        return InverseOperator(self.layout, self._inverse(_checked(damping)))

    def solve(self, v: Tree, damping: float = 0.0) -> Tree:
        """(B + damping I)^-1 v, detached; raises as :meth:`preconditioner` does.

        Raises:
            NonFiniteError: v or the answer holds nan or inf.
            TreeStructureError, LeafTypeError, DeviceError: v does not fit the operator.
        """
        vector = self.layout.flatten(v)
        self.layout.check_finite(vector, "v")
        answer = self._inverse(_checked(damping))(vector[None])
        answer = self.layout.narrowed(answer.to(self.dtype))[0]
        self.layout.check_finite(answer, "the answer")
        return self.layout.unflatten(answer)


class InverseOperator(LinearOperator):
    """A map of rows that is known to be self-adjoint, as an operator; a constant to a solve."""

    def __init__(self, layout: TreeLayout, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layout)
        self._map = apply

    def _apply(self, block: Tensor) -> Tensor:
        return self._map(block.detach()).to(self.dtype)

    def _transposed(self) -> LinearOperator:
        return self


def _checked(damping: float) -> float:
    value = float(damping) if isinstance(damping, int | float | Tensor) else math.nan
    if not math.isfinite(value) or value < 0:
        raise DampingError(f"damping must be a finite number >= 0, got {damping!r}.")
    return value
