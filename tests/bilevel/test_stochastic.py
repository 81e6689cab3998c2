"""Losses that draw: one draw serves a whole call, and what is not one matrix is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import F64, gaussian, generator, relative_error

ROWS, TARGETS = gaussian(200, 4, seed=1), gaussian(200, seed=2)
PENALTY = torch.tensor(-0.5, dtype=F64)

SOLVERS: dict[str, hypergrad.Solver] = {
    "exact": hypergrad.Exact(),
    "cg": hypergrad.CG(rtol=1e-12),
    "minres": hypergrad.MINRES(rtol=1e-12),
    "gmres": hypergrad.GMRES(rtol=1e-12),
    "neumann": hypergrad.Neumann(num_terms=300),
    "nystrom": hypergrad.Nystrom(4, generator=generator(0)),
    "nystrom_pcg": hypergrad.NystromPCG(2, rtol=1e-12, generator=generator(0)),
    "auto": hypergrad.Auto(rtol=1e-12),
}


class Minibatches:
    """A ridge loss of a batch that is drawn anew at each call, and the batches drawn so far."""

    def __init__(self, seed: int) -> None:
        self.source, self.drawn = generator(seed), []  # type: tuple[torch.Generator, list[Tensor]]

    def __call__(self, w: Tensor, penalty: Tensor) -> Tensor:
        index = torch.randint(200, (20,), generator=self.source)
        self.drawn.append(index)
        return self.of(index, w, penalty)

    @staticmethod
    def of(index: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
        error = ROWS[index] @ w - TARGETS[index]
        return 0.5 * (error**2).mean() + 0.5 * penalty.exp() * (w**2).sum()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_drawn_inside_a_loss_is_one_for_the_whole_call(name: str) -> None:
    inner, outer = Minibatches(3), Minibatches(4)
    w = gaussian(4, seed=5)
    damping = 1e-10 if "nystrom" in name else None
    got = hypergrad.hypergradient(inner, outer, w, PENALTY, solver=SOLVERS[name], damping=damping)
    # One call of each loss, so that the products, the mixed derivative and the gradients are
    # those of one batch; and the answer is that of the same batch held fixed.
    assert len(inner.drawn) == len(outer.drawn) == 1
    fixed = hypergrad.hypergradient(
        lambda w, p: Minibatches.of(inner.drawn[0], w, p),
        lambda w, p: Minibatches.of(outer.drawn[0], w, p),
        w,
        PENALTY,
        solver=hypergrad.Exact(),
    )
    assert relative_error(got.grad, fixed.grad) <= 1e-8
    assert not got.info.status.failed


def test_each_call_has_its_own_batch_and_their_mean_is_that_of_the_linear_part() -> None:
    # With a fixed inner loss the hypergradient is linear in the outer one: batches of it are
    # unbiased.  (In the inner loss they are not: the inverse stands between.)
    w = torch.linalg.lstsq(ROWS, TARGETS[:, None]).solution[:, 0]
    outer = Minibatches(6)

    def inner(w: Tensor, penalty: Tensor) -> Tensor:
        return Minibatches.of(torch.arange(200), w, penalty)

    exact = hypergrad.hypergradient(inner, inner, w, PENALTY, solver=hypergrad.Exact()).grad
    grads = torch.stack(
        [
            hypergrad.hypergradient(inner, outer, w, PENALTY, solver=hypergrad.Exact()).grad
            for _ in range(40)
        ]
    )
    assert len({tuple(index.tolist()) for index in outer.drawn}) == 40
    error = float(grads.std()) / 40**0.5
    assert abs(float(grads.mean() - exact)) <= 4.0 * error
    assert error > 0


def test_dropout_is_one_mask_for_the_whole_call() -> None:
    masks: list[Tensor] = []

    def inner(w: Tensor, penalty: Tensor) -> Tensor:
        mask = (torch.rand(4, generator=source) < 0.5).to(F64)
        masks.append(mask)
        error = ROWS @ (2.0 * mask * w) - TARGETS
        return 0.5 * (error**2).mean() + 0.5 * penalty.exp() * (w**2).sum()

    source = generator(7)
    w = gaussian(4, seed=8)
    got = hypergrad.hypergradient(
        inner, lambda w, p: (w**2).sum(), w, PENALTY, solver=SOLVERS["cg"]
    )
    assert len(masks) == 1
    assert got.info.converged


def test_products_that_are_not_of_one_matrix_are_refused() -> None:
    # The same mistake made where it can be: a product that draws a batch each time.
    source = generator(9)

    def hvp_fn(u: Tensor) -> Tensor:
        rows = ROWS[torch.randint(200, (5,), generator=source)]
        return rows.T @ (rows @ u) / 5

    with pytest.raises(hypergrad.NotSymmetricError, match="fresh minibatches"):
        hypergrad.cg_ihvp(hvp_fn, gaussian(4, seed=1))


def test_a_loss_that_draws_when_it_is_looked_at_twice_is_refused_in_unrolling() -> None:
    inner = Minibatches(3)  # its own generator cannot be replayed
    with pytest.raises(hypergrad.HypergradError, match="differ"):
        hypergrad.unrolled_hypergradient(
            inner, lambda w, p: (w**2).sum(), torch.zeros(4, dtype=F64), PENALTY, num_steps=9,
            optimizer=hypergrad.SGD(lr=0.1),
        )  # fmt: skip


def test_implicit_over_a_batch_that_is_held_for_the_step() -> None:
    # The decorated loss is called forward and backward: its batch is an argument of the step.
    step: dict[str, Any] = {}

    @hypergrad.implicit(lambda w, p: Minibatches.of(step["batch"], w, p), SOLVERS["exact"])
    def solve(init: Any, penalty: Tensor) -> Tensor:
        rows, targets = ROWS[step["batch"]], TARGETS[step["batch"]]
        gram = rows.T @ rows / len(rows) + penalty.exp() * torch.eye(4, dtype=F64)
        return torch.linalg.solve(gram, rows.T @ targets / len(rows))

    source = generator(11)
    for _ in range(3):
        step["batch"] = index = torch.randint(200, (20,), generator=source)
        penalty = PENALTY.clone().requires_grad_()
        (solve(None, penalty) ** 2).sum().backward()
        expected = hypergrad.hypergradient(
            lambda w, p, index=index: Minibatches.of(index, w, p),  # type: ignore[misc]
            lambda w, p: (w**2).sum(),
            solve(None, PENALTY),
            PENALTY,
            solver=hypergrad.Exact(),
        )
        assert penalty.grad is not None
        assert relative_error(penalty.grad, expected.grad) <= 1e-10
