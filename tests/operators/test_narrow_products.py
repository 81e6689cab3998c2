"""Narrow products in graphs: computed transposed, with results that lie in memory as they did."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hypergrad
from hypergrad.operators import compilation, loops, narrow_products
from tests.operators.graphs import Told
from tests.strategies import F64, gaussian

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
A, B = gaussian(7, 40, seed=0), gaussian(7, 5, seed=1)
BIAS = gaussian(5, seed=2)
STACK, OTHERS = gaussian(3, 40, 7, seed=3), gaussian(3, 7, 5, seed=4)
Function = Callable[..., Any]

#: A function of its inputs, and the shapes of the products that are made after the pass.
CASES: dict[str, tuple[Function, tuple[Tensor, ...], list[tuple[int, ...]]]] = {
    "narrow": (lambda a, b: a.T @ b, (A, B), [(5, 40)]),
    "single precision": (lambda a, b: a.T @ b, (A.float(), B.float()), [(5, 40)]),
    "wide": (lambda a, b: b.T @ a, (A, B), [(5, 40)]),
    "square": (lambda a, b: a.T @ a, (A, B), [(40, 40)]),
    "of seven": (lambda a, b: a @ a.T, (A, B), [(7, 7)]),
    "one column": (lambda a, b: a.T @ b[:, :1], (A, B), [(40, 1)]),
    "integers": (lambda a, b: a.T.int() @ b.int(), (A, B), [(40, 5)]),
    "stacks": (lambda a, b: a @ b, (STACK, OTHERS), [(3, 5, 40)]),
    "a bias": (torch.addmm, (BIAS, A.T, B), [(5, 40)]),
    "a bias a row": (torch.addmm, (gaussian(40, 1, seed=5), A.T, B), [(5, 40)]),
    "a scaled sum": (lambda c, a, b: torch.addmm(c, a, b, beta=2.0), (BIAS, A.T, B), [(40, 5)]),
    # What comes after may go by places in memory, as loops and branches do by strides.
    "places": (lambda a, b: (a.T @ b).as_strided((6, 2), (5, 1), 3), (A, B), [(5, 40)]),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_transposed_where_they_are_narrow(name: str) -> None:
    function, inputs, shapes = CASES[name]
    module = make_fx(function, tracing_mode="fake")(*inputs)
    expected = function(*inputs)
    hypergrad.transpose_narrow(module.graph)
    module.graph.lint()
    module.recompile()
    found = [n for t in PRODUCTS for n in module.graph.find_nodes(op="call_function", target=t)]
    assert [tuple(node.meta["val"].shape) for node in found] == shapes
    result = Told(module).run(*inputs)
    assert (result.shape, result.stride()) == (expected.shape, expected.stride())
    rtol = 1e-14 if result.dtype == F64 else 1e-5
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)


def test_an_unknown_number_of_rows_stays() -> None:
    module = make_fx(torch.mm, tracing_mode="symbolic")(A.T, B)
    hypergrad.transpose_narrow(module.graph)
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default) == []


def test_products_of_other_devices_stay() -> None:
    module = make_fx(torch.mm, tracing_mode="fake")(A.T.to("meta"), B.to("meta"))
    hypergrad.transpose_narrow(module.graph)
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default) == []


def test_graphs_of_operators_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and solves of a classifier of few classes, with generated code."""
    seen: list[tuple[int, ...]] = []
    transpose = narrow_products.transpose_narrow

    def watched(graph: torch.fx.Graph) -> None:
        transpose(graph)
        found = [n for t in PRODUCTS for n in graph.find_nodes(op="call_function", target=t)]
        seen.extend(tuple(node.meta["val"].shape) for node in found)

    monkeypatch.setattr(loops, "transpose_narrow", watched)
    monkeypatch.setattr(
        loops.HoistInvariants, "uuid", lambda _: os.urandom(8)
    )  # or a cache answers
    compilation.forget_compiled()
    x, labels = gaussian(50, 6, seed=0), torch.arange(50) % 3

    def loss(w: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ w.T + bias, labels)

    params, v = (gaussian(3, 6, seed=1), gaussian(3, seed=2)), (gaussian(3, 6, seed=3), BIAS[:3])
    eager, compiled = (
        hypergrad.hessian(lambda p: loss(*p), params, compile=compile).matvec(v)
        for compile in (False, True)
    )
    compilation.forget_compiled()
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert (3, 50) in seen
    assert not any(rows >= 2 * columns > 2 for *_, rows, columns in seen if columns < 16)
