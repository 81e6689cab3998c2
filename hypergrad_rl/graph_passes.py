"""What PyTorch's compiler leaves undone in an update's graph; it takes a second to import."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import hypergrad

#: How products of matrices become faster, one after the other.
PRODUCTS = (hypergrad.direct_products, hypergrad.transpose_narrow)


class Once(CustomGraphPass):
    """What a graph, or the body of a loop in it, would compute twice it computes once.

    PyTorch 2.13 sees to that in graphs with a backward pass only. Here one pass of a network
    serves several derivatives. And small products of matrices call a kernel, narrow ones are
    transposed: :func:`hypergrad.direct_products`, :func:`hypergrad.transpose_narrow`.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph's module in place."""
        module = graph.owning_module
        assert module is not None
        for products in PRODUCTS:
            products(graph)
        module.graph = fx_graph_cse(graph)

    def uuid(self) -> bytes:
        """What PyTorch's cache of compiled graphs knows this pass by."""
        code: bytes = get_hash_for_files((__file__, *map(inspect.getfile, PRODUCTS)))
        return code


def inductor_options() -> dict[str, Any]:
    """Settings that every graph of this package is compiled with."""
    return {"post_grad_custom_pre_pass": Once()}
