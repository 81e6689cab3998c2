from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import check_symmetric
from tests.strategies import F32, F64, INDEFINITE, gaussian, generator, symmetric


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_rounding_passes_and_more_does_not(dtype: torch.dtype, scale: float) -> None:
    matrix = symmetric(INDEFINITE["alternating"](12), scale=scale).matrix.to(dtype)
    eps = torch.finfo(dtype).eps
    seen = check_symmetric(matrix)
    assert 0.0 <= seen <= 4 * eps
    skew = torch.zeros_like(matrix)
    skew[0, 1:] = 2 * eps**0.5 * 12 * matrix.abs().max()
    with pytest.raises(hypergrad.NotSymmetricError, match="v'A w and w'A v differ by"):
        check_symmetric(matrix + skew)
    assert check_symmetric(matrix + skew, rtol=1.0) > seen


def test_draws_and_options() -> None:
    matrix = symmetric(INDEFINITE["alternating"](5)).matrix
    figures = [check_symmetric(matrix, generator=generator(seed)) for seed in (1, 1, 2)]
    assert figures[0] == figures[1] != figures[2]
    assert check_symmetric(torch.zeros(3, 3)) == 0.0
    for options in ({"num_pairs": 0}, {"num_pairs": True}, {"rtol": -1.0}, {"rtol": float("nan")}):
        with pytest.raises(hypergrad.SolverOptionError, match=next(iter(options))):
            check_symmetric(matrix, **options)
    with pytest.raises(hypergrad.NonFiniteError, match="a product holds nan"):
        check_symmetric(torch.full((2, 2), torch.nan))
    with pytest.raises(hypergrad.NonFiniteError, match="overflow"):
        check_symmetric(lambda v: 1e308 * v, torch.ones(2, dtype=F64))


def test_what_differs_from_call_to_call_is_found() -> None:
    source = generator(0)
    like = torch.ones(6, dtype=F64)

    def fresh(v: Tensor) -> Tensor:
        return v * torch.rand(6, generator=source, dtype=F64)

    with pytest.raises(hypergrad.NotSymmetricError, match="from call to call"):
        check_symmetric(fresh, like)
    parts = [torch.diag(gaussian(6, seed=seed)) for seed in range(8)]
    with pytest.raises(hypergrad.NotSymmetricError):
        check_symmetric(hypergrad.SampledOperator(parts, generator=generator(1)))


def test_a_backward_pass_that_cannot_be_differentiated_is_found() -> None:
    class Opaque(torch.autograd.Function):
        """As kernels from outside are: the backward pass computes numbers without a graph."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.no_grad():
                return 3 * grad * ctx.saved_tensors[0] ** 2

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden: Tensor = Opaque.apply(x @ p["a"])  # type: ignore[no-untyped-call]
        return (hidden @ p["b"]).square().mean()

    params = {"a": gaussian(3, 4), "b": gaussian(4)}
    operator = hypergrad.hessian(loss, params, gaussian(5, 3))
    with pytest.raises(hypergrad.NotSymmetricError, match="custom autograd Function"):
        check_symmetric(operator)
    good = hypergrad.hessian(
        lambda p, x: ((x @ p["a"]) ** 3 @ p["b"]).square().mean(), params, gaussian(5, 3)
    )
    assert check_symmetric(good) <= 1e-13


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F64, 1e-200), (F64, 1e307), (torch.bfloat16, 1e-25), (torch.bfloat16, 1e37)],
)
def test_asymmetry_does_not_hide_at_the_ends_of_the_range(dtype: torch.dtype, scale: float) -> None:
    one_way = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=dtype) * scale
    assert check_symmetric(0.5 * (one_way + one_way.T)) <= 4 * torch.finfo(dtype).eps
    with pytest.raises(hypergrad.NotSymmetricError, match="v'A w and w'A v differ by"):
        check_symmetric(one_way)


def test_few_digits_below_the_normal_numbers_are_no_asymmetry() -> None:
    matrix = gaussian(6, 6) * 1e-320
    assert 1e-8 < check_symmetric(matrix + matrix.T) < 1e-2
    with pytest.raises(hypergrad.NotSymmetricError, match="v'A w and w'A v differ by"):
        check_symmetric(matrix)
