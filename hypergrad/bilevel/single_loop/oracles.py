"""The derivatives that single-loop methods step along, at flat points, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LossError, UnusedParameterWarning, warn
from ...operators.layers import Layers, plain_layers
from ...operators.point import check_dense, check_differentiable, check_loss, report_unused
from ...pytree import TreeLayout

#: ``loss(inner_params, outer_params, *batch)`` -> scalar.
Loss = Callable[..., Tensor]
Batch = tuple[Any, ...]

_IGNORED = (
    "outer_loss depends on neither inner_params nor outer_params. It must compute its value from "
    "its two arguments; a model called directly uses its own parameters instead: call it with "
    "torch.func.functional_call(model, inner_params, inputs)."
)


class Products(NamedTuple):
    """Derivatives of the inner loss g on one batch, flat; a part not asked for is empty."""

    gradient: Tensor  # grad_w g
    hvp: Tensor  # (d2 g / dw dw) v
    cross: Tensor  # (d2 g / dy dw) v


class Oracle:
    """Derivatives of g = inner_loss and f = outer_loss, and how many were taken.

    Every point is detached from the last: no graph outlives the method that made it.

    Attributes:
        num_gradients: gradients so far.
        num_hvps: passes through second derivatives so far.
    """

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        inner_layout: TreeLayout,
        outer_layout: TreeLayout,
        *,
        report: bool,
    ) -> None:
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.inner_layout, self.outer_layout = inner_layout, outer_layout
        self.report = report  # warn of unused parameters, at the first step only
        self.num_gradients = 0
        self.num_hvps = 0

    def inner_gradient(self, w: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """grad_w g: one gradient."""
        inner, outer = self._leaves(w, y)
        with torch.enable_grad(), plain_layers():
            loss = self._inner_value(inner, outer, batch)
            grads = torch.autograd.grad(loss, inner, allow_unused=True)
        self._report_inner(grads)
        self.num_gradients += 1
        return _flat(grads, inner, w)

    def both_inner_gradients(self, w: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """grad_w g and grad_y g: one gradient."""
        inner, outer = self._leaves(w, y)
        with torch.enable_grad(), plain_layers():
            loss = self._inner_value(inner, outer, batch)
            grads = torch.autograd.grad(loss, inner + outer, allow_unused=True)
        self._report_inner(grads[: len(inner)])
        self._report_cross(grads[len(inner) :])
        self.num_gradients += 1
        return _flat(grads[: len(inner)], inner, w), _flat(grads[len(inner) :], outer, y)

    def outer_gradients(self, w: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """grad_w f and grad_y f: one gradient."""
        inner, outer = self._leaves(w, y)
        with torch.enable_grad(), plain_layers():
            loss = self.outer_loss(
                self.inner_layout.unflatten_leaves(inner),
                self.outer_layout.unflatten_leaves(outer),
                *batch,
            )
            if isinstance(loss, Tensor) and not loss.requires_grad:
                raise LossError(_IGNORED)
            grads = torch.autograd.grad(
                check_loss(loss, "outer_loss"), inner + outer, allow_unused=True
            )
        if all(grad is None for grad in grads):
            raise LossError(_IGNORED)
        if self.report and all(grad is None for grad in grads[: len(inner)]):
            warn(
                "outer_loss does not depend on inner_params, so the hypergradient has no implicit "
                "part.",
                UnusedParameterWarning,
            )
        self.num_gradients += 1
        return _flat(grads[: len(inner)], inner, w), _flat(grads[len(inner) :], outer, y)

    def inner_products(
        self, w: Tensor, y: Tensor, v: Tensor, batch: Batch, *, hvp: bool, cross: bool
    ) -> Products:
        """grad_w g, H v and (d2 g / dy dw) v on one graph: one gradient and one more pass.

        The last two are the gradient in (w, y) of <grad_w g(w, y), v>, so that both together
        cost one pass through the graph of the gradient.
        """
        inner, outer = self._leaves(w, y)
        wanted = (inner if hvp else []) + (outer if cross else [])
        layers = Layers()
        with torch.enable_grad(), plain_layers(layers):
            loss = self._inner_value(inner, outer, batch)
            grads = torch.autograd.grad(loss, inner, create_graph=True, allow_unused=True)
        self._report_inner(grads)
        # Leaves in which g is linear have a gradient without a graph: their products are zero.
        pairs = [
            (grad, direction)
            for grad, direction in zip(grads, self.inner_layout.split(v), strict=True)
            if grad is not None and grad.requires_grad
        ]
        products: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if pairs:
            with plain_layers(layers):
                products = torch.autograd.grad(
                    [grad for grad, _ in pairs],
                    wanted,
                    grad_outputs=[direction for _, direction in pairs],
                    allow_unused=True,
                )
        self.num_gradients += 1
        self.num_hvps += 1
        split = len(inner) if hvp else 0
        on_inner, on_outer = products[:split], products[split:]
        if cross:
            self._report_cross(on_outer)
        return Products(
            _flat(grads, inner, w),
            _flat(on_inner, inner, w) if hvp else w.new_empty(0),
            _flat(on_outer, outer, y) if cross else y.new_empty(0),
        )

    def _leaves(self, w: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves.  All need a gradient, so that a loss that works in place on one raises."""
        inner = [leaf.detach().requires_grad_() for leaf in self.inner_layout.split(w)]
        outer = [leaf.detach().requires_grad_() for leaf in self.outer_layout.split(y)]
        check_differentiable(inner + outer)
        return inner, outer

    def _inner_value(self, inner: list[Tensor], outer: list[Tensor], batch: Batch) -> Tensor:
        loss = self.inner_loss(
            self.inner_layout.unflatten_leaves(inner),
            self.outer_layout.unflatten_leaves(outer),
            *batch,
        )
        return check_loss(loss, "inner_loss")

    def _report_inner(self, grads: tuple[Tensor | None, ...]) -> None:
        check_dense(self.inner_layout, grads, "inner_loss")
        unused = [grad is None for grad in grads]
        if self.report or all(unused):
            report_unused(self.inner_layout, unused, "inner_loss")

    def _report_cross(self, on_outer: tuple[Tensor | None, ...]) -> None:
        if self.report and all(part is None for part in on_outer):
            warn(
                "what inner_loss makes of inner_params does not depend on outer_params, so the "
                "hypergradient has no implicit part.",
                UnusedParameterWarning,
            )


def _flat(grads: tuple[Tensor | None, ...], leaves: list[Tensor], like: Tensor) -> Tensor:
    """Gradients as one vector of ``like``'s dtype; zeros for unused leaves; no graph."""
    pieces = [
        like.new_zeros(leaf.numel()) if grad is None else grad.detach().reshape(-1).to(like.dtype)
        for grad, leaf in zip(grads, leaves, strict=True)
    ]
    return torch.cat(pieces)
