"""GMRES for one right-hand side as one compiled graph: products, the step, and the check of it.

A loop in a graph cannot write into what it carries: a basis there would be copied in each turn, and
be multiplied as a whole from the first on, since its shape is fixed.  So it lies beside the graph,
and with it the projected problem: one operation of the graph takes a product, makes it orthogonal
to the basis so far, and says whether the cycle goes on; another makes the step of what was found.

The graph does the ordinary case.  A cycle that gains nothing, singular pivots and what is not
finite are for :mod:`.gmres`, from the start.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.loops import while_loop
from .base import DampedSystem, Outcome, Status
from .compiled import Iterations, proved, underflows
from .gmres import GAIN

_INSTEAD = "GMRES(compile=True) runs eagerly"


@dataclass(eq=False)
class _Cycle:
    """One cycle's basis V and projection: A V_k = V_{k+1} H, with H made triangular by rotations.

    Attributes:
        basis: shape (length, n) at least; its first row is the residual over its norm.
        length: at most so many iterations.
        claim: the estimate of the residual's norm that ends the cycle.
        rounding: of the products; what is left of one relatively below it is nothing.
        rest: the part of the residual outside A V, signed; its size is the estimate of the norm.
        done: iterations so far.
        largest: norm of a product.
        columns, rotations, target: the triangular system so far.
        sound: whether there is a step, which no pivot of noise has a part in.
        error: what was raised, which is not to pass through compiled code.
    """

    basis: Tensor
    length: int
    claim: float
    rounding: float
    rest: float
    done: int = 0
    largest: float = 0.0
    columns: list[list[float]] = field(default_factory=list)
    rotations: list[tuple[float, float]] = field(default_factory=list)
    target: list[float] = field(default_factory=list)
    sound: bool = False
    error: Exception | None = None

    def extend(self, w: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """From A times the last row, and its size: the next row, and whether to multiply it.

        Neither shares memory with what is kept, since the graph may write over it.
        """
        known = self.basis[: self.done + 1]
        column = w.new_zeros(len(known))
        for _ in range(2):  # twice is enough, as in the eager solver
            shares = torch.mv(known, w)
            w = torch.addmv(w, known.mT, shares, alpha=-1.0)
            column += shares
        *entries, whole = torch.cat(
            [column, torch.linalg.vector_norm(w)[None], size[None]]
        ).tolist()  # one transfer from the device
        self.done += 1
        self.largest = max(self.largest, whole)
        outside = entries[-1]
        self._rotate(entries)
        broke = outside <= self.rounding * whole
        going = abs(self.rest) > self.claim  # which no nan is
        if broke or not going or self.done == self.length:
            return w, w.new_zeros(())
        w = w.div_(outside)
        self.basis[self.done] = w
        return w, w.new_ones(())

    def _rotate(self, column: list[float]) -> None:
        """Take the new column through the rotations so far, and make it triangular by one more."""
        for i, (cos, sin) in enumerate(self.rotations):
            upper, lower = column[i], column[i + 1]
            column[i], column[i + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        last, below = column[-2:]
        pivot = math.hypot(last, below)
        cos, sin = (last / pivot, below / pivot) if pivot else (1.0, 0.0)
        self.rotations.append((cos, sin))
        self.columns.append([*column[:-2], pivot])
        self.target.append(cos * self.rest)
        self.rest *= -sin

    def step(self) -> Tensor:
        """The step V y of least residual; zero where there is none to be believed."""
        pivots = [column[-1] for column in self.columns]
        self.sound = min(pivots) > self.rounding * max(pivots)
        if not self.sound:
            return torch.zeros_like(self.basis[0])
        k = self.done
        rows = [column + [0.0] * (k - len(column)) for column in self.columns]
        triangle = torch.tensor(rows, dtype=torch.float64, device="cpu").mT
        target = torch.tensor(self.target, dtype=torch.float64, device="cpu")[:, None]
        y = torch.linalg.solve_triangular(triangle, target, upper=True)[:, 0]
        return torch.mv(self.basis[:k].mT, y.to(self.basis))


_local = threading.local()
_library: Any = torch.library.Library("hypergrad", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("gmres_extend(Tensor w, Tensor size) -> (Tensor, Tensor)")
_library.define("gmres_step(Tensor last) -> Tensor")


def _extend(w: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    cycle: _Cycle = _local.cycle
    try:
        return cycle.extend(w, size)
    except Exception as error:  # raised after the graph
        cycle.error = error
        return torch.zeros_like(w), torch.zeros_like(size)


def _step(last: Tensor) -> Tensor:
    cycle: _Cycle = _local.cycle
    try:
        if cycle.error is None:
            return cycle.step()
    except Exception as error:
        cycle.error = error
    return torch.zeros_like(last)


_library.impl("gmres_extend", _extend, "CompositeExplicitAutograd")
_library.impl("gmres_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake(
    "hypergrad::gmres_extend",
    lambda w, size: (torch.empty_like(w), torch.empty_like(size)),
    lib=_library,
)
torch.library.register_fake("hypergrad::gmres_step", torch.empty_like, lib=_library)


def run_compiled(config: Any, system: DampedSystem, x0: Tensor | None) -> Outcome | None:
    """GMRES with the tolerances and the budget of ``config``; None where it is for eager code."""
    given = Iterations.begin(config, system, x0, _INSTEAD)
    if given is None:
        return None
    operator, b, damping, tolerance = system.operator, system.b, given.damping, given.tolerance
    graph = graph_of((operator._signature(), "gmres", b.dtype), lambda: _graph(operator))
    rounding = torch.finfo(operator.dtype).eps
    longest = min(config.restart, operator.layout.dim, given.budget)
    basis = b.new_empty(longest, b.shape[1])
    x, rest, norm, done = given.start, given.residual, given.norm, 0
    while True:
        cycle = _Cycle(
            basis,
            min(longest, given.budget - done),
            # Beyond the rounding of the products a cycle cannot know its residual: start afresh.
            max(tolerance, rounding * norm),
            rounding,
            norm,
        )
        torch.div(rest, norm, out=basis[0])
        results = _run(graph, system, cycle, x, damping)
        if results is None:
            return None
        x, rest, numbers = results
        before, (norm, largest) = norm, numbers.tolist()  # one transfer from the device
        done += cycle.done
        if not _ordinary(system, cycle, norm, largest):
            return None
        answer = x[None]
        rounded = answer.to(operator.dtype).to(x.dtype)
        if not (graph.proved or proved(graph, system, rounded, rest[None], damping)):
            return None
        if norm <= tolerance:
            status = Status.CONVERGED
            break
        if norm > before:
            return None  # it is to be seen which step did harm, and whether a coarser one would do
        if done == given.budget:
            status = Status.FIXED_ITERATIONS if given.fixed else Status.MAX_ITERATIONS
            break
        if norm >= (1.0 - GAIN) * before:
            return None  # it is to be seen whether that lasts
    return Outcome(
        x=answer,
        residual_norms=b.new_tensor([norm]),
        statuses=[status],
        iterations=[done],
        damping=damping,
    )


def _run(
    graph: Graph, system: DampedSystem, cycle: _Cycle, x: Tensor, damping: float
) -> tuple[Tensor, ...] | None:
    _local.cycle = cycle
    try:
        number = system.b.new_tensor(damping)
        results = graph.run(system.operator, system.b[0], x, cycle.basis[0].clone(), number)
    finally:
        del _local.cycle
        system.num_hvps += cycle.done
    if cycle.error is not None:
        raise cycle.error
    if results is not None:
        system.num_hvps += 1
    found: tuple[Tensor, ...] | None = results
    return found


def _ordinary(system: DampedSystem, cycle: _Cycle, norm: float, largest: float) -> bool:
    """Whether the cycle's numbers are within what the graph is for."""
    limits = torch.finfo(system.b.dtype)
    least = (
        limits.tiny / limits.eps**2
    ) ** 0.5  # squares of products, and of their rounding, count
    good = cycle.sound and math.isfinite(norm) and least < cycle.largest < math.inf
    return good and largest > 0 and not underflows(system, largest)


def _graph(operator: LinearOperator) -> Graph:
    template = detached(operator)

    def gmres(
        tensors: list[Tensor], b: Tensor, start: Tensor, first: Tensor, damping: Tensor
    ) -> tuple[Tensor, ...]:
        now = template._with_tensors(tensors)

        def product(vector: Tensor) -> Tensor:
            return now._traced_products(vector.to(now.dtype)[None])[0].to(b.dtype)

        def going(p: Tensor, go: Tensor) -> Tensor:
            return go > 0

        def turn(p: Tensor, go: Tensor) -> tuple[Tensor, Tensor]:
            image = product(p)
            size = image.square().sum().sqrt() + damping
            p, go = torch.ops.hypergrad.gmres_extend(image + damping * p, size)
            return p, go

        # What a loop reads may share no memory, hence the copy.
        last, _ = while_loop(going, turn, (first.clone(), torch.ones_like(damping)))  # type: ignore[no-untyped-call]
        x = start + torch.ops.hypergrad.gmres_step(last)
        rounded = x.to(now.dtype).to(b.dtype)  # as it will be returned
        rest = b - product(rounded) - damping * rounded
        return x, rest, torch.stack([torch.linalg.vector_norm(rest), rounded.abs().amax()])

    return Graph(gmres, f"GMRES with {operator!r}", _INSTEAD, compiler_options(operator.device))
