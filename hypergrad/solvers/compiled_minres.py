"""MINRES for one right-hand side as one compiled graph: rounds of iterations and their checks.

The graph does the ordinary case.  Singular systems without a solution, products that are not
symmetric and tolerances below the rounding of products are for :mod:`.minres`, from the start.
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
from .base import DampedSystem, Outcome, Status
from .compiled import Iterations, proved, underflows
from .krylov import REFRESH, over
from .lanczos_step import DRIFT, PIVOT, RISK, smallest_ritz_value
from .skew import allowed_skew

_INSTEAD = "MINRES(compile=True) runs eagerly"
#: A round ends at this part of the tolerance: its residual and the true one differ by rounding, and
#: a check that fails costs more than the iteration that it would have taken.
_SHARE = 0.95
#: What may be left of the residual since the last restart for another to be worth it.
_GAIN = 0.1
#: What one round hands to the next: see :class:`.lanczos_step.Lanczos`.
_VECTORS = ("p", "p_old", "w", "w_old")
_NUMBERS = ("gamma", "eta", "c", "s", "c_old", "s_old", "norm", "size")


@dataclass
class _Round:
    """Where a round of the recurrence ended, as numbers of the host.

    Attributes:
        done: iterations so far, of all rounds.
        norm: of the true residual.
        claimed: the same by the recurrence.
        size: the largest |A p| + damping of its unit vectors p.
        skew: the relative antisymmetric part of the first two products.
        broken: whether the recurrence cannot go on.
        risky: whether the rounding of the last product may have outweighed the residual.
        largest: the largest entry of the answer.
        entries: diagonal and off-diagonal of this round's part of T.
    """

    done: int
    norm: float
    claimed: float
    size: float
    skew: float
    broken: bool
    risky: bool
    largest: float
    entries: Tensor

    @classmethod
    def read(cls, numbers: Tensor, before: int) -> _Round:
        host = numbers.cpu()  # one transfer from the device
        done, norm, claimed, size, skew, broken, risky, largest = host[: -2 * REFRESH].tolist()
        at = before % REFRESH
        entries = host[-2 * REFRESH :].view(2, REFRESH)[:, at : at + int(done) - before]
        return cls(
            done=int(done),
            norm=norm,
            claimed=claimed,
            size=size,
            skew=skew,
            broken=bool(broken),
            risky=bool(risky),
            largest=largest,
            entries=entries.double(),
        )


def run_compiled(config: Any, system: DampedSystem, x0: Tensor | None) -> Outcome | None:
    """MINRES with the tolerances and the budget of ``config``; None where it is for eager code."""
    given = Iterations.begin(config, system, x0, _INSTEAD)
    if given is None:
        return None
    operator, fixed, damping = system.operator, given.fixed, given.damping
    tolerance, budget, norm = given.tolerance, given.budget, given.norm
    graph = graph_of(
        (operator._signature(), "minres", fixed, system.b.dtype), lambda: _graph(operator, fixed)
    )
    wide = torch.finfo(system.b.dtype)
    least = (wide.tiny / wide.eps**2) ** 0.5  # squares of products, and of their rounding, count
    claim = wide.eps**2 if fixed else _SHARE * max(tolerance, wide.eps**2)
    x, state = given.start, _begin(given.residual, norm)
    done, best, origin, doubtful = 0, norm, norm, False
    entries: list[Tensor] = []
    while True:
        stop = min(budget, done + REFRESH - done % REFRESH)
        limits = system.b.new_tensor([claim, damping]), torch.tensor([done, stop], device=x.device)
        results = graph.run(operator, system.b[0], x, *state, *limits)
        if results is None:
            return None
        x, rest, *state, numbers = results
        found = _Round.read(numbers, done)
        taken, done, norm = found.done - done, found.done, found.norm
        system.num_hvps += taken + 1
        entries.append(found.entries)
        if not math.isfinite(norm) or not found.skew <= allowed_skew(operator.dtype):
            return None  # where the eager solver says what is wrong, or that it is rounding
        if found.broken or taken == 0 or not least < found.size < 1.0 / least:
            return None
        if found.largest == 0 or underflows(system, found.largest):
            return None
        answer = x[None]
        rounded = answer.to(operator.dtype).to(x.dtype)
        if not (graph.proved or proved(graph, system, rounded, rest[None], damping)):
            return None
        doubtful |= found.risky
        if norm <= tolerance:
            status = Status.CONVERGED
            break
        if done == budget:
            if not fixed and (doubtful or norm > best):
                return None  # an iterate before may be the better one
            status = Status.FIXED_ITERATIONS if fixed else Status.MAX_ITERATIONS
            break
        if fixed and done < stop:
            return None  # what is left to do is to stand still, and to see whether it lasts
        best = min(best, norm)
        if abs(norm - found.claimed) > DRIFT * norm:
            if done < 2 or (not fixed and (found.risky or norm > _GAIN * origin)):
                return None  # it is to be seen what is wrong: symmetry, or rounding
            origin, state = norm, _begin(rest, norm, found.size)
        if not fixed:
            claim = _SHARE * tolerance * min(1.0, found.claimed / norm)
    smallest = None
    if not fixed:
        smallest = smallest_ritz_value(*torch.cat(entries, dim=1)) - damping
    return Outcome(
        x=answer,
        residual_norms=system.b.new_tensor([norm]),
        statuses=[status],
        iterations=[done],
        damping=damping,
        smallest_eigenvalue=smallest,
    )


def _begin(residual: Tensor, norm: float, size: float = 0.0) -> list[Tensor]:
    """The recurrence at a residual: its vectors, and its numbers."""
    vectors = residual.new_zeros(len(_VECTORS), len(residual))
    torch.div(residual, norm, out=vectors[0])
    first = {"eta": norm, "c": 1.0, "c_old": 1.0, "size": size}
    return [vectors, residual.new_tensor([first.get(name, 0.0) for name in _NUMBERS])]


def _graph(operator: LinearOperator, fixed: bool) -> Graph:
    template = detached(operator)

    def minres(
        tensors: list[Tensor],
        b: Tensor,
        start: Tensor,
        vectors: Tensor,
        numbers: Tensor,
        options: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, ...]:
        now = template._with_tensors(tensors)

        def product(vector: Tensor) -> Tensor:
            return now._traced_products(vector.to(now.dtype)[None])[0].to(b.dtype)

        # What a loop reads may share no memory, hence the copies.
        claim, damping = (number.clone() for number in options.unbind())
        k, stop = (count.clone() for count in counts.unbind())
        state = {
            "x": start.clone(),
            **{name: row.clone() for name, row in zip(_VECTORS, vectors.unbind(), strict=True)},
            **{name: row.clone() for name, row in zip(_NUMBERS, numbers.unbind(), strict=True)},
        }
        rounding = torch.finfo(now.dtype).eps
        last = _iterate(product, state, k, stop, claim, damping, rounding, fixed)
        rounded = last["x"].to(now.dtype).to(b.dtype)  # as it will be returned
        rest = b - product(rounded) - damping * rounded
        facts = (
            last["k"],
            torch.linalg.vector_norm(rest),
            last["eta"].abs(),
            last["size"],
            last["skew"],
            last["broken"],
            last["risky"],
            rounded.abs().amax(),
        )
        return (
            last["x"],
            rest,
            torch.stack([last[name] for name in _VECTORS]),
            torch.stack([last[name] for name in _NUMBERS]),
            torch.cat([*(fact.to(b.dtype)[None] for fact in facts), last["entries"].flatten()]),
        )

    return Graph(minres, f"MINRES with {operator!r}", _INSTEAD, compiler_options(operator.device))


def _iterate(
    product: Callable[[Tensor], Tensor],
    state: dict[str, Tensor],
    k: Tensor,
    stop: Tensor,
    claim: Tensor,
    damping: Tensor,
    rounding: float,
    fixed: bool,
) -> dict[str, Tensor]:
    """Iterations ``k`` to ``stop``, or fewer, as :func:`.lanczos_step` makes them.

    For one vector, without care for its scale: squares are within the range of the dtype.  All
    vectors are of the wide dtype, since rounding of the directions w reaches the residual times
    the square of the condition number, that of products once (Sleijpen, van der Vorst and
    Modersitzki, SIMAX 22 (2000)).
    """
    none = torch.zeros_like(damping)
    first = {
        "k": k,
        **state,
        "skew": none,
        "broken": none.clone(),
        "risky": none.clone(),
        "entries": state["x"].new_zeros(2, REFRESH),
    }
    names, places = list(first), torch.arange(REFRESH, device=k.device)
    pivots = PIVOT * torch.finfo(damping.dtype).eps

    def going(*carried: Tensor) -> Tensor:
        now = dict(zip(names, carried, strict=True))
        sound = now["broken"] + now["risky"] == 0
        return (now["eta"].abs() > claim) & (now["k"] < stop) & sound

    def step(*carried: Tensor) -> tuple[Tensor, ...]:
        now = dict(zip(names, carried, strict=True))
        k, p, beside, c, s = now["k"], now["p"], now["gamma"], now["c"], now["s"]
        image = product(p)
        size = image.square().sum().sqrt() + damping
        image = image + damping * p
        u = image - beside * now["p_old"]
        delta = (p * u).sum()
        u = u - delta * p
        gamma = u.square().sum().sqrt()
        # Of symmetric products this is p_old'A p, as p'A p_old was.
        gap = ((now["p_old"] * image).sum() - beside).abs()
        pivot = c * delta - now["c_old"] * s * beside
        above = s * delta + now["c_old"] * c * beside
        diagonal = (pivot.square() + gamma.square()).sqrt()
        column = (beside.square() + delta.square() + gamma.square()).sqrt()
        norm, largest = torch.maximum(now["norm"], column), torch.maximum(now["size"], size)
        broken = diagonal <= pivots * norm
        cosine, sine = over(pivot, diagonal), over(gamma, diagonal)
        w = p - now["s_old"] * beside * now["w_old"] - above * now["w"]
        w = w * over(torch.ones_like(diagonal), diagonal)
        length = torch.where(broken, 0.0, cosine * now["eta"])
        eta = -sine * now["eta"]
        noise = rounding * largest * length.abs() * w.square().sum().sqrt()
        if fixed:
            broken, risky = broken | (noise > now["eta"].abs()), torch.zeros_like(broken)
        else:
            risky = noise > RISK * eta.abs()
        entry = torch.stack([delta, beside])[:, None]
        new = {
            "k": k + 1,
            "x": now["x"] + length * w,
            "p": u * over(torch.ones_like(gamma), gamma),
            "p_old": p.clone(),
            "w": w,
            "w_old": now["w"].clone(),
            "gamma": gamma,
            "eta": eta,
            "c": cosine,
            "s": sine,
            "c_old": c.clone(),
            "s_old": s.clone(),
            "norm": norm,
            "size": largest,
            "skew": torch.where(k == 1, gap / (size + now["size"]), now["skew"]),
            "broken": broken.to(norm.dtype),
            "risky": risky.to(norm.dtype),
            "entries": torch.where(places == k % REFRESH, entry, now["entries"]),
        }
        return tuple(new.values())

    ended = while_loop(going, step, tuple(first.values()))  # type: ignore[no-untyped-call]
    return dict(zip(names, ended, strict=True))
