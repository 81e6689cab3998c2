"""What Nyström costs above its products, from a thousand parameters to ten million.

``python -m benchmarks.nystrom_growth`` prints a table: for each size a tanh network of two layers,
and the time of ``nystrom_ihvp`` of rank 10, with its estimates and with every check, and of a solve
that checks nothing, over the time of ten calls of the same ``hvp_fn``.  Eager, float32, one thread,
processor time; minima of runs that take turns.  The last size takes minutes and some 4 GB.

``--compiled`` prints instead what ``nystrom_ihvp`` of rank 10 takes on the Hessian of a critic of
two layers of 64 with a minibatch of 128, as one compiled graph, in units of 20 eager gradients; and
what it takes when only its products are compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

import hypergrad

from .benchmarks.problems import Problem, critic
from .benchmarks.speed import HVP, RANK, repeated
from .benchmarks.timing import ratio, seconds, single_threaded

#: Widths of both hidden layers, for about 1e3, 4.5e3, 1e5, 1e6 and 1e7 parameters.
WIDTHS = (28, 64, 312, 998, 3158)


def estimated(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    source = torch.Generator().manual_seed(0)
    return hypergrad.solve(hvp, v, hypergrad.Nystrom(RANK, generator=source, check="estimate"))


def checked(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    source = torch.Generator().manual_seed(0)
    return hypergrad.nystrom_ihvp(hvp, v, rank=RANK, generator=source)


def unchecked(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    source = torch.Generator().manual_seed(0)
    return hypergrad.solve(hvp, v, hypergrad.Nystrom(RANK, generator=source, check=False))


def row(width: int, batch: int, repeats: int) -> str:
    """One line of the table."""
    problem = critic(batch, width)
    hvp, v = problem.hvp_fn(), problem.right_hand_side()
    solves = [partial(solve, hvp, v) for solve in (estimated, checked, unchecked)]
    work: list[Callable[[], object]] = [partial(repeated, hvp, v, RANK), *solves]
    for run in work:
        run()
    times = [[seconds(run) for run in work] for _ in range(repeats)]
    products, *others = (min(column) for column in zip(*times, strict=True))
    size = sum(leaf.numel() for leaf in v.values())
    ratios = " | ".join(f"{other / products:.2f}" for other in others)
    return f"| {size:,} | {1e3 * products:.1f} | {ratios} |"


def compiled(problem: Problem, *, whole: bool) -> Callable[[], object]:
    """Nyström of compiled products, or as a whole; the operator is made anew, as in training."""
    loss_fn, v = problem.loss_fn, problem.right_hand_side()

    def run() -> object:
        operator = hypergrad.hessian(
            loss_fn, problem.params, problem.inputs, problem.targets, compile=True
        )
        source = torch.Generator().manual_seed(0)
        if whole:
            return hypergrad.nystrom_ihvp(operator, v, rank=RANK, generator=source)
        return hypergrad.solve(operator, v, hypergrad.Nystrom(RANK, generator=source))

    run()  # compiles
    return run


def twenty_gradients(problem: Problem) -> Callable[[], object]:
    def run() -> None:
        for _ in range(2 * RANK):
            problem.gradient()

    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=20.0, help="of work for one size")
    parser.add_argument("--compiled", action="store_true", help="one compiled case instead")
    parser.add_argument("--rounds", type=int, default=100, help="of that case")
    options = parser.parse_args(argv)
    single_threaded()
    if options.compiled:
        minibatch = critic(128)
        for whole, what in ((True, "nystrom_ihvp"), (False, "products of an eager solve")):
            work = compiled(minibatch, whole=whole)
            value = ratio(work, twenty_gradients(minibatch), options.rounds)
            print(f"compiled {what}, rank {RANK} / {2 * RANK} eager gradients: {value:.2f}")
        return
    print("| parameters | ten products, ms | estimated | checked | unchecked |")
    print("|---|---|---|---|---|")
    for width in options.widths:
        # A product takes about 1e-8 s a parameter and 200 us at least; 45 of them make a round.
        a_round = 45 * max(2e-4, 1e-7 * width**2)
        repeats = max(1, min(50, int(options.seconds / a_round)))
        print(row(width, options.batch, repeats), flush=True)


if __name__ == "__main__":
    main()
