"""Layers of the default networks, eagerly and as what PyTorch's compiler makes quick code of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Up to so many states a product with a layer is a sum, in a compiled graph.
FEW = 8


def _few(x: Tensor) -> bool:
    """Whether these are few states; an unknown number, of an exported policy, is not."""
    count = math.prod(x.shape[:-1])  # Size.numel would fix it
    return isinstance(count, int) and count <= FEW


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b, (..., in) -> (..., out).

    In a compiled graph, for few states, as sums that are part of the code around them: a call of
    BLAS for the four states of a rollout's step takes as long as the arithmetic of all its layers.
    """
    if torch.compiler.is_compiling() and _few(x):
        return (x[..., None, :] * weight).sum(-1) + bias
    return torch.nn.functional.linear(x, weight, bias)


def tanh_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh(W x + b), (..., in) -> (..., out).

    In a compiled graph as 2 sigmoid(2 (W x - (-b))) - 1, to 2e-7 in float32: PyTorch's compiler
    makes a third as quick code of the function itself, and adds a bias in a pass of its own where
    it sees a product and a sum.
    """
    if not torch.compiler.is_compiling():
        return torch.tanh(affine(x, weight, bias))
    if _few(x):
        return 2 * torch.sigmoid(2 * affine(x, weight, bias)) - 1
    return 2 * torch.sigmoid(2 * (x @ weight.T - (-bias))) - 1
