"""Iterative differentiation: the gradient of an outer loss through the steps of an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ..pytree import Tree
from ..solvers.options import check_option, is_count
from .hypergradient import filled, outer_gradients, sum_of_parts
from .optimizers import InnerOptimizer
from .steps import Unrolling, random_state, replayed

UnrollMode = Literal["reverse", "truncated", "forward", "one_step"]


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class UnrolledHypergradient:
    """d/d(outer) of outer_loss(w_T(outer), outer) through T steps of an optimiser, and its parts.

    Attributes:
        grad: ``direct + implicit``, shaped like the outer parameters.
        direct: partial derivative of the outer loss in the outer parameters, at w_T.
        implicit: the part through the steps.
        inner_params: w_T, where the steps ended; detached.
        inner_gradient_norm: |grad_w inner_loss| at w_(T-1), where the last step set out.  How
            far the steps are from a solution, and so the gradient from the implicit one.
        num_differentiated: steps that the gradient went through.
        outer_value: outer_loss at w_T, a detached scalar.
    """

    grad: Tree
    direct: Tree
    implicit: Tree
    inner_params: Tree
    inner_gradient_norm: float
    num_differentiated: int
    outer_value: Tensor


def unrolled_hypergradient(
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[[Tree, Tree], Tensor],
    inner_params: Tree,
    outer_params: Tree,
    *,
    num_steps: int,
    optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer],
    mode: UnrollMode = "reverse",
    truncate: int | None = None,
    checkpoint_every: int | None = None,
    batches: Sequence[Any] | None = None,
) -> UnrolledHypergradient:
    """The gradient of the outer loss through ``num_steps`` steps of an inner optimiser.

    The steps are w_(t+1) = step(w_t, grad_w g(w_t, y)) from w_0 = ``inner_params``, with g the
    inner and f the outer loss; the gradient is that of y -> f(w_T(y), y), whether or not w_T
    solves the inner problem.  The modes differ in what they differentiate and what they hold:

    - ``"reverse"``: all T steps, backwards.  Memory for the graph of ``checkpoint_every`` steps
      and for T / ``checkpoint_every`` copies of the parameters; the steps of a segment are done
      again on the way back.
    - ``"truncated"``: the last ``truncate`` steps, backwards, with w and the optimiser's state
      before them held constant.  What is left out falls by the inner contraction at each step
      (Shaban et al., proposition 3.1).
    - ``"one_step"``: the last step alone: "truncated" with one step (Bolte et al.).  Right in
      the limit for superlinear methods; for gradient descent it is lr times the first term of
      the Neumann series.
    - ``"forward"``: all T steps, forwards, one tangent an outer entry: no graph and no copies,
      for few outer entries.  Needs losses with forward-mode derivatives of their gradients.

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``, with the step's batch
            as third argument where there are ``batches``; a real scalar.
        outer_loss: f, called as ``outer_loss(inner_params, outer_params)``; a real scalar.
        inner_params: w_0, any tree, held constant.  (To learn an initial point, make it a part
            of ``outer_params`` and the inner parameters the offset from it, zero at first.)
        outer_params: y, any tree.
        num_steps: T >= 1.
        optimizer: :class:`hypergrad.SGD`, :class:`hypergrad.Adam` or your own
            :class:`hypergrad.InnerOptimizer`; or a function of the outer parameters that returns
            one, such as ``lambda y: SGD(lr=y["log_lr"].exp())``, to differentiate in its settings.
        mode: see above.
        truncate: how many of the last steps ``"truncated"`` differentiates.
        checkpoint_every: steps a segment for the backward modes; None for the square root of the
            number of differentiated steps, ``num_steps`` for one graph and nothing done again.
            (The caller's random draws are replayed from PyTorch's global generators.)
        batches: one element a step.

    Returns:
        An :class:`UnrolledHypergradient`, detached from any graph.  Nothing is modified.  Leaves
        of ``outer_params`` that nothing uses get zeros.

    Raises:
        SolverOptionError: an option outside its range, ``truncate`` without its mode (or the mode
            without it), fewer batches than steps, or no optimiser.
        LossError: a loss that is no real scalar, or that does not depend on what it must; a step
            that came out differently when it was done again; an operation without a forward-mode
            derivative.
        NonFiniteError: a loss on the way, or a part of the hypergradient, is nan or inf.
        TreeStructureError, LeafTypeError, DeviceError: see :class:`hypergrad.pytree.TreeLayout`.

    Warns:
        UnusedParameterWarning: a leaf that no loss uses, or an implicit part that is zero.

    Cost: T gradients of g; with K differentiated steps, up to K more with a graph and K HVPs
    with their mixed parts.  Forward mode: T gradients and, an outer entry, T HVPs.
    Source: Franceschi, Donini, Frasconi, Pontil, arXiv 1703.01785 (reverse and forward); Shaban,
    Cheng, Hatch, Boots, arXiv 1810.10667 (truncated); Bolte, Pauwels, Vaiter, arXiv 2305.13768
    (one-step).

    Examples:
        One step of 0.5 |w - y|^2 from zero is w = lr y, so F(y) = sum(w) has the gradient lr:

        >>> import torch, hypergrad
        >>> got = hypergrad.unrolled_hypergradient(
        ...     lambda w, y: 0.5 * ((w - y) ** 2).sum(), lambda w, y: w.sum(),
        ...     torch.zeros(2), torch.ones(2), num_steps=1, optimizer=hypergrad.SGD(lr=0.5))
        >>> got.grad, got.inner_params
        (tensor([0.5000, 0.5000]), tensor([0.5000, 0.5000]))
    """
    steps = _differentiated(num_steps, mode, truncate)
    _check_counts(num_steps, checkpoint_every, batches)
    unrolling = Unrolling(inner_loss, inner_params, outer_params, optimizer, batches, num_steps)
    start = unrolling.start()
    random = random_state(unrolling.inner_layout.device)
    if mode == "forward":
        end = unrolling.advance(start, 0, num_steps)
    else:
        every = checkpoint_every or math.isqrt(steps - 1) + 1
        unrolling.record(start, num_steps - steps, num_steps, every)
        end = unrolling.tape[-1].end
    layout, outer_layout = unrolling.inner_layout, unrolling.outer_layout
    final = [leaf.detach().requires_grad_() for leaf in end.params]
    outer_value, v, direct, unused = outer_gradients(
        outer_loss, layout, final, outer_layout, unrolling.outer
    )
    if mode == "forward":
        with replayed(random, layout.device):
            terms = unrolling.forward(start, layout.leaves(v))
    else:
        terms = unrolling.backward(layout.leaves(v))
    unrolling.report_unused(start, terms, unused)
    grad, direct_part, implicit = sum_of_parts(outer_layout, direct, filled(terms, unrolling.outer))
    return UnrolledHypergradient(
        grad=grad,
        direct=direct_part,
        implicit=implicit,
        inner_params=layout.unflatten_leaves([leaf.detach() for leaf in end.params]),
        inner_gradient_norm=unrolling.gradient_norm,
        num_differentiated=steps,
        outer_value=outer_value,
    )


def _differentiated(num_steps: int, mode: str, truncate: int | None) -> int:
    """How many of the last steps the gradient goes through, after checking the options."""
    check_option(is_count(num_steps), "num_steps", num_steps, "an integer >= 1")
    check_option(mode in get_args(UnrollMode), "mode", mode, f"one of {get_args(UnrollMode)}")
    if mode != "truncated":
        expected = 'None, or mode="truncated"'
        check_option(truncate is None, "truncate", truncate, expected)
        return 1 if mode == "one_step" else num_steps
    good = truncate is not None and is_count(truncate) and truncate <= num_steps
    check_option(good, "truncate", truncate, f"an integer from 1 to num_steps = {num_steps}")
    assert truncate is not None
    return truncate


def _check_counts(
    num_steps: int, checkpoint_every: int | None, batches: Sequence[Any] | None
) -> None:
    good = checkpoint_every is None or is_count(checkpoint_every)
    check_option(good, "checkpoint_every", checkpoint_every, "None or an integer >= 1")
    if batches is not None:
        enough = hasattr(batches, "__getitem__") and len(batches) >= num_steps
        check_option(
            enough, "batches", type(batches).__name__, f"a sequence of {num_steps} or more"
        )
