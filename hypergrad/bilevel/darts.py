"""DARTS: one inner step, and its mixed derivative by a finite difference of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnusedParameterWarning, warn
from ..norms import row_norms
from ..operators.layers import plain_layers
from ..operators.point import check_loss, report_unused
from ..precision import working_dtype
from ..pytree import Tree
from ..solvers.options import check_option, is_tolerance
from .hypergradient import (
    Loss,
    filled,
    fresh_leaves,
    layouts,
    outer_gradients,
    report_unused_outer,
    sum_of_parts,
)
from .unroll import UnrolledHypergradient


def darts_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Tree,
    outer_params: Tree,
    *,
    step_size: float,
    epsilon: float = 0.01,
) -> UnrolledHypergradient:
    """The gradient through one step of gradient descent, without second derivatives.

    With w' = w - step_size grad_w g(w, y), v = grad_w f(w', y) and w+- = w +- e v, e =
    ``epsilon`` / |v|,

        grad = grad_y f(w', y) - step_size (grad_y g(w+, y) - grad_y g(w-, y)) / 2e.

    It is :func:`hypergrad.unrolled_hypergradient` of one step of ``SGD(lr=step_size)``, up to
    the difference's truncation (of order ``epsilon`` squared) and rounding (of order eps /
    ``epsilon``): for losses without double backward, and for comparisons.

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``; the same at each call.
        outer_loss: f, called the same way.
        inner_params: w, any tree.
        outer_params: y, any tree.
        step_size: of the inner step, > 0.
        epsilon: length of the way on either side of w, > 0.

    Returns:
        An :class:`hypergrad.UnrolledHypergradient` with w' as ``inner_params``.

    Raises:
        SolverOptionError: a ``step_size`` or ``epsilon`` that is no finite number > 0.
        HypergradError: see :func:`hypergrad.unrolled_hypergradient`.

    Warns:
        UnusedParameterWarning: a leaf that no loss uses, or an implicit part that is zero.

    Cost: a gradient of f and three of g.
    Source: Liu, Simonyan, Yang, arXiv 1806.09055, equations (7) and (8).

    Examples:
        >>> import torch, hypergrad
        >>> got = hypergrad.darts_hypergradient(
        ...     lambda w, y: 0.5 * ((w - y) ** 2).sum(), lambda w, y: w.sum(),
        ...     torch.zeros(2), torch.ones(2), step_size=0.5)
        >>> got.grad, got.inner_params
        (tensor([0.5000, 0.5000]), tensor([0.5000, 0.5000]))
    """
    for name, value in (("step_size", step_size), ("epsilon", epsilon)):
        good = is_tolerance(value) and value > 0
        check_option(good, name, value, "a finite number > 0")
    layout, outer_layout = layouts(inner_params, outer_params)
    inner = fresh_leaves(layout, inner_params, "inner_params")
    outer = fresh_leaves(outer_layout, outer_params, "outer_params")
    outer_tree = outer_layout.unflatten_leaves(outer)
    dtype = working_dtype(layout.dtype, layout.device)

    def inner_gradient(at: Tree, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), plain_layers():
            loss = check_loss(inner_loss(at, outer_tree), "inner_loss")
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(loss, leaves, allow_unused=True)
        return grads

    grads = inner_gradient(layout.unflatten_leaves(inner), inner)
    report_unused(layout, [grad is None for grad in grads], "inner_loss")
    slope = layout.flatten(layout.unflatten_leaves(filled(grads, inner))).to(dtype)
    base = layout.flatten(inner_params).to(dtype)
    moved = layout.unflatten((base - step_size * slope).to(layout.dtype))
    final = [leaf.requires_grad_() for leaf in layout.leaves(moved)]
    outer_value, v_tree, direct, unused = outer_gradients(
        outer_loss, layout, final, outer_layout, outer
    )
    v = layout.flatten(v_tree).to(dtype)
    size = float(row_norms(v[None]))

    implicit = [torch.zeros_like(leaf.detach()) for leaf in outer]
    if size > 0:
        ends = []
        for sign in (1.0, -1.0):
            side = (base + (sign * epsilon / size) * v).to(layout.dtype).requires_grad_()
            ends.append(inner_gradient(layout.unflatten(side), outer))
        silent = [up is None and down is None for up, down in zip(*ends, strict=True)]
        if all(silent):
            warn(
                "the step on inner_loss does not depend on outer_params, so the implicit part is "
                "zero.",
                UnusedParameterWarning,
            )
        else:
            both = [no and direct_no for no, direct_no in zip(silent, unused, strict=True)]
            report_unused_outer(outer_layout, both)
        factor = -step_size * size / (2.0 * epsilon)
        implicit = [
            factor * (up - down)
            for up, down in zip(filled(ends[0], outer), filled(ends[1], outer), strict=True)
        ]
    grad, direct_part, implicit_part = sum_of_parts(outer_layout, direct, implicit)
    return UnrolledHypergradient(
        grad=grad,
        direct=direct_part,
        implicit=implicit_part,
        inner_params=layout.unflatten_leaves([leaf.detach() for leaf in final]),
        inner_gradient_norm=float(row_norms(slope[None])),
        num_differentiated=1,
        outer_value=outer_value,
    )
