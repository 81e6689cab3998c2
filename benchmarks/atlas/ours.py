"""The library's solvers, as data, and their half of the table.

A name that the library does not have is an error: nothing is left out of the atlas unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hypergrad

from ..benchmarks.problems import DIM, spectral
from .cases import Array, Case, System, all_cases, make_system
from .records import Answer, Mode, Products, Record, judge, within

#: Tolerances below what the dtypes can attain: the budget ends the solve, or stagnation does.
TIGHT = {"float32": 1e-9, "float64": 1e-16}
OWNER = "hypergrad"


@dataclass(frozen=True)
class Entry:
    """A solver of the atlas.

    Attributes:
        name: as it is shown.
        family: what it is compared with, like with like.
        configuration: its name in the library.
        defaults: what its defaults lack: a rank, a seed.
        budgeted: (work, rtol) -> options; ``work`` is near the products to be spent.
        least: no configuration spends fewer products.
    """

    name: str
    family: str
    configuration: str
    defaults: Callable[[], dict[str, Any]]
    budgeted: Callable[[int, float], dict[str, Any]]
    least: int = 1

    def make(self, options: dict[str, Any]) -> hypergrad.Solver:
        """The configuration; AttributeError where the library has none of its name."""
        solver: hypergrad.Solver = getattr(hypergrad, self.configuration)(**options)
        return solver


def _seeded(**options: Any) -> dict[str, Any]:
    return {**options, "generator": torch.Generator().manual_seed(2)}


def _krylov(work: int, rtol: float) -> dict[str, Any]:
    return {"rtol": rtol, "max_iters": work}


def _sketched_cg(work: int, rtol: float) -> dict[str, Any]:
    """A third of the products for the sketch, the rest for iterations."""
    rank = max(1, min(work // 3, DIM // 2))
    return _seeded(rank=rank, rtol=rtol, max_iters=max(1, work - rank))


#: The rank of a sketch at its "defaults": it has none, and 20 is what the pages use.
RANK = 20

ENTRIES: tuple[Entry, ...] = (
    Entry("Exact", "dense", "Exact", dict, lambda k, rtol: {}, DIM + 1),
    Entry("CG", "cg", "CG", dict, _krylov),
    Entry("MINRES", "minres", "MINRES", dict, _krylov),
    Entry(
        "GMRES", "gmres", "GMRES", dict,
        # Without a restart, as every GMRES here: the most accurate that a budget can buy.
        lambda k, rtol: {**_krylov(k, rtol), "restart": min(k, DIM)},
    ),
    Entry(
        "Nyström-PCG", "cg", "NystromPCG", lambda: _seeded(rank=RANK), _sketched_cg, least=3,
    ),
    Entry(
        "Nyström", "nystrom", "Nystrom", lambda: _seeded(rank=RANK),
        lambda k, rtol: _seeded(rank=min(k, DIM)),
    ),
    Entry(
        "Nyström, columns", "nystrom", "Nystrom", lambda: _seeded(rank=RANK, sketch="columns"),
        lambda k, rtol: _seeded(rank=min(k, DIM), sketch="columns"),
    ),
    Entry(
        "Nyström, no complement", "nystrom", "Nystrom",
        lambda: _seeded(rank=RANK, complement="zero"),
        lambda k, rtol: _seeded(rank=min(k, DIM), complement="zero"),
    ),
    Entry("Neumann", "neumann", "Neumann", dict, lambda k, rtol: {"num_terms": k}),
    Entry(
        "Neumann, Chebyshev", "neumann", "Neumann", lambda: {"acceleration": "chebyshev"},
        lambda k, rtol: {"num_terms": k, "acceleration": "chebyshev"},
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
    products = Products(lambda x: basis @ (values * (basis.T @ x)))
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
        answer, spent = attempt(system, entry.make(entry.defaults()))
    else:
        rtol = TIGHT[system.case.dtype]

        def solve(work: int) -> tuple[Answer, int]:
            return attempt(system, entry.make(entry.budgeted(work, rtol)))

        answer, spent = within(budget, solve)
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
            if system.case.has_defaults:
                yield record(system, entry, "default", 0)
