"""What an adapter provides, and what it is given.  NumPy only: this runs beside any package."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..atlas.cases import Array, System
from ..atlas.records import Answer, Mode, Products, Record, judge, within

#: As for the library itself: below what the dtypes can attain, so that the budget ends the solve.
TIGHT = {"float32": 1e-9, "float64": 1e-16}


@dataclass(frozen=True)
class Task:
    """One system as an adapter sees it.

    Attributes:
        v: shape (n,), NumPy, in the dtype of the products.
        damping: of the system (A + damping I) x = v.
        product: A times a NumPy array of shape (n,) or (n, k), counted; adapters of PyTorch
            packages wrap it with :func:`torch_product`.
        norm: |A| = 1, for the methods that want a step size of their user.
        rtol: the tight tolerance of the dtype.
        work: iterations, terms or rank; None to leave everything at the package's defaults.
    """

    v: Array
    damping: float
    product: Callable[[Any], Any]
    norm: float
    rtol: float
    work: int | None

    def damped(self, x: Array) -> Array:
        """(A + damping I) x."""
        result: Array = self.product(x) + x.dtype.type(self.damping) * x
        return result


@dataclass(frozen=True)
class Peer:
    """A solver of another package.

    Attributes:
        name: as it is shown, without the package's name.
        family: what it is compared with, like with like.
        solve: task -> answer.
    """

    name: str
    family: str
    solve: Callable[[Task], Answer]


def torch_product(product: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The counted product on CPU tensors."""
    on_tensors: Callable[[Any], Any] | None = getattr(product, "on_tensors", None)
    if on_tensors is not None:  # a product that is PyTorch's own needs no NumPy in between
        return on_tensors
    import torch

    return lambda x: torch.from_numpy(product(x.detach().numpy()))


class _Log(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def listen(solve: Callable[[], Answer]) -> Answer:
    """The answer; a warning or a warning in the log counts as a word of failure."""
    said: list[str] = []
    handler = _Log(said)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = solve()
    except Exception as error:  # whatever it raises is its way of saying that it failed
        return Answer(None, "error", detail=type(error).__name__)
    finally:
        logging.getLogger().removeHandler(handler)
    noise = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    said += [str(item.message) for item in caught if not issubclass(item.category, noise)]
    if said and answer.said in ("nothing", "converged"):
        first = " ".join(said[0].split())[:24]
        return replace(answer, said="failed", figure=math.nan, detail=f"warning: {first}")
    return answer


def attempt(system: System, peer: Peer, work: int | None) -> tuple[Answer, int]:
    """One solve and the products it spent."""
    basis, values = system.basis, system.values

    def apply(x: Array) -> Array:
        columns: Array = values if x.ndim == 1 else values[:, None]
        with np.errstate(all="ignore"):  # an overflow is for the solver to notice
            product: Array = basis @ (columns * (basis.T @ x))
        return product

    dtype = system.case.dtype
    products = Products(apply)
    task = Task(system.v.copy(), system.case.damping, products, 1.0, TIGHT[dtype], work)
    answer = listen(lambda: peer.solve(task))
    return answer, products.count


def run(owner: str, peers: Sequence[Peer], systems: Sequence[System]) -> Iterator[Record]:
    """Every row of one package: within the budgets, and at its defaults."""
    for system in systems:
        for peer in peers:
            for budget in system.case.budgets:
                answer, spent = within(budget, lambda k: attempt(system, peer, k))  # noqa: B023
                yield _row(system, answer, spent, owner, peer, "budget", budget)
            if system.case.has_defaults:
                answer, spent = attempt(system, peer, None)
                yield _row(system, answer, spent, owner, peer, "default", 0)


def _row(
    system: System, answer: Answer, spent: int, owner: str, peer: Peer, mode: Mode, budget: int
) -> Record:
    return judge(system, answer, spent, owner, peer.name, peer.family, mode, budget)
