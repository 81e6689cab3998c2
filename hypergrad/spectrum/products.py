"""Counted and checked products of an operator with blocks of flat vectors, and what they act on."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..norms import powers_of_two, row_norms
from ..operators import LinearOperator, as_operator
from ..precision import working_dtype
from ..pytree import Tree

#: Columns of the identity that are multiplied at a time where a whole matrix is looked at.
_CHUNK = 256


class Products:
    """A times blocks of flat vectors in the working dtype.

    Attributes:
        operator: A.
        dtype: the working dtype, in which blocks come and go.
        num_hvps: products so far.
    """

    def __init__(self, operator: Any, like: Tree | None = None) -> None:
        self.operator: LinearOperator = as_operator(operator, like=like)
        self.dtype = working_dtype(self.operator.dtype, self.operator.device)
        self.num_hvps = 0

    @property
    def dim(self) -> int:
        """The dimension n."""
        return self.operator.layout.dim

    @property
    def rounding(self) -> float:
        """Relative rounding of a product, generously: a few eps of the operator's dtype."""
        return 10.0 * torch.finfo(self.operator.dtype).eps

    @property
    def asymmetry_allowed(self) -> float:
        """Relative antisymmetry that passes for rounding, generously: see ``check_skew``."""
        return float(torch.finfo(self.operator.dtype).eps ** 0.25)

    def __call__(self, block: Tensor) -> Tensor:
        """A times each row of ``block``, shape (m, n)."""
        out = self.operator._apply(block.to(self.operator.dtype))
        self.num_hvps += block.shape[0]
        self.operator.layout.check_finite(out, "the output of the operator")
        return out.to(self.dtype)

    def rounded(self, block: Tensor) -> Tensor:
        """``block`` as the operator will multiply it: rounded to its dtype."""
        return block.to(self.operator.dtype).to(self.dtype)

    def identity_chunks(self) -> list[range]:
        """The columns of the identity, in runs that are multiplied at a time."""
        return [range(i, min(i + _CHUNK, self.dim)) for i in range(0, self.dim, _CHUNK)]

    def unit_rows(self, columns: range) -> Tensor:
        """These columns of the identity as rows, shape (len(columns), n)."""
        rows = torch.zeros(len(columns), self.dim, dtype=self.dtype, device=self.operator.device)
        rows.diagonal(columns.start).fill_(1.0)
        return rows

    def gaussian(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal rows, shape (rows, n)."""
        return self._draw(torch.randn, rows, generator)

    def signs(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Rows of independent random signs, shape (rows, n)."""
        return 1.0 - 2.0 * (self._draw(torch.rand, rows, generator) < 0.5).to(self.dtype)

    def _draw(self, distribution: Any, rows: int, generator: torch.Generator | None) -> Tensor:
        device = self.operator.device
        place = device if generator is None else generator.device
        drawn: Tensor = distribution(
            rows, self.dim, generator=generator, device=place, dtype=torch.float32
        )
        return drawn.to(device=device, dtype=self.dtype)


def range_of(y: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of rows, without what is rounding, and each row's absence.

    Args:
        y: shape (k, n), k <= n.
        rounding: relative size below which a singular value counts as zero.

    Returns:
        Q', orthonormal rows of shape (r, n), r <= k; and S of shape (k, r), whose row i is the
        unit vector, in the coordinates of Q, that the span of all rows but the i-th lacks, or zero
        where it lacks none.
    """
    left, sizes, right = torch.linalg.svd(y, full_matrices=False)
    kept = sizes > rounding * sizes[:1]
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    if len(sizes) == 0:
        return right, left
    # With C = U diag(sizes) the coordinates of the rows, row i of C^+' is orthogonal to all other
    # rows of C where C loses rank without row i, that is, where the leverage |U_i|^2 is one.
    missing = left / sizes
    missing = missing / row_norms(missing).clamp(min=torch.finfo(y.dtype).tiny)[:, None]
    alone = (left * left).sum(1) > 0.5 if len(sizes) == len(y) else (left**2).sum(1) > 1 - 1e-6
    return right, torch.where(alone[:, None], missing, torch.zeros_like(missing))


def scale_of(block: Tensor) -> float:
    """A power of two next to the largest entry of a block (1 where it is zero)."""
    return float(powers_of_two(block.abs().max()))


def check_choice(value: object, name: str, choices: Any) -> None:
    """Raise :class:`SolverOptionError` unless ``value`` is one of a Literal's."""
    if value not in get_args(choices):
        raise SolverOptionError(f"{name} is {value!r}, expected one of {get_args(choices)}.")


def check_count(value: object, name: str, least: int = 1) -> None:
    """Raise :class:`SolverOptionError` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SolverOptionError(f"{name} is {value!r}, expected an integer >= {least}.")
