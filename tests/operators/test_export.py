"""The export to the package linear_operator, held to that package's own test cases."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unittest
from typing import Any

import linear_operator
import pytest
import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch import Tensor

import hypergrad
from tests.strategies import F64, gaussian, symmetric, tree_hvp

# The package's own, and PyTorch's when it unpickles one of its tree specifications.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
]

MATRIX = torch.tensor(
    [
        [6.0, 1.0, 0.5, 0.0, 0.2],
        [1.0, 5.0, 0.3, 0.1, 0.0],
        [0.5, 0.3, 4.0, 0.7, 0.1],
        [0.0, 0.1, 0.7, 3.0, 0.4],
        [0.2, 0.0, 0.1, 0.4, 2.0],
    ]
)


class TestDense(LinearOperatorTestCase, unittest.TestCase):  # type: ignore[misc]  # untyped there
    """Their protocol on an operator that carries the matrix it depends on."""

    seed = 0
    should_test_sample = True

    def create_linear_op(self) -> Any:
        return hypergrad.to_linear_operator(MATRIX.clone().requires_grad_())

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        (matrix,) = linear_op.representation()
        assert isinstance(matrix, Tensor)
        return matrix


class TestAlgebra(TestDense):
    """The same of a sum, a multiple and a shift of operators."""

    def create_linear_op(self) -> Any:
        half = hypergrad.as_operator(0.5 * MATRIX.clone().requires_grad_())
        rest = hypergrad.as_operator((0.25 * MATRIX).requires_grad_())
        return hypergrad.to_linear_operator(half + 2.0 * rest + 1.0)

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        half, rest = linear_op.representation()
        return half + 2.0 * rest + torch.eye(5, dtype=half.dtype)


class Product:
    """An hvp_fn that can be pickled."""

    def __call__(self, v: Tensor) -> Tensor:
        return MATRIX.to(v.dtype) @ v


class TestProductsOnly(TestDense):
    """The same of an operator that is no more than a callable: a constant of the graph."""

    def create_linear_op(self) -> Any:
        return hypergrad.to_linear_operator(Product(), like=torch.zeros(5))

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        return MATRIX.to(linear_op.dtype).clone().requires_grad_()


def quartic(params: Tensor) -> Tensor:
    """Its Hessian is diag(p^2) + MATRIX."""
    return (params**4).sum() / 12 + 0.5 * params @ MATRIX.to(params.dtype) @ params


class TestHessian(TestDense):
    """The same of a Hessian, with gradients to the parameters that it is taken at."""

    def create_linear_op(self) -> Any:
        params = torch.tensor([0.5, 1.0, -1.5, 0.7, 1.2], requires_grad=True)
        return hypergrad.to_linear_operator(hypergrad.hessian(quartic, params))

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        (params,) = linear_op.representation()
        return torch.diag(params**2) + MATRIX.to(params.dtype)


def test_columns_in_batches() -> None:
    like = {"a": torch.zeros(2, 2), "b": torch.zeros(())}
    exported = hypergrad.to_linear_operator(tree_hvp(MATRIX.double(), like), like=like)
    columns = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(exported @ columns, MATRIX @ columns)
    torch.testing.assert_close(exported.expand(2, 3, 5, 5) @ columns, MATRIX @ columns)


def test_a_matrix_that_is_not_symmetric_is_transposed_for_gradients() -> None:
    matrix = gaussian(4, 4).requires_grad_()
    exported = hypergrad.to_linear_operator(2.0 * hypergrad.as_operator(matrix) + 1.0)
    torch.testing.assert_close(exported.mT.to_dense(), 2.0 * matrix.mT + torch.eye(4, dtype=F64))
    v = gaussian(4, 2, seed=1).requires_grad_()
    weights = gaussian(4, 2, seed=2)
    ((exported @ v) * weights).sum().backward()
    assert v.grad is not None
    assert matrix.grad is not None
    torch.testing.assert_close(v.grad, 2.0 * matrix.detach().mT @ weights + weights)
    torch.testing.assert_close(matrix.grad, 2.0 * weights @ v.detach().mT)


def test_a_hessian_is_exported_with_its_products() -> None:
    problem = symmetric(torch.linspace(1.0, 3.0, 6, dtype=F64), seed=1)
    params = torch.zeros(6, dtype=F64)
    op = hypergrad.hessian(lambda p: 0.5 * p @ problem.matrix @ p, params)
    exported = hypergrad.to_linear_operator(op)
    rhs = gaussian(6).requires_grad_()
    with (
        linear_operator.settings.cg_tolerance(1e-10),
        linear_operator.settings.max_cholesky_size(0),
    ):
        x = exported.solve(rhs)
    torch.testing.assert_close(x, torch.linalg.solve(problem.matrix, rhs), rtol=1e-6, atol=1e-8)
    assert exported.logdet().item() == pytest.approx(problem.matrix.logdet().item(), rel=1e-6)


def test_there_and_back() -> None:
    op = hypergrad.as_operator(hypergrad.to_linear_operator(MATRIX))
    torch.testing.assert_close(op.to_dense(), MATRIX)


def test_an_export_is_pickled_into_another_process() -> None:
    data = pickle.dumps(hypergrad.to_linear_operator(torch.eye(3) * 2.0))
    code = f"import pickle; print(pickle.loads({data!r}).to_dense().sum().item())"
    got = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert got.stdout.strip() == "6.0"


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "linear_operator", None)
    from hypergrad.operators import export

    export._export_class.cache_clear()
    with pytest.raises(ImportError, match="pip install linear_operator"):
        hypergrad.to_linear_operator(MATRIX)


def test_products_that_are_not_finite_are_refused() -> None:
    exported = hypergrad.to_linear_operator(lambda v: v / 0.0, like=torch.ones(3))
    with pytest.raises(hypergrad.NonFiniteError, match="output of the operator"):
        exported @ torch.ones(3, 1)
