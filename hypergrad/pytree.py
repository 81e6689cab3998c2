"""Trees of tensors <-> flat vectors, and the checks that a tree has the expected structure.

Every solver works on flat vectors: one contiguous buffer makes each recurrence a handful of
kernels whatever the number of parameter tensors.  A :class:`TreeLayout` remembers how to go
back.  A tree is a tensor, or a (nested) dict, list, tuple or named tuple of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .errors import DeviceError, EmptyTreeError, LeafTypeError, NonFiniteError, TreeStructureError
from .tracing import compiling

#: A tensor, or a nested dict, list or tuple of tensors.
Tree: TypeAlias = Any


def _leaves_by_path(tree: Tree) -> dict[str, Any]:
    pairs, _ = torch_pytree.tree_flatten_with_path(tree)
    return {torch_pytree.keystr(path): leaf for path, leaf in pairs}


def _check_leaf(leaf: Any, path: str, name: str) -> Tensor:
    if isinstance(leaf, torch.nn.Module):
        raise LeafTypeError(
            f"{name}{path} is a torch.nn.Module ({type(leaf).__name__}), expected tensors. "
            "Pass dict(module.named_parameters()) and call it with torch.func.functional_call."
        )
    if isinstance(leaf, Iterator):
        raise LeafTypeError(
            f"{name}{path} is a {type(leaf).__name__}, which can be gone through once, expected "
            "tensors. Pass dict(module.named_parameters()), or list(...) of what it yields."
        )
    if not isinstance(leaf, Tensor):
        raise LeafTypeError(
            f"{name}{path} is a {type(leaf).__name__}, expected a torch.Tensor. "
            "Every leaf of a tree must be a real floating-point tensor."
        )
    if leaf.layout is not torch.strided:
        raise LeafTypeError(
            f"{name}{path} is sparse ({leaf.layout}), expected a dense tensor. Use .to_dense(), "
            "and layers without sparse gradients."
        )
    # Arithmetic on the 8-bit types does not exist: they are for storage.
    if not leaf.is_floating_point() or leaf.element_size() < 2:
        raise LeafTypeError(
            f"{name}{path} has dtype {leaf.dtype}, expected a real floating-point dtype of "
            f"16 bits or more. Convert it, for example with .to({torch.get_default_dtype()})."
        )
    return leaf


def _kind(leaf: Any) -> Any:
    """All that a leaf is checked for, as one value to be compared; None of what is no tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.layout
    return None


#: The layouts of trees that were seen: making one costs as much as some kernels.
_layouts: dict[Any, TreeLayout] = {}
_MOST_LAYOUTS = 256


def _key(tree: Tree) -> Any:
    """What the layout of a tensor, or of a plain dict of tensors, follows from; else None."""
    if compiling():
        return None
    if type(tree) is not dict:
        return _kind(tree)
    kinds = [_kind(leaf) for leaf in tree.values()]
    # By type, too: 1 and True are the same key, but not of the same name.
    return None if None in kinds else (tuple((type(k), k) for k in tree), tuple(kinds))


def flat_batch(batch: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """What a batch holds, and its structure; that is None for a tuple of tensors.

    PyTorch's walk through one costs more than a kernel.
    """
    if all(isinstance(x, Tensor) for x in batch):
        return list(batch), None
    leaves, spec = torch_pytree.tree_flatten(batch)
    return leaves, spec


def rebuilt_batch(leaves: list[Any], spec: Any) -> tuple[Any, ...]:
    """The batch that :func:`flat_batch` took apart, of other leaves."""
    batch: tuple[Any, ...] = (
        tuple(leaves) if spec is None else torch_pytree.tree_unflatten(leaves, spec)
    )
    return batch


def tree_leaves(tree: Tree, name: str = "the tree") -> list[Tensor]:
    """The leaves of a tree in its own order, each checked to be a real floating tensor."""
    return [_check_leaf(leaf, path, name) for path, leaf in _leaves_by_path(tree).items()]


@dataclass(frozen=True)
class TreeLayout:
    """Structure, shapes, dtypes and device of a tree: how to flatten it, and how to go back.

    Leaves may have different dtypes; the flat vector has their promoted dtype.

    Attributes:
        paths: a printable key path for each leaf, for messages.
        shapes: the shape of each leaf.
        dtypes: the dtype of each leaf.
        device: the one device that all leaves live on.
        dim: number of entries of the flat vector, written n elsewhere.
        dtype: dtype of the flat vector.

    Examples:
        >>> import torch
        >>> from hypergrad.pytree import TreeLayout
        >>> tree = {"w": torch.ones(2, 2), "b": torch.tensor(3.0)}
        >>> layout = TreeLayout.of(tree)
        >>> layout.flatten(tree)
        tensor([1., 1., 1., 1., 3.])
        >>> layout.unflatten(torch.arange(5.0))["b"]
        tensor(4.)
    """

    spec: Any = field(repr=False)
    paths: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    dim: int
    dtype: torch.dtype
    #: Entries of each leaf.
    _sizes: list[int] = field(init=False, repr=False)
    #: The keys of a plain dict of tensors, None for other trees; whether the tree is a tensor.
    _keys: list[Any] | None = field(init=False, repr=False, default=None)
    _bare: bool = field(init=False, repr=False, default=False)
    #: Whether every leaf has the dtype of the flat vector.
    _uniform: bool = field(init=False, repr=False, default=True)
    #: What :func:`_kind` says of each leaf.
    _kinds: list[Any] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sizes", [math.prod(shape) for shape in self.shapes])
        order = list(range(len(self.shapes)))
        skeleton = torch_pytree.tree_unflatten(order, self.spec)
        if type(skeleton) is dict and list(skeleton.values()) == order:
            object.__setattr__(self, "_keys", list(skeleton))
        object.__setattr__(self, "_bare", type(skeleton) is int)
        object.__setattr__(self, "_uniform", all(x == self.dtype for x in self.dtypes))
        pairs = zip(self.shapes, self.dtypes, strict=True)
        kinds = [(shape, dtype, self.device, torch.strided) for shape, dtype in pairs]
        object.__setattr__(self, "_kinds", kinds)

    @classmethod
    def of(cls, tree: Tree, *, name: str = "the tree", batched: bool = False) -> TreeLayout:
        """The layout of ``tree``; with ``batched``, of one of the trees stacked in it.

        Args:
            tree: tensors in a tree; with ``batched`` every leaf has one more leading dimension.
            name: what to call the tree in messages.
            batched: whether the leading dimension of each leaf counts trees.

        Raises:
            EmptyTreeError: no leaves, or only leaves with no entries.
            LeafTypeError: a leaf that is not a real floating-point tensor.
            DeviceError: leaves on more than one device.
            TreeStructureError: ``batched`` with leaves of different leading sizes.
        """
        key = None if batched else _key(tree)
        if key is not None and key in _layouts:
            return _layouts[key]
        by_path = _leaves_by_path(tree)
        leaves = [_check_leaf(leaf, path, name) for path, leaf in by_path.items()]
        paths = tuple(by_path)
        if not leaves:
            raise EmptyTreeError(f"{name} has no leaves ({tree!r}); expected at least one tensor.")
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            places = ", ".join(f"{p or 'the tensor'} on {x.device}" for p, x in by_path.items())
            raise DeviceError(f"{name} lives on several devices ({places}); move it to one.")
        if batched:
            _batch_size(leaves, paths, name)
        shapes = tuple(leaf.shape[1:] if batched else leaf.shape for leaf in leaves)
        dim = sum(math.prod(shape) for shape in shapes)
        if dim == 0:
            raise EmptyTreeError(f"{name} has no entries: every leaf is empty ({list(shapes)}).")
        dtypes = tuple(leaf.dtype for leaf in leaves)
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        _, spec = torch_pytree.tree_flatten(tree)
        layout = cls(spec, paths, shapes, dtypes, leaves[0].device, dim, dtype)
        if key is not None:
            if len(_layouts) >= _MOST_LAYOUTS:
                _layouts.clear()
            _layouts[key] = layout
        return layout

    def leaves(self, tree: Tree, *, name: str = "v", batched: bool = False) -> list[Tensor]:
        """The leaves of ``tree`` in this layout's order, after checking all that can be wrong.

        Dicts are matched by key, so the order of insertion does not matter, and a list matches
        a tuple of the same length (``torch.autograd.grad`` returns tuples).

        Raises:
            TreeStructureError: other keys, another number of leaves, or another leaf shape.
            LeafTypeError: a leaf that is not a tensor, or of another dtype.
            DeviceError: a leaf on another device.
        """
        quick = self._quick_leaves(tree)
        if quick is not None and self._fits(quick, batched):
            return quick
        flat, spec = torch_pytree.tree_flatten(tree)
        if spec != self.spec:
            by_path = _leaves_by_path(tree)
            for path, leaf in by_path.items():  # None or a number is not a matter of structure
                _check_leaf(leaf, path, name)
            if by_path.keys() != set(self.paths):
                missing = [p or "a tensor" for p in self.paths if p not in by_path]
                extra = [p or "a tensor" for p in by_path if p not in self.paths]
                raise TreeStructureError(
                    f"{name} has another structure than expected: missing {_brief(missing)}, "
                    f"unexpected {_brief(extra)}. It must have the same keys as the operator's "
                    f"parameters ({len(self.paths)} leaves)."
                )
            flat = [by_path[path] for path in self.paths]
        for leaf, path, shape, dtype in zip(
            flat, self.paths, self.shapes, self.dtypes, strict=True
        ):
            _check_leaf(leaf, path, name)
            got = leaf.shape[1:] if batched else leaf.shape
            if got != shape or (batched and leaf.ndim == 0):
                wanted = f"(m, {', '.join(map(str, shape))})" if batched else f"{tuple(shape)}"
                raise TreeStructureError(
                    f"{name}{path} has shape {tuple(leaf.shape)}, expected {wanted}."
                )
            if leaf.dtype != dtype:
                raise LeafTypeError(
                    f"{name}{path} has dtype {leaf.dtype}, expected {dtype}. "
                    "Convert one of the two; nothing is cast silently."
                )
            if leaf.device != self.device:
                raise DeviceError(
                    f"{name}{path} is on {leaf.device}, expected {self.device}. Move one of them."
                )
        if batched:
            _batch_size(flat, self.paths, name)
        return flat

    def _quick_leaves(self, tree: Tree) -> list[Any] | None:
        """The leaves of the usual trees, without PyTorch's walk, which costs more than a kernel."""
        if self._bare:
            return [tree]
        if self._keys is not None and type(tree) is dict and list(tree) == self._keys:
            return list(tree.values())
        return None

    def _fits(self, leaves: list[Any], batched: bool) -> bool:
        """Whether all is as it should be; what is wrong is found out by those who then look."""
        if not batched:
            return [_kind(leaf) for leaf in leaves] == self._kinds
        counts = set()
        for leaf, kind in zip(leaves, self._kinds, strict=True):
            got = _kind(leaf)
            if got is None or not got[0] or (got[0][1:], *got[1:]) != kind:
                return False
            counts.add(got[0][0])
        return len(counts) == 1 and 0 not in counts

    def flatten(self, tree: Tree, *, name: str = "v") -> Tensor:
        """``tree`` as one vector of shape (n,), detached; see :meth:`leaves` for the checks."""
        return self.rows(tree, name=name)[0].detach()

    def flatten_block(self, tree: Tree, *, name: str = "v") -> Tensor:
        """A tree of m stacked trees as a block of shape (m, n), detached."""
        return self.rows(tree, name=name, batched=True).detach()

    def rows(self, tree: Tree, *, name: str = "v", batched: bool = False) -> Tensor:
        """``tree``, or the m trees stacked in it, as a block of shape (m, n) with its graph."""
        leaves = self.leaves(tree, name=name, batched=batched)
        count = leaves[0].shape[0] if batched else 1
        if self._uniform:
            return torch.cat([leaf.reshape(count, -1) for leaf in leaves], dim=1)
        return torch.cat([leaf.reshape(count, -1).to(self.dtype) for leaf in leaves], dim=1)

    def vector(self, tree: Tree, *, name: str = "v") -> Tensor:
        """``tree`` as one vector with its graph; it may share the memory of a single tensor."""
        leaves = self.leaves(tree, name=name)
        if self._bare:
            return leaves[0] if len(self.shapes[0]) == 1 else leaves[0].reshape(-1)
        flat = [leaf.reshape(-1) for leaf in leaves]
        return torch.cat(flat if self._uniform else [leaf.to(self.dtype) for leaf in flat])

    def unflatten(self, vector: Tensor) -> Tree:
        """A vector of shape (n,) as a tree, every leaf with its own shape and dtype."""
        if self._bare and len(self.shapes[0]) == 1 and vector.dtype is self.dtype:
            return vector
        return self._assemble(vector, ())

    def unflatten_block(self, block: Tensor) -> Tree:
        """A block of shape (m, n) as a tree whose leaves have the leading dimension m."""
        return self._assemble(block, (block.shape[0],))

    def _assemble(self, flat: Tensor, lead: tuple[int, ...]) -> Tree:
        return self.unflatten_leaves(self.split(flat, lead))

    def split(self, flat: Tensor, lead: tuple[int, ...] = ()) -> list[Tensor]:
        """The leaves of a vector, or of a block of them with leading shape ``lead``, in order."""
        pieces = flat.split_with_sizes(self._sizes, dim=-1)
        if self._uniform and flat.dtype == self.dtype:
            pairs = zip(pieces, self.shapes, strict=True)
            return [piece.reshape(lead + shape) for piece, shape in pairs]
        return [
            piece.reshape(lead + shape).to(dtype)
            for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True)
        ]

    def rows_of_leaves(self, block: Tensor, *, cast: bool = False) -> list[list[Tensor]]:
        """Each row of a (m, n) block by leaves: views of it, or with ``cast`` in their own dtypes.

        Views of a whole block are made faster than those of its rows one by one.
        """
        lead = block.shape[:1]
        if cast:
            leaves = self.split(block, lead)
        else:
            pieces = block.split_with_sizes(self._sizes, dim=-1)
            leaves = [x.view(lead + shape) for x, shape in zip(pieces, self.shapes, strict=True)]
        return [list(row) for row in zip(*(leaf.unbind() for leaf in leaves), strict=True)]

    def narrowed(self, block: Tensor) -> Tensor:
        """A block of shape (m, n) with each leaf's columns rounded to that leaf's dtype."""
        if self._uniform:
            return block
        rows = block.shape[0]
        leaves = self.split(block, (rows,))
        return torch.cat([leaf.reshape(rows, -1).to(self.dtype) for leaf in leaves], dim=1)

    def unflatten_leaves(self, leaves: list[Tensor]) -> Tree:
        """Leaves in this layout's order, put back into the tree as they are."""
        if self._bare:
            return leaves[0]
        if self._keys is not None:
            return dict(zip(self._keys, leaves, strict=True))
        return torch_pytree.tree_unflatten(leaves, self.spec)

    def leaves_unchecked(self, tree: Tree) -> list[Tensor]:
        """The leaves of a tree that the library itself made with this layout's structure."""
        return torch_pytree.tree_leaves(tree)

    def check_finite(self, flat: Tensor, what: str) -> None:
        """Raise :class:`NonFiniteError`, naming the first bad leaf, unless ``flat`` is finite."""
        if compiling():  # values cannot be looked at
            return
        # A nan or an infinity passes into the sum: one pass, unless finite entries overflow it.
        if math.isfinite(flat.sum()):
            return
        finite = torch.isfinite(flat)
        if bool(finite.all()):
            return
        columns = finite.reshape(-1, self.dim).all(dim=0)
        start = 0
        for path, shape in zip(self.paths, self.shapes, strict=True):
            stop = start + math.prod(shape)
            bad = int((~columns[start:stop]).sum())
            if bad:
                leaf = f"leaf {path}" if path else "the tensor"
                raise NonFiniteError(
                    f"{what} holds nan or inf: {bad} of {stop - start} entries of {leaf}. "
                    "Look for an overflow, a log or sqrt at zero, or diverged parameters."
                )
            start = stop


def _batch_size(leaves: list[Tensor], paths: tuple[str, ...], name: str) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) > 1 or None in sizes:
        got = ", ".join(
            f"{p or 'the tensor'}: {tuple(x.shape)}" for p, x in zip(paths, leaves, strict=True)
        )
        raise TreeStructureError(
            f"{name} is batched, so every leaf needs the same leading size; got {got}."
        )
    size = leaves[0].shape[0]
    if size == 0:
        raise EmptyTreeError(f"{name} is a batch of zero right-hand sides; expected at least one.")
    return size


def _brief(names: list[str], most: int = 4) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
