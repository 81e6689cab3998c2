"""From an operator to one of the package linear_operator, which GPyTorch and BoTorch build on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..pytree import Tree
from .base import LinearOperator, _Affine, _Sum
from .interop import DenseOperator, as_operator


def to_linear_operator(operator: Any, like: Tree | None = None) -> Any:
    """A as a ``linear_operator.LinearOperator``, on columns in the flat order of its trees.

    What that package offers is then to be had: its solves, log-determinants, roots and lazy
    algebra, all from products with A.  Gradients flow through it to right-hand sides, and to the
    matrix of an operator made of a dense one; other operators are constants of the graph.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of the operator's argument; callables need it.

    Returns:
        An object of shape (n, n) that acts on tensors of shape (..., n, k), on the operator's
        device.  Moved to another dtype, it still multiplies in the operator's own, unless it is
        dense.

    Raises:
        ImportError: the package is not installed (``pip install linear_operator``).

    Cost: as many products as columns, batched where the operator can.  The transposed product of
    an operator that is not a matrix is the product itself: it is taken to be self-adjoint.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], requires_grad=True)
        >>> exported = hypergrad.to_linear_operator(a)
        >>> exported.solve(torch.tensor([3.0, 4.0])).detach().round(decimals=4)
        tensor([1., 1.])
        >>> exported.logdet().backward()
        >>> a.grad  # d log det A / dA = A^-T
        tensor([[ 0.6000, -0.2000],
                [-0.2000,  0.4000]])
    """
    op = as_operator(operator, like=like)
    tensors = tuple(_dependencies(op))
    # Dtype and batch shape are those of the tensors, so that there must be one.
    anchor = torch.empty(0, 0, dtype=op.dtype, device=op.device)
    return _export_class()(*(tensors or (anchor,)), operator=op)


def _dependencies(op: LinearOperator) -> Iterator[Tensor]:
    """The matrices that an operator multiplies by, with their graphs, in a fixed order."""
    if isinstance(op, DenseOperator):
        yield op.matrix
    elif isinstance(op, _Affine):
        yield from _dependencies(op.base)
    elif isinstance(op, _Sum):
        yield from _dependencies(op.left)
        yield from _dependencies(op.right)


def _product(op: LinearOperator, matrices: Iterator[Tensor], rows: Tensor) -> Tensor:
    """A times each row of (..., k, n), with the matrices in the places of their operators'."""
    if isinstance(op, DenseOperator):
        return rows @ next(matrices).mT
    if isinstance(op, _Affine):
        return op.scale * _product(op.base, matrices, rows) + op.offset * rows
    if isinstance(op, _Sum):
        return _product(op.left, matrices, rows) + _product(op.right, matrices, rows)
    flat = rows.detach().reshape(-1, rows.shape[-1]).to(dtype=op.dtype, device=op.device)
    products = op._apply(flat)
    op.layout.check_finite(products, "the output of the operator")
    return products.to(rows).reshape(rows.shape)


def _broadcast(*shapes: torch.Size) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return shape


@cache
def _export_class() -> Any:
    """The subclass, made when it is first asked for: the package is optional."""
    try:
        base: Any = import_module("linear_operator").LinearOperator
    except ImportError as error:
        raise ImportError(
            "hypergrad.to_linear_operator needs the package linear_operator; install it with "
            "pip install linear_operator."
        ) from error

    class ExportedOperator(base):  # type: ignore[misc]  # known at run time only
        """An operator of this library as one of the package linear_operator."""

        def __init__(self, *tensors: Tensor, operator: LinearOperator) -> None:
            super().__init__(*tensors, operator=operator)
            self.tensors, self.operator = tensors, operator

        def _matmul(self, rhs: Tensor) -> Tensor:
            columns = rhs if rhs.ndim > 1 else rhs[:, None]
            batch = _broadcast(self.batch_shape, columns.shape[:-2])
            rows = columns.mT.expand(*batch, columns.shape[-1], columns.shape[-2])
            products = _product(self.operator, iter(self._matrices()), rows).mT
            for tensor in self.tensors:
                if tensor.requires_grad and tensor.numel() == 0:
                    # A constant operator in a graph: its gradient is empty, but defined.
                    products = products + tensor.sum()
            return products if rhs.ndim > 1 else products[..., 0]

        def _size(self) -> torch.Size:
            lead = _broadcast(*(tensor.shape[:-2] for tensor in self.tensors))
            return torch.Size((*lead, *self.operator.shape))

        def _transpose_nonbatch(self) -> Any:
            matrices = self._matrices()
            if not matrices:
                return self
            return type(self)(*(matrix.mT for matrix in matrices), operator=self.operator)

        def _matrices(self) -> tuple[Tensor, ...]:
            """The tensors that are matrices: all, but for the one that only says the dtype."""
            return tuple(tensor for tensor in self.tensors if tensor.shape[-1])

    # As if it stood at the top of this module, so that instances can be pickled.
    ExportedOperator.__module__ = __name__
    ExportedOperator.__qualname__ = "ExportedOperator"
    return ExportedOperator


def __getattr__(name: str) -> Any:
    if name == "ExportedOperator":
        return _export_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
