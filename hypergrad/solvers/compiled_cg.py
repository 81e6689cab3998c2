"""CG for one right-hand side as one compiled graph: products, recurrence and the check at the end.

The graph does the ordinary case.  What it cannot settle, negative curvature, products that are not
symmetric, a recurrence that lost touch with the true residual, goes on in :mod:`.cg`.  In mixed
precision another graph, whose recurrence is one of float32, goes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.rounded_products import rounded
from .base import DampedSystem, Outcome, Status
from .compiled import Iterations, proved, underflows
from .krylov import PATIENCE
from .skew import allowed_skew
from .traced_cg import GATHERED, recurrence

_INSTEAD = "CG(compile=True) runs eagerly"
#: The recurrence stops at this part of the tolerance: its residual and the true one differ by
#: rounding, and a check that fails costs more than the iteration that it would have taken.
_SHARE = 0.95
#: A further round, from the true residual, must have gained this much to be worth another.
_GAIN = 0.1
#: In float32, or the rounding of its products is too much for the condition of the system: rounds
#: then take more iterations than float64 does.
_NARROW_GAIN = 0.01
#: Residuals that a graph keeps to be orthogonal to; the older ones go.  Its work is that of so many
#: from the first iteration on.
_KEPT = 64


def run_compiled(config: Any, system: DampedSystem, x0: Tensor | None) -> Outcome | None:
    """CG with the tolerances and the budget of ``config``.

    None where nothing was done; an outcome whose status is not CONVERGED, MAX_ITERATIONS or
    FIXED_ITERATIONS is where :mod:`.cg` is to go on from.
    """
    given = Iterations.begin(config, system, x0, _INSTEAD)
    if given is None:
        return None
    kept = min(_KEPT, -(-given.budget // GATHERED) * GATHERED) if config.reorthogonalize else 0
    rounds = _Rounds(system, given, kept, given.start, given.residual, given.norm)
    if config.mixed_precision and system.operator.dtype == torch.float64:
        graph = rounds.graph(narrow=True)
        outcome = rounds.in_float32(graph)
        if outcome is not None or graph.compiled is None or rounds.done >= given.budget:
            return outcome
    return rounds.in_full()


@dataclass
class _Rounds:
    """Calls of graphs, each a recurrence from the true residual of the answer so far.

    Attributes:
        system, given: what is solved, and the numbers that end it.
        kept: as many residuals are kept to be orthogonal to.
        x, rest: the answer so far and its true residual, of shape (n,) in the working dtype.
        norm: of ``rest``.
        done: iterations so far.
    """

    system: DampedSystem
    given: Iterations
    kept: int
    x: Tensor
    rest: Tensor
    norm: float
    done: int = 0

    def graph(self, *, narrow: bool) -> Graph:
        operator, fixed = self.system.operator, self.given.fixed
        return graph_of(
            (operator._signature(), "cg", fixed, self.kept, narrow, self.system.b.dtype),
            lambda: _graph(operator, fixed, self.kept, narrow),
        )

    def in_full(self) -> Outcome | None:
        """Rounds in the operator's dtype; as :func:`run_compiled`."""
        given, graph, status = self.given, self.graph(narrow=False), Status.STAGNATED
        for _ in range(PATIENCE):
            before, found = self.norm, self._round(graph)
            if found is None:
                return None
            if given.fixed or found.norm < before:
                self._take(found)
            if not found.definite:
                break
            if given.fixed:
                status = Status.FIXED_ITERATIONS if self.norm > 0 else Status.CONVERGED
                break
            if self.norm <= given.tolerance:
                status = Status.CONVERGED
                break
            if self.done >= given.budget:
                status = Status.MAX_ITERATIONS
                break
            if self.norm > _GAIN * before:
                break
        return self._outcome(status)

    def in_float32(self, graph: Graph) -> Outcome | None:
        """Rounds with products in float32, as long as each gains; None where it takes others.

        What they found until then is where those begin.
        """
        while True:
            before, found = self.norm, self._round(graph)
            if found is None:
                return None
            if found.norm < before:
                self._take(found)
            if self.norm <= self.given.tolerance:
                return self._outcome(Status.CONVERGED)
            if self.done >= self.given.budget:  # whether to trust the curvature is for eager code
                status = Status.MAX_ITERATIONS if found.definite else Status.STAGNATED
                return self._outcome(status)
            if not found.definite or self.norm > _NARROW_GAIN * before:
                return None

    def _round(self, graph: Graph) -> _Found | None:
        """One call, whose products are counted; None where its results are not to be used."""
        system, given, b = self.system, self.given, self.system.b
        claim = 0.0 if given.fixed else _SHARE * max(given.tolerance, torch.finfo(b.dtype).eps ** 2)
        left = torch.tensor(given.budget - self.done, device=b.device)
        results = graph.run(
            system.operator, b[0], self.x, self.rest,
            b.new_tensor(claim), b.new_tensor(given.damping), left,
        )  # fmt: skip
        if results is None:
            return None
        found = _Found.read(*results)
        self.done += found.iterations
        system.num_hvps += found.iterations + 1
        if not (found.symmetric and math.isfinite(found.norm)):
            return None  # where the eager solver says what is wrong, or that it is rounding
        if underflows(system, found.largest):
            return None
        x, rest = found.x[None], found.rest[None]
        rounded = x.to(system.operator.dtype).to(x.dtype)
        good = graph.proved or proved(graph, system, rounded, rest, given.damping)
        return found if good else None

    def _take(self, found: _Found) -> None:
        self.x, self.rest, self.norm = found.x, found.rest, found.norm

    def _outcome(self, status: Status) -> Outcome:
        return Outcome(
            x=self.x[None],
            residual_norms=self.system.b.new_tensor([self.norm]),
            statuses=[status],
            iterations=[self.done],
            damping=self.given.damping,
        )


@dataclass
class _Found:
    """Where a round ended: the answer, its true residual, and numbers of the host."""

    x: Tensor
    rest: Tensor
    iterations: int
    norm: float
    definite: bool
    symmetric: bool
    largest: float

    @classmethod
    def read(cls, x: Tensor, rest: Tensor, numbers: Tensor) -> _Found:
        # One transfer from the device.
        iterations, norm, definite, symmetric, largest = numbers.tolist()
        return cls(x, rest, int(iterations), norm, bool(definite), bool(symmetric), largest)


def _graph(operator: LinearOperator, fixed: bool, kept: int, narrow: bool) -> Graph:
    """A round, with products in float32 if ``narrow``; the one that checks is the operator's."""
    template = detached(operator)
    dtype = torch.float32 if narrow else operator.dtype

    def conjugate_gradients(
        tensors: list[Tensor],
        b: Tensor,
        start: Tensor,
        residual: Tensor,
        claim: Tensor,
        damping: Tensor,
        budget: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = template._with_tensors(tensors)
        # Far below one, narrow numbers would lose digits.
        unit = torch.linalg.vector_norm(residual)

        def product(vector: Tensor) -> Tensor:
            return now._traced_products(vector[None])[0]

        def within(vector: Tensor) -> Tensor:
            return rounded(product, vector) if narrow else product(vector)

        correction, (iterations, definite, skew) = recurrence(
            within,
            residual / unit if narrow else residual,
            claim / unit if narrow else claim,
            damping,
            budget,
            dtype,
            keep_best=not fixed,
            kept=kept,
            until_untrue=narrow,
        )
        correction = correction.to(b.dtype)
        x = start + (unit * correction if narrow else correction)
        returned = x.to(now.dtype)
        left = b - product(returned).to(b.dtype) - damping * returned.to(b.dtype)
        symmetric = skew <= allowed_skew(now.dtype)
        norm, largest = torch.linalg.vector_norm(left), returned.abs().amax()
        facts = (iterations, norm, definite, symmetric, largest)
        return x, left, torch.stack([fact.to(b.dtype) for fact in facts])

    return Graph(
        conjugate_gradients,
        f"CG{' in float32' if narrow else ''} with {operator!r}",
        _INSTEAD,
        compiler_options(operator.device),
    )
