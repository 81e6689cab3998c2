"""solver="auto": which solver, from the dimension, the right-hand sides and a short probe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NotSymmetricError
from ..norms import row_norms
from ..spectrum import damping_from_extremes
from .base import DampedSystem, Outcome, Solver, Status
from .cg import CG
from .exact import Exact
from .gmres import GMRES
from .krylov import REFRESH
from .minres import MINRES
from .nystrom import Nystrom
from .nystrom_pcg import NystromPCG
from .options import check_option, is_count, is_tolerance
from .probe import Probe, chebyshev_iterations, probe
from .skew import check_skew

#: What Exact needs beside the matrix, in numbers an entry of it.
_EXACT_COPIES = 6
#: What a sketch needs, in vectors a rank.
_SKETCH_COPIES = 3
#: A sketch of rank 2 ceil(1.5 d) + 1, d the effective dimension at the damping, preconditions to an
#: expected condition number below this (Frangella, Tropp, Udell, arXiv 2110.02820, theorem 5.1).
_SKETCHED_CONDITION = 28.0
#: A recurrence is given this many times the iterations predicted before another solver takes over.
_PATIENCE = 2.0
#: With fewer iterations a right-hand side than this, a sketch makes more of a budget.
_FEW = 5


@dataclass(frozen=True)
class Auto(Solver):
    """Choose the solver from what little products can tell, and say why: ``solver="auto"``.

    A dimension that hardly exceeds the probe's cost is assembled (``Exact``).  Else
    ``probe_steps`` Lanczos steps say whether A + damping I is positive definite as far as can be
    seen, and how fast a Krylov method will go; from that, the dimension n and the number m of
    right-hand sides the HVPs of each candidate are predicted, and the cheapest runs:

    - products that are not those of a symmetric operator: ``GMRES``;
    - ``Exact``, at n + m HVPs, where the matrix fits in ``max_bytes``;
    - ``MINRES`` where negative curvature exceeds the damping, ``CG`` where it does not, at m times
      the iterations predicted;
    - ``NystromPCG`` where the damping is positive, at 3 d + 35 m HVPs or so, with d the effective
      dimension at the damping: for many right-hand sides, or an ill-conditioned system of a
      spectrum that falls fast.  For one right-hand side of moderate condition CG wins.

    A prediction may be wrong.  So each solver but the last has a limit of twice its prediction or
    the price of the next, whichever is more; then the next one goes on from the answer so far.
    With one right-hand side and a damping that is a number the probe starts from the residual,
    and nothing of it is lost: the solve goes on from its best iterate.

    ``info.solver`` is the configuration that ended the solve and ``info.reason`` says, with the
    figures, why it was taken; all products, the probe's too, are in ``info.num_hvps``.

    Attributes:
        rtol: tolerance relative to |v|, on the true residual.
        atol: absolute tolerance; one of the two is positive.
        max_hvps: a budget that the choice and its iterations are fitted to; checks of the true
            residual may take a few more.  None for no budget.
        max_bytes: memory that a dense matrix and its factors, or a sketch, may take.
        probe_steps: Lanczos steps of the probe, >= 2.

    Cost: the probe's HVPs (with one right-hand side, not in vain), then the chosen solver's.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.linspace(1.0, 50.0, 400, dtype=torch.float64))
        >>> info = hypergrad.solve(a, torch.ones(400, dtype=torch.float64), "auto").info
        >>> type(info.solver).__name__, info.converged
        ('CG', True)
        >>> print(info.reason)  # doctest: +ELLIPSIS
        CG: n = 400, 1 right-hand side, damping 0; 20 Lanczos steps saw eigenvalues from 1... to ...
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_hvps: int | None = None
    max_bytes: int = 2**28
    probe_steps: int = 20

    def __post_init__(self) -> None:
        check_option(is_tolerance(self.rtol), "rtol", self.rtol, "a finite number >= 0")
        check_option(is_tolerance(self.atol), "atol", self.atol, "a finite number >= 0")
        positive = self.rtol > 0 or self.atol > 0
        check_option(positive, "rtol", self.rtol, "a number > 0 when atol is 0")
        good = self.max_hvps is None or is_count(self.max_hvps)
        check_option(good, "max_hvps", self.max_hvps, "None or an integer >= 1")
        check_option(
            is_count(self.max_bytes), "max_bytes", self.max_bytes, "a positive number of bytes"
        )
        good = is_count(self.probe_steps) and self.probe_steps >= 2
        check_option(good, "probe_steps", self.probe_steps, "an integer >= 2")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        return _Choice(self, system, x0).run()


@dataclass(frozen=True)
class _Candidate:
    """A solver and the HVPs it is predicted to take."""

    solver: Solver
    cost: float
    #: Iterations a right-hand side; 0 for the direct ones.
    iterations: float = 0.0

    @property
    def name(self) -> str:
        return type(self.solver).__name__


class _Choice:
    """One solve: probe, predict, run, and think again where the prediction was wrong."""

    def __init__(self, config: Auto, system: DampedSystem, x0: Tensor | None) -> None:
        self.config, self.system, self.x = config, system, x0
        self.m, self.n = system.b.shape
        self.tolerances = system.tolerances(config.rtol, config.atol)
        #: Relative residual that the strictest row asks for.
        asked = torch.where(system.b_norms > 0, self.tolerances / system.b_norms, math.inf)
        self.target = min(float(asked.min()), 1.0)
        self.facts = f"n = {self.n}, {_counted(self.m, 'right-hand side')}"
        needed = _EXACT_COPIES * self.n**2 * system.b.element_size()
        direct = Exact(rtol=config.rtol, max_bytes=config.max_bytes)
        exact = _Candidate(direct, self.n + self.m)
        self.exact = [exact] if needed <= config.max_bytes else []

    def run(self) -> Outcome:
        plan = self._plan()
        names = [plan[0].name]
        story = ""
        outcome: Outcome | None = None
        while True:
            chosen = plan.pop(0)
            solver = self._limited(chosen, plan)
            outcome = self._judged(outcome, solver._run(self.system, self.x))
            self.x = outcome.x
            indefinite = Status.NEGATIVE_CURVATURE in outcome.statuses
            if indefinite:
                plan = self._without_definiteness(chosen)
            if not plan or not (indefinite or Status.MAX_ITERATIONS in outcome.statuses):
                break
            what = "met negative curvature" if indefinite else "had not converged"
            story += f"; {chosen.name} {what} after {self.system.num_hvps} HVPs in all"
            names.append(plan[0].name)
        return replace(
            outcome,
            solver=solver,
            backward_solver=chosen.solver,
            reason=f"{', then '.join(names)}: {self.facts}{story}.",
        )

    def _plan(self) -> list[_Candidate]:
        """The candidates in the order in which they are to be tried; at least one."""
        steps = self.config.probe_steps
        if self.exact and self.n <= 2 * steps and self._affordable(self.exact[0]):
            self.facts += f"; a matrix of that size costs no more than twice a probe of {steps}"
            return self.exact
        seen = self._probe()
        if seen is None:
            self.facts += "; v is zero, or the warm start within the tolerance"
            return [_Candidate(CG(self.config.rtol, self.config.atol), 0.0)]
        if not seen.symmetric:
            if self.system.damping == "auto":
                raise NotSymmetricError(
                    "damping='auto' is chosen from real eigenvalues, and this operator is not "
                    "symmetric. Pass a number."
                )
            self._check_repeatable(seen)
            steps_made = _counted(seen.steps, "Lanczos step")
            self.facts += f"; {steps_made} showed an operator that is not symmetric"
            return [_Candidate(GMRES(self.config.rtol, self.config.atol), math.inf, math.inf)]
        return self._symmetric_plan(seen)

    def _probe(self) -> Probe | None:
        """From the residual, if one solve can then go on from it; else from a random start.

        None where v is zero, or the warm start of one right-hand side already will do.
        """
        if not bool((self.system.b_norms > 0).any()):
            return None
        system, steps = self.system, self.config.probe_steps
        if self.config.max_hvps is not None:
            steps = min(steps, max(2, self.config.max_hvps // 4))
        if self.m > 1 or system.damping == "auto":
            # The start of damping="auto" elsewhere, so that it is the same number.
            source = torch.Generator().manual_seed(0)
            random = torch.randn(self.n, generator=source, device="cpu", dtype=torch.float32)
            seen = probe(system, random.to(system.b), steps, None)
            if seen.symmetric and system.damping == "auto":
                values = seen.ritz[0]
                system.damping = damping_from_extremes(
                    float(values[0]), float(values[-1]), rounding=system.rounding
                )
            return seen
        damping = system.resolve_damping()
        x, residual = system.begin(self.x, damping)
        norm = float(row_norms(residual))
        if norm <= float(self.tolerances[0]):
            return None
        self.target = float(self.tolerances[0]) / norm
        seen = probe(system, residual[0], steps, self.target)
        if seen.symmetric:
            step = seen.least_residual(damping)[1].to(x) @ seen.basis
            self.x = x + norm * step
        return seen

    def _symmetric_plan(self, seen: Probe) -> list[_Candidate]:
        config, m = self.config, self.m
        damping = self.system.resolve_damping()
        values = seen.ritz[0]
        low, high = float(values[0]), float(values[-1])
        zero = self.system.rounding * max(abs(low), abs(high))
        definite = low + damping > zero
        iterations = seen.iterations(damping, self.target)
        kind: type[CG] | type[MINRES] = CG if definite else MINRES
        krylov = _Candidate(
            kind(config.rtol, config.atol), m * (iterations + 1 + iterations / REFRESH), iterations
        )
        candidates = [krylov, *self.exact]
        if definite and damping > 0 and low >= -zero:
            candidates += self._sketched(seen, damping)
        candidates.sort(key=lambda candidate: candidate.cost)
        costs = ", ".join(f"{c.name} {c.cost:.3g}" for c in candidates)
        self.facts += (
            f", damping {damping:.3g}; {_counted(seen.steps, 'Lanczos step')} saw eigenvalues from "
            f"{low:.3g} to {high:.3g}; predicted HVPs: {costs}"
        )
        within = [candidate for candidate in candidates if self._affordable(candidate)]
        return within or [self._best_of_budget(krylov, seen, definite, damping)]

    def _sketched(self, seen: Probe, damping: float) -> list[_Candidate]:
        """NystromPCG of the rank that is predicted to cost least, where memory allows it."""
        room = self.config.max_bytes // (_SKETCH_COPIES * self.n * self.system.b.element_size())
        most = min(self.n // 2, room)
        enough = 2 * math.ceil(1.5 * seen.effective_dimension(damping)) + 1
        candidates = []
        for rank in {*(5 * 2**i for i in range(20)), enough}:
            if rank > most:
                continue
            # What the sketch leaves, if it sees all but the smaller half of as many eigenvalues.
            condition = 1.0 + seen.eigenvalue(rank / 2) / damping
            if rank >= enough:
                condition = min(condition, _SKETCHED_CONDITION)
            iterations = chebyshev_iterations(condition, self.target)
            source = torch.Generator().manual_seed(0)
            solver = NystromPCG(rank, self.config.rtol, self.config.atol, generator=source)
            cost = rank + 1 + self.m * (iterations + 1)
            candidates.append(_Candidate(solver, cost, iterations))
        return sorted(candidates, key=lambda candidate: candidate.cost)[:1]

    def _without_definiteness(self, failed: _Candidate) -> list[_Candidate]:
        """What goes on where A + damping I turned out to be indefinite."""
        iterations = 2.0 * failed.iterations
        minres = MINRES(self.config.rtol, self.config.atol)
        plan = [_Candidate(minres, self.m * (iterations + 1), iterations), *self.exact]
        return [c for c in sorted(plan, key=lambda c: c.cost) if self._affordable(c)] or plan[:1]

    def _left(self) -> float:
        """HVPs left of the budget."""
        budget = self.config.max_hvps
        return math.inf if budget is None else budget - self.system.num_hvps

    def _affordable(self, candidate: _Candidate) -> bool:
        return self.config.max_hvps is None or candidate.cost <= self._left()

    def _best_of_budget(
        self, krylov: _Candidate, seen: Probe, definite: bool, damping: float
    ) -> _Candidate:
        """What comes nearest where no candidate is predicted to reach the tolerance."""
        self.facts += f", of which a budget of {self.config.max_hvps} allows none"
        rank = int(min(self._left() - self.m - 7, self.n // 2))  # 7: what checks and tails may take
        few = self.m > 1 and self._left() / self.m - 2 < _FEW
        # Of eigenvalues above the damping that it misses, a sketch makes more than they are.
        if few and definite and damping > 0 and rank >= 1 and seen.eigenvalue(rank / 2) <= damping:
            source = torch.Generator().manual_seed(0)
            return _Candidate(Nystrom(rank, generator=source), self._left())
        return krylov

    def _limited(self, chosen: _Candidate, others: list[_Candidate]) -> Solver:
        """The solver, with a limit on its iterations where there is a budget or another choice."""
        if not isinstance(chosen.solver, CG | MINRES | GMRES | NystromPCG):
            return chosen.solver
        limits = []
        if others:
            limits.append(max(_PATIENCE * chosen.iterations, others[0].cost / self.m))
        if self.config.max_hvps is not None:
            # Checks of the true residual: at the start and the end, and every REFRESH iterations.
            limits.append((self._left() / self.m - 2) / (1 + 1 / REFRESH))
        if not limits:
            return chosen.solver
        return replace(chosen.solver, max_iters=max(1, math.floor(min(limits))))

    def _judged(self, before: Outcome | None, after: Outcome) -> Outcome:
        """The outcome of all attempts, by the tolerances asked for."""
        met = (after.residual_norms <= self.tolerances).tolist()
        # A fixed amount of work was not what was asked for.
        named = {Status.FIXED_ITERATIONS: Status.MAX_ITERATIONS}
        statuses = [
            Status.CONVERGED if ok else named.get(status, status)
            for ok, status in zip(met, after.statuses, strict=True)
        ]
        outcome = replace(after, statuses=statuses)
        if before is not None:
            pairs = zip(before.iterations, after.iterations, strict=True)
            outcome.iterations = [first + second for first, second in pairs]
            outcome.directions = before.directions | after.directions
        return outcome

    def _check_repeatable(self, seen: Probe) -> None:
        """Random products are no operator; GMRES would wander."""
        once, again = self.system.product(seen.basis[:1]), self.system.product(seen.basis[:1])
        check_skew(row_norms(once - again), row_norms(once), self.system.operator.dtype)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
