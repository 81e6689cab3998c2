"""The problems in JAX: the same losses of the same flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from .problems import Facts


def layer_shapes(kind: str, widths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As in ``torch_problems``, which this process cannot import."""
    if kind == "cnn":
        return [(8, 1, 3, 3), (8,), (16, 8, 3, 3), (16,), (10, 64), (10,)]
    return [shape for a, b in pairwise(widths) for shape in ((b, a), (b,))]


def _split(flat: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    leaves, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        leaves.append(flat[start:stop].reshape(shape))
        start = stop
    return leaves


def _mlp(leaves: list[Any], inputs: Any) -> Any:
    last = len(leaves) - 2
    for i in range(0, len(leaves), 2):
        inputs = inputs @ leaves[i].T + leaves[i + 1]
        inputs = jnp.tanh(inputs) if i < last else inputs
    return inputs


def _cnn(leaves: list[Any], images: Any) -> Any:
    for i in (0, 2):
        images = jax.lax.conv_general_dilated(images, leaves[i], (1, 1), "SAME")
        images = jnp.tanh(images + leaves[i + 1][:, None, None])
        m, c, h, w = images.shape
        images = images.reshape(m, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return images.reshape(images.shape[0], -1) @ leaves[4].T + leaves[5]


def make_loss(facts: Facts) -> Callable[..., Any]:
    """(params, inputs, targets) -> scalar."""
    shapes = layer_shapes(facts.kind, facts.widths)
    if facts.kind == "mlp":
        return lambda flat, inputs, targets: (
            0.5 * jnp.mean((_mlp(_split(flat, shapes), inputs)[:, 0] - targets) ** 2)
        )
    network = _cnn if facts.kind == "cnn" else _mlp

    def loss(flat: Any, inputs: Any, targets: Any) -> Any:
        scores = jax.nn.log_softmax(network(_split(flat, shapes), inputs))
        return -jnp.mean(jnp.take_along_axis(scores, targets[:, None], axis=1))

    return loss


def _mirrored(x: Any, unit: Any) -> Any:
    return x - 2.0 * jnp.vdot(unit, x) * unit


def make_product(facts: Facts, arrays: dict[str, Any]) -> Callable[[Any], Any]:
    """X -> A x inside a jitted function; a Hessian is linearised once, outside the iterations."""
    if facts.kind == "dense":
        return lambda x: arrays["matrix"] @ x
    if facts.kind == "mirror":
        values, unit = arrays["values"], arrays["mirror"]
        return lambda x: _mirrored(values * _mirrored(x, unit), unit)
    loss = make_loss(facts)
    gradient = jax.grad(lambda p: loss(p, arrays["inputs"], arrays["targets"]))
    result: Callable[[Any], Any] = jax.linearize(gradient, arrays["params"])[1]
    return result
