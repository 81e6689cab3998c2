"""What a package brings to the comparison, and how a process finds it.  NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .problems import Facts, Problem


@dataclass(frozen=True)
class Solved:
    """An answer as the package gives it.

    Attributes:
        x: what NumPy makes an array of.
        hvps: products spent, where they can be counted.
    """

    x: Any
    hvps: int | None = None


#: An amount of work -> the answer; this is what is timed, from parameters and batch to x.
Solve = Callable[[int], Solved]


@dataclass(frozen=True)
class Contender:
    """A solver of a package in one way of using it.

    Attributes:
        name: as it is shown, without the package's name.
        prepare: the problem in the arrays of the package, and what solves it; not timed.
        knob: what the amount of work is: iterations, a rank, quarters of digits of its tolerance;
            "" for a direct solver, which has none.
        suits: whether it can take on a problem at all, and "" or why not.
    """

    name: str
    prepare: Callable[[Problem], Solve]
    knob: str = "iterations"
    suits: Callable[[Facts], str] = lambda facts: ""


@dataclass(frozen=True)
class Team:
    """All of one package.

    Attributes:
        owner: the package's name.
        contenders: its solvers.
        missing: what should be there and is not, with the reason.
    """

    owner: str
    contenders: tuple[Contender, ...]
    missing: Mapping[str, str]


def team(adapter: str) -> Team:
    """The team of an adapter: a module here that has one, or of ``benchmarks.peers.adapters``."""
    if adapter in ("ours", "jax_peers"):
        result: Team = import_module(f"{__package__}.{adapter}").team()
        return result
    from . import torch_peers

    return torch_peers.team(adapter)
