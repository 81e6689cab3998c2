"""Products and exact solves under torch.compile: one graph, and the eager answer.

The backend runs the captured graph without generating code: what is tested is the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.operators import networks
from tests.strategies import F64, flat, gaussian, generator, tree_like

MADE = networks.case("mlp, classes")
BATCH = (MADE.model_fn, MADE.loss_fn, MADE.params, MADE.inputs, MADE.targets)


def plain_model(p: Any, x: Tensor) -> Tensor:
    """The network without the context manager around it, which is no tensor code."""
    return torch.func.functional_call(MADE.module, p, (x,))


def one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


#: Made outside of the compiled function.
OPERATORS: dict[str, Callable[[], Any]] = {
    "ggn": lambda: hypergrad.ggn(plain_model, *BATCH[1:]),
    "fisher": lambda: hypergrad.fisher(
        plain_model, MADE.params, MADE.inputs, generator=generator(0)
    ),
    "empirical fisher": lambda: hypergrad.empirical_fisher(plain_model, *BATCH[1:]),
    "blocks": lambda: hypergrad.block_diagonal(hypergrad.ggn(plain_model, *BATCH[1:])),
    "rows": lambda: hypergrad.root_operator(
        {name: gaussian(3, *p.shape) for name, p in MADE.params.items()}
    ),
    "inverse of blocks": lambda: hypergrad.block_diagonal(
        hypergrad.ggn(plain_model, *BATCH[1:])
    ).preconditioner(0.1),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "ggn" else pytest.param(n, marks=pytest.mark.slow) for n in OPERATORS],
)
def test_a_product_is_one_graph(name: str) -> None:
    op = OPERATORS[name]()
    v = tree_like(MADE.params, gaussian(op.shape[0], seed=1))
    got, expected = one_graph(op.matvec)(v), op.matvec(v)
    torch.testing.assert_close(flat(got), flat(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ggn", "fisher", "empirical fisher"])
def test_a_solve_in_the_dimension_of_the_rows_is_one_graph(name: str) -> None:
    op = OPERATORS[name]()
    v = tree_like(MADE.params, gaussian(op.shape[0], seed=1))

    def run(v: Any) -> Any:
        return hypergrad.solve(op, v, hypergrad.Gram(), damping=0.1).value

    torch.testing.assert_close(flat(one_graph(run)(v)), flat(run(v)), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_preconditioned_solve_is_one_graph() -> None:
    op = OPERATORS["ggn"]()
    inverse = hypergrad.block_diagonal(op).preconditioner(0.1)
    solver = hypergrad.CG(rtol=0.0, max_iters=3, preconditioner=inverse)
    v = tree_like(MADE.params, gaussian(op.shape[0], seed=1))

    def run(v: Any) -> Any:
        return hypergrad.solve(op, v, solver, damping=0.1).value

    torch.testing.assert_close(flat(one_graph(run)(v)), flat(run(v)), rtol=1e-9, atol=1e-11)


def test_a_draw_inside_is_refused_with_the_remedy() -> None:
    def run(v: Tensor) -> Any:
        return hypergrad.fisher(lambda p, x: x @ p, v, torch.eye(3, dtype=F64)).matvec(v)

    with pytest.raises(Exception, match="Make it outside the function"):
        one_graph(run)(torch.ones(3, dtype=F64))
