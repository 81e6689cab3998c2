"""Where random numbers are drawn, and that the default device decides on nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.elsewhere.device import DEVICE, Generator, move
from tests.elsewhere.problems import (
    KINDS,
    MATRIX,
    PARAMS,
    SOLVERS,
    V,
    X,
    Y,
    assert_same,
    hessian,
    loss,
    model,
    squares,
    stay,
)


def times(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v


def value(x: Any) -> Tensor:
    return torch.tensor(float(x), device="cpu")


def drawn_by(kind: Any, to: Any, generator: torch.Generator) -> Any:
    solver = hypergrad.Nystrom(4, sketch=kind, generator=generator)
    return hypergrad.solve(to(MATRIX), to(V), solver, damping=0.1, on_failure="ignore").value


GENERATORS: dict[str, Callable[[Any, torch.Generator], Any]] = {
    **{
        kind: functools.partial(drawn_by, kind)
        for kind in KINDS
    },
    "rank": lambda to, g: hypergrad.solve(
        to(MATRIX), to(V), hypergrad.Nystrom("auto", generator=g), on_failure="ignore"
    ).value,
    "complement": lambda to, g: hypergrad.solve(
        to(MATRIX), to(V), hypergrad.Nystrom(4, complement="quadrature", generator=g),
        on_failure="ignore",
    ).value,
    "pcg": lambda to, g: hypergrad.nystrom_pcg_ihvp(
        to(MATRIX), to(V), rank=4, damping=0.1, generator=g
    ),
    "symmetry": lambda to, g: [hypergrad.check_symmetric(to(MATRIX), generator=g), to(V)][1],
    "sampled": lambda to, g: hypergrad.SampledOperator(to([MATRIX, MATRIX]), generator=g) @ to(V),
    "trace": lambda to, g: to(
        value(hypergrad.trace(to(MATRIX), num_hvps=10, generator=g).value)
    ),
    "diagonal": lambda to, g: hypergrad.diagonal(to(MATRIX), num_hvps=10, generator=g).value,
    "extremes": lambda to, g: to(
        value(hypergrad.extreme_eigenvalues(to(MATRIX), generator=g).largest)
    ),
    "fisher": lambda to, g: hypergrad.fisher(
        model, *to((PARAMS, X)), likelihood="gaussian", generator=g
    ) @ to(PARAMS),
    "fisher, distribution": lambda to, g: hypergrad.fisher(
        model, *to((PARAMS, X)), generator=g,
        likelihood=lambda out: torch.distributions.Normal(out, 1.0),
    ) @ to(PARAMS),
}  # fmt: skip


@pytest.mark.parametrize("place", ["cpu", DEVICE], ids=str)
@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS.keys())
def test_generators_of_any_device(make: Any, place: Any) -> None:
    """They draw where they are, and from nothing else."""
    found = []
    for to in (stay, move):
        before = torch.get_rng_state(), torch.elsewhere.get_rng_state()  # type: ignore[attr-defined]
        found.append(make(to, Generator(place).manual_seed(0)))
        after = torch.get_rng_state(), torch.elsewhere.get_rng_state()  # type: ignore[attr-defined]
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
    assert_same(found[0], found[1], 1e-4)


def solved_by(solver: Any, to: Any) -> Any:
    return hypergrad.solve(hessian(to), to(PARAMS), solver, damping=2.0, on_failure="ignore").value


DEFAULTS: dict[str, Callable[[Any], Any]] = {
    **{name: functools.partial(solved_by, solver) for name, solver in SOLVERS.items()},
    "cg, preconditioner": lambda to: hypergrad.solve(
        to(MATRIX), to(V), hypergrad.CG(preconditioner=lambda v: 0.5 * v)
    ).value,
    "gmres, preconditioner": lambda to: hypergrad.solve(
        to(MATRIX), to(V), hypergrad.GMRES(preconditioner=lambda v: 0.5 * v)
    ).value,
    "minres, preconditioner": lambda to: hypergrad.solve(
        to(MATRIX), to(V), hypergrad.MINRES(preconditioner=lambda v: 0.5 * v)
    ).value,
    "cg, of a callable": lambda to: hypergrad.cg_ihvp(times(to(MATRIX)), to(V)),
    "cg, of a matrix": lambda to: hypergrad.cg_ihvp(to(MATRIX), to(V)),
    "damping": lambda to: hypergrad.cg_ihvp(to(MATRIX), to(V), damping="auto"),
    "extremes": lambda to: to(value(hypergrad.extreme_eigenvalues(to(MATRIX)).largest)),
    "density": lambda to: hypergrad.spectral_density(to(MATRIX)).density(to(V)),
    "ggn": lambda to: hypergrad.ggn(model, squares, *to((PARAMS, X, Y))) @ to(PARAMS),
    "loader": lambda to: hypergrad.minibatch_hessian(loss, to(PARAMS), [to((X, Y))]) @ to(PARAMS),
    "sampled": lambda to: hypergrad.SampledOperator(to([MATRIX, MATRIX]), weights=[1.0, 2.0])
    @ to(V),
    "symmetry": lambda to: [hypergrad.check_symmetric(to(MATRIX)), to(V)][1],
    "lissa": lambda to: hypergrad.solve(
        hypergrad.SampledOperator(to([MATRIX, MATRIX])), to(V),
        hypergrad.Neumann(num_terms=5, num_samples=2), damping=0.5, on_failure="ignore",
    ).value,
    "trace": lambda to: to(value(hypergrad.trace(to(MATRIX), num_hvps=40).value)),
}  # fmt: skip


@pytest.mark.parametrize("make", DEFAULTS.values(), ids=DEFAULTS.keys())
@pytest.mark.parametrize("default", ["cpu", DEVICE], ids=str)
@pytest.mark.parametrize("to", [stay, move])
def test_the_default_device_decides_on_nothing(to: Any, default: Any, make: Any) -> None:
    """Answers are where the tensors are, whatever ``torch.set_default_device`` was given."""
    torch.manual_seed(0)
    expected = make(to)
    torch.manual_seed(0)
    with torch.device(default):
        found = make(to)
    assert_same(*((expected, found) if to is move else (move(expected), move(found))))
