"""The five single-loop methods on losses that are not quadratic, for the tests of their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import flat, gaussian

W, Y = gaussian(4, seed=1), gaussian(3, seed=2)


def inner_loss(w: Any, y: Any, *batch: Tensor) -> Tensor:
    """Strongly convex, not quadratic, everything meets everything; a batch: a shift, a pull."""
    shift, pull = batch if batch else (0.0, 1.0)
    x, z = flat(w), flat(y)
    mix = torch.cos(torch.arange(len(x) * len(z), dtype=x.dtype)).reshape(len(x), len(z))
    scale = 1.0 + 0.3 * torch.sigmoid(z).mean()
    return (
        0.5 * scale * ((x - shift) ** 2).sum()
        - pull * (mix @ torch.tanh(z)) @ x
        + torch.logsumexp(x, 0)
    )


def outer_loss(w: Any, y: Any, *batch: Tensor) -> Tensor:
    shift = batch[0] if batch else 0.0
    x, z = flat(w), flat(y)
    return torch.sin(x - shift).sum() + 0.5 * (x**2).mean() + (z**2).mean() * (1.0 + x.mean())


def batches(count: int, seed: int) -> list[tuple[Tensor, ...]]:
    return [tuple(0.5 + 0.1 * gaussian(2, seed=seed + i)) for i in range(count)]


RATES: dict[str, Any] = {"inner_lr": 0.3, "outer_lr": 0.1}
METHODS: dict[str, hypergrad.SingleLoop] = {
    "SOBA": hypergrad.SOBA(inner_loss, outer_loss, linear_lr=0.2, **RATES),
    "SABA": hypergrad.SABA(
        inner_loss, outer_loss, linear_lr=0.2, num_inner_blocks=1, num_outer_blocks=1, **RATES
    ),
    "AmIGO": hypergrad.AmIGO(
        inner_loss, outer_loss, linear_lr=0.2, inner_steps=3, linear_steps=2, **RATES
    ),
    "StocBiO": hypergrad.StocBiO(
        inner_loss, outer_loss, linear_lr=0.2, inner_steps=3, linear_steps=2, **RATES
    ),
    "F2SA": hypergrad.F2SA(
        inner_loss, outer_loss, penalty_lr=0.05, multiplier=3.0, inner_steps=2, **RATES
    ),
}

every_method = pytest.mark.parametrize("name", METHODS)
