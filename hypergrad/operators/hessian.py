"""Hessian-vector products of a loss over any tree of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..pytree import Tree, TreeLayout
from ..transforms import (
    building_no_graph,
    forward_mode,
    reaches_beyond,
    tangents,
    transforming,
)
from .base import LinearOperator
from .modes import (
    MEMORY_CAP,
    MOST_TRIED,
    ChunkSize,
    Footprint,
    Memory,
    Mode,
    Way,
    agree,
    identity,
    remembered,
    timed,
)
from .point import Point, check_differentiable, check_loss, report_unused

#: Named here too, for other operators of a loss at a point.
__all__ = [
    "HessianOperator",
    "Point",
    "check_differentiable",
    "check_loss",
    "hessian",
    "report_unused",
]


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
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        if mode not in get_args(Mode):
            raise SolverOptionError(f"mode is {mode!r}, expected one of {get_args(Mode)}.")
        if chunk_size not in (None, "auto") and not is_positive(chunk_size):
            raise SolverOptionError(
                f"chunk_size is {chunk_size!r}, expected None, 'auto' or an integer >= 1."
            )
        if not is_positive(memory_cap):
            raise SolverOptionError(
                f"memory_cap is {memory_cap!r}, expected a number of bytes, an integer >= 1."
            )
        self.loss_fn, self.batch, self.mode = loss_fn, batch, mode
        self.chunk_size, self.memory_cap = chunk_size, memory_cap
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self._point = Point(originals, batch)
        self._refused: set[Way] = set()
        self._memory: Memory | None = None
        self._built: _Built | None = None
        self._more: bool | None = None
        if not building_no_graph():  # a solve builds it later, from the plain tensors
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

    def _build(self) -> _Built:
        """The graph of the gradient, once."""
        if self._built is None:
            # Fresh leaves that share storage: the caller's flags and .grad stay untouched.
            leaves = [leaf.detach().requires_grad_() for leaf in self._point.params]
            params = self.layout.unflatten_leaves(leaves)
            with torch.enable_grad():
                loss = check_loss(self.loss_fn(params, *self.batch), "the loss")
                grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            report_unused(self.layout, [grad is None for grad in grads], "the loss")
            self._built = _Built(loss.detach(), leaves, grads)
        return self._built

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built, other._more = self._point.replaced(tensors), None, None
        other._memory = None
        other.batch = other._point.batch
        return other

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction

    def _depends_on_more(self) -> bool:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        if self._more is None:
            built = self._build()
            known = built.leaves + [x for x in self._point.batch_tensors if x.requires_grad]
            self._more = reaches_beyond([x for x in built.gradients if x is not None], known)
        return self._more

    def _attached(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph() or tangents():
            return self._functional(block)
        # Each leaf by itself: what else depends on it, such as the batch, stands still.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in self._point.params
        ]
        with torch.enable_grad():
            loss = check_loss(
                self.loss_fn(self.layout.unflatten_leaves(leaves), *self.batch), "the loss"
            )
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            return torch.stack([self._pulled(grads, leaves, row, create=True) for row in block])

    def _functional(self, block: Tensor) -> Tensor:
        """Reverse-over-reverse products by ``torch.func``, where plain autograd may not run."""
        point = self.layout.unflatten_leaves(self._point.params)
        gradient = torch.func.grad(lambda params: self.loss_fn(params, *self.batch).reshape(()))
        pull = torch.func.vjp(gradient, point)[1]
        rows = []
        for row in block.unbind():
            (product,) = pull(self.layout.unflatten(row))
            leaves = self.layout.leaves_unchecked(product)
            rows.append(torch.cat([x.reshape(-1).to(self.dtype) for x in leaves]))
        return torch.stack(rows)

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

    def _apply(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph():
            if self.mode == "forward_over_reverse":
                return self._forward_over_reverse(block)
            return self._functional(block).detach()
        if self.mode == "auto":
            return self._by_choice(block)
        return self._products(self._way(len(block)), block)

    def _products(self, way: Way, block: Tensor) -> Tensor:
        if way is Way.FORWARD:
            return self._forward_over_reverse(block)
        return (
            self._reverse_one_by_one(block)
            if way is Way.ONE_BY_ONE
            else self._reverse_in_batches(block)
        )

    def _by_choice(self, block: Tensor) -> Tensor:
        """In the way that is best as far as is known, which these products may tell more of."""
        choice = self._remembered().choice(len(block), self.device)
        way = self._way(len(block))
        if choice.settled:
            return self._or_one_by_one(way, block)
        count = min(len(block), MOST_TRIED)
        other = choice.trial(count)
        head = block.new_empty(0, self.layout.dim)
        if other is not None and other not in self._refused:
            head = self._tried(other, block[:count])
        rest = block[len(head) :]
        if not len(rest):
            return head
        products, seconds = timed(lambda: self._or_one_by_one(way, rest), self.device)
        if way not in self._refused:
            choice.record(way, len(rest), seconds)
        return torch.cat([head, products]) if len(head) else products

    def _tried(self, way: Way, block: Tensor) -> Tensor:
        """Products in a way that is not known yet; none of them if it turns out not to work."""
        choice = self._remembered().choice(len(block), self.device)
        try:
            products, seconds = timed(lambda: self._products(way, block), self.device)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):
                choice.refused.add(way)
            self._refused.add(way)
            return block[:0]
        if way not in choice.seconds and not agree(
            products[:1], self._reverse_one_by_one(block[:1])
        ):
            # The loss is not the same function at each call: only the kept graph is one operator.
            choice.refused.add(way)
            return block[:0]
        choice.record(way, len(block), seconds)
        return products

    def _or_one_by_one(self, way: Way, block: Tensor) -> Tensor:
        """In this way, or one by one over the kept graph where it does not work."""
        if way is Way.ONE_BY_ONE:
            return self._reverse_one_by_one(block)
        try:
            return self._products(way, block)
        except RuntimeError as error:
            # Too little memory, or an operation that vmap cannot batch, if the loop gets
            # through; if not, the fault is another, and both errors are shown.
            try:
                products = self._reverse_one_by_one(block)
            except RuntimeError as fault:
                raise fault from error
            self._refused.add(way)
            return products

    def _way(self, count: int) -> Way:
        """How a block of ``count`` vectors is multiplied."""
        if self.mode == "forward_over_reverse":
            return Way.FORWARD
        if self.mode == "reverse_over_reverse":
            alone = self.chunk_size is None or count == 1 or self._chunk(Way.TOGETHER, count) == 1
            return Way.ONE_BY_ONE if alone else Way.TOGETHER
        best = self._remembered().choice(count, self.device).best
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
            self._memory = remembered(key, lambda: Footprint.of(built.gradients, tensors))
        return self._memory

    def _reverse_one_by_one(self, block: Tensor) -> Tensor:
        built = self._build()
        out = torch.empty_like(block)
        for row, product in zip(block, out, strict=True):
            self._pulled(built.gradients, built.leaves, row, out=product)
        return out

    def _reverse_in_batches(self, block: Tensor) -> Tensor:
        built = self._build()
        out = torch.empty_like(block)
        size = self._chunk(Way.TOGETHER, len(block))
        for rows, products in zip(torch.split(block, size), torch.split(out, size), strict=True):
            self._pulled(built.gradients, built.leaves, rows, batched=True, out=products)
        return out

    def _pulled(
        self,
        gradients: Sequence[Tensor | None],
        leaves: list[Tensor],
        vectors: Tensor,
        *,
        batched: bool = False,
        create: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """d/dp <grad(p), v> on the kept graph of the gradient: one backward pass a product.

        ``vectors`` is one of shape (n,), or with ``batched`` a block that goes through the graph at
        once, by ``vmap``.  The products are written to ``out``, if there is one.
        """
        lead = tuple(vectors.shape[:1]) if batched else ()
        directions = self.layout.split(vectors, lead)
        pairs = [
            (grad, direction)
            for grad, direction in zip(gradients, directions, strict=True)
            if grad is not None and grad.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vectors) if out is None else out.zero_()
        products = torch.autograd.grad(
            [grad for grad, _ in pairs],
            leaves,
            grad_outputs=[direction for _, direction in pairs],
            retain_graph=True,
            create_graph=create,
            is_grads_batched=batched,
            allow_unused=True,
            materialize_grads=True,
        )
        # Leaves that the products do not reach have plain zeros, without the leading dimension.
        flat = [
            product.expand(lead + shape).reshape((*lead, -1)).to(self.dtype)
            for product, shape in zip(products, self.layout.shapes, strict=True)
        ]
        return torch.cat(flat, dim=-1, out=out)

    def _forward_over_reverse(self, block: Tensor) -> Tensor:
        """Forward-mode products of the gradient, batched over the block by vmap."""
        point = self.layout.unflatten_leaves([leaf.detach() for leaf in self._point.params])
        gradient = torch.func.grad(lambda params: self.loss_fn(params, *self.batch).reshape(()))

        def product(vector: Tensor) -> Tensor:
            tangent = self.layout.unflatten(vector)
            directional = torch.func.jvp(gradient, (point,), (tangent,))[1]
            return torch.cat(
                [x.reshape(-1).to(self.dtype) for x in self.layout.leaves_unchecked(directional)]
            )

        with forward_mode("the loss", remedy='mode="reverse_over_reverse"'):
            size = min(self._chunk(Way.FORWARD, len(block)), len(block))
            return torch.func.vmap(product, chunk_size=size)(block).detach()


@dataclass(frozen=True, eq=False)
class _Built:
    """The gradient at a point, with its graph."""

    loss: Tensor
    leaves: list[Tensor]
    gradients: tuple[Tensor | None, ...]


def hessian(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    mode: Mode = "auto",
    chunk_size: ChunkSize = None,
    memory_cap: int = MEMORY_CAP,
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
            products to rounding; but with ``"auto"`` the last digits may depend on timing.  See
            :meth:`HessianOperator.chosen`.
        chunk_size: how many vectors are carried together.  ``"auto"``: as many as
            ``memory_cap`` allows.  None: one in reverse mode, all in forward mode, ``"auto"``
            with ``mode="auto"``.
        memory_cap: bytes that ``"auto"`` plans with for what is carried, beside the block and its
            products: for each vector the tensors that the graph of the gradient has saved, and
            three times the parameters.  One vector is carried even where that is more.

    Returns:
        An operator at the values that ``params`` had when it was made.  It keeps the graph of
        the gradient alive; ``.loss`` is the loss there.  Changes through ``param.data`` go
        unseen and give products of neither point: update under ``torch.no_grad()`` instead.

    Raises:
        LossError: the loss is no real scalar tensor, or does not depend on ``params``.
        NonFiniteError: the loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` have been modified in place since.

    Warns:
        UnusedParameterWarning: the loss does not depend on some leaves; their rows are zero.

    Cost: one forward pass and one gradient with a graph when made; then a product is worth about
    two gradients.  Under ``torch.compile`` its products are part of the graph, without a break.
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
        loss_fn, params, batch, mode=mode, chunk_size=chunk_size, memory_cap=memory_cap
    )


def is_positive(value: object) -> bool:
    """Whether ``value`` is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
