from __future__ import annotations

from collections.abc import Callable

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


#: A mean of two convex functions of three unknowns, which are no quadratics.
INPUTS, TARGETS = gaussian(9, 3, seed=5), gaussian(9, seed=6)
SPLIT = [(INPUTS[:6], TARGETS[:6]), (INPUTS[6:], TARGETS[6:])]


def _loss(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ w - y).tanh().pow(2).mean() + (0.5 * x @ w).cosh().mean() + 3.0 * w.pow(2).sum()


def _of_hessians(w: torch.Tensor) -> SampledOperator:
    return SampledOperator([hypergrad.hessian(_loss, w, *b) for b in SPLIT], weights=[6, 3])


def _of_closures(w: torch.Tensor) -> SampledOperator:
    def hvp(batch: tuple[torch.Tensor, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: torch.func.hessian(_loss)(w, *batch) @ v

    return SampledOperator([hvp(b) for b in SPLIT], like=INPUTS[0], weights=[6, 3])


def _of_a_loader(w: torch.Tensor) -> SampledOperator:
    return hypergrad.minibatch_hessian(_loss, w, SPLIT).sampled()


def _unseen(w: torch.Tensor) -> SampledOperator:
    # What the loss reads beside the parameters shows in a pass, of which there was none.
    return hypergrad.minibatch_hessian(
        lambda p, x, y: _loss(p, x, y) + (w * p).pow(2).sum(), w.detach(), SPLIT, probe=False
    ).sampled()


def _whole(w: torch.Tensor) -> torch.Tensor:
    return torch.func.hessian(_loss)(w, INPUTS, TARGETS)


def _gradients(solved: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """First and second derivatives of what is solved, in the point and the right-hand side."""
    w, v = gaussian(3, seed=1).requires_grad_(), gaussian(3, seed=2).requires_grad_()
    first = torch.autograd.grad(solved(w, v).pow(2).sum(), (w, v), create_graph=True)
    second = torch.autograd.grad(first[0].pow(2).sum() + first[1].sum(), (w, v))
    return [x.detach() for x in (*first, *second)]


@pytest.mark.parametrize("make", [_of_hessians, _of_closures, _of_a_loader])
def test_solves_with_the_mean_are_differentiable_in_what_its_parts_depend_on(
    make: Callable[[torch.Tensor], SampledOperator],
) -> None:
    found = _gradients(
        lambda w, v: hypergrad.solve(make(w).mean, v, hypergrad.Exact(), damping=0.1).value
    )
    expected = _gradients(
        lambda w, v: torch.linalg.solve(_whole(w) + 0.1 * torch.eye(3, dtype=F64), v)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [_of_hessians, _of_closures, _of_a_loader])
def test_solves_with_draws_are_differentiable_in_what_the_parts_depend_on(
    make: Callable[[torch.Tensor], SampledOperator],
) -> None:
    # The part that is never drawn has its share all the same: u'A x with the mean A.
    w, v = gaussian(3, seed=1).requires_grad_(), gaussian(3, seed=2)
    drawn = make(w)
    drawn.probabilities = torch.tensor([0.0, 1.0], dtype=F64)
    solver = hypergrad.Neumann(num_terms=300, step_size=0.05, num_samples=1)
    solution = hypergrad.solve(drawn, v, solver, damping=1.0)
    (found,) = torch.autograd.grad(solution.value.sum(), w)
    second = torch.func.hessian(_loss)(w.detach(), *SPLIT[1]) + torch.eye(3, dtype=F64)
    u = torch.linalg.solve(second, torch.ones(3, dtype=F64))
    x = torch.linalg.solve(second, v)
    torch.testing.assert_close(solution.value.detach(), x, rtol=1e-8, atol=1e-10)
    point = w.detach().requires_grad_()
    (expected,) = torch.autograd.grad(-(u @ _whole(point) @ x), point)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_what_no_pass_has_shown_yet_is_looked_at_and_counted() -> None:
    w = gaussian(3, seed=1).requires_grad_()
    drawn = _unseen(w)
    solver = hypergrad.Neumann(num_terms=3, step_size=0.1, num_samples=2)
    zero = hypergrad.solve(drawn, torch.zeros(3, dtype=F64), solver)
    assert zero.value.requires_grad
    v = gaussian(3, seed=2)
    counts = [
        hypergrad.solve(made, v, solver, damping=1.0).info.num_hvps
        for made in (_of_hessians(w.detach()), _unseen(w))
    ]
    # A look at both parts, and two products of both that carry the graph.
    assert counts[1] == counts[0] + 2 + 4
