"""Operators under torch.compile: one graph, and the eager products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import gaussian, symmetric

N = 4
W, X, Y, V = gaussian(N), gaussian(6, N, seed=1), gaussian(6, seed=2), gaussian(3, N, seed=3)
MATRIX = symmetric(torch.arange(1.0, N + 1, dtype=torch.float64), seed=4).matrix


def model(p: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ p)


def output_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().sum()


def loss(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return output_loss(model(p, x), y)


def matrix() -> hypergrad.LinearOperator:
    return hypergrad.as_operator(MATRIX)


MAKERS: dict[str, Callable[[], hypergrad.LinearOperator]] = {
    "hessian": lambda: hypergrad.hessian(loss, W, X, Y),
    "reverse, chunked": lambda: hypergrad.hessian(
        loss, W, X, Y, mode="reverse_over_reverse", chunk_size=2
    ),
    "forward": lambda: hypergrad.hessian(loss, W, X, Y, mode="forward_over_reverse"),
    "ggn": lambda: hypergrad.ggn(model, output_loss, W, X, Y),
    "matrix": matrix,
    "callable": lambda: hypergrad.as_operator(lambda v: MATRIX @ v, like=W),
    "batchable": lambda: hypergrad.as_operator(lambda v: MATRIX @ v, like=W, batchable=True),
    "affine": lambda: 0.5 * matrix() + 0.1,
    "sum": lambda: matrix() + hypergrad.hessian(loss, W, X, Y),
    "mean": lambda: hypergrad.SampledOperator([MATRIX, 2 * MATRIX]).mean,
}


@pytest.mark.parametrize("name", MAKERS)
def test_products_are_one_graph(name: str) -> None:
    torch._dynamo.reset()
    operator = MAKERS[name]()

    def products(block: Tensor) -> tuple[Any, Any]:
        return operator.matvec(block[0]), operator.matmat(block)

    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(V), products(V), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "forward", "ggn"])
def test_an_operator_made_inside_is_part_of_the_graph(name: str) -> None:
    torch._dynamo.reset()

    def products(block: Tensor) -> Any:
        return MAKERS[name]().matmat(block)

    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(V), products(V), rtol=1e-12, atol=1e-12)


def test_forward_mode_under_vmap() -> None:
    operator = MAKERS["forward"]()
    got = torch.func.vmap(operator.matvec)(V)
    torch.testing.assert_close(got, operator.matmat(V), rtol=1e-12, atol=1e-12)
