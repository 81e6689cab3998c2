from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from tests.bilevel.test_hypergradient import couple, judge, quadratic, solve_inner
from tests.strategies import (
    F32,
    F64,
    flat,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    tree_like,
    trees,
)

Loss = Callable[..., Tensor]

OPTIMIZERS: dict[str, hypergrad.InnerOptimizer] = {
    "sgd": hypergrad.SGD(lr=0.05),
    "momentum": hypergrad.SGD(lr=0.05, momentum=0.7),
    "adam": hypergrad.Adam(lr=0.05, betas=(0.8, 0.9)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def plain_unroll(
    inner_loss: Loss, outer_loss: Loss, start: Any, outer: Any, name: str, steps: int, free: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradient by one graph over every step written out, and w_T, in flat coordinates.

    The first ``free`` steps are left out of the graph.
    """
    y = flat(outer).clone().requires_grad_()
    w = flat(start).clone()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        if t <= free:
            w, first, second = w.detach(), first.detach(), second.detach()
        if not w.requires_grad:
            w = w.requires_grad_()
        loss = inner_loss(tree_like(start, w), tree_like(outer, y))
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        if name == "adam":
            first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g**2
            w = w - 0.05 * (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-8)
        else:
            first = (0.7 if name == "momentum" else 0.0) * first + g
            w = w - 0.05 * first
        if t <= free:
            w, first, second = w.detach(), first.detach(), second.detach()
    value = outer_loss(tree_like(start, w), tree_like(outer, y))
    return torch.autograd.grad(value, y)[0], w.detach()


@quick_and_thorough
@given(inner=trees(), outer=trees(), name=st.sampled_from([*OPTIMIZERS]))
def test_both_directions_agree_with_one_plain_graph(
    effort: str, name: str, inner: Any, outer: Any
) -> None:
    expected, end = plain_unroll(couple, judge, inner, outer, name, 3)
    for mode in ("reverse", "forward"):
        got = hypergrad.unrolled_hypergradient(
            couple, judge, inner, outer, num_steps=3, optimizer=OPTIMIZERS[name], mode=mode
        )
        # The same operations in another order: rounding alone, over three steps.
        assert relative_error(flat(got.inner_params), end) <= 1e-12
        assert relative_error(flat(got.grad), expected) <= 1e-10
        torch.testing.assert_close(flat(got.grad), flat(got.direct) + flat(got.implicit))
        assert got.num_differentiated == 3
        assert torch.equal(got.outer_value, judge(got.inner_params, outer).detach())
        assert not got.outer_value.requires_grad


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9, 10, 99])
@every_optimizer
def test_any_segmentation_gives_the_same_gradient(name: str, every: int) -> None:
    start, outer = gaussian(4, seed=1), gaussian(3, seed=2)
    expected, _ = plain_unroll(couple, judge, start, outer, name, 10)
    got = hypergrad.unrolled_hypergradient(
        couple, judge, start, outer, num_steps=10, optimizer=OPTIMIZERS[name],
        checkpoint_every=every,
    )  # fmt: skip
    assert relative_error(got.grad, expected) <= 1e-12


@pytest.mark.parametrize("last", [1, 4, 10])
@every_optimizer
def test_truncated_differentiates_the_last_steps_alone(name: str, last: int) -> None:
    start, outer = gaussian(4, seed=1), gaussian(3, seed=2)
    expected, end = plain_unroll(couple, judge, start, outer, name, 10, free=10 - last)
    got = hypergrad.unrolled_hypergradient(
        couple, judge, start, outer, num_steps=10, optimizer=OPTIMIZERS[name], mode="truncated",
        truncate=last,
    )  # fmt: skip
    assert relative_error(got.grad, expected) <= 1e-12
    assert relative_error(got.inner_params, end) <= 1e-13
    assert got.num_differentiated == last
    if last == 1:
        one = hypergrad.unrolled_hypergradient(
            couple, judge, start, outer, num_steps=10, optimizer=OPTIMIZERS[name], mode="one_step"
        )
        assert torch.equal(one.grad, got.grad)


def ridge() -> tuple[Loss, Loss, Tensor, Tensor, Tensor]:
    """Both losses, log ridge, the solution in w and the derivative in the log ridge."""
    x, y = gaussian(30, 4, seed=1) / 30**0.5, gaussian(30, seed=2)
    x_val, y_val = gaussian(20, 4, seed=3), gaussian(20, seed=4)
    log_ridge = torch.tensor(-0.5, dtype=F64)
    gram = x.T @ x + math.exp(-0.5) * torch.eye(4, dtype=F64)
    star = torch.linalg.solve(gram, x.T @ y)
    gradient = x_val.T @ (x_val @ star - y_val) / 20
    expected = -math.exp(-0.5) * gradient @ torch.linalg.solve(gram, star)

    def inner(w: Tensor, log_ridge: Tensor) -> Tensor:
        error = x.to(w.dtype) @ w - y.to(w.dtype)
        return 0.5 * (error**2).sum() + 0.5 * log_ridge.exp() * (w**2).sum()

    def outer(w: Tensor, log_ridge: Tensor) -> Tensor:
        return 0.5 * ((x_val.to(w.dtype) @ w - y_val.to(w.dtype)) ** 2).mean()

    return inner, outer, log_ridge, star, expected


#: The curvatures are 1.12 to 2.90, so a step of 0.5 leaves 0.45 of the error at most: 60 of them
#: leave 2e-21 of the start, and 60 times that (over 0.45) of dw/dy.
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-4)])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_ridge_has_its_closed_form_at_convergence(
    mode: Any, dtype: torch.dtype, tolerance: float
) -> None:
    inner, outer, log_ridge, star, expected = ridge()
    got = hypergrad.unrolled_hypergradient(
        inner, outer, torch.zeros(4, dtype=dtype), log_ridge.to(dtype), num_steps=60,
        optimizer=hypergrad.SGD(lr=0.5), mode=mode,
    )  # fmt: skip
    assert relative_error(got.grad, expected) <= tolerance
    assert relative_error(got.inner_params, star) <= tolerance
    assert got.grad.dtype == dtype
    assert got.inner_gradient_norm <= tolerance


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_quadratic_has_its_closed_form_at_convergence(mode: Any) -> None:
    inner, star, y = quadratic()
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)
    got = hypergrad.unrolled_hypergradient(
        inner, lambda w, y: (w**3).sum() + (w * y).sum(), torch.zeros(4, dtype=F64), y,
        num_steps=60, optimizer=hypergrad.SGD(lr=0.5), mode=mode,
    )  # fmt: skip
    expected = star + torch.linalg.solve(matrix, 3 * star**2 + y)
    assert relative_error(got.grad, expected) <= 1e-10


@pytest.mark.parametrize("truncate", [1, 5, 10, 20])
def test_truncation_leaves_out_what_the_contraction_says(truncate: int) -> None:
    # At a solution the truncated gradient is the first K terms of the Neumann series, so that
    # with all curvatures equal to c the part left out is (1 - lr c)^K exactly.
    y, curvature, lr = gaussian(3, seed=1), 0.5, 0.4
    got = hypergrad.unrolled_hypergradient(
        lambda w, y: 0.5 * curvature * (w**2).sum() - y @ w, lambda w, y: w.sum(), y / curvature, y,
        num_steps=30, optimizer=hypergrad.SGD(lr=lr), mode="truncated", truncate=truncate,
    )  # fmt: skip
    left_out = (1 - lr * curvature) ** truncate
    torch.testing.assert_close(got.grad, torch.full((3,), (1 - left_out) / curvature, dtype=F64))


def test_one_step_of_newtons_method_is_the_implicit_gradient() -> None:
    # Bolte, Pauwels and Vaiter: the Jacobian of a superlinear step in w vanishes at the solution.
    outer = gaussian(3, seed=2)
    star = solve_inner(couple, gaussian(4, seed=1), outer)

    class Newton:
        def __init__(self, outer: Tensor) -> None:
            self.outer = outer

        def init(self, params: Tensor) -> None:
            return None

        def step(self, params: Tensor, state: None, grads: Tensor) -> tuple[Tensor, None]:
            hessian = torch.func.hessian(couple)(params, self.outer)
            return params - torch.linalg.solve(hessian, grads), None

    got = hypergrad.unrolled_hypergradient(
        couple, judge, star + 1e-3, outer, num_steps=5, optimizer=Newton, mode="one_step"
    )
    expected = hypergrad.hypergradient(couple, judge, star, outer, solver=hypergrad.Exact())
    assert relative_error(got.grad, expected.grad) <= 1e-9


def logistic() -> tuple[Loss, Loss, Tensor, Tensor]:
    x, target = gaussian(60, 5, seed=1), (gaussian(60, seed=2) > 0).to(F64)
    x_val, target_val = gaussian(40, 5, seed=3), (gaussian(40, seed=4) > 0).to(F64)
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(w: Tensor, log_ridge: Tensor) -> Tensor:
        return bce(x @ w, target) + 0.5 * (log_ridge.exp() * w**2).sum()

    def outer(w: Tensor, log_ridge: Tensor) -> Tensor:
        return bce(x_val @ w, target_val)

    return inner, outer, torch.zeros(5, dtype=F64), torch.linspace(-2, 0, 5, dtype=F64)


def mlp() -> tuple[Loss, Loss, Any, Any]:
    x, target = gaussian(20, 2, seed=1), gaussian(20, 1, seed=2)
    source = generator(5)
    params = {
        name: 0.5 * torch.randn(shape, generator=source, dtype=F64)
        for name, shape in {"w1": (2, 3), "b1": (3,), "w2": (3, 1), "b2": (1,)}.items()
    }

    def predict(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def inner(p: Any, y: Any) -> Tensor:
        errors = (predict(p, x) - target)[:, 0] ** 2
        # Towards the start: the minimum is no symmetric point, and every direction curves upwards.
        penalty = sum(((leaf - params[name]) ** 2).sum() for name, leaf in p.items())
        return (torch.sigmoid(y["weights"]) * errors).mean() + y["log_ridge"].exp() * penalty

    def outer(p: Any, y: Any) -> Tensor:
        return ((predict(p, x[:7]) - target[:7]) ** 2).mean()

    return (
        inner,
        outer,
        params,
        {"weights": gaussian(20, seed=3), "log_ridge": torch.tensor(-1.5, dtype=F64)},
    )


@pytest.mark.parametrize(("problem", "lr", "steps"), [(logistic, 1.0, 120), (mlp, 0.5, 100)])
def test_all_routes_agree(problem: Any, lr: float, steps: int) -> None:
    inner, outer, start, y = problem()
    unrolled = {
        mode: hypergrad.unrolled_hypergradient(
            inner, outer, start, y, num_steps=steps, optimizer=hypergrad.SGD(lr=lr, momentum=0.5),
            mode=mode, truncate=steps - 50 if mode == "truncated" else None,
        )
        for mode in ("reverse", "forward", "truncated")
    }  # fmt: skip
    star = unrolled["reverse"].inner_params
    n = len(flat(start))
    implicit = {
        "exact": hypergrad.hypergradient(inner, outer, star, y, solver=hypergrad.Exact()),
        "cg": hypergrad.hypergradient(inner, outer, star, y, solver=hypergrad.CG(rtol=1e-11)),
        "neumann": hypergrad.hypergradient(
            inner, outer, star, y, solver=hypergrad.Neumann(num_terms=400)
        ),
        "nystrom": hypergrad.hypergradient(
            inner, outer, star, y, solver=hypergrad.Nystrom(n, generator=generator(0)), damping=1e-9
        ),
    }
    assert unrolled["reverse"].inner_gradient_norm <= 1e-9
    expected = flat(implicit["exact"].grad)
    for name, got in (unrolled | implicit).items():
        assert relative_error(flat(got.grad), expected) <= 1e-6, name


def hypertorch_notebook() -> tuple[Loss, Loss]:
    """The experiment of hypertorch's logistic regression notebook, from its published recipe."""
    rng = np.random.RandomState(1)  # the recipe names the legacy generator
    w = rng.randn(20)
    x = rng.randn(1000, 20)
    y = (x @ w + 0.1 * rng.randn(1000) > 0).astype(float)
    order = rng.permutation(1000)
    x_val, x_train = torch.split(torch.from_numpy(x[order]), 500)
    y_val, y_train = torch.split(torch.from_numpy(y[order]), 500)
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(w: Tensor, penalties: Tensor) -> Tensor:
        return bce(x_train @ w, y_train) + 0.5 * (penalties * w**2).sum()

    return inner, lambda w, penalties: bce(x_val @ w, y_val)


@pytest.mark.parametrize("steps", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_the_published_losses_of_hypertorchs_notebook(steps: int) -> None:
    inner, outer = hypertorch_notebook()
    penalties = torch.ones(20, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([penalties], lr=1.0, momentum=0.9)
    published = {0: 0.57440, 10: 0.53377, 50: 0.29447, 100: 0.28535}
    for step in range(steps + 1):
        got = hypergrad.unrolled_hypergradient(
            inner, outer, torch.zeros(20, dtype=F64), penalties, num_steps=100,
            optimizer=hypergrad.SGD(lr=0.1), mode="truncated", truncate=10,
        )  # fmt: skip
        if step in published:
            loss = float(outer(got.inner_params, penalties))
            assert loss == pytest.approx(published[step], abs=1e-4)
        penalties.grad = got.grad
        optimizer.step()
        penalties.data.clamp_(min=1e-8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (hypergrad.SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        (
            hypergrad.SGD(lr=0.05, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        ),
        (
            hypergrad.Adam(lr=0.02, betas=(0.7, 0.9), eps=1e-6),
            lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.7, 0.9), eps=1e-6),
        ),
    ],
)
def test_the_steps_are_those_of_torch_optim(ours: Any, theirs: Any) -> None:
    start, y = gaussian(5, seed=1), gaussian(3, seed=2)
    w = start.clone().requires_grad_()
    optimizer = theirs([w])
    for _ in range(12):
        (w.grad,) = torch.autograd.grad(couple(w, y), w)
        optimizer.step()
    got = hypergrad.unrolled_hypergradient(couple, judge, start, y, num_steps=12, optimizer=ours)
    assert relative_error(got.inner_params, w.detach()) <= 1e-13


def test_the_optimisers_settings_are_learned_through_a_function_of_the_outer_parameters() -> None:
    start, y = gaussian(4, seed=1), gaussian(3, seed=2)
    outer = {
        "log_lr": torch.linspace(-3.0, -2.0, 6, dtype=F64),
        "momentum": torch.tensor(0.4, dtype=F64),
    }

    def run(mode: Any, outer: Any, every: int | None = None) -> Any:
        return hypergrad.unrolled_hypergradient(
            lambda w, o: couple(w, y), lambda w, o: judge(w, y), start, outer, num_steps=6,
            optimizer=lambda o: hypergrad.SGD(lr=o["log_lr"].exp(), momentum=o["momentum"]),
            mode=mode, checkpoint_every=every,
        )  # fmt: skip

    reverse, forward = run("reverse", outer), run("forward", outer)
    assert relative_error(flat(reverse.grad), flat(forward.grad)) <= 1e-12
    for i in range(7):
        values, h = [], 1e-6
        for sign in (1, -1):
            moved = flat(outer).clone()
            moved[i] += sign * h
            end = run("reverse", tree_like(outer, moved)).inner_params
            values.append(float(judge(end, y)))
        difference = (values[0] - values[1]) / (2 * h)
        assert float(flat(reverse.grad)[i]) == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_an_initial_point_is_learned_as_the_offset_from_it() -> None:
    inner, star, y = quadratic()
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)
    got = hypergrad.unrolled_hypergradient(
        lambda offset, start: inner(start + offset, y),
        lambda offset, start: (start + offset).sum(),
        torch.zeros(4, dtype=F64), star + 1.0, num_steps=5, optimizer=hypergrad.SGD(lr=0.2),
    )  # fmt: skip
    shrink = torch.linalg.matrix_power(torch.eye(4, dtype=F64) - 0.2 * matrix, 5)
    torch.testing.assert_close(got.grad, shrink @ torch.ones(4, dtype=F64))


def test_each_step_has_its_batch() -> None:
    batches = [gaussian(3, seed=t) for t in range(6)]

    def inner(w: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return 0.5 * ((w - y * batch) ** 2).sum()

    # w_(t+1) = (1 - lr) w_t + lr y b_t.
    weights = [0.3 * 0.7 ** (4 - t) for t in range(5)]
    expected = sum((c * b for c, b in zip(weights, batches, strict=False)), torch.zeros(3).double())
    for mode in ("reverse", "forward"):
        got = hypergrad.unrolled_hypergradient(
            inner, lambda w, y: w.sum(), torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64),
            num_steps=5, optimizer=hypergrad.SGD(lr=0.3), batches=batches, mode=mode,
        )  # fmt: skip
        torch.testing.assert_close(got.grad, expected)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_random_draws_are_replayed_and_the_generator_goes_on(mode: Any) -> None:
    def inner(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((w - y * torch.nn.functional.dropout(torch.ones(50), 0.5)) ** 2).sum()

    def run(mode: Any, every: int | None) -> Tensor:
        torch.manual_seed(7)
        got: Tensor = hypergrad.unrolled_hypergradient(
            inner, lambda w, y: w.sum(), torch.zeros(50), torch.ones(50), num_steps=9,
            optimizer=hypergrad.SGD(lr=0.3), mode=mode, checkpoint_every=every,
        ).grad  # fmt: skip
        return got

    with torch.random.fork_rng():
        whole = run("reverse", 9)
        after = torch.rand(1)
        torch.testing.assert_close(run(mode, None), whole)
        assert torch.equal(torch.rand(1), after)


def test_draws_that_cannot_be_replayed_are_refused() -> None:
    source = generator(0)

    def inner(w: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((w - y * torch.rand(50, generator=source)) ** 2).sum()

    def run(every: int | None) -> Any:
        return hypergrad.unrolled_hypergradient(
            inner, lambda w, y: w.sum(), torch.zeros(50), torch.ones(50), num_steps=9,
            optimizer=hypergrad.SGD(lr=0.3), checkpoint_every=every,
        )  # fmt: skip

    with pytest.raises(hypergrad.LossError, match="came out differently"):
        run(None)
    assert bool(torch.isfinite(run(9).grad).all())


def test_a_parameter_without_gradient_does_not_make_adams_gradient_nan() -> None:
    got = hypergrad.unrolled_hypergradient(
        lambda w, y: 0.5 * ((w[:2] - y) ** 2).sum() + 0.0 * w[2], lambda w, y: (w**2).sum(),
        torch.ones(3, dtype=F64), torch.zeros(2, dtype=F64), num_steps=4,
        optimizer=hypergrad.Adam(lr=0.1),
    )  # fmt: skip
    assert float(got.grad.norm()) > 0
    assert float(got.inner_params[2]) == 1.0


def test_memory_is_that_of_a_segment() -> None:
    # What is alive on the way back, counted by the graph's saved tensors.
    def saved(every: int) -> int:
        alive, most = 0, 0

        class Counted:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor = tensor
                alive += 1
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= 1

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda held: held.tensor):
            hypergrad.unrolled_hypergradient(
                couple, judge, gaussian(4, seed=1), gaussian(3, seed=2), num_steps=100,
                optimizer=hypergrad.SGD(lr=0.05), checkpoint_every=every,
            )  # fmt: skip
        return most

    assert saved(10) < 0.15 * saved(100)


def test_caller_is_untouched_and_nothing_carries_a_graph() -> None:
    start, y = gaussian(4, seed=1).requires_grad_(), gaussian(3, seed=2).requires_grad_()
    before = (start.detach().clone(), y.detach().clone())
    y.grad = torch.ones(3, dtype=F64)
    for mode in ("reverse", "forward"):
        with torch.no_grad():
            got = hypergrad.unrolled_hypergradient(
                couple, judge, start, y, num_steps=4, optimizer=OPTIMIZERS["momentum"], mode=mode
            )
        parts = (got.grad, got.direct, got.implicit, got.inner_params)
        assert not any(t.requires_grad for t in parts)
    assert torch.equal(start, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(y.grad, torch.ones(3, dtype=F64))
    assert start.grad is None


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_unused_outer_leaves_give_zeros_and_are_named(mode: Any) -> None:
    inner, star, y = quadratic()
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]") as caught:
        got = hypergrad.unrolled_hypergradient(
            lambda w, p: inner(w, p["y"]), lambda w, p: w.sum(), star,
            {"y": y, "unused": torch.ones(2, 3, dtype=F64)}, num_steps=3,
            optimizer=hypergrad.SGD(lr=0.1), mode=mode,
        )  # fmt: skip
    assert caught[0].filename == __file__
    assert torch.equal(got.grad["unused"], torch.zeros(2, 3, dtype=F64))
    assert float(got.grad["y"].norm()) > 0


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_steps_without_the_outer_parameters_have_no_implicit_part(mode: Any) -> None:
    with pytest.warns(hypergrad.UnusedParameterWarning, match="the steps on inner_loss"):
        got = hypergrad.unrolled_hypergradient(
            lambda w, y: 0.5 * ((w - 1) ** 2).sum(), lambda w, y: (w * y).sum(), torch.ones(3),
            torch.ones(3), num_steps=2, optimizer=hypergrad.SGD(lr=0.1), mode=mode,
        )  # fmt: skip
    assert got.implicit.tolist() == [0.0] * 3
    assert got.grad.tolist() == [1.0] * 3


def test_a_zero_gradient_of_a_used_leaf_is_no_unused_leaf() -> None:
    # At y = 0 the derivative of y^2 vanishes: nothing to warn of (a warning is an error here).
    got = hypergrad.unrolled_hypergradient(
        lambda w, y: 0.5 * ((w - y["a"] - y["b"] ** 2) ** 2).sum(), lambda w, y: w.sum(),
        torch.zeros(2), {"a": torch.ones(2), "b": torch.zeros(2)}, num_steps=2,
        optimizer=hypergrad.SGD(lr=0.1), mode="forward",
    )  # fmt: skip
    assert got.grad["b"].tolist() == [0.0, 0.0]


class InPlace:
    def init(self, params: Tensor) -> None:
        return None

    def step(self, params: Tensor, state: None, grads: Tensor) -> tuple[Tensor, None]:
        return params.sub_(0.1 * grads), None


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": 0}, "num_steps is 0"),
    ({"num_steps": 2.0}, "num_steps is 2.0"),
    ({"mode": "backward"}, "mode is 'backward'"),
    ({"mode": "truncated"}, "truncate is None"),
    ({"mode": "truncated", "truncate": 6}, "truncate is 6"),
    ({"truncate": 2}, "truncate is 2"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ({"batches": [1, 2]}, "batches"),
    ({"batches": iter([1])}, "batches"),
    ({"optimizer": lambda y: None}, "torch.optim's cannot"),
    ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}, "torch.optim's cannot"),
    ({"optimizer": lambda y: hypergrad.SGD(lr=torch.ones(4))}, "schedule of 4 entries"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    full: dict[str, Any] = {"num_steps": 5, "optimizer": hypergrad.SGD(lr=0.1)} | options
    with pytest.raises(hypergrad.SolverOptionError, match=message):
        hypergrad.unrolled_hypergradient(couple, judge, gaussian(4), gaussian(3), **full)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hypergrad.SGD(lr=0.0),
        lambda: hypergrad.SGD(lr=math.nan),
        lambda: hypergrad.SGD(lr=True),
        lambda: hypergrad.SGD(lr=0.1, momentum=1.0),
        lambda: hypergrad.SGD(lr=torch.ones(2, 2)),
        lambda: hypergrad.Adam(betas=(0.9, 1.0)),
        lambda: hypergrad.Adam(betas=0.9),  # type: ignore[arg-type]
        lambda: hypergrad.Adam(eps=0.0),
    ],
)
def test_a_bad_setting_of_an_optimiser_is_named(make: Callable[[], Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="expected"):
        make()
    with pytest.raises(hypergrad.LeafTypeError, match="dtype"):
        hypergrad.SGD(lr=torch.tensor(1))


def test_a_step_in_place_is_refused_and_the_start_is_kept() -> None:
    start = gaussian(4, seed=1)
    kept = start.clone()
    with pytest.raises((hypergrad.LossError, RuntimeError), match=r"in.place"):
        hypergrad.unrolled_hypergradient(
            couple, judge, start, gaussian(3, seed=2), num_steps=5, optimizer=InPlace(),
        )  # fmt: skip
    assert torch.equal(start, kept)


def test_a_diverging_inner_loop_is_named() -> None:
    with pytest.raises(hypergrad.NonFiniteError, match="inner_loss"):
        hypergrad.unrolled_hypergradient(
            lambda w, y: (w**4).sum() + y @ w, lambda w, y: w.sum(), torch.full((3,), 9.0),
            torch.ones(3), num_steps=30, optimizer=hypergrad.SGD(lr=1.0),
        )  # fmt: skip


def test_a_loss_without_forward_mode_names_the_other_mode() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    with pytest.raises(hypergrad.LossError, match='mode="reverse"'):
        hypergrad.unrolled_hypergradient(
            lambda w, y: 0.5 * Square.apply(w - y).sum(),  # type: ignore[no-untyped-call]
             lambda w, y: w.sum(), torch.zeros(2),
            torch.ones(2), num_steps=2, optimizer=hypergrad.SGD(lr=0.1), mode="forward",
        )  # fmt: skip
