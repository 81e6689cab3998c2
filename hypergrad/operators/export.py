"""From an operator to one of the package linear_operator, which GPyTorch and BoTorch build on."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import DifferentiationError
from ..pytree import Tree
from .base import LinearOperator
from .interop import as_operator


def to_linear_operator(operator: Any, like: Tree | None = None) -> Any:
    """A as a ``linear_operator.LinearOperator``, on columns in the flat order of its trees.

    What that package offers is then to be had: its solves, log-determinants, roots and lazy
    algebra, all from products with A.  Gradients flow through it to right-hand sides and to the
    tensors that A depends on: a dense operator's matrix, a Hessian's parameters.  Callables and
    the operators of other packages are constants of the graph.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of the operator's argument; callables need it.

    Returns:
        An object of shape (n, n) that acts on tensors of shape (..., n, k), on the operator's
        device.  Moved to another dtype, it still multiplies in the operator's own.

    Raises:
        ImportError: the package is not installed (``pip install linear_operator``).

    Cost: as many products as columns, batched where the operator can.  The transposed product of
    an operator that offers none is the product itself: it is taken to be self-adjoint.

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
    # Dtype and batch shape are those of the tensors, so that there must be one.
    anchor = torch.empty(0, 0, dtype=op.dtype, device=op.device)
    return _export_class()(*(op._tensors() or [anchor]), operator=op)


def _product(op: LinearOperator, transposed: bool, tensors: list[Tensor], rows: Tensor) -> Tensor:
    """A of these tensors times each row, shape (k, n), or A' where ``transposed``."""
    if tensors:
        op = op._with_tensors(tensors)
    op = op._transposed() if transposed else op
    attached = bool(tensors) and torch.is_grad_enabled()
    return op._attached(rows) if attached else op._apply(rows.detach())


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
        """An operator of this library as one of the package linear_operator.

        Its tensors may have batch dimensions in front of those of the operator's own.
        """

        def __init__(
            self, *tensors: Tensor, operator: LinearOperator, transposed: bool = False
        ) -> None:
            super().__init__(*tensors, operator=operator, transposed=transposed)
            self.tensors, self.operator, self.transposed = tensors, operator, transposed

        def _own(self) -> list[tuple[Tensor, Tensor]]:
            """Each tensor that A depends on, with the one of the operator that it stands for."""
            return list(zip(self.tensors, self.operator._tensors(), strict=False))

        def _lead(self) -> torch.Size:
            own = [tensor.shape[: tensor.ndim - mine.ndim] for tensor, mine in self._own()]
            return _broadcast(*own) if own else self.tensors[0].shape[:-2]

        def _matmul(self, rhs: Tensor) -> Tensor:
            op, own = self.operator, self._own()
            columns = rhs if rhs.ndim > 1 else rhs[:, None]
            n, k = columns.shape[-2:]
            rows = columns.mT.to(dtype=op.dtype, device=op.device)
            tensors = [tensor.to(mine) for tensor, mine in own]
            lead = self._lead()
            batch = _broadcast(lead, columns.shape[:-2])
            if own and lead:
                # As many operators as there are sets of tensors.
                stacked = [
                    tensor.expand(*batch, *mine.shape).reshape(-1, *mine.shape)
                    for tensor, (_, mine) in zip(tensors, own, strict=True)
                ]
                products = torch.func.vmap(
                    lambda values, block: _product(op, self.transposed, values, block)
                )(stacked, rows.expand(*batch, k, n).reshape(-1, k, n))
            else:
                products = _product(op, self.transposed, tensors, rows.reshape(-1, n))
                products = products.reshape(rows.shape).expand(*batch, k, n)
            op.layout.check_finite(products.detach(), "the output of the operator")
            result = products.reshape(*batch, k, n).mT.to(dtype=self.dtype, device=rhs.device)
            if not own and self.tensors[0].requires_grad:
                # A constant operator in a graph: its gradient is empty, but defined.
                result = result + self.tensors[0].sum()
            return result if rhs.ndim > 1 else result[..., 0]

        def _size(self) -> torch.Size:
            return torch.Size((*self._lead(), *self.operator.shape))

        def _transpose_nonbatch(self) -> Any:
            try:
                self.operator._transposed()
            except DifferentiationError:  # what offers no transpose is taken to be self-adjoint
                return self
            return type(self)(*self.tensors, operator=self.operator, transposed=not self.transposed)

    # As if it stood at the top of this module, so that instances can be pickled.
    ExportedOperator.__module__ = __name__
    ExportedOperator.__qualname__ = "ExportedOperator"
    return ExportedOperator


def __getattr__(name: str) -> Any:
    if name == "ExportedOperator":
        return _export_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
