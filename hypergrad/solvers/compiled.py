"""What solves as one compiled graph share: when there is a graph, and when it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CompilationWarning, warn
from ..operators.compilation import IMPURE, Graph
from ..operators.loops import HAS_LOOPS
from ..operators.modes import agree
from .base import DampedSystem
from .krylov import DEFAULT_MAX_ITERS

#: Scales of v within which no number that counts leaves the range of float32.
_ORDINARY = 1e20


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


@dataclass
class Iterations:
    """What iterations for one right-hand side begin with, as numbers of the host.

    Attributes:
        fixed: whether their number is fixed; else they go on to ``tolerance``.
        tolerance: on the scaled residual; 0 where their number is fixed.
        budget: at most so many.
        damping: as a number.
        start, residual: vectors of shape (n,), in the working dtype.
        norm: that of ``residual``, above the tolerance.
    """

    fixed: bool
    tolerance: float
    budget: int
    damping: float
    start: Tensor
    residual: Tensor
    norm: float

    @classmethod
    def begin(
        cls, config: Any, system: DampedSystem, x0: Tensor | None, instead: str
    ) -> Iterations | None:
        """For the options of a Krylov method; None where there is no work for a graph."""
        if len(system.b) != 1 or not 1 / _ORDINARY < float(system.scales[0]) < _ORDINARY:
            return None
        if not takes(system, instead, loops=True):
            return None
        damping = system.resolve_damping()
        fixed = config.rtol == 0 and config.atol == 0
        tolerance = 0.0 if fixed else float(system.tolerances(config.rtol, config.atol)[0])
        budget = config.max_iters or DEFAULT_MAX_ITERS
        start, residual = system.begin(x0, damping)
        norm = float(system.start_norms[0])
        if norm <= tolerance:
            return None
        return cls(fixed, tolerance, budget, damping, start[0], residual[0], norm)


def underflows(system: DampedSystem, largest: float) -> bool:
    """Whether an answer with this largest entry loses digits when it is returned.

    What is returned is then not what was checked.
    """
    limits = torch.finfo(system.operator.dtype)
    return 0 < largest * min(1.0, float(system.scales[0])) < limits.tiny / limits.eps


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
    noise = torch.finfo(x.dtype).eps * damping * float(torch.linalg.vector_norm(x[:1]))
    if noise > 0.1 * torch.finfo(dtype).eps ** 0.5 * float(torch.linalg.vector_norm(product)):
        return True  # a damping so large leaves nothing of the product to compare
    graph.proved = same_products(graph, system, x[:1].to(dtype), product.to(dtype))
    return graph.proved
