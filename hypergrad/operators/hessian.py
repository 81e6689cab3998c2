"""Hessian-vector products of a loss over any tree of parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pytree import Tree, TreeLayout
from ..transforms import (
    building_no_graph,
    must_repeat,
    reaches_beyond,
    tangents,
    transforming,
)
from .base import LinearOperator
from .compilation import (
    check_compile,
    compiled_products,
    detached,
    is_compiled,
    is_reaching,
    note_reaching,
    signature_of,
)
from .evaluation import Evaluation
from .function_transforms import TransformedLoss
from .gradient_graph import GradientGraph, owned, pulled, room_for
from .modes import (
    MEMORY_CAP,
    Block,
    ChunkSize,
    Footprint,
    Memory,
    Mode,
    Way,
    check_modes,
    explore,
    identity,
    or_one_by_one,
    remembered,
)
from .point import Point, check_differentiable, check_loss


class HessianOperator(LinearOperator):
    """The Hessian of ``loss_fn(params, *batch)`` in ``params``; made by :func:`hessian`."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        mode: Mode = "auto",
        chunk_size: ChunkSize = None,
        memory_cap: int = MEMORY_CAP,
        compile: bool = False,
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        check_modes(mode, chunk_size, memory_cap)
        check_compile(compile)
        self.loss_fn, self.batch, self.mode, self.compile = loss_fn, batch, mode, compile
        self.chunk_size, self.memory_cap = chunk_size, memory_cap
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self._point = Point(originals, batch)
        self._evaluating = Evaluation(loss_fn, self.layout, originals, batch)
        self._refused: set[Way] = set()
        self._memory: Memory | None = None
        self._built: GradientGraph | None = None
        self._more: bool | None = None
        self._key: Hashable = None
        # A solve under a transform builds it later, from the plain tensors; where products of this
        # loss are compiled already, it has been looked at and may never be needed.
        if not (building_no_graph() or (compile and is_compiled(self))):
            self._build()

    @property
    def loss(self) -> Tensor:
        """The loss at the parameters, detached."""
        return self._build().loss

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradient by leaf, with its graph; None for leaves that the loss does not use.

        Leaves in which the loss is linear have a gradient without a graph: their rows are zero.
        """
        return self._build().gradients

    def _build(self) -> GradientGraph:
        """The graph of the gradient, once."""
        if self._built is None:
            self._check_fresh()
            self._built = self._graph()
        return self._built

    def _graph(self) -> GradientGraph:
        """The graph of the gradient, made anew."""
        return GradientGraph.of(
            self.loss_fn, self.layout, self._point.params, self.batch, self._evaluating
        )

    def _transformed(self) -> TransformedLoss:
        """The loss as function transforms see it, where autograd's own graph cannot be had."""
        return TransformedLoss(
            self.loss_fn, self.layout, self._point.params, self.batch, self._evaluating
        )

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _signature(self) -> Hashable:
        if self._key is None:
            key = signature_of(self, self.batch, self.loss_fn, self.mode)
            if key is self:  # not to be held by itself
                return self
            self._key = key
        return self._key

    def _check_fresh(self) -> None:
        self._point.check_fresh(self.layout)

    def _note_reached(self, reached: bool) -> None:
        if not reached and not is_reaching(self):
            self._more = False

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built, other._more = self._point.replaced(tensors), None, None
        other._memory = other._key = None
        other.batch = other._point.batch
        return other

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction

    def _depends_on_more(self) -> bool:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        looked = None
        if self._more is None and self._built is None and not is_reaching(self):
            looked = self._forward_alone()
            self._more = None if looked else False
        if self._more is None:
            built = self._build()
            known = built.leaves + [x for x in self._point.batch_tensors if x.requires_grad]
            self._more = reaches_beyond([x for x in built.gradients if x is not None], known)
            known_by_now = looked or not self.compile or is_reaching(self)
            if self._more and not known_by_now and not self._forward_alone():
                note_reaching(self)  # a forward pass does not show it
        return self._more

    def _forward_alone(self) -> bool:
        """Whether the loss of constants carries a graph: of what else it reads.

        The forward pass is a third of what the graph of the gradient costs.
        """
        fixed: Any = detached(self)
        with torch.enable_grad(), self._evaluating():
            loss = fixed.loss_fn(fixed.layout.unflatten_leaves(fixed._point.params), *fixed.batch)
        return bool(loss.requires_grad)

    def _attached(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph() or tangents():
            return self._transformed().in_reverse(block)
        # Each leaf by itself: what else depends on it, such as the batch, stands still.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in self._point.params
        ]
        with torch.enable_grad(), self._evaluating():
            loss = check_loss(
                self.loss_fn(self.layout.unflatten_leaves(leaves), *self.batch), "the loss"
            )
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            rows = self.layout.split(block, block.shape[:1])
            products = [
                self._flat([x[None] for x in pulled(grads, leaves, row, create=True)])
                for row in zip(*(leaf.unbind() for leaf in rows), strict=True)
            ]
            return torch.cat(products)

    def chosen(self, num_vectors: int = 1) -> tuple[Mode, int]:
        """The ``mode`` and ``chunk_size`` that a block of so many vectors is multiplied with now.

        With ``mode="auto"`` it may change until every way has been timed; an operator made with
        these two multiplies such blocks in this way always.
        """
        way = self._way(num_vectors)
        return way.mode, self._chunk(way, num_vectors)

    def __repr__(self) -> str:
        mode = self.mode
        if mode == "auto" and self._memory is not None:
            sizes = sorted(self._memory.choices)
            found = ", ".join(f"{size}: {self._way(size).value}" for size in sizes)
            return f"{super().__repr__()[:-1]}, mode auto ({found})>"
        return f"{super().__repr__()[:-1]}, mode {mode}>"

    def matvec(self, v: Tree) -> Tree:
        """As :meth:`hypergrad.LinearOperator.matvec`, without passing by a flat vector."""
        if building_no_graph() or self.compile:
            return super().matvec(v)
        directions = [leaf.detach()[None] for leaf in self.layout.leaves(v)]
        return self.layout.unflatten_leaves([leaf[0] for leaf in self._products(directions)])

    def matmat(self, v: Tree) -> Tree:
        """As :meth:`hypergrad.LinearOperator.matmat`, without passing by a flat block."""
        if building_no_graph() or self.compile:
            return super().matmat(v)
        directions = [leaf.detach() for leaf in self.layout.leaves(v, batched=True)]
        return self.layout.unflatten_leaves(self._products(directions))

    def _apply(self, block: Tensor) -> Tensor:
        if building_no_graph():
            self._point.check_fresh(self.layout)
            if self.mode == "forward_over_reverse":
                directions = self.layout.split(block, block.shape[:1])
                return self._flat(self._forward_over_reverse(directions))
            return self._transformed().in_reverse(block).detach()
        if self.compile:
            return compiled_products(self, block, self._eager)
        return self._eager(block)

    def _traced_products(self, block: Tensor) -> Tensor:
        """Products as a graph is made of them: many share one trace, in forward mode."""
        if len(block) == 1 or self.mode == "reverse_over_reverse":
            return self._transformed().in_reverse(block)
        return self._flat(self._forward_over_reverse(self.layout.split(block, block.shape[:1])))

    def _eager(self, block: Tensor) -> Tensor:
        out = torch.empty_like(block)
        lead = block.shape[:1]
        sizes = [math.prod(shape) for shape in self.layout.shapes]
        views = [
            piece.view(lead + shape)
            for piece, shape in zip(out.split_with_sizes(sizes, 1), self.layout.shapes, strict=True)
        ]
        self._products(self.layout.split(block, lead), views)
        return out

    def _flat(self, leaves: Block) -> Tensor:
        count = len(leaves[0])
        return torch.cat([leaf.reshape(count, -1).to(self.dtype) for leaf in leaves], dim=1)

    def _products(self, directions: Block, out: Block | None = None) -> Block:
        """The products with a block of directions by leaves, written to ``out`` if there is one.

        By leaves, because one copy of large parameters costs a tenth of a gradient.
        """
        self._point.check_fresh(self.layout)
        count = len(directions[0])
        way = self._way(count)
        if self.mode != "auto":
            return self._make(way, directions, out)
        if must_repeat() or torch.are_deterministic_algorithms_enabled():
            return or_one_by_one(way, self._refused, self._make, directions, out)
        choice = self._remembered().choice(count, self.device)
        return explore(choice, way, self._refused, self._make, directions, out)

    def _make(self, way: Way, directions: Block, out: Block | None) -> Block:
        count = len(directions[0])
        if way is Way.ONE_BY_ONE:
            return self._build().one_by_one(directions, out)
        size = min(self._chunk(way, count), count)
        make = self._forward_over_reverse if way is Way.FORWARD else self._build().together
        if size == count and out is None:
            return owned(make(directions), directions)
        out = room_for(directions) if out is None else out
        for start in range(0, count, size):
            part = slice(start, start + size)
            for leaf, product in zip(out, make([x[part] for x in directions]), strict=True):
                leaf[part] = product
        return out

    def _way(self, count: int) -> Way:
        """How a block of ``count`` vectors is multiplied."""
        if self.mode == "forward_over_reverse":
            return Way.FORWARD
        if self.mode == "reverse_over_reverse":
            alone = self.chunk_size is None or count == 1 or self._chunk(Way.TOGETHER, count) == 1
            return Way.ONE_BY_ONE if alone else Way.TOGETHER
        choice = self._remembered().choice(count, self.device)
        # Timings choose the last digits too: not where the caller wants the same ones every time.
        best = choice.first if torch.are_deterministic_algorithms_enabled() else choice.best
        return Way.ONE_BY_ONE if best in self._refused else best

    def _chunk(self, way: Way, count: int) -> int:
        """How many vectors are carried at a time."""
        if way is Way.ONE_BY_ONE:
            return 1
        if isinstance(self.chunk_size, int):
            return self.chunk_size
        if self.chunk_size is None and self.mode != "auto":
            return count
        vector = self.layout.dim * torch.finfo(self.dtype).bits // 8
        return self._remembered().footprint.chunk_size(vector, self.memory_cap)

    def _remembered(self) -> Memory:
        """What is known of operators like this one; see :mod:`hypergrad.operators.modes`."""
        if self._memory is None:
            built = self._build()
            tensors = built.leaves + self._point.batch_tensors
            key = (
                identity(self.loss_fn),
                tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in tensors),
                self.device,
                torch.get_num_threads(),
                self.chunk_size,
                self.memory_cap,
            )
            with self._evaluating.product():  # a checkpoint is recomputed to see what it saved
                self._memory = remembered(key, lambda: Footprint.of(built.gradients, tensors))
        return self._memory

    def _forward_over_reverse(self, directions: Block) -> Block:
        return self._transformed().forward(directions, lambda: self._in_reverse(directions))

    def _in_reverse(self, directions: Block) -> None:
        """One of the products without forward mode and ``vmap``, by another evaluation."""
        one = [leaf[:1] for leaf in directions]
        if building_no_graph():
            self._transformed().in_reverse(self._flat(one))
        else:
            self._graph().one_by_one(one)


def hessian(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    mode: Mode = "auto",
    chunk_size: ChunkSize = None,
    memory_cap: int = MEMORY_CAP,
    compile: bool = False,
) -> HessianOperator:
    """The Hessian of ``loss_fn(params, *batch)`` with respect to ``params``, as an operator.

    Args:
        loss_fn: returns a real scalar tensor, computed from its first argument.
        params: any tree of floating-point tensors, such as ``dict(module.named_parameters())``
            (call the module with ``torch.func.functional_call``).
        *batch: passed on to ``loss_fn``.
        mode: ``"reverse_over_reverse"`` builds the graph of the gradient once and costs one
            backward pass through it a product; ``"forward_over_reverse"`` recomputes the
            gradient with tangents and carries many vectors together by ``vmap``; ``"auto"`` takes
            the first, one by one or many together as the size of the graph suggests, times the
            other ways on products that are asked for anyway, in a tenth of their time at most,
            and goes on in the fastest one for all operators of the same code, shapes, dtypes and
            device.  It works for every double-differentiable model.  All ways give the same
            products to rounding; but with ``"auto"`` the last digits may depend on timing, unless
            ``torch.use_deterministic_algorithms(True)`` is set: then nothing is timed, as in
            backward passes.  See :meth:`HessianOperator.chosen`.
        chunk_size: how many vectors are carried together.  ``"auto"``: as many as
            ``memory_cap`` allows.  None: one in reverse mode, all in forward mode, ``"auto"``
            with ``mode="auto"``.
        memory_cap: bytes that ``"auto"`` plans with for what is carried, beside the block and its
            products: for each vector three times the parameters and the tensors that the graph of
            the gradient has saved.  One vector is carried even where that is more.
        compile: whether products are compiled by ``torch.compile``, a graph for each size of block:
            many vectors together in forward mode, or in reverse if ``mode`` says so.  Operators of
            the same ``loss_fn`` (the same function object: define it once), shapes and dtypes
            share their graphs, and are made without a gradient of their own.  Compilation takes
            seconds to a minute at the first products, less when PyTorch's cache on disk knows
            the graph; the logger ``"hypergrad"`` says when and how long.

    Returns:
        An operator at the values that ``params`` had when it was made.  It keeps the graph of
        the gradient alive; ``.loss`` is the loss there.  Changes through ``param.data`` go
        unseen and give products of neither point: update under ``torch.no_grad()`` instead.

    Raises:
        LossError: the loss is no real scalar tensor, or does not depend on ``params``.
        NonFiniteError: the loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` or a tensor of ``batch`` have been modified
            in place since; what a closure reaches is not watched, nor whether it comes to require
            grad: make another operator then.

    Warns:
        UnusedParameterWarning: the loss does not depend on some leaves; their rows are zero.
        CompilationWarning: with ``compile``, once a graph: there is no compiler, or it cannot
            trace the loss, or the loss draws random numbers; products are then eager ones.

    Cost: one forward pass and one gradient with a graph when made; then a product is worth about
    two gradients.  Under ``torch.compile`` ``matvec`` and ``matmat`` are part of the graph, without
    a break (``@`` is not: PyTorch 2.13 does not trace it for objects that are no tensors).
    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Examples:
        >>> import torch, hypergrad
        >>> x, y = torch.eye(3), torch.zeros(3)
        >>> loss = lambda p, x, y: ((x @ p["w"] - y) ** 2).sum()
        >>> h = hypergrad.hessian(loss, {"w": torch.ones(3)}, x, y)
        >>> h @ {"w": torch.tensor([1.0, 2.0, 3.0])}
        {'w': tensor([2., 4., 6.])}
    """
    return HessianOperator(
        loss_fn,
        params,
        batch,
        mode=mode,
        chunk_size=chunk_size,
        memory_cap=memory_cap,
        compile=compile,
    )
