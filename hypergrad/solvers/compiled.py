"""What solves as one compiled graph share: when there is a graph, and when it is believed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CompilationWarning, warn
from ..operators.compilation import IMPURE, Graph
from ..operators.loops import HAS_LOOPS
from ..operators.modes import agree
from .base import DampedSystem

#: Scales of v within which no number that counts leaves the range of float32.
ORDINARY = 1e20


def takes(system: DampedSystem, instead: str, *, loops: bool) -> bool:
    """Whether a graph can hold this system's products, and ``loops`` around them.

    A warning that begins with ``instead`` says why not, where another operator would do.
    """
    operator, dtypes = system.operator, set(system.operator.layout.dtypes)
    if len(dtypes) > 1 or operator.dtype not in (torch.float32, torch.float64):
        return False
    if loops and not HAS_LOOPS:
        why = "this PyTorch compiles no loops; install torch >= 2.13"
    elif operator._signature() is None:
        why = (
            f"the products of {operator!r} are not known to be tensor code; pass "
            "hypergrad.hessian, hypergrad.ggn, a matrix, or "
            "hypergrad.as_operator(hvp_fn, like=v, batchable=True)"
        )
    else:
        return True
    warn(f"{instead}: {why}.", CompilationWarning)
    return False


def same_products(graph: Graph, system: DampedSystem, rows: Tensor, products: Tensor) -> bool:
    """Whether products of a graph are those of eager code; it is not used again if not."""
    system.num_hvps += 1
    same = agree(products, system.operator._eager(rows))
    if not same:
        graph.refuse(IMPURE)
    return same


def proved(graph: Graph, system: DampedSystem, x: Tensor, residual: Tensor, damping: float) -> bool:
    """Whether the first product behind a residual, which a graph ends with, is that of eager code.

    ``x`` is the answer as it will be returned, in the wide dtype, of shape (m, n) as its residual.
    """
    dtype = system.operator.dtype
    product = system.b[:1] - residual[:1] - damping * x[:1]
    graph.proved = same_products(graph, system, x[:1].to(dtype), product.to(dtype))
    return graph.proved
