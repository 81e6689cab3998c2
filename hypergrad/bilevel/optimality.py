"""What makes a point the inner solution: F(w, y) = 0, with F a gradient, a root or a fixed point.

The implicit theorem asks two things of it, products with A = dF/dw and the gradient of <F, u> in
y, and both of them differentiable again.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..errors import LossError
from ..operators import LinearOperator, hessian
from ..operators.layers import Layers, plain_layers
from ..operators.point import Point, check_dense, check_loss
from ..pytree import Tree, TreeLayout
from ..transforms import building_no_graph, tangents

Map = Callable[[Tree, Tree], Tree]


class Optimality(ABC):
    """F, on flat inner parameters.

    Attributes:
        name: what the caller gave, for messages.
    """

    name: str

    def __init__(self) -> None:
        self.layers = Layers()

    def evaluated(self) -> AbstractContextManager[None]:
        """The setting in which F is evaluated, and passed through backwards."""
        return plain_layers(self.layers)

    @abstractmethod
    def residual(self, layout: TreeLayout, w: Tensor, outer: Tree) -> Tensor:
        """F(w, y), shape (n,), differentiable in both arguments, any number of times."""

    @abstractmethod
    def derivative(self, layout: TreeLayout, w: Tensor, outer: Tree) -> LinearOperator:
        """dF/dw, an operator that lists w and the leaves of y among its tensors."""

    @abstractmethod
    def adjoint(self, derivative: LinearOperator) -> LinearOperator:
        """The operator of the transpose."""


class Minimum(Optimality):
    """F = grad_w of the inner loss; dF/dw is its Hessian, which is symmetric."""

    name = "inner_loss"

    def __init__(self, inner_loss: Callable[[Tree, Tree], Tensor]) -> None:
        super().__init__()
        self.inner_loss = inner_loss

    def residual(self, layout: TreeLayout, w: Tensor, outer: Tree) -> Tensor:
        """The gradient of the inner loss, zero in leaves that it does not use."""
        leaves = layout.split(w)
        if building_no_graph() or tangents():
            gradient = torch.func.grad(lambda params: self.inner_loss(params, outer).reshape(()))
            with self.evaluated():
                image = gradient(layout.unflatten_leaves(leaves))
            grads: Sequence[Tensor | None] = layout.leaves_unchecked(image)
        else:
            # Plain autograd where it can be: it also takes losses that write to their buffers.
            leaves = [
                x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in leaves
            ]
            with torch.enable_grad(), self.evaluated():
                value = self.inner_loss(layout.unflatten_leaves(leaves), outer)
                loss = check_loss(value, self.name)
                grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            check_dense(layout, grads, self.name)
        filled = [
            torch.zeros_like(x) if grad is None else grad
            for grad, x in zip(grads, leaves, strict=True)
        ]
        return torch.cat([grad.reshape(-1).to(layout.dtype) for grad in filled])

    def derivative(self, layout: TreeLayout, w: Tensor, outer: Tree) -> LinearOperator:
        """Its Hessian."""
        return hessian(self.inner_loss, layout.unflatten(w), outer)

    def adjoint(self, derivative: LinearOperator) -> LinearOperator:
        """The Hessian itself."""
        return derivative


class Root(Optimality):
    """F as it was given."""

    name = "root"

    def __init__(self, function: Map) -> None:
        super().__init__()
        self.function = function

    def residual(self, layout: TreeLayout, w: Tensor, outer: Tree) -> Tensor:
        """The map's output, which must be a tree like the inner parameters."""
        with self.evaluated():
            image = self.function(layout.unflatten(w), outer)
        return layout.rows(image, name=f"the output of {self.name}")[0]

    def derivative(self, layout: TreeLayout, w: Tensor, outer: Tree) -> LinearOperator:
        """Its Jacobian."""
        return _Jacobian(self, layout, w, outer)

    def adjoint(self, derivative: LinearOperator) -> LinearOperator:
        """The Jacobian transposed."""
        return derivative._transposed()


class FixedPoint(Root):
    """F(w, y) = w - T(w, y)."""

    name = "fixed_point"

    def residual(self, layout: TreeLayout, w: Tensor, outer: Tree) -> Tensor:
        """What the map moves a point by, with the other sign."""
        return w - super().residual(layout, w, outer)


class _Jacobian(LinearOperator):
    """J = dF/dw, which need not be symmetric, or its transpose.

    J' u is one backward pass; J v is the derivative of c -> J' c, which is linear, along v: two
    backward passes, and no operation needs a forward-mode derivative.
    """

    def __init__(self, function: Root, layout: TreeLayout, w: Tensor, outer: Tree) -> None:
        super().__init__(layout)
        self.function, self.is_transposed = function, False
        self._point = Point([w], (outer,))
        self._built: tuple[Tensor, Tensor] | None = None

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built = self._point.replaced(tensors), None
        return other

    def _transposed(self) -> LinearOperator:
        other = copy.copy(self)
        other.is_transposed = not self.is_transposed
        return other

    def _depends_on_more(self) -> bool:
        # Closures are looked for where F is first evaluated; here only what transforms bring.
        return (building_no_graph() or tangents()) and self._point.depends_on_more(self)

    def _apply(self, block: Tensor) -> Tensor:
        if building_no_graph():
            return self._functional(block).detach()
        if self._built is None:
            w = self._point.params[0].detach().requires_grad_()
            with torch.enable_grad():
                self._built = w, self._image(w)
        w, image = self._built
        with self.function.evaluated():
            return self._rows(w, image, block, create=False).detach()

    def _attached(self, block: Tensor) -> Tensor:
        if building_no_graph() or tangents():
            return self._functional(block)
        w = self._point.params[0]
        w = w.view_as(w) if w.requires_grad else w.detach().requires_grad_()
        with torch.enable_grad(), self.function.evaluated():
            return self._rows(w, self._image(w), block, create=True)

    def _image(self, w: Tensor) -> Tensor:
        image = self.function.residual(self.layout, w, self._point.batch[0])
        return check_attached(image, self.function.name)

    def _rows(self, w: Tensor, image: Tensor, block: Tensor, *, create: bool) -> Tensor:
        def pulled(direction: Tensor, create: bool) -> Tensor:
            (row,) = torch.autograd.grad(
                image,
                w,
                direction,
                retain_graph=True,
                create_graph=create,
                allow_unused=True,
                materialize_grads=True,
            )
            return row

        if self.is_transposed:
            return torch.stack([pulled(row, create) for row in block])
        with torch.enable_grad():
            cotangent = torch.zeros_like(image).detach().requires_grad_()
            linear = pulled(cotangent, True)
            if not linear.requires_grad:  # F does not depend on w
                return torch.zeros_like(block)
            pushed = [
                torch.autograd.grad(
                    linear,
                    cotangent,
                    row,
                    retain_graph=True,
                    create_graph=create,
                    allow_unused=True,
                    materialize_grads=True,
                )[0]
                for row in block
            ]
        return torch.stack(pushed)

    def _functional(self, block: Tensor) -> Tensor:
        w, outer = self._point.params[0], self._point.batch[0]
        pair = torch.func.vjp(lambda x: self.function.residual(self.layout, x, outer), w)
        image, pull = pair[0], pair[1]
        if self.is_transposed:
            return torch.stack([pull(row)[0] for row in block.unbind()])
        push = torch.func.vjp(lambda c: pull(c)[0], torch.zeros_like(image))[1]
        return torch.stack([push(row)[0] for row in block.unbind()])


def check_attached(image: Tensor, name: str) -> Tensor:
    """Raise unless the output of a map carries a graph."""
    if not image.requires_grad:
        raise LossError(
            f"{name} does not depend on its arguments: its output carries no gradient. It must "
            "compute it from inner_params and outer_params with differentiable operations, "
            "without .detach(), .item() or torch.no_grad()."
        )
    return image


def optimality(inner_loss: Any, root: Any, fixed_point: Any) -> Optimality:
    """F from the one of the three that was given."""
    given = {"inner_loss": inner_loss, "root": root, "fixed_point": fixed_point}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1 or not all(callable(value) for value in named.values()):
        got = ", ".join(f"{name}={value!r}" for name, value in named.items()) or "none of them"
        raise LossError(
            "implicit takes exactly one of inner_loss, root and fixed_point, a function of "
            f"(inner_params, outer_params); got {got}."
        )
    if inner_loss is not None:
        return Minimum(inner_loss)
    return Root(root) if root is not None else FixedPoint(fixed_point)
