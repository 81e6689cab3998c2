"""Derivatives through solve(): checked against finite differences and against the inverse."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hypergrad
from hypergrad import Status
from hypergrad.transforms import apply
from tests.strategies import F32, F64, gaussian, generator, relative_error

N = 3
DAMPING = 0.3

#: Configurations that solve to rounding at dimension N: their derivatives are the inverse's.
SOLVERS: dict[str, Callable[[], hypergrad.Solver]] = {
    "cg": lambda: hypergrad.CG(rtol=1e-13),
    "minres": lambda: hypergrad.MINRES(rtol=1e-13),
    "exact": lambda: hypergrad.Exact(),
    "nystrom": lambda: hypergrad.Nystrom(rank=N, generator=generator(0)),
    "nystrom_pcg": lambda: hypergrad.NystromPCG(rank=2, rtol=1e-13, generator=generator(0)),
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


POINT, INPUTS, TARGETS = (
    0.5 * gaussian(N, seed=1),
    0.5 * gaussian(4, N, seed=2),
    gaussian(4, seed=3),
)


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
        lambda t: hessian_matrix(t, torch.outer(t, t) + INPUTS[:N]),
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
        lambda t: (
            torch.func.jacrev(model)(POINT, INPUTS).T
            @ torch.func.hessian(lambda o: squared(o * t, t))(model(POINT, INPUTS))
            @ torch.func.jacrev(model)(POINT, INPUTS)
        ),
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


@pytest.mark.parametrize(
    ("family", "solver"),
    [(family, solver) for family in ("dense", "callable") for solver in SOLVERS]
    + [(family, "exact") for family in FAMILIES if family not in ("dense", "callable")],
)
def test_derivatives_agree_with_finite_differences(family: str, solver: str) -> None:
    # Central differences of step 1e-6: h^2 |x'''| is below 1e-9 here, rounding is 1e-16/1e-6.
    # The fast mode compares along one random direction.
    function, inputs = solved(family, solver), leaves(family)
    assert gradcheck(function, inputs, atol=1e-6, rtol=1e-5, fast_mode=True)
    assert gradgradcheck(function, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.slow
@every_solver
@every_family
def test_every_derivative_agrees_with_finite_differences(family: str, solver: str) -> None:
    function, inputs = solved(family, solver), leaves(family)
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
@pytest.mark.parametrize(
    ("family", "solver"),
    [("dense", solver) for solver in SOLVERS]
    + [("hessian_in_params", "cg"), ("ggn_in_batch", "exact"), ("algebra", "nystrom")],
)
def test_transforms_over_the_operator(family: str, solver: str, transform: str) -> None:
    theta, v = FAMILIES[family].theta, gaussian(N, seed=9)

    def with_v(f: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> Tensor:
        return f(theta, v)

    got, expected = (
        TRANSFORMS[transform](partial(with_v, f))(theta)
        for f in (solved(family, solver), inverted(family))
    )
    assert relative_error(got, expected) <= 1e-9


@every_transform
@every_solver
@pytest.mark.parametrize("family", ["callable"])
def test_transforms_over_v(family: str, solver: str, transform: str) -> None:
    theta = FAMILIES[family].theta

    def cubed(f: Callable[[Tensor, Tensor], Tensor], v: Tensor) -> Tensor:
        return f(theta, v) ** 3

    got, expected = (
        TRANSFORMS[transform](partial(cubed, f))(gaussian(N, seed=9))
        for f in (solved(family, solver), inverted(family))
    )
    assert relative_error(got, expected) <= 1e-9


@every_solver
def test_vmap_over_v_is_one_batched_solve(solver: str) -> None:
    matrix, rows = positive(FAMILIES["dense"].theta), gaussian(5, N, seed=3)
    solutions = []

    def one(v: Tensor) -> Tensor:
        solutions.append(hypergrad.solve(matrix, v, SOLVERS[solver](), damping=DAMPING))
        return solutions[-1].value

    got = torch.func.vmap(one)(rows)
    batch = hypergrad.solve(matrix, rows, SOLVERS[solver](), damping=DAMPING, batched=True)
    torch.testing.assert_close(got, batch.value, rtol=1e-12, atol=1e-12)
    assert len(solutions) == 1
    assert len(solutions[0].info.columns) == 5
    assert solutions[0].info.num_hvps == batch.info.num_hvps


@pytest.mark.parametrize("solver", ["cg", "exact", "nystrom"])
def test_vmap_over_operators_solves_each_with_its_own_damping_and_sketch(solver: str) -> None:
    thetas, rows = gaussian(3, N, N, seed=6), gaussian(3, N, seed=7)

    def one(theta: Tensor, v: Tensor, damping: Tensor) -> Tensor:
        return hypergrad.solve(positive(theta), v, SOLVERS[solver](), damping=damping).value

    def reference(theta: Tensor, v: Tensor, damping: Tensor) -> Tensor:
        eye = torch.eye(N, dtype=F64)
        return torch.linalg.inv(positive(theta) + damping * eye) @ v

    dampings = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    for transform in (lambda f: f, lambda f: torch.func.jacrev(f, (0, 1, 2)), torch.func.jacfwd):
        got, expected = (
            torch.func.vmap(transform(f))(thetas, rows, dampings) for f in (one, reference)
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got, expected = (
        torch.func.grad(lambda t, f=f: (torch.func.vmap(f)(t, rows, dampings) ** 2).sum())(thetas)
        for f in (one, reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_automatic_damping_of_each_operator_of_a_vmap_is_kept_in_its_backward() -> None:
    thetas, v = gaussian(3, N, N, seed=6), gaussian(N, seed=7)
    solver = hypergrad.CG(rtol=1e-13)

    def one(theta: Tensor, v: Tensor) -> Tensor:
        return hypergrad.solve(positive(theta), v, solver, damping="auto").value

    got = torch.func.vmap(torch.func.jacrev(one, 1), in_dims=(0, None))(thetas, v)
    for theta, jacobian in zip(thetas, got, strict=True):
        used = hypergrad.solve(positive(theta), v, solver, damping="auto").info.damping
        expected = torch.linalg.inv(positive(theta) + used * torch.eye(N, dtype=F64))
        torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["dense", "hessian_in_params", "hessian_in_batch"])
def test_forward_mode_by_dual_numbers(family: str) -> None:
    theta, v = FAMILIES[family].theta, gaussian(N, seed=9)
    tangents = gaussian(*theta.shape, seed=10), gaussian(N, seed=11)
    expected = torch.func.jvp(inverted(family), (theta, v), tangents)[1]
    with forward_ad.dual_level():
        duals = [torch._make_dual(x, t, level=0) for x, t in zip((theta, v), tangents, strict=True)]
        got = torch._unpack_dual(solved(family, "cg")(*duals), level=0)[1]
    assert relative_error(got, expected) <= 1e-10


def test_vmap_over_v_takes_a_callable_that_runs_plain_autograd() -> None:
    params = POINT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(params, INPUTS), params, create_graph=True)
    rows = gaussian(3, N, seed=5)

    def kept(u: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, params, u, retain_graph=True)[0]

    def fresh(u: Tensor) -> Tensor:
        return _hvp_by_autograd(INPUTS, u).detach()

    expected = inverted("hessian_in_params")(POINT, rows.T).T
    for product in (kept, fresh):
        got = torch.func.vmap(
            lambda v, hvp=product: hypergrad.cg_ihvp(hvp, v, damping=DAMPING, rtol=1e-13)
        )(rows)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# Trees, batches, damping --------------------------------------------------------------------------


def test_trees_of_mixed_dtypes_and_other_orders_of_keys() -> None:
    params = {"w": gaussian(2, 2), "b": gaussian(2, seed=1).float()}
    curvature = hypergrad.hessian(
        lambda p: torch.cosh(p["w"] @ p["b"].double()).sum() + (p["w"] ** 2).sum(), params
    )
    v = {"b": gaussian(2, seed=2).float().requires_grad_(), "w": gaussian(2, 2).requires_grad_()}
    x = hypergrad.solve(curvature, v, hypergrad.Exact(), damping=3.0).value
    g = {"b": gaussian(2, seed=4).float(), "w": gaussian(2, 2, seed=5)}
    grads = torch.autograd.grad([x["b"], x["w"]], [v["b"], v["w"]], [g["b"], g["w"]])
    expected = hypergrad.solve(curvature, g, hypergrad.Exact(), damping=3.0).value
    torch.testing.assert_close(grads[0], expected["b"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], expected["w"], rtol=1e-5, atol=1e-6)


@every_solver
@pytest.mark.parametrize("family", ["dense", "hessian_in_params", "callable"])
def test_a_batch_has_the_gradients_of_its_separate_solves(family: str, solver: str) -> None:
    made, rows = FAMILIES[family], gaussian(3, N, seed=8).requires_grad_()
    grads = []
    for batched in (True, False):
        theta = made.theta.clone().requires_grad_()
        if batched:
            operator = made.build(theta)
            x = hypergrad.solve(
                operator, rows, SOLVERS[solver](), damping=DAMPING, batched=True
            ).value
        else:
            x = torch.stack([inverted(family)(theta, row) for row in rows])
        grads.append(torch.autograd.grad((x**3).sum(), (theta, rows)))
    for got, expected in zip(*grads, strict=True):
        assert relative_error(got, expected) <= 1e-9


@every_solver
@pytest.mark.parametrize("family", ["dense", "callable"])
def test_the_damping_may_be_a_tensor(family: str, solver: str) -> None:
    damping = torch.tensor(0.4, dtype=F64, requires_grad=True)
    theta, v = leaves(family)
    inputs = (theta, v, damping)
    assert gradcheck(lambda t, v, d: solved(family, solver, d)(t, v), inputs, atol=1e-6)
    assert gradgradcheck(
        lambda t, v, d: solved(family, solver, d)(t, v), inputs, atol=1e-5, fast_mode=True
    )


def test_gradients_arrive_in_the_dtype_of_what_they_are_of() -> None:
    matrix = positive(gaussian(N, N)).float().requires_grad_()
    v, damping = gaussian(N).float().requires_grad_(), torch.tensor(0.1, dtype=F64).requires_grad_()
    x = hypergrad.solve(matrix, v, damping=damping).value
    grads = torch.autograd.grad(x.sum(), (matrix, v, damping))
    assert [grad.dtype for grad in grads] == [F32, F32, F64]


# Scales -------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cotangents_of_any_size(solver: str, size: float) -> None:
    for family in ("dense", "callable"):
        theta, v = leaves(family)
        x = solved(family, solver)(theta, v)
        plain = torch.autograd.grad(x, (theta, v), gaussian(N, seed=2), retain_graph=True)
        scaled = torch.autograd.grad(x, (theta, v), size * gaussian(N, seed=2))
        for got, expected in zip(scaled, plain, strict=True):
            assert relative_error(got / size, expected) <= 1e-9


@every_solver
@pytest.mark.parametrize("family", ["dense", "hessian_in_params", "callable"])
def test_a_zero_right_hand_side_has_the_gradient_of_the_inverse(family: str, solver: str) -> None:
    theta, _ = leaves(family)
    v, g = torch.zeros(N, dtype=F64, requires_grad=True), gaussian(N, seed=2)
    got = torch.autograd.grad(solved(family, solver)(theta, v), (theta, v), g)
    matrix = FAMILIES[family].matrix(theta.detach()) + DAMPING * torch.eye(N, dtype=F64)
    assert relative_error(got[1], torch.linalg.inv(matrix) @ g) <= 1e-10
    assert torch.equal(got[0], torch.zeros_like(theta))


# What a wrong derivative looks like ---------------------------------------------------------------


@pytest.mark.parametrize("fault", ["v_detached", "theta_detached", "sign"])
@pytest.mark.parametrize("family", ["dense", "callable"])
def test_the_checks_can_fail(family: str, fault: str) -> None:
    function = solved(family, "cg")

    def wrong(theta: Tensor, v: Tensor) -> Tensor:
        if fault == "v_detached":
            return function(theta, v.detach())
        if fault == "theta_detached":
            return function(theta.detach(), v)
        x = function(theta, v)
        return 2 * x.detach() - x

    assert not gradcheck(wrong, leaves(family), atol=1e-6, raise_exception=False)


# Attached where something requires grad, and nowhere else -----------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "callable_by_autograd"])
def test_nothing_is_attached_where_nothing_requires_grad(family: str) -> None:
    made = FAMILIES[family]
    v = gaussian(N, seed=9)
    assert not hypergrad.solve(made.build(made.theta), v, damping=DAMPING).value.requires_grad
    theta = made.theta.clone().requires_grad_()
    with torch.no_grad():
        x = hypergrad.solve(made.build(theta), v.requires_grad_(), damping=DAMPING).value
    assert not x.requires_grad


@every_family
def test_attached_to_either_alone(family: str) -> None:
    made = FAMILIES[family]
    theta, v = leaves(family)
    expected = torch.autograd.grad(inverted(family)(theta, v), (theta, v), gaussian(N))
    of_theta = solved(family, "cg")(theta, v.detach())
    assert relative_error(torch.autograd.grad(of_theta, theta, gaussian(N))[0], expected[0]) <= 1e-9
    of_v = hypergrad.solve(made.build(made.theta), v, SOLVERS["cg"](), damping=DAMPING).value
    assert relative_error(torch.autograd.grad(of_v, v, gaussian(N))[0], expected[1]) <= 1e-9


def test_the_forward_costs_no_product_more_where_tensors_are_listed() -> None:
    theta, v = leaves("hessian_in_params")
    attached = hypergrad.solve(hypergrad.hessian(loss, theta, INPUTS), v, damping=DAMPING)
    plain = hypergrad.solve(
        hypergrad.hessian(loss, theta.detach(), INPUTS), v.detach(), damping=DAMPING
    )
    assert attached.info.num_hvps == plain.info.num_hvps
    assert torch.equal(attached.value.detach(), plain.value)


def test_a_closure_costs_two_products_more_and_they_are_counted() -> None:
    theta, v = leaves("callable")
    calls = []

    def product(u: Tensor) -> Tensor:
        calls.append(1)
        return positive(theta) @ u

    info = hypergrad.solve(product, v, damping=DAMPING).info
    assert info.num_hvps == len(calls)
    calls.clear()
    with torch.no_grad():
        plain = hypergrad.solve(product, v, damping=DAMPING).info
    assert info.num_hvps == plain.num_hvps + 2 == len(calls) + 2


def test_recurrences_build_no_graph() -> None:
    theta, v = leaves("callable")
    graphs: list[weakref.ref[Tensor]] = []

    def product(u: Tensor) -> Tensor:
        assert not u.requires_grad or u.grad_fn is not None
        out = positive(theta) @ u
        graphs.append(weakref.ref(out))
        return out

    solution = hypergrad.solve(product, v, hypergrad.CG(rtol=1e-12), damping=DAMPING)
    gc.collect()
    # Products of the recurrence are gone; the answer keeps what attaches it.
    assert sum(ref() is not None for ref in graphs) <= 2
    assert solution.value.requires_grad


# What later solves say ----------------------------------------------------------------------------


@every_solver
def test_the_reports_of_backward_passes_are_kept(solver: str) -> None:
    theta, v = leaves("dense")
    solution = hypergrad.solve(
        hypergrad.as_operator(positive(theta)), v, SOLVERS[solver](), damping="auto"
    )
    assert solution.backward == []
    torch.autograd.grad(solution.value.sum(), v, retain_graph=True)
    (report,) = solution.backward
    assert report.damping == solution.info.damping
    assert report.relative_residual <= 1e-12
    assert report.solver == solution.info.solver
    (grad,) = torch.autograd.grad((solution.value**2).sum(), theta, create_graph=True)
    assert len(solution.backward) == 2
    torch.autograd.grad(grad.sum(), theta)
    assert len(solution.backward) > 2


@pytest.mark.parametrize("rank", [1, N])
def test_a_sketch_is_made_once_and_its_inverse_is_what_is_differentiated(rank: int) -> None:
    calls = []
    matrix = positive(gaussian(N, N))

    def product(u: Tensor) -> Tensor:
        calls.append(1)
        return matrix @ u

    v = gaussian(N, seed=9).requires_grad_()
    nystrom = hypergrad.Nystrom(rank=rank, generator=generator(0))
    solution = hypergrad.solve(product, v, nystrom, damping=DAMPING, on_failure="ignore")
    sketch = hypergrad.nystrom_sketch(product, rank, v.detach(), generator=generator(0))
    calls.clear()
    (grad,) = torch.autograd.grad(solution.value, v, gaussian(N, seed=5))
    assert len(calls) == 1  # the check of the backward answer
    expected = sketch.solve(gaussian(N, seed=5), DAMPING)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_the_sketch_of_nystrom_pcg_is_used_again() -> None:
    v = gaussian(N, seed=9).requires_grad_()
    pcg = hypergrad.NystromPCG(rank=2, generator=generator(0))
    solution = hypergrad.solve(positive(gaussian(N, N)), v, pcg, damping=DAMPING)
    torch.autograd.grad(solution.value.sum(), v)
    assert solution.backward[0].num_hvps <= solution.info.num_hvps - 2


@pytest.mark.parametrize("family", ["dense", "callable"])
def test_a_failed_backward_solve_acts_as_a_failed_forward_one(family: str) -> None:
    theta, v = leaves(family)
    operator = FAMILIES[family].build(theta)
    # One iteration solves for an eigenvector, and for nothing else.
    _, vectors = torch.linalg.eigh(positive(theta.detach()))
    v = vectors[:, 0].clone().requires_grad_()
    answers = {
        how: hypergrad.solve(operator, v, hypergrad.CG(max_iters=1), on_failure=how).value
        for how in ("warn", "raise", "ignore")
    }
    g = gaussian(N, seed=2)
    with pytest.warns(hypergrad.ConvergenceWarning, match="CG: max_iters") as caught:
        torch.autograd.grad(answers["warn"], v, g)
    assert caught[0].filename == __file__
    with pytest.raises(hypergrad.ConvergenceError, match="max_iters"):
        torch.autograd.grad(answers["raise"], v, g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(answers["ignore"], v, g)


def test_a_nan_cotangent_is_named() -> None:
    theta, v = leaves("dense")
    x = solved("dense", "cg")(theta, v)
    with pytest.raises(hypergrad.NonFiniteError, match="the gradient or tangent to solve for"):
        torch.autograd.grad(x, v, torch.full((N,), float("nan"), dtype=F64))


def test_a_matrix_modified_between_the_passes_is_noticed() -> None:
    matrix = positive(gaussian(N, N))
    v = gaussian(N).requires_grad_()
    x = hypergrad.solve(matrix, v).value
    matrix.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(x.sum(), v)


# No silent zeros ----------------------------------------------------------------------------------


def _through_closure(family: str, theta: Tensor, v: Tensor) -> Tensor:
    return hypergrad.solve(FAMILIES[family].build(theta), v, SOLVERS["cg"](), damping=DAMPING).value


@pytest.mark.parametrize("family", closures)
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_a_transform_over_a_closure_is_refused_by_name(family: str, transform: str) -> None:
    v = gaussian(N, seed=9)
    with pytest.raises(hypergrad.DifferentiationError, match="as operator"):
        TRANSFORMS[transform](lambda t: _through_closure(family, t, v))(FAMILIES[family].theta)


@pytest.mark.parametrize("family", closures)
def test_a_vmap_over_a_closure_is_refused_by_name(family: str) -> None:
    theta = FAMILIES[family].theta
    with pytest.raises(hypergrad.DifferentiationError, match="as operator"):
        torch.func.vmap(lambda t, v: _through_closure(family, t, v))(
            torch.stack([theta, theta]), gaussian(2, N)
        )


@pytest.mark.parametrize("family", closures)
def test_a_transform_with_a_closure_that_requires_grad_is_refused_by_name(family: str) -> None:
    theta, v = leaves(family)
    with pytest.raises(hypergrad.DifferentiationError, match="as operator"):
        torch.func.jacrev(lambda v: _through_closure(family, theta, v))(v.detach())


# (PyTorch has no torch.func.jvp, which ggn needs, inside dual numbers, and says so.)
@pytest.mark.parametrize("family", [name for name in closures if "ggn" not in name])
def test_dual_numbers_in_a_closure_are_refused_by_name(family: str) -> None:
    theta, v = FAMILIES[family].theta, gaussian(N, seed=9)
    with (
        forward_ad.dual_level(),
        pytest.raises(hypergrad.DifferentiationError, match="as operator"),
    ):
        _through_closure(family, torch._make_dual(theta, theta, level=0), v)


@pytest.mark.parametrize("family", closures)
def test_a_third_derivative_through_a_closure_is_refused_by_name(family: str) -> None:
    theta, v = leaves(family)
    total = solved(family, "cg")(theta, v).sum()
    for _ in range(1):
        (grad,) = torch.autograd.grad(total, theta, create_graph=True)
        total = (grad**2).sum()
    with pytest.raises(hypergrad.DifferentiationError, match="third derivative"):
        torch.autograd.grad(total, theta, create_graph=True)


@pytest.mark.parametrize("family", ["dense", "hessian_in_params", "ggn_in_params"])
def test_third_derivatives_where_tensors_are_listed(family: str) -> None:
    values = []
    for function in (solved(family, "exact"), inverted(family)):
        theta, v = leaves(family)
        total = (function(theta, v) ** 2).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(total, theta, create_graph=True)
            total = (grad**2).sum()
        values.append(torch.autograd.grad(total, theta)[0])
    assert relative_error(*values) <= 1e-8


def test_a_tensor_between_the_parameters_and_the_operator_gets_its_own_gradient() -> None:
    theta, v = leaves("dense")
    between = positive(theta)
    for operator in (between, lambda u: between @ u):
        x = hypergrad.solve(operator, v, hypergrad.CG(rtol=1e-13)).value
        got = torch.autograd.grad(x.sum() + between.sum(), (between, theta), retain_graph=True)
        inverse = torch.linalg.inv(between) @ v
        expected = torch.autograd.grad(
            inverse.sum() + between.sum(), (between, theta), retain_graph=True
        )
        for mine, other in zip(got, expected, strict=True):
            assert relative_error(mine, other) <= 1e-9


def test_a_loss_that_torch_func_cannot_take_is_differentiated_by_autograd() -> None:
    class Quartic(torch.autograd.Function):
        """In the old style, with the context in forward: torch.func refuses it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**4 / 12

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * x**3 / 3

    theta, v = leaves("hessian_in_params")
    curvature = hypergrad.hessian(lambda p: apply(Quartic, p).sum(), theta)
    x = hypergrad.solve(curvature, v, SOLVERS["cg"](), damping=DAMPING).value
    got = torch.autograd.grad(x.sum(), theta)[0]
    expected = torch.autograd.grad((v / (theta**2 + DAMPING)).sum(), theta)[0]
    assert relative_error(got, expected) <= 1e-10
    assert hypergrad.solve(curvature, v.detach()).info.status is Status.CONVERGED


def test_every_jacobian_of_a_regularised_loss() -> None:
    """The square of what is solved at, weighted by what is differentiated in."""
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=source, dtype=F64) for shape in ((20, 4), (20,)))
    w, v = (torch.randn(4, generator=source, dtype=F64) for _ in range(2))

    def inner(w: Tensor, log_weight: Tensor) -> Tensor:
        return ((x @ w - y) ** 2).mean() + (log_weight.exp() * w**2).sum()

    def solved(log_weight: Tensor) -> Tensor:
        operator = hypergrad.hessian(inner, w, log_weight)
        value = hypergrad.solve(operator, v, hypergrad.Exact()).value
        assert isinstance(value, Tensor)
        return value

    at = torch.full((4,), -1.0, dtype=F64)
    hessian = 2 * (x.T @ x / 20 + torch.diag(at.exp()))
    inverse = torch.linalg.inv(hessian)
    expected = -inverse * (2 * at.exp() * (inverse @ v))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(solved)(at), expected)
    twice = torch.func.hessian(lambda at: solved(at) @ v)(at)
    torch.testing.assert_close(
        twice, torch.func.jacfwd(torch.func.jacfwd(lambda at: solved(at) @ v))(at)
    )
