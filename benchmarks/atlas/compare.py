"""Where another package is more accurate than the library at no more products of its own.

Every answer of a peer is set against the library's at a budget of exactly the products that the
peer spent: the best of all its solvers, and the best of the peer's own kind (CG against CG).  The
library's checks of its answers are products like any other and count against it.

A win is explained by the first of these that holds, by measurement:

- ``checks``: with the few products more that the library's own checks and probes cost, the win is
  gone;
- ``curvature``: the library's solver met negative curvature and stopped, as it said; the peer
  stepped through it;
- ``residual``: the library's answer has the smaller true residual, or one within ten percent.  It
  returns the iterate that solves the system best, which is all that a solver can see; the error
  can say otherwise;
- ``rounding``: the library's error is within ten roundings times the condition number;
- ``unexplained`` otherwise.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from .records import Record

#: Errors within this factor of each other are a tie: two roundings of one answer.
TIE = 2.0
#: Above this error, 1 being that of x = 0, there is no answer to beat.
NO_DIGIT = 0.5
#: A peer that spent more is set against the library at this many products first.
ENOUGH = 1000
#: Runs the library at a budget: (cell, solver's name, products) -> record, None if it cannot.
Rerun = Callable[[tuple[object, ...], str, int], "Record | None"]


@dataclass(frozen=True)
class Win:
    """A cell where a peer is more accurate than the library.

    Attributes:
        against: "any" for the best of all the library's solvers, "kind" for the best of one kind.
        ours: the library's best error at no more than ``hvps`` products, inf if none can run.
        factor: ours over theirs.
    """

    against: str
    owner: str
    solver: str
    mode: str
    slice: str
    spectrum: str
    condition: float | None
    damping: float
    dtype: str
    size: float
    hvps: int
    error: float
    ours: float
    ours_by: str
    factor: float
    residual: float
    ours_residual: float
    why: str
    peer_said: str
    peer_silent: bool


def wins(
    ours: Sequence[Record], peers: Iterable[Record], solvers: dict[str, str], rerun: Rerun
) -> list[Win]:
    """All cells where a peer wins, worst first.

    Args:
        ours: what is known already; only runs at no more products than the peer's are used.
        peers: the records of the peers.
        solvers: the library's solvers by name, with their family.
        rerun: called for what is not known; what it gives is remembered.
    """
    known: dict[tuple[tuple[object, ...], str], dict[int, Record | None]] = {}
    for record in ours:
        if record.mode == "budget":
            known.setdefault((record.cell, record.solver), {})[record.hvps] = record

    def best(
        cell: tuple[object, ...], names: Sequence[str], target: float, hvps: int
    ) -> Record | None:
        """The most accurate at no more than ``hvps`` products; stops at one that is good enough."""
        found: Record | None = None

        def consider(record: Record | None) -> bool:
            nonlocal found
            if record is None or record.hvps > hvps or not math.isfinite(record.error):
                return False
            if found is None or record.error < found.error:
                found = record
            return found.error <= target

        for name in names:
            for record in known.get((cell, name), {}).values():
                consider(record)
        if found is not None and found.error <= target:
            return found
        for name in names:
            runs = known.setdefault((cell, name), {})
            for budget in sorted({min(hvps, ENOUGH), hvps}):
                if budget not in runs:
                    runs[budget] = rerun(cell, name, budget)
                if consider(runs[budget]):
                    return found
        return found

    result = []
    for peer in peers:
        if not peer.error < NO_DIGIT:
            continue
        same = [name for name, family in solvers.items() if family == peer.family]
        for against, names in (("any", list(solvers)), ("kind", same)):
            if not names:
                continue
            mine = best(peer.cell, names, TIE * peer.error, peer.hvps)
            error = math.inf if mine is None else mine.error
            if error > TIE * peer.error:
                more = best(peer.cell, names, TIE * peer.error, peer.hvps + allowance(peer))
                result.append(_win(peer, against, mine, more))
    return sorted(result, key=lambda win: (win.against, -win.factor))


def allowance(peer: Record) -> int:
    """Products that the library's solvers spend on checks and probes where the peer has none."""
    if peer.family == "neumann":
        return 13  # ten Lanczos steps for the step size that the peer was given
    if peer.family == "nystrom":
        return 8  # the check of the sketch, five for the complement, the check of the answer
    # One at the end, one in fifty, one for each claim of the recurrence to have converged.
    return 3 + peer.hvps // 50


def condition_of(peer: Record) -> float:
    """About the condition number of A + damping I."""
    own = {"flat": 2.0, "clustered": 1e4, "exponential": 4.4e8, "1/i": 2e2, "indefinite": 1e4}
    condition = own.get(peer.spectrum, math.inf) if peer.condition is None else peer.condition
    return min(condition, 1.0 + 1.0 / peer.damping)


def explain(peer: Record, mine: Record | None, more: Record | None) -> str:
    """Why the peer wins; see the module."""
    if more is not None and more.error <= TIE * peer.error:
        return "checks"
    if mine is not None and mine.detail == "NEGATIVE_CURVATURE":
        return "curvature"
    if mine is not None and mine.residual <= 1.1 * peer.residual:
        return "residual"
    rounding = float(np.finfo(peer.dtype).eps) * condition_of(peer)
    return "rounding" if mine is not None and mine.error <= 10.0 * rounding else "unexplained"


def _win(peer: Record, against: str, mine: Record | None, more: Record | None) -> Win:
    error = math.inf if mine is None else mine.error
    factor = error / max(peer.error, 1e-17)
    return Win(
        against=against, owner=peer.owner, solver=peer.solver, mode=peer.mode, slice=peer.slice,
        spectrum=peer.spectrum, condition=peer.condition, damping=peer.damping, dtype=peer.dtype,
        size=peer.size, hvps=peer.hvps, error=peer.error, ours=error,
        ours_by="" if mine is None else mine.solver, factor=float(f"{factor:.3g}"),
        residual=peer.residual, ours_residual=math.inf if mine is None else mine.residual,
        why=explain(peer, mine, more), peer_said=peer.said, peer_silent=peer.silent,
    )  # fmt: skip


def write(found: Sequence[Win], path: Path) -> None:
    """Write a CSV, one line a win; only the header where there is none."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Win)])
        writer.writeheader()
        for win in found:
            writer.writerow(asdict(win) | {"peer_silent": int(win.peer_silent)})
