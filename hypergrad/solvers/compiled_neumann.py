"""A Neumann series as one compiled graph: its terms in a loop, and the check at the end.

The graph does the ordinary case.  A residual that grows where the step was chosen, one that ends no
smaller than v, negative curvature and what is not finite are for :mod:`.neumann`, from the start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..norms import powers_of_two
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.loops import while_loop
from .base import DampedSystem, Outcome, Status
from .compiled import proved, takes

if TYPE_CHECKING:
    from .neumann import Series

_INSTEAD = "Neumann(compile=True) runs eagerly"


def run_compiled(series: Series) -> Outcome | None:
    """All terms of a series that has its bounds; None where it is to be done eagerly."""
    system, damping, terms = series.system, series.damping, series.config.num_terms
    if not takes(system, _INSTEAD, loops=True):
        return None
    operator, plain = system.operator, series.config.acceleration == "none"
    graph = graph_of(
        (operator._signature(), "neumann", plain, len(system.b), system.b.dtype),
        lambda: _graph(system, plain),
    )
    results = graph.run(
        operator,
        system.b,
        series.x,
        series.residual,
        series.step[:, None],
        series.ratio[:, None],
        system.scales[:, None],
        system.b.new_tensor(damping),
        torch.tensor(terms - 1, device=system.b.device),
    )
    if results is None:
        return None
    x, residual, numbers = results
    system.num_hvps += terms * len(x)
    norms, along, grew = numbers.tolist()  # one transfer from the device
    if not all(math.isfinite(norm) for norm in norms):
        return None  # where the eager solver says what is wrong
    if not (graph.proved or proved(graph, system, system.returned(x), residual, damping)):
        return None
    statuses = []
    for norm, curvature, more, size in zip(
        norms, along, grew, system.b_norms.tolist(), strict=True
    ):
        zero = norm == 0 and (curvature > 0 or size == 0)
        if not zero and not (norm < size and curvature > 0 and not (series.auto and more)):
            return None
        statuses.append(Status.CONVERGED if zero else Status.FIXED_ITERATIONS)
    return Outcome(
        x=x,
        residual_norms=numbers[0],
        statuses=statuses,
        iterations=[terms] * len(x),
        damping=damping,
        smallest_eigenvalue=series.smallest,
    )


def _graph(system: DampedSystem, plain: bool) -> Graph:
    operator, rounding = system.operator, 1.0 + system.rounding
    template = detached(operator)

    def neumann(
        tensors: list[Tensor],
        b: Tensor,
        start: Tensor,
        residual: Tensor,
        step: Tensor,
        ratio: Tensor,
        scales: Tensor,
        damping: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = template._with_tensors(tensors)

        def applied(x: Tensor) -> Tensor:
            # Products of rows of norm one lose no digits to the narrow dtype's smallest numbers.
            unit = powers_of_two(torch.linalg.vector_norm(x, dim=1))[:, None]
            product = now._traced_products((x / unit).to(now.dtype))
            return product.to(b.dtype) * unit + damping * x

        norms = torch.linalg.vector_norm(residual, dim=1)
        # What a loop reads may share no memory, hence the copies.
        first = (
            torch.zeros_like(count),
            start.clone(),
            residual.clone(),
            step * residual,
            torch.ones_like(step),
            norms,
            torch.zeros_like(norms),
        )

        def going(*carried: Tensor) -> Tensor:
            return carried[0] < count

        def term(*carried: Tensor) -> tuple[Tensor, ...]:
            k, x, r, d, weight, least, grew = carried
            r = r - applied(d)
            norms = torch.linalg.vector_norm(r, dim=1)
            following = 1.0 / (2.0 - ratio**2 * weight)
            return (
                k + 1,
                x + d,
                r,
                ratio**2 * weight * following * d + 2.0 * following * step * r,
                following,
                torch.minimum(least, norms) if plain else least.clone(),
                torch.maximum(grew, (norms > rounding * least).to(norms.dtype)),
            )

        ended = while_loop(going, term, first)  # type: ignore[no-untyped-call]
        _, x, r, d, _, _, grew = ended
        x = x + d
        rounded = (x * scales).to(now.dtype).to(b.dtype) / scales  # as it will be returned
        left = b - applied(rounded)
        norms = torch.linalg.vector_norm(left, dim=1)
        along = torch.linalg.vecdot(d, r - left)
        return x, left, torch.stack([norms, along, grew])

    what = f"a Neumann series with {operator!r}"
    return Graph(neumann, what, _INSTEAD, compiler_options(operator.device))
