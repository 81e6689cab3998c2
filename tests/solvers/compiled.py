"""What the tests of ``compile=True`` have in common: problems, and a solve in both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

import hypergrad
from hypergrad.operators import compilation, loops
from tests.strategies import F64, SPECTRA, symmetric


@contextmanager
def capturing() -> Iterator[None]:
    """Graphs are captured and run, without code from them."""
    torch._dynamo.reset()
    compilation.forget_compiled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "BACKEND", "eager")
        yield
    compilation.forget_compiled()


@contextmanager
def generating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code is generated from graphs, and nobody else's are used."""
    pytest.importorskip("torch._inductor")
    compilation.forget_compiled()
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    yield
    compilation.forget_compiled()


def answers_watched(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[bool]:
    """Of each compiled solve by ``module``, whether its graph answered; else eager code did."""
    answered: list[bool] = []
    run = module.run_compiled

    def watched(*args: Any) -> Any:
        found = run(*args)
        answered.append(found is not None)
        return found

    monkeypatch.setattr(module, "run_compiled", watched)
    return answered


def matrix(spectrum: str = "alternating", n: int = 12, dtype: torch.dtype = F64) -> Tensor:
    return symmetric(SPECTRA[spectrum](n), seed=1).matrix.to(dtype)


def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"]) @ p["v"]


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return squares(model(p, x), y) + 0.05 * (p["w"] ** 2).sum()


def point(seed: int, dtype: torch.dtype = F64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Parameters, inputs, and targets that they nearly meet."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=F64).to(dtype)

    params, x = {"w": draw(5, 6), "v": draw(6)}, draw(20, 5)
    return params, x, model(params, x) + 0.01 * draw(20)


def right_hand_side(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    return {name: leaf + 1 for name, leaf in point(7, dtype)[0].items()}


def weighted_sum(dtype: torch.dtype = F64) -> hypergrad.LinearOperator:
    """Of two problems' Gauss-Newton matrices."""
    first, second = (hypergrad.ggn(model, squares, *point(seed, dtype)) for seed in (0, 1))
    return 0.5 * first + second.shift(0.1)


#: By dtype; all of the parameters of :func:`point`.
OPERATORS: dict[str, Callable[[torch.dtype], Any]] = {
    "hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype)) + 2.0,
    "compiled hessian": lambda dtype: hypergrad.hessian(loss, *point(0, dtype), compile=True) + 2.0,
    "ggn": lambda dtype: hypergrad.ggn(model, squares, *point(0, dtype)),
    "sum": weighted_sum,
}


def eager_and_compiled(
    solver: Callable[[bool], hypergrad.Solver], operator: Any, v: Any, **options: Any
) -> tuple[hypergrad.Solution, hypergrad.Solution]:
    """The solutions by ``solver(False)`` and ``solver(True)``, whatever their status."""
    eager, compiled = (
        hypergrad.solve(operator, v, solver(compile), on_failure="ignore", **options)
        for compile in (False, True)
    )
    return eager, compiled


def leaves(solution: hypergrad.Solution) -> list[Tensor]:
    value = solution.value
    return list(value.values()) if isinstance(value, dict) else [value]


def passes_counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each loop compiled from now on: tanhs around it, and in it."""
    counts: list[tuple[int, int]] = []

    class Counting(loops.HoistInvariants):
        def __call__(self, graph: Graph) -> None:
            module = graph.owning_module
            assert module is not None
            super().__call__(graph)
            for node in module.graph.nodes:
                if node.target is torch.ops.higher_order.while_loop:
                    body = getattr(module, str(node.args[1].target))
                    counts.append((_tanhs(module.graph), _tanhs(body.graph)))

        def uuid(self) -> bytes:
            return b"counting"

    monkeypatch.setattr(loops, "HoistInvariants", Counting)
    return counts


def _tanhs(graph: Graph) -> int:
    return sum(node.target is torch.ops.aten.tanh.default for node in graph.nodes)
