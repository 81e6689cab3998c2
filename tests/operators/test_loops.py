"""What is changed in captured graphs before code is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hypergrad.operators import loops

aten = torch.ops.aten


def names(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def merged(graph: Graph) -> GraphModule:
    module = GraphModule(torch.nn.Module(), graph)
    loops.HoistInvariants()(module.graph)  # which gives the module another one
    module.graph.lint()
    module.recompile()
    return module


def test_what_is_computed_twice_is_computed_once() -> None:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")

    def layer() -> Node:
        turned = graph.call_function(aten.permute.default, (w, [1, 0]))
        return graph.call_function(aten.tanh.default, (_mm(graph, x, turned),))

    total = graph.call_function(aten.add.Tensor, (layer(), layer()))
    graph.output((total,))
    module = merged(graph)
    assert names(module.graph).count("aten.tanh.default") == 1
    assert len(names(module.graph)) == 4
    source = torch.Generator().manual_seed(0)
    x0, w0 = torch.randn(3, 2, generator=source), torch.randn(4, 2, generator=source)
    torch.testing.assert_close(module(x0, w0)[0], 2 * torch.tanh(x0 @ w0.T))


def test_what_differs_stays() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    scaled: list[Any] = [graph.call_function(aten.mul.Tensor, (x, by)) for by in (2, 2.0)]
    drawn = [graph.call_function(aten.bernoulli.default, (x,)) for _ in range(2)]
    graph.output((*scaled, *drawn))
    before = names(graph)
    assert names(merged(graph).graph) == before


def _mm(graph: Graph, left: Node, right: Node) -> Node:
    return graph.call_function(aten.mm.default, (left, right))


def test_two_products_share_the_loss() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss(w: Tensor) -> Tensor:
        return torch.tanh(w).square().sum()

    def products(w: Tensor, v: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            out: Tensor = torch.func.vjp(torch.func.grad(loss), w)[1](v)[0]
            return out

        return product(product(v))

    w, v = torch.linspace(-1, 1, 5), torch.ones(5)
    module = make_fx(products)(w, v)
    expected = module(w, v)
    assert names(module.graph).count("aten.tanh.default") == 2
    for node in list(module.graph.nodes):  # as PyTorch's compiler does before
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    again = merged(module.graph)
    assert names(again.graph).count("aten.tanh.default") == 1
    torch.testing.assert_close(again(w, v), expected)
