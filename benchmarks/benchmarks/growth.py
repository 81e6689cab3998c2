"""How time and peak memory grow: with parameters, rank, right-hand sides, data, and in BLPO.

Each curve is some pieces of work over one quantity, at sizes evenly spaced on a logarithmic scale,
all else fixed.  asv keeps the points; ``python -m benchmarks.growth`` measures all of them in one
run and fits the exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

import hypergrad

from .memory import peak_bytes, wide_model
from .problems import Params, Problem, critic, logistic
from .speed import CG_ITERATIONS, DAMPING, RANK
from .timing import clock, single_threaded
from .updates import one_update

Work = Callable[[], object]


class Exponents(NamedTuple):
    """What theory gives for the larger sizes."""

    time: float
    memory: float


@dataclass(frozen=True)
class Curve:
    """Pieces of work over one quantity.

    Attributes:
        sizes: ascending.
        works: makes all pieces at one size, by name.
        theory: of each piece.
        why: theory in a sentence.
    """

    sizes: tuple[int, ...]
    works: Callable[[int], dict[str, Work]]
    theory: Mapping[str, Exponents]
    why: str


def powers(base: float, first: int, count: int) -> tuple[int, ...]:
    """first, first * base, ...: so many, rounded."""
    return tuple(round(first * base**i) for i in range(count))


def _hessian(problem: Problem, **options: Any) -> hypergrad.HessianOperator:
    # One mode for all sizes: what "auto" chooses would be a step in the curve.
    return hypergrad.hessian(
        problem.loss_fn, problem.params, problem.inputs, problem.targets,
        mode="reverse_over_reverse", **options,
    )  # fmt: skip


def nystrom(operator: hypergrad.LinearOperator, v: Params, rank: int) -> object:
    generator = torch.Generator().manual_seed(0)
    solver = hypergrad.Nystrom(rank, generator=generator, complement="zero")
    # A damping at which rounding is never worth a second pass, which would be a step in the curve.
    solution = hypergrad.solve(operator, v, solver, damping=1.0, on_failure="ignore")
    taken = solution.info.num_hvps
    if taken not in (rank + 1, rank + 2):  # the answer's check may serve for the sketch
        raise RuntimeError(f"Nyström took {taken} products, expected {rank + 1} or one more")
    return solution.value


def krylov(
    solver: type[hypergrad.CG] | type[hypergrad.MINRES],
    operator: hypergrad.LinearOperator,
    v: Params,
    batched: bool = False,
) -> object:
    fixed = solver(rtol=0.0, max_iters=CG_ITERATIONS)
    return hypergrad.solve(operator, v, fixed, damping=DAMPING, batched=batched).value


def in_parameters(size: int, batch: int = 16) -> dict[str, Work]:
    """Two tanh layers and a head, about ``size`` parameters in all, and a small batch."""
    width = round((math.sqrt(81 + 8 * size) - 9) / 4)  # of which 2 width^2 + 9 width make size
    loss_fn, params, x, y = wide_model(width, batch)
    operator = hypergrad.hessian(loss_fn, params, x, y, mode="reverse_over_reverse")
    generator = torch.Generator().manual_seed(1)
    v = operator.layout.unflatten(torch.randn(operator.layout.dim, generator=generator))
    return {
        "gradient": partial(torch.func.grad(loss_fn), params, x, y),
        "product": partial(operator.matvec, v),
        "Nyström, rank 10": partial(nystrom, operator, v, RANK),
        "CG, 20 iterations": partial(krylov, hypergrad.CG, operator, v),
    }


def in_rank(rank: int, batch: int = 1797) -> dict[str, Work]:
    """Logistic regression, whose eigenvalues fall so slowly that no rank here finds rounding."""
    problem = logistic(batch)
    return {"Nyström": partial(nystrom, _hessian(problem), problem.right_hand_side(), rank)}


def in_right_hand_sides(count: int, batch: int = 64, width: int = 64) -> dict[str, Work]:
    problem = critic(batch, width)
    operator = _hessian(problem, chunk_size="auto")
    rows = torch.randn(count, operator.layout.dim, generator=torch.Generator().manual_seed(1))
    block = operator.layout.unflatten_block(rows)
    return {
        f"{solver.__name__}, 20 iterations": partial(krylov, solver, operator, block, batched=True)
        for solver in (hypergrad.CG, hypergrad.MINRES)
    }


def in_batch(batch: int, width: int = 64) -> dict[str, Work]:
    problem = critic(batch, width)
    operator, v = _hessian(problem), problem.right_hand_side()
    return {
        "product": partial(operator.matvec, v),
        "making the operator": lambda: _hessian(problem),
        "Nyström, rank 10": partial(nystrom, operator, v, RANK),
    }


#: BLPO on four trajectories of 64 steps, once over: small, so that an update is some milliseconds.
SMALL_BLPO = {"num_envs": 4, "num_steps": 64, "epochs": 1, "nested_steps": 5, "rank": 5}


def in_nested_steps(steps: int) -> dict[str, Work]:
    return {"BLPO update": one_update("blpo", **SMALL_BLPO | {"nested_steps": steps})}


def in_environments(count: int) -> dict[str, Work]:
    return {"BLPO update": one_update("blpo", **SMALL_BLPO | {"num_envs": count})}


LINEAR = Exponents(1, 1)
CURVES: dict[str, Curve] = {
    "parameters": Curve(
        powers(10**0.5, 1000, 9),
        in_parameters,
        dict.fromkeys(("gradient", "product", "Nyström, rank 10", "CG, 20 iterations"), LINEAR),
        "a product is a fixed number of passes over the weights, and a solve is products and a "
        "fixed number of vectors",
    ),
    "rank": Curve(
        powers(2**0.5, 4, 11),
        in_rank,
        {"Nyström": LINEAR},
        "k products and k vectors kept; the Gram matrix adds k²n, so that time tends to 2 where "
        "k² n exceeds the products",
    ),
    "right-hand sides": Curve(
        powers(2, 1, 8),
        in_right_hand_sides,
        dict.fromkeys(("CG, 20 iterations", "MINRES, 20 iterations"), LINEAR),
        "the arithmetic of a block is that of its columns; below 1 as long as they share overhead",
    ),
    "batch": Curve(
        powers(2, 16, 11),
        in_batch,
        dict.fromkeys(("product", "making the operator", "Nyström, rank 10"), LINEAR),
        "every sample costs the same, and so do its activations; of a solve, what is not products "
        "does not grow",
    ),
    "nested steps": Curve(
        powers(2, 1, 8),
        in_nested_steps,
        {"BLPO update": Exponents(1, 0)},
        "k critic gradients a minibatch beside one correction, which is the same for all k; "
        "nothing of a step is kept",
    ),
    "environments": Curve(
        powers(2, 1, 7),
        in_environments,
        {"BLPO update": LINEAR},
        "a minibatch is one trajectory, so their number grows; the advantages' matrix of T² "
        "numbers a trajectory is kept for all",
    ),
}


class _Growth:
    """asv calls ``setup`` with each work and size; the names are those of the curve."""

    curve: ClassVar[str]
    params: ClassVar[list[list[Any]]]
    param_names: ClassVar[list[str]] = ["work", "size"]
    timer = staticmethod(clock)
    timeout = 300

    def __init_subclass__(cls) -> None:
        # Every second size: asv makes each point anew, in a process of its own.
        cls.params = [list(CURVES[cls.curve].theory), list(CURVES[cls.curve].sizes[::2])]

    def setup(self, work: str, size: int) -> None:
        single_threaded()
        self.run = CURVES[self.curve].works(size)[work]
        self.run()  # the first call of a PyTorch function sets up what all later ones use

    def time_work(self, work: str, size: int) -> None:
        self.run()

    def track_peak_bytes(self, work: str, size: int) -> int:
        return peak_bytes(self.run)


class Parameters(_Growth):
    curve = "parameters"


class Rank(_Growth):
    curve = "rank"


class RightHandSides(_Growth):
    curve = "right-hand sides"


class Batch(_Growth):
    curve = "batch"


class NestedSteps(_Growth):
    curve = "nested steps"


class Environments(_Growth):
    curve = "environments"
