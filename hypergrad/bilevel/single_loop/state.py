"""What a single-loop method carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import StateError
from ...precision import working_dtype
from ...pytree import Tree, TreeLayout

#: Which layout each flat vector of a state has.
_ON_OUTER = ("outer", "outer_direction")


class BlockMemory:
    """SAGA's memory: for each quantity its last value on every block, and their mean.

    The tables are the one thing that a step writes in place: a copy at each step would cost more
    than the step.  ``step`` says which state they belong to.
    """

    def __init__(self, tables: dict[str, Tensor], means: dict[str, Tensor], step: int = 0) -> None:
        self.tables, self.means, self.step = tables, means, step

    @classmethod
    def zeros(cls, sizes: Mapping[str, tuple[int, int]], like: Tensor) -> BlockMemory:
        """Tables of the given (blocks, entries), all zero."""
        # A mean is updated at every step and never recomputed: its own rounding must not add up.
        wide = working_dtype(like.dtype, like.device)
        tables = {name: like.new_zeros(size) for name, size in sizes.items()}
        means = {name: like.new_zeros(size[1], dtype=wide) for name, size in sizes.items()}
        return cls(tables, means)

    def estimate(self, name: str, index: int, value: Tensor) -> Tensor:
        """SAGA's estimate of a quantity's mean over all blocks: value - remembered + mean."""
        table, mean = self.tables[name], self.means[name]
        return (value.to(mean.dtype) - table[index].to(mean.dtype) + mean).to(value.dtype)

    def remember(self, news: Mapping[str, tuple[int, Tensor]]) -> None:
        """Put the (block, value) of each quantity in place; the memory is then the next step's."""
        for name, (index, value) in news.items():
            table, mean = self.tables[name], self.means[name]
            change = value.to(mean.dtype) - table[index].to(mean.dtype)
            self.means[name] = mean + change / len(table)
            table[index] = value
        self.step += 1

    def clone(self) -> BlockMemory:
        """A copy that shares nothing."""
        tables = {name: table.clone() for name, table in self.tables.items()}
        return BlockMemory(tables, dict(self.means), self.step)


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class SingleLoopState:
    """Where a single-loop method stands; made by ``init`` and by every ``step``.

    The variables live in flat vectors (of at least float32, so that small steps on 16-bit
    parameters are not rounded away); the trees below are fresh copies.

    Attributes:
        method: name of the method whose state it is.
        step: steps taken.
        num_gradients: gradients of either loss so far.
        num_hvps: passes through the second derivatives of the inner loss so far: a
            Hessian-vector product, a cross product, or both on one graph.
    """

    method: str
    step: int
    num_gradients: int
    num_hvps: int
    inner_layout: TreeLayout = field(repr=False)
    outer_layout: TreeLayout = field(repr=False)
    vectors: dict[str, Tensor] = field(repr=False)
    memory: BlockMemory | None = field(default=None, repr=False)

    @property
    def inner_params(self) -> Tree:
        """The inner variable w, which follows w*(y)."""
        return self._tree("inner")

    @property
    def outer_params(self) -> Tree:
        """The outer variable y."""
        return self._tree("outer")

    @property
    def ihvp(self) -> Tree:
        """The variable v of the linear system, which follows H^-1 grad_w f, shaped like w.

        Raises:
            StateError: the method has none (:class:`F2SA` solves no linear system).
        """
        if "ihvp" not in self.vectors:
            raise StateError(f"{self.method} has no ihvp: it solves no linear system.")
        return self._tree("ihvp")

    @property
    def outer_direction(self) -> Tree:
        """The estimate of the hypergradient in the last step, shaped like y; zero before it."""
        return self._tree("outer_direction")

    def replace(
        self, *, inner_params: Tree | None = None, outer_params: Tree | None = None
    ) -> SingleLoopState:
        """The same state with other variables: after a projection, or an optimiser's own step.

        Raises:
            TreeStructureError: a tree of another structure or shape.
            LeafTypeError: a leaf of another dtype.
            NonFiniteError: a tree holds nan or inf.

        Examples:
            >>> import torch, hypergrad
            >>> loss = lambda w, y: ((w - y) ** 2).sum()
            >>> method = hypergrad.SOBA(loss, loss, inner_lr=0.1, outer_lr=0.1)
            >>> state = method.init(torch.zeros(2), torch.tensor([1.0, -1.0]))
            >>> state.replace(outer_params=state.outer_params.clamp(min=0.0)).outer_params
            tensor([1., 0.])
        """
        vectors = dict(self.vectors)
        given = (("inner", inner_params), ("outer", outer_params))
        for name, tree in given:
            if tree is not None:
                layout = self._layout(name)
                flat = layout.flatten(tree, name=f"{name}_params")
                layout.check_finite(flat, f"{name}_params")
                vectors[name] = flat.to(self.vectors[name].dtype)
        return replace(self, vectors=vectors)

    def clone(self) -> SingleLoopState:
        """A state to branch from: it shares no memory with this one."""
        memory = None if self.memory is None else self.memory.clone()
        return replace(self, memory=memory)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, names and tensors: for ``torch.save``, and ``torch.load(weights_only=True)``.

        A copy: later steps do not change it.
        """
        saved: dict[str, Any] = {
            "method": self.method,
            "step": self.step,
            "num_gradients": self.num_gradients,
            "num_hvps": self.num_hvps,
            "inner_leaves": _leaves_of(self.inner_layout),
            "outer_leaves": _leaves_of(self.outer_layout),
            "vectors": {name: vector.clone() for name, vector in self.vectors.items()},
        }
        if self.memory is not None:
            memory = self.memory.clone()
            saved["tables"], saved["means"] = memory.tables, memory.means
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> SingleLoopState:
        """The state that was saved, on this state's device; this one only lends its structure.

        Args:
            saved: what :meth:`state_dict` returned, of a state of the same method and trees.

        Raises:
            StateError: it is of another method, or of trees of another structure.

        Examples:
            >>> import torch, hypergrad
            >>> loss = lambda w, y: ((w - y) ** 2).sum()
            >>> method = hypergrad.SOBA(loss, loss, inner_lr=0.1, outer_lr=0.1)
            >>> state = method.step(method.init(torch.zeros(2), torch.ones(2)))
            >>> saved = state.state_dict()
            >>> anew = method.init(torch.zeros(2), torch.zeros(2)).load_state_dict(saved)
            >>> anew.step, torch.equal(anew.inner_params, state.inner_params)
            (1, True)
        """
        mine = self.state_dict()
        shapes, theirs = _fingerprint(mine), _fingerprint(saved)
        for name, expected in shapes.items():
            if theirs.get(name) != expected:
                raise StateError(
                    f"the saved state has {name} = {theirs.get(name)!r}, expected {expected!r}. "
                    "Load it into a state made by the same method from trees of the same structure."
                )
        device = self.inner_layout.device

        def copied(name: str) -> dict[str, Tensor]:
            return {key: value.detach().clone().to(device) for key, value in saved[name].items()}

        memory = None
        if self.memory is not None:
            memory = BlockMemory(copied("tables"), copied("means"), int(saved["step"]))
        return replace(
            self,
            step=int(saved["step"]),
            num_gradients=int(saved["num_gradients"]),
            num_hvps=int(saved["num_hvps"]),
            vectors=copied("vectors"),
            memory=memory,
        )

    def _layout(self, name: str) -> TreeLayout:
        return self.outer_layout if name in _ON_OUTER else self.inner_layout

    def _tree(self, name: str) -> Tree:
        return self._layout(name).unflatten(self.vectors[name].clone())


def _leaves_of(layout: TreeLayout) -> list[list[Any]]:
    leaves = zip(layout.paths, layout.shapes, layout.dtypes, strict=True)
    return [[path, list(shape), str(dtype)] for path, shape, dtype in leaves]


def _fingerprint(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What two saved states must have in common."""
    parts: dict[str, Any] = {
        name: saved.get(name) for name in ("method", "inner_leaves", "outer_leaves")
    }
    for name in ("vectors", "tables", "means"):
        tensors = saved.get(name)
        parts[name] = tensors and {
            key: (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else value
            for key, value in tensors.items()
        }
    return parts


def master_dtype(layout: TreeLayout) -> torch.dtype:
    """The dtype of the flat variables: the layout's, but float32 for 16-bit parameters."""
    return torch.promote_types(layout.dtype, torch.float32)
