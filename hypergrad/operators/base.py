"""The operator: a layout and one product with a block of flat vectors; the rest comes from here."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DifferentiationError, TreeStructureError
from ..pytree import Tree, TreeLayout
from ..transforms import apply, differentiable

if TYPE_CHECKING:
    import scipy.sparse.linalg


#: A power of two that takes the smallest numbers to those that have an inverse.
_FAR = 2.0**100


class LinearOperator(ABC):
    """A self-adjoint linear operator A on trees of tensors.

    A subclass gives a ``TreeLayout`` and ``_apply``, the product with a block of flat vectors.
    Everything else is derived: products with trees, sums, multiples, shifts, dense matrices and
    SciPy operators.  Products are detached; a solve is differentiable in the tensors that the
    operator lists in ``_tensors``, through ``_attached``.  To a solve, an operator that lists none
    is a constant.

    Examples:
        >>> import torch, hypergrad
        >>> a = hypergrad.as_operator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> a @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> (0.5 * a + 1.0).to_dense()
        tensor([[2.0000, 0.5000],
                [0.5000, 2.5000]])
    """

    layout: TreeLayout
    #: How many products one of :meth:`_attached` counts for.
    _attached_count: int = 1

    def __init__(self, layout: TreeLayout) -> None:
        self.layout = layout

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """A times each row of ``block``.

        Args:
            block: shape (m, n), dtype :attr:`dtype`, on :attr:`device`.

        Returns:
            Shape (m, n), same dtype and device, detached.
        """

    def _passing(self, vector: Tensor) -> Tensor:
        """A times one vector, shape (n,), that may be written to, for a product used at once.

        The product may lie in memory of others: it is not to be written to, and may be another
        after the next product.
        """
        return self._apply(vector[None])[0]

    def _tensors(self) -> list[Tensor]:
        """The tensors that A depends on and that a derivative may be asked for."""
        return []

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        """The same operator of other tensors, in the order of :meth:`_tensors`; cheap."""
        return self

    def _signature(self) -> Hashable:
        """What operators share whose products are one graph of :meth:`_tensors`; None for none.

        Those products are :meth:`_traced_products`, of tensor code alone.
        """
        return None

    def _traced_products(self, block: Tensor) -> Tensor:
        """:meth:`_apply` as a compiled graph is made of it."""
        return self._apply(block)

    def _check_fresh(self) -> None:
        """Raise :class:`StaleOperatorError` if :meth:`_tensors` are not as they were."""
        return None

    def _note_reached(self, reached: bool) -> None:
        """Take note whether, besides :meth:`_tensors`, a graph of products read what requires grad.

        Or may have, by what it was for other operators of the same kind.
        """
        return None

    def _eager(self, block: Tensor) -> Tensor:
        """:meth:`_apply` without compiled code."""
        return self._apply(block)

    def _attached(self, block: Tensor) -> Tensor:
        """:meth:`_apply`, differentiable in ``block`` and in :meth:`_tensors`, any number of times.

        It also runs under the transforms of ``torch.func``.
        """
        return apply(_ConstantProduct, self, block)

    def _depends_on_more(self) -> bool | None:
        """Whether A depends on a tensor that is being differentiated, yet is not listed.

        Such as one in a closure.  None where only a product can tell, and there was none yet.
        """
        return False

    def _look(self) -> int:
        """Make a product that :meth:`_depends_on_more` can tell by; how many were made."""
        self._apply(torch.ones(1, self.layout.dim, dtype=self.dtype, device=self.device))
        return 1

    def _transposed(self) -> LinearOperator:
        """The operator of A', for solvers that do not need A to be symmetric."""
        raise DifferentiationError(
            f"the derivative of a solve that is not symmetric needs products with the transpose, "
            f"which {type(self).__name__} does not offer. Pass the matrix as a tensor, or solve "
            "under torch.no_grad()."
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), with n the number of entries of the trees that the operator acts on."""
        return (self.layout.dim, self.layout.dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat vectors, promoted over the leaves."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the products."""
        return self.layout.device

    def matvec(self, v: Tree) -> Tree:
        """A v, for a tree v of the operator's structure, as ``A @ v``.  Cost: one product.

        In functions for ``torch.compile(fullgraph=True)`` it is this that PyTorch 2.13 traces.

        Raises:
            TreeStructureError: v has other keys, leaves or shapes.
            LeafTypeError: v has another dtype, or a leaf that is not a real tensor.
            DeviceError: v is on another device.
        """
        return self.layout.unflatten(self._apply(self.layout.flatten(v)[None])[0])

    def matmat(self, v: Tree) -> Tree:
        """A times each of m stacked trees: every leaf has one more leading dimension m.

        Cost: m products, batched where the operator can.  Raises as :meth:`matvec` does.
        """
        return self.layout.unflatten_block(self._apply(self.layout.flatten_block(v)))

    def __matmul__(self, v: Tree) -> Tree:
        if isinstance(v, LinearOperator):
            raise TypeError(
                "operator @ operator is not defined: the product of two self-adjoint operators is "
                "not self-adjoint in general. Apply them one after the other: a @ (b @ v)."
            )
        return self.matvec(v)

    def __add__(self, other: object) -> LinearOperator:
        from .algebra import Sum  # which is made of operators

        if isinstance(other, LinearOperator):
            return Sum(self, other)
        scalar = _as_scalar(other)
        return NotImplemented if scalar is None else self.shift(scalar)

    __radd__ = __add__

    def __mul__(self, other: object) -> LinearOperator:
        from .algebra import Affine  # which is made of operators

        scalar = _as_scalar(other)
        return NotImplemented if scalar is None else Affine(self, scalar, 0.0)

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> LinearOperator:
        scalar = _as_scalar(other)
        if isinstance(scalar, float) and scalar == 0.0:
            raise ZeroDivisionError("an operator was divided by zero")
        if isinstance(scalar, float) and abs(scalar) < sys.float_info.min:
            return self * _FAR / (scalar * _FAR)  # its inverse may be beyond the range
        return NotImplemented if scalar is None else self * (1.0 / scalar)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __sub__(self, other: object) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return self + -other
        scalar = _as_scalar(other)
        return NotImplemented if scalar is None else self.shift(-scalar)

    def __rsub__(self, other: object) -> LinearOperator:
        scalar = _as_scalar(other)
        return NotImplemented if scalar is None else (-self).shift(scalar)

    def shift(self, damping: float | Tensor) -> LinearOperator:
        """A + damping I."""
        from .algebra import Affine  # which is made of operators

        scalar = _as_scalar(damping)
        if scalar is None:
            raise ValueError(f"an operator was shifted by {damping!r}; expected a finite number")
        return Affine(self, 1.0, scalar)

    def to_dense(self, chunk_size: int = 256) -> Tensor:
        """The matrix of A in the flat coordinates of ``layout``, shape (n, n).

        Args:
            chunk_size: how many columns are computed at a time.

        Cost: n products and n^2 numbers of memory.
        """
        n = self.layout.dim
        dense = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, chunk_size):
            stop = min(start + chunk_size, n)
            rows = torch.zeros(stop - start, n, dtype=self.dtype, device=self.device)
            rows.diagonal(start).fill_(1.0)
            # Row i of the block product is A e_i, that is column i of A.
            dense[:, start:stop] = self._apply(rows).T
        return dense

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A as a :class:`scipy.sparse.linalg.LinearOperator` on flat NumPy vectors.

        Products run on the operator's own device and dtype and come back as NumPy arrays
        (float32 for 16-bit operators, which NumPy and SciPy's solvers do not serve); those of
        complex vectors are two.  Adjoint products are those of the transpose for matrices, and the
        same as A's for all others.

        Examples:
            >>> import torch, hypergrad
            >>> from scipy.sparse.linalg import eigsh
            >>> a = hypergrad.as_operator(torch.diag(torch.arange(1.0, 7.0)))
            >>> eigsh(a.to_scipy(), k=1, return_eigenvectors=False).round(3)
            array([6.], dtype=float32)
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        host = self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32

        try:
            adjoint = self._transposed()
        except DifferentiationError:  # what offers no transpose is taken to be self-adjoint
            adjoint = self

        def matmat(columns: Any, operator: LinearOperator = self) -> Any:
            if columns.dtype.kind == "c":  # as of SciPy's own real operators
                products = matmat(columns.real, operator) + 0j
                products.imag = matmat(columns.imag, operator)
                return products
            block = torch.as_tensor(columns, device="cpu").T
            block = block.to(dtype=self.dtype, device=self.device)
            return operator._apply(block.contiguous()).T.to(host).cpu().numpy()

        return ScipyOperator(
            shape=self.shape,
            matvec=lambda vector: matmat(vector.reshape(-1, 1))[:, 0],
            rmatvec=lambda vector: matmat(vector.reshape(-1, 1), adjoint)[:, 0],
            matmat=matmat,
            rmatmat=lambda columns: matmat(columns, adjoint),
            dtype=torch.empty(0, dtype=host, device="cpu").numpy().dtype,
        )

    def __repr__(self) -> str:
        n = self.layout.dim
        return f"<{type(self).__name__} {n}x{n} {self.dtype} on {self.device}>"


class _ConstantProduct(torch.autograd.Function):
    """A times a block, for an operator that is a constant: its own derivative and adjoint."""

    @staticmethod
    def forward(operator: LinearOperator, block: Tensor) -> Tensor:
        return operator._apply(block.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, apply(_ConstantProduct, ctx.operator, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return apply(_ConstantProduct, ctx.operator, tangent)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[None, int], operator: LinearOperator, block: Tensor
    ) -> tuple[Tensor, int]:
        stacked = block.movedim(in_dims[1], 0)
        rows = stacked.reshape(-1, stacked.shape[-1])
        return apply(_ConstantProduct, operator, rows).reshape(stacked.shape), 0


def check_same_layout(left: TreeLayout, right: TreeLayout, what: str) -> None:
    """Raise :class:`TreeStructureError` unless both layouts flatten trees in the same way."""
    mine = (left.paths, left.shapes, left.dtypes, left.device)
    if mine != (right.paths, right.shapes, right.dtypes, right.device):
        raise TreeStructureError(
            f"{what} act on different trees: {_describe(left)} and {_describe(right)}. "
            "Build both from parameters of the same structure, shapes, dtype and device."
        )


def _describe(layout: TreeLayout) -> str:
    shapes = [f"{p}{tuple(s)}" for p, s in zip(layout.paths[:3], layout.shapes[:3], strict=True)]
    more = "" if len(layout.paths) <= 3 else f" and {len(layout.paths) - 3} more"
    return f"[{', '.join(shapes)}{more}; {layout.dtype}; {layout.device}]"


def _as_scalar(value: object) -> float | Tensor | None:
    """A finite number; a 0-d tensor that is being differentiated stays one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor) and value.ndim == 0:
        if differentiable(value):
            return value
        value = value.item()
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        raise ValueError(f"an operator was combined with the scalar {value}; expected a finite one")
    return float(value)
