"""The implicit hypergradient of a bilevel problem, from its two losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, LossError, NonFiniteError, UnusedParameterWarning, warn
from ..operators import hessian
from ..operators.layers import plain_layers
from ..operators.point import check_differentiable, check_loss
from ..pytree import Tree, TreeLayout
from ..solvers import CG, Solution, SolveInfo, Solver, solve
from ..solvers.options import Damping

Loss = Callable[[Tree, Tree], Tensor]
Gradients = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class Hypergradient:
    """dF/d(outer) of F(outer) = outer_loss(inner*(outer), outer), and its parts.

    Attributes:
        grad: ``direct + implicit``, shaped like the outer parameters.
        direct: partial derivative of the outer loss in the outer parameters.
        implicit: the part through the inner solution.
        ihvp: (H + damping I)^-1 grad_inner outer_loss, shaped like the inner parameters.
        info: how right ``ihvp`` is and what it cost.
        outer_value: outer_loss at the parameters given, a detached scalar: what a loop logs.
    """

    grad: Tree
    direct: Tree
    implicit: Tree
    ihvp: Tree
    info: SolveInfo
    outer_value: Tensor


def hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Tree,
    outer_params: Tree,
    *,
    solver: Solver | None = None,
    damping: Damping | None = None,
    x0: Tree | None = None,
) -> Hypergradient:
    """The gradient of the outer loss through the inner solution, by the implicit theorem.

    At an inner solution w* of min over w of g(w, y), with f the outer loss,

        dF/dy = grad_y f - (d2 g / dy dw) (d2 g / dw dw + damping I)^-1 grad_w f.

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``; a real scalar.
        outer_loss: f, called as ``outer_loss(inner_params, outer_params)``; a real scalar.
        inner_params: w*, any tree: what your own loop found.  Not modified, no flag changed.
            (Losses are called as they are: a BatchNorm in training mode advances its statistics.)
            Each loss is called once, so that a minibatch or a dropout mask that it draws is one
            for the whole call: all products are those of one matrix.
        outer_params: y, any tree.
        solver: how the linear system is solved: ``CG()`` (if None), ``Nystrom(rank=20)``, ...; a
            :class:`hypergrad.ReusedSketch` carries a sketch from outer step to outer step.
        damping: see :func:`hypergrad.solve`.
        x0: warm start for the linear system, shaped like ``inner_params``, such as the ``ihvp``
            of the step before.

    Returns:
        A :class:`Hypergradient`.  Leaves of ``outer_params`` that neither loss uses get zeros.

    Raises:
        LossError: a loss that is no real scalar, that depends on neither argument, or an inner
            loss that does not depend on ``inner_params``.
        NonFiniteError: a part of the hypergradient holds nan or inf.
        DeviceError: the two trees are on different devices.
        HypergradError: see :func:`hypergrad.solve`.

    Warns:
        ConvergenceWarning: the linear solve failed; ``info`` says how.
        UnusedParameterWarning: a loss ignores the argument that would make the implicit part
            other than zero, or neither uses some leaves of ``outer_params``.

    Cost: a gradient of each loss, one more gradient-sized pass for the mixed derivative, and the
    solver's HVPs.
    Source: Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 12
    (2000); Pedregosa, arXiv 1602.02355, equation (4).

    Examples:
        The inner solution of 0.5 |w - y|^2 is w = y, so F(y) = sum(w^3) has gradient 3 y^2:

        >>> import torch, hypergrad
        >>> y = torch.tensor([1.0, 2.0])
        >>> inner = lambda w, y: 0.5 * ((w - y) ** 2).sum()
        >>> outer = lambda w, y: (w**3).sum()
        >>> got = hypergrad.hypergradient(inner, outer, y.clone(), y)
        >>> got.grad, got.outer_value
        (tensor([ 3., 12.]), tensor(9.))
    """
    point = BilevelPoint(inner_loss, outer_loss, inner_params, outer_params)
    with torch.no_grad():  # only the value is of use: its own derivative is not asked for
        solution = solve(point.curvature, point.v, solver or CG(), damping=damping, x0=x0)
    return point.assemble(solution)


class BilevelPoint:
    """The derivatives of both losses at one point: all that the implicit theorem multiplies.

    Attributes:
        inner_layout: layout of the inner parameters.
        outer_layout: layout of the outer parameters.
        outer_value: f, a detached scalar.
        v: grad_w f, a tree.
        inner: w as fresh leaves, in the order of ``inner_layout``.
        outer: y as fresh leaves, in the order of ``outer_layout``.
        direct: grad_y f, leaves in that order.
        curvature: d2 g / dw dw, with the graph of grad_w g.
    """

    def __init__(
        self, inner_loss: Loss, outer_loss: Loss, inner_params: Tree, outer_params: Tree
    ) -> None:
        self.inner_layout, self.outer_layout = layouts(inner_params, outer_params)
        self.inner = inner = fresh_leaves(self.inner_layout, inner_params, "inner_params")
        self.outer = fresh_leaves(self.outer_layout, outer_params, "outer_params")
        outer_tree = self.outer_layout.unflatten_leaves(self.outer)
        self.outer_value, self.v, self.direct, self._unused = outer_gradients(
            outer_loss, self.inner_layout, inner, self.outer_layout, self.outer
        )
        # The operator's gradient graph also reaches the outer leaves, which makes the mixed term
        # free.
        with _said_of("inner_loss"):
            self.curvature = hessian(
                lambda w: inner_loss(w, outer_tree), self.inner_layout.unflatten_leaves(inner)
            )

    @property
    def inner_gradient(self) -> Tree:
        """grad_w g, which is zero at an inner solution."""
        leaves = filled(self.curvature.gradients, self.inner)
        return self.inner_layout.unflatten_leaves(leaves)

    def mixed(self, x: Tree) -> list[Tensor | None]:
        """(d2 g / dy dw) x, as the gradient in y of <grad_w g, x>; None where g has no such y."""
        directions = self.inner_layout.leaves(x, name="ihvp")
        pairs = [
            (gradient, direction)
            for gradient, direction in zip(self.curvature.gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not pairs:
            return [None] * len(self.outer)
        return list(
            torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                self.outer,
                grad_outputs=[direction for _, direction in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        )

    def mixed_transposed(self, u: Tree) -> Tree:
        """(d2 g / dw dy) u, an inner tree: :meth:`mixed` is linear, and this is its transpose."""
        used = [
            gradient is not None and gradient.requires_grad for gradient in self.curvature.gradients
        ]
        zeros = [torch.zeros_like(leaf) for leaf in self.inner]
        directions = [zero.requires_grad_() for zero in zeros]
        with torch.enable_grad():
            images: Gradients = ()
            if any(used):
                images = torch.autograd.grad(
                    [g for g in self.curvature.gradients if g is not None and g.requires_grad],
                    self.outer,
                    grad_outputs=[d for d, yes in zip(directions, used, strict=True) if yes],
                    create_graph=True,
                    allow_unused=True,
                )
            pairs = [
                (image, leaf)
                for image, leaf in zip(images, self.outer_layout.leaves(u), strict=False)
                if image is not None and image.requires_grad
            ]
            back: Gradients = (None,) * len(directions)
            if pairs:
                back = torch.autograd.grad(
                    [image for image, _ in pairs],
                    directions,
                    grad_outputs=[leaf for _, leaf in pairs],
                    allow_unused=True,
                )
        return self.inner_layout.unflatten_leaves(filled(back, directions))

    def assemble(self, solution: Solution) -> Hypergradient:
        """The hypergradient, from the solution of the linear system with ``v``."""
        mixed = self.mixed(solution.value)
        if all(term is None for term in mixed):
            warn(
                "the gradient of inner_loss in inner_params does not depend on outer_params, so "
                "the implicit part is zero.",
                UnusedParameterWarning,
            )
        else:
            unused = [no and term is None for no, term in zip(self._unused, mixed, strict=True)]
            report_unused_outer(self.outer_layout, unused)
        implicit = [-term for term in filled(mixed, self.outer)]
        grad, direct_part, implicit_part = sum_of_parts(self.outer_layout, self.direct, implicit)
        return Hypergradient(
            grad=grad,
            direct=direct_part,
            implicit=implicit_part,
            ihvp=solution.value,
            info=solution.info,
            outer_value=self.outer_value,
        )


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Say which of two losses it is that an operator complains of."""
    try:
        yield
    except (LossError, NonFiniteError) as error:
        raise type(error)(f"{name}: {error}") from error


def layouts(inner_params: Tree, outer_params: Tree) -> tuple[TreeLayout, TreeLayout]:
    """The layouts of both levels, on one device."""
    inner = TreeLayout.of(inner_params, name="inner_params")
    outer = TreeLayout.of(outer_params, name="outer_params")
    if inner.device != outer.device:
        raise DeviceError(
            f"inner_params is on {inner.device}, outer_params on {outer.device}; "
            "move them to one device."
        )
    return inner, outer


def fresh_leaves(layout: TreeLayout, tree: Tree, name: str) -> list[Tensor]:
    """Fresh leaves sharing storage, so that the caller's flags and .grad stay untouched."""
    check_differentiable(layout.leaves(tree, name=name))
    layout.check_finite(layout.flatten(tree, name=name), name)
    return [leaf.detach().requires_grad_() for leaf in layout.leaves(tree, name=name)]


def outer_gradients(
    outer_loss: Loss,
    inner_layout: TreeLayout,
    inner: list[Tensor],
    outer_layout: TreeLayout,
    outer: list[Tensor],
) -> tuple[Tensor, Tree, list[Tensor], list[bool]]:
    """f, grad_w f as a tree, the leaves of grad_y f, and which of those f does not use."""
    with torch.enable_grad(), plain_layers():
        loss = _outer_value(
            outer_loss, inner_layout.unflatten_leaves(inner), outer_layout.unflatten_leaves(outer)
        )
        grads = torch.autograd.grad(loss, inner + outer, allow_unused=True)
    of_inner, of_outer = grads[: len(inner)], grads[len(inner) :]
    _report_ignored(of_inner, of_outer)
    v = inner_layout.unflatten_leaves(filled(of_inner, inner))
    unused = [grad is None for grad in of_outer]
    return loss.detach(), v, filled(of_outer, outer), unused


def sum_of_parts(
    layout: TreeLayout, direct: list[Tensor], implicit: list[Tensor]
) -> tuple[Tree, Tree, Tree]:
    """Trees of the whole hypergradient and of its two parts, each checked to be finite."""
    trees = [layout.unflatten_leaves(leaves) for leaves in (direct, implicit)]
    for name, tree in zip(("direct", "implicit"), trees, strict=True):
        layout.check_finite(layout.flatten(tree), f"the {name} part")
    total = [d + i for d, i in zip(direct, implicit, strict=True)]
    return layout.unflatten_leaves(total), trees[0], trees[1]


def report_unused_outer(layout: TreeLayout, unused: list[bool]) -> None:
    """Warn of outer leaves that neither loss uses, by name."""
    names = [path or "the tensor" for path, no in zip(layout.paths, unused, strict=True) if no]
    if names:
        warn(
            f"neither loss depends on {', '.join(names)} of outer_params: the hypergradient there "
            "is zero. Leave unused parameters out.",
            UnusedParameterWarning,
        )


def _report_ignored(inner: Gradients, outer: Gradients) -> None:
    """Say when the outer loss ignores an argument: mostly a model that uses its own parameters."""
    if any(grad is not None for grad in inner):
        return
    if all(grad is None for grad in outer):
        raise LossError(
            "outer_loss depends on neither inner_params nor outer_params. It must compute its "
            "value from its two arguments; a model called directly uses its own parameters "
            "instead: call it with torch.func.functional_call(model, inner_params, inputs)."
        )
    warn(
        "outer_loss does not depend on inner_params, so the implicit part is zero.",
        UnusedParameterWarning,
    )


def filled(grads: Gradients, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros for unused leaves; no graph."""
    return [
        torch.zeros_like(leaf.detach()) if grad is None else grad.detach()
        for grad, leaf in zip(grads, leaves, strict=True)
    ]


def _outer_value(outer_loss: Loss, inner: Tree, outer: Tree) -> Tensor:
    loss = outer_loss(inner, outer)
    if isinstance(loss, Tensor) and not loss.requires_grad:
        raise LossError(
            "outer_loss depends on neither inner_params nor outer_params: it carries no gradient. "
            "It must compute its value from its two arguments with differentiable operations."
        )
    return check_loss(loss, "outer_loss")
