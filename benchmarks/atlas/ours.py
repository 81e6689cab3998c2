"""The library's solvers, as data, and their half of the table.

A name that the library does not have is an error: nothing is left out of the atlas unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import hypergrad

from ..benchmarks.problems import DIM, spectral
from .cases import Array, Case, System, all_cases, make_system
from .records import Answer, Mode, Products, Record, judge, within

#: Tolerances below what the dtypes can attain: the budget ends the solve, or stagnation does.
TIGHT = {"float32": 1e-9, "float64": 1e-16}
OWNER = "hypergrad"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@dataclass(frozen=True)
class Entry:
    """A solver of the atlas.

    Attributes:
        name: as it is shown.
        family: what it is compared with, like with like.
        default: its configuration at the defaults.
        budgeted: (work, tolerance) -> configuration; ``work`` is near the products to be spent.
        least: no configuration spends fewer products.
    """

    name: str
    family: str
    default: Callable[[], hypergrad.Solver]
    budgeted: Callable[[int, float], hypergrad.Solver]
    least: int = 1


def _rank(work: int) -> int:
    return min(work, DIM)


def _sketched_cg(work: int, rtol: float) -> hypergrad.Solver:
    """A third of the products for the sketch, the rest for iterations."""
    rank = max(1, min(work // 3, DIM // 2))
    return hypergrad.NystromPCG(
        rank, rtol=rtol, max_iters=max(1, work - rank), generator=_generator()
    )


ENTRIES: tuple[Entry, ...] = (
    Entry("Exact", "dense", lambda: hypergrad.Exact(), lambda k, rtol: hypergrad.Exact(), DIM + 1),
    Entry("CG", "cg", lambda: hypergrad.CG(), lambda k, r: hypergrad.CG(rtol=r, max_iters=k)),
    Entry(
        "MINRES",
        "minres",
        lambda: hypergrad.MINRES(),
        lambda k, r: hypergrad.MINRES(rtol=r, max_iters=k),
    ),
    Entry(
        "GMRES",
        "gmres",
        lambda: hypergrad.GMRES(),
        lambda k, r: hypergrad.GMRES(rtol=r, max_iters=k),
    ),
    Entry(
        "Neumann",
        "neumann",
        lambda: hypergrad.Neumann(),
        lambda k, rtol: hypergrad.Neumann(num_terms=k),
    ),
    Entry(
        "Nyström",
        "nystrom",
        lambda: hypergrad.Nystrom(rank=20, generator=_generator()),
        lambda k, rtol: hypergrad.Nystrom(rank=_rank(k), generator=_generator()),
    ),
    Entry(
        "Nyström, columns",
        "nystrom",
        lambda: hypergrad.Nystrom(rank=20, sketch="columns", generator=_generator()),
        lambda k, rtol: hypergrad.Nystrom(
            rank=_rank(k), sketch="columns", generator=_generator()
        ),
    ),
    Entry(
        "Nyström-PCG",
        "cg",
        lambda: hypergrad.NystromPCG(20, generator=_generator()),
        _sketched_cg,
        3,
    ),
)  # fmt: skip


def chosen(names: Sequence[str] | None) -> list[Entry]:
    """Entries by name, all of them for None."""
    known = {entry.name: entry for entry in ENTRIES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"no such solvers: {unknown}; there are {list(known)}")
    return [known[name] for name in names] if names else list(ENTRIES)


def make_systems(slices: Sequence[str] | None = None) -> list[System]:
    """The numbers of every case of the slices named, all for None."""
    cases = [case for case in all_cases() if slices is None or case.slice in slices]
    return [make_system(case, *_factors(case)) for case in cases]


def _factors(case: Case) -> tuple[Array, Array]:
    a = spectral(case.spectrum, getattr(torch, case.dtype), DIM, condition=case.condition)
    return a.basis.numpy(), a.values.numpy()


def attempt(system: System, solver: hypergrad.Solver) -> tuple[Answer, int]:
    """One solve, with what the library said about it and the products it spent."""
    basis, values = torch.from_numpy(system.basis), torch.from_numpy(system.values)
    products = Products(lambda x: basis @ (values * (basis.T @ x)))  # type: ignore[arg-type,return-value]
    try:
        solution = hypergrad.solve(
            products, torch.from_numpy(system.v), solver,
            damping=system.case.damping, on_failure="ignore",
        )  # fmt: skip
    except hypergrad.HypergradError as error:
        return Answer(None, "error", detail=type(error).__name__), products.count
    info = solution.info
    x, status = solution.value.numpy(), info.status
    if status.failed:
        return Answer(x, "failed", detail=status.name), products.count
    figure = info.relative_residual
    if info.converged:
        figure = max(figure, float(getattr(solver, "rtol", 0.0)))
        return Answer(x, "converged", figure, status.name), products.count
    return Answer(x, "figure", figure, status.name), products.count


def record(system: System, entry: Entry, mode: Mode, budget: int) -> Record:
    """One row: at the defaults, or within a budget of products."""
    if mode == "default":
        answer, spent = attempt(system, entry.default())
    else:
        rtol = TIGHT[system.case.dtype]
        answer, spent = within(budget, lambda k: attempt(system, entry.budgeted(k, rtol)))
    return judge(system, answer, spent, OWNER, entry.name, entry.family, mode, budget)


def run(systems: Sequence[System], entries: Sequence[Entry]) -> Iterator[Record]:
    """Every row of the library's half; a solver that cannot keep to a budget is not run at it."""
    for system in systems:
        for entry in entries:
            for budget in system.case.budgets:
                # The heat maps show a direct solver too, with its own price.
                allowed = budget if len(system.case.budgets) > 1 else max(budget, entry.least)
                if allowed >= entry.least:
                    yield record(system, entry, "budget", allowed)
            if system.case.slice != "curve":
                yield record(system, entry, "default", 0)
