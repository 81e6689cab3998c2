"""The one-call verbs: signatures, defaults, structure of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hypergrad
from tests.strategies import DTYPES, F64, flat, gaussian, generator, symmetric, tree_hvp

LIKE = {"w": torch.zeros(2, 2, dtype=F64), "b": [torch.zeros((), dtype=F64)]}
PROBLEM = symmetric(torch.linspace(1.0, 0.5, 5, dtype=F64), seed=1)
V: dict[str, Any] = {"w": gaussian(2, 2, seed=2), "b": [torch.tensor(1.0, dtype=F64)]}

VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any], hypergrad.Solver]] = {
    "exact": (hypergrad.exact_ihvp, {}, hypergrad.Exact()),
    "cg": (hypergrad.cg_ihvp, {"rtol": 1e-8}, hypergrad.CG(rtol=1e-8)),
    "neumann": (hypergrad.neumann_ihvp, {"num_terms": 80}, hypergrad.Neumann(num_terms=80)),
    "nystrom": (hypergrad.nystrom_ihvp, {"rank": 5}, hypergrad.Nystrom(rank=5)),
}
every_verb = pytest.mark.parametrize("name", VERBS)


@every_verb
def test_is_solve_with_its_solver(name: str) -> None:
    verb, options, solver = VERBS[name]
    hvp = tree_hvp(PROBLEM.matrix, LIKE)
    x, info = verb(hvp, V, damping=0.25, return_info=True, **options)
    expected = hypergrad.solve(hvp, V, solver, damping=0.25)
    torch.testing.assert_close(flat(x), flat(expected.value), rtol=1e-9, atol=1e-12)
    assert info.solver == solver
    alone = verb(hvp, V, damping=0.25, **options)
    torch.testing.assert_close(flat(alone), flat(x), rtol=1e-9, atol=1e-12)


@every_verb
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_have_the_structure_dtype_and_device_of_v(name: str, dtype: torch.dtype) -> None:
    verb, options, _ = VERBS[name]
    v = {"w": V["w"].to(dtype), "b": [V["b"][0].to(dtype)]}
    options = options | ({"rtol": 1e-5} if name == "cg" else {})
    x = verb(tree_hvp(PROBLEM.matrix.to(dtype), v), v, damping=0.25, **options)
    assert list(x) == ["w", "b"]
    assert isinstance(x["b"], list)
    assert x["w"].shape == (2, 2)
    assert x["b"][0].shape == ()
    assert x["w"].dtype == x["b"][0].dtype == dtype
    assert x["w"].device == v["w"].device


def test_signatures_are_those_promised() -> None:
    promised: dict[str, dict[str, Any]] = {
        "exact": {"damping": 0.0},
        "cg": {
            "damping": 0.0, "rtol": 1e-5, "atol": 0.0, "max_iters": None,
            "preconditioner": None, "x0": None,
        },
        "neumann": {"damping": 0.0, "num_terms": 20, "step_size": "auto"},
        "nystrom": {
            "rank": inspect.Parameter.empty, "damping": "auto", "sketch": "gaussian",
            "generator": None,
        },
    }  # fmt: skip
    for name, (verb, _, _) in VERBS.items():
        parameters = list(inspect.signature(verb).parameters.values())
        assert [p.name for p in parameters[:2]] == ["hvp_fn", "v"]
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
        defaults = {p.name: p.default for p in parameters[2:]}
        assert defaults == promised[name] | {"return_info": False}


def test_the_options_of_each_verb_reach_its_solver() -> None:
    eye = torch.eye(4)
    v = torch.ones(4)
    _, info = hypergrad.cg_ihvp(
        eye, v, rtol=1e-3, atol=1e-2, max_iters=7, preconditioner=eye, return_info=True
    )
    assert (info.solver.rtol, info.solver.atol, info.solver.max_iters) == (1e-3, 1e-2, 7)
    assert info.solver.preconditioner is eye
    source = generator(0)
    _, info = hypergrad.nystrom_ihvp(
        eye, v, rank=2, damping=3.0, sketch="columns", generator=source, return_info=True
    )
    assert info.solver == hypergrad.Nystrom(2, sketch="columns", generator=source)
    _, info = hypergrad.neumann_ihvp(eye, v, num_terms=3, step_size=0.5, return_info=True)
    assert info.solver == hypergrad.Neumann(num_terms=3, step_size=0.5)


def test_every_format_of_an_operator_serves() -> None:
    expected = hypergrad.exact_ihvp(PROBLEM.matrix, gaussian(5))
    for form in (PROBLEM.hvp(), PROBLEM.matrix.numpy(), hypergrad.as_operator(PROBLEM.matrix)):
        torch.testing.assert_close(hypergrad.exact_ihvp(form, gaussian(5)), expected)
