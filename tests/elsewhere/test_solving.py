"""What can be asked of a solve, on another device: as on the CPU, or the same error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.elsewhere.device import move
from tests.elsewhere.problems import (
    KINDS,
    MATRIX,
    PARAMS,
    SOLVERS,
    N,
    V,
    X,
    Y,
    compare,
    compare_errors,
    gaussian,
    hessian,
    loss,
    model,
    seeded,
    squares,
)


def batch(to: Any, count: int = 3) -> Any:
    return to({name: gaussian(count, *p.shape, seed=7) for name, p in PARAMS.items()})


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_many_right_hand_sides(solver: Any) -> None:
    def solved(to: Any) -> Any:
        return hypergrad.solve(
            hessian(to), batch(to), solver, damping=2.0, batched=True, on_failure="ignore"
        ).value

    compare(solved)


WARM = ["cg", "minres", "gmres", "neumann", "pcg", "auto"]


@pytest.mark.parametrize("name", WARM)
def test_warm_starts(name: str) -> None:
    def solved(to: Any) -> Any:
        near = hypergrad.solve(hessian(to), to(PARAMS), damping=2.1).value
        return hypergrad.solve(
            hessian(to), to(PARAMS), SOLVERS[name], damping=2.0, x0=near, on_failure="ignore"
        ).value

    compare(solved)
    with pytest.raises(hypergrad.DeviceError):
        hypergrad.solve(hessian(move), move(PARAMS), SOLVERS[name], damping=2.0, x0=PARAMS)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "identity"])
def test_a_damping_that_is_chosen(name: str) -> None:
    def solved(to: Any) -> Any:
        found = hypergrad.solve(
            to(MATRIX), to(V), SOLVERS[name], damping="auto", on_failure="ignore"
        )
        return found.value, to(torch.tensor(float(found.info.damping)))

    compare(solved, rtol=1e-3)


def ihvps(a: Any, v: Any) -> Any:
    return (
        hypergrad.cg_ihvp(a, v, damping=0.1),
        hypergrad.exact_ihvp(a, v, damping=0.1),
        hypergrad.minres_ihvp(a, v, damping=0.1),
        hypergrad.neumann_ihvp(a, v, damping=0.1, num_terms=200),
        hypergrad.nystrom_ihvp(a, v, rank=N, damping=0.1),
        hypergrad.nystrom_ihvp(a, v, rank=5, generator=seeded()),
        hypergrad.nystrom_pcg_ihvp(a, v, rank=5, damping=0.1, generator=seeded()),
    )


def test_the_verbs() -> None:
    compare(lambda to: ihvps(to(MATRIX), to(V)), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_made_used_and_updated(kind: Any) -> None:
    def sketched(to: Any) -> Any:
        sketch = hypergrad.nystrom_sketch(
            hessian(to), 6, like=to(PARAMS), sketch=kind, generator=seeded()
        )
        sketch = sketch.update(hessian(to), generator=seeded())
        numbers = [
            sketch.error_estimate(hessian(to)).largest,
            float(sketch.effective_dimension(0.5)),
            sketch.trace(hessian(to), generator=seeded()),
        ]
        preconditioner = sketch.preconditioner(0.5)
        found = hypergrad.solve(
            hessian(to), to(PARAMS), hypergrad.CG(preconditioner=preconditioner), damping=1.5
        )
        return (
            sketch.solve(to(PARAMS), 0.5), preconditioner @ to(PARAMS), found.value,
            to(torch.tensor(numbers)), to(torch.as_tensor(sketch.eigenvalues).cpu()),
        )  # fmt: skip

    compare(sketched, rtol=1e-3)


def test_a_sketch_that_is_reused() -> None:
    def solved(to: Any) -> Any:
        carried = hypergrad.ReusedSketch(hypergrad.Nystrom(rank=6), max_residual=0.2)
        by = functools.partial(hypergrad.solve, damping=0.5, on_failure="ignore")
        return [by(to(MATRIX) * size, to(V), carried).value for size in (1.0, 1.01, 4.0)]

    compare(solved, rtol=1e-4)


def test_a_sketch_that_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for very many parameters."""
    asked: list[Any] = []

    def worth_streaming(*size: int) -> bool:
        asked.append(size)
        return True

    monkeypatch.setattr("hypergrad.solvers.sketching.worth_streaming", worth_streaming)

    def solved(to: Any) -> Any:
        a = hypergrad.ggn(model, squares, *to((PARAMS, X, Y)))
        solvers = [
            hypergrad.Nystrom(rank=5, generator=seeded()),
            hypergrad.Nystrom(rank=5, generator=seeded(), complement="zero"),
            hypergrad.Nystrom(rank=5, generator=seeded(), complement="quadrature"),
        ]
        return [
            hypergrad.solve(a, to(PARAMS), solver, damping=0.5, on_failure="ignore").value
            for solver in solvers
        ]

    compare(solved, rtol=1e-4)
    assert len(asked) == 6


def test_few_rows() -> None:
    def solved(to: Any) -> Any:
        a = hypergrad.ggn(model, squares, *to((PARAMS, X[:5], Y[:5])))
        rows = hypergrad.root_operator(to({"w": gaussian(5, 9), "b": gaussian(5, 3)}))
        v = to({"w": gaussian(9), "b": gaussian(3)})
        return (
            hypergrad.solve(a, to(PARAMS), hypergrad.Gram(), damping=0.1).value,
            hypergrad.solve(a, batch(to), hypergrad.Gram(), damping=0.1, batched=True).value,
            hypergrad.solve(rows, v, hypergrad.Gram(), damping=0.1).value,
            hypergrad.solve(rows, rows @ v, hypergrad.Gram()).value,
        )

    compare(solved, rtol=1e-4)


def test_backward_passes() -> None:
    """To the matrix, to v and to the damping; of first and second order."""

    def grads(to: Any) -> Any:
        a, v, d = (to(x).detach().requires_grad_() for x in (MATRIX, V, torch.tensor(0.3)))
        x = hypergrad.solve(a, v, hypergrad.CG(rtol=1e-6), damping=d).value
        first = torch.autograd.grad(x.square().sum(), [a, v, d], create_graph=True)
        size = sum(g.square().sum() for g in first)
        return x, first, torch.autograd.grad(torch.as_tensor(size), [a, v, d])

    compare(grads, rtol=1e-4)


@pytest.mark.parametrize("name", ["exact", "cg", "minres", "nystrom", "neumann", "pcg"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "callable"])
def test_gradients_through_operators(kind: str, name: str) -> None:
    def grads(to: Any) -> Any:
        params = {k: to(p).detach().requires_grad_() for k, p in PARAMS.items()}
        x, y = to((X, Y))
        a: Any
        if kind == "hessian":
            a = hypergrad.hessian(loss, params, x, y)
        elif kind == "ggn":
            a = hypergrad.ggn(model, squares, params, x, y)
        else:

            def a(v: Any) -> Any:
                return {k: (2 + params[k] ** 2) * v[k] for k in v}

        found = hypergrad.solve(a, to(PARAMS), SOLVERS[name], damping=3.0, on_failure="ignore")
        size = sum(leaf.square().sum() for leaf in found.value.values())
        return torch.autograd.grad(size, list(params.values()))

    compare(grads, rtol=1e-3)


def inverse(a: Tensor, v: Tensor) -> Tensor:
    found: Tensor = hypergrad.solve(a, v, hypergrad.CG(rtol=1e-6), damping=0.1).value
    return found


def test_transforms() -> None:
    func = torch.func
    compare(lambda to: func.jvp(inverse, to((MATRIX, V)), to((MATRIX, V))), rtol=1e-4)
    compare(lambda to: func.vmap(inverse, (None, 0))(to(MATRIX), to(gaussian(3, N))), rtol=1e-4)
    compare(
        lambda to: func.vmap(inverse)(
            to(torch.stack([MATRIX, 2 * MATRIX])), to(gaussian(2, N))
        ),
        rtol=1e-4,
    )  # fmt: skip
    compare(lambda to: func.jacrev(inverse, 1)(*to((MATRIX, V))), rtol=1e-4)
    compare(lambda to: func.jacfwd(inverse, 1)(*to((MATRIX, V))), rtol=1e-4)
    compare(
        lambda to: func.hessian(lambda v: inverse(to(MATRIX), v).pow(3).sum())(to(V)), rtol=1e-4
    )


def solving(make: Callable[[Any], Any], solver: Any = None, **options: Any) -> Callable[[Any], Any]:
    return lambda to: hypergrad.solve(
        make(to), to(V), solver or hypergrad.CG(), **{"on_failure": "raise", **options}
    )


BROKEN = torch.where(torch.eye(N) > 0, torch.nan, MATRIX)
ERRORS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "negative curvature": (solving(lambda to: to(-MATRIX)), hypergrad.ConvergenceError),
    "negative curvature, nystrom": (
        solving(lambda to: to(-MATRIX), hypergrad.Nystrom(3, negative_curvature="raise")),
        hypergrad.NegativeCurvatureError,
    ),
    "not symmetric": (
        solving(lambda to: to(gaussian(N, N)), hypergrad.Exact()), hypergrad.NotSymmetricError,
    ),
    "nan": (solving(lambda to: to(BROKEN)), hypergrad.NonFiniteError),
    "nan in v": (
        lambda to: hypergrad.solve(to(MATRIX), to(V * torch.nan)), hypergrad.NonFiniteError,
    ),
    "nan, nystrom": (
        solving(lambda to: to(BROKEN), hypergrad.Nystrom(rank=3, generator=seeded())),
        hypergrad.NonFiniteError,
    ),
    "iterations": (
        solving(lambda to: to(MATRIX), hypergrad.CG(max_iters=2)), hypergrad.ConvergenceError,
    ),
    "damping": (solving(lambda to: to(MATRIX), damping=-1.0), hypergrad.DampingError),
    "memory": (
        solving(lambda to: to(MATRIX), hypergrad.Exact(max_bytes=8)),
        hypergrad.OperatorTooLargeError,
    ),
    "rank": (
        lambda to: hypergrad.nystrom_ihvp(to(MATRIX), to(V), rank=N + 1), hypergrad.RankError,
    ),
    "preconditioner": (
        solving(lambda to: to(MATRIX), hypergrad.CG(preconditioner=lambda v: -v)),
        hypergrad.PreconditionerError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_those_of_the_cpu(make: Any, error: Any) -> None:
    compare_errors(make, error)


def test_what_does_not_fit_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA and XPU, by what the device says is free."""
    module: Any = torch.elsewhere  # type: ignore[attr-defined]
    for name, answer in (
        ("mem_get_info", (700, 10_000)), ("memory_reserved", 300), ("memory_allocated", 200),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda device, a=answer: a, raising=False)
    with pytest.raises(hypergrad.OperatorTooLargeError, match="that elsewhere:0 has free"):
        hypergrad.solve(move(MATRIX), move(V), hypergrad.Exact())
