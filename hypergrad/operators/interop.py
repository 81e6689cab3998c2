"""From callables, matrices and the operators of other packages to an operator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DeviceError, LeafTypeError, TreeStructureError
from ..pytree import Tree, TreeLayout
from ..transforms import (
    building_no_graph,
    carries_derivatives,
    differentiable,
    tangents,
    transforming,
)
from .base import LinearOperator
from .compilation import signature_of

#: Numbers that are copied at a time for a callable: blocks of few parameters as a whole, rows of
#: many one by one, in memory that stays warm.
_COPIED = 2**18


class CallableOperator(LinearOperator):
    """The operator of an ``hvp_fn``: any callable from a tree v to A v.

    The callable is looped over the vectors of a block, because an honest one may call
    ``torch.autograd.grad`` on a kept graph, which ``vmap`` cannot trace.  With
    ``batchable=True`` it is called once a block, through :func:`torch.func.vmap`.
    """

    def __init__(
        self, hvp_fn: Callable[[Tree], Tree], layout: TreeLayout, *, batchable: bool = False
    ) -> None:
        super().__init__(layout)
        self.hvp_fn, self.batchable = hvp_fn, batchable
        #: What its products are called in errors.
        self.name = "the output of hvp_fn"
        #: Whether a product so far came with a graph: of tensors that cannot be listed.
        self._carries_graph: bool | None = None

    def _apply(self, block: Tensor) -> Tensor:
        if self.batchable or building_no_graph() or tangents():
            return self._products(block.detach(), self._cut)
        layout, out = self.layout, torch.empty_like(block)
        many, recording = max(1, _COPIED // layout.dim), torch.is_grad_enabled()
        for start in range(0, len(block), many):
            # Copies: a callable that works in place on its argument must not reach the solver's
            # own vectors.
            rows = block[start : start + many].detach().clone()
            into = layout.rows_of_leaves(out[start : start + many])
            for i, leaves in enumerate(layout.rows_of_leaves(rows, cast=True)):
                product = self.hvp_fn(layout.unflatten_leaves(leaves))
                leaves = layout.leaves(product, name=self.name)
                if recording and True in [leaf.requires_grad for leaf in leaves]:
                    self._note(True)
                    leaves = [leaf.detach() for leaf in leaves]
                torch._foreach_copy_(into[i], leaves)
        self._note(False)
        return out

    def _signature(self) -> Hashable:
        # What is looped may be anything; what is declared batchable is tensor code.
        return signature_of(self, (), self.hvp_fn) if self.batchable else None

    def _traced_products(self, block: Tensor) -> Tensor:
        # Copies, as in products that are not compiled.
        rows = [self.hvp_fn(self.layout.unflatten(row)) for row in block.clone().unbind()]
        return torch.cat([self.layout.rows(row, name=self.name) for row in rows])

    def _passing(self, vector: Tensor) -> Tensor:
        if self.batchable or building_no_graph() or tangents():
            return super()._passing(vector)
        product = self.hvp_fn(self.layout.unflatten(vector))
        out = self.layout.vector(product, name=self.name)
        self._note(out.requires_grad and torch.is_grad_enabled())
        return out.detach() if out.requires_grad else out

    def _attached(self, block: Tensor) -> Tensor:
        return self._products(block, lambda product: product)

    def _cut(self, product: Tensor) -> Tensor:
        self._note(differentiable(product))
        return product.detach()

    def _note(self, carries: bool) -> None:
        # Without gradients no product comes with a graph, which tells nothing.
        if carries or torch.is_grad_enabled():
            self._carries_graph = self._carries_graph or carries

    def _products(self, block: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        # Copies: a callable that works in place on its argument must not reach the solver's own
        # vectors.
        own = block.clone()
        if self.batchable:
            products = torch.func.vmap(self.hvp_fn)(self.layout.unflatten_block(own))
            return finish(self.layout.rows(products, name=self.name, batched=True))
        return torch.cat(
            [
                finish(self.layout.rows(self.hvp_fn(self.layout.unflatten(row)), name=self.name))
                for row in own
            ]
        )

    def _note_reached(self, reached: bool) -> None:
        # What is read may have come to require grad since the products that were looked at.
        self._carries_graph = self._carries_graph or (None if reached else False)

    def _depends_on_more(self) -> bool | None:
        if not transforming() and not tangents():
            return self._carries_graph
        # Tensors under a transform would enter the solve as constants without a word.
        probe = torch.ones(1, self.layout.dim, dtype=self.dtype, device=self.device)
        return carries_derivatives(lambda: self._attached(probe))


class DenseOperator(LinearOperator):
    """The operator of a dense matrix, shape (n, n): rows x' become (A x)'."""

    def __init__(self, matrix: Tensor, layout: TreeLayout) -> None:
        super().__init__(layout)
        self.matrix = matrix

    def _apply(self, block: Tensor) -> Tensor:
        return (self.matrix.detach() @ block.T).T  # also for sparse layouts

    def _passing(self, vector: Tensor) -> Tensor:
        return self.matrix.detach() @ vector

    def _tensors(self) -> list[Tensor]:
        return [self.matrix]

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        return DenseOperator(tensors[0], self.layout)

    def _signature(self) -> Hashable:
        dense = self.matrix.layout == torch.strided
        return signature_of(self, (self.matrix,)) if dense else None

    def _attached(self, block: Tensor) -> Tensor:
        return (self.matrix @ block.T).T

    def _transposed(self) -> LinearOperator:
        return DenseOperator(self.matrix.T, self.layout)


class ScipyOperator(LinearOperator):
    """The operator of a SciPy ``LinearOperator`` or sparse matrix; products run on the CPU."""

    def __init__(self, operator: Any, layout: TreeLayout) -> None:
        from scipy.sparse.linalg import aslinearoperator

        super().__init__(layout)
        self.operator = aslinearoperator(operator)

    def _apply(self, block: Tensor) -> Tensor:
        # NumPy has no bfloat16; float64 holds every 16 and 32-bit value exactly.  Copies: what is
        # behind the operator may write on its argument, and on a product that it gave before.
        columns = block.T.cpu().to(torch.float64, copy=True).numpy()
        products = np.array(self.operator.matmat(columns).T, order="C")
        return torch.from_numpy(products).to(self.dtype).to(self.device)  # it may lack float64

    def _transposed(self) -> LinearOperator:
        return ScipyOperator(self.operator.T, self.layout)


class ForeignOperator(LinearOperator):
    """The operator of another package's: one of linear_operator or of curvlinops.

    Both multiply columns of shape (n, m) with ``@``, in their own dtype and on their own device.
    """

    def __init__(self, operator: Any, layout: TreeLayout) -> None:
        super().__init__(layout)
        self.operator = operator

    def _apply(self, block: Tensor) -> Tensor:
        columns = block.detach().T.to(dtype=self.operator.dtype, device=self.operator.device)
        # Copies, as for operators of SciPy.
        products: Tensor = self.operator @ columns.clone(memory_format=torch.contiguous_format)
        return products.detach().T.to(dtype=self.dtype, device=self.device, copy=True)

    def _transposed(self) -> LinearOperator:
        theirs = self.operator
        adjoint = theirs.adjoint() if hasattr(theirs, "adjoint") else theirs.mT
        return ForeignOperator(adjoint, self.layout)


def as_operator(obj: Any, like: Tree | None = None, *, batchable: bool = False) -> LinearOperator:
    """Make a :class:`LinearOperator` of anything that multiplies vectors.

    Nothing here asks whether A is symmetric.  The solvers that need it to be (all but
    :class:`hypergrad.GMRES`) check what they can see of it; a matrix that is not is multiplied as
    it stands, never transposed.

    Products with tensors, and with callables made of tensor code, are part of the graph under
    ``torch.compile``, without a break.  Those of SciPy, linear_operator and curvlinops are not:
    they leave PyTorch, or decide on values.

    Args:
        obj: a :class:`LinearOperator` (returned as it is), a callable ``v -> A v`` on trees, a
            square ``torch.Tensor`` (dense or sparse) or NumPy array, a SciPy sparse matrix or
            ``LinearOperator``, an operator of the packages linear_operator or curvlinops.
            Matrices, and what stands for one, act on flat vectors, in the order of ``like``'s
            leaves.
        like: a tree of the structure, shapes, dtype and device that the operator acts on.  A
            callable needs it; a matrix without it acts on single tensors of shape (n,).
        batchable: declare that ``torch.func.vmap(obj)`` works and gives the same products, so
            that blocks of vectors need one call.  Only for callables.

    Raises:
        TreeStructureError: a matrix that is not square, or whose size is not that of ``like``, or
            a curvlinops operator of tensors of other shapes, or in another order, than ``like``'s.
        DeviceError: a tensor on another device than ``like``.
        LeafTypeError: an integer or complex matrix, or an object of unknown kind.
        EmptyTreeError: ``like`` has no entries.

    Examples:
        >>> import torch, hypergrad
        >>> v = {"w": torch.ones(2), "b": torch.tensor(1.0)}
        >>> op = hypergrad.as_operator(lambda t: {k: 3 * x for k, x in t.items()}, like=v)
        >>> op @ v
        {'w': tensor([3., 3.]), 'b': tensor(3.)}
    """
    layout = None if like is None else TreeLayout.of(like, name="v")
    if isinstance(obj, LinearOperator) and like is not None:
        obj.layout.leaves(like)
    return operator_on(obj, layout, batchable=batchable)


def operator_on(obj: Any, layout: TreeLayout | None, *, batchable: bool = False) -> LinearOperator:
    """:func:`as_operator` for trees of a known layout, which an operator's own may still differ."""
    if isinstance(obj, LinearOperator):
        return obj
    if isinstance(obj, torch.nn.Module):
        raise LeafTypeError(
            f"got a torch.nn.Module ({type(obj).__name__}) as operator, expected a product "
            "v -> A v. For the Hessian of its loss, use hypergrad.hessian(loss_fn, params, *batch)."
        )
    if isinstance(obj, Tensor) and layout is not None and obj.device != layout.device:
        raise DeviceError(
            f"the matrix is on {obj.device}, but v is on {layout.device}. Move one of them."
        )
    if isinstance(obj, np.ndarray):
        if obj.dtype.kind not in "fiub":
            raise LeafTypeError(f"a matrix has dtype {obj.dtype}; expected a real floating dtype.")
        # A native, contiguous, writable copy: torch takes no other.
        return _dense(torch.from_numpy(np.array(obj, dtype=obj.dtype.newbyteorder("="))), layout)
    if isinstance(obj, Tensor):
        return _dense(obj, layout)
    if hasattr(obj, "shape") and (hasattr(obj, "matmat") or hasattr(obj, "tocsr")):
        return _scipy(obj, layout)
    if _is_foreign(obj):
        return _foreign(obj, layout)
    if callable(obj):
        if layout is None:
            raise TreeStructureError(
                "a callable does not say what it acts on; pass like=v, a tree of the structure, "
                "shapes, dtype and device of its argument."
            )
        return CallableOperator(obj, layout, batchable=batchable)
    raise LeafTypeError(
        f"cannot make an operator of a {type(obj).__name__}; expected a LinearOperator, a callable "
        "v -> A v, a square matrix, a SciPy sparse matrix or LinearOperator, or an operator of "
        "linear_operator or curvlinops."
    )


def _checked_layout(shape: tuple[int, ...], like: Tensor, layout: TreeLayout | None) -> TreeLayout:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise TreeStructureError(f"a matrix of shape {shape} is not square; expected (n, n).")
    if layout is None:
        return TreeLayout.of(like)
    if layout.dim != shape[0]:
        raise TreeStructureError(
            f"a matrix of shape {shape} cannot act on v, which has {layout.dim} entries."
        )
    return layout


def _dense(matrix: Tensor, layout: TreeLayout | None) -> DenseOperator:
    if not matrix.is_floating_point():
        raise LeafTypeError(f"a matrix has dtype {matrix.dtype}; expected a real floating dtype.")
    layout = _checked_layout(
        tuple(matrix.shape),
        torch.empty(
            matrix.shape[0] if matrix.ndim else 0, dtype=matrix.dtype, device=matrix.device
        ),
        layout,
    )
    if matrix.dtype != layout.dtype:
        raise LeafTypeError(
            f"the matrix has dtype {matrix.dtype}, but v has {layout.dtype}. Convert one of them."
        )
    return DenseOperator(matrix.to(layout.device), layout)


def _scipy(operator: Any, layout: TreeLayout | None) -> ScipyOperator:
    dtype = np.dtype(operator.dtype) if operator.dtype is not None else np.dtype(np.float64)
    if dtype.kind == "c":
        raise LeafTypeError(f"a SciPy operator has dtype {dtype}; expected a real one.")
    torch_dtype = torch.float32 if dtype == np.float32 else torch.float64
    n = operator.shape[0]
    layout = _checked_layout(
        tuple(operator.shape), torch.empty(n, dtype=torch_dtype, device="cpu"), layout
    )
    return ScipyOperator(operator, layout)


#: Packages whose operators are understood, and the base class of those.
_FOREIGN = {"linear_operator": "LinearOperator", "curvlinops": "PyTorchLinearOperator"}


def _is_foreign(obj: Any) -> bool:
    # By name: a package whose operator is at hand has been imported, and no other needs to be.
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(obj).__mro__}
    return any((package, name) in names for package, name in _FOREIGN.items())


def _foreign(operator: Any, layout: TreeLayout | None) -> ForeignOperator:
    if not operator.dtype.is_floating_point:
        raise LeafTypeError(f"an operator has dtype {operator.dtype}; expected a real one.")
    n = operator.shape[-1]
    like = torch.empty(n, dtype=operator.dtype, device=operator.device)
    checked = _checked_layout(tuple(operator.shape), like, layout)
    # Operators of curvlinops know the shapes of the parameters; where either side is one vector
    # there is only the number of entries to compare.
    shapes = [tuple(shape) for shape in getattr(operator, "_in_shape", ())]
    mine = [tuple(shape) for shape in checked.shapes]
    if min(len(shapes), len(mine)) > 1 and shapes != mine:
        raise TreeStructureError(
            f"v has leaves of shapes {mine}, but the {type(operator).__name__} acts on {shapes}. "
            "Give v the operator's parameters, in their order."
        )
    if operator.dtype != checked.dtype:
        raise LeafTypeError(
            f"the operator has dtype {operator.dtype}, but v has {checked.dtype}. Convert one of "
            "them."
        )
    return ForeignOperator(operator, checked)
