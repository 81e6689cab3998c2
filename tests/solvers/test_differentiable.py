"""Derivatives through solve(): checked against finite differences and against the inverse."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hypergrad
from hypergrad import Status
from tests.strategies import F32, F64, gaussian, generator, relative_error

N = 4
DAMPING = 0.3

#: Configurations that solve to rounding at dimension N: their derivatives are the inverse's.
SOLVERS: dict[str, Callable[[], hypergrad.Solver]] = {
    "cg": lambda: hypergrad.CG(rtol=1e-13),
    "exact": lambda: hypergrad.Exact(),
    "nystrom": lambda: hypergrad.Nystrom(rank=N, generator=generator(0)),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@dataclass(frozen=True)
class Family:
    """Operators by a parameter theta, and their matrix in plain torch."""

    build: Callable[[Tensor], Any]
    matrix: Callable[[Tensor], Tensor]
    theta: Tensor
    closure: bool = False


def positive(theta: Tensor) -> Tensor:
    return theta @ theta.T + torch.eye(N, dtype=theta.dtype)


def loss(params: Tensor, x: Tensor) -> Tensor:
    return (torch.cosh(x @ params)).sum() + (params**4).sum() / 12


def model(params: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ params) + x[:, 0] * params.sum() ** 2


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs - y) ** 2).sum() + (outputs**4).sum() / 10


def gauss_newton(params: Tensor, x: Tensor, y: Tensor) -> Tensor:
    jacobian = torch.func.jacrev(model)(params, x)
    curvature = torch.func.hessian(squared)(model(params, x), y)
    return jacobian.T @ curvature @ jacobian


POINT, INPUTS, TARGETS = 0.5 * gaussian(N, seed=1), 0.5 * gaussian(6, N, seed=2), gaussian(6, seed=3)


def hessian_matrix(params: Tensor, x: Tensor) -> Tensor:
    return torch.func.hessian(loss)(params, x)


FAMILIES: dict[str, Family] = {
    "dense": Family(
        lambda t: hypergrad.as_operator(positive(t)), positive, 0.5 * gaussian(N, N, seed=4)
    ),
    "hessian_in_params": Family(
        lambda t: hypergrad.hessian(loss, t, INPUTS), lambda t: hessian_matrix(t, INPUTS), POINT
    ),
    "hessian_in_batch": Family(
        lambda t: hypergrad.hessian(loss, POINT, t), lambda t: hessian_matrix(POINT, t), INPUTS
    ),
    "hessian_in_both": Family(
        lambda t: hypergrad.hessian(loss, t, torch.outer(t, t) + INPUTS[:N]),
        lambda t: hessian_matrix(t, torch.outer(t, t).detach() + INPUTS[:N])
        if not t.requires_grad
        else hessian_matrix(t, torch.outer(t, t) + INPUTS[:N]),
        POINT,
    ),
    "ggn_in_params": Family(
        lambda t: hypergrad.ggn(model, squared, t, INPUTS, TARGETS),
        lambda t: gauss_newton(t, INPUTS, TARGETS),
        POINT,
    ),
    "ggn_in_batch": Family(
        lambda t: hypergrad.ggn(model, squared, POINT, t, TARGETS),
        lambda t: gauss_newton(POINT, t, TARGETS),
        INPUTS,
    ),
    "ggn_in_targets": Family(
        lambda t: hypergrad.ggn(model, lambda o, y: squared(o * y, y), POINT, INPUTS, t),
        lambda t: torch.func.jacrev(model)(POINT, INPUTS).T
        @ torch.func.hessian(lambda o: squared(o * t, t))(model(POINT, INPUTS))
        @ torch.func.jacrev(model)(POINT, INPUTS),
        TARGETS,
    ),
    "algebra": Family(
        lambda t: (
            t[0] * hypergrad.as_operator(positive(INPUTS[:N]))
            + hypergrad.hessian(loss, t, INPUTS) / 2
            + t[1] ** 2
        ),
        lambda t: (
            t[0] * positive(INPUTS[:N])
            + hessian_matrix(t, INPUTS) / 2
            + t[1] ** 2 * torch.eye(N, dtype=F64)
        ),
        POINT.abs() + 0.2,
    ),
    "callable": Family(
        lambda t: lambda u: positive(t) @ u, positive, 0.5 * gaussian(N, N, seed=4), closure=True
    ),
    "callable_by_autograd": Family(
        lambda t: lambda u: _hvp_by_autograd(t, u),
        lambda t: hessian_matrix(POINT, t),
        INPUTS,
        closure=True,
    ),
    "hessian_by_closure": Family(
        lambda t: hypergrad.hessian(lambda p: loss(p, t), POINT),
        lambda t: hessian_matrix(POINT, t),
        INPUTS,
        closure=True,
    ),
    "ggn_by_closure": Family(
        lambda t: hypergrad.ggn(lambda p, x: model(p, t), squared, POINT, INPUTS, TARGETS),
        lambda t: gauss_newton(POINT, t, TARGETS),
        INPUTS,
        closure=True,
    ),
    "sum_with_closure": Family(
        lambda t: (
            hypergrad.as_operator(lambda u: positive(t) @ u, like=POINT)
            + hypergrad.as_operator(positive(2 * t))
        ),
        lambda t: positive(t) + positive(2 * t),
        0.5 * gaussian(N, N, seed=4),
        closure=True,
    ),
}


def _hvp_by_autograd(x: Tensor, u: Tensor) -> Tensor:
    params = POINT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(params, x), params, create_graph=True)
    return torch.autograd.grad(gradient, params, u, create_graph=True)[0]


every_family = pytest.mark.parametrize("family", FAMILIES)
listed = [name for name, family in FAMILIES.items() if not family.closure]
closures = [name for name, family in FAMILIES.items() if family.closure]


def solved(family: str, solver: str, damping: Any = DAMPING) -> Callable[[Tensor, Tensor], Tensor]:
    made = FAMILIES[family]

    def function(theta: Tensor, v: Tensor) -> Tensor:
        return hypergrad.solve(
            made.build(theta), v, SOLVERS[solver](), damping=damping, on_failure="raise"
        ).value

    return function


def inverted(family: str, damping: Any = DAMPING) -> Callable[[Tensor, Tensor], Tensor]:
    # Not torch.linalg.solve: two of its forward-mode derivatives, one inside the other, lose a
    # term (torch 2.13).
    matrix = FAMILIES[family].matrix
    return lambda theta, v: torch.linalg.inv(matrix(theta) + damping * torch.eye(N, dtype=F64)) @ v


def leaves(family: str) -> tuple[Tensor, Tensor]:
    return FAMILIES[family].theta.clone().requires_grad_(), gaussian(N, seed=9).requires_grad_()


# Gradients and second derivatives -----------------------------------------------------------------


@every_solver
@every_family
def test_first_and_second_derivatives_agree_with_finite_differences(
    family: str, solver: str
) -> None:
    function, inputs = solved(family, solver), leaves(family)
    # Central differences of step 1e-6: h^2 |x'''| is below 1e-9 here, rounding is 1e-16/1e-6.
    assert gradcheck(function, inputs, atol=1e-6, rtol=1e-5)
    assert gradgradcheck(function, inputs, atol=1e-5, rtol=1e-4)


@every_solver
@every_family
def test_gradients_are_those_of_the_inverse(family: str, solver: str) -> None:
    cotangent = gaussian(N, seed=5)
    grads = []
    for function in (solved(family, solver), inverted(family)):
        inputs = leaves(family)
        grads.append(torch.autograd.grad(function(*inputs), inputs, cotangent))
    for got, expected in zip(*grads, strict=True):
        assert relative_error(got, expected) <= 1e-10


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "reverse_over_reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "reverse_over_forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward_over_forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


@every_transform
@every_solver
@pytest.mark.parametrize("family", ["dense", "hessian_in_params", "ggn_in_batch", "algebra"])
def test_transforms_over_the_operator(family: str, solver: str, transform: str) -> None:
    theta, v = FAMILIES[family].theta, gaussian(N, seed=9)
    got, expected = (
        TRANSFORMS[transform](lambda t, f=f: f(t, v))(theta)
        for f in (solved(family, solver), inverted(family))
    )
    assert relative_error(got, expected) <= 1e-9


@every_transform
@every_solver
@pytest.mark.parametrize("family", ["dense", "callable"])
def test_transforms_over_v(family: str, solver: str, transform: str) -> None:
    theta = FAMILIES[family].theta
    got, expected = (
        TRANSFORMS[transform](lambda v, f=f: f(theta, v) ** 3)(gaussian(N, seed=9))
        for f in (solved(family, solver), inverted(family))
    )
    assert relative_error(got, expected) <= 1e-9
