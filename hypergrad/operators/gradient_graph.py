"""The graph of a gradient, kept: each product with the Hessian is a backward pass through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pytree import TreeLayout
from ..transforms import forward_mode
from .evaluation import Evaluation
from .modes import Block
from .point import check_dense, check_loss, report_unused


@dataclass(frozen=True, eq=False)
class GradientGraph:
    """The gradient at a point, with its graph, and the products that go back through it."""

    loss: Tensor
    leaves: list[Tensor]
    gradients: tuple[Tensor | None, ...]
    evaluating: Evaluation

    @classmethod
    def of(
        cls,
        loss_fn: Callable[..., Tensor],
        layout: TreeLayout,
        params: Sequence[Tensor],
        batch: tuple[Any, ...],
        evaluating: Evaluation,
    ) -> GradientGraph:
        """Of ``loss_fn(params, *batch)`` in the leaves ``params``."""
        # Fresh leaves that share storage: the caller's flags and .grad stay untouched.
        leaves = [leaf.detach().requires_grad_() for leaf in params]
        with torch.enable_grad(), evaluating():
            loss = check_loss(loss_fn(layout.unflatten_leaves(leaves), *batch), "the loss")
            evaluating.check(loss)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        check_dense(layout, grads, "the loss")
        report_unused(layout, [grad is None for grad in grads], "the loss")
        return cls(loss.detach(), leaves, grads, evaluating)

    def one_by_one(self, directions: Block, out: Block | None = None) -> Block:
        """The products with a block, a backward pass each, written to ``out`` if there is one."""
        if len(directions[0]) == 1 and out is None:
            with self.evaluating.product():
                products = pulled(self.gradients, self.leaves, [x[0] for x in directions])
            return [x[None] for x in owned(products, directions)]
        out = room_for(directions) if out is None else out
        rows = zip(*(leaf.unbind() for leaf in directions), strict=True)
        for row, into in zip(rows, zip(*(leaf.unbind() for leaf in out), strict=True), strict=True):
            with self.evaluating.product():
                products = pulled(self.gradients, self.leaves, row)
            for leaf, product in zip(into, products, strict=True):
                leaf.copy_(product)
        return out

    def together(self, directions: Block) -> Block:
        """The products with a block in one backward pass, by ``vmap``."""
        remedy = 'chunk_size=1, or mode="auto"'
        first = [leaf[:1] for leaf in directions]
        by_itself = forward_mode("the loss", lambda: self.one_by_one(first), remedy=remedy)
        with by_itself, self.evaluating.product():
            return pulled(self.gradients, self.leaves, directions, batched=True)


def pulled(
    gradients: Sequence[Tensor | None],
    leaves: list[Tensor],
    directions: Sequence[Tensor],
    *,
    batched: bool = False,
    create: bool = False,
) -> list[Tensor]:
    """d/dp <grad(p), v> by leaves, on the kept graph of the gradient: one backward pass a product.

    With ``batched`` each direction has one more leading dimension, and all go through the graph at
    once, by ``vmap``.
    """
    pairs = [
        (grad, direction)
        for grad, direction in zip(gradients, directions, strict=True)
        if grad is not None and grad.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(direction) for direction in directions]
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
    return [
        x if x.shape == like.shape else x.expand(like.shape)
        for x, like in zip(products, directions, strict=True)
    ]


def owned(products: Sequence[Tensor], directions: Block) -> Block:
    """The products in memory of their own: autograd passes some tensors on as they are."""
    taken = {x.untyped_storage()._cdata for x in directions}
    result = []
    for product in products:
        place = product.untyped_storage()._cdata
        copy = place in taken or not product.is_contiguous()
        result.append(product.clone(memory_format=torch.contiguous_format) if copy else product)
        taken.add(place)
    return result


def room_for(directions: Block) -> Block:
    """Memory for the products with a block of directions."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in directions]
