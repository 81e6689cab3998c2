"""Where the single-loop methods end, on quadratic problems whose hypergradient is known.

The small problem runs by default; the slow tests take benchopt's simulated one, dimensions 100/10.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import PowerSchedule
from tests.strategies import F64, generator

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "single_loop.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def small(example: dict[str, Any]) -> Any:
    """Dimensions 6/2, 64 inner and 32 outer samples; spectra in [0.3, 2.1]."""
    return example["make_problem"](2, n=64, m=32, p=6, d=2, mu=0.5, cross=0.5)


@pytest.fixture(scope="module")
def benchopt(example: dict[str, Any]) -> Any:
    return example["make_problem"](0)


Walk = Callable[..., list[float]]


@pytest.fixture(scope="module")
def walk(example: dict[str, Any]) -> Walk:
    """Steps on blocks drawn uniformly; the true hypergradient's norm at the start and after each.

    ``relabel`` changes which block SABA is told that it sees.
    """

    def go(
        method: hypergrad.SingleLoop,
        problem: Any,
        steps: int,
        *,
        seed: int = 0,
        size: int = 8,
        full: bool = False,
        relabel: Callable[[int], int] = lambda index: index,
    ) -> list[float]:
        draw = generator(seed)
        inner = example["blocks"](problem.inner, draw, size)
        outer = example["blocks"](problem.outer, draw, size)
        if full:
            inner = iter(lambda: (0, problem.inner.batch(slice(None))), None)
            outer = iter(lambda: (0, problem.outer.batch(slice(None))), None)
        p, d = problem.inner.linear_w.shape[1], problem.inner.linear_y.shape[1]
        state = method.init(torch.zeros(p, dtype=F64), torch.full((d,), -2.0, dtype=F64))

        def norm() -> float:
            return float(problem.hypergradient(state.outer_params).norm())

        norms = [norm()]
        for _ in range(steps):
            if isinstance(method, hypergrad.SABA):
                (i, inner_block), (j, outer_block) = next(inner), next(outer)
                state = method.step(
                    state, [inner_block], [outer_block],
                    inner_index=relabel(i), outer_index=j,
                )  # fmt: skip
            else:
                state = method.step(state, (b for _, b in inner), (b for _, b in outer))
            norms.append(norm())
        return norms

    return go


def quadratic(w: Tensor, y: Tensor, *batch: Tensor) -> Tensor:
    """Either loss, restated: rows of a batch are samples."""
    a, c, p, q, l, k = batch  # noqa: E741
    terms = 0.5 * (a @ w) ** 2 + 0.5 * (c @ y) ** 2 + (p @ y) * (q @ w) + l @ w + k @ y
    return terms.mean()


LOSSES = (quadratic, quadratic)
STEPS: dict[str, Any] = {"inner_lr": 0.1, "outer_lr": 0.1}


def saba(num_inner_blocks: int = 8, num_outer_blocks: int = 4, **options: Any) -> hypergrad.SABA:
    return hypergrad.SABA(
        *LOSSES, num_inner_blocks=num_inner_blocks, num_outer_blocks=num_outer_blocks,
        **(STEPS | options),
    )  # fmt: skip


def test_the_closed_form_is_the_hypergradient(small: Any) -> None:
    y = torch.tensor([0.3, -1.0], dtype=F64)
    hess, _, cross, linear, _ = small.inner.means()
    w = -torch.linalg.solve(hess, cross.T @ y + linear)
    everything = slice(None)
    expected = hypergrad.hypergradient(
        lambda w, y: quadratic(w, y, *small.inner.batch(everything)),
        lambda w, y: quadratic(w, y, *small.outer.batch(everything)),
        w, y, solver=hypergrad.Exact(),
    ).grad  # fmt: skip
    torch.testing.assert_close(small.hypergradient(y), expected, rtol=1e-11, atol=1e-12)


#: Without noise, with the steps it takes to 1e-8 on the small problem, from about 4.
DETERMINISTIC: dict[str, tuple[hypergrad.SingleLoop, int]] = {
    "SOBA": (hypergrad.SOBA(*LOSSES, inner_lr=0.8, outer_lr=0.25), 400),
    "SABA": (saba(1, 1, inner_lr=0.8, outer_lr=0.25), 400),
    "AmIGO": (
        hypergrad.AmIGO(*LOSSES, inner_lr=1.2, outer_lr=0.7, inner_steps=4, linear_steps=4),
        100,
    ),
    # The series must be long enough: its bias stays.
    "StocBiO": (
        hypergrad.StocBiO(*LOSSES, inner_lr=1.2, outer_lr=0.7, inner_steps=4, linear_steps=36),
        90,
    ),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_without_noise_the_hypergradient_vanishes(name: str, small: Any, walk: Walk) -> None:
    method, steps = DETERMINISTIC[name]
    assert walk(method, small, steps, full=True)[-1] < 1e-8


def test_a_short_neumann_series_leaves_its_bias(small: Any, walk: Walk) -> None:
    method = replace(DETERMINISTIC["StocBiO"][0], linear_steps=3)  # type: ignore[call-arg]
    norms = walk(method, small, 120, full=True)
    assert norms[-1] > 1e-3
    assert norms[-1] == pytest.approx(norms[-20], rel=1e-6)  # it does not go away


def test_f2sa_ends_at_a_distance_of_one_over_the_multiplier(small: Any, walk: Walk) -> None:
    ends = []
    for multiplier in (50.0, 100.0):
        method = hypergrad.F2SA(
            *LOSSES, inner_lr=0.7, penalty_lr=0.6 / multiplier, outer_lr=0.5,
            multiplier=multiplier, inner_steps=10,
        )  # fmt: skip
        ends.append(walk(method, small, 40, full=True)[-1])
    assert ends[0] < 0.1
    assert ends[0] / ends[1] == pytest.approx(2.0, rel=0.1)


def test_saba_converges_where_soba_stalls(small: Any, walk: Walk) -> None:
    reduced = walk(saba(), small, 1200)
    assert reduced[-1] < 1e-8
    # Linearly: the logarithm falls by as much in the second half as in the first, about.
    logs = [math.log10(norm) for norm in reduced]
    assert logs[600] - logs[1200] > 0.5 * (logs[0] - logs[600])
    plain = walk(hypergrad.SOBA(*LOSSES, **STEPS), small, 400)
    assert min(plain[200:]) > 1e-4
    assert sum(plain[200:]) / 200 > 0.05


# What must not converge: each is one mistake in a direction, with the noise taken away.


def broken(method: hypergrad.SingleLoop, **change: Callable[[Tensor], Tensor]) -> Any:
    """The method with one of its products changed."""

    class Broken(type(method)):  # type: ignore[misc]
        def _update(self, oracle: Any, *args: Any) -> Any:
            true = oracle.inner_products

            def products(*at: Any, **wanted: Any) -> Any:
                parts = true(*at, **wanted)
                return parts._replace(**{k: f(getattr(parts, k)) for k, f in change.items()})

            oracle.inner_products = products
            return super()._update(oracle, *args)

    return Broken(**vars(method))


@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "StocBiO"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"cross": torch.zeros_like}, id="cross term dropped"),
        pytest.param({"cross": torch.neg}, id="sign of the cross term"),
        pytest.param({"hvp": torch.neg}, id="sign of the Hessian product"),
        pytest.param({"hvp": lambda x: 0.5 * x}, id="half of the Hessian product"),
    ],
)
def test_a_wrong_direction_ends_elsewhere(
    name: str, change: dict[str, Any], small: Any, walk: Walk
) -> None:
    method, steps = DETERMINISTIC[name]
    try:  # a third of the steps: the right ones have reached 1e-2 by then, see below
        end = walk(broken(method, **change), small, steps // 3, full=True)[-1]
    except hypergrad.NonFiniteError:
        return  # a wrong sign of the Hessian diverges
    assert end > 2e-2


@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "StocBiO"])
def test_the_wrong_variants_are_right_but_for_the_change(name: str, small: Any, walk: Walk) -> None:
    method, steps = DETERMINISTIC[name]
    assert walk(broken(method), small, steps // 3, full=True)[-1] < 1e-2


def test_saba_told_of_the_wrong_blocks_does_not_converge(small: Any, walk: Walk) -> None:
    # All data in one block's name: what it remembers is another block's.
    assert walk(saba(), small, 400, relabel=lambda index: 0)[-1] > 1e-4


# --------------------------------------------------------- benchopt's problem, and orders in steps


def slope(norms: list[list[float]], first: int) -> float:
    """The exponent of the mean squared norm in the step, by least squares on doubling windows."""
    squares = torch.tensor(norms, dtype=F64).square().mean(0)
    windows, start = [], first
    while 2 * start < len(squares) + 1:
        windows.append((math.log(start), float(squares[start : 2 * start].mean().log())))
        start *= 2
    x, y = torch.tensor(windows, dtype=F64).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.slow
def test_saba_solves_benchopts_problem_to_1e_8(benchopt: Any, walk: Walk) -> None:
    method = saba(32768 // 64, 1024 // 64)
    norms = walk(method, benchopt, 20_000, size=64)
    assert norms[0] > 1.0
    assert min(norms) <= 1e-8
    # Linear from when the memory is filled: no half of the way is much slower than the other.
    logs = [math.log10(norm) for norm in norms]
    assert logs[4000] - logs[9000] > 1.0
    assert logs[9000] - logs[14_000] > 1.0


@pytest.mark.slow
def test_soba_with_constant_steps_stalls_on_benchopts_problem(benchopt: Any, walk: Walk) -> None:
    method = hypergrad.SOBA(*LOSSES, **STEPS)
    norms = walk(method, benchopt, 6000, size=64)
    late = norms[2000:]
    assert min(late) > 1e-4
    assert 0.01 < sum(late) / len(late) < 0.2
    assert abs(slope([norms], 750)) < 0.2  # it has stopped falling


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("SOBA", hypergrad.SOBA(*LOSSES, inner_lr=PowerSchedule(0.1, 2 / 5, 300),
                                outer_lr=PowerSchedule(0.1, 3 / 5, 300)), 4000),
        ("AmIGO", hypergrad.AmIGO(*LOSSES, inner_lr=0.01, outer_lr=0.1), 300),
        ("StocBiO", hypergrad.StocBiO(*LOSSES, inner_lr=0.1, outer_lr=0.1), 300),
        ("F2SA", hypergrad.F2SA(*LOSSES, inner_lr=PowerSchedule(0.1, 4 / 7, 100), inner_steps=1,
                                penalty_lr=PowerSchedule(0.05 / 3, 5 / 7, 100),
                                outer_lr=PowerSchedule(0.1, 5 / 7, 100)), 3000),
    ],
)  # fmt: skip
def test_the_others_come_close_on_benchopts_problem(
    name: str, method: hypergrad.SingleLoop, steps: int, benchopt: Any, walk: Walk
) -> None:
    norms = walk(method, benchopt, steps, size=64)
    late = norms[-steps // 5 :]
    assert sum(late) / len(late) < 0.1 * norms[0]


@pytest.mark.slow
def test_soba_falls_at_least_as_its_paper_states(small: Any, walk: Walk) -> None:
    # O(T^(-2/5)) for rho = t^(-2/5), gamma = t^(-3/5): arXiv 2201.13409, an early version's
    # theorem 2.
    method = hypergrad.SOBA(
        *LOSSES, inner_lr=PowerSchedule(0.3, 2 / 5), outer_lr=PowerSchedule(0.3, 3 / 5)
    )
    falling = slope([walk(method, small, 8000, seed=seed) for seed in range(6)], 250)
    assert falling < -2 / 5 + 0.1
    constant = hypergrad.SOBA(*LOSSES, inner_lr=0.1, outer_lr=0.05)
    assert slope([walk(constant, small, 4000, seed=seed) for seed in range(6)], 250) > -0.15


@pytest.mark.slow
def test_f2sa_falls_at_least_as_its_paper_states(small: Any, walk: Walk) -> None:
    # O(K^(-2/7)) up to logarithms, arXiv 2301.10945, with steps of k^(-4/7) and k^(-5/7).
    method = hypergrad.F2SA(
        *LOSSES, inner_lr=PowerSchedule(0.3, 4 / 7), penalty_lr=PowerSchedule(0.15, 5 / 7),
        outer_lr=PowerSchedule(0.3, 5 / 7), inner_steps=1,
    )  # fmt: skip
    falling = slope([walk(method, small, 8000, seed=seed) for seed in range(6)], 250)
    assert falling < -2 / 7 + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("kind", [hypergrad.AmIGO, hypergrad.StocBiO])
def test_the_noise_floor_falls_as_one_over_the_batch(kind: Any, example: Any, walk: Walk) -> None:
    # With constant steps both converge linearly down to a floor that the variance, so the batch
    # size, sets.  Fresh samples for every batch size: 8 and 32 of 4096.
    problem = example["make_problem"](1, n=4096, m=4096, p=6, d=2, mu=0.5, cross=0.5)
    options: dict[str, Any] = {"inner_steps": 5, "linear_steps": 20}
    method = kind(*LOSSES, inner_lr=0.1, outer_lr=0.1, **options)
    floors = []
    for size in (8, 32):
        late = [walk(method, problem, 900, seed=seed, size=size)[200:] for seed in range(2)]
        floors.append(float(torch.tensor(late, dtype=F64).square().mean()))
    assert 2.5 < floors[0] / floors[1] < 6.0
