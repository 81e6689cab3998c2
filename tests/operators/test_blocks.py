from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad.operators.root import RootOperator
from tests.operators import networks
from tests.strategies import DTYPES, F64, dense_solve, flat, gaussian, relative_error, tree_like


def ggn_of(made: networks.Case) -> hypergrad.GaussNewtonOperator:
    return hypergrad.ggn(made.model_fn, made.loss_fn, made.params, made.inputs, made.targets)


def dense_of(blocks: dict[str, Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks.values())  # type: ignore[no-untyped-call]
    return matrix


def masked(dense: Tensor, params: dict[str, Tensor], layer: Any) -> Tensor:
    """The dense matrix with zeros between the blocks, written independently."""
    owners = [layer(name) for name, p in params.items() for _ in range(p.numel())]
    same = torch.tensor([[a == b for a in owners] for b in owners])
    return torch.where(same, dense, 0.0)


BY: dict[str, Any] = {
    "layer": ("layer", lambda name: name.rpartition(".")[0]),
    "leaf": ("leaf", lambda name: name),
    "kind": (lambda path: "weight" in path, lambda name: "weight" in name),
    "all": (lambda path: 0, lambda name: 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("network", ["mlp, classes", "transformer, positions"])
def test_products_are_those_of_the_blocks(network: str, by: str, dtype: torch.dtype) -> None:
    made = networks.case(network, dtype)
    op = ggn_of(made)
    grouping, layer = BY[by]
    blocks = hypergrad.block_diagonal(op, grouping)
    expected = masked(op.to_dense(), made.params, layer)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    assert relative_error(blocks.to_dense(), expected) <= tolerance
    assert sum(blocks.block_sizes) == op.shape[0]
    v = gaussian(3, op.shape[0], seed=1).to(dtype)
    got = blocks.matmat(op.layout.unflatten_block(v))
    assert relative_error(op.layout.flatten_block(got), v @ expected) <= tolerance


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("by", BY)
def test_the_inverse_is_exact(by: str, damping: float) -> None:
    made = networks.case("mlp, classes")
    grouping, layer = BY[by]
    blocks = hypergrad.block_diagonal(ggn_of(made), grouping)
    v = gaussian(blocks.shape[0], seed=2)
    expected = dense_solve(masked(ggn_of(made).to_dense(), made.params, layer), v, damping)
    tree = tree_like(made.params, v)
    assert relative_error(flat(blocks.solve(tree, damping)), expected) <= 1e-13 / damping
    inverse = blocks.preconditioner(damping)
    assert relative_error(flat(inverse @ tree), expected) <= 1e-13 / damping
    solved = hypergrad.solve(blocks, tree, hypergrad.Exact(), damping=damping).value
    assert relative_error(flat(solved), expected) <= 1e-12 / damping


@pytest.mark.parametrize("kind", ["rows", "products"])
def test_dense_blocks_come_from_rows_where_these_are_fewer(kind: str) -> None:
    made = networks.case("mlp, squared")
    op: Any = ggn_of(made)  # 10 rows in dimension 26
    calls = []

    class Watched(hypergrad.LinearOperator):
        def _apply(self, block: Tensor) -> Tensor:
            calls.append(len(block))
            return op._apply(block)

    assert isinstance(op, RootOperator)
    blocks = hypergrad.block_diagonal(op if kind == "rows" else Watched(op.layout))
    dense = blocks.dense_blocks()
    assert sum(calls) == (0 if kind == "rows" else op.shape[0])
    assert list(dense) == ["0", "2"]
    assert relative_error(dense_of(dense), blocks.to_dense()) <= 1e-13


def test_layers_of_trees() -> None:
    leaf = torch.zeros(1)
    for tree, names in (
        ({"0.weight": leaf, "0.bias": leaf, "2.weight": leaf}, ("0", "2")),
        ({"weight": leaf, "bias": leaf}, ("",)),
        ({"head": {"w": leaf, "b": leaf}, "body": {"w": leaf}}, ("head", "body")),
        ([leaf, leaf], ("0", "1")),
        (leaf, ("",)),
        ({"net": [{"a.w": leaf, "a.b": leaf}, leaf]}, ("net.0.a", "net.1")),
    ):
        blocks = hypergrad.block_diagonal(lambda v: v, like=tree)
        assert blocks.names == names


@pytest.mark.parametrize(
    "krylov", [hypergrad.CG, pytest.param(hypergrad.MINRES, marks=pytest.mark.slow)]
)
def test_as_a_preconditioner_it_saves_iterations(krylov: Any) -> None:
    op, params = networks.correlated()[:2]
    v, damping = tree_like(params, gaussian(op.shape[0], seed=1)), 1e-6
    plain = hypergrad.solve(op, v, krylov(rtol=1e-6), damping=damping).info
    inverse = hypergrad.block_diagonal(op).preconditioner(damping)
    better = hypergrad.solve(op, v, krylov(rtol=1e-6, preconditioner=inverse), damping=damping)
    assert better.info.converged
    assert better.info.iterations < 0.2 * plain.iterations


def test_derivatives_go_to_the_operators_tensors() -> None:
    like = {"0.w": torch.zeros(2, dtype=F64), "1.w": torch.zeros(2, dtype=F64)}
    base = gaussian(4, 4)
    matrix = (base @ base.T + torch.eye(4, dtype=F64)).requires_grad_()
    v = tree_like(like, gaussian(4, seed=1))

    def answer(a: Tensor) -> Tensor:
        symmetric = 0.5 * (a + a.T)
        blocks = hypergrad.block_diagonal(symmetric, like=like)
        return flat(hypergrad.solve(blocks, v, hypergrad.CG(rtol=1e-13), damping=0.1).value)

    assert torch.autograd.gradcheck(answer, (matrix,))


def test_the_inverse_is_that_of_the_matrix_as_it_is() -> None:
    matrix, v = torch.diag(torch.tensor([1.0, 2.0], dtype=F64)), torch.ones(2, dtype=F64)
    blocks = hypergrad.block_diagonal(matrix)
    assert blocks.solve(v).tolist() == pytest.approx([1.0, 0.5])
    matrix.mul_(4.0)
    assert blocks.solve(v).tolist() == pytest.approx([0.25, 0.125])
    damped = blocks.preconditioner(4.0).to_dense().diagonal()
    assert damped.tolist() == pytest.approx([1.0 / 8.0, 1.0 / 12.0])


@pytest.mark.parametrize("kind", ["hessian", "ggn", "few rows"])
def test_the_inverse_of_an_operator_of_one_point_stays_that_of_this_point(kind: str) -> None:
    w, v, x = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), torch.eye(2, dtype=F64)
    op: Any = hypergrad.hessian(lambda w: (w**4).sum(), w)
    if kind != "hessian":
        inputs = x if kind == "ggn" else x[:1]
        op = hypergrad.ggn(
            lambda w, x: x @ w**2, lambda o, y: (o - y).pow(2).sum(), w, inputs, inputs[:, 0]
        )
    blocks = hypergrad.block_diagonal(op)
    before = blocks.solve(v, 0.5)
    w.add_(1.0)
    assert torch.equal(blocks.solve(v, 0.5), before)
    with pytest.raises(hypergrad.StaleOperatorError):
        hypergrad.block_diagonal(op).solve(v, 0.5)


def test_a_leaf_without_entries_is_a_block_without() -> None:
    like = {"0.w": torch.zeros(2, dtype=F64), "1.w": torch.zeros(0, dtype=F64)}
    matrix = torch.diag(torch.tensor([1.0, 2.0], dtype=F64))
    blocks = hypergrad.block_diagonal(matrix, like=like)
    x = blocks.solve({"0.w": torch.ones(2, dtype=F64), "1.w": like["1.w"]})
    assert x["0.w"].tolist() == pytest.approx([1.0, 0.5])
    assert x["1.w"].shape == (0,)


class TestBadInput:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]])

    def test_a_grouping_of_another_kind(self) -> None:
        with pytest.raises(hypergrad.SolverOptionError, match="by is 'row'"):
            hypergrad.block_diagonal(self.matrix, "row")  # type: ignore[arg-type]
        like = {"a": torch.zeros(1), "b": torch.zeros(1)}
        with pytest.raises(hypergrad.SolverOptionError, match="the same name"):
            hypergrad.block_diagonal(self.matrix, lambda p: 1 if "a" in p else "1", like=like)

    def test_blocks_that_are_not_positive_definite(self) -> None:
        blocks = hypergrad.block_diagonal(self.matrix)
        with pytest.raises(hypergrad.NegativeCurvatureError, match="smallest eigenvalue is -1"):
            blocks.preconditioner(0.5)
        assert blocks.solve(torch.ones(2), 2.0) is not None
        for damping in (-1.0, float("nan"), "auto"):
            with pytest.raises(hypergrad.DampingError, match="finite number >= 0"):
                blocks.preconditioner(damping)  # type: ignore[arg-type]

    @pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
    def test_blocks_that_are_not_symmetric(self, scale: float) -> None:
        matrix = scale * torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]).double()
        like = [torch.zeros(2, dtype=F64), torch.zeros(1, dtype=F64)]
        blocks = hypergrad.block_diagonal(matrix, by="leaf", like=like)
        with pytest.raises(hypergrad.NotSymmetricError, match=r"the block \[0\] .* 1\.9e-01"):
            blocks.solve(like)
        apart = hypergrad.block_diagonal(matrix, by=lambda path: path, like=list(matrix[0]))
        assert apart.block_sizes == (1, 1, 1)
        apart.solve(list(matrix[0]))  # what is not symmetric lies between them

    def test_too_large_blocks_are_refused_before_any_product(self) -> None:
        def never(v: Tensor) -> Tensor:
            raise AssertionError

        blocks = hypergrad.block_diagonal(never, like=torch.zeros(100), max_bytes=100_000)
        with pytest.raises(hypergrad.OperatorTooLargeError, match="max_bytes=160000"):
            blocks.preconditioner(1.0)

    def test_a_right_hand_side_that_is_not_finite(self) -> None:
        with pytest.raises(hypergrad.NonFiniteError, match="v holds nan"):
            hypergrad.block_diagonal(self.matrix).solve(torch.tensor([1.0, float("nan")]), 5.0)


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = {"a": torch.tensor([[1.0, torch.nan]]), "b": torch.ones(1, 2)}
    blocks = hypergrad.block_diagonal(hypergrad.root_operator(rows), by="leaf")
    with pytest.raises(hypergrad.NonFiniteError, match=r"1 of 2 entries of leaf \['a'\]"):
        blocks.solve({"a": torch.ones(2), "b": torch.ones(2)}, 0.1)
