"""The diagonal blocks of an operator, one for each layer of a network or as one likes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import (
    NegativeCurvatureError,
    NotSymmetricError,
    OperatorTooLargeError,
    SolverOptionError,
    StaleOperatorError,
)
from ..norms import powers_of_two
from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from .base import LinearOperator
from .interop import as_operator
from .invertible import InvertibleOperator
from .point import version_of
from .root import RootOperator

#: As many numbers are multiplied at once, at most: masked copies of a vector, one for each block.
_NUMBERS = 2**22

Grouping = Literal["layer", "leaf"] | Callable[[str], Hashable]


class BlockDiagonalOperator(InvertibleOperator):
    """The diagonal blocks of an operator, zero between them; made by :func:`block_diagonal`.

    Attributes:
        operator: the operator that the blocks are those of.
        names: of each block: what its leaves have in common.
        max_bytes: memory allowed for the dense blocks of the inverse.
    """

    def __init__(
        self, operator: LinearOperator, groups: dict[str, list[int]], *, max_bytes: int
    ) -> None:
        super().__init__(operator.layout)
        self.operator, self.max_bytes, self._groups = operator, max_bytes, groups
        self.names = tuple(groups)
        sizes = [shape.numel() for shape in self.layout.shapes]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        #: The places of each block's numbers in a flat vector.
        self._places = [
            torch.cat(
                [torch.arange(starts[i], starts[i] + sizes[i], device=self.device) for i in leaves]
            )
            for leaves in groups.values()
        ]
        self._dense: list[Tensor] | None = None
        #: Of the operator's tensors when the blocks were made.
        self._versions: list[int] = []

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The dimension of each block."""
        return tuple(len(places) for places in self._places)

    def _apply(self, block: Tensor) -> Tensor:
        return self._products(self.operator._apply, block)

    def _attached(self, block: Tensor) -> Tensor:
        return self._products(self.operator._attached, block)

    def _products(self, multiply: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        masks = torch.stack([self._mask(i) for i in range(len(self._places))]).to(block.dtype)
        out = torch.zeros_like(block)
        for part in torch.split(masks, max(1, _NUMBERS // block.numel())):
            # Every row once for each block, with zeros outside of it.
            masked = (part[:, None] * block).reshape(-1, block.shape[1])
            products = multiply(masked).reshape(len(part), *block.shape)
            out = out + (part[:, None] * products).sum(dim=0)
        return out

    def _mask(self, index: int) -> Tensor:
        places = self._places[index]
        return torch.zeros(self.layout.dim, device=places.device).index_fill(0, places, 1.0)

    def _tensors(self) -> list[Tensor]:
        return self.operator._tensors()

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = self.operator._with_tensors(tensors)
        return BlockDiagonalOperator(other, self._groups, max_bytes=self.max_bytes)

    def _depends_on_more(self) -> bool | None:
        return self.operator._depends_on_more()

    def _transposed(self) -> LinearOperator:
        other = self.operator._transposed()
        return BlockDiagonalOperator(other, self._groups, max_bytes=self.max_bytes)

    def dense_blocks(self) -> dict[str, Tensor]:
        """The blocks by name, each a symmetric matrix in the working dtype.

        They are kept, and made again where a matrix was modified in place since; those of an
        operator that is of the point where it was made, such as a Hessian, stay.

        Raises:
            OperatorTooLargeError: they would take more than ``max_bytes``.
            NotSymmetricError: a block is not symmetric beyond the rounding of its products.

        Cost: as many products as the operator has dimensions; for operators of few rows F, such as
        Gauss-Newton and Fisher matrices of few samples, the rows instead.
        """
        versions = [version_of(tensor) for tensor in self._tensors()]
        if self._dense is None or versions != self._versions:
            self._check_memory()
            try:
                dense = self._from_rows()
                self._dense = self._from_products() if dense is None else dense
            except StaleOperatorError:  # its point is that where it was made
                if self._dense is None:
                    raise
            self._versions = versions
        return dict(zip(self.names, self._dense, strict=True))

    def _check_memory(self) -> None:
        itemsize = torch.empty(0, dtype=working_dtype(self.dtype, self.device)).element_size()
        needed = 2 * itemsize * sum(size**2 for size in self.block_sizes)  # and their factors
        if needed > self.max_bytes:
            largest = max(zip(self.block_sizes, self.names, strict=True))
            raise OperatorTooLargeError(
                f"{len(self.names)} dense blocks, the largest being {largest[1] or 'all leaves'} "
                f"of dimension {largest[0]}, need {needed / 2**30:.2g} GiB, more than the "
                f"{self.max_bytes / 2**30:.2g} GiB of max_bytes. Use smaller blocks (by='leaf'), "
                f"hypergrad.kfac, or allow it with max_bytes={needed}."
            )

    def _from_rows(self) -> list[Tensor] | None:
        root, n = self.operator, self.layout.dim
        if not isinstance(root, RootOperator) or root.num_rows >= n:
            return None
        itemsize = torch.empty(0, dtype=self.dtype).element_size()
        if 2 * root.num_rows * n * itemsize > self.max_bytes:
            return None
        rows = root._factor()
        self.layout.check_finite(rows, "the factor F of the operator")
        wide = working_dtype(self.dtype, self.device)
        parts = [rows[:, places].to(wide) for places in self._places]
        return [part.T @ part for part in parts]

    def _from_products(self) -> list[Tensor]:
        wide, n = working_dtype(self.dtype, self.device), self.layout.dim
        chunk = max(1, min(256, _NUMBERS // n))
        dense = []
        for name, places in zip(self.names, self._places, strict=True):
            columns = []
            for own in places.split(chunk):  # type: ignore[no-untyped-call]
                rows = torch.zeros(len(own), n, dtype=self.dtype, device=self.device)
                rows[torch.arange(len(own), device=own.device), own] = 1.0
                product = self.operator._apply(rows)
                self.layout.check_finite(product, "the output of the operator")
                columns.append(product[:, places].to(wide))
            matrix = torch.cat(columns)
            self._check_symmetric(matrix, name)
            dense.append(0.5 * (matrix + matrix.T))
        return dense

    def _check_symmetric(self, matrix: Tensor, name: str) -> None:
        """As :class:`hypergrad.Exact` does: generous to rounding, not to what is wrong in kind."""
        if matrix.numel() == 0:  # of a leaf without entries
            return
        matrix = matrix / powers_of_two(matrix.abs().max())
        skew, size = float((matrix - matrix.T).norm()) / 2, float(matrix.norm())
        allowed = torch.finfo(self.dtype).eps ** 0.25
        if skew > allowed * size:
            raise NotSymmetricError(
                f"the block {name or 'of all leaves'} is not symmetric: its antisymmetric part has "
                f"relative size {skew / size:.1e}, expected rounding only (at most {allowed:.0e}). "
                "Symmetrise the matrix, use a Hessian or Gauss-Newton operator, or solve with "
                "hypergrad.GMRES()."
            )

    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        factors = []
        for name, matrix in self.dense_blocks().items():
            damped = matrix + damping * torch.eye(
                len(matrix), dtype=matrix.dtype, device=matrix.device
            )
            factor, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):
                smallest = float(torch.linalg.eigvalsh(matrix)[0])
                raise NegativeCurvatureError(
                    f"the block {name or 'of all leaves'} plus damping {damping:.3g} is not "
                    f"positive definite: its smallest eigenvalue is {smallest:.3g}. Raise damping, "
                    "use a Gauss-Newton operator, or solve with "
                    "hypergrad.solve(blocks, v, hypergrad.MINRES())."
                )
            factors.append(factor)
        places = self._places

        def apply(block: Tensor) -> Tensor:
            out = torch.empty_like(block)
            for own, factor in zip(places, factors, strict=True):
                target = block[:, own].to(factor.dtype)
                out[:, own] = torch.cholesky_solve(target.T, factor).T.to(block.dtype)
            return out

        return apply


def block_diagonal(
    operator: Any, by: Grouping = "layer", *, like: Tree | None = None, max_bytes: int = 4 * 2**30
) -> BlockDiagonalOperator:
    """The diagonal blocks of an operator, with zeros between them.

    Where layers hardly interact, a cheap approximation; its damped inverse, by a Cholesky
    factorisation of each block, preconditions a solve with the operator itself.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes, such as a Hessian or Gauss-Newton
            operator.
        by: which leaves make up a block.  ``"layer"``: those of one module, for a dict of a
            module's parameters (``"0.weight"`` with ``"0.bias"``) or nested dicts of them; each
            leaf of a list or tuple by itself.  ``"leaf"``: each leaf.  A callable: leaves whose
            path, such as ``"['0.weight']"``, it gives the same value.
        like: a tree of the structure of the operator's argument; callables need it.
        max_bytes: memory allowed for the dense blocks, when the inverse is asked for.

    Returns:
        An operator with ``.preconditioner(damping)``, ``.solve(v, damping)`` and
        ``.dense_blocks()``.  Its products compile to one graph with ``torch.compile`` where those
        of ``operator`` do, and so do those of the preconditioner, once made.

    Raises:
        SolverOptionError: ``by`` is none of these.
        OperatorTooLargeError: for the inverse, the blocks would take more than ``max_bytes``.
        NotSymmetricError: for the inverse, a block is not symmetric.
        NegativeCurvatureError: for the inverse, a block plus damping is not positive definite.

    Cost: a product is one product with the operator for each block, batched where the operator
    can.  For the inverse: as many products as dimensions, once (the rows of F where the operator
    has fewer of them), and a Cholesky factorisation of each block.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 4.0]])
        >>> like = {name: torch.zeros(1) for name in ("0.weight", "0.bias", "1.weight")}
        >>> blocks = hypergrad.block_diagonal(a, like=like)
        >>> blocks.names, blocks.block_sizes
        (('0', '1'), (2, 1))
        >>> blocks.to_dense()
        tensor([[2., 1., 0.],
                [1., 3., 0.],
                [0., 0., 4.]])
        >>> blocks.solve({name: torch.ones(1) for name in like})
        {'0.weight': tensor([0.4000]), '0.bias': tensor([0.2000]), '1.weight': tensor([0.2500])}
    """
    op = as_operator(operator, like=like)
    layout = op.layout
    keys: list[Hashable]
    if isinstance(by, str) and by == "layer":
        keys = list(_layers(layout))
    elif isinstance(by, str) and by == "leaf":
        keys = list(layout.paths)
    elif callable(by):
        keys = [by(path) for path in layout.paths]
    else:
        raise SolverOptionError(
            f"by is {by!r}, expected 'layer', 'leaf' or a callable from a leaf's path to its block."
        )
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    named = {str(key): leaves for key, leaves in groups.items()}
    if len(named) < len(groups):
        raise SolverOptionError(
            f"by gives different blocks the same name: {sorted(map(str, groups))}. Expected values "
            "whose text differs."
        )
    return BlockDiagonalOperator(op, named, max_bytes=max_bytes)


def _layers(layout: TreeLayout) -> list[str]:
    """The layer that each leaf belongs to: its keys, joined by dots, less the last one's end."""
    blank = torch_pytree.tree_unflatten(list(range(len(layout.paths))), layout.spec)
    layers = []
    for path, _ in torch_pytree.tree_flatten_with_path(blank)[0]:
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if path and isinstance(path[-1], torch_pytree.MappingKey):
            names[-1] = names[-1].rpartition(".")[0]
        layers.append(".".join(name for name in names if name))
    return layers
