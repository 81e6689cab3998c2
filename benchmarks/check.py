"""Have the solvers become slower?  Ratios of times, against those that are committed.

``make bench-check`` measures each ratio with its two sides taking turns, on one thread, in
processor time, and fails where one exceeds its committed value by more than a fifth.  What other
work does to the clock only ever adds, so a ratio that seems too large is measured again, and the
smallest counts.  ``python -m benchmarks.check --update`` writes the baseline anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import hypergrad

from .benchmarks.problems import PROBLEMS, SMALL_PROBLEMS, Problem
from .benchmarks.speed import CG_ITERATIONS, DAMPING, HVP, RANK, cg, nystrom, repeated
from .benchmarks.timing import ratio, single_threaded

BASELINE = Path(__file__).with_name("baseline.json")
#: By how much, relatively, a ratio may exceed its baseline.
ALLOWED = 0.2
#: How often a ratio is measured before it counts as too large.
ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """One ratio: what is done with a problem, over what."""

    problem: str
    work: Callable[[Problem], Callable[[], object]]
    yardstick: Callable[[Problem], Callable[[], object]]

    def measure(self, problems: Mapping[str, Callable[[], Problem]], repeats: int) -> float:
        made = problems[self.problem]()
        return ratio(self.work(made), self.yardstick(made), min(repeats, made.repeats))


def _solve(
    run: Callable[[HVP, dict[str, torch.Tensor]], object], problem: Problem
) -> partial[object]:
    return partial(run, problem.hvp_fn(), problem.right_hand_side())


def _products(count: int, problem: Problem) -> Callable[[], object]:
    return partial(repeated, problem.hvp_fn(), problem.right_hand_side(), count)


def unchecked(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    """Nyström with its ``RANK`` products and no more."""
    source = torch.Generator().manual_seed(0)
    return hypergrad.solve(hvp, v, hypergrad.Nystrom(RANK, generator=source, check=False))


def estimated(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    """Nyström that spends products on checks only where its estimates leave a doubt."""
    source = torch.Generator().manual_seed(0)
    return hypergrad.solve(hvp, v, hypergrad.Nystrom(RANK, generator=source, check="estimate"))


def minres(hvp: HVP, v: dict[str, torch.Tensor]) -> object:
    """As many iterations as of CG."""
    solver = hypergrad.MINRES(rtol=0.0, max_iters=CG_ITERATIONS)
    return hypergrad.solve(hvp, v, solver, damping=DAMPING, on_failure="raise")


def _ten_products(problem: Problem) -> Callable[[], object]:
    operator = hypergrad.hessian(
        problem.loss_fn, problem.params, problem.inputs, problem.targets,
        mode="reverse_over_reverse",
    )  # fmt: skip
    block = {name: torch.stack([x] * RANK) for name, x in problem.right_hand_side().items()}
    return partial(operator.matmat, block)


def _gradient(problem: Problem) -> Callable[[], object]:
    return problem.gradient


CASES: dict[str, Case] = {
    f"{problem}: {what}": Case(problem, partial(_solve, run), partial(_products, count))
    for problem in ("critic", "logistic")
    for what, run, count in (
        ("Nyström rank 10 / 10 products", nystrom, RANK),
        ("Nyström rank 10 unchecked / 10 products", unchecked, RANK),
        ("Nyström rank 10 estimated / 10 products", estimated, RANK),
        ("CG 20 iterations / 20 products", cg, CG_ITERATIONS),
        ("MINRES 20 iterations / 20 products", minres, CG_ITERATIONS),
    )
} | {
    "critic: 10 products / gradient": Case("critic", _ten_products, _gradient),
}


def compare(measured: Mapping[str, float], baseline: Mapping[str, float]) -> list[str]:
    """What is slower than it may be, and what has no baseline; empty where all is well."""
    faults = []
    for name, value in measured.items():
        if name not in baseline:
            faults.append(f"{name}: {value:.2f}, without a baseline; add one with --update")
        elif value > (1 + ALLOWED) * baseline[name]:
            more = value / baseline[name] - 1
            faults.append(f"{name}: {value:.2f}, {more:.0%} more than {baseline[name]:.2f}")
    faults += [f"{name}: has a baseline but is not measured" for name in baseline.keys() - measured]
    return faults


def measure(
    baseline: Mapping[str, float],
    problems: Mapping[str, Callable[[], Problem]],
    *,
    repeats: int,
    rounds: int,
) -> dict[str, float]:
    """Every ratio: the smallest of the rounds it took to come within the allowance, or of all."""
    found: dict[str, float] = {}
    for name, case in CASES.items():
        for _ in range(rounds):
            value = case.measure(problems, repeats)
            found[name] = min(value, found.get(name, value))
            if found[name] <= (1 + ALLOWED) * baseline.get(name, 0.0):
                break
        print(f"{name:52}{found[name]:8.2f}{baseline.get(name, float('nan')):10.2f}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    parser.add_argument("--trial", action="store_true", help="the smallest case of everything")
    options = parser.parse_args(argv)
    single_threaded()
    known: dict[str, float] = {}
    if not options.update:
        known = json.loads(options.baseline.read_text("utf-8"))["ratios"]
    print(f"{'ratio of processor times, one thread':52}{'now':>8}{'baseline':>10}")
    found = measure(
        known,
        SMALL_PROBLEMS if options.trial else PROBLEMS,
        repeats=2 if options.trial else 15,
        rounds=1 if options.trial else ROUNDS,
    )
    if options.update:
        record = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "ratios": {name: round(value, 3) for name, value in found.items()},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        options.baseline.write_text(text + "\n", encoding="utf-8")
        return 0
    faults = compare(found, known)
    print("\n".join(["", *faults]) if faults else "\nNothing is slower than it was.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
