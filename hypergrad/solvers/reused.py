"""A Nyström sketch that is carried from solve to solve, and refreshed when it has aged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..operators.base import check_same_layout
from .base import DampedSystem, Outcome, Solver, Status
from .nystrom import Nystrom
from .nystrom_pcg import NystromPCG
from .options import check_option, is_tolerance
from .sketch import NystromSketch, positive_damping

Stage = Literal["kept", "updated", "made"]

#: Shorter solves say little of a preconditioner, and cost less than any sketch.
_FEW_ITERATIONS = 5
#: A sketch that missed ``max_residual`` when it was new serves until it is worse by this factor.
_WORSE = 2.0


@dataclass(eq=False)
class ReusedSketch(Solver):
    """Nyström solves of a slowly moving operator, with one sketch for as long as it serves.

    The state that a loop carries from step to step: make one, pass it as ``solver=`` each time.
    The sketch of the first solve stays, and costs nothing more, until a measurement on the answer
    says that the operator has moved away from it.  The measurement is

    - with ``Nystrom``, whose accuracy is that of the sketch, the true relative residual: where it
      exceeds ``max_residual`` the sketch is refreshed and the system solved again, at once;
    - with ``NystromPCG``, whose answers are within ``rtol`` whatever the sketch, the iterations
      for a digit: where they exceed ``max_slowdown`` times those with the fresh sketch it is
      refreshed before the next solve; where a solve failed, at once.

    Refreshed means, in this order, ``NystromSketch.update`` (the old basis is the test matrix),
    and, if that does not serve, a new sketch.  The status of ``Nystrom`` becomes CONVERGED within
    ``max_residual``, and STAGNATED where even a new sketch missed it (raise the rank or the
    damping); such a sketch is then kept until the residual is twice what it left when new, or |v|.

    ``info.sketch_hvps`` says what a refresh cost, 0 where there was none, and ``info.reason`` why.

    Attributes:
        solver: ``Nystrom(...)`` or ``NystromPCG(...)``.
        max_residual: for ``Nystrom``: relative to |v|, also of a warm-started solve, so that with
            ``x0`` a sketch lasts longer.  A new one leaves 0.02 to 0.75, by its rank and damping.
        max_slowdown: for ``NystromPCG``: a factor >= 1.
        sketch: the sketch that is kept, or None.
        age: solves since it was made or updated.
        num_refreshes: how many times that was done, the first sketch not counted.

    Raises (when solving):
        TreeStructureError: the operator acts on other trees than the sketch; carry one a problem.
        DampingError, RankError, NotSymmetricError: see the solver.

    Cost: a solve with a kept sketch: one product to check the answer (``Nystrom``), or CG's.  A
    refresh: ``rank`` products and one for an update, as much again for a new sketch.  Not
    for use by several threads at once.
    Source of the update, a step of subspace iteration: Halko, Martinsson and Tropp, arXiv
    0909.4061, section 4.5.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.logspace(0, -6, 100, dtype=torch.float64))
        >>> v = torch.ones(100, dtype=torch.float64)
        >>> carried = hypergrad.ReusedSketch(hypergrad.Nystrom(rank=60), max_residual=0.05)
        >>> for drift in (1.0, 1.001, 3.0):
        ...     info = hypergrad.solve(drift * a, v, carried, damping=1e-2).info
        ...     print(info.converged, info.sketch_hvps > 0)
        True True
        True False
        True True
        >>> carried.num_refreshes
        1
    """

    solver: Nystrom | NystromPCG
    max_residual: float = 0.5
    max_slowdown: float = 2.0
    sketch: NystromSketch | None = field(default=None, init=False, repr=False)
    age: int = field(default=0, init=False)
    num_refreshes: int = field(default=0, init=False)
    # The first thing to try at the next solve, and what the sketch was worth when it was fresh.
    _due: Stage = field(default="kept", init=False, repr=False)
    _floor: float = field(default=0.0, init=False, repr=False)
    _pace: float = field(default=math.inf, init=False, repr=False)
    _hopeless: bool = field(default=False, init=False, repr=False)

    default_damping = "auto"

    def __post_init__(self) -> None:
        good = isinstance(self.solver, Nystrom | NystromPCG)
        check_option(good, "solver", self.solver, "hypergrad.Nystrom(...) or NystromPCG(...)")
        good = getattr(self.solver, "check", True)
        check_option(good is True, "solver", self.solver, "one with check=True, for true residuals")
        good = is_tolerance(self.max_residual) and self.max_residual > 0
        check_option(good, "max_residual", self.max_residual, "a finite number > 0")
        good = is_tolerance(self.max_slowdown) and self.max_slowdown >= 1
        check_option(good, "max_slowdown", self.max_slowdown, "a finite number >= 1")

    def reset(self) -> None:
        """Forget the sketch; the next solve makes a new one."""
        self.sketch, self.age, self._due = None, 0, "kept"
        self._floor, self._pace, self._hopeless = 0.0, math.inf, False

    def _run(self, system: DampedSystem, x0: torch.Tensor | None) -> Outcome:
        asked = system.damping
        if asked != "auto":
            positive_damping(asked)  # before any product is spent
        if self.sketch is not None:
            check_same_layout(
                self.sketch.layout, system.operator.layout, "the kept sketch and the operator"
            )
        spent, tried, measured = 0, "", ""
        for stage in self._stages():
            tried = tried or measured
            system.damping = asked
            sketch, cost = self._sketch_at(stage, system)
            spent += cost
            outcome = self.solver._holding(sketch)._run(system, x0)
            served, measured = self._judge(stage, outcome, system)
            if served:
                break
        self._keep(sketch, stage)
        return replace(
            outcome,
            statuses=self._statuses(outcome, system),
            reason=self._reason(stage, spent, tried, measured),
            sketch_hvps=spent,
        )

    def _stages(self) -> list[Stage]:
        if self.sketch is None:
            return ["made"]
        if self._hopeless:  # not even a new sketch served the last time: no more than one try
            return ["updated"]
        every: list[Stage] = ["kept", "updated", "made"]
        return every[every.index(self._due) :]

    def _sketch_at(self, stage: Stage, system: DampedSystem) -> tuple[NystromSketch, int]:
        """The sketch to try, and the products that it took."""
        if stage == "made" or self.sketch is None:
            before = system.num_hvps
            return self.solver._sketch_of(system), system.num_hvps - before
        # One that is complete and empty has no basis to begin with.
        if stage == "kept" or self.sketch.rank == 0:
            return self.sketch, 0
        updated = self.sketch.update(
            system.operator, damping=system.damping, generator=self.solver.generator
        )
        system.num_hvps += updated.num_hvps
        return updated, updated.num_hvps

    def _judge(self, stage: Stage, outcome: Outcome, system: DampedSystem) -> tuple[bool, str]:
        """Whether the sketch served, and what was measured."""
        if isinstance(self.solver, NystromPCG):
            return self._judge_iterations(stage, outcome, system)
        residual = _relative(outcome, system)
        # No answer is worse than that of zero, whose residual is v.
        limit = max(self.max_residual, min(_WORSE * self._floor, 1.0))
        if stage == "made":
            self._floor = residual if residual > self.max_residual else 0.0
        elif residual <= self.max_residual:
            self._floor = 0.0
        return residual <= limit, f"a relative residual of {residual:.1e} (limit {limit:.1e})"

    def _judge_iterations(
        self, stage: Stage, outcome: Outcome, system: DampedSystem
    ) -> tuple[bool, str]:
        iterations = max(outcome.iterations)
        # Negative curvature is the operator's own, and no preconditioner's fault.
        aged = (Status.MAX_ITERATIONS, Status.STAGNATED)
        failed = any(status in aged for status in outcome.statuses)
        self._hopeless = failed and (stage == "made" or self._hopeless)
        if failed:
            self._due = "updated"
            return False, f"a failed solve after {iterations} iterations"
        pace = _iterations_a_digit(outcome, system)
        slow = iterations > _FEW_ITERATIONS and pace > self.max_slowdown * self._pace
        self._due = "kept"
        if slow and stage != "made":
            self._due = "updated" if stage == "kept" else "made"
        elif pace > 0 and (stage != "kept" or self._pace == math.inf):
            self._pace = pace
        return True, f"{iterations} iterations, {pace:.1f} a digit"

    def _keep(self, sketch: NystromSketch, stage: Stage) -> None:
        first = self.sketch is None
        self.sketch = sketch
        self.age = self.age + 1 if stage == "kept" else 0
        self.num_refreshes += stage != "kept" and not first

    def _statuses(self, outcome: Outcome, system: DampedSystem) -> list[Status]:
        if isinstance(self.solver, NystromPCG):
            return outcome.statuses
        limits = (self.max_residual * system.b_norms).tolist()
        return [
            status
            if status is Status.NEGATIVE_CURVATURE
            else (Status.CONVERGED if norm <= limit else Status.STAGNATED)
            for status, norm, limit in zip(
                outcome.statuses, outcome.residual_norms.tolist(), limits, strict=True
            )
        ]

    def _reason(self, stage: Stage, spent: int, tried: str, measured: str) -> str:
        if stage == "kept":
            return f"the sketch of {self.age} solves ago served: {measured}"
        what = "updated" if stage == "updated" else "made"
        why = f" after {tried}" if tried else ""
        return f"a sketch was {what} with {spent} HVPs{why}: {measured}"


def _relative(outcome: Outcome, system: DampedSystem) -> float:
    """The largest relative residual of the answers."""
    sizes = torch.where(system.b_norms > 0, system.b_norms, 1.0)
    return float((outcome.residual_norms / sizes).max())


def _iterations_a_digit(outcome: Outcome, system: DampedSystem) -> float:
    """The most iterations that any right-hand side took for a factor of ten in its residual."""
    paces = [0.0]
    norms = zip(system.start_norms.tolist(), outcome.residual_norms.tolist(), strict=True)
    for count, (start, end) in zip(outcome.iterations, norms, strict=True):
        if count and 0 < end < start:
            paces.append(count / math.log10(start / end))
    return max(paces)
