"""Losses of networks with layers that have a state, or that PyTorch differentiates only once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hypergrad
from tests.strategies import F64, generator, relative_error

Loss = Callable[[Any, Tensor], Tensor]
pytestmark = [
    # None of these points solves its inner problem: derivatives are compared, not solutions.
    pytest.mark.filterwarnings("ignore::hypergrad.errors.InnerProblemWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),  # PyTorch's own, of jvp
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
SGD = hypergrad.SGD(lr=0.1)
RATES: dict[str, Any] = {"inner_lr": 0.1, "outer_lr": 0.1}
#: So much that every Hessian here is positive definite with it.
SOLVER: dict[str, Any] = {"solver": hypergrad.CG(rtol=1e-10), "damping": 10.0}


def problem(
    module: torch.nn.Module, *shape: int, recomputed: bool = False
) -> tuple[Loss, Loss, dict[str, Tensor], Tensor]:
    """Training and validation with a penalty a parameter: both losses, and where they are taken."""
    x, y = torch.randn(2, 2, *shape, generator=generator(0), dtype=F64)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def error(params: Any, i: int) -> Tensor:
        run = functools.partial(torch.func.functional_call, module, params)
        out = checkpoint(run, (x[i],), use_reentrant=False) if recomputed else run((x[i],))
        return ((out[0] if isinstance(out, tuple) else out) - y[i]).square().mean()

    def inner_loss(params: Any, strengths: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in params.values()])
        return error(params, 0) + (strengths.exp() * squares).sum()

    def outer_loss(params: Any, strengths: Tensor) -> Tensor:
        return error(params, 1)

    return inner_loss, outer_loss, params, torch.linspace(-2, -1, len(params), dtype=F64)


def implicit(inner: Loss, outer: Loss, w: Any, y: Tensor) -> Any:
    y = y.clone().requires_grad_()
    solved = hypergrad.implicit(inner, **SOLVER)(lambda init, y: init)(w, y)
    sum(x.square().sum() for x in solved.values()).backward()  # no loss: it would be evaluated here
    return y.grad


def root(inner: Loss, outer: Loss, w: Any, y: Tensor) -> Any:
    solve = hypergrad.implicit(root=lambda y, x: y - inner(x, y) - outer(x, y), damping=0.0)
    w = {name: p.clone().requires_grad_() for name, p in w.items()}
    solve(lambda init, x: init)(y, w).sum().backward()
    return w


def stepped(method: hypergrad.SingleLoop, w: Any, y: Tensor) -> Any:
    state = method.init(w, y)
    for _ in range(2):
        state = method.step(state)
    return state.outer_params


def certificate(inner: Loss, outer: Loss, w: Any, y: Tensor) -> Any:
    got = hypergrad.hypergradient(inner, outer, w, y, **SOLVER)
    return hypergrad.hypergradient_certificate(inner, outer, w, y, got)


ROUTES: dict[str, Callable[[Loss, Loss, Any, Tensor], Any]] = {
    "hypergradient": lambda f, g, w, y: hypergrad.hypergradient(f, g, w, y, **SOLVER),
    "unrolled": lambda f, g, w, y: hypergrad.unrolled_hypergradient(
        f, g, w, y, num_steps=3, optimizer=SGD
    ),
    "forward": lambda f, g, w, y: hypergrad.unrolled_hypergradient(
        f, g, w, y, num_steps=3, optimizer=SGD, mode="forward"
    ),
    "DARTS": lambda f, g, w, y: hypergrad.darts_hypergradient(f, g, w, y, step_size=0.1),
    "implicit": implicit,
    "root": root,
    "certificate": certificate,
    "check": lambda f, g, w, y: hypergrad.check_hypergradient(
        f, g, w, y, solve_inner=lambda init, y: init, num_directions=1, **SOLVER
    ),
    "SOBA": lambda f, g, w, y: stepped(hypergrad.SOBA(f, g, linear_lr=0.1, **RATES), w, y),
    "F2SA": lambda f, g, w, y: stepped(
        hypergrad.F2SA(f, g, penalty_lr=0.1, multiplier=1.0, inner_steps=2, **RATES), w, y
    ),
}


def batch_norm() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    return torch.nn.Sequential(*layers).double()


def attention() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()


@pytest.mark.parametrize(
    ("route", "recomputed"),
    # PyTorch's checkpoints have no forward-mode derivative.
    [(r, again) for r in ROUTES for again in (False, True) if not (again and r == "forward")],
)
def test_running_statistics_stay_where_they_are(route: str, recomputed: bool) -> None:
    module = batch_norm()
    before = copy.deepcopy(module.state_dict())
    ROUTES[route](*problem(module, 6, 3, recomputed=recomputed))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("route", ROUTES)
def test_fused_attention_gives_way(route: str) -> None:
    ROUTES[route](*problem(attention(), 3, 2, 4))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(attention, (3, 2, 4)), (lambda: torch.nn.GRU(4, 4, batch_first=True).double(), (3, 2, 4))],
    ids=["attention", "GRU"],
)
def test_gradient_through_steps_is_the_difference_quotient(
    mode: Any, module: Callable[[], torch.nn.Module], shape: tuple[int, ...]
) -> None:
    inner, outer, w, y = problem(module(), *shape)

    def through(y: Tensor) -> hypergrad.UnrolledHypergradient:
        return hypergrad.unrolled_hypergradient(
            inner, outer, w, y, num_steps=3, optimizer=SGD, mode=mode
        )

    step, slopes = 1e-4, []
    for direction in torch.eye(len(y), dtype=F64):
        up, down = (through(y + sign * step * direction).outer_value for sign in (1, -1))
        slopes.append((up - down) / (2 * step))
    # Truncation is of order step^2 = 1e-8, rounding of order 1e-16 / step = 1e-12.
    assert relative_error(through(y).grad, torch.stack(slopes)) < 1e-5


def test_implicit_through_attention_is_the_hypergradient() -> None:
    inner, _, w, y = problem(attention(), 3, 2, 4)
    expected = hypergrad.hypergradient(
        inner, lambda w, y: sum(x.square().sum() for x in w.values()), w, y, **SOLVER
    ).grad
    # Both stop at a relative residual of 1e-10, of a system whose condition is below 100.
    assert relative_error(implicit(inner, inner, w, y), expected) < 1e-7
