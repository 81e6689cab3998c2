"""The graph of a gradient, kept: each product with the Hessian is a backward pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .modes import Block


@dataclass(frozen=True, eq=False)
class GradientGraph:
    """The gradient at a point, with its graph."""

    loss: Tensor
    leaves: list[Tensor]
    gradients: tuple[Tensor | None, ...]


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
    taken = {x.untyped_storage().data_ptr() for x in directions}
    result = []
    for product in products:
        place = product.untyped_storage().data_ptr()
        copy = place in taken or not product.is_contiguous()
        result.append(product.clone(memory_format=torch.contiguous_format) if copy else product)
        taken.add(place)
    return result
