"""How right: log10 of the relative error against the dense float64 solution.

The problem is (A + damping I) x = v with the A that the solver is given: in float32, A as it is
after rounding, so that the figure is the solver's error and not that of the rounding of A.
-16 is all of float64, -7 all of float32, 0 no correct digit, inf no finite answer or none at all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

import hypergrad

from .problems import DIM, SPECTRA, matrix
from .timing import single_threaded

#: Above the 20 non-zero eigenvalues of the low-rank spectra, so that all are within reach.
RANK = 30
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DAMPINGS = (1e-2, 1e-4, 1e-6)
SCALES = (1e-30, 1e-15, 1.0, 1e15, 1e30)


def test_matrix(dim: int, rank: int, sketch: str, dtype: torch.dtype) -> Tensor:
    """Omega, shape (dim, rank): orthonormal, or columns of the identity."""
    generator = torch.Generator().manual_seed(2)
    if sketch == "columns":
        return torch.eye(dim, dtype=dtype)[:, torch.randperm(dim, generator=generator)[:rank]]
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.to(dtype)


def woodbury(a: Tensor, v: Tensor, damping: float, sketch: str = "gaussian") -> Tensor:
    """v/rho - Y (W + Y'Y/rho)^-1 Y'v / rho^2, in the dtype of A: the form to be better than.

    It is the same map as the library's Nyström in exact arithmetic, and how the method is
    usually written (Hataya and Yamada, AISTATS 2023, equation 6).
    """
    omega = test_matrix(len(a), min(RANK, len(a)), sketch, a.dtype)
    y = a @ omega
    core = omega.T @ y
    inner = torch.linalg.solve(core + y.T @ y / damping, y.T @ v)
    return v / damping - y @ inner / damping**2


def nystrom(a: Tensor, v: Tensor, damping: float, sketch: str = "gaussian") -> Tensor:
    generator = torch.Generator().manual_seed(2)
    kind = "columns" if sketch == "columns" else "gaussian"
    config = hypergrad.Nystrom(min(RANK, len(a)), kind, generator)
    return _value(a, v, config, damping)


def _value(a: Tensor, v: Tensor, solver: hypergrad.Solver, damping: float) -> Tensor:
    # A failed solve returns its best answer and says so; the error is what is tracked here.
    value: Tensor = hypergrad.solve(a, v, solver, damping=damping, on_failure="ignore").value
    return value


def _exact(a: Tensor, v: Tensor, damping: float) -> Tensor:
    return _value(a, v, hypergrad.Exact(), damping)


def _cg(a: Tensor, v: Tensor, damping: float) -> Tensor:
    rtol = 1e-6 if a.dtype == torch.float32 else 1e-14
    return _value(a, v, hypergrad.CG(rtol=rtol), damping)


def _neumann(a: Tensor, v: Tensor, damping: float) -> Tensor:
    return _value(a, v, hypergrad.Neumann(num_terms=1000), damping)


SOLVERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
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
    a = matrix(spectrum, dim).to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(dim, generator=generator, dtype=torch.float64).to(a.dtype)
    v = (v.double() * scale).to(a.dtype)
    damped = a.double() + damping * torch.eye(dim, dtype=torch.float64)
    truth = torch.linalg.solve(damped, v.double() / scale)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            x = SOLVERS[solver](a, v, damping).double() / scale
    except torch.linalg.LinAlgError:  # the raw form meets a singular matrix
        return math.inf
    error = float(torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth))
    # Nothing is more accurate than the reference itself.
    return math.log10(max(error, 1e-17)) if math.isfinite(error) else math.inf


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
        return log10_error(solver, spectrum, dtype, damping)


class Scales:
    """The same solve of a scaled v, on the exponential spectrum at damping 1e-2."""

    params: ClassVar[tuple[list[str], list[str], list[float]]] = (
        list(SOLVERS), list(DTYPES), list(SCALES),
    )  # fmt: skip
    param_names: ClassVar[list[str]] = ["solver", "dtype", "scale"]
    unit = "log10 relative error"

    def setup(self, solver: str, dtype: str, scale: float) -> None:
        single_threaded()

    def track_error(self, solver: str, dtype: str, scale: float) -> float:
        return log10_error(solver, "exponential", dtype, 1e-2, scale)
