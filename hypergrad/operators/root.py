"""Operators that are F'F: positive semi-definite, and small where F has few rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..pytree import Tree, TreeLayout
from ..transforms import plain
from .algebra import Affine, Sum
from .base import LinearOperator


class RootOperator(LinearOperator):
    """A = F'F with a factor F whose rows can be had, shape (k, n).

    No product of such an operator shows negative curvature beyond rounding.  Where k is smaller
    than n, :class:`hypergrad.Gram` solves with it in k dimensions.
    """

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """At most how many rows F has; known without computing any."""

    @abstractmethod
    def _factor(self) -> Tensor:
        """F, shape (k, n), in the operator's dtype, detached.  Not kept."""

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction


class RowsOperator(RootOperator):
    """F'F for rows that are given as tensors; made by :func:`root_operator`."""

    def __init__(self, rows: Sequence[Tensor], layout: TreeLayout) -> None:
        super().__init__(layout)
        self._leaves = list(rows)

    @property
    def num_rows(self) -> int:
        """How many rows F has."""
        return int(self._leaves[0].shape[0])

    def _flat(self) -> Tensor:
        rows = [leaf.reshape(self.num_rows, -1).to(self.dtype) for leaf in self._leaves]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def _factor(self) -> Tensor:
        return self._flat().detach()

    def _apply(self, block: Tensor) -> Tensor:
        rows = self._factor()
        return (block.detach() @ rows.T) @ rows

    def _tensors(self) -> list[Tensor]:
        return self._leaves

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        return RowsOperator(tensors, self.layout)

    def _attached(self, block: Tensor) -> Tensor:
        rows = self._flat()
        return (block @ rows.T) @ rows


def root_operator(rows: Tree) -> RowsOperator:
    """The operator F'F, the sum of g g' over the rows g of F.

    Args:
        rows: a tree of stacked trees: every leaf has one more leading dimension k than those that
            the operator acts on, such as per-sample gradients from ``torch.func.vmap``.

    Raises:
        TreeStructureError: leaves of different leading sizes.
        LeafTypeError: a leaf that is no real floating-point tensor.
        EmptyTreeError: no rows, or rows without entries.

    Cost: 4 k n operations a product.

    Examples:
        >>> import torch, hypergrad
        >>> rows = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
        >>> hypergrad.root_operator(rows).to_dense()
        tensor([[1., 2., 0.],
                [2., 5., 1.],
                [0., 1., 1.]])
    """
    layout = TreeLayout.of(rows, name="rows", batched=True)
    return RowsOperator(layout.leaves(rows, name="rows", batched=True), layout)


@dataclass(frozen=True)
class Root:
    """A positive combination of root operators, and a multiple of the identity.

    Attributes:
        parts: each operator with the number that its F'F is multiplied by.
        shift: the multiple of the identity.
    """

    parts: tuple[tuple[RootOperator, float], ...]
    shift: float

    @property
    def num_rows(self) -> int:
        """At most how many rows the stacked factor has."""
        return sum(part.num_rows for part, _ in self.parts)

    def factor(self) -> Tensor:
        """The stacked rows, shape (k, n)."""
        rows = [
            part._factor() if scale == 1.0 else scale**0.5 * part._factor()
            for part, scale in self.parts
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def root_of(operator: LinearOperator, *, asked_by: str) -> Root:
    """What an operator is made of, where that is factors F'F, sums, multiples and shifts of them.

    Raises:
        SolverOptionError: it is made of something else, or a factor is multiplied by less than 0.
    """
    if isinstance(operator, RootOperator):
        return Root(((operator, 1.0),), 0.0)
    if isinstance(operator, Affine):
        scale, shift = _number(operator.scale), _number(operator.offset)
        if scale < 0:
            raise SolverOptionError(
                f"{asked_by} was given a factor F'F times {scale}, expected a number >= 0: the "
                "operator is not positive semi-definite. Use hypergrad.MINRES()."
            )
        inner = root_of(operator.base, asked_by=asked_by)
        parts = tuple((part, scale * factor) for part, factor in inner.parts)
        return Root(parts, scale * inner.shift + shift)
    if isinstance(operator, Sum):
        left = root_of(operator.left, asked_by=asked_by)
        right = root_of(operator.right, asked_by=asked_by)
        return Root(left.parts + right.parts, left.shift + right.shift)
    raise SolverOptionError(
        f"{asked_by} was given a {type(operator).__name__}, expected an operator with a factor "
        "F'F: hypergrad.ggn, fisher, empirical_fisher or root_operator, or sums and multiples of "
        "them. Use CG() or Exact() for others."
    )


def _number(value: Any) -> float:
    return float(plain(value))
