"""Nyström for one solve as one compiled graph: products, the answer, and its residual.

What is decided on k x k numbers is decided on the host by the code that does so eagerly.  It is one
operation of the graph: LAPACK's would cost as much there, and a device would wait for them more
often.  What leaves doubt goes on eagerly, with the same test matrix and its products.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..norms import powers_of_two
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from .base import DampedSystem, Outcome, Status
from .compiled import same_products, takes
from .embedding import gaussian_rows
from .narrow import FactoredSketch, NarrowSketch, is_narrow
from .nystrom import NO_DOUBT, Nystrom

_INSTEAD = "Nystrom(compile=True) runs eagerly"
#: Numbers in a block of products up to which there are graphs; beyond, arithmetic is all there is,
#: and the wide copies that sums are made of would count.
_LARGEST = 2**22


@dataclass(frozen=True, eq=False)
class Answered:
    """An answer that is there already.

    Attributes:
        x: shape (m, n).
        residual: of x as it is returned, shape (m, n); None where no product was asked for.
        norms: of the rows of the residual, shape (m,).
        statuses: one a row; None where the numbers leave something to be looked at.
    """

    x: Tensor
    residual: Tensor | None = None
    norms: Tensor | None = None
    statuses: list[Status] | None = None


@dataclass(eq=False)
class _Between:
    """The step on the host, and what it leaves for the time after the graph."""

    config: Nystrom
    system: DampedSystem
    omega: Tensor
    drawn: NarrowSketch | None = None
    error: Exception | None = None

    def __call__(self, products: Tensor, sums: Tensor) -> Tensor:
        """What multiplies the products in the answers, and the damping, on one after the other."""
        rows, k = len(self.system.b), len(self.omega)
        self.system.num_hvps += k
        found = np.zeros(rows * k + 1)
        try:
            numbers = sums.cpu().numpy()  # one transfer from the device
            self.drawn = NarrowSketch.of_sums(self.system, self.omega, products, numbers)
            sketch = FactoredSketch.of(self.drawn, vouched=False)
            found[-1] = damping = self.config._damping(sketch, self.system)
            found[:-1] = sketch.weights(self.drawn.along, damping).reshape(-1)
        except Exception as error:  # not to pass through compiled code; raised after it
            self.error, found[-1] = error, 1.0
        return torch.from_numpy(found).to(sums.device)


_local = threading.local()
_library: Any = torch.library.Library("hypergrad", "DEF")  # type: ignore[no-untyped-call]
_library.define("nystrom_weights(Tensor products, Tensor sums, int rows) -> Tensor")


def _weights(products: Tensor, sums: Tensor, rows: int) -> Tensor:
    between: _Between = _local.between
    return between(products, sums)


def _fake_weights(products: Tensor, sums: Tensor, rows: int) -> Tensor:
    return sums.new_empty(rows * len(products) + 1)


_library.impl("nystrom_weights", _weights, "CompositeExplicitAutograd")
torch.library.register_fake("hypergrad::nystrom_weights", _fake_weights, lib=_library)


def run_compiled(config: Nystrom, system: DampedSystem) -> Outcome | None:
    """The solve with the sketch of ``config``, from zero; None where nothing was done."""
    if not _fits(config, system):
        return None
    operator, rank, checked = system.operator, config.rank, config.check is True
    assert rank != "auto"
    omega = gaussian_rows(rank, operator.layout.dim, config.generator, operator.device)
    between = _Between(config, system, omega)
    graph = graph_of(
        (operator._signature(), "nystrom", rank, len(system.b), checked),
        lambda: _graph(system, rank, checked),
    )
    results, drawn = _run(graph, between), between.drawn
    if results is None or drawn is None or not _proved(graph, system, omega, results):
        results, drawn = None, NarrowSketch.multiplied(system, omega)
    sketch, answered = config._sketch(system, once=True, drawn=drawn), None
    if results is not None and isinstance(sketch, FactoredSketch):
        answered = _answered(sketch, system, results) if checked else Answered(results[1])
    return config._finished(system, sketch, None, answered)


def _fits(config: Nystrom, system: DampedSystem) -> bool:
    """Whether the graph is for this solve; a warning says so where it could have been."""
    rank = config.rank
    if rank == "auto" or config.sketch != "gaussian" or config.test_matrix is not None:
        return False
    if not is_narrow(system, rank) or rank * system.operator.layout.dim > _LARGEST:
        return False
    return takes(system, _INSTEAD, loops=False)


def _run(graph: Graph, between: _Between) -> Any:
    """The graph's results; None where there are none, or none to be believed."""
    system = between.system
    _local.between = between
    try:
        results = graph.run(system.operator, between.omega, system.b, system.scales)
    finally:
        del _local.between
    if between.error is not None:
        if graph.proved:
            raise between.error
        return None  # eager products will tell what it was
    if results is None or between.config.check is not True:
        return results
    system.num_hvps += len(system.b)
    y, x, residual, numbers, *rest = results
    figures = numbers.tolist()  # one transfer from the device
    if not all(math.isfinite(norm) for norm in figures[0]):
        return None  # where the eager product says what is wrong
    return y, x, residual, numbers, figures, *rest


def _proved(graph: Graph, system: DampedSystem, omega: Tensor, results: Any) -> bool:
    """Whether the products are those of eager code; the graph is not used again if not."""
    if graph.proved:
        return True
    y, _, *checked = results
    pairs = [(omega, y), *([checked[3:5]] if checked else [])]
    graph.proved = all(same_products(graph, system, rows[:1], y[:1]) for rows, y in pairs)
    return graph.proved


def _answered(sketch: FactoredSketch, system: DampedSystem, results: Any) -> Answered:
    """The answer with what is known of it."""
    _, x, residual, numbers, (norms, along), *_, answer = results
    system.note_delivered(x, answer)
    part = 1.0 if sketch.vouched else NO_DOUBT
    good = [
        norm < part * size and curvature > 0
        for norm, curvature, size in zip(norms, along, system.b_norms.tolist(), strict=True)
    ]
    statuses = [Status.FIXED_ITERATIONS] * len(good) if all(good) else None
    return Answered(x, residual, numbers[0], statuses)


def _graph(system: DampedSystem, rank: int, checked: bool) -> Graph:
    operator, rows = system.operator, len(system.b)
    template = detached(operator)

    def nystrom(
        tensors: list[Tensor], omega: Tensor, b: Tensor, scales: Tensor
    ) -> tuple[Tensor, ...]:
        now = template._with_tensors(tensors)
        y = now._traced_products(omega)
        wide = y.to(b.dtype)
        test = omega.to(b.dtype)
        own = omega @ omega.T  # it only says which combinations are orthonormal
        known = torch.cat([wide @ test.T, wide @ wide.T], dim=1)
        along = torch.cat([b.new_zeros(rows, rank), b @ wide.T], dim=1)  # B Omega' is not needed
        sums = torch.cat([x.reshape(-1) for x in (known, along, own.to(b.dtype))])
        found = torch.ops.hypergrad.nystrom_weights(y, sums, rows)
        weights, damping = found[:-1].reshape(rows, rank), found[-1]
        x = b / damping + weights @ wide
        if not checked:
            return y, x
        # As it will be returned.
        answer = (x * scales[:, None]).to(now.dtype)
        rounded = answer.to(b.dtype) / scales[:, None]
        # Products of rows of norm one lose no digits to the narrow dtype's smallest numbers.
        unit = powers_of_two(torch.linalg.vector_norm(rounded, dim=1))[:, None]
        narrow = (rounded / unit).to(now.dtype)
        product = now._traced_products(narrow)
        residual = b - product.to(b.dtype) * unit - damping * rounded
        norms = torch.linalg.vector_norm(residual, dim=1)
        curvatures = torch.linalg.vecdot(x, b - residual)
        return y, x, residual, torch.stack([norms, curvatures]), narrow, product, answer

    what = f"Nyström of rank {rank} with {operator!r}"
    return Graph(nystrom, what, _INSTEAD, compiler_options(operator.device))
