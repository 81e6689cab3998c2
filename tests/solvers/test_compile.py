"""A fixed amount of work under torch.compile: one graph, and the eager answer.

The backend runs the captured graph without generating code: no compiler is needed, and what is
tested is the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

import hypergrad
from hypergrad import Status
from tests.strategies import F32, F64, SPECTRA, gaussian, symmetric

FIXED = hypergrad.CG(rtol=0.0, max_iters=10)
#: Enough to see a graph break or a wrong product; tracing takes its time for each iteration.
BRIEF = hypergrad.CG(rtol=0.0, max_iters=2)
N = 6


def one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same(function: Callable[..., Any], *inputs: Any, tolerance: float = 1e-12) -> None:
    got, expected = one_graph(function)(*inputs), function(*inputs)
    assert torch_pytree.tree_structure(got) == torch_pytree.tree_structure(expected)
    pairs = zip(torch_pytree.tree_leaves(got), torch_pytree.tree_leaves(expected), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def matrix(dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA["inverse"](N), seed=1).matrix.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "size", "solver"), [(F64, 1.0, FIXED), (F32, 1e-20, BRIEF), (F32, 1e15, BRIEF)]
)
def test_a_dense_operator(dtype: torch.dtype, size: float, solver: hypergrad.Solver) -> None:
    operator = hypergrad.as_operator(matrix(dtype))
    v = size * gaussian(N).to(dtype)
    # Ten iterations at condition 6 end at the rounding of the products, times the condition.
    assert_same(
        lambda v: hypergrad.solve(operator, v, solver).value / size,
        v,
        tolerance=100 * torch.finfo(dtype).eps,
    )


def test_trees_batches_warm_starts_and_damping() -> None:
    like = {"w": torch.zeros(2, 2, dtype=F64), "b": [torch.zeros(1, dtype=F64), gaussian(1)]}
    operator = hypergrad.as_operator(matrix(), like=like)
    v = {"w": gaussian(2, 2), "b": [gaussian(1, seed=1), gaussian(1, seed=2)]}
    assert_same(lambda v: hypergrad.solve(operator, v, BRIEF, damping=0.1).value, v)
    assert_same(lambda v, x0: hypergrad.solve(operator, v, BRIEF, x0=x0).value, v, like)
    dense, rows = matrix(), gaussian(3, N)
    assert_same(lambda v: hypergrad.solve(dense, v, BRIEF, batched=True).value, rows)


@pytest.mark.parametrize(
    ("mode", "where"),
    [
        ("auto", "outside"),
        pytest.param("auto", "inside", marks=pytest.mark.slow),
        pytest.param("forward_over_reverse", "outside", marks=pytest.mark.slow),
        pytest.param("forward_over_reverse", "inside", marks=pytest.mark.slow),
    ],
)
def test_a_hessian(mode: Any, where: str) -> None:
    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.cosh(x @ p["w"]).sum() + (p["w"] ** 4).sum() + p["b"] ** 2

    params = {"w": gaussian(N), "b": torch.tensor(1.0, dtype=F64)}
    v = {"w": gaussian(N, seed=2), "b": torch.tensor(2.0, dtype=F64)}
    x = gaussian(8, N, seed=3)
    if where == "outside":
        operator = hypergrad.hessian(loss, params, x, mode=mode)
        assert_same(lambda v: hypergrad.solve(operator, v, BRIEF).value, v, tolerance=1e-10)
    else:
        assert_same(
            lambda p, x, v: (
                hypergrad.solve(hypergrad.hessian(loss, p, x, mode=mode), v, BRIEF).value
            ),
            params,
            x,
            v,
            tolerance=1e-10,
        )


@pytest.mark.slow
def test_a_gauss_newton_operator() -> None:
    def of_ggn(p: Tensor, x: Tensor, v: Tensor) -> Any:
        curvature = hypergrad.ggn(lambda p, x: x @ p, lambda out: (out**4).sum(), p, x)
        return hypergrad.solve(curvature, v, BRIEF, damping=0.1).value

    assert_same(of_ggn, gaussian(N), gaussian(8, N), gaussian(N, seed=1), tolerance=1e-9)


def test_a_callable() -> None:
    dense = matrix()
    assert_same(lambda v: hypergrad.cg_ihvp(lambda u: dense @ u, v, rtol=0, max_iters=2), v_of(1))


def v_of(seed: int) -> Tensor:
    return gaussian(N, seed=seed)


def test_the_report_holds_tensors() -> None:
    dense, v = matrix(), v_of(3)
    few = hypergrad.CG(rtol=0.0, max_iters=2)
    info = one_graph(lambda v: hypergrad.solve(dense, v, few).info)(v)
    expected = hypergrad.solve(dense, v, few).info
    assert info.status is Status.FIXED_ITERATIONS
    assert isinstance(info.relative_residual, Tensor)
    assert float(info.relative_residual) == pytest.approx(expected.relative_residual)
    assert float(info.residual_norm) == pytest.approx(expected.residual_norm)
    assert info.iterations == 2
    assert info.num_hvps == expected.num_hvps


def test_what_cannot_be_compiled_is_refused() -> None:
    dense, v = matrix(), v_of(3)
    with pytest.raises(Exception, match="decides on values as it goes"):
        one_graph(lambda v: hypergrad.solve(dense, v, hypergrad.CG()).value)(v)
    with pytest.raises(Exception, match="a compiled solve has no derivative"):
        one_graph(lambda v: hypergrad.solve(dense, v, BRIEF).value)(v.requires_grad_())
