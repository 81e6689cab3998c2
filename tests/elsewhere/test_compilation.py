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
        warnings.simplefilter("always")
        there = solved(move, True)
        told = len(found)
        again = solved(move, True)
    assert {x.category for x in found} == {hypergrad.CompilationWarning}
    assert len(found) == told  # one for each graph, and the second solve has none to tell of
    here = solved(stay, False)
    assert_same(here, there, 1e-4)
    assert_same(here, again, 1e-4)
