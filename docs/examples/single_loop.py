"""Single-loop bilevel methods on a quadratic problem whose answer is known.

The problem is the simulated one of the benchmark benchopt/benchmark_bilevel: both losses are means
over samples of random quadratics,

    1/n sum_i (a_i'w)^2 / 2 + (c_i'y)^2 / 2 + (p_i'y) (q_i'w) + l_i'w + k_i'y

with w of 100 entries, y of 10, n = 32768 samples in the inner loss and 1024 in the outer one. As
everything is quadratic, w*(y), the linear system and the hypergradient have closed forms in the
means over all samples: the methods, which see 64 samples at a time, are judged by the truth.

    python docs/examples/single_loop.py --run-dir runs/single_loop
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import begin, parser_of, save_picture, set_style, write_json
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hypergrad
from hypergrad import PowerSchedule

F64 = torch.float64
BATCH = 64  # samples in a batch of either problem, and in a block of SABA's


@dataclass(frozen=True)
class Side:
    """One loss: rows are samples.

    Attributes:
        curvature_w: a_i, shape (n, p): the Hessian in w is their mean outer product.
        curvature_y: c_i, shape (n, d).
        cross_y: p_i, shape (n, d): the cross derivative is the mean of p_i q_i'.
        cross_w: q_i, shape (n, p).
        linear_w: l_i, shape (n, p).
        linear_y: k_i, shape (n, d).
    """

    curvature_w: Tensor
    curvature_y: Tensor
    cross_y: Tensor
    cross_w: Tensor
    linear_w: Tensor
    linear_y: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, ...]:
        """Some samples, as the further arguments of :func:`quadratic`."""
        return tuple(getattr(self, name)[rows] for name in self.__dataclass_fields__)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Hessian in w, Hessian in y, cross derivative (d, p), and the two linear terms."""
        n = len(self.linear_w)
        return (
            self.curvature_w.T @ self.curvature_w / n,
            self.curvature_y.T @ self.curvature_y / n,
            self.cross_y.T @ self.cross_w / n,
            self.linear_w.mean(0),
            self.linear_y.mean(0),
        )


def quadratic(w: Tensor, y: Tensor, *batch: Tensor) -> Tensor:
    """The mean over a batch of samples of either loss."""
    curvature_w, curvature_y, cross_y, cross_w, linear_w, linear_y = batch
    return (
        0.5 * (curvature_w @ w).square().mean()
        + 0.5 * (curvature_y @ y).square().mean()
        + ((cross_y @ y) * (cross_w @ w)).mean()
        + linear_w.mean(0) @ w
        + linear_y.mean(0) @ y
    )


def make_side(n: int, p: int, d: int, mu: float, cross: float, draw: torch.Generator) -> Side:
    """Samples of one loss: Hessians with spectra in [mu, 1], a cross derivative of that norm."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=F64)

    def correlated(size: int, spectrum: Tensor) -> Tensor:
        basis = torch.linalg.svd(normal(size, 1))[0]
        rows: Tensor = normal(n, size) @ ((basis * spectrum) @ basis.T)
        return rows

    half = math.log10(mu) / 2
    in_w = torch.logspace(half, 0, p, dtype=F64)
    # One direction of y has no curvature of its own in either loss.
    in_y = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(half, 0, d - 1, dtype=F64)])
    curvature_w, curvature_y = correlated(p, in_w), correlated(d, in_y)
    left, _, right = torch.linalg.svd(normal(d, p))
    rank = min(d, p)
    values = torch.logspace(math.log10(mu), math.log10(cross), rank, dtype=F64)
    seeds = normal(n, p)
    cross_y = (seeds[:, :rank] * values) @ left[:, :rank].T
    return Side(curvature_w, curvature_y, cross_y, seeds @ right.T, normal(n, p), normal(n, d))


@dataclass(frozen=True)
class Problem:
    """Both losses, and what the closed forms need."""

    inner: Side
    outer: Side

    @cached_property
    def means(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What either loss is over all samples."""
        return self.inner.means(), self.outer.means()

    def hypergradient(self, y: Tensor) -> Tensor:
        """The true hypergradient at y."""
        (hess, _, cross, linear, _), of_outer = self.means
        outer_w, outer_y, outer_cross, outer_lin_w, outer_lin_y = of_outer
        w = -torch.linalg.solve(hess, cross.T @ y + linear)
        v = torch.linalg.solve(hess, outer_w @ w + outer_cross.T @ y + outer_lin_w)
        gradient: Tensor = outer_y @ y + outer_cross @ w + outer_lin_y - cross @ v
        return gradient

    def curvature(self) -> Tensor:
        """The Hessian of the outer problem, (d, d)."""
        eye = torch.eye(self.outer.linear_y.shape[1], dtype=F64)
        zero = self.hypergradient(torch.zeros(len(eye), dtype=F64))
        return torch.stack([self.hypergradient(e) - zero for e in eye])


def make_problem(
    seed: int = 0,
    *,
    n: int = 32768,
    m: int = 1024,
    p: int = 100,
    d: int = 10,
    mu: float = 0.1,
    cross: float = 0.1,
) -> Problem:
    """A problem whose outer curvature is positive: drawn anew until it is."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(20):
        problem = Problem(make_side(n, p, d, mu, cross, draw), make_side(m, p, d, mu, cross, draw))
        hess = problem.curvature()
        if float(torch.linalg.eigvalsh(0.5 * (hess + hess.T))[0]) > 1e-12:
            return problem
    raise ValueError("20 draws gave no problem with a positive outer curvature")


# ------------------------------------------------------------------------------------ the methods


def methods(num_inner_blocks: int, num_outer_blocks: int) -> dict[str, hypergrad.SingleLoop]:
    """The methods compared.

    The step sizes of SABA, AmIGO and stocBiO are those that the benchmark's own search chose for
    this problem (its config/quadratics_021424_best_params.yml).
    """
    losses = (quadratic, quadratic)
    return {
        "SOBA, constant steps": hypergrad.SOBA(*losses, inner_lr=0.1, outer_lr=0.1),
        "SOBA, decreasing steps": hypergrad.SOBA(
            *losses,
            inner_lr=PowerSchedule(0.1, 2 / 5, offset=300),
            outer_lr=PowerSchedule(0.1, 3 / 5, offset=300),
        ),
        "SABA": hypergrad.SABA(
            *losses,
            inner_lr=0.1,
            outer_lr=0.1,
            num_inner_blocks=num_inner_blocks,
            num_outer_blocks=num_outer_blocks,
        ),
        "AmIGO": hypergrad.AmIGO(*losses, inner_lr=0.01, outer_lr=0.1),
        "stocBiO": hypergrad.StocBiO(*losses, inner_lr=0.1, outer_lr=0.1),
        "F2SA": hypergrad.F2SA(
            *losses,
            inner_lr=PowerSchedule(0.1, 4 / 7, offset=100),
            penalty_lr=PowerSchedule(0.05 / 3, 5 / 7, offset=100),  # a multiplier from 3 on
            outer_lr=PowerSchedule(0.1, 5 / 7, offset=100),
            inner_steps=1,
        ),
    }


def blocks(side: Side, draw: torch.Generator, size: int = BATCH) -> Iterator[tuple[int, Any]]:
    """Blocks of consecutive samples drawn uniformly: number and data."""
    count = len(side.linear_w) // size
    while True:
        index = int(torch.randint(count, (), generator=draw))
        yield index, side.batch(slice(index * size, (index + 1) * size))


def run(
    method: hypergrad.SingleLoop,
    problem: Problem,
    budget: float,
    seed: int,
    *,
    size: int = BATCH,
    points: int = 60,
    progress: Callable[[float], object] = lambda cost: None,
) -> list[tuple[float, float]]:
    """Step until ``budget`` gradients are spent: pairs of (cost so far, true hypergradient norm).

    A pass through second derivatives is counted as two gradients.
    """
    draw = torch.Generator().manual_seed(seed)
    inner, outer = blocks(problem.inner, draw, size), blocks(problem.outer, draw, size)
    p, d = problem.inner.linear_w.shape[1], problem.inner.linear_y.shape[1]
    state = method.init(torch.zeros(p, dtype=F64), torch.full((d,), -2.0, dtype=F64))
    cost = 0.0
    curve: list[tuple[float, float]] = []
    while True:
        if cost >= len(curve) * budget / points:
            norm = float(torch.linalg.vector_norm(problem.hypergradient(state.outer_params)))
            curve.append((cost, norm))
        if cost >= budget:
            return curve
        if isinstance(method, hypergrad.SABA):
            (i, inner_block), (j, outer_block) = next(inner), next(outer)
            state = method.step(state, [inner_block], [outer_block], inner_index=i, outer_index=j)
        else:
            state = method.step(state, (block for _, block in inner), (block for _, block in outer))
        progress(state.num_gradients + 2 * state.num_hvps - cost)
        cost = state.num_gradients + 2 * state.num_hvps


# ------------------------------------------------------------------------------------ the picture


def draw_curves(curves: dict[str, list[list[tuple[float, float]]]]) -> Figure:
    """The norm of the true hypergradient against the cost; one line a method, a band of seeds."""
    looks = {  # Okabe and Ito
        "SOBA, constant steps": ("#D55E00", "--"),
        "SOBA, decreasing steps": ("#D55E00", "-"),
        "SABA": ("#0072B2", "-"),
        "AmIGO": ("#009E73", "-"),
        "stocBiO": ("#CC79A7", "-"),
        "F2SA": ("#555555", "-"),
    }
    set_style()
    figure, (early, whole) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, seeds in curves.items():
        colour, line = looks[name]
        costs = [cost for cost, _ in seeds[0]]
        norms = torch.tensor([[norm for _, norm in curve] for curve in seeds])
        for axes in (early, whole):
            axes.fill_between(costs, norms.amin(0), norms.amax(0), color=colour, alpha=0.15, lw=0)
            axes.plot(costs, norms.log().mean(0).exp(), line, color=colour, lw=1.8, label=name)
    for axes in (early, whole):
        axes.set_yscale("log")
        axes.set_xlabel("cost: gradients + 2 x passes through second derivatives")
    early.set_xlim(0, costs[-1] / 4)
    early.set_ylim(3e-3, 5)
    early.set_ylabel("norm of the true hypergradient")
    early.set_title("The first quarter: who is quick, and where noise stops them", loc="left")
    whole.set_title("All of it: variance reduction goes on", loc="left")
    whole.legend(frameon=False, loc="lower left")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the methods, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "single_loop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=80_000, help="gradients for each run")
    parser.add_argument("--samples", type=int, nargs=2, default=[32768, 1024])
    options = begin(parser, arguments)

    n, m = options.samples
    problem = make_problem(n=n, m=m)
    chosen = methods(n // BATCH, m // BATCH)
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    with tqdm(total=len(chosen) * len(options.seeds) * options.budget, unit="grad") as bar:
        for name, method in chosen.items():
            bar.set_description(name)
            curves[name] = [
                run(method, problem, options.budget, seed, progress=bar.update)
                for seed in options.seeds
            ]
    results: dict[str, Any] = {
        "start": curves["SABA"][0][0][1],
        "final_norm": {name: [curve[-1][1] for curve in c] for name, c in curves.items()},
        "curves": curves,
    }
    write_json(options.run_dir, results, indent=None)
    print(f"norm of the hypergradient: {results['start']:.2f} at the start, and at the end")
    for name, finals in results["final_norm"].items():
        print(f"  {name:24s}", "  ".join(f"{norm:.1e}" for norm in finals))
    figure = draw_curves(curves)
    save_picture(figure, options.run_dir, "single_loop", ("results.json",))
    return results


if __name__ == "__main__":
    main()
