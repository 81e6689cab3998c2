"""Errors in forward mode and under ``vmap``: whose they are is seen by doing without the two."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad.transforms import apply, forward_mode

#: Of the caller's own, in the words that PyTorch's errors about the modes have.
OWN = "batch 3 of the derivatives: the forward pass over vmap'd tangents is not implemented"


class NoForwardRule(torch.autograd.Function):
    """The cube; plain autograd alone knows its derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


class NoSecondWay(NoForwardRule):
    """The cube, with neither a forward rule nor a way back."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("the way back is closed")


def no_forward_rule(w: Tensor) -> Tensor:
    return apply(NoForwardRule, w).sum()


class LooksAtItsTangent(torch.autograd.Function):
    """The cube, with a forward rule whose way depends on a value that vmap hides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * tangent * x**2 if bool(tangent.any()) else torch.zeros_like(x)


def data_dependent(w: Tensor) -> Tensor:
    return apply(LooksAtItsTangent, w).sum()


class Fails:
    """The sum of cubes until ``calls`` calls have been made, then the caller's own error."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.error = RuntimeError(OWN)

    def __call__(self, w: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return (w**3).sum()


def product(loss: Callable[..., Tensor]) -> Any:
    operator = hypergrad.hessian(loss, torch.ones(2), mode="forward_over_reverse")
    return operator @ torch.ones(2)


def unrolled(loss: Callable[..., Tensor]) -> Any:
    return hypergrad.unrolled_hypergradient(
        lambda w, y: loss(w - y), lambda w, y: w.sum(), torch.zeros(2), torch.ones(2),
        num_steps=3, optimizer=hypergrad.SGD(lr=0.01), mode="forward",
    )  # fmt: skip


def gauss_newton(loss: Callable[..., Tensor]) -> Any:
    model = lambda w, x: loss(w) * x  # noqa: E731
    squares = lambda out: (out**2).sum()  # noqa: E731
    return hypergrad.ggn(model, squares, torch.ones(2), torch.ones(3)) @ torch.ones(2)


@pytest.mark.parametrize("compute", [product, unrolled, gauss_newton])
def test_the_callers_own_error_passes_through_unchanged_whatever_it_says(compute: Any) -> None:
    counted = Fails(1000)
    compute(counted)
    used = 1000 - counted.calls
    assert used > 1
    # The last call is in forward mode, and each later one fails too.
    loss = Fails(used - 1)
    with pytest.raises(RuntimeError) as caught:
        compute(loss)
    assert caught.value is loss.error


@pytest.mark.parametrize(
    ("compute", "loss"),
    [
        (product, no_forward_rule),
        (unrolled, no_forward_rule),
        (product, data_dependent),
        (unrolled, data_dependent),
    ],
)
def test_what_reverse_mode_can_is_named_as_the_modes_with_the_remedy(
    compute: Any, loss: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(hypergrad.LossError, match='Use mode="reverse') as caught:
        compute(loss)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_block_whose_way_back_data_dependent_is_named_where_vmap_carries_it() -> None:
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return apply(Looks, grad) if bool((grad < torch.inf).all()) else grad

    operator = hypergrad.hessian(
        lambda w: (apply(Looks, w) ** 2).sum(),
        torch.ones(2),
        mode="reverse_over_reverse",
        chunk_size=2,
    )
    with pytest.raises(hypergrad.LossError, match="Use chunk_size=1"):
        operator.matmat(torch.eye(2))
    torch.testing.assert_close(operator @ torch.ones(2), torch.full((2,), 8.0))


def test_where_reverse_mode_fails_too_the_first_error_is_passed_on() -> None:
    loss = lambda w: apply(NoSecondWay, w).sum()  # noqa: E731
    operator_of = hypergrad.hessian
    with pytest.raises(RuntimeError, match="the way back is closed"):
        operator_of(loss, torch.ones(2))
    with pytest.raises(RuntimeError) as caught:
        unrolled(loss)
    assert not isinstance(caught.value, hypergrad.LossError)


def test_a_second_evaluation_is_made_after_an_error_only_and_warns_of_nothing() -> None:
    made = []

    def without() -> None:
        made.append(1)
        warnings.warn("seen before", stacklevel=1)

    with forward_mode("it", without, remedy="another"):
        pass
    assert not made
    for kind in (torch.OutOfMemoryError, hypergrad.NonFiniteError, ValueError):
        with pytest.raises(kind), forward_mode("it", without, remedy="another"):
            raise kind("none of the mode's")
    assert not made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (
            pytest.raises(hypergrad.LossError, match=r"it has an operation .*Use another"),
            forward_mode("it", without, remedy="another"),
        ):
            raise RuntimeError("no words that tell")
    assert made == [1]


def test_the_second_evaluation_of_steps_draws_the_same_numbers_and_moves_nothing() -> None:
    drawn = []

    def loss(w: Tensor) -> Tensor:
        drawn.append(torch.rand(2).tolist())
        return data_dependent(w)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(hypergrad.LossError):
            unrolled(loss)
        after = torch.get_rng_state()
        # The steps themselves, as far as forward mode gets, and all of them in reverse mode.
        assert len(drawn) > 6
        assert drawn[-3:] == drawn[:3]
        torch.manual_seed(0)
        assert [torch.rand(2).tolist() for _ in range(3)] == drawn[:3]
        torch.testing.assert_close(after, torch.get_rng_state())
