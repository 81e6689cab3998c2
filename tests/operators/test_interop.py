from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from typing import Any

import curvlinops
import linear_operator.operators
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import hypergrad
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    dense_solve,
    flat,
    gaussian,
    generator,
    relative_error,
    symmetric,
    tree_hvp,
)

PROBLEM = symmetric(torch.linspace(1.0, 3.0, 6, dtype=F64), seed=1)
A = PROBLEM.matrix
TREE = {
    "w": torch.zeros(2, 2, dtype=F64),
    "b": (torch.zeros((), dtype=F64), torch.zeros(1).double()),
}


def least_squares(matrix: Tensor, shape: tuple[int, ...]) -> Any:
    """A curvlinops Hessian equal to ``matrix``: that of mean squares with inputs X is 2 X'X / n."""
    n = len(matrix)
    inputs = torch.linalg.cholesky(0.5 * n * matrix).T.contiguous()
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=F64))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.reshape(-1, 1)

    batch = (inputs, torch.zeros(n, 1, dtype=F64))
    return curvlinops.HessianLinearOperator(Model(), torch.nn.MSELoss(), [weight], [batch])


def sparse_csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a beta state, it says
        return matrix.to_sparse_csr()


#: The same operator in every form that as_operator takes.
FORMATS: dict[str, Any] = {
    "tensor": A,
    "sparse tensor": A.to_sparse(),
    "sparse csr tensor": sparse_csr(A),
    "array": A.numpy(),
    "callable": lambda v: A @ v,
    "operator": hypergrad.as_operator(A),
    "sparse array": scipy.sparse.csr_array(A.numpy()),
    "sparse matrix": scipy.sparse.coo_matrix(A.numpy()),
    "scipy operator": scipy.sparse.linalg.aslinearoperator(A.numpy()),
    "exported": hypergrad.as_operator(A).to_scipy(),
    "linear_operator": linear_operator.operators.DenseLinearOperator(A),
    "linear_operator sum": linear_operator.operators.DenseLinearOperator(A - torch.eye(6).double())
    + linear_operator.operators.DiagLinearOperator(torch.ones(6, dtype=F64)),
    "exported to linear_operator": hypergrad.to_linear_operator(A),
    "curvlinops": least_squares(A, (6,)),
    "curvlinops sum": 0.5 * least_squares(A, (6,)) + 0.5 * least_squares(A, (6,)),
}
every_format = pytest.mark.parametrize("obj", FORMATS.values(), ids=FORMATS.keys())

VERBS = [name for name in hypergrad.__all__ if name.endswith("_ihvp")]
#: What makes each verb exact to 1e-9 on this operator, where it has the option.
OPTIONS = {"rtol": 1e-11, "rank": 6, "num_terms": 70, "damping": 0.5}
SOLVERS = [
    hypergrad.Exact(),
    hypergrad.CG(rtol=1e-11),
    hypergrad.GMRES(rtol=1e-11),
    hypergrad.Neumann(num_terms=70),
    hypergrad.Nystrom(rank=6, generator=generator(0)),
]


@every_format
def test_every_format_is_the_same_operator(obj: Any) -> None:
    v = gaussian(6)
    op = hypergrad.as_operator(obj, like=v)
    torch.testing.assert_close(op.to_dense(), A, rtol=0, atol=1e-15)
    torch.testing.assert_close(op.matmat(gaussian(3, 6)), gaussian(3, 6) @ A, rtol=0, atol=1e-14)
    x = hypergrad.solve(obj, v, hypergrad.CG(rtol=1e-12)).value
    torch.testing.assert_close(x, torch.linalg.solve(A, v), rtol=1e-10, atol=1e-12)


@every_format
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_every_format_gives_every_solver_the_same_answer(obj: Any, solver: Any) -> None:
    rows = gaussian(3, 6, seed=5)
    batch = hypergrad.solve(obj, rows, solver, damping=0.5, batched=True).value
    expected = torch.stack([dense_solve(A, v, 0.5) for v in rows])
    torch.testing.assert_close(batch, expected, rtol=1e-9, atol=1e-10)


@every_format
@pytest.mark.parametrize("verb", VERBS)
def test_every_format_gives_every_verb_the_same_answer(obj: Any, verb: str) -> None:
    function = getattr(hypergrad, verb)
    names = inspect.signature(function).parameters
    v = gaussian(6, seed=6)
    x = function(obj, v, **{key: value for key, value in OPTIONS.items() if key in names})
    assert relative_error(x, dense_solve(A, v, 0.5)) <= 1e-9


@every_format
def test_every_format_gives_the_same_sketch(obj: Any) -> None:
    sketch = hypergrad.nystrom_sketch(obj, 3, gaussian(6), generator=generator(1))
    expected = hypergrad.nystrom_sketch(A, 3, gaussian(6), generator=generator(1))
    torch.testing.assert_close(sketch.eigenvalues, expected.eigenvalues, rtol=1e-12, atol=0)
    v = gaussian(6, seed=7)
    torch.testing.assert_close(sketch.solve(v, 0.1), expected.solve(v, 0.1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("callable", "operator")])
def test_matrices_act_on_trees_in_the_order_of_their_leaves(name: str) -> None:
    op = hypergrad.as_operator(FORMATS[name], like=TREE)
    v = {"w": gaussian(2, 2), "b": (torch.tensor(1.0, dtype=F64), gaussian(1))}
    torch.testing.assert_close(flat(op @ v), A @ flat(v), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sparse_matrix_serves_either_dtype(dtype: torch.dtype) -> None:
    op = hypergrad.as_operator(scipy.sparse.csr_array(A.numpy()), like=torch.zeros(6, dtype=dtype))
    assert (op @ torch.ones(6, dtype=dtype)).dtype == dtype


def test_an_integer_sparse_matrix_is_taken_as_float64() -> None:
    op = hypergrad.as_operator(scipy.sparse.csr_array(np.eye(3, dtype=np.int64) * 2))
    assert torch.equal(op.to_dense(), 2 * torch.eye(3, dtype=F64))


@pytest.mark.parametrize("batchable", [False, True])
def test_a_batchable_callable_gives_the_same_products(batchable: bool) -> None:
    hvp = tree_hvp(A, TREE)
    op = hypergrad.as_operator(hvp, like=TREE, batchable=batchable)
    torch.testing.assert_close(op.to_dense(), A, rtol=0, atol=1e-15)


def test_a_batchable_callable_is_called_once_a_block() -> None:
    calls = 0

    def hvp(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    hypergrad.as_operator(hvp, like=gaussian(6), batchable=True).matmat(gaussian(5, 6))
    assert calls == 1


class TestHonestCallables:
    """What users write: autograd on a kept graph, tuples for lists, dicts in any order."""

    def test_autograd_on_a_kept_graph(self) -> None:
        params = [gaussian(3).requires_grad_(), gaussian(2, seed=1).requires_grad_()]
        loss = (params[0] ** 4).sum() + (params[0].sum() * params[1]).pow(2).sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)

        def hvp(v: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(grads, params, grad_outputs=v, retain_graph=True)

        v = [torch.ones(3, dtype=F64), torch.ones(2, dtype=F64)]
        dense = hypergrad.as_operator(hvp, like=v).to_dense()
        torch.testing.assert_close(dense, dense.T, rtol=1e-12, atol=1e-12)
        for solver in (hypergrad.Exact(), hypergrad.Nystrom(5)):
            x = hypergrad.solve(hvp, v, solver, damping=50.0).value
            assert isinstance(x, list)
            expected = torch.linalg.solve(dense + 50.0 * torch.eye(5, dtype=F64), flat(v))
            torch.testing.assert_close(flat(x), expected, rtol=1e-9, atol=1e-12)
        assert params[0].grad is None

    def test_the_order_of_keys_does_not_matter(self) -> None:
        weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}

        def hvp(v: dict[str, Tensor]) -> dict[str, Tensor]:
            assert list(v) == ["a", "b"]
            return OrderedDict((key, weights[key] * v[key]) for key in ("b", "a"))

        v = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([8.0])}
        x = hypergrad.exact_ihvp(hvp, v)
        assert list(x) == ["a", "b"]
        assert type(x) is dict
        assert x["a"].tolist() == [1.0, 1.0]
        assert x["b"].tolist() == [2.0]

    def test_the_answer_has_the_order_and_type_of_v_not_of_the_operator(self) -> None:
        params = {"a": torch.ones(2), "b": torch.ones(1)}
        op = hypergrad.hessian(lambda p: (p["a"] ** 2).sum() + 2 * (p["b"] ** 2).sum(), params)
        v = OrderedDict(b=torch.tensor([4.0]), a=torch.tensor([2.0, 4.0]))
        x = hypergrad.solve(op, v).value
        assert isinstance(x, OrderedDict)
        assert list(x) == ["b", "a"]
        torch.testing.assert_close(x["b"], torch.tensor([1.0]))
        torch.testing.assert_close(x["a"], torch.tensor([1.0, 2.0]))

    def test_the_identity_may_return_its_argument(self) -> None:
        v = gaussian(4)
        assert torch.equal(hypergrad.cg_ihvp(lambda u: u, v), v)

    def test_a_result_with_a_graph_is_detached_without_grad_mode(self) -> None:
        weight = torch.tensor(2.0, requires_grad=True)
        with torch.no_grad():
            x = hypergrad.cg_ihvp(lambda u: weight * u, torch.ones(2, requires_grad=True))
        assert not x.requires_grad
        assert x.tolist() == [0.5, 0.5]

    def test_a_callable_may_overwrite_its_argument(self) -> None:
        diagonal = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
        v = torch.ones(3, dtype=F64)
        x = hypergrad.cg_ihvp(lambda u: u.mul_(diagonal), v, rtol=1e-12)
        torch.testing.assert_close(x, 1 / diagonal)
        assert torch.equal(v, torch.ones(3, dtype=F64))


def _foreign(values: Tensor, multiply: Any) -> Any:
    operator = linear_operator.operators.DiagLinearOperator(values)
    object.__setattr__(operator, "matmul", multiply)  # which its @ calls
    return operator


def _of_scipy(values: Any, multiply: Any) -> Any:
    n = len(values)
    return scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=multiply, matmat=multiply, dtype=values.numpy().dtype
    )


def _in_place(values: Any) -> Any:
    def multiply(x: Any) -> Any:
        x *= values.reshape((-1,) + (1,) * (x.ndim - 1))
        return x

    return multiply


def _overwriting(values: Any) -> Any:
    def multiply(x: Any) -> Any:
        product = x * values.reshape((-1,) + (1,) * (x.ndim - 1))
        x[...] = 7.0
        return product

    return multiply


def _reusing(values: Any) -> Any:
    memory: dict[Any, Any] = {}

    def multiply(x: Any) -> Any:
        product = x * values.reshape((-1,) + (1,) * (x.ndim - 1))
        memory.setdefault(x.shape, product)[...] = product
        return memory[x.shape]

    return multiply


#: Operators of products that write on their argument, or on a product that they gave before.
CARELESS: dict[str, Any] = {
    "scipy": lambda make, d: _of_scipy(d, make(d.numpy())),
    "linear_operator": lambda make, d: _foreign(d, make(d)),
    "batchable": lambda make, d: hypergrad.as_operator(make(d), like=d, batchable=True),
    "callable": lambda make, d: hypergrad.as_operator(make(d), like=d),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        (name, make)
        for name in CARELESS
        for make in (_in_place, _overwriting, _reusing)
        if (name, make) != ("batchable", _reusing)  # vmap lets no product be kept
    ],
)
class TestWhatAProductDoesWithItsMemory:
    """It is its own affair: vectors and products are those of the solver, or of the caller."""

    def test_products_and_the_algebra(self, name: str, make: Any, dtype: torch.dtype) -> None:
        d = torch.linspace(1.0, 3.0, 5).to(dtype)
        op = hypergrad.as_operator(CARELESS[name](make, d), like=d)
        v, block = torch.ones(5, dtype=dtype), torch.ones(2, 5, dtype=dtype)
        host = np.ones(5, dtype=v.numpy().dtype)
        doubled = op + op
        first, many = op @ v, op.matmat(block)
        assert torch.equal(doubled @ (3.0 * v), 6.0 * d)
        assert torch.equal(doubled.matmat(3.0 * block), 6.0 * d.expand(2, 5))
        assert torch.equal((2.0 * op + 1.0).matmat(block), (2.0 * d + 1.0).expand(2, 5))
        # Those of before are as they were, and so is what was multiplied.
        assert torch.equal(first, d)
        assert torch.equal(many, d.expand(2, 5))
        assert torch.equal(v, torch.ones(5, dtype=dtype))
        assert torch.equal(block, torch.ones(2, 5, dtype=dtype))
        assert np.array_equal(op.to_scipy() @ host, d.numpy())
        assert np.array_equal(host, np.ones(5))

    @pytest.mark.parametrize(
        "solver",
        [
            hypergrad.Exact(),
            hypergrad.CG(),
            hypergrad.MINRES(),
            hypergrad.GMRES(),
            hypergrad.Neumann(200),
            hypergrad.Nystrom(5),
            hypergrad.NystromPCG(2),
        ],
        ids=lambda solver: type(solver).__name__,
    )
    def test_solves(self, name: str, make: Any, dtype: torch.dtype, solver: Any) -> None:
        d = torch.linspace(1.0, 3.0, 5).to(dtype)
        op = hypergrad.as_operator(CARELESS[name](make, d), like=d)
        rows = torch.linspace(1.0, 2.0, 10).reshape(2, 5).to(dtype)
        for many, operator in ((1, op), (2, op + op)):
            expected = rows.double() / (many * d.double() + 0.25)
            for v, answer in ((rows, expected), (rows[0], expected[0])):
                found = hypergrad.solve(operator, v, solver, damping=0.25, batched=v.ndim == 2)
                assert not found.info.status.failed
                assert relative_error(found.value, answer) < 2e-5


def test_an_operator_of_another_dtype_is_refused() -> None:
    with pytest.raises(hypergrad.LeafTypeError, match=r"expected torch\.float64"):
        hypergrad.as_operator(hypergrad.as_operator(A), like=torch.ones(6, dtype=F32))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_matrices_of_torch_multiply() -> None:
    dense = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    v = torch.tensor([1.0, 2.0, 3.0])
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        torch.testing.assert_close(hypergrad.as_operator(sparse) @ v, dense @ v)


def test_a_sparse_right_hand_side_is_refused_with_the_remedy() -> None:
    with pytest.raises(hypergrad.LeafTypeError, match="to_dense"):
        hypergrad.cg_ihvp(lambda v: v, torch.ones(3).to_sparse())


def test_numpy_matrices_of_any_memory_layout() -> None:
    matrix = np.diag([1.0, 2.0, 3.0])
    for view in (matrix[::-1, ::-1], matrix.astype(">f8"), np.asfortranarray(matrix)):
        got = hypergrad.as_operator(view).to_dense()
        torch.testing.assert_close(got, torch.tensor(view.astype("f8").copy()))


# Operators that are not symmetric ---------------------------------------------------------------

B = gaussian(6, 6, seed=8) + 4 * torch.eye(6, dtype=F64)
#: Every form that can hold a matrix which is not symmetric.
SKEWED: dict[str, Any] = {
    "tensor": B,
    "sparse tensor": B.to_sparse(),
    "sparse csr tensor": sparse_csr(B),
    "array": B.numpy(),
    "transposed array": np.asfortranarray(B.numpy()),
    "callable": lambda v: B @ v,
    "sparse array": scipy.sparse.csc_array(B.numpy()),
    "scipy operator": scipy.sparse.linalg.aslinearoperator(B.numpy()),
    "linear_operator": linear_operator.operators.DenseLinearOperator(B),
    "sum": hypergrad.as_operator(B - torch.eye(6).double()) + 1.0,
}
every_skewed_format = pytest.mark.parametrize("obj", SKEWED.values(), ids=SKEWED.keys())


@every_skewed_format
def test_an_operator_that_is_not_symmetric_is_multiplied_as_it_stands(obj: Any) -> None:
    v = gaussian(6)
    op = hypergrad.as_operator(obj, like=v)
    torch.testing.assert_close(op @ v, B @ v, rtol=0, atol=1e-13)
    torch.testing.assert_close(op.to_dense(), B, rtol=0, atol=1e-13)
    x = hypergrad.solve(obj, v, hypergrad.GMRES(rtol=1e-12)).value
    assert relative_error(x, torch.linalg.solve(B, v)) <= 1e-10
    assert relative_error(x, torch.linalg.solve(B.T, v)) > 1e-2


# Operators of other packages --------------------------------------------------------------------


def test_an_operator_of_curvlinops_takes_trees_of_its_parameters() -> None:
    model = torch.nn.Linear(3, 2).double()
    batch = (gaussian(20, 3, seed=1), gaussian(20, 2, seed=2))
    params = dict(model.named_parameters())
    theirs = curvlinops.HessianLinearOperator(
        model, torch.nn.MSELoss(), list(params.values()), [batch]
    )

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)

    ours = hypergrad.hessian(loss_fn, params, *batch)
    v = {"weight": gaussian(2, 3, seed=3), "bias": gaussian(2, seed=4)}
    x = hypergrad.solve(theirs, v, hypergrad.CG(rtol=1e-12)).value
    assert list(x) == ["weight", "bias"]
    expected = hypergrad.solve(ours, v, hypergrad.CG(rtol=1e-12)).value
    assert relative_error(flat(x), flat(expected).detach()) <= 1e-10
    with pytest.raises(hypergrad.TreeStructureError, match="in their order"):
        hypergrad.as_operator(theirs, like={"bias": v["bias"], "weight": v["weight"]})


def test_operators_of_other_packages_are_held_to_the_structure_of_v() -> None:
    theirs = linear_operator.operators.DenseLinearOperator(A)
    with pytest.raises(hypergrad.LeafTypeError, match=r"torch\.float64.*torch\.float32"):
        hypergrad.as_operator(theirs, like=torch.zeros(6, dtype=F32))
    with pytest.raises(hypergrad.TreeStructureError, match="7 entries"):
        hypergrad.as_operator(theirs, like=torch.zeros(7, dtype=F64))
    batch = linear_operator.operators.DenseLinearOperator(A.expand(2, 6, 6))
    with pytest.raises(hypergrad.TreeStructureError, match="not square"):
        hypergrad.as_operator(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_of_other_packages_need_no_like(dtype: torch.dtype) -> None:
    op = hypergrad.as_operator(linear_operator.operators.DenseLinearOperator(A.to(dtype)))
    assert op.dtype is dtype
    torch.testing.assert_close(op @ torch.ones(6, dtype=dtype), A.to(dtype).sum(1))


def test_products_of_other_packages_build_no_graph() -> None:
    matrix = A.clone().requires_grad_()
    op = hypergrad.as_operator(linear_operator.operators.DenseLinearOperator(matrix))
    assert not (op @ gaussian(6)).requires_grad
    assert not (hypergrad.as_operator(matrix) @ gaussian(6)).requires_grad
