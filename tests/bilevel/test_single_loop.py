"""Single steps of the single-loop methods: against their equations, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from tests.bilevel.steppers import METHODS, W, Y, batches, every_method, inner_loss, outer_loss
from tests.strategies import F64, flat, gaussian, seeds, tree_like, trees


class Dense:
    """Derivatives by torch.func on flat vectors, whole matrices."""

    def __init__(self, w: Any, y: Any) -> None:
        self.g = lambda x, z, *b: inner_loss(tree_like(w, x), tree_like(y, z), *b)
        self.f = lambda x, z, *b: outer_loss(tree_like(w, x), tree_like(y, z), *b)

    def gradients(self, loss: Callable[..., Tensor], x: Tensor, z: Tensor, b: Any) -> Any:
        return torch.func.grad(loss, argnums=(0, 1))(x, z, *b)

    def hessian(self, x: Tensor, z: Tensor, b: Any) -> Tensor:
        return torch.func.hessian(self.g)(x, z, *b)

    def cross(self, x: Tensor, z: Tensor, b: Any) -> Tensor:
        """d2 g / dy dw, shape (outer, inner)."""
        return torch.func.jacrev(torch.func.grad(self.g, argnums=1))(x, z, *b)


def dense_soba(at: Dense, x: Tensor, z: Tensor, v: Tensor, inner: Any, outer: Any) -> Any:
    fx, fz = at.gradients(at.f, x, z, outer[0])
    direction = fz - at.cross(x, z, inner[0]) @ v
    return (
        x - 0.3 * at.gradients(at.g, x, z, inner[0])[0],
        v - 0.2 * (at.hessian(x, z, inner[0]) @ v - fx),
        z - 0.1 * direction,
    )


def dense_amigo(at: Dense, x: Tensor, z: Tensor, v: Tensor, inner: Any, outer: Any) -> Any:
    for b in inner[:3]:
        x = x - 0.3 * at.gradients(at.g, x, z, b)[0]
    fx, fz = at.gradients(at.f, x, z, outer[0])
    for b in inner[3:5]:
        v = v - 0.2 * (at.hessian(x, z, b) @ v - fx)
    return x, v, z - 0.1 * (fz - at.cross(x, z, inner[5]) @ v)


def dense_stocbio(at: Dense, x: Tensor, z: Tensor, v: Tensor, inner: Any, outer: Any) -> Any:
    for b in inner[:3]:
        x = x - 0.3 * at.gradients(at.g, x, z, b)[0]
    fx, fz = at.gradients(at.f, x, z, outer[0])
    eye = torch.eye(len(x), dtype=F64)
    first = (eye - 0.2 * at.hessian(x, z, inner[3])) @ fx
    second = (eye - 0.2 * at.hessian(x, z, inner[4])) @ first
    v = 0.2 * (fx + first + second)
    return x, v, z - 0.1 * (fz - at.cross(x, z, inner[5]) @ v)


def dense_f2sa(at: Dense, x: Tensor, z: Tensor, v: Tensor, inner: Any, outer: Any) -> Any:
    u, multiplier = x, 3.0
    for i in range(2):
        pull = at.gradients(at.f, u, z, outer[i])[0]
        pull = pull + multiplier * at.gradients(at.g, u, z, inner[2 * i + 1])[0]
        x, u = x - 0.3 * at.gradients(at.g, x, z, inner[2 * i])[0], u - 0.05 * pull
    gap = at.gradients(at.g, u, z, inner[5])[1] - at.gradients(at.g, x, z, inner[4])[1]
    return x, u, z - 0.1 * (at.gradients(at.f, u, z, outer[2])[1] + multiplier * gap)


DENSE = {
    "SOBA": dense_soba, "SABA": dense_soba, "AmIGO": dense_amigo, "StocBiO": dense_stocbio,
    "F2SA": dense_f2sa,
}  # fmt: skip


def start(name: str, w: Any, y: Any, v: Any = None) -> hypergrad.SingleLoopState:
    return METHODS[name].init(w, y, ihvp=None if name == "F2SA" else v)


def check_step(name: str, w: Any, y: Any, seed: int) -> None:
    method, v = METHODS[name], gaussian(len(flat(w)), seed=seed)
    state = start(name, w, y, tree_like(w, v))
    inner, outer = batches(method.num_inner_batches, 10), batches(method.num_outer_batches, 50)
    got = method.step(state, inner, outer)
    expected = DENSE[name](Dense(w, y), flat(w), flat(y), v, inner, outer)
    auxiliary = got.vectors["penalised"] if name == "F2SA" else flat(got.ihvp)
    # The same few operations in another order: a hundred eps of the sizes that occur.
    for mine, reference in zip(
        (flat(got.inner_params), auxiliary, flat(got.outer_params)), expected, strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    taken = (flat(state.outer_params) - flat(got.outer_params)) / 0.1
    torch.testing.assert_close(flat(got.outer_direction), taken, rtol=1e-12, atol=1e-12)


@every_method
@pytest.mark.parametrize(
    ("w", "y"), [(W, Y), ({"b": [W[:2], W[2]], "a": (W.reshape(2, 2),)}, [Y[0], {"z": Y[1:]}])]
)
def test_a_step_is_that_of_the_equations(name: str, w: Any, y: Any) -> None:
    check_step(name, w, y, seed=7)


@pytest.mark.slow
@every_method
@given(w=trees(), y=trees(), seed=seeds)
def test_a_step_is_that_of_the_equations_on_any_trees(name: str, w: Any, y: Any, seed: int) -> None:
    check_step(name, w, y, seed)


def solution(w: Tensor, y: Tensor) -> tuple[Tensor, hypergrad.Hypergradient]:
    for _ in range(30):
        gradient = torch.func.grad(inner_loss)(w, y)
        w = w - torch.linalg.solve(torch.func.hessian(inner_loss)(w, y), gradient)
    return w, hypergrad.hypergradient(inner_loss, outer_loss, w, y, solver=hypergrad.Exact())


@pytest.mark.parametrize("name", ["SOBA", "SABA", "AmIGO"])
def test_at_the_inner_solution_the_direction_is_the_hypergradient(name: str) -> None:
    w, exact = solution(W, Y)
    state = METHODS[name].step(start(name, w, Y, exact.ihvp))
    torch.testing.assert_close(state.outer_direction, exact.grad, rtol=1e-12, atol=1e-13)
    # Neither w nor v has anywhere to go.
    torch.testing.assert_close(state.inner_params, w, rtol=0, atol=1e-13)
    torch.testing.assert_close(state.ihvp, exact.ihvp, rtol=0, atol=1e-12)


def test_the_neumann_series_of_stocbio_has_the_bias_it_states() -> None:
    w, exact = solution(W, Y)
    hess = torch.func.hessian(inner_loss)(w, Y)
    left = torch.linalg.matrix_power(torch.eye(4, dtype=F64) - 0.2 * hess, 3)  # Q + 1, Q = 2
    state = METHODS["StocBiO"].step(start("StocBiO", w, Y))
    torch.testing.assert_close(exact.ihvp - state.ihvp, left @ exact.ihvp, rtol=0, atol=1e-12)


def test_the_bias_of_f2sa_falls_as_one_over_the_multiplier() -> None:
    w, exact = solution(W, Y)
    errors = []
    for multiplier in (1e3, 2e3, 4e3):
        method = hypergrad.F2SA(
            inner_loss, outer_loss, inner_lr=0.3, penalty_lr=0.3 / multiplier, outer_lr=0.0,
            multiplier=multiplier, inner_steps=100,
        )  # fmt: skip
        state = method.step(method.init(w, Y))
        errors.append(float((state.outer_direction - exact.grad).norm()))
    assert errors[0] < 1e-2
    # Halved by each doubling, up to the next order, 1e-3.
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=1e-2)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=1e-2)


def test_the_default_multiplier_balances_both_inner_variables() -> None:
    rates: dict[str, Any] = {"inner_lr": 0.3, "outer_lr": 0.1, "penalty_lr": 0.05}
    given = hypergrad.F2SA(inner_loss, outer_loss, multiplier=3.0, **rates)
    default = hypergrad.F2SA(inner_loss, outer_loss, **rates)
    left, right = given.step(given.init(W, Y)), default.step(default.init(W, Y))
    # 0.3 / (2 * 0.05) rounds, and the steps carry it on.
    torch.testing.assert_close(left.outer_params, right.outer_params, rtol=1e-13, atol=1e-14)


def test_shared_batches_take_the_noise_out_of_the_gap() -> None:
    apart = replace(METHODS["F2SA"], outer_lr=0.0)
    together = replace(apart, shared_batches=True)  # type: ignore[call-arg]
    assert (apart.num_inner_batches, together.num_inner_batches) == (6, 3)
    spreads = []
    for method in (apart, together):
        seen = [
            method.step(
                method.init(W, Y),
                batches(method.num_inner_batches, 100 * i),
                batches(method.num_outer_batches, 100 * i + 50),
            ).outer_direction
            for i in range(20)
        ]
        spreads.append(float(torch.stack(seen).std(dim=0).norm()))
    assert spreads[1] < 0.7 * spreads[0]


def test_saba_is_unbiased_whatever_it_remembers() -> None:
    blocks, outer_blocks = batches(3, 20), batches(2, 60)
    method = hypergrad.SABA(
        inner_loss, outer_loss, num_inner_blocks=3, num_outer_blocks=2, inner_lr=0.1, outer_lr=0.1
    )

    def step(state: hypergrad.SingleLoopState, i: int, j: int) -> hypergrad.SingleLoopState:
        return method.step(state, [blocks[i]], [outer_blocks[j]], inner_index=i, outer_index=j)

    state = method.init(W, Y, ihvp=gaussian(4, seed=5))
    for i, j in ((0, 0), (2, 1), (0, 1)):  # a memory of different ages, one block never seen
        state = step(state, i, j)
    everywhere = [step(state.clone(), i, j) for i in range(3) for j in range(2)]
    mean = torch.stack([one.outer_direction for one in everywhere]).mean(0)

    whole = hypergrad.SOBA(
        lambda w, y: sum((inner_loss(w, y, *b) for b in blocks), torch.zeros((), dtype=F64)) / 3,
        lambda w, y: (
            sum((outer_loss(w, y, *b) for b in outer_blocks), torch.zeros((), dtype=F64)) / 2
        ),
        inner_lr=0.1,
        outer_lr=0.1,
    )
    full = whole.step(whole.init(state.inner_params, state.outer_params, ihvp=state.ihvp))
    torch.testing.assert_close(mean, full.outer_direction, rtol=1e-12, atol=1e-12)
    means = {name: torch.stack([one.vectors[name] for one in everywhere]).mean(0)
             for name in ("inner", "ihvp")}  # fmt: skip
    torch.testing.assert_close(means["inner"], full.vectors["inner"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(means["ihvp"], full.vectors["ihvp"], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ what a step costs


@every_method
def test_the_counts_are_the_derivatives_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    passes: list[str] = []

    def counting(loss: Callable[..., Tensor], letter: str) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            calls.append(letter)
            return loss(*args)

        return counted

    counted = replace(
        METHODS[name],
        inner_loss=counting(inner_loss, "g"),
        outer_loss=counting(outer_loss, "f"),
    )
    true_pass = vars(torch.autograd)["_engine_run_backward"]

    def one_pass(outputs: Any, directions: Any, *args: Any, **kwargs: Any) -> Any:
        # Losses are scalars; a product's direction is a vector.
        passes.append("second" if any(x.dim() for x in directions) else "first")
        return true_pass(outputs, directions, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", one_pass)
    state = counted.step(counted.init(W, Y))
    state = counted.step(state)
    # One forward pass for each gradient, and one backward pass for each product: nothing else.
    assert state.num_gradients == len(calls) == passes.count("first")
    assert state.num_hvps == passes.count("second")
    inner, outer, products = {
        "SOBA": (1, 1, 1), "SABA": (1, 1, 1), "AmIGO": (6, 1, 3), "StocBiO": (6, 1, 3),
        "F2SA": (6, 3, 0),
    }[name]  # fmt: skip
    assert (calls.count("g"), calls.count("f")) == (2 * inner, 2 * outer)
    assert state.num_hvps == 2 * products


@every_method
def test_a_step_draws_as_many_batches_as_it_says(name: str) -> None:
    method = METHODS[name]

    def stream(drawn: list[int]) -> Iterator[Any]:
        while True:
            drawn.append(1)
            yield 0.5 * torch.ones((), dtype=F64), torch.ones((), dtype=F64)

    inner, outer = [], []  # type: ignore[var-annotated]
    inner_stream, outer_stream = stream(inner), stream(outer)
    state = method.init(W, Y)
    for _ in range(2):
        state = method.step(state, inner_stream, outer_stream)
    assert (len(inner), len(outer)) == (2 * method.num_inner_batches, 2 * method.num_outer_batches)


# ------------------------------------------------------------------------- what a step leaves alone


@every_method
def test_nothing_of_the_caller_is_changed(name: str) -> None:
    w: Any = {"a": W.clone().requires_grad_(), "b": [W[:1].clone()]}
    y = (Y.clone(),)
    before = [leaf.detach().clone() for leaf in (w["a"], w["b"][0], y[0])]
    method = METHODS[name]
    first = method.init(w, y)
    saved = {key: value.clone() for key, value in first.vectors.items()}
    with torch.no_grad():  # derivatives are taken all the same
        second = method.step(first)
    second.inner_params["a"].zero_()  # a copy, not the state's own
    second.outer_params[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (w["a"], w["b"][0], y[0]), strict=True))
    assert w["a"].grad is None
    assert w["a"].requires_grad
    assert not second.inner_params["a"].requires_grad
    for key, value in first.vectors.items():
        assert torch.equal(value, saved[key]), key
    assert float(flat(second.inner_params).abs().max()) > 0
    with pytest.raises(FrozenInstanceError):
        second.step = 0  # type: ignore[misc]


def test_a_loss_that_works_in_place_on_a_parameter_raises() -> None:
    method = replace(METHODS["SOBA"], inner_loss=lambda w, y: inner_loss(w, y.mul_(2.0)))
    state = method.init(W, Y)
    with pytest.raises(RuntimeError, match="in-place"):
        method.step(state)
    assert torch.equal(state.outer_params, Y)


@every_method
def test_the_global_random_state_is_not_touched(name: str) -> None:
    before = torch.get_rng_state()
    METHODS[name].step(METHODS[name].init(W, Y))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------- precision


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept_and_small_steps_count(name: str, dtype: torch.dtype) -> None:
    def pull(w: Tensor, y: Tensor) -> Tensor:
        assert w.dtype == y.dtype == dtype  # the losses see the caller's dtype
        return 0.5 * ((w - y) ** 2).sum()

    method = replace(METHODS[name], inner_loss=pull, outer_loss=pull, inner_lr=1e-3, outer_lr=0.0)
    state = method.init(torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype))
    for _ in range(100):
        state = method.step(state)
    # A step of 1e-3 is below half of bfloat16's spacing at one: rounded to it, w would not move.
    steps = 100 * {"SOBA": 1, "SABA": 1, "AmIGO": 3, "StocBiO": 3, "F2SA": 2}[name]
    assert state.inner_params.dtype == state.outer_params.dtype == dtype
    expected = (1 - 1e-3) ** steps
    assert float(state.inner_params[0]) == pytest.approx(expected, rel=1e-2)


def test_leaves_of_different_dtypes() -> None:
    w = {"a": W.float(), "b": W.clone()}
    state = METHODS["SOBA"].step(METHODS["SOBA"].init(w, Y))
    assert {key: leaf.dtype for key, leaf in state.inner_params.items()} == {
        "a": torch.float32, "b": F64,
    }  # fmt: skip
