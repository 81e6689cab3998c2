"""Answers that carry a graph: the implicit derivative of a solve, by further solves.

With S = (A + damping I)^-1 and x = S v,

    dx = S (dv - dA x - d(damping) x),

so that for a cotangent g and u = S' g the gradients are u in v, -d(u'A x) in the tensors of A and
-u'x in the damping.  Both directions are solves with the same configuration, and those are
differentiable again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DifferentiationError
from ..transforms import (
    apply,
    below_tangents,
    differentiable,
    pullback,
    pushforward,
    recording,
    tangents,
    transforming,
)
from .run import BlockSolve

_REMEDY = (
    "Pass what the product depends on where a solve can see it: the matrix itself as operator, or "
    "hypergrad.hessian(loss_fn, params, *batch) with those tensors in params or batch; or solve "
    "with detached tensors"
)


def answer(call: BlockSolve, block: Tensor, start: Tensor | None, damping: Tensor | None) -> Tensor:
    """The answers to a block of right-hand sides, attached where something is differentiated.

    Raises:
        DifferentiationError: the operator depends on tensors that it does not list, in a way
            whose derivatives could not be made right.
    """
    operator = call.operator
    tensors = operator._tensors()
    if transforming():
        if operator._depends_on_more():
            raise DifferentiationError(
                "the operator's products depend on tensors that a torch.func transform runs over, "
                f"or that require grad, through a closure. {_REMEDY}."
            )
        return _solved(call, block, start, damping, tensors)
    inputs = [block, *tensors] if damping is None else [block, damping, *tensors]
    if any(differentiable(tensor) for tensor in inputs):
        x = _solved(call, block, start, damping, tensors)
    else:
        x = call.run(block, start, damping, tensors)
    if not recording():
        return x
    depends = operator._depends_on_more()
    if depends is None:  # v = 0 is answered without a product
        call.hvps.append(operator._look())
        depends = operator._depends_on_more()
    if depends:
        if tangents():
            raise DifferentiationError(
                f"the operator's products carry forward-mode tangents through a closure. {_REMEDY}."
            )
        x = _attached_to_closure(call, x.detach(), block, damping, orders=2)
    return x


def _solved(
    call: BlockSolve,
    block: Tensor,
    start: Tensor | None,
    damping: Tensor | None,
    tensors: list[Tensor],
) -> Tensor:
    return apply(_Solve, call, block, start, damping, *tensors)


class _Solve(torch.autograd.Function):
    """(A + damping I)^-1 of a block, as a function of the block, the damping and A's tensors."""

    @staticmethod
    def forward(
        call: BlockSolve,
        block: Tensor,
        start: Tensor | None,
        damping: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        return call.run(block, start, damping, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, _, _, damping, *tensors = inputs
        ctx.save_for_backward(output, damping, *tensors)
        ctx.save_for_forward(output, damping, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, damping, *tensors = ctx.saved_tensors
        call: BlockSolve = ctx.call
        u = _solved(call.following(adjoint=True), grad, None, damping, tensors)
        in_damping = -(u * x).sum().to(damping.dtype) if ctx.needs_input_grad[3] else None
        in_tensors = pullback(
            lambda values: call.operator_of(values)._attached(x),
            tensors,
            ctx.needs_input_grad[4:],
            -u,
        )
        return (None, u, None, in_damping, *in_tensors)

    @staticmethod
    def jvp(
        ctx: Any,
        _call: None,
        in_block: Tensor | None,
        _start: Tensor | None,
        in_damping: Tensor | None,
        *in_tensors: Tensor | None,
    ) -> Tensor:
        call: BlockSolve = ctx.call
        x, damping, *tensors = ctx.saved_tensors
        count = len(tensors)

        def tangent(*values: Any) -> Tensor:
            x, damping, in_block, in_damping, *rest = values
            return _tangent(call, x, damping, in_block, in_damping, rest[:count], rest[count:])

        return below_tangents(tangent, x, damping, in_block, in_damping, *tensors, *in_tensors)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        call: BlockSolve,
        block: Tensor,
        start: Tensor | None,
        damping: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        size, dims = info.batch_size, in_dims[1:]
        values = (block, start, damping, *tensors)
        if all(dim is None for dim in dims[2:]):  # one system: a batch of batches is a longer one

            def merged(rows: Tensor | None, dim: int | None) -> Tensor | None:
                if rows is None:
                    return None
                every = rows.expand(size, *rows.shape) if dim is None else rows.movedim(dim, 0)
                return every.reshape(-1, every.shape[-1])

            rows = merged(block, dims[0])
            assert rows is not None
            x = _solved(call, rows, merged(start, dims[1]), damping, list(tensors))
            return x.reshape(size, -1, x.shape[-1]), 0
        answers = []
        for i in range(size):
            one = [
                value if dim is None or value is None else value.select(dim, i)
                for value, dim in zip(values, dims, strict=True)
            ]
            answers.append(apply(_Solve, call.part(i), *one))
        return torch.stack(answers), 0


def _tangent(
    call: BlockSolve,
    x: Tensor,
    damping: Tensor | None,
    in_block: Tensor | None,
    in_damping: Tensor | None,
    tensors: Sequence[Tensor],
    in_tensors: Sequence[Tensor | None],
) -> Tensor:
    """The tangent dx = S (dv - dA x - d(damping) x)."""
    target = torch.zeros_like(x) if in_block is None else in_block
    if in_damping is not None:
        target = target - in_damping.to(x.dtype) * x
    moving = [i for i, tangent in enumerate(in_tensors) if tangent is not None]
    if moving:

        def product(*chosen: Tensor) -> Tensor:
            values = list(tensors)
            for i, value in zip(moving, chosen, strict=True):
                values[i] = value
            return call.operator_of(values)._attached(x)

        primals = tuple(tensors[i] for i in moving)
        directions = tuple(tangent for tangent in in_tensors if tangent is not None)
        target = target - pushforward(product, primals, directions)
    return _solved(call.following(adjoint=False), target, None, damping, list(tensors))


def _attached_to_closure(
    call: BlockSolve, x: Tensor, block: Tensor, damping: Tensor | None, *, orders: int
) -> Tensor:
    """``x``, attached to tensors that the operator cannot list, by products that carry a graph.

    The gradient in those tensors, -d(u'A x), is what A x passes on from the cotangent -u through
    its own graph.  ``first`` is that product for the constant x: right where the gradient is not
    differentiated again.  For one derivative more the gradient must depend on x as x does, so that
    ``second`` is the product of an attached x, which knows one order of derivatives itself.
    """
    products = call.operator._attached
    call.hvps.append(orders * len(x) * call.operator._attached_count)
    first = products(x)
    attached = apply(_Closure, call, x, block, first, None, damping)
    if orders == 2:
        second = products(apply(_SecondOrder, attached))
        attached = apply(_Closure, call, x, block, first, second, damping)
    return attached


class _Closure(torch.autograd.Function):
    """The answer ``x`` as a function of the block, the damping and A's products with ``x``."""

    @staticmethod
    def forward(
        call: BlockSolve,
        x: Tensor,
        block: Tensor,
        first: Tensor,
        second: Tensor | None,
        damping: Tensor | None,
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, _, _, _, second, damping = inputs
        ctx.last = second is None
        ctx.save_for_backward(output, damping)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, damping = ctx.saved_tensors
        create = torch.is_grad_enabled()
        if create and (ctx.last or transforming()):
            what = "a third derivative, or create_graph=True for the second"
            if not ctx.last:
                what = "create_graph=True with batched gradients"
            raise DifferentiationError(
                f"{what}, is more than a solve can give in tensors that its operator's products "
                f"reach through a closure. {_REMEDY}."
            )
        call = ctx.call.following(adjoint=True)
        number = None if damping is None else damping.detach()
        constants = [tensor.detach() for tensor in call.operator._tensors()]
        u = _solved(call, grad.detach(), None, number, constants)
        if create:
            u = _attached_to_closure(call, u, grad, damping, orders=1)
        in_damping = None
        if ctx.needs_input_grad[5]:
            in_damping = -(u * x).sum().to(damping.dtype)
        if create:
            return None, None, u, None, -u, in_damping
        return None, None, u, -u, None, in_damping


class _SecondOrder(torch.autograd.Function):
    """The identity; passes back what a second derivative sends, and only that.

    While a first derivative is being recorded, what arrives here is -A u from the product's own
    argument.  With g - damping u, by which x - S (A x + damping x - v) depends on x otherwise, it
    adds up to the residual of the adjoint system, which is zero.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if torch.is_grad_enabled() else grad
