"""How right: log10 of the relative error against the dense float64 solution.

The problem is (A + damping I) x = v with the A that the solver is given: in float32, A of the
rounded factors, so that the figure is the solver's error and not that of the rounding of A.
-16 is all of float64, -7 all of float32, 0 no correct digit, inf no finite answer or none at all:
NaN for asv, which shows "n/a" and cannot publish anything infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

import hypergrad

from .problems import DIM, SPECTRA, Spectral, spectral
from .timing import single_threaded

Sketch: TypeAlias = Literal["gaussian", "columns"]

#: Above the 20 non-zero eigenvalues of the low-rank spectra, so that all are within reach.
RANK = 30
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DAMPINGS = (1e-2, 1e-4, 1e-6)
SCALES = (1e-30, 1e-15, 1.0, 1e15, 1e30)


def _omega(dim: int, rank: int, sketch: Sketch, dtype: torch.dtype) -> Tensor:
    """Omega, shape (dim, rank): orthonormal, or columns of the identity."""
    generator = torch.Generator().manual_seed(2)
    if sketch == "columns":
        return torch.eye(dim, dtype=dtype)[:, torch.randperm(dim, generator=generator)[:rank]]
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    omega: Tensor = torch.linalg.qr(gaussian).Q.to(dtype)
    return omega


def woodbury(a: Spectral, v: Tensor, damping: float, sketch: Sketch = "gaussian") -> Tensor:
    """v/rho - Y (W + Y'Y/rho)^-1 Y'v / rho^2, all in the dtype of the products.

    The form to be better than, and the usual way to write it (Hataya and Yamada, AISTATS 2023).
    In exact arithmetic it is the library's map with ``complement="zero"``.
    """
    omega = _omega(len(v), min(RANK, len(v)), sketch, v.dtype)
    y = torch.func.vmap(a, in_dims=1, out_dims=1)(omega)
    core = omega.T @ y
    inner: Tensor
    inner, singular = torch.linalg.solve_ex(core + y.T @ y / damping, y.T @ v)
    if int(singular):
        return torch.full_like(v, math.nan)
    return v / damping - y @ inner / damping**2


def nystrom(a: Spectral, v: Tensor, damping: float, sketch: Sketch = "gaussian") -> Tensor:
    generator = torch.Generator().manual_seed(2)
    config = hypergrad.Nystrom(min(RANK, len(v)), sketch, generator)
    return _value(a, v, config, damping)


def _value(a: Spectral, v: Tensor, solver: hypergrad.Solver, damping: float) -> Tensor:
    # A failed solve returns its best answer and says so; the error is what is tracked here.
    value: Tensor = hypergrad.solve(a, v, solver, damping=damping, on_failure="ignore").value
    return value


def _exact(a: Spectral, v: Tensor, damping: float) -> Tensor:
    return _value(a, v, hypergrad.Exact(), damping)


def _cg(a: Spectral, v: Tensor, damping: float) -> Tensor:
    rtol = 1e-6 if v.dtype == torch.float32 else 1e-14
    return _value(a, v, hypergrad.CG(rtol=rtol), damping)


def _neumann(a: Spectral, v: Tensor, damping: float) -> Tensor:
    return _value(a, v, hypergrad.Neumann(num_terms=1000), damping)


SOLVERS: dict[str, Callable[[Spectral, Tensor, float], Tensor]] = {
    "exact": _exact,
    "cg": _cg,
    "neumann": _neumann,
    "nystrom": nystrom,
    "nystrom columns": lambda a, v, damping: nystrom(a, v, damping, "columns"),
    "woodbury": woodbury,
    "woodbury columns": lambda a, v, damping: woodbury(a, v, damping, "columns"),
}


def log10_error(
    solver: str, spectrum: str, dtype: str, damping: float, scale: float = 1.0, dim: int = DIM
) -> float:
    a = spectral(spectrum, DTYPES[dtype], dim)
    generator = torch.Generator().manual_seed(1)
    v = (torch.randn(dim, generator=generator, dtype=torch.float64) * scale).to(DTYPES[dtype])
    damped = a.dense() + damping * torch.eye(dim, dtype=torch.float64)
    truth = torch.linalg.solve(damped, v.double() / scale)
    try:
        x = SOLVERS[solver](a, v, damping).double() / scale
    except hypergrad.HypergradError:  # a refusal is no answer either
        return math.inf
    error = float(torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth))
    # Nothing is more accurate than the reference itself.
    return round(math.log10(max(error, 1e-17)), 2) if math.isfinite(error) else math.inf


def shown(error: float) -> float:
    """What asv is given of an error."""
    return error if math.isfinite(error) else math.nan


class Errors:
    """Solver x spectrum x dtype x damping, for a v of norm about 14."""

    params: ClassVar[tuple[list[str], list[str], list[str], list[float]]] = (
        list(SOLVERS), list(SPECTRA), list(DTYPES), list(DAMPINGS),
    )  # fmt: skip
    param_names: ClassVar[list[str]] = ["solver", "spectrum", "dtype", "damping"]
    unit = "log10 relative error"

    def setup(self, solver: str, spectrum: str, dtype: str, damping: float) -> None:
        single_threaded()

    def track_error(self, solver: str, spectrum: str, dtype: str, damping: float) -> float:
        return shown(log10_error(solver, spectrum, dtype, damping))


#: A few cells of the atlas (``benchmarks/atlas``): spectrum, condition, damping.
CELLS: dict[str, tuple[str, float | None, float]] = {
    "flat 1e4": ("flat", 1e4, 1e-13),
    "exponential": ("exponential", None, 1e-4),
    "1/i": ("1/i", None, 1e-4),
    "rank-deficient": ("rank-deficient", None, 1e-4),
    "indefinite": ("indefinite", None, 1e-4),
}
#: Solvers at about a hundred products, half the dimension: name in the library, options.
AT_100: dict[str, dict[str, Any]] = {
    "CG": {"rtol": 1e-15, "max_iters": 97},
    "MINRES": {"rtol": 1e-15, "max_iters": 97},
    "NystromPCG": {"rank": 33, "rtol": 1e-15, "max_iters": 60},
    "Nystrom": {"rank": 98},
}


def log10_error_at_100(solver: str, cell: str, dim: int = DIM) -> float:
    spectrum, condition, damping = CELLS[cell]
    a = spectral(spectrum, torch.float64, dim, condition=condition)
    v = torch.randn(dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = torch.linalg.solve(a.dense() + damping * torch.eye(dim, dtype=torch.float64), v)
    options = dict(AT_100[solver])
    if "rank" in options:
        generator = torch.Generator().manual_seed(2)
        options |= {"rank": min(options["rank"], dim), "generator": generator}
    x = _value(a, v, getattr(hypergrad, solver)(**options), damping)
    error = float(torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth))
    return round(math.log10(max(error, 1e-17)), 2) if math.isfinite(error) else math.inf


class Atlas:
    """A few cells of the stability atlas: the error after about a hundred products."""

    params: ClassVar[tuple[list[str], list[str]]] = (list(AT_100), list(CELLS))
    param_names: ClassVar[list[str]] = ["solver", "cell"]
    unit = "log10 relative error"

    def setup(self, solver: str, cell: str) -> None:
        single_threaded()

    def track_error_at_100(self, solver: str, cell: str) -> float:
        return shown(log10_error_at_100(solver, cell))


class Scales:
    """The same solve of a scaled v, on the rank-deficient spectrum at damping 1e-2."""

    params: ClassVar[tuple[list[str], list[str], list[float]]] = (
        list(SOLVERS), list(DTYPES), list(SCALES),
    )  # fmt: skip
    param_names: ClassVar[list[str]] = ["solver", "dtype", "scale"]
    unit = "log10 relative error"

    def setup(self, solver: str, dtype: str, scale: float) -> None:
        single_threaded()

    def track_error(self, solver: str, dtype: str, scale: float) -> float:
        return shown(log10_error(solver, "rank-deficient", dtype, 1e-2, scale))
