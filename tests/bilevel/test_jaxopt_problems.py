"""The problems of jaxopt's tests of implicit differentiation, posed here in our own words.

Their tolerances are theirs (in single precision); where ours say more, they are asserted, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import make_regression
from torch import Tensor

import hypergrad
from tests.strategies import F64, gaussian, relative_error

#: Theirs for ridge Jacobians (tests/implicit_diff_test.py), for the threshold of a simplex
#: (tests/bisection_test.py) and for the root of a linear map (tests/scipy_wrappers_test.py).
RIDGE_ATOL, SIMPLEX_ATOL, LINEAR_ATOL = 5e-2, 1e-5, 1e-3

X, T = (torch.from_numpy(a) for a in make_regression(n_samples=10, n_features=3, random_state=0))
LAMBDA = torch.tensor(5.0, dtype=F64)


def loss(w: Tensor, penalty: Tensor) -> Tensor:
    """Half of the mean squared error, plus half of penalty |w|^2."""
    return 0.5 * ((X @ w - T) ** 2).mean() + 0.5 * penalty * (w**2).sum()


def gradient(w: Tensor, penalty: Tensor) -> Tensor:
    return X.T @ (X @ w - T) / len(T) + penalty * w


def solution(penalty: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X + penalty * len(T) * torch.eye(3, dtype=F64), X.T @ T)


TIGHT = hypergrad.CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)
CONDITIONS: dict[str, Callable[[Any], hypergrad.ImplicitFunction]] = {
    "loss": hypergrad.implicit(loss, TIGHT[0]),
    "root": hypergrad.implicit(root=gradient, solver=TIGHT[1]),
    "fixed_point": hypergrad.implicit(fixed_point=lambda w, p: w - gradient(w, p), solver=TIGHT[1]),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_jacobian_of_ridge_in_its_penalty(name: str) -> None:
    decorated = CONDITIONS[name](lambda init, penalty: solution(penalty))
    assert torch.equal(decorated(None, LAMBDA), solution(LAMBDA))
    h = 1e-4
    numeric = (solution(LAMBDA + h) - solution(LAMBDA - h)) / (2 * h)
    exact = torch.func.jacfwd(solution)(LAMBDA)
    # By rows as one backward pass each, by one tangent, and by the transforms of both.
    penalty = LAMBDA.clone().requires_grad_()
    w = decorated(None, penalty)
    rows = [torch.autograd.grad(entry, penalty, retain_graph=True)[0] for entry in w.unbind()]
    for got in (
        torch.stack(rows),
        torch.func.jvp(lambda p: decorated(None, p), (LAMBDA,), (torch.ones_like(LAMBDA),))[1],
        torch.func.jacrev(lambda p: decorated(None, p))(LAMBDA),
        torch.func.jacfwd(lambda p: decorated(None, p))(LAMBDA),
    ):
        torch.testing.assert_close(got, numeric, rtol=0, atol=RIDGE_ATOL)
        assert relative_error(got, exact) <= 1e-10


def excess(threshold: Tensor, x: Tensor) -> Tensor:
    """What the entries of x exceed a threshold by, less one: zero at that of the projection."""
    return torch.clamp(x - threshold, min=0.0).sum() - 1.0


@hypergrad.implicit(root=excess, solver=TIGHT[1])
def threshold(init: Any, x: Tensor) -> Tensor:
    low, high = x.min() - 1.0 / len(x), x.max()
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_low = excess(middle, x) > 0
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return 0.5 * (low + high)


@pytest.mark.parametrize("seed", range(4))
def test_the_projection_onto_a_simplex_in_five_dimensions_as_a_root(seed: int) -> None:
    x = gaussian(5, seed=seed)

    def projection(x: Tensor) -> Tensor:
        return torch.clamp(x - threshold(None, x), min=0.0)

    y = projection(x)
    torch.testing.assert_close(y, hypergrad.project_simplex(x), rtol=0, atol=1e-12)
    # The entries that stay share what one of them gains.
    kept = (y > 0).to(F64)
    exact = torch.diag(kept) - torch.outer(kept, kept) / kept.sum()
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        got = jacobian(projection)(x)
        torch.testing.assert_close(got, exact, rtol=0, atol=SIMPLEX_ATOL)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
        own = jacobian(hypergrad.project_simplex)(x)
        torch.testing.assert_close(own, exact, rtol=0, atol=1e-12)


def test_the_root_of_a_linear_map_of_trees() -> None:
    # Ax = b has dx/db = A^-1, which is not symmetric.
    a = gaussian(6, 6, seed=5) + 3 * torch.eye(6, dtype=F64)

    def root(x: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        image = a @ torch.cat([x["x1"], x["x2"]])
        return {"x1": image[:3] - b["b1"], "x2": image[3:] - b["b2"]}

    @hypergrad.implicit(root=root, solver=TIGHT[1])
    def solve(init: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.linalg.solve(a, torch.cat([b["b1"], b["b2"]]))
        return {"x1": x[:3], "x2": x[3:]}

    b = {"b1": gaussian(3, seed=6), "b2": gaussian(3, seed=7)}
    init = {"x1": torch.zeros(3, dtype=F64), "x2": torch.zeros(3, dtype=F64)}
    blocks = torch.func.jacrev(lambda b: solve(init, b))(b)
    got = torch.cat([torch.cat([blocks[i]["b1"], blocks[i]["b2"]], 1) for i in ("x1", "x2")])
    exact = torch.linalg.inv(a)
    assert relative_error(exact.T, exact) > 0.1
    torch.testing.assert_close(got, exact, rtol=0, atol=LINEAR_ATOL)
    assert relative_error(got, exact) <= 1e-10
