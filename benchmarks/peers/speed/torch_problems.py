"""The problems in PyTorch: losses, and products as plain PyTorch makes them quickest."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import Problem

Loss = Callable[..., Tensor]

#: Channels of the convolutional network on 8 x 8 images, and its classes.
CHANNELS, CLASSES = (1, 8, 16), 10


def layer_shapes(kind: str, widths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the parameters in the order in which the flat vector holds them."""
    if kind == "cnn":
        shapes: list[tuple[int, ...]] = []
        for before, after in pairwise(CHANNELS):
            shapes += [(after, before, 3, 3), (after,)]
        return [*shapes, (CLASSES, 4 * CHANNELS[-1]), (CLASSES,)]
    return [shape for a, b in pairwise(widths) for shape in ((b, a), (b,))]


def _split(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split_with_sizes([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _mlp(flat: Tensor, inputs: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    leaves = _split(flat, shapes)
    last = len(leaves) - 2
    for i in range(0, len(leaves), 2):
        inputs = F.linear(inputs, leaves[i], leaves[i + 1])
        inputs = torch.tanh(inputs) if i < last else inputs
    return inputs


def _cnn(flat: Tensor, images: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    leaves = _split(flat, shapes)
    for i in (0, 2):
        images = torch.tanh(F.conv2d(images, leaves[i], leaves[i + 1], padding=1))
        images = F.avg_pool2d(images, 2)
    return F.linear(images.flatten(1), leaves[4], leaves[5])


def make_loss(kind: str, widths: tuple[int, ...]) -> Loss:
    """(params, inputs, targets) -> scalar, of a flat vector of parameters."""
    shapes = layer_shapes(kind, widths)
    if kind == "mlp":
        return lambda flat, inputs, targets: (
            0.5 * (_mlp(flat, inputs, shapes)[:, 0] - targets).square().mean()
        )
    network = _cnn if kind == "cnn" else _mlp
    return lambda flat, inputs, targets: F.cross_entropy(network(flat, inputs, shapes), targets)


def mirrored(x: Tensor, mirror: Tensor) -> Tensor:
    """X reflected at the hyperplane across the unit vector ``mirror``."""
    return torch.addcmul(x, mirror, 2.0 * torch.dot(mirror, x), value=-1.0)


def mirror_product(x: Tensor, values: Tensor, mirror: Tensor) -> Tensor:
    """A x for A with these eigenvalues, whose eigenvectors are the reflected unit vectors."""
    return mirrored(values * mirrored(x, mirror), mirror)


class Given:
    """The tensors of a problem, and what can be asked of them."""

    def __init__(self, problem: Problem) -> None:
        facts = problem.facts
        self.problem = problem
        self.tensors = {name: torch.from_numpy(array) for name, array in problem.arrays.items()}
        self.v = torch.from_numpy(problem.v)
        self.has_loss = facts.kind in ("logistic", "mlp", "cnn")
        self.loss = make_loss(facts.kind, facts.widths) if self.has_loss else None

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.tensors["inputs"], self.tensors["targets"]

    def product(self) -> Callable[[Tensor], Tensor]:
        """X -> A x for x of shape (n,): for a loss, double backward through a kept graph.

        Making it costs a gradient.
        """
        if self.problem.facts.kind == "dense":
            return self.tensors["matrix"].mv
        if self.problem.facts.kind == "mirror":
            values, mirror = self.tensors["values"], self.tensors["mirror"]
            return lambda x: mirror_product(x, values, mirror)
        assert self.loss is not None
        params = self.tensors["params"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(params, *self.batch), params, create_graph=True)

        def hvp(x: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(gradient, params, x, retain_graph=True)
            return result

        return hvp


class TorchProduct:
    """A product for adapters that ask for NumPy arrays or tensors, of shape (n,) or (n, k)."""

    def __init__(self, hvp: Callable[[Tensor], Tensor]) -> None:
        self.hvp, self.count = hvp, 0

    def on_tensors(self, x: Tensor) -> Tensor:
        """A x on tensors."""
        x = x.detach()
        self.count += 1 if x.ndim == 1 else x.shape[1]
        if x.ndim == 1:
            return self.hvp(x)
        if x.shape[1] == 1:
            return self.hvp(x[:, 0])[:, None]
        return torch.stack([self.hvp(column) for column in x.unbind(1)], dim=1)

    def __call__(self, x: Any) -> Any:
        """A x on NumPy arrays."""
        return self.on_tensors(torch.from_numpy(x)).numpy()
