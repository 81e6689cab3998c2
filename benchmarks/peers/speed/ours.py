"""The library: every solver that gets there, on eager and on compiled products."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hypergrad

from .contenders import Contender, Solve, Solved, Team
from .problems import Facts, Problem
from .torch_problems import Given

#: Rank of the preconditioner's sketch.
PCG_RANK = 40
#: Up to this size a matrix is assembled.
DENSE = 2000

Choose = Callable[[int], hypergrad.Solver]


def rtol_of(work: int) -> float:
    """The tolerance of so many quarters of a digit, of which none has more than 400."""
    return float(10.0 ** (-min(work, 400) / 4))


def _operator(given: Given, compiled: bool) -> Callable[[], object]:
    """What is solved with, made anew for each solve as in an outer loop."""
    if given.has_loss:
        loss, params, batch = given.loss, given.tensors["params"], given.batch
        assert loss is not None
        return lambda: hypergrad.hessian(loss, params, *batch, compile=compiled)
    if not compiled:
        return given.product
    if given.problem.facts.kind == "dense":
        return lambda: given.tensors["matrix"]
    product = given.product()
    return lambda: hypergrad.as_operator(product, like=given.v, batchable=True)


def _prepare(choose: Choose, knob: str, compiled: bool, problem: Problem) -> Solve:
    if problem.dtype == "float32" and getattr(choose(1), "mixed_precision", False):
        raise ValueError("in float32 it is the same as without")
    given, damping = Given(problem), problem.facts.damping
    most = problem.facts.size if knob == "rank" else sys.maxsize
    make = _operator(given, compiled)

    def solve(work: int) -> Solved:
        solution = hypergrad.solve(
            make(), given.v, choose(min(work, most)), damping=damping, on_failure="ignore"
        )
        value = solution.value
        assert isinstance(value, Tensor)
        return Solved(value, solution.info.num_hvps)

    return solve


def _sketch(work: int) -> hypergrad.Solver:
    return hypergrad.Nystrom(rank=work, generator=torch.Generator().manual_seed(0))


def _mixed(reorthogonalize: bool, work: int) -> hypergrad.Solver:
    return hypergrad.CG(
        rtol=rtol_of(work), compile=True, reorthogonalize=reorthogonalize, mixed_precision=True
    )


def _preconditioned(work: int) -> hypergrad.Solver:
    source = torch.Generator().manual_seed(0)
    return hypergrad.NystromPCG(rank=PCG_RANK, rtol=rtol_of(work), generator=source)


def _large_enough(facts: Facts) -> str:
    return "" if facts.size > 2 * PCG_RANK else "smaller than its sketch"


def _small_enough(facts: Facts) -> str:
    return "" if facts.size <= DENSE else f"assembles no matrix above {DENSE} rows here"


def _rank_fits(facts: Facts) -> str:
    # A sketch that captures a spectrum is far smaller than it; memory grows with the rank.
    return "" if facts.size <= 20_000 else "a sketch of so slow a spectrum is no use here"


TOLERANCE = "quarters of a digit of rtol"


def team() -> Team:
    """All ways of using the library that are compared."""
    torch.set_num_threads(1)

    def of(
        name: str, choose: Choose, knob: str = TOLERANCE,
        suits: Callable[[Facts], str] = lambda facts: "", *, compiled: bool = False,
    ) -> Contender:  # fmt: skip
        return Contender(name, partial(_prepare, choose, knob, compiled), knob, suits)

    return Team(
        "hypergrad",
        (
            of("CG", lambda work: hypergrad.CG(rtol=rtol_of(work))),
            of(
                "CG, orthogonal",
                lambda work: hypergrad.CG(rtol=rtol_of(work), reorthogonalize=True),
            ),
            of("CG, fixed", lambda work: hypergrad.CG(rtol=0.0, max_iters=work), "iterations"),
            of("MINRES", lambda work: hypergrad.MINRES(rtol=rtol_of(work))),
            of("GMRES", lambda work: hypergrad.GMRES(rtol=rtol_of(work))),
            of("NystromPCG", _preconditioned, TOLERANCE, _large_enough),
            of("Nystrom", _sketch, "rank", _rank_fits),
            of("Exact", lambda work: hypergrad.Exact(), "", _small_enough),
            of("auto", lambda work: hypergrad.Auto(rtol=rtol_of(work))),
            of(
                "CG, one graph",
                lambda work: hypergrad.CG(rtol=rtol_of(work), compile=True),
                compiled=True,
            ),
            of(
                "CG, orthogonal, one graph",
                lambda work: hypergrad.CG(rtol=rtol_of(work), compile=True, reorthogonalize=True),
                compiled=True,
            ),
            of("CG, mixed, one graph", partial(_mixed, False), compiled=True),
            of("CG, orthogonal, mixed, one graph", partial(_mixed, True), compiled=True),
            of(
                "MINRES, one graph",
                lambda work: hypergrad.MINRES(rtol=rtol_of(work), compile=True),
                compiled=True,
            ),
            of(
                "GMRES, one graph",
                lambda work: hypergrad.GMRES(rtol=rtol_of(work), compile=True),
                compiled=True,
            ),
        ),
        {},
    )
