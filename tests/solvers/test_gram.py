from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Gram, Status
from hypergrad.operators.root import RootOperator
from hypergrad.solvers import memory
from tests.operators import networks
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    dense_solve,
    flat,
    gaussian,
    orthogonal,
    quick_and_thorough,
    relative_error,
    right_hand_scales,
    seeds,
    tree_like,
)


def rows_of(k: int, n: int, singular: Tensor, seed: int = 0) -> Tensor:
    """A factor (k, n) of these singular values."""
    rank = len(singular)
    left, right = orthogonal(k, seed)[:, :rank], orthogonal(n, seed + 1)[:, :rank]
    return (left * singular) @ right.T


#: Singular values by rank.
FALLS = {
    "flat": lambda r: torch.ones(r, dtype=F64),
    "steep": lambda r: torch.logspace(0, -4, r, dtype=F64),
    "one": lambda r: torch.ones(1, dtype=F64),
    "half": lambda r: torch.logspace(0, -1, max(r // 2, 1), dtype=F64),
}


@quick_and_thorough
@given(
    k=st.integers(1, 8),
    n=st.integers(1, 20),
    fall=st.sampled_from(sorted(FALLS)),
    relative=st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2, 1.0]),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    size=right_hand_scales,
    seed=seeds,
)
def test_it_is_as_good_as_the_dense_solution_at_any_damping(
    effort: str, k: int, n: int, fall: str, relative: float, scale: float, size: float, seed: int
) -> None:
    rows = scale * rows_of(k, n, FALLS[fall](min(k, n)), seed)
    v = size * gaussian(n, seed=seed)
    damping = relative * scale**2
    matrix = rows.T @ rows
    solution = hypergrad.solve(hypergrad.root_operator(rows), v, Gram(), damping=damping)
    # A backward stable solve: a residual of a few roundings of |A| |x|, an error of eps / relative.
    eps, gain = torch.finfo(F64).eps, float(solution.value.norm() / v.norm()) * scale**2
    assert solution.info.relative_residual <= 20 * n * eps * (1 + gain)
    expected = dense_solve(matrix, v / size, damping)
    assert relative_error(solution.value / size, expected) <= 20 * n * eps / relative
    assert solution.info.converged
    assert solution.info.num_hvps == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("name", ["mlp, classes", "mlp, squared", "transformer, positions"])
def test_gauss_newton_of_networks(name: str, relative: float, dtype: torch.dtype) -> None:
    made = networks.case(name, dtype)
    op = hypergrad.ggn(made.model_fn, made.loss_fn, made.params, made.inputs, made.targets)
    rows = op._factor().to(F64)
    matrix = rows.T @ rows
    damping = relative * float(torch.linalg.eigvalsh(matrix)[-1])
    v = gaussian(op.shape[0], seed=4).to(dtype)
    tree = tree_like(made.params, v)
    solution = hypergrad.solve(op, tree, Gram(), damping=damping, on_failure="ignore")
    expected = dense_solve(matrix, v, damping)
    # Sums in float64, so that a float32 answer is right to its own rounding whatever the damping.
    error = relative_error(flat(solution.value), expected)
    assert error <= (1e-6 if dtype == F32 else 1e-15 / relative + 1e-13)
    assert solution.info.converged or dtype == F32
    assert solution.info.status in (Status.CONVERGED, Status.STAGNATED)


def test_a_dense_solve_agrees_for_fisher_matrices_and_sums() -> None:
    made = networks.case("mlp, classes")
    batch = (made.model_fn, made.loss_fn, made.params, made.inputs, made.targets)
    curvature, scores = hypergrad.ggn(*batch), hypergrad.empirical_fisher(*batch)
    for op in (curvature, scores, 3.0 * scores, curvature + 0.5 * scores, (2 * scores + 0.1) / 2):
        v = tree_like(made.params, gaussian(op.shape[0], seed=4))
        exact = hypergrad.solve(op, v, hypergrad.Exact(), damping=0.01).value
        got = hypergrad.solve(op, v, Gram(), damping=0.01)
        assert relative_error(flat(got.value), flat(exact)) <= 1e-11
        assert got.info.converged


def test_without_damping_it_is_the_least_squares_solution_of_smallest_norm() -> None:
    rows = rows_of(6, 15, torch.logspace(0, -2, 4, dtype=F64))
    op, matrix = hypergrad.root_operator(rows), rows.T @ rows
    inside = matrix @ gaussian(15)
    solution = hypergrad.solve(op, inside, Gram())
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ inside
    assert solution.info.status is Status.CONVERGED
    assert relative_error(solution.value, expected) <= 1e-10
    with pytest.warns(hypergrad.ConvergenceWarning, match="Gram"):
        outside = hypergrad.solve(op, gaussian(15), Gram())
    assert outside.info.status is Status.STAGNATED
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ gaussian(15)
    assert relative_error(outside.value, expected) <= 1e-10


def test_many_right_hand_sides_are_those_one_by_one_with_one_factor() -> None:
    op = Counting(rows_of(5, 12, torch.ones(5, dtype=F64)))
    v = gaussian(4, 12)
    batch = hypergrad.solve(op, v, Gram(), damping=0.1, batched=True)
    assert op.factors == 1
    assert batch.info.num_hvps == 4
    for i in range(4):
        one = hypergrad.solve(op, v[i], Gram(), damping=0.1)
        torch.testing.assert_close(batch.value[i], one.value, rtol=1e-12, atol=1e-13)


class Counting(RootOperator):
    """A root operator that counts how often its factor is made."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(hypergrad.as_operator(torch.eye(rows.shape[1], dtype=rows.dtype)).layout)
        self.rows, self.factors = rows, 0

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def _factor(self) -> Tensor:
        self.factors += 1
        return self.rows

    def _apply(self, block: Tensor) -> Tensor:
        return (block @ self.rows.T) @ self.rows


def test_a_backward_pass_reuses_the_factor() -> None:
    op = Counting(rows_of(5, 12, torch.ones(5, dtype=F64)))
    v = gaussian(12).requires_grad_()
    solution = hypergrad.solve(op, v, Gram(), damping=0.1)
    (grad,) = torch.autograd.grad(solution.value.sum(), v)
    assert op.factors == 1
    assert solution.backward[0].converged
    expected = dense_solve(op.rows.T @ op.rows, torch.ones(12, dtype=F64), 0.1)
    assert relative_error(grad, expected) <= 1e-12


def test_derivatives_in_the_rows_and_the_damping() -> None:
    rows = rows_of(3, 6, torch.ones(3, dtype=F64)).requires_grad_()
    damping = torch.tensor(0.3, dtype=F64, requires_grad=True)
    v = gaussian(6).requires_grad_()

    def answer(rows: Tensor, damping: Tensor, v: Tensor) -> Tensor:
        op = hypergrad.root_operator(rows)
        value: Tensor = hypergrad.solve(op, v, Gram(), damping=damping).value
        return value

    assert torch.autograd.gradcheck(answer, (rows, damping, v))
    assert torch.autograd.gradgradcheck(answer, (rows, damping, v))


def test_derivatives_in_the_parameters_of_a_network() -> None:
    made = networks.case("mlp, squared")
    v = {name: gaussian(*p.shape, seed=3) for name, p in made.params.items()}

    def answer(bias: Tensor) -> Tensor:
        op = hypergrad.ggn(
            made.model_fn, made.loss_fn, {**made.params, "0.bias": bias}, made.inputs, made.targets
        )
        return flat(hypergrad.solve(op, v, Gram(), damping=0.1).value)

    assert torch.autograd.gradcheck(answer, (made.params["0.bias"].requires_grad_(),))


def test_a_warm_start_and_damping_auto() -> None:
    rows = rows_of(4, 10, torch.ones(4, dtype=F64))
    op, v = hypergrad.root_operator(rows), gaussian(10)
    solution = hypergrad.solve(op, v, Gram(), damping="auto", x0=gaussian(10, seed=1))
    assert solution.info.damping == pytest.approx(1e-3)  # a thousandth of the largest eigenvalue
    expected = dense_solve(rows.T @ rows, v, solution.info.damping)
    assert relative_error(solution.value, expected) <= 1e-11
    assert solution.info.smallest_eigenvalue == 0.0


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e30, 1e150])
def test_rows_of_any_size(size: float) -> None:
    rows = rows_of(4, 10, torch.ones(4, dtype=F64))
    scaled = hypergrad.solve(
        hypergrad.root_operator(size * rows), gaussian(10), Gram(), damping=size * 0.1 * size
    )
    expected = dense_solve(rows.T @ rows, gaussian(10), 0.1)
    assert relative_error(scaled.value * size * size, expected) <= 1e-12


def test_no_curvature_at_all() -> None:
    op = hypergrad.root_operator(torch.zeros(3, 5, dtype=F64))
    v = gaussian(5)
    torch.testing.assert_close(hypergrad.solve(op, v, Gram(), damping=0.5).value, 2 * v)
    zero = hypergrad.solve(op, v, Gram(), on_failure="ignore")
    assert torch.equal(zero.value, torch.zeros_like(v))
    assert zero.info.status is Status.STAGNATED


@pytest.mark.parametrize(("size", "dtype"), [(1e-300, F64), (1e-170, F64), (1e-30, torch.bfloat16)])
def test_rows_whose_squares_underflow_are_no_curvature(size: float, dtype: torch.dtype) -> None:
    op = hypergrad.root_operator((size * rows_of(4, 10, torch.ones(4, dtype=F64))).to(dtype))
    v = gaussian(10).to(dtype)
    solution = hypergrad.solve(op, v, Gram(), damping=0.5)
    assert solution.info.converged
    torch.testing.assert_close(solution.value, 2 * v)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    rows = rows_of(4, 10, torch.ones(4, dtype=F64))
    rows[1, 2] = bad
    with pytest.raises(hypergrad.NonFiniteError, match="the factor F of the operator holds nan"):
        hypergrad.solve(hypergrad.root_operator(rows), gaussian(10), Gram(), damping=0.1)


def test_an_operator_without_a_factor_is_refused_by_name() -> None:
    for operator in (torch.eye(3), lambda v: v, hypergrad.hessian(lambda p: (p**2).sum(), v3())):
        with pytest.raises(hypergrad.SolverOptionError, match="expected an operator with a factor"):
            hypergrad.solve(operator, v3(), Gram(), damping=0.1)
    op = hypergrad.root_operator(torch.eye(3))
    with pytest.raises(hypergrad.SolverOptionError, match=r"times -1\.0"):
        hypergrad.solve(-op, v3(), Gram(), damping=0.1)
    with pytest.raises(hypergrad.DampingError, match="does not make up for"):
        hypergrad.solve(op - 0.5, v3(), Gram(), damping=0.1)


def v3() -> Tensor:
    return torch.ones(3)


def test_options_are_checked_when_it_is_made() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="rtol is -1"):
        Gram(rtol=-1.0)
    with pytest.raises(hypergrad.SolverOptionError, match="max_bytes is 0"):
        Gram(max_bytes=0)


def test_too_large_a_factor_is_refused_before_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Counting(torch.ones(5, 12, dtype=F64))
    needed = 2 * 5 * 12 * 8 + 3 * 25 * 8
    with pytest.raises(hypergrad.OperatorTooLargeError, match=f"max_bytes={needed}"):
        hypergrad.solve(op, gaussian(12), Gram(max_bytes=needed - 1), damping=0.1)
    assert op.factors == 0
    assert hypergrad.solve(op, gaussian(12), Gram(max_bytes=needed), damping=0.1).info.converged
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(hypergrad.OperatorTooLargeError, match="has free"):
        hypergrad.solve(op, gaussian(12), Gram(), damping=0.1)


@pytest.mark.parametrize("damping", [0.1, pytest.param(0.0, marks=pytest.mark.slow)])
def test_it_compiles_to_one_graph(damping: float) -> None:
    rows, v = rows_of(3, 8, torch.ones(3, dtype=F64)), gaussian(8)

    def run(rows: Tensor, v: Tensor) -> Any:
        op = hypergrad.root_operator(rows)
        return hypergrad.solve(op, v, Gram(), damping=damping, on_failure="ignore").value

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, v), run(rows, v), rtol=1e-10, atol=1e-11)
