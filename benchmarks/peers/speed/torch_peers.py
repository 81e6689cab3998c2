"""The PyTorch packages and SciPy through the adapters that the atlas has."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch

from ..protocol import TIGHT, Peer, Task
from .contenders import Contender, Solve, Solved, Team
from .problems import Facts, Problem
from .torch_problems import Given, TorchProduct

#: Up to this size a matrix is assembled by products one at a time (linear_operator's own limit).
DENSE = 800


def _prepare(peer: Peer, problem: Problem) -> Solve:
    given, facts = Given(problem), problem.facts

    def solve(work: int) -> Solved:
        product = TorchProduct(given.product())
        task = Task(problem.v, facts.damping, product, facts.norm, TIGHT[problem.dtype], work)
        return Solved(peer.solve(task).x, product.count)

    return solve


def _small_enough(facts: Facts) -> str:
    return "" if facts.size <= DENSE else f"assembles no matrix above {DENSE} rows"


def team(adapter: str) -> Team:
    """The solvers of one package."""
    torch.set_num_threads(1)
    module = import_module(f"benchmarks.peers.adapters.{adapter}")
    contenders = []
    for peer in module.PEERS:
        if peer.family == "dense":
            contenders.append(Contender(peer.name, partial(_prepare, peer), "", _small_enough))
        else:
            knob = "rank" if peer.family == "nystrom" else "iterations"
            contenders.append(Contender(peer.name, partial(_prepare, peer), knob))
    return Team(module.OWNER, tuple(contenders), {})
