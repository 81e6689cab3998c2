from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.sparse.linalg import cg, eigsh

import hypergrad
from hypergrad.pytree import TreeLayout
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    flat,
    gaussian,
    quick_and_thorough,
    symmetric,
    tree_hvp,
    tree_like,
    trees,
)

A = symmetric(torch.linspace(1.0, 3.0, 6, dtype=F64), seed=1).matrix
B = symmetric(torch.linspace(-2.0, 2.0, 6, dtype=F64), seed=2).matrix
EYE = torch.eye(6, dtype=F64)
#: Expressions in two operators, the same in two matrices, and the identity.
ALGEBRA: dict[str, Any] = {
    "shift": lambda a, b, eye: a + 0.1 * eye,
    "shift from the left": lambda a, b, eye: 0.1 * eye + a,
    "multiple": lambda a, b, eye: 2 * a,
    "multiple from the right": lambda a, b, eye: a * 2.5,
    "quotient": lambda a, b, eye: a / 4,
    "negative": lambda a, b, eye: -a,
    "sum": lambda a, b, eye: a + b,
    "difference": lambda a, b, eye: a - b,
    "minus a shift": lambda a, b, eye: a - 0.5 * eye,
    "from a shift": lambda a, b, eye: 3.0 * eye - a,
    "chain": lambda a, b, eye: 2 * (3 * (a + 1.0 * eye) - 0.5 * b) / 7 + 0.25 * eye,
}


class _Shift(float):
    """Stands for a multiple of the identity: an operator takes the plain number."""

    def __mul__(self, other: object) -> Any:
        return float(self) * other  # type: ignore[operator]

    def __rmul__(self, other: object) -> Any:
        return other * float(self)  # type: ignore[operator]


@pytest.mark.parametrize("expression", ALGEBRA.values(), ids=ALGEBRA.keys())
def test_algebra_is_that_of_dense_matrices(expression: Any) -> None:
    expected = expression(A, B, EYE)
    got = expression(hypergrad.as_operator(A), hypergrad.as_operator(B), _Shift(1.0))
    # A handful of sums of numbers below ten.
    torch.testing.assert_close(got.to_dense(), expected, rtol=0, atol=1e-14)
    v = gaussian(6, seed=3)
    torch.testing.assert_close(got @ v, expected @ v, rtol=0, atol=1e-13)


def test_a_0d_tensor_is_a_scalar() -> None:
    got = (hypergrad.as_operator(A) * torch.tensor(2.0, dtype=F64)).to_dense()
    torch.testing.assert_close(got, 2 * A)


@quick_and_thorough
@given(tree=trees())
def test_products_with_trees_are_those_with_vectors(effort: str, tree: Any) -> None:
    n = len(flat(tree))
    matrix = gaussian(n, n, seed=n)
    matrix = matrix + matrix.T
    op = hypergrad.as_operator(tree_hvp(matrix, tree), like=tree)
    assert op.shape == (n, n)
    # Rounding of one inner product of length n <= 60 of numbers of size ten.
    torch.testing.assert_close(flat(op @ tree), matrix @ flat(tree), rtol=0, atol=1e-12)
    torch.testing.assert_close(op.to_dense(), matrix, rtol=0, atol=1e-12)
    block = gaussian(4, n, seed=5)
    products = TreeLayout.of(tree).flatten_block(op.matmat(op.layout.unflatten_block(block)))
    torch.testing.assert_close(products, block @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 256])
def test_dense_assembly_does_not_depend_on_its_chunks(chunk_size: int) -> None:
    assert torch.equal(hypergrad.as_operator(A).to_dense(chunk_size=chunk_size), A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scipy_solves_with_an_exported_operator(dtype: torch.dtype) -> None:
    like = {"w": torch.zeros(2, 2, dtype=dtype), "b": torch.zeros(2, dtype=dtype)}
    op = hypergrad.as_operator(tree_hvp(A, like), like=like)
    exported = op.to_scipy()
    assert exported.shape == (6, 6)
    assert exported.dtype == (np.float32 if dtype == F32 else np.float64)
    eps = torch.finfo(dtype).eps
    top = eigsh(exported, k=2, return_eigenvectors=False)
    np.testing.assert_allclose(sorted(top), [2.6, 3.0], rtol=100 * eps)
    b = np.ones(6, dtype=exported.dtype)
    x, status = cg(exported, b, rtol=10 * eps)
    assert status == 0
    # The condition number is 3.
    assert np.linalg.norm(A.numpy() @ x - b) <= 100 * eps * np.linalg.norm(b)
    np.testing.assert_allclose(exported @ np.eye(6, dtype=b.dtype), A.numpy(), atol=30 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exported_operators_multiply_complex_vectors(dtype: torch.dtype) -> None:
    # A matrix that is not symmetric, so that the adjoint is another.
    matrix = A.to(dtype) + torch.arange(6, dtype=dtype)
    exported, dense = hypergrad.as_operator(matrix).to_scipy(), matrix.numpy()
    block = (gaussian(6, 2) + 1j * gaussian(6, 2, seed=1)).numpy()
    block = block.astype(np.result_type(dense, np.complex64))
    eps = 100 * torch.finfo(dtype).eps
    for found, expected in (
        (exported @ block, dense @ block),
        (exported.matvec(block[:, 0]), dense @ block[:, 0]),
        (exported.rmatvec(block[:, 0]), dense.T @ block[:, 0]),
        (exported.rmatmat(block), dense.T @ block),
    ):
        assert found.dtype == block.dtype
        np.testing.assert_allclose(found, expected, rtol=eps, atol=eps)
    # An infinity stays in its own part.
    column = np.array([1j, 1j, 1j, 1j, 1j, complex(0.0, np.inf)], block.dtype)
    assert np.isfinite((exported @ column).real).all()


def test_16_bit_operators_are_exported_as_float32() -> None:
    exported = hypergrad.as_operator(torch.eye(3, dtype=torch.bfloat16)).to_scipy()
    assert exported.dtype == np.float32
    assert (exported @ np.ones(3, np.float32)).tolist() == [1.0, 1.0, 1.0]


def test_factors_of_a_chain_do_not_leave_the_range_together() -> None:
    one, many = torch.ones(1, dtype=F64), torch.ones(2, 1, dtype=F64)
    op = hypergrad.as_operator(torch.full((1, 1), 1e300, dtype=F64))
    tiny = 1e-200 * (1e-200 * op)
    for chain, expected in (
        (tiny, 1e-100),
        (1e200 * tiny, 1e100),
        (1e200 * tiny + 1e100, 2e100),
        (1e200 * (1e-200 * (1e-200 * (op + 1e300))), 2e100),
        (1e-200 * (1e200 * (1e200 * (1e-300 * op))), 1e200),
        ((1e-300 * op) * 1e-310 / 1e-310, 1.0),
        (-(tiny - tiny), 0.0),
    ):
        assert (chain @ one).item() == pytest.approx(expected, rel=1e-12)
        assert chain.matmat(many).flatten().tolist() == pytest.approx([expected] * 2, rel=1e-12)
    # What stays in the range is one factor and one shift.
    chain = 2.0 * (3.0 * (op + 1.0)) - 6.0
    assert (chain @ one).item() == pytest.approx(6e300)
    assert getattr(chain, "base", None) is op


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [1e-9, 3e-6, 1e-3, 1e5])
def test_shifts_of_16_bit_operators_are_not_rounded_first(dtype: torch.dtype, shift: float) -> None:
    op = hypergrad.as_operator(torch.zeros(1, 1, dtype=dtype)) + shift
    # Products of a normal size, far from the ends of the range.
    v = torch.tensor([min(0.5 / shift, 5e4)]).to(dtype)
    expected = shift * v.double()
    near = 2.0**-14 if dtype == torch.float16 else 0.0  # below it there are fewer digits
    eps = torch.finfo(dtype).eps
    found = (op @ v).double()
    assert (found - expected).abs().item() <= eps * max(expected.item(), near)


def test_what_has_no_meaning_is_refused() -> None:
    op = hypergrad.as_operator(A)
    with pytest.raises(TypeError, match="not self-adjoint in general"):
        op @ op
    with pytest.raises(TypeError):
        op + "1"
    with pytest.raises(TypeError):
        op * True
    with pytest.raises(ValueError, match="expected a finite one"):
        op + float("nan")
    with pytest.raises(ZeroDivisionError):
        op / 0


def test_operators_on_different_trees_do_not_add_up() -> None:
    other = hypergrad.as_operator(lambda t: t, like={"w": torch.zeros(6, dtype=F64)})
    with pytest.raises(hypergrad.TreeStructureError, match="act on different trees"):
        hypergrad.as_operator(A) + other
    with pytest.raises(hypergrad.TreeStructureError, match="float32"):
        hypergrad.as_operator(A) + hypergrad.as_operator(A.to(F32))


def test_the_argument_of_a_product_is_left_alone() -> None:
    op = hypergrad.as_operator(A)
    v = gaussian(6)
    before = v.clone()
    product = op @ v
    product += 1.0
    assert torch.equal(v, before)
    assert tree_like(v, v).shape == (6,)
