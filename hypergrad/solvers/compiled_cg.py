"""CG for one right-hand side as one compiled graph: products, recurrence and the check at the end.

The graph does the ordinary case.  What it cannot settle, negative curvature, products that are not
symmetric, a recurrence that lost touch with the true residual, goes on in :mod:`.cg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.loops import while_loop
from .base import DampedSystem, Outcome, Status, allowed_skew
from .compiled import Iterations, proved, underflows
from .krylov import PATIENCE

_INSTEAD = "CG(compile=True) runs eagerly"
#: The recurrence stops at this part of the tolerance: its residual and the true one differ by
#: rounding, and a check that fails costs more than the iteration that it would have taken.
_SHARE = 0.95
#: A further round, from the true residual, must have gained this much to be worth another.
_GAIN = 0.1
#: Residuals that a graph keeps to be orthogonal to; the older ones go.  Its work is that of so many
#: from the first iteration on.
_KEPT = 64
#: As many are gathered before they join the others, which is a copy of all: a loop cannot write
#: into what it carries.
_GATHERED = 8


@dataclass
class _Found:
    """Where a round of the recurrence ended, as numbers of the host."""

    iterations: int
    norm: float
    definite: bool
    skewed: bool
    largest: float


def run_compiled(config: Any, system: DampedSystem, x0: Tensor | None) -> Outcome | None:
    """CG with the tolerances and the budget of ``config``.

    None where nothing was done; an outcome whose status is not CONVERGED, MAX_ITERATIONS or
    FIXED_ITERATIONS is where :mod:`.cg` is to go on from.
    """
    given = Iterations.begin(config, system, x0, _INSTEAD)
    if given is None:
        return None
    operator, fixed, damping = system.operator, given.fixed, given.damping
    tolerance, budget, norm = given.tolerance, given.budget, given.norm
    kept = min(_KEPT, -(-budget // _GATHERED) * _GATHERED) if config.reorthogonalize else 0
    graph = graph_of(
        (operator._signature(), "cg", fixed, kept, system.b.dtype),
        lambda: _graph(operator, fixed, kept),
    )
    claim = 0.0 if fixed else _SHARE * max(tolerance, torch.finfo(system.b.dtype).eps ** 2)
    scalars = system.b.new_tensor(claim), system.b.new_tensor(damping)
    x, rest = given.start, given.residual
    done, status = 0, Status.STAGNATED
    for _ in range(PATIENCE):
        left = torch.tensor(budget - done, device=system.b.device)
        results = graph.run(operator, system.b[0], x, rest, *scalars, left)
        if results is None:
            return None
        x, rest, numbers = results
        found = _read(numbers, operator)
        done, before = done + found.iterations, norm
        system.num_hvps += found.iterations + 1
        if found.skewed or not math.isfinite(found.norm):
            return None  # where the eager solver says what is wrong, or that it is rounding
        if underflows(system, found.largest):
            return None
        answer, norm = x[None], found.norm
        rounded = answer.to(operator.dtype).to(x.dtype)
        if not (graph.proved or proved(graph, system, rounded, rest[None], damping)):
            return None
        if not found.definite:
            break
        if fixed:
            status = Status.FIXED_ITERATIONS if norm > 0 else Status.CONVERGED
            break
        if norm <= tolerance:
            status = Status.CONVERGED
            break
        if done >= budget:
            status = Status.MAX_ITERATIONS
            break
        if norm > _GAIN * before:
            break
    return Outcome(
        x=answer,
        residual_norms=system.b.new_tensor([norm]),
        statuses=[status],
        iterations=[done],
        damping=damping,
    )


def _read(numbers: Tensor, operator: LinearOperator) -> _Found:
    iterations, norm, definite, skew, largest = numbers.tolist()  # one transfer from the device
    skewed = not skew <= allowed_skew(operator.dtype)
    return _Found(int(iterations), norm, bool(definite), skewed, largest)


def _graph(operator: LinearOperator, fixed: bool, kept: int) -> Graph:
    template = detached(operator)

    def conjugate_gradients(
        tensors: list[Tensor],
        b: Tensor,
        start: Tensor,
        residual: Tensor,
        claim: Tensor,
        damping: Tensor,
        budget: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = template._with_tensors(tensors)

        def product(vector: Tensor) -> Tensor:
            return now._traced_products(vector[None])[0]

        correction, numbers = _recurrence(
            product, residual, claim, damping, budget, now.dtype, keep_best=not fixed, kept=kept
        )
        x = start + correction.to(b.dtype)
        rounded = x.to(now.dtype)  # as it will be returned
        left = b - product(rounded).to(b.dtype) - damping * rounded.to(b.dtype)
        iterations, definite, skew = numbers
        facts = (iterations, torch.linalg.vector_norm(left), definite, skew, rounded.abs().amax())
        return x, left, torch.stack([x.to(b.dtype) for x in facts])

    return Graph(
        conjugate_gradients,
        f"CG with {operator!r}",
        _INSTEAD,
        compiler_options(operator.device),
    )


def _along(rows: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector along orthonormal rows, by products of matrices: calls of a BLAS."""
    part: Tensor = torch.mm(torch.mm(rows, vector[:, None]).mT, rows)[0]
    return part


def _recurrence(
    product: Callable[[Tensor], Tensor],
    residual: Tensor,
    claim: Tensor,
    damping: Tensor,
    budget: Tensor,
    dtype: torch.dtype,
    *,
    keep_best: bool,
    kept: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """CG from zero: the correction, then iterations, definiteness, and relative asymmetry.

    Vectors are of the products' dtype, inner products of the wider one of ``residual``.  Of
    symmetric products p0'A p1 = p1'A p0, and CG chooses p1 so that the latter is zero.  With
    ``kept`` each residual is made orthogonal to as many before it; see :mod:`.orthogonal`.
    """
    wide, rounding = residual.dtype, torch.finfo(dtype).eps
    # What a loop reads may share no memory, hence the copies.
    r = residual.to(dtype, copy=True)
    squared = residual.square().sum()
    length0 = squared.sqrt()
    # Few: each tensor that a loop carries costs it as much as a hundred numbers of a vector.
    first = {
        "k": torch.zeros_like(budget),
        "x": torch.zeros_like(r),
        "r": r,
        "p": r.clone(),
        "squared": squared,
        "beta": torch.ones_like(squared),
        "skew": torch.zeros_like(squared),
    }
    if keep_best:
        first |= {"best_x": torch.zeros_like(r), "best": squared.clone()}
    names, narrow = list(first), damping.to(dtype, copy=True)

    def going(*state: Tensor) -> Tensor:
        now = dict(zip(names, state, strict=True))
        return (now["squared"] > claim.square()) & (now["k"] < budget)

    def step(*state: Tensor, blocks: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        now = dict(zip(names, state, strict=True))
        p, r, k = now["p"], now["r"], now["k"]
        image = product(p)
        wide_p, wide_image = p.to(wide), image.to(wide)
        damped = wide_image + damping * wide_p
        along = (wide_p * damped).sum()
        length = wide_p.square().sum().sqrt()
        size = wide_image.square().sum().sqrt() + damping * length
        definite = along > rounding * length * size
        alpha = torch.where(definite, now["squared"] / along, 0.0).to(dtype)
        after = r - alpha * (image + narrow * p)
        for part in [_along(block, after) for block in blocks]:
            after = after - part
        squared = after.to(wide).square().sum()
        beta = squared / now["squared"]
        # p0 = (p1 - r1) / beta, hence p0'A p1:
        gap = (along - (r.to(wide) * damped).sum()).abs() / now["beta"]
        new = {
            "k": k + 1,
            "x": now["x"] + alpha * p,
            "r": after,
            "p": after + beta.to(dtype) * p,
            "squared": torch.where(definite, squared, -now["squared"]),  # which ends the loop
            "beta": beta,
            "skew": torch.where(k == 1, gap / (length0 * size), now["skew"]),
        }
        if keep_best:  # one late, so that no pass over a vector is needed for it alone
            better = now["squared"] < now["best"]
            new["best_x"] = torch.where(better, now["x"], now["best_x"])
            new["best"] = torch.where(better, now["squared"], now["best"])
        return tuple(new.values())

    def gathering(*state: Tensor) -> Tensor:
        return going(*state[:-2]) & (state[-2] < _GATHERED)

    def turn(*state: Tensor) -> tuple[Tensor, ...]:
        """Some steps, in a loop of their own."""
        *outer, block = state

        def gather(*state: Tensor) -> tuple[Tensor, ...]:
            *inner, count, gathered = state
            now = dict(zip(names, inner, strict=True))
            own = now["r"] / now["squared"].sqrt().to(now["r"].dtype)
            gathered = torch.cat([gathered[1:], own[None]])
            return (*step(*inner, blocks=(block, gathered)), count + 1, gathered)

        none = torch.zeros_like(budget), torch.zeros_like(block[:_GATHERED])
        *outer, _, gathered = while_loop(gathering, gather, (*outer, *none))  # type: ignore[no-untyped-call]
        return (*outer, torch.cat([block[_GATHERED:], gathered]))

    if kept:
        block = r.new_zeros(kept, len(r))
        *ended, _ = while_loop(  # type: ignore[no-untyped-call]
            lambda *state: going(*state[:-1]), turn, (*first.values(), block)
        )
    else:
        ended = while_loop(going, step, tuple(first.values()))  # type: ignore[no-untyped-call]
    last = dict(zip(names, ended, strict=True))
    x, squared = last["x"], last["squared"]
    if keep_best:
        x = torch.where(squared.abs() <= last["best"], x, last["best_x"])
    return x, (last["k"], squared >= 0, last["skew"])
