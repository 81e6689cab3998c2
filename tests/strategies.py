"""What the tests solve: operators of a prescribed spectrum, trees, right-hand sides.

The matrix of cases (solvers x spectra x scales x dtypes) is the data below; tests name subsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import strategies as st
from torch import Tensor

import hypergrad

F32, F64 = torch.float32, torch.float64
DTYPES = (F32, F64)
SCALES = (1e-8, 1.0, 1e8)

Spectrum = Callable[[int], Tensor]


def _clustered(n: int) -> Tensor:
    return torch.cat([torch.ones((n + 1) // 2, dtype=F64), torch.full((n // 2,), 1e-4, dtype=F64)])


def _padded(nonzero: Tensor, n: int) -> Tensor:
    return torch.cat([nonzero, torch.zeros(n - len(nonzero), dtype=F64)])


def _alternating(n: int) -> Tensor:
    values = torch.linspace(1.0, 0.1, n, dtype=F64)
    values[1::2] *= -1.0
    return values


#: Eigenvalues by dimension, of largest magnitude one.
POSITIVE: dict[str, Spectrum] = {
    "flat": lambda n: torch.ones(n, dtype=F64),
    "clustered": _clustered,
    "exponential": lambda n: torch.logspace(0, -6, n, dtype=F64),
    "inverse": lambda n: 1.0 / torch.arange(1, n + 1, dtype=F64),
    "outliers": lambda n: torch.where(torch.arange(n) < max(1, n // 10), 1.0, 1e-2).to(F64),
}
SINGULAR: dict[str, Spectrum] = {
    "half_rank": lambda n: _padded(torch.logspace(0, -3, max(1, n // 2), dtype=F64), n),
    "rank_one": lambda n: _padded(torch.ones(1, dtype=F64), n),
    "zero": lambda n: torch.zeros(n, dtype=F64),
}
INDEFINITE: dict[str, Spectrum] = {
    "alternating": _alternating,
    "one_negative": lambda n: torch.cat(
        [torch.linspace(1.0, 0.1, n - 1, dtype=F64), torch.tensor([-0.5], dtype=F64)]
    ),
    "negative": lambda n: -torch.logspace(0, -2, n, dtype=F64),
}
SPECTRA = POSITIVE | SINGULAR | INDEFINITE

#: One configuration of every solver, by dimension; the accurate ones solve what they are given.
SOLVERS: dict[str, Callable[[int], hypergrad.Solver]] = {
    "exact": lambda n: hypergrad.Exact(),
    "cg": lambda n: hypergrad.CG(rtol=1e-9),
    "neumann": lambda n: hypergrad.Neumann(num_terms=100),
    "nystrom": lambda n: hypergrad.Nystrom(rank=n, generator=generator(0)),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(n, n, seed=seed))[0]


@dataclass(frozen=True)
class Problem:
    """A symmetric float64 matrix with known eigenpairs (columns of ``basis``)."""

    eigenvalues: Tensor
    basis: Tensor
    matrix: Tensor

    @property
    def n(self) -> int:
        return len(self.matrix)

    @property
    def norm(self) -> float:
        return float(self.eigenvalues.abs().max())

    def hvp(self, dtype: torch.dtype = F64) -> Callable[[Tensor], Tensor]:
        matrix = self.matrix.to(dtype)
        return lambda v: matrix @ v


def symmetric(eigenvalues: Tensor, *, seed: int = 0, scale: float = 1.0, dead: int = 0) -> Problem:
    """Q diag Q' with Q random orthogonal, followed by ``dead`` rows and columns of zeros."""
    n = len(eigenvalues)
    values, basis = eigenvalues * scale, torch.eye(n + dead, dtype=F64)
    basis[:n, :n] = orthogonal(n, seed)
    values = _padded(values, n + dead)
    matrix = (basis * values) @ basis.T
    return Problem(values, basis, 0.5 * (matrix + matrix.T))


def dense_solve(matrix: Tensor, v: Tensor, damping: float = 0.0) -> Tensor:
    """(A + damping I)^-1 v for the float64 matrix as it is, far below float64 rounding.

    Residuals in extended precision make the refined answer accurate to rounding, so that the
    error seen in a test is the library's.
    """
    n = len(v)
    wide = matrix.numpy().astype(np.longdouble) + np.longdouble(damping) * np.eye(n)
    factor, pivots = torch.linalg.lu_factor(matrix + damping * torch.eye(n, dtype=F64))
    target = v.to(F64)
    x = np.zeros(n, dtype=np.longdouble)
    for _ in range(5):
        residual = torch.from_numpy((target.numpy() - wide @ x).astype(np.float64))
        x = x + torch.linalg.lu_solve(factor, pivots, residual[:, None])[:, 0].numpy()
    return torch.from_numpy(x.astype(np.float64))


def relative_error(got: Tensor, expected: Tensor) -> float:
    size = float(torch.linalg.vector_norm(expected.to(F64)))
    return float(torch.linalg.vector_norm(got.to(F64) - expected.to(F64))) / (size or 1.0)


def relative_residual(matrix: Tensor, damping: float, x: Tensor, v: Tensor) -> float:
    """|v - (A + damping I) x| / |v| in float64, safe for v of any scale."""
    unit = float(v.abs().max()) or 1.0
    v, x = v.to(F64) / unit, x.to(F64) / unit
    residual = v - matrix @ x - damping * x
    return float(torch.linalg.vector_norm(residual)) / (float(torch.linalg.vector_norm(v)) or 1.0)


def flat(tree: Any) -> Tensor:
    """The leaves of a tree of the insertion order of its dicts, as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in torch_pytree.tree_leaves(tree)])


def tree_like(tree: Any, vector: Tensor) -> Any:
    """A vector back in the structure of ``tree``."""
    leaves, spec = torch_pytree.tree_flatten(tree)
    pieces = torch.split(vector, [leaf.numel() for leaf in leaves])
    shaped = [p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(pieces, leaves, strict=True)]
    return torch_pytree.tree_unflatten(shaped, spec)


def tree_hvp(matrix: Tensor, like: Any) -> Callable[[Any], Any]:
    """The product of a matrix with trees, written independently of the library's own layout."""
    return lambda tree: tree_like(like, matrix.to(flat(tree).dtype) @ flat(tree))


# Strategies -------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31 - 1)
#: Powers of two are exact; the others round.
right_hand_scales = st.sampled_from([1.0, 1e-30, 1e30, 1e-12, 3.7, 2.0**-60, 2.0**40])


@st.composite
def problems(
    draw: st.DrawFn, spectra: dict[str, Spectrum] | None = None, max_dim: int = 12
) -> Problem:
    """A named spectrum, or eigenvalues drawn one by one, at a drawn size, scale and rotation."""
    table = POSITIVE if spectra is None else spectra
    name = draw(st.sampled_from([*table, "drawn"]))
    n = draw(st.integers(2, max_dim)) if "one_negative" in table else draw(st.integers(1, max_dim))
    if name != "drawn":
        eigenvalues = table[name](n)
    else:
        exponents = draw(st.lists(st.floats(-6.0, 0.0), min_size=n, max_size=n))
        eigenvalues = torch.tensor([10.0**e for e in exponents], dtype=F64)
        if table is INDEFINITE:
            eigenvalues[0] = -1.0
    dead = draw(st.sampled_from([0, 0, 3])) if table is SINGULAR else 0
    scale = draw(st.sampled_from(SCALES))
    return symmetric(eigenvalues, seed=draw(seeds), scale=scale, dead=dead)


_shapes = st.sampled_from([(), (1,), (2,), (3,), (2, 2), (1, 3), (2, 1, 2)])
_shape_trees = st.recursive(
    _shapes.map(lambda shape: ("leaf", shape)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: ("list", xs)),
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: ("tuple", xs)),
        st.dictionaries(st.sampled_from("wbcz"), inner, min_size=1, max_size=3).map(
            lambda d: ("dict", d)
        ),
    ),
    max_leaves=5,
)


@st.composite
def trees(draw: st.DrawFn, dtype: torch.dtype = F64) -> Any:
    """A tensor, or nested dicts, lists and tuples of tensors, 0-d leaves included."""
    source = generator(draw(seeds))

    def build(node: tuple[str, Any]) -> Any:
        kind, content = node
        if kind == "leaf":
            return torch.randn(content, generator=source, dtype=dtype)
        if kind == "dict":
            return {key: build(child) for key, child in content.items()}
        children = [build(child) for child in content]
        return tuple(children) if kind == "tuple" else children

    return build(draw(_shape_trees))


#: A property runs in the default suite with the profile's few examples, and once more among the
#: slow tests, whose profile draws new examples at each run and many more of them.
quick_and_thorough = pytest.mark.parametrize(
    "effort", ["quick", pytest.param("thorough", marks=pytest.mark.slow)]
)


def cg_iterations(condition: float, rtol: float) -> int:
    """Iterations after which CG has reached ``rtol`` in exact arithmetic (Chebyshev bound).

    In the residual norm, which the bound exceeds by the root of the condition number.
    """
    return math.ceil(0.5 * math.sqrt(condition) * math.log(2.0 * condition / rtol)) + 1
