"""Narrow products of matrices in a graph for PyTorch's compiler, computed transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

#: Products with fewer columns than this, and twice as many rows, are narrow.
NARROW = 16


def transpose_narrow(graph: Graph) -> None:
    """Narrow products A B become (B' A')', in place; results lie in memory as before.

    A BLAS makes many rows of a result at a time, which for tensors as PyTorch lays them are
    columns.  So a product with few columns is slow: X W' of 1,797 samples with 64 features and 10
    classes took 3.5 to 6 times as long, the gradient in 64 x 4 weights three times.  What is copied
    back into the former order becomes part of what reads it.

    Every graph of this library goes through it; it is public for those who compile more than that,
    as ``post_grad_custom_pre_pass`` of ``torch.compile``'s options or within such a pass.

    Args:
        graph: of ``aten`` operations, with the fake tensors of PyTorch's compiler in ``meta``.
            ``mm``, ``addmm`` and ``bmm`` of floating-point tensors of the CPU are looked at, where
            those are there, and the sizes are known.

    Examples:
        >>> import torch, hypergrad
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> inputs = torch.randn(100, 20), torch.randn(20, 3)
        >>> module = make_fx(torch.mm, tracing_mode="fake")(*inputs)
        >>> hypergrad.transpose_narrow(module.graph)
        >>> multiply = torch.ops.aten.mm.default
        >>> (product,) = module.graph.find_nodes(op="call_function", target=multiply)
        >>> tuple(product.meta["val"].shape)
        (3, 100)
    """
    aten = torch.ops.aten
    for target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if _is_narrow(node):
                _transpose(graph, node)


def _is_narrow(node: Node) -> bool:
    if node.kwargs or not all("val" in x.meta for x in (node, *node.all_input_nodes)):
        return False  # a scaled sum; a graph that nothing is known of
    value = node.meta["val"]
    rows, columns = value.shape[-2:]
    if not value.is_floating_point() or value.device.type != "cpu":
        return False  # no BLAS multiplies integers; of other devices nothing is known
    known = isinstance(rows, int) and isinstance(columns, int)
    return known and 1 < columns < NARROW and rows >= 2 * columns


def _transpose(graph: Graph, node: Node) -> None:
    aten, value = torch.ops.aten, node.meta["val"]
    *others, a, b = node.args
    order = [*range(value.dim() - 2), value.dim() - 1, value.dim() - 2]
    multiply = aten.bmm.default if value.dim() == 3 else aten.mm.default

    def call(target: Any, args: tuple[Any, ...], like: Tensor, **options: Any) -> Node:
        new = graph.call_function(target, args, options)
        new.meta["val"] = like
        return new

    with graph.inserting_before(node):
        turned = [
            call(aten.permute.default, (x, order), x.meta["val"].mT)  # type: ignore[union-attr]
            for x in (b, a)
        ]
        product = call(multiply, tuple(turned), value.new_empty(value.mT.shape))
        back = call(aten.permute.default, (product, order), product.meta["val"].mT)
        result = call(aten.clone.default, (back,), value, memory_format=torch.contiguous_format)
        if others:
            result = call(aten.add.Tensor, (result, others[0]), value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
