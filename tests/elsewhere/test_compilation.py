"""What is to be compiled falls back where PyTorch's compiler knows no such device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hypergrad
from hypergrad.operators import compilation
from tests.elsewhere.device import move
from tests.elsewhere.problems import PARAMS, X, Y, assert_same, loss, model, seeded, squares, stay

SOLVERS: dict[str, Any] = {
    "cg": hypergrad.CG,
    "cg, orthogonal": lambda compile: hypergrad.CG(reorthogonalize=True, compile=compile),
    "minres": hypergrad.MINRES,
    "gmres": hypergrad.GMRES,
    "neumann": lambda compile: hypergrad.Neumann(num_terms=20, compile=compile),
    "nystrom": lambda compile: hypergrad.Nystrom(rank=5, generator=seeded(), compile=compile),
}


def of_compilation(found: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [x for x in found if issubclass(x.category, hypergrad.CompilationWarning)]


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_one_warning_and_the_answer_of_the_cpu(make: Any, kind: str) -> None:
    compilation.forget_compiled()
    torch._dynamo.reset()

    def solved(to: Any, compile: bool) -> Any:
        params, x, y = to((PARAMS, X, Y))
        a: Any = (
            hypergrad.hessian(loss, params, x, y, compile=compile)
            if kind == "hessian"
            else hypergrad.ggn(model, squares, params, x, y, compile=compile)
        )
        return hypergrad.solve(
            a, params, make(compile=compile), damping=2.0, on_failure="ignore"
        ).value

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", hypergrad.CompilationWarning)
        there = solved(move, True)
        told = len(of_compilation(found))
        again = solved(move, True)
    # One for each graph, of the products and of the solve; the second solve has none to tell of.
    assert 1 <= told <= 2
    assert len(of_compilation(found)) == told
    here = solved(stay, False)
    assert_same(here, there, 1e-4)
    assert_same(here, again, 1e-4)
