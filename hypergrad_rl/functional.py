"""Flat parameter vectors, gradients and Adam as pure functions.

What an update computes is a function of its inputs, without a step in place, so that all of it can
be one compiled graph; eagerly the same functions run. An agent's networks are flat vectors: few
inputs of that graph, and Adam is a handful of operations instead of one per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad_rl.networks import Params

Shapes = dict[str, torch.Size]
BETA1, BETA2 = 0.9, 0.999


def flatten(params: Params) -> Tensor:
    """All leaves in order as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in params.values()])


def shapes_of(params: Params) -> Shapes:
    """What ``unflatten`` needs to know."""
    return {name: leaf.shape for name, leaf in params.items()}


def unflatten(vector: Tensor, shapes: Shapes) -> Params:
    """The leaves as views of the vector."""
    parts = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {name: x.view(s) for (name, s), x in zip(shapes.items(), parts, strict=True)}


def gradient(
    loss_fn: Callable[[Params], tuple[Tensor, dict[str, Tensor]]], params: Params
) -> tuple[Params, Tensor, dict[str, Tensor]]:
    """Gradient, loss and further results of ``loss_fn(params) -> (loss, results)``, all detached.

    Compiled by ``torch.func``; eagerly by ``torch.autograd``, which is quicker there.
    """
    if torch.compiler.is_compiling():
        grads, (loss, results) = torch.func.grad_and_value(loss_fn, has_aux=True)(params)
        return grads, loss, results
    with torch.enable_grad():
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        loss, results = loss_fn(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {name: value.detach() for name, value in results.items()}
    return dict(zip(leaves, grads, strict=True)), loss.detach(), results


class AdamState(NamedTuple):
    """Parameters and what Adam keeps of their gradients: three vectors, and the step count.

    The count is a float64 tensor: a Python number would be compiled into the graph.
    """

    params: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor

    @classmethod
    def of(cls, params: Params) -> AdamState:
        """Before the first step."""
        vector = flatten(params).detach()
        zero = torch.zeros_like(vector)
        return cls(vector, zero, zero.clone(), torch.zeros((), dtype=torch.float64))


def adam_scales(step: Tensor, rate: Tensor | float, count: int) -> Tensor:
    """What bias correction makes of a rate in the next ``count`` steps: (count, 2).

    A row holds rate / (1 - beta1^k) and sqrt(1 - beta2^k) for the k-th step of all. Computed in
    float64, for 1 - beta2^k is small at first; and before a graph, which would compute the powers
    again for every few parameters.
    """
    k = step + torch.arange(1, count + 1, device=step.device)
    return torch.stack([rate / (1 - BETA1**k), (1 - BETA2**k).sqrt()], -1)


def adam_step(state: AdamState, grad: Tensor, scale: Tensor, eps: float) -> AdamState:
    """One step of Adam along a flat gradient, with its row of :func:`adam_scales`."""
    scale = scale.to(grad.dtype)
    mean = torch.lerp(state.mean, grad, 1 - BETA1)
    square = BETA2 * state.square + (1 - BETA2) * grad * grad
    denominator = square.sqrt() / scale[1] + eps
    params = state.params - scale[0] * (mean / denominator)
    return AdamState(params, mean, square, state.step + 1)


def adam(state: AdamState, grad: Tensor, rate: Tensor | float, eps: float) -> AdamState:
    """One step of Adam (Kingma and Ba 2015, algorithm 1) along a flat gradient."""
    return adam_step(state, grad, adam_scales(state.step, rate, 1)[0], eps)
