"""Code that runs is told from code that is traced, also beside a thread that compiles."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad.tracing import compiling
from tests.strategies import F64


def twice_where_traced(x: Tensor) -> Tensor:
    return 2.0 * x if compiling() else x


@pytest.fixture
def _compiling_elsewhere() -> Iterator[None]:
    """Another thread is in the middle of a compilation."""
    begun, over = threading.Event(), threading.Event()

    def backend(module: Any, inputs: Any) -> Any:
        begun.set()
        over.wait(60.0)
        return module.forward

    function = torch.compile(lambda x: x + 1.0, backend=backend)
    thread = threading.Thread(target=function, args=(torch.ones(3),))
    thread.start()
    try:
        assert begun.wait(60.0)
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("_compiling_elsewhere")
class TestBesideAThreadThatCompiles:
    def test_code_runs(self) -> None:
        assert not compiling()
        assert twice_where_traced(torch.ones(1)).item() == 1.0

    def test_solves_decide_on_values(self) -> None:
        matrix, v = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64)), torch.ones(3, dtype=F64)
        solution = hypergrad.solve(matrix, v)
        assert solution.info.converged
        assert isinstance(solution.info.residual_norm, float)
        assert solution.value.tolist() == pytest.approx([1.0, 0.5, 0.25])

    def test_a_fixed_amount_of_work_is_looked_at(self) -> None:
        matrix, v = torch.diag(torch.tensor([1.0, -2.0], dtype=F64)), torch.ones(2, dtype=F64)
        solver = hypergrad.CG(rtol=0.0, max_iters=2)
        info = hypergrad.solve(matrix, v, solver, on_failure="ignore").info
        assert info.status is hypergrad.Status.NEGATIVE_CURVATURE
        with pytest.raises(hypergrad.NonFiniteError):
            hypergrad.solve(matrix, torch.nan * v, solver)

    def test_solves_are_differentiable(self) -> None:
        matrix, v = torch.eye(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True)
        hypergrad.solve(2.0 * matrix, v, hypergrad.Exact()).value.sum().backward()
        assert v.grad is not None
        assert v.grad.tolist() == pytest.approx([0.5, 0.5])

    def test_params_that_moved_on_are_refused(self) -> None:
        w = torch.ones(2, dtype=F64)
        op = hypergrad.hessian(lambda w: (w**4).sum(), w)
        w.add_(1.0)
        with pytest.raises(hypergrad.StaleOperatorError):
            op @ w


def test_what_is_compiled_or_exported_is_traced() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice_where_traced(x)

    x = torch.ones(1)
    assert Module()(x).item() == 1.0
    assert torch.compile(Module(), backend="eager", fullgraph=True)(x).item() == 2.0
    for strict in (False, True):
        assert torch.export.export(Module(), (x,), strict=strict).module()(x).item() == 2.0
