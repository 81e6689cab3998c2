"""A Gaussian sketch from float32 products, whose decisions are made on k x k numbers.

The squares of what float32 rounds are far above the rounding of float64.  So inner products, summed
in float64, tell all that the test matrix and its products have to tell: orthonormal rows, the core
and the eigenpairs are changes of basis among 3 k^2 numbers, which come to the host in one transfer
and are looked at there.  The one wide block that is formed is the basis itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pytree import row_norms
from .base import DampedSystem
from .core import ABOVE, Core
from .embedding import gaussian_rows

#: Numbers of a block that are widened at a time: what stays in a core's cache.
_SLICE = 2**17
#: Part of the products' rounding that the basis may be off from orthonormal by.
_SHARE = 1e-2


def is_narrow(system: DampedSystem, rank: int) -> bool:
    """Whether inner products in the working dtype resolve the products' rounding, squared.

    And whether Gaussian rows are so well conditioned that their Gram matrix serves; see
    :func:`hypergrad.solvers.embedding.orthonormal_rows`.
    """
    dtypes = (system.operator.dtype, system.b.dtype)
    return dtypes == (torch.float32, torch.float64) and 4 * rank <= system.operator.layout.dim


@dataclass(frozen=True)
class NarrowSketch:
    """The core of a Gaussian test matrix, with what it was made of.

    Attributes:
        core: of the orthonormal rows L^-1 Omega; its ``products`` are those of Omega itself.
        omega: test matrix, shape (k, n), in the dtype of the products.
        unmixing: L^-1, with L L' the Gram matrix of omega.
    """

    core: Core
    omega: Tensor
    unmixing: Tensor

    @classmethod
    def draw(
        cls, system: DampedSystem, rank: int, generator: torch.Generator | None
    ) -> NarrowSketch:
        """Draw a test matrix and multiply it: ``rank`` products in one block."""
        operator = system.operator
        n, wide = operator.layout.dim, system.b.dtype
        omega = gaussian_rows(rank, n, generator, operator.device).to(operator.dtype)
        y = system.narrow_product(omega)
        own, cross, squares = _inner_products(omega, y, wide)
        factor = torch.linalg.cholesky(own)
        eye = torch.eye(rank, dtype=own.dtype)
        unmixing = torch.linalg.solve_triangular(factor, eye, upper=False)
        core = Core.of_sums(
            unmixing @ cross @ unmixing.T,
            unmixing @ squares @ unmixing.T,
            y,
            operator.dtype,
        )
        return cls(core, omega, unmixing)

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """L of Y W^+ Y', and the combination of the products of Omega that U' is; on the host."""
        eigenvalues, combination = self.core.combinations()
        return eigenvalues, combination @ self.core.vectors.T @ self.unmixing

    def basis(self, combination: Tensor, eigenvalues: Tensor, wide: torch.dtype) -> Tensor:
        """U', orthonormal to far below the rounding of the products."""
        rows = combined_wide(combination, self.core.products, wide)
        if len(rows) == 0:
            return rows
        condition = float(eigenvalues[0] / eigenvalues[-1])
        if len(rows) * torch.finfo(wide).eps * condition > _SHARE * self.core.eps:
            # Combinations of nearly dependent rows: once more, from the rows themselves.
            gram = (rows @ rows.T).cpu()
            values, vectors = torch.linalg.eigh(0.5 * (gram + gram.T))
            rows = ((vectors / values.sqrt()) @ vectors.T).to(rows) @ rows
        return rows

    def wide_blocks(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """The orthonormal test rows and their products, in the working dtype."""
        return (
            combined_wide(self.unmixing, self.omega, wide),
            combined_wide(self.unmixing, self.core.products, wide),
        )

    def vouched(
        self, system: DampedSystem, eigenvalues: Tensor, combination: Tensor, check: bool
    ) -> bool:
        """Whether the largest eigenvalue can be one of a positive operator: l <= u'A u."""
        core = self.core
        if len(eigenvalues) == 0:
            return core.silent_throughout
        largest = float(eigenvalues[0])
        # |A| >= |A Omega| for orthonormal Omega, and then no product is needed.
        if not check or largest <= core.size * (1 + ABOVE):
            return True
        top = combined_wide(combination[:1], core.products, system.b.dtype)
        top = (top / row_norms(top)[:, None]).to(system.operator.dtype)
        image = system.narrow_product(top)
        along = torch.linalg.vecdot(top.to(system.b.dtype), image.to(system.b.dtype))
        return float(along) >= largest * (1 - ABOVE)


def combined_wide(coefficients: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
    """Coefficients (r, k) times narrow rows (k, n), in the wide dtype, a slice at a time."""
    coefficients = coefficients.to(device=rows.device, dtype=wide)
    out = torch.empty(len(coefficients), rows.shape[1], dtype=wide, device=rows.device)
    for part in _slices(rows):
        torch.matmul(coefficients, rows[:, part].to(wide), out=out[:, part])
    return out


def _inner_products(omega: Tensor, y: Tensor, wide: torch.dtype) -> list[Tensor]:
    """Omega Omega', Omega Y' and Y Y' on the host, summed in the wide dtype."""
    k = len(omega)
    total = torch.zeros(2 * k, 2 * k, dtype=wide, device=y.device)
    for part in _slices(y):
        both = torch.cat([omega[:, part], y[:, part]]).to(wide)
        total.addmm_(both, both.T)
    total = total.cpu()
    return [total[:k, :k], total[:k, k:], total[k:, k:]]


def _slices(rows: Tensor) -> list[slice]:
    if rows.device.type != "cpu":  # there a launch costs more than the memory
        return [slice(0, rows.shape[1])]
    step = max(1, _SLICE // max(1, len(rows)))
    return [slice(start, start + step) for start in range(0, rows.shape[1], step)]
