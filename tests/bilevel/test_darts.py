from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from tests.bilevel.test_hypergradient import couple, judge, quadratic
from tests.strategies import F32, F64, flat, gaussian, quick_and_thorough, relative_error, trees


@quick_and_thorough
@given(inner=trees(), outer=trees())
def test_is_one_unrolled_step_to_the_differences_truncation(
    effort: str, inner: Any, outer: Any
) -> None:
    got = hypergrad.darts_hypergradient(couple, judge, inner, outer, step_size=0.1, epsilon=1e-4)
    exact = hypergrad.unrolled_hypergradient(
        couple, judge, inner, outer, num_steps=1, optimizer=hypergrad.SGD(lr=0.1)
    )
    # Truncation epsilon^2 |v| and rounding 1e-16 |g| |v| / epsilon, times the step.
    size = 1.0 + float(flat(exact.grad).norm())
    assert float((flat(got.grad) - flat(exact.grad)).norm()) <= 1e-8 * size
    assert relative_error(flat(got.inner_params), flat(exact.inner_params)) <= 1e-14
    assert got.inner_gradient_norm == pytest.approx(exact.inner_gradient_norm, rel=1e-12)
    torch.testing.assert_close(flat(got.direct), flat(exact.direct))
    assert torch.equal(got.outer_value, judge(got.inner_params, outer).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-4)])
def test_a_quadratic_has_no_truncation_at_any_epsilon(dtype: torch.dtype, tolerance: float) -> None:
    inner, star, y = quadratic()
    expected = 0.3 * torch.ones(4, dtype=F64)  # w' = w - 0.3 (A w - y), and F = sum(w')

    def cast(w: Tensor, y: Tensor) -> Tensor:
        return inner(w.double(), y.double()).to(w.dtype)

    got = hypergrad.darts_hypergradient(
        cast, lambda w, y: w.sum(), star.to(dtype), y.to(dtype), step_size=0.3
    )
    assert relative_error(got.grad, expected) <= tolerance
    assert got.grad.dtype == dtype


def test_a_loss_without_second_derivatives_is_served() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(w, y)
            return 0.5 * ((w - y) ** 2).sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            w, y = ctx.saved_tensors
            return grad * (w - y), grad * (y - w)

    got = hypergrad.darts_hypergradient(
        lambda w, y: Once.apply(w, y),  # type: ignore[no-untyped-call]
        lambda w, y: (w**2).sum(), torch.zeros(3, dtype=F64),
        torch.ones(3, dtype=F64), step_size=0.5,
    )  # fmt: skip
    torch.testing.assert_close(got.grad, torch.full((3,), 0.5, dtype=F64))  # F = sum((y / 2)^2)


def test_parts_that_are_zero_are_named() -> None:
    y = gaussian(3)
    with pytest.warns(hypergrad.UnusedParameterWarning, match="the step on inner_loss"):
        got = hypergrad.darts_hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: (w * y).sum(), gaussian(3, seed=1), y,
            step_size=0.1,
        )  # fmt: skip
    assert torch.equal(got.implicit, torch.zeros(3, dtype=F64))
    with pytest.warns(hypergrad.UnusedParameterWarning, match="outer_loss does not depend"):
        got = hypergrad.darts_hypergradient(
            lambda w, y: ((w - y) ** 2).sum(), lambda w, y: (y**2).sum(), gaussian(3, seed=1), y,
            step_size=0.1,
        )  # fmt: skip
    torch.testing.assert_close(got.grad, 2 * y)
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]"):
        hypergrad.darts_hypergradient(
            lambda w, p: ((w - p["y"]) ** 2).sum(), lambda w, p: (w**2).sum(), gaussian(3, seed=1),
            {"y": y, "unused": y}, step_size=0.1,
        )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"step_size": 0.0}, {"step_size": 0.1, "epsilon": -1.0}, {"step_size": float("nan")}],
)
def test_a_bad_option_is_named(options: Any) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="a finite number > 0"):
        hypergrad.darts_hypergradient(couple, judge, gaussian(2), gaussian(2), **options)


def test_caller_is_untouched() -> None:
    w, y = gaussian(4, seed=1).requires_grad_(), gaussian(3, seed=2).requires_grad_()
    before = w.detach().clone()
    got = hypergrad.darts_hypergradient(couple, judge, w, y, step_size=0.1)
    assert torch.equal(w, before)
    assert w.grad is None
    assert y.grad is None
    assert not any(t.requires_grad for t in (got.grad, got.implicit, got.direct, got.inner_params))
