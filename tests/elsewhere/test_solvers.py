"""Solvers on another device: the same answers, there, and few looks at them on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as tree

import hypergrad
from tests.elsewhere.device import DEVICE, move, waits

N = 24
PARAMS = {
    "w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) / 2,
    "b": torch.zeros(3),
    "u": torch.randn(3, 1, generator=torch.Generator().manual_seed(1)) / 2,
}
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
Y = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))


def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"]) @ params["u"]


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean()


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return squares(model(params, x), y) + 0.05 * sum(p.square().sum() for p in params.values())


def matrix() -> Tensor:
    root = torch.randn(N, N, generator=torch.Generator().manual_seed(4))
    return root @ root.T / N + 0.1 * torch.eye(N)


V = torch.randn(N, generator=torch.Generator().manual_seed(5))


def times(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v


PLACES: tuple[Callable[[Any], Any], ...] = (lambda x: x, move)
#: Each makes an operator of tensors that ``to`` moves, and a right-hand side.
OPERATORS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "matrix": lambda to: (to(matrix()), to(V)),
    "callable": lambda to: (times(to(matrix())), to(V)),
    "hessian": lambda to: (hypergrad.hessian(loss, *to((PARAMS, X, Y))), to(PARAMS)),
    "ggn": lambda to: (hypergrad.ggn(model, squares, *to((PARAMS, X, Y))), to(PARAMS)),
}
SOLVERS: dict[str, hypergrad.Solver | str] = {
    "cg": hypergrad.CG(),
    "cg, orthogonal": hypergrad.CG(reorthogonalize=True),
    "cg, fixed": hypergrad.CG(rtol=0, max_iters=6),
    "minres": hypergrad.MINRES(),
    "minres, fixed": hypergrad.MINRES(rtol=0, max_iters=6),
    "gmres": hypergrad.GMRES(),
    "neumann": hypergrad.Neumann(num_terms=30),
    "chebyshev": hypergrad.Neumann(num_terms=30, acceleration="chebyshev"),
    "nystrom": hypergrad.Nystrom(rank=8),
    "nystrom, columns": hypergrad.Nystrom(rank=8, sketch="columns"),
    "nystrom, diagonal": hypergrad.Nystrom(rank=8, sketch="diagonal"),
    "nystrom, structured": hypergrad.Nystrom(rank=8, sketch="structured"),
    "nystrom, auto": hypergrad.Nystrom(rank="auto"),
    "pcg": hypergrad.NystromPCG(rank=8),
    "exact": hypergrad.Exact(),
    "auto": "auto",
}


def flat(x: Any) -> Tensor:
    return torch.cat([leaf.detach().cpu().reshape(-1) for leaf in tree.tree_leaves(x)])


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
def test_a_solve_is_that_of_the_cpu(make: Any, solver: Any) -> None:
    found = []
    for to in PLACES:
        operator, v = make(to)
        torch.manual_seed(0)
        found.append(hypergrad.solve(operator, v, solver, damping=1.0, on_failure="ignore"))
    here, there = found
    assert {leaf.device for leaf in tree.tree_leaves(there.value)} == {DEVICE}
    assert there.info.status is here.info.status
    assert abs(there.info.iterations - here.info.iterations) <= 1
    gap = torch.linalg.vector_norm(flat(there.value) - flat(here.value))
    assert gap <= 1e-5 * torch.linalg.vector_norm(flat(here.value))


def test_tensors_of_two_places_do_not_meet() -> None:
    """Or the tests here could not fail."""
    with pytest.raises(RuntimeError, match="same device"):
        move(V) + V
    with pytest.raises(hypergrad.DeviceError):
        hypergrad.solve(move(matrix()), V)


def test_waits_are_counted() -> None:
    x = move(V)
    with waits() as found:
        y = x * 2.0
        assert found == []
        assert y.sum().item() == pytest.approx(2.0 * float(V.sum()))
        assert bool((y == y).all())
        y[y > 0].cpu()
        torch.ones(3).to(DEVICE)
        assert len(found) == 5


def waits_of(solver: hypergrad.Solver) -> int:
    with waits() as found:
        hypergrad.solve(move(matrix()), move(V), solver, damping=1e-3, on_failure="ignore")
        return len(found)


@pytest.mark.parametrize(
    ("solver", "an_iteration"),
    [
        (lambda k: hypergrad.CG(rtol=1e-12, max_iters=k), 1),
        (lambda k: hypergrad.CG(rtol=1e-12, max_iters=k, reorthogonalize=True), 1),
        (lambda k: hypergrad.MINRES(rtol=1e-12, max_iters=k), 1),
        (lambda k: hypergrad.GMRES(rtol=1e-12, max_iters=k), 1),
        (lambda k: hypergrad.NystromPCG(rank=2, rtol=1e-12, max_iters=k), 1),
        (lambda k: hypergrad.Neumann(num_terms=k, step_size=0.1), 1),
        (lambda k: hypergrad.CG(rtol=0.0, max_iters=k), 0),
        (lambda k: hypergrad.MINRES(rtol=0.0, max_iters=k), 0),
    ],
    ids=["cg", "cg, orthogonal", "minres", "gmres", "pcg", "neumann", "cg, fixed", "minres, fixed"],
)
def test_the_host_waits_once_an_iteration(solver: Any, an_iteration: int) -> None:
    """And not at all where nothing has to be decided."""
    torch.manual_seed(0)
    few = waits_of(solver(4))
    torch.manual_seed(0)
    assert waits_of(solver(8)) - few == 4 * an_iteration
    assert few <= 60


BUDGETS = {
    "cg": hypergrad.CG(),
    "cg, fixed": hypergrad.CG(rtol=0.0, max_iters=8),
    "cg, orthogonal": hypergrad.CG(reorthogonalize=True),
    "minres": hypergrad.MINRES(),
    "minres, fixed": hypergrad.MINRES(rtol=0.0, max_iters=8),
    "gmres": hypergrad.GMRES(),
    "neumann": hypergrad.Neumann(num_terms=20, step_size=0.1),
    "nystrom": hypergrad.Nystrom(rank=8),
    "pcg": hypergrad.NystromPCG(rank=2),
}


@pytest.mark.parametrize("solver", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_of_though_looked_at_later(
    solver: hypergrad.Solver, at: int, value: float
) -> None:
    told = []
    for to in PLACES:
        a, calls = to(matrix()), 0

        def spoilt(v: Tensor, a: Tensor = a) -> Tensor:
            nonlocal calls
            calls += 1
            harm = torch.zeros_like(v)
            harm[3] = value
            return a @ v + harm if calls == at else a @ v

        torch.manual_seed(0)
        with pytest.raises(hypergrad.NonFiniteError, match="output of the operator") as error:
            hypergrad.solve(spoilt, to(V), solver, damping=0.1)
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_preconditioner_that_is_not_finite_is_told_of(fixed: bool) -> None:
    options = {"rtol": 0.0, "max_iters": 5} if fixed else {}
    for to in PLACES:
        solver = hypergrad.CG(preconditioner=lambda r: r * torch.nan, **options)  # type: ignore[arg-type]
        with pytest.raises(hypergrad.NonFiniteError, match="output of the preconditioner"):
            hypergrad.solve(to(matrix()), to(V), solver, damping=0.1)


def check_blame(kind: Any, options: dict[str, Any], at: int, which: str) -> None:
    """Where the ``at``-th result of ``which`` is nan, it is ``which`` that is named."""
    for to in PLACES:
        a, calls = to(matrix()), {"operator": 0, "preconditioner": 0}

        def spoilt(name: str, x: Tensor, calls: dict[str, int] = calls) -> Tensor:
            calls[name] += 1
            return x * torch.nan if name == which and calls[name] == at else x

        def product(v: Tensor, a: Tensor = a, spoilt: Any = spoilt) -> Tensor:
            return spoilt("operator", a @ v)

        def precondition(r: Tensor, spoilt: Any = spoilt) -> Tensor:
            return spoilt("preconditioner", 1.5 * r)

        solver = kind(preconditioner=precondition, **options)
        with pytest.raises(hypergrad.NonFiniteError, match=f"output of the {which}"):
            hypergrad.solve(product, to(V), solver, damping=0.1)


@pytest.mark.parametrize(
    ("kind", "fixed"),
    [
        (hypergrad.CG, False),
        (hypergrad.CG, True),
        (hypergrad.MINRES, False),
        (hypergrad.MINRES, True),
        (hypergrad.GMRES, False),
    ],
)
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("which", ["operator", "preconditioner"])
def test_of_what_is_not_finite_the_first_is_told_of(
    kind: Any, fixed: bool, at: int, which: str
) -> None:
    """A preconditioner of nan gives nan, and so does an operator: neither is at fault then."""
    options = {"rtol": 0.0, "max_iters": 6} if fixed else {"rtol": 1e-6}
    check_blame(kind, options, at, which)


@pytest.mark.parametrize("which", ["operator", "preconditioner"])
@pytest.mark.parametrize(
    ("kind", "options", "at"),
    [
        (hypergrad.CG, {"rtol": 0.0, "max_iters": 55}, 6),  # before the true residual is looked at
        (hypergrad.MINRES, {"rtol": 0.0, "max_iters": 55}, 6),
        (hypergrad.GMRES, {"rtol": 1e-6, "restart": 3}, 4),  # in the step that a cycle ends with
    ],
)
def test_nor_does_the_answer_overflow_by_what_is_not_finite(
    kind: Any, options: Any, at: int, which: str
) -> None:
    check_blame(kind, options, at, which)


@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
def test_a_residual_that_stays_what_it_was_is_no_gain(acceleration: Any) -> None:
    """Norms of the same numbers are compared to the bit."""
    solver = hypergrad.Neumann(num_terms=1, acceleration=acceleration)
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    for to in PLACES:
        zero = to(torch.zeros(24, 24))
        found = hypergrad.solve(zero, to(rows), solver, batched=True, on_failure="ignore")
        statuses = {info.status for info in found.info.columns}
        assert statuses == {hypergrad.Status.NEGATIVE_CURVATURE}
