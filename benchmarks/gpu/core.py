"""Products and solves with one Hessian: on a device, and in float64 on the CPU."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hypergrad

from ..benchmarks.problems import Params, Problem, critic
from .device import Rates, host_syncs, least_seconds

DISTINCT, RANK, ITERATIONS, BLOCK, RTOL = 16, 20, 20, 10, 1e-4
#: |A| over the damping: 20 iterations reduce the residual by five digits, see ``reached``.
CONDITION = 10.0


@dataclass
class Row:
    """One measurement; None where there is nothing to say.

    Attributes:
        size: parameters, or samples of a rollout.
        way: eager or compiled.
        where: the device it ran on.
        ms: the least time of one run.
        arithmetic_ms: its matrix products at the rate of a large one.
        bandwidth_ms: what its products must read and write, at the rate of a large copy.
        error: against float64 on the CPU, as ``allowed`` is derived for.
        syncs: how often the host waited for the device.
    """

    work: str
    size: int
    way: str
    where: str
    ms: float | None = None
    arithmetic_ms: float | None = None
    bandwidth_ms: float | None = None
    error: float | None = None
    allowed: float | None = None
    syncs: int | None = None
    note: str = ""

    @property
    def over_floor(self) -> float | None:
        floor = max(self.arithmetic_ms or 0.0, self.bandwidth_ms or 0.0)
        return None if self.ms is None or floor == 0 else self.ms / floor

    @property
    def wrong(self) -> bool:
        return (
            self.error is not None
            and self.allowed is not None
            and not self.error <= self.allowed  # nan is wrong
        )


class Reference:
    """The same system in float64 on the CPU, of the samples that differ."""

    def __init__(self, problem: Problem) -> None:
        double = replace(
            problem,
            params={name: leaf.double() for name, leaf in problem.params.items()},
            inputs=problem.inputs.double(),
            targets=problem.targets.double(),
        )
        generator = torch.Generator().manual_seed(1)
        self.operator = hypergrad.hessian(
            double.loss_fn, double.params, double.inputs, double.targets,
            mode="reverse_over_reverse",
        )  # fmt: skip
        # Gradients of the same network for other targets: J'u, which lies in the operator's range
        # as the right-hand sides of hypergradients do.  One in its null space tests nothing.
        rows = []
        for _ in range(BLOCK):
            noise = torch.randn(DISTINCT, generator=generator, dtype=torch.float64)
            other = replace(double, targets=double.targets + noise[:, None])
            rows.append(self.flat(dict(zip(double.params, other.gradient(), strict=True))))
        self.block = torch.stack(rows).float().double()
        self.norm, v = 0.0, self.block[0]
        for _ in range(8):  # the power method, from below: what it allows is not too much
            v = self.product(v / v.norm())
            self.norm = float(v.norm())
        self.damping = self.norm / CONDITION

    def flat(self, tree: Params) -> Tensor:
        return torch.cat([leaf.detach().cpu().double().reshape(-1) for leaf in tree.values()])

    def product(self, v: Tensor) -> Tensor:
        layout = self.operator.layout
        image: Params = self.operator.matvec(layout.unflatten(v))
        return self.flat(image)

    def tree(self, rows: Tensor, device: torch.device) -> Params:
        """Float32 on the device: of one vector, or of a block of them."""
        layout = self.operator.layout
        tree = layout.unflatten(rows) if rows.dim() == 1 else layout.unflatten_block(rows)
        return {name: leaf.float().to(device) for name, leaf in tree.items()}

    def product_error(self, images: Params, count: int) -> float:
        """The largest |y - A v| / (|A| |v|) of the first ``count`` vectors."""
        rows = torch.cat([x.detach().cpu().double().reshape(count, -1) for x in images.values()], 1)
        errors = [
            float((row - self.product(v)).norm() / (self.norm * v.norm()))
            for row, v in zip(rows, self.block, strict=False)
        ]
        return max(errors)

    def residual(self, x: Params) -> tuple[float, float]:
        """|v - (A + damping I) x| / |v|, and (|A| + damping) |x| / |v|."""
        v, flat = self.block[0], self.flat(x)
        residual = v - self.product(flat) - self.damping * flat
        scale = (self.norm + self.damping) * flat.norm() / v.norm()
        return float(residual.norm() / v.norm()), float(scale)


def product_rounding(width: int, batch: int) -> float:
    """What float32 may do to a product, relative to |A| |v|: 12 matrix products of 4 sqrt(m) u.

    A sum of m products is off by at most 4 sqrt(m) u times that of the absolute values, but for a
    probability of 2 exp(-8) (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), theorem 2.4), and a
    Hessian product of three layers passes through 12 matrix products: 3 forward, 3 backward, and
    6 of their derivatives.
    """
    unit = torch.finfo(torch.float32).eps / 2
    return 12 * 4 * math.sqrt(max(width, batch)) * unit


def reached(work: str) -> float:
    """The relative residual that a solver is sure to reach in exact arithmetic.

    For eigenvalues from d to d + |A| = (1 + CONDITION) d that is 2 rho^k for MINRES and sqrt(kappa)
    times as much for CG, rho = (sqrt(kappa) - 1) / (sqrt(kappa) + 1) (Greenbaum 1997, section 3.1);
    a sketch of at least the operator's rank is the operator.
    """
    root = math.sqrt(1 + CONDITION)
    rho = (root - 1) / (root + 1)
    if work == "CG, rtol 1e-4":
        return RTOL
    if work.startswith("Nyström"):
        return 0.0
    return 2 * rho**ITERATIONS * (root if work.startswith("CG") else 1.0)


@contextmanager
def eager_reason() -> Iterator[list[str]]:
    """Collects why products were not compiled; empty where they were."""
    reasons: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield reasons
    for warning in caught:
        if issubclass(warning.category, hypergrad.CompilationWarning):
            reasons.append(str(warning.message).split(". Install")[0])


class Core:
    """Products and solves with the Hessian of one size, on one device."""

    def __init__(self, size: int, batch: int, device: torch.device, rates: Rates) -> None:
        self.size, self.batch, self.device, self.rates = size, batch, device, rates
        self.width = max(1, round(size**0.5 - 3.5))
        small = critic(DISTINCT, self.width)
        self.reference = Reference(small)
        copies = batch // DISTINCT
        self.problem = replace(
            small,
            params={name: leaf.to(device) for name, leaf in small.params.items()},
            inputs=small.inputs.repeat(copies, 1).to(device),
            targets=small.targets.repeat(copies, 1).to(device),
        )
        self.v = self.reference.tree(self.reference.block[0], device)
        self.vs = self.reference.tree(self.reference.block, device)
        operator = self.operator(False)
        with FlopCounterMode(display=False) as counter:
            operator.matvec(self.v)
        self.product_flops = counter.get_total_flops()

    def operator(self, compiled: bool) -> hypergrad.HessianOperator:
        # Eager in the one mode that any network allows; "auto" would time itself while it is timed.
        mode: Any = "auto" if compiled else "reverse_over_reverse"
        return hypergrad.hessian(
            self.problem.loss_fn, self.problem.params, self.problem.inputs, self.problem.targets,
            mode=mode, chunk_size="auto", compile=compiled,
        )  # fmt: skip

    def solvers(self) -> dict[str, hypergrad.Solver]:
        source = torch.Generator(self.device).manual_seed(0)
        return {
            f"Nyström, rank {RANK}": hypergrad.Nystrom(RANK, generator=source),
            f"CG, {ITERATIONS} iterations": hypergrad.CG(rtol=0.0, max_iters=ITERATIONS),
            f"MINRES, {ITERATIONS} iterations": hypergrad.MINRES(rtol=0.0, max_iters=ITERATIONS),
            "CG, rtol 1e-4": hypergrad.CG(rtol=RTOL),
        }

    def solve(
        self, operator: hypergrad.LinearOperator, solver: hypergrad.Solver
    ) -> hypergrad.Solution:
        return hypergrad.solve(
            operator, self.v, solver, damping=self.reference.damping, on_failure="ignore"
        )

    def rows(self, compiled: bool) -> Iterator[Row]:
        new = partial(
            Row, size=self.operator(False).layout.dim, way="compiled" if compiled else "eager",
            where=str(self.device),
        )  # fmt: skip
        operator, note, rounding = self.operator(compiled), "", self.rounding
        if compiled:
            start = time.perf_counter()
            with eager_reason() as reasons:
                operator.matvec(self.v)
                operator.matmat(self.vs)
            if reasons:
                yield new("product", note=reasons[0])
                return
            note = f"compiled in {time.perf_counter() - start:.0f} s"
        for work, count, run in (
            ("product", 1, partial(operator.matvec, self.v)),
            (f"{BLOCK} products in one block", BLOCK, partial(operator.matmat, self.vs)),
        ):
            row = self.timed(new(work, note=note), run, [count], compiled)
            row.error, row.allowed = self.reference.product_error(run(), count), rounding
            yield row
        for work, solver in self.solvers().items():
            solve = partial(self.solve, operator, solver)
            solution = solve()
            used = solution.info.num_hvps
            sketch = [RANK] if work.startswith("Nyström") else []
            blocks = sketch + [1] * (used - sum(sketch))
            row = self.timed(new(work, note=f"{used} products"), solve, blocks, compiled)
            row.error, scale = self.reference.residual(solution.value)
            # Each product's rounding adds to a residual; those of many add like random numbers.
            row.allowed = reached(work) + (1 + math.sqrt(used)) * rounding * scale
            yield row

    @property
    def rounding(self) -> float:
        return product_rounding(self.width, self.batch)

    def timed(
        self, row: Row, run: Callable[[], object], blocks: Sequence[int], compiled: bool
    ) -> Row:
        """With the time of a run, its floors and its synchronisations.

        Args:
            row: what to fill in.
            run: the work.
            blocks: how many vectors each of its products multiplies.
            compiled: whether it runs a graph.
        """
        row.ms = 1e3 * least_seconds(run, self.device)
        # An inner look at what is compiled would compile it anew: the debug mode is none.
        if not compiled or self.device.type == "cuda":
            row.syncs = host_syncs(run, self.device)
        row.arithmetic_ms = 1e3 * sum(blocks) * self.product_flops / self.rates.flops
        # The parameters and the inputs once a product, and each vector read and its image written.
        fixed = row.size + self.problem.inputs.numel() + self.problem.targets.numel()
        moved = sum(4 * (fixed + 2 * count * row.size) for count in blocks)
        row.bandwidth_ms = 1e3 * moved / self.rates.bytes
        return row
