"""What PyTorch's compiler leaves undone in an update's graph; it takes a second to import."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

#: Products of matrices with fewer columns, and twice as many rows, are computed transposed.
NARROW = 16


class Once(CustomGraphPass):
    """What a graph, or the body of a loop in it, would compute twice it computes once.

    PyTorch 2.13 sees to that in graphs with a backward pass only. Here one pass of a network
    serves several derivatives. And narrow products are turned (:func:`turn_narrow`).
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph's module in place."""
        module = graph.owning_module
        assert module is not None
        turn_narrow(graph)
        module.graph = fx_graph_cse(graph)

    def uuid(self) -> bytes:
        """What PyTorch's cache of compiled graphs knows this pass by."""
        code: bytes = get_hash_for_files((__file__,))
        return code


def turn_narrow(graph: torch.fx.Graph) -> None:
    """A B with few columns becomes (B' A')', in place, and lies in memory as before.

    That is a copy, which the compiler makes part of what reads it. The graph was traced with these
    strides: the carry of a loop, the branches of a condition and ``as_strided`` go by them.

    A BLAS takes many rows of its result at a time, which for the rows of PyTorch are columns: the
    gradient in the weights of four inputs, of 64 units and 128 states, is three times as quick so.
    """
    aten = torch.ops.aten
    mm, permute, clone = aten.mm.default, aten.permute.default, aten.clone.default
    contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
    for node in graph.find_nodes(op="call_function", target=mm):
        shape = node.meta["val"].shape
        rows, columns = shape
        if not (1 < columns < NARROW and rows >= 2 * columns):
            continue
        a, b = node.args
        with graph.inserting_before(node):
            turned = [graph.call_function(permute, (x, [1, 0])) for x in (b, a)]
            product = graph.call_function(mm, tuple(turned))
            back = graph.call_function(permute, (product, [1, 0]))
            result = graph.call_function(clone, (back,), contiguous)
        for new, value in (
            *((t, x.meta["val"].t()) for t, x in zip(turned, (b, a), strict=True)),
            (product, node.meta["val"].new_empty(columns, rows)),
            (back, node.meta["val"].new_empty(columns, rows).t()),
            (result, node.meta["val"]),
        ):
            new.meta["val"] = value
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def inductor_options() -> dict[str, Any]:
    """Settings that every graph of this package is compiled with."""
    return {"post_grad_custom_pre_pass": Once()}
