"""Products with a Hessian by PyTorch's function transforms, which keep no graph of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pytree import TreeLayout
from ..transforms import forward_mode
from .evaluation import Evaluation
from .modes import Block


class TransformedLoss:
    """The Hessian of ``loss_fn(params, *batch)``, its gradient evaluated anew for each block.

    They run where autograd's own graph cannot be had: under another transform, and in a graph that
    is being traced.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        layout: TreeLayout,
        params: list[Tensor],
        batch: tuple[Any, ...],
        evaluating: Evaluation,
    ) -> None:
        self.layout, self.params, self.evaluating = layout, params, evaluating
        self.gradient = torch.func.grad(lambda point: loss_fn(point, *batch).reshape(()))

    def in_reverse(self, block: Tensor) -> Tensor:
        """Reverse over reverse: the products with a flat block, a backward pass each."""
        point = self.layout.unflatten_leaves(self.params)
        with self.evaluating():
            pull = torch.func.vjp(self.gradient, point)[1]
        rows = []
        for row in block.unbind():
            with self.evaluating.product():
                (product,) = pull(self.layout.unflatten(row))
            leaves = self.layout.leaves_unchecked(product)
            rows.append(torch.cat([x.reshape(-1).to(self.layout.dtype) for x in leaves]))
        return torch.stack(rows)

    def forward(self, directions: Block, in_reverse: Callable[[], object]) -> Block:
        """Forward over reverse: the products with a block by leaves together, by ``vmap``.

        ``in_reverse`` makes one of them in another way; where that works and this does not, the
        error says what to ask for instead.
        """
        point = self.layout.unflatten_leaves([leaf.detach() for leaf in self.params])

        def product(*leaves: Tensor) -> list[Tensor]:
            tangent = self.layout.unflatten_leaves(list(leaves))
            with self.evaluating():
                directional = torch.func.jvp(self.gradient, (point,), (tangent,))[1]
            return self.layout.leaves_unchecked(directional)

        with forward_mode("the loss", in_reverse, remedy='mode="reverse_over_reverse"'):
            products: Block = torch.func.vmap(product, randomness="same")(*directions)
        return [leaf.detach() for leaf in products]
