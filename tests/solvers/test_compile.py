"""A fixed amount of work under torch.compile: one graph, and the eager answer.

The backend runs the captured graph without generating code: no compiler is needed, and what is
tested is the capture.
"""

from __future__ import annotations

import warnings
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


def given(rank: int = 3, seed: int = 4, **options: Any) -> hypergrad.Nystrom:
    """Nyström in its fixed form."""
    omega = gaussian(rank, N, seed=seed)
    return hypergrad.Nystrom(rank, test_matrix=omega, complement="zero", **options)


@pytest.mark.parametrize("policy", ["keep", "absolute", "clip"])
def test_nystrom_with_a_given_test_matrix(policy: Any) -> None:
    dense = matrix() - 0.5 * torch.eye(N, dtype=F64)
    # Three rows and their products span all six dimensions: the answer is exact.
    values, vectors = torch.linalg.eigh(dense)
    values = {"keep": values, "absolute": values.abs(), "clip": values.clamp(min=0.0)}[policy]
    v, damping = v_of(3), 0.7
    expected = vectors @ ((vectors.T @ v) / (values + damping))
    solver = given(negative_curvature=policy)
    assert_same(lambda v: hypergrad.solve(dense, v, solver, damping=damping).value, v)
    x = hypergrad.solve(dense, v, solver, damping=damping).value
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


def test_nystrom_made_inside_the_graph_with_float32_products() -> None:
    dense, omega = matrix(F32), gaussian(2, N).to(F32)

    def ihvp(v: Tensor, x0: Tensor, omega: Tensor) -> Any:
        solver = hypergrad.Nystrom(2, test_matrix=omega, complement="zero")
        solution = hypergrad.solve(dense, v, solver, damping=0.1, x0=x0)
        return solution.value, torch.as_tensor(solution.info.relative_residual, dtype=F64)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.ConvergenceWarning)  # rank 2 is coarse here
        assert_same(ihvp, v_of(3).to(F32), v_of(5).to(F32), omega, tolerance=1e-5)


def test_the_fixed_form_is_as_accurate_as_its_products() -> None:
    n, rank, damping = 60, 20, 1e-3
    q = torch.linalg.qr(gaussian(n, rank, seed=7))[0]
    dense = (q * torch.logspace(0, -3, rank, dtype=F64)) @ q.T
    dense = (0.5 * (dense + dense.T)).to(F32)
    v = dense @ gaussian(n, seed=8).to(F32)  # in the range, where the answer is not v/damping
    solver = hypergrad.Nystrom(rank, test_matrix=gaussian(rank, n), complement="zero")
    solution = hypergrad.solve(dense, v, solver, damping=damping)
    exact = torch.linalg.solve(dense.to(F64) + damping * torch.eye(n, dtype=F64), v.to(F64))
    # Rounding of the products over the damping: 1e-7/1e-3, a few times.
    assert float((solution.value - exact).norm() / exact.norm()) < 1e-3
    assert solution.info.num_hvps == 2 * rank + 1


def test_the_fixed_form_sees_what_the_test_matrix_alone_does_not() -> None:
    """[[0, B], [B', 0]] and rows of one block: the range of the products has zero curvature."""
    b = gaussian(3, 3, seed=2)
    zero = torch.zeros(3, 3, dtype=F64)
    dense = torch.cat([torch.cat([zero, b], 1), torch.cat([b.T, zero], 1)])
    solver = hypergrad.Nystrom(3, test_matrix=torch.eye(3, 6, dtype=F64), complement="zero")
    damping = 2.0 * float(torch.linalg.matrix_norm(b, ord=2))
    solution = hypergrad.solve(dense, v_of(1), solver, damping=damping)
    assert solution.info.relative_residual < 1e-12
    assert solution.info.smallest_eigenvalue == pytest.approx(-damping / 2)


def test_the_fixed_form_is_differentiable_and_reuses_its_sketch() -> None:
    dense, v = matrix().requires_grad_(), v_of(3).requires_grad_()
    solution = hypergrad.solve(dense, v, given(), damping=0.1)
    solution.value.sum().backward()
    inverse = torch.linalg.inv(dense.detach() + 0.1 * torch.eye(N, dtype=F64))
    torch.testing.assert_close(v.grad, inverse.sum(0), rtol=1e-10, atol=1e-10)
    assert solution.backward[0].num_hvps == 1  # the check of its residual


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_matrix": torch.ones(2, 3)}, r"test_matrix is \(2, 3\), expected .* 3 \(the rank\)"),
        ({"test_matrix": torch.ones(3, N, dtype=torch.long)}, "expected floating-point"),
        ({"complement": "quadrature"}, "complement is 'quadrature', expected 'zero' where"),
        ({"sketch": "columns"}, "sketch is 'columns', expected 'gaussian' where"),
        ({"generator": torch.Generator()}, "generator is .* expected None where"),
    ],
)
def test_bad_options_of_the_fixed_form(options: dict[str, Any], message: str) -> None:
    good = {"test_matrix": torch.ones(3, N), "complement": "zero"}
    with pytest.raises(hypergrad.SolverOptionError, match=message):
        hypergrad.Nystrom(3, **{**good, **options})


def test_bad_test_matrices_and_operators_are_named() -> None:
    dense, v = matrix(), v_of(3)
    for omega, message in (
        (gaussian(2, N - 1), "but v has 6 entries"),
        (torch.ones(2, N, dtype=F64), "dependent rows: 1 of its 2"),
    ):
        solver = hypergrad.Nystrom(2, test_matrix=omega, complement="zero")
        with pytest.raises(hypergrad.SolverOptionError, match=message):
            hypergrad.solve(dense, v, solver, damping=0.1)
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(gaussian(N, N), v, given(), damping=0.1)
    with pytest.raises(hypergrad.NegativeCurvatureError, match=r"smallest Ritz value -1\."):
        hypergrad.solve(-dense, v, given(negative_curvature="raise"), damping=0.1)


def test_nystrom_that_decides_on_values_is_refused() -> None:
    dense, v = matrix(), v_of(3)
    for solver, damping, message in (
        (hypergrad.Nystrom(3), 0.1, "Draw one outside the compiled function and pass it"),
        (given(), None, "look at values"),
        (given(negative_curvature="raise"), 0.1, "look at values"),
    ):
        with pytest.raises(Exception, match=message):
            one_graph(lambda v, s=solver, d=damping: hypergrad.solve(dense, v, s, damping=d).value)(
                v
            )


def test_what_cannot_be_compiled_is_refused() -> None:
    dense, v = matrix(), v_of(3)
    with pytest.raises(Exception, match="decides on values as it goes"):
        one_graph(lambda v: hypergrad.solve(dense, v, hypergrad.CG()).value)(v)
    with pytest.raises(Exception, match="a compiled solve has no derivative"):
        one_graph(lambda v: hypergrad.solve(dense, v, BRIEF).value)(v.requires_grad_())
