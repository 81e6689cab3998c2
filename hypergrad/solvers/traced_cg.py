"""The recurrence of CG as tensor code, for a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.loops import while_loop

#: As many residuals are gathered before they join the others that are kept, which is a copy of all:
#: a loop cannot write into what it carries.
GATHERED = 8
#: So many times the rounding of the steps so far, each eps |alpha| |A p|, summed as if by chance,
#: is where a residual is no longer the true one.  Of 3, 10 and 30 the quickest to 1e-8 by rounds in
#: float32 on the Hessians of three networks; on that of a logistic regression they are alike.
_UNTRUE = 10.0
#: A residual that has not fallen in so many iterations, and as many as before, is not about to.
_PATIENT = 200


def _along(rows: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector along orthonormal rows, by products of matrices: calls of a BLAS."""
    part: Tensor = torch.mm(torch.mm(rows, vector[:, None]).mT, rows)[0]
    return part


def _orthogonal(vector: Tensor, block: Tensor, gathered: Tensor, k: Tensor) -> Tensor:
    """The vector without its part along the rows kept, of which there are ``k`` so far.

    They are the last ones of ``block``, but for the last few, in ``gathered``.  The others are
    zero: a processor of few cores takes as long to read them as a product of a small network, so
    on the CPU a branch reads the last 16, 32 and so on.  Elsewhere a branch costs more.
    """

    def without(count: int) -> Callable[..., Tensor]:
        def rest(x: Tensor, rows: Tensor, last: Tensor) -> Tensor:
            near = x - _along(last, x)
            return near - _along(rows[len(rows) - count :], x) if count else near

        return rest

    def one_of(counts: list[int]) -> Callable[..., Tensor]:
        if len(counts) == 1:
            return without(counts[0])
        low, high = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        few, many = one_of(low), one_of(high)

        def chosen(*inputs: Tensor) -> Tensor:
            found: Tensor = torch.cond(k < low[-1] + GATHERED, few, many, inputs)
            return found

        return chosen

    counts = [len(block)]
    if vector.device.type == "cpu":
        counts = [0, *(2**i for i in range(4, 20) if 2**i < len(block)), len(block)]
    return one_of(counts)(vector, block, gathered)


def recurrence(
    product: Callable[[Tensor], Tensor],
    residual: Tensor,
    claim: Tensor,
    damping: Tensor,
    budget: Tensor,
    dtype: torch.dtype,
    *,
    keep_best: bool,
    kept: int,
    until_untrue: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """CG from zero: the correction, then iterations, definiteness, and relative asymmetry.

    Vectors are of the products' dtype, inner products of the wider one of ``residual``.  Of
    symmetric products p0'A p1 = p1'A p0, and CG chooses p1 so that the latter is zero.  With
    ``kept`` each residual is made orthogonal to as many before it; see :mod:`.orthogonal`.  With
    ``until_untrue``, which needs ``keep_best``, it ends, too, where the rounding of its steps comes
    near to its residual, whose further fall would be that of the recurrence alone, and where that
    does not fall.
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
    if until_untrue:
        first |= {"rounded": torch.zeros_like(squared), "best_k": torch.zeros_like(budget)}
    names, narrow = list(first), damping.to(dtype, copy=True)

    def going(*state: Tensor) -> Tensor:
        now = dict(zip(names, state, strict=True))
        enough, last = claim.square(), budget
        if until_untrue:
            enough = torch.maximum(enough, _UNTRUE**2 * now["rounded"])
            last = torch.minimum(budget, 2 * now["best_k"] + _PATIENT)
        return (now["squared"] > enough) & (now["k"] < last)

    def step(*state: Tensor, blocks: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
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
        if blocks:
            after = _orthogonal(after, *blocks, k)
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
        if until_untrue:
            new["rounded"] = now["rounded"] + (rounding * alpha.to(wide) * size).square()
            new["best_k"] = torch.where(squared < now["best"], k, now["best_k"])
        return tuple(new.values())

    def gathering(*state: Tensor) -> Tensor:
        return going(*state[:-2]) & (state[-2] < GATHERED)

    def turn(*state: Tensor) -> tuple[Tensor, ...]:
        """Some steps, in a loop of their own."""
        *outer, block = state

        def gather(*state: Tensor) -> tuple[Tensor, ...]:
            *inner, count, gathered = state
            now = dict(zip(names, inner, strict=True))
            own = now["r"] / now["squared"].sqrt().to(now["r"].dtype)
            gathered = torch.cat([gathered[1:], own[None]])
            return (*step(*inner, blocks=(block, gathered)), count + 1, gathered)

        none = torch.zeros_like(budget), torch.zeros_like(block[:GATHERED])
        *outer, _, gathered = while_loop(gathering, gather, (*outer, *none))  # type: ignore[no-untyped-call]
        return (*outer, torch.cat([block[GATHERED:], gathered]))

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
