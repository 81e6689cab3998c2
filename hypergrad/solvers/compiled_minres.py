"""MINRES for one right-hand side as compiled graphs: rounds of iterations, each with its check.

The graph does the ordinary case.  Singular systems without a solution, products that are not
symmetric and tolerances below the rounding of products are for :mod:`.minres`, from the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.compilation import Graph, detached, graph_of
from ..operators.compilation import options as compiler_options
from ..operators.loops import while_loop
from .base import DampedSystem, Outcome, Status, allowed_skew
from .compiled import ORDINARY, proved, takes
from .krylov import DEFAULT_MAX_ITERS, REFRESH, over
from .lanczos_step import DRIFT, PIVOT, RISK, smallest_ritz_value

_INSTEAD = "MINRES(compile=True) runs eagerly"
#: A round ends at this part of the tolerance: its residual and the true one differ by rounding, and
#: a check that fails costs more than the iteration that it would have taken.
_SHARE = 0.95
#: A restart must have gained this much since the last one to be worth another.
_GAIN = 0.9


@dataclass
class _Round:
    """Where a round ended, as numbers of the host.

    Attributes:
        done: iterations so far, of all rounds.
        norm: of the true residual.
        claimed: the same by the recurrence.
        size: the largest |A p| + damping of unit vectors p so far.
        skew: the relative antisymmetric part of the first two products.
        broken: whether the recurrence cannot go on.
        risky: whether the rounding of the last step's product may exceed the residual.
        largest: the largest entry of the answer.
        entries: diagonal and off-diagonal of T, as far as they are of this round.
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
    def read(cls, facts: Tensor, done: int) -> _Round:
        host = facts.cpu()  # one transfer from the device
        count, norm, claimed, size, skew, broken, risky, largest = host[: -2 * REFRESH].tolist()
        at = done % REFRESH
        entries = host[-2 * REFRESH :].view(2, REFRESH)[:, at : at + int(count) - done]
        return cls(
            int(count), norm, claimed, size, skew, bool(broken), bool(risky), largest, entries
        )


def run_compiled(config: Any, system: DampedSystem, x0: Tensor | None) -> Outcome | None:
    """MINRES with the tolerances and the budget of ``config``; None where it is for eager code."""
    scale = float(system.scales[0])
    if len(system.b) != 1 or not 1 / ORDINARY < scale < ORDINARY:
        return None
    if not takes(system, _INSTEAD, loops=True):
        return None
    operator, wide = system.operator, torch.finfo(system.b.dtype)
    damping = system.resolve_damping()
    fixed = config.rtol == 0 and config.atol == 0
    tolerance = 0.0 if fixed else float(system.tolerances(config.rtol, config.atol)[0])
    budget = config.max_iters or DEFAULT_MAX_ITERS
    start, residual = system.begin(x0, damping)
    norm = float(system.start_norms[0])
    if norm <= tolerance:
        return None
    graph = graph_of(
        (operator._signature(), "minres", fixed, system.b.dtype), lambda: _graph(operator, fixed)
    )
    limits, squares = torch.finfo(operator.dtype), (wide.tiny / wide.eps**2) ** 0.5
    claim = wide.eps**2 if fixed else _SHARE * max(tolerance, wide.eps**2)
    x, state = start[0], _begin(residual[0], norm, 0.0)
    origin, done, entries = norm, 0, []
    while True:
        stop = min(budget, done + REFRESH - done % REFRESH)
        counts = torch.tensor([done, stop], device=x.device)
        results = graph.run(
            operator, system.b[0], x, *state, system.b.new_tensor([claim, damping]), counts
        )
        if results is None:
            return None
        x, rest, *state, facts = results
        found = _Round.read(facts, done)
        system.num_hvps += found.done - done + 1
        done, best, norm = found.done, norm, found.norm
        entries.append(found.entries)
        if not math.isfinite(norm) or not found.skew <= allowed_skew(operator.dtype):
            return None  # where the eager solver says what is wrong, or that it is rounding
        if found.broken or not squares < found.size < 1.0 / squares:
            return None
        if found.largest * min(1.0, scale) < limits.tiny / limits.eps:
            return None  # what is returned is not what was checked: it underflows
        answer = x[None]
        if not graph.proved:
            returned = system.returned(answer)
            if not proved(graph, system, returned, rest[None], damping):
                return None
        lost = abs(norm - found.claimed) > DRIFT * norm
        if norm <= tolerance:
            status = Status.CONVERGED
            break
        if fixed and done == budget:
            status = Status.FIXED_ITERATIONS
            break
        if fixed and (lost or done < stop):
            return None
        if lost:
            if found.risky or not norm < _GAIN * origin:
                return None
            origin, state = norm, _begin(rest, norm, found.size)
        elif done == budget:
            if found.risky or norm > best:
                return None
            status = Status.MAX_ITERATIONS
            break
        claim = claim if fixed else _SHARE * tolerance * min(1.0, found.claimed / norm)
    smallest = None
    if not fixed:
        diagonal, beside = torch.cat(entries, 1)
        smallest = smallest_ritz_value(diagonal, beside) - damping
    return Outcome(
        x=answer,
        residual_norms=system.b.new_tensor([norm]),
        statuses=[status],
        iterations=[done],
        damping=damping,
        smallest_eigenvalue=smallest,
    )


def _begin(residual: Tensor, norm: float, size: float) -> list[Tensor]:
    """The state of the recurrence at a residual: vectors p, p_old, w, w_old, and numbers."""
    vectors = residual.new_zeros(4, len(residual))
    vectors[0] = residual / norm
    # gamma, eta, c, s, c_old, s_old, norm, size: see Lanczos
    return [vectors, residual.new_tensor([0.0, norm, 1.0, 0.0, 1.0, 0.0, 0.0, size])]


def _graph(operator: LinearOperator, fixed: bool) -> Graph:
    template = detached(operator)

    def minres(
        tensors: list[Tensor],
        b: Tensor,
        x: Tensor,
        vectors: Tensor,
        numbers: Tensor,
        options: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, ...]:
        now, (claim, damping) = template._with_tensors(tensors), options.unbind()
        k, stop = counts.unbind()
        rounding, wide = torch.finfo(now.dtype).eps, b.dtype
        tiny = PIVOT * torch.finfo(wide).eps

        def product(vector: Tensor) -> Tensor:
            return now._traced_products(vector.to(now.dtype)[None])[0].to(wide)

        zero = torch.zeros_like(damping)
        # What a loop reads may share no memory, hence the copies.
        first = {
            "k": k.clone(),
            "x": x.clone(),
            **{name: row.clone() for name, row in zip(_VECTORS, vectors.unbind(), strict=True)},
            **{name: row.clone() for name, row in zip(_NUMBERS, numbers.unbind(), strict=True)},
            "skew": zero.clone(),
            "broken": zero.clone(),
            "risky": zero.clone(),
            "entries": x.new_zeros(2, REFRESH),
        }
        names, place = list(first), torch.arange(REFRESH, device=x.device)

        def going(*state: Tensor) -> Tensor:
            now = dict(zip(names, state, strict=True))
            regular = now["broken"] + now["risky"] == 0
            return (now["eta"].abs() > claim) & (now["k"] < stop) & regular

        def step(*state: Tensor) -> tuple[Tensor, ...]:
            """:func:`lanczos_step` for one row; squares are within the range of the dtype."""
            now = dict(zip(names, state, strict=True))
            k, p, p_old, gamma_old = now["k"], now["p"], now["p_old"], now["gamma"]
            c, s, c_old, s_old = now["c"], now["s"], now["c_old"], now["s_old"]
            image = product(p)
            size = image.square().sum().sqrt() + damping
            image = image + damping * p
            u = image - gamma_old * p_old
            delta = (p * u).sum()
            u = u - delta * p
            gamma = u.square().sum().sqrt()
            # p0'A p1 = p1'A p0, which is gamma.
            gap = ((p_old * image).sum() - gamma_old).abs()
            pivot = c * delta - c_old * s * gamma_old
            above = s * delta + c_old * c * gamma_old
            diagonal = (pivot.square() + gamma.square()).sqrt()
            column = (gamma_old.square() + delta.square() + gamma.square()).sqrt()
            largest, norm = torch.maximum(now["size"], size), torch.maximum(now["norm"], column)
            broken = diagonal <= tiny * norm
            turn, left = over(pivot, diagonal), over(gamma, diagonal)
            w = (p - s_old * gamma_old * now["w_old"] - above * now["w"]) * over(
                torch.ones_like(diagonal), diagonal
            )
            eta, length = -left * now["eta"], torch.where(broken, 0.0, turn * now["eta"])
            noise = rounding * largest * length.abs() * w.square().sum().sqrt()
            if fixed:
                broken = broken | (noise > now["eta"].abs())
            here = place == k % REFRESH
            entry = torch.stack([delta, gamma_old])[:, None]
            new = {
                "k": k + 1,
                "x": now["x"] + length * w,
                "p": u * over(torch.ones_like(gamma), gamma),
                "p_old": p.clone(),
                "w": w,
                "w_old": now["w"].clone(),
                "gamma": gamma,
                "eta": eta,
                "c": turn,
                "s": left,
                "c_old": c.clone(),
                "s_old": s.clone(),
                "norm": norm,
                "size": largest,
                "skew": torch.where(k == 1, gap / (size + now["size"]), now["skew"]),
                "broken": broken.to(wide),
                "risky": (noise > RISK * eta.abs()).to(wide) if not fixed else zero.clone(),
                "entries": torch.where(here, entry, now["entries"]),
            }
            return tuple(new.values())

        ended = while_loop(going, step, tuple(first.values()))  # type: ignore[no-untyped-call]
        last = dict(zip(names, ended, strict=True))
        x = last["x"]
        rounded = x.to(now.dtype).to(wide)  # as it will be returned
        rest = b - product(rounded) - damping * rounded
        facts = (
            last["k"].to(wide),
            torch.linalg.vector_norm(rest),
            last["eta"].abs(),
            last["size"],
            last["skew"],
            last["broken"],
            last["risky"],
            rounded.abs().amax(),
        )
        return (
            x,
            rest,
            torch.stack([last[name] for name in _VECTORS]),
            torch.stack([last[name] for name in _NUMBERS]),
            torch.cat([torch.stack(facts), last["entries"].flatten()]),
        )

    return Graph(minres, f"MINRES with {operator!r}", _INSTEAD, compiler_options(operator.device))


_VECTORS = ("p", "p_old", "w", "w_old")
_NUMBERS = ("gamma", "eta", "c", "s", "c_old", "s_old", "norm", "size")
