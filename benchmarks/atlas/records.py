"""One solve judged, the same way for everyone: error, products, what was said, whether it holds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from .cases import Array, System

#: How a solver is used: at its defaults, or with a tight tolerance and a budget of products.
Mode = Literal["default", "budget"]
#: converged: it claims a tolerance; failed: a status, flag or warning says that it is not there;
#: figure: no claim, but its report holds the residual; nothing; error: an exception.
Said = Literal["converged", "failed", "figure", "nothing", "error"]

#: A claim may be off by this factor, and by the square root of the rounding however small it is.
CLAIM_SLACK = 10.0
#: An answer that comes without a word should solve the system at least this far.
WORDLESS = 0.1


@dataclass(frozen=True)
class Answer:
    """What a solver gave back.

    Attributes:
        x: shape (n,), None after an exception.
        said: see :data:`Said`.
        figure: for "converged" the relative residual claimed, for "figure" the one reported.
        detail: its own word for it: a status, a flag, an exception's name.
    """

    x: Array | None
    said: Said
    figure: float = math.nan
    detail: str = ""


class Products:
    """A times vectors, counted: every column is one product, whoever asks for it."""

    def __init__(self, apply: Callable[[Array], Array]) -> None:
        self.apply, self.count = apply, 0

    def __call__(self, x: Array) -> Array:
        """A x for x of shape (n,) or (n, k)."""
        self.count += 1 if x.ndim == 1 else x.shape[1]
        return self.apply(x)


@dataclass(frozen=True)
class Record:
    """One row of the table."""

    slice: str
    spectrum: str
    condition: float | None
    damping: float
    dtype: str
    size: float
    owner: str
    solver: str
    family: str
    mode: str
    budget: int
    hvps: int
    error: float
    residual: float
    said: str
    detail: str
    silent: bool

    @property
    def cell(self) -> tuple[object, ...]:
        """The case it is about."""
        return (
            self.slice, self.spectrum, self.condition, self.damping, self.dtype, self.size,
        )  # fmt: skip


def is_silent_failure(answer: Answer, residual: float, dtype: str) -> bool:
    """Whether the caller was left to believe in an answer that is wrong.

    Judged by the true residual, which a solver can know, and not by the error, which it cannot.  A
    claim of convergence, or a residual reported, must hold within a factor of ten or to half the
    digits of the dtype; an answer without a word must at least solve the system to one digit.
    """
    if answer.said in ("failed", "error"):
        return False
    if not math.isfinite(residual):
        return True
    if answer.said == "nothing":
        return residual > WORDLESS
    half_the_digits = float(np.finfo(dtype).eps) ** 0.5
    return bool(residual > max(CLAIM_SLACK * answer.figure, half_the_digits))


def judge(
    system: System, answer: Answer, hvps: int, owner: str, solver: str, family: str,
    mode: Mode, budget: int,
) -> Record:  # fmt: skip
    """The record of one answer."""
    case = system.case
    error = residual = math.inf
    if answer.x is not None and bool(np.isfinite(answer.x).all()):
        error, residual = system.relative_error(answer.x), system.relative_residual(answer.x)
    return Record(
        slice=case.slice, spectrum=case.spectrum, condition=case.condition, damping=case.damping,
        dtype=case.dtype, size=case.size, owner=owner, solver=solver, family=family, mode=mode,
        budget=budget, hvps=hvps, error=float(f"{error:.3g}"), residual=float(f"{residual:.3g}"),
        said=answer.said, detail=answer.detail,
        silent=is_silent_failure(answer, residual, case.dtype),
    )  # fmt: skip


def within(budget: int, solve: Callable[[int], tuple[Answer, int]]) -> tuple[Answer, int]:
    """The answer for the most work (iterations, terms, rank) whose products fit the budget.

    ``solve`` takes an amount of work and says what it spent.  What a solver spends beside its
    iterations, on checks and probes, is its own affair; here it makes it do fewer of them.
    """
    amount = budget
    answer, spent = solve(amount)
    while spent > budget and amount > 1:
        amount = max(1, min(amount - 1, amount * budget // spent))
        answer, spent = solve(amount)
    return answer, spent


def write(records: Iterable[Record], path: Path) -> None:
    """Write a CSV, one line a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        for record in records:
            row = asdict(record)
            row["silent"] = int(record.silent)
            writer.writerow(row)


def read(path: Path) -> list[Record]:
    """Read what :func:`write` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Record(
                slice=row["slice"], spectrum=row["spectrum"],
                condition=float(row["condition"]) if row["condition"] else None,
                damping=float(row["damping"]), dtype=row["dtype"], size=float(row["size"]),
                owner=row["owner"], solver=row["solver"], family=row["family"], mode=row["mode"],
                budget=int(row["budget"]), hvps=int(row["hvps"]), error=float(row["error"]),
                residual=float(row["residual"]), said=row["said"], detail=row["detail"],
                silent=row["silent"] == "1",
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
