from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import SampledOperator
from tests.strategies import F64, gaussian, generator


def _parts(count: int, n: int = 5) -> list[torch.Tensor]:
    halves = [gaussian(n, n, seed=seed) for seed in range(count)]
    return [half @ half.T / n for half in halves]


def test_the_mean_is_the_weighted_mean() -> None:
    parts, v = _parts(3), gaussian(2, 5)
    weights = [1.0, 2.0, 5.0]
    drawn = SampledOperator(parts, weights=weights)
    expected = sum(w * part for w, part in zip(weights, parts, strict=True)) / 8.0
    torch.testing.assert_close(drawn.mean.to_dense(), expected)
    torch.testing.assert_close(drawn.mean.matmat(v), v @ expected)
    equal = SampledOperator(parts)
    torch.testing.assert_close(equal.mean.to_dense(), sum(parts) / 3)


def test_draws_are_of_their_probabilities_and_one_a_block() -> None:
    parts = [torch.full((1, 1), float(i), dtype=F64) for i in range(3)]
    drawn = SampledOperator(parts, weights=torch.tensor([1.0, 1.0, 2.0]), generator=generator(0))
    block = torch.ones(4, 1, dtype=F64)
    draws = [drawn.matmat(block) for _ in range(800)]
    assert all(bool((draw == draw[0]).all()) for draw in draws)
    counts = torch.tensor([sum(float(draw[0]) == i for draw in draws) for i in range(3)])
    # Four standard deviations of a binomial count at most.
    assert bool(((counts - torch.tensor([200.0, 200.0, 400.0])).abs() <= 4 * 14.2).all())


def test_draws_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    v = torch.ones(5, dtype=F64)
    first, again = (
        torch.stack([SampledOperator(_parts(4), generator=g) @ v for _ in range(20)])
        for g in (generator(3), generator(3))
    )
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_hessians_of_minibatches_and_callables_on_trees() -> None:
    params = {"w": gaussian(3, seed=1), "b": gaussian(1, seed=2)}
    x, y = gaussian(12, 3, seed=3), gaussian(12, seed=4)

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ p["w"] + p["b"] - y) ** 2).mean()

    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    hessians = [hypergrad.hessian(loss, params, *batch) for batch in batches]
    drawn = SampledOperator(hessians, weights=[8, 4])
    whole = hypergrad.hessian(loss, params, x, y)
    torch.testing.assert_close(drawn.mean.to_dense(), whole.to_dense())
    by_call = SampledOperator([h.matvec for h in hessians], like=params, weights=[8, 4])
    torch.testing.assert_close(by_call.mean.to_dense(), whole.to_dense())


def test_bad_input_is_named() -> None:
    parts = _parts(2)
    with pytest.raises(hypergrad.SolverOptionError, match="empty"):
        SampledOperator([])
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(hypergrad.SolverOptionError, match="weights"):
            SampledOperator(parts, weights=weights)
    with pytest.raises(hypergrad.TreeStructureError, match="different trees"):
        SampledOperator([parts[0], _parts(1, n=4)[0]])
