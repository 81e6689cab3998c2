"""Nyström for one solve by two compiled graphs, with the decisions on k x k numbers between them.

The first graph makes the products of the test matrix and their inner products, the second one the
answer from them, and its residual.  Between them some k x k numbers come to the host, as they do
eagerly, and the same code decides on them: LAPACK's calls within one graph would cost as much as
the second one saves, and make a device wait more than once.  What leaves doubt goes on eagerly,
with the same test matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import CompilationWarning, warn
from ..norms import powers_of_two
from ..operators.compilation import IMPURE, Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.modes import agree
from .base import DampedSystem, Outcome, Status
from .embedding import gaussian_rows
from .narrow import FactoredSketch, NarrowSketch, is_narrow
from .nystrom import NO_DOUBT, Nystrom

_INSTEAD = "Nystrom(compile=True) runs eagerly"
#: Numbers in a block of products up to which there are graphs; beyond, arithmetic is all there is,
#: and the wide copies that sums are made of would count.
_LARGEST = 2**22


@dataclass(frozen=True, eq=False)
class Answered:
    """An answer, the residual of which is known.

    Attributes:
        x: shape (m, n).
        residual: of x as it is returned, shape (m, n).
        norms: of the rows of the residual, shape (m,).
        statuses: one a row; None where the numbers leave something to be looked at.
    """

    x: Tensor
    residual: Tensor
    norms: Tensor
    statuses: list[Status] | None


def run_compiled(config: Nystrom, system: DampedSystem) -> Outcome | None:
    """The solve with the sketch of ``config``, from zero; None where nothing was done."""
    if not _fits(config, system):
        return None
    drawn = _drawn(config, system)
    sketch = config._sketch(system, once=True, drawn=drawn)
    answered = None
    if isinstance(sketch, FactoredSketch) and config.check is True:
        answered = _answered(config, system, sketch)
    return config._finished(system, sketch, None, answered)


def _fits(config: Nystrom, system: DampedSystem) -> bool:
    """Whether the graphs are for this solve; a warning says so where they could have been."""
    operator, layout, rank = system.operator, system.operator.layout, config.rank
    if rank == "auto" or config.sketch != "gaussian" or config.test_matrix is not None:
        return False
    if not is_narrow(system, rank) or len(set(layout.dtypes)) > 1:
        return False
    if rank * layout.dim > _LARGEST:
        return False
    if operator._signature() is not None:
        return True
    why = (
        f"the products of {operator!r} are not known to be tensor code; pass hypergrad.hessian, "
        "hypergrad.ggn, a matrix, or hypergrad.as_operator(hvp_fn, like=v, batchable=True)"
    )
    warn(f"{_INSTEAD}: {why}.", CompilationWarning)
    return False


def _drawn(config: Nystrom, system: DampedSystem) -> NarrowSketch:
    """What :meth:`NarrowSketch.draw` draws, and multiplies eagerly."""
    operator, k = system.operator, config.rank
    assert k != "auto"
    omega = gaussian_rows(k, operator.layout.dim, config.generator, operator.device)
    graph = graph_of(
        (operator._signature(), "nystrom", k, len(system.b)), lambda: _products_of(system, k)
    )
    results = graph.run(operator, omega, system.b)
    if results is not None:
        y, sums = results
        numbers = sums.cpu().numpy()  # one transfer from the device
        finite = bool(np.isfinite(numbers).all())
        if finite and (graph.proved or _proved(graph, system, omega, y)):
            system.num_hvps += k
            return NarrowSketch.of_sums(system, omega, y, numbers)
        # Otherwise eager products say what is wrong.
    return NarrowSketch.multiplied(system, omega)


def _answered(config: Nystrom, system: DampedSystem, sketch: FactoredSketch) -> Answered | None:
    """The answer by the second graph; None where there is none."""
    operator, drawn, damping = system.operator, sketch.drawn, config._damping(sketch, system)
    graph = graph_of(
        (operator._signature(), "answer of nystrom", *drawn.omega.shape, len(system.b)),
        lambda: _answer_of(system),
    )
    weights = torch.from_numpy(sketch.weights(drawn.along, damping)).to(system.b)
    results = graph.run(
        operator,
        system.b,
        drawn.core.products,
        weights,
        system.b.new_tensor(damping),
        system.scales,
    )
    if results is None:
        return None
    x, residual, numbers, narrow, product = results
    norms, along = numbers.tolist()  # one transfer from the device
    if not all(math.isfinite(norm) for norm in norms):
        return None  # where the eager product says what is wrong
    if not (graph.proved or _proved(graph, system, narrow, product)):
        return None
    system.num_hvps += len(x)
    sizes = system.b_norms.tolist()
    return Answered(x, residual, numbers[0], _clear(config, sketch, norms, along, sizes))


def _clear(
    config: Nystrom,
    sketch: FactoredSketch,
    norms: list[float],
    along: list[float],
    sizes: list[float],
) -> list[Status] | None:
    """The statuses, where all answers are as good as the usual one; else None."""
    part = 1.0 if sketch.vouched else NO_DOUBT
    for norm, curvature, size in zip(norms, along, sizes, strict=True):
        if not (norm < part * size and curvature > 0):
            return None
    return [Status.FIXED_ITERATIONS] * len(norms)


def _proved(graph: Graph, system: DampedSystem, rows: Tensor, products: Tensor) -> bool:
    """Whether the first product is that of eager code; the graph is not used again if not."""
    system.num_hvps += 1
    graph.proved = agree(products[:1], system.operator._eager(rows[:1]))
    if not graph.proved:
        graph.refuse(IMPURE)
    return graph.proved


def _products_of(system: DampedSystem, rank: int) -> Graph:
    operator = system.operator
    template = detached(operator)

    def sketch(tensors: list[Tensor], omega: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = template._with_tensors(tensors)._traced_products(omega)
        wide = y.to(b.dtype)
        sums = torch.cat([wide, b]) @ torch.cat([omega.to(b.dtype), wide]).T
        own = omega @ omega.T  # it only says which combinations are orthonormal
        return y, torch.cat([sums.reshape(-1), own.reshape(-1).to(b.dtype)])

    what = f"a sketch of rank {rank} of {operator!r}"
    return Graph(sketch, what, _INSTEAD, compiler_options(operator.device))


def _answer_of(system: DampedSystem) -> Graph:
    operator = system.operator
    template = detached(operator)

    def answer(
        tensors: list[Tensor],
        b: Tensor,
        y: Tensor,
        weights: Tensor,
        damping: Tensor,
        scales: Tensor,
    ) -> tuple[Tensor, ...]:
        now, wide = template._with_tensors(tensors), b.dtype
        x = b / damping + weights @ y.to(wide)
        # As it will be returned.
        rounded = (x * scales[:, None]).to(now.dtype).to(wide) / scales[:, None]
        # Products of rows of norm one lose no digits to the narrow dtype's smallest numbers.
        unit = powers_of_two(torch.linalg.vector_norm(rounded, dim=1))[:, None]
        narrow = (rounded / unit).to(now.dtype)
        product = now._traced_products(narrow)
        residual = b - product.to(wide) * unit - damping * rounded
        norms = torch.linalg.vector_norm(residual, dim=1)
        along = torch.linalg.vecdot(x, b - residual)
        return x, residual, torch.stack([norms, along]), narrow, product

    what = f"an answer of Nyström with {operator!r}"
    return Graph(answer, what, _INSTEAD, compiler_options(operator.device))
