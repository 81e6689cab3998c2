"""A Gaussian sketch from float32 products, whose decisions are made on k x k numbers.

The squares of what float32 rounds are far above the rounding of float64.  So inner products, summed
in float64, tell all that the test matrix and its products have to tell: orthonormal rows, the core
and the eigenpairs are changes of basis among some k x k numbers, which come to the host in one
transfer and are looked at there.  Where the sketch serves one solve no wide block is formed at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..norms import row_norms
from ..spectrum import damping_from_extremes
from .base import DampedSystem
from .core import ABOVE, Check, Core, Numbers
from .embedding import gaussian_rows

#: Numbers of a block that are widened at a time: what stays in a core's cache.
_SLICE = 2**16
#: Part of the products' rounding that the basis may be off from orthonormal by.
_SHARE = 1e-2
#: By how much the largest eigenvalue may exceed an estimate of |A| before a product looks at it.
#: Of a positive operator it does that in about one of a hundred sketches of rank 10.
_FACTOR = 2.0
#: Of a normal number, the quantile of one hundredth, without its sign.
_ONE_PERCENT = 2.326


def is_narrow(system: DampedSystem, rank: int) -> bool:
    """Whether inner products in the working dtype resolve the products' rounding, squared.

    And whether Gaussian rows are so well conditioned that their Gram matrix serves; see
    :func:`hypergrad.solvers.embedding.orthonormal_rows`.
    """
    dtypes = (system.operator.dtype, system.b.dtype)
    return dtypes == (torch.float32, torch.float64) and 4 * rank <= system.operator.layout.dim


@dataclass(frozen=True, eq=False)
class NarrowSketch:
    """The core of a Gaussian test matrix, with what it was made of.

    Attributes:
        core: of the orthonormal rows L^-1 Omega; its ``products`` are those of Omega itself.
        omega: test matrix, shape (k, n), in the dtype of the products.
        unmixing: L^-1, with L L' the Gram matrix of omega.
        cross: Omega Y', shape (k, k).
        squares: Y Y', shape (k, k).
        block: right-hand sides, shape (m, n).
        along: Y times those, shape (k, m).
    """

    core: Core
    omega: Tensor
    unmixing: Numbers
    cross: Numbers
    squares: Numbers
    block: Tensor
    along: Numbers

    @classmethod
    def draw(
        cls, system: DampedSystem, rank: int, generator: torch.Generator | None
    ) -> NarrowSketch:
        """Draw a test matrix and multiply it: ``rank`` products in one block."""
        operator = system.operator
        omega = gaussian_rows(rank, operator.layout.dim, generator, operator.device)
        return cls.multiplied(system, omega)

    @classmethod
    def multiplied(cls, system: DampedSystem, omega: Tensor) -> NarrowSketch:
        """Multiply a test matrix that is drawn."""
        operator = system.operator
        y = operator._apply(omega)
        system.num_hvps += len(omega)
        return cls.of_sums(system, omega, y, _inner_products(omega, y, system.b))

    @classmethod
    def of_sums(cls, system: DampedSystem, omega: Tensor, y: Tensor, sums: Numbers) -> NarrowSketch:
        """Of a test matrix, its products, and their inner products as they come to the host."""
        operator, k = system.operator, len(omega)
        known = sums[: -k * k].reshape(-1, 2 * k)
        own, cross, squares = sums[-k * k :].reshape(k, k), known[:k, :k].T, known[:k, k:]
        along = known[k:, k:].T
        if not np.isfinite(squares).all():  # as soon as one entry is not
            operator.layout.check_finite(y, "the output of the operator")
        unmixing = np.linalg.inv(np.linalg.cholesky(own))
        core = Core.of_sums(
            unmixing @ cross @ unmixing.T, unmixing @ squares @ unmixing.T, y, operator.dtype
        )
        return cls(core, omega, unmixing, cross, squares, system.b, along)

    @cached_property
    def eigenpairs(self) -> tuple[Numbers, Numbers]:
        """L of Y W^+ Y', and the combination of the products of Omega that U' is."""
        eigenvalues, combination = self.core.combinations()
        return eigenvalues, combination @ self.core.vectors.T @ self.unmixing

    def resolved(self, eigenvalues: Numbers) -> bool:
        """Whether combinations of the products are orthonormal to far below their rounding."""
        if len(eigenvalues) == 0:
            return True
        condition = float(eigenvalues[0] / eigenvalues[-1])
        rounding = len(eigenvalues) * float(np.finfo(eigenvalues.dtype).eps)
        return rounding * condition <= _SHARE * self.core.eps

    def basis(self, combination: Numbers, eigenvalues: Numbers, wide: torch.dtype) -> Tensor:
        """U', orthonormal to far below the rounding of the products."""
        rows = combined_wide(combination, self.core.products, wide)
        if not self.resolved(eigenvalues):
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
        self, system: DampedSystem, eigenvalues: Numbers, combination: Numbers, check: Check
    ) -> bool:
        """Whether the largest eigenvalue can be one of a positive operator: l <= u'A u <= |A|."""
        core = self.core
        if len(eigenvalues) == 0:
            return core.silent_throughout
        largest = float(eigenvalues[0])
        # |A| >= |A Omega| for orthonormal Omega, and then no product is needed.
        if check is False or largest <= core.size * (1 + ABOVE):
            return True
        if check == "estimate" and largest <= _FACTOR * self._size():
            return True
        top = combined_wide(combination[:1], core.products, system.b.dtype)
        top = (top / row_norms(top)[:, None]).to(system.operator.dtype)
        image = system.narrow_product(top)
        along = torch.linalg.vecdot(top.to(system.b.dtype), image.to(system.b.dtype))
        return float(along) >= largest * (1 - ABOVE)

    def _size(self) -> float:
        """An estimate of |A|, from above, that knows nothing of signs.

        For independent Gaussian g and h the mean of (g'A^2 h)^2 is the sum of the fourth powers of
        the eigenvalues, whose fourth root exceeds the largest by little where they decay.
        """
        k, n = len(self.squares), self.omega.shape[1]
        if k == 1:
            return 0.0
        size = float(self.squares.diagonal().max()) or 1.0
        apart = np.square(self.squares / size)
        fourth = (float(apart.sum()) - float(apart.trace())) / (k * (k - 1))
        return float((fourth**0.5 * size * n) ** 0.5)


@dataclass(frozen=True, eq=False)
class FactoredSketch:
    """U diag(L) U' of a positive A, with U' = C Y left as its factors: a basis serves many solves.

    Attributes:
        drawn: the products Y, and what they were made of.
        eigenvalues: L, shape (r,), largest first.
        combination: C, shape (r, k).
        tail: see :class:`hypergrad.NystromSketch`.
        complete: whether A had no more to show.
        vouched: whether no product is left to be spent on the largest eigenvalue.
    """

    drawn: NarrowSketch
    eigenvalues: Numbers
    combination: Numbers
    tail: float
    complete: bool
    vouched: bool

    @classmethod
    def of(cls, drawn: NarrowSketch, vouched: bool) -> FactoredSketch:
        """Of what was drawn, as if A were positive."""
        eigenvalues, combination = drawn.eigenpairs
        complete = len(eigenvalues) < len(drawn.core.values)
        tail = 0.0 if complete else float(eigenvalues[-1])
        return cls(drawn, eigenvalues, combination, tail, complete, vouched)

    @property
    def rank(self) -> int:
        """How many eigenpairs are kept."""
        return len(self.eigenvalues)

    @property
    def smallest_eigenvalue(self) -> float:
        """See :class:`hypergrad.NystromSketch`."""
        return 0.0 if self.complete else float(self.eigenvalues[-1])

    def auto_damping(self) -> float:
        """The value of ``damping="auto"``; see :func:`hypergrad.spectrum.damping_from_extremes`."""
        largest = float(self.eigenvalues[0]) if self.rank else 0.0
        return damping_from_extremes(0.0, largest, rounding=0.0, tail=self.tail)

    def solve_block(self, block: Tensor, damping: float) -> Tensor:
        """The rows (v - U [L / (L + damping)] U'v) / damping for rows v of shape (m, n).

        U'U is the identity, and each inner product with U right, to far below the rounding of the
        products, so that nothing needs to be projected twice.
        """
        drawn = self.drawn
        products, along = drawn.core.products, drawn.along
        if block is not drawn.block:
            out = block.new_zeros(len(block), len(products))
            for part in _slices(products):
                out.addmm_(block[:, part], products[:, part].to(block.dtype).T)
            along = out.cpu().numpy().T
        taken = torch.from_numpy(self.weights(along, damping)).to(block)
        x = block / damping
        for part in _slices(products):
            x[:, part].addmm_(taken, products[:, part].to(block.dtype))
        return x

    def weights(self, along: Numbers, damping: float) -> Numbers:
        """What multiplies the products in answers to rows with Y v = ``along``: shape (m, k)."""
        share = self.eigenvalues / (self.eigenvalues + damping)
        coefficients = self.combination.T @ (share[:, None] * (self.combination @ along))
        weights: Numbers = coefficients.T / -damping
        return weights

    def residual_estimates(self, damping: float) -> Numbers:
        """Estimates of |v - (A + damping I) x| for the rows of ``drawn.block``, at no product.

        Leave row g of the Gaussian test matrix out.  The answer of the other rows does not depend
        on it, so that the mean of (g'r)^2 is that answer's |r|^2, and g'A x is known from A g.
        With M = damping W + Y Y' for the raw rows and q = Y v, the part along row i comes to
        -[M^-1 q]_i / ([M^-1]_ii damping), like the leave-one-out residuals of a regression; this is
        the root of the mean over i.  (Epperly and Tropp, arXiv 2207.06342, estimate the error of a
        low-rank approximation in the same way.)  Infinite where rounding hides it.
        """
        drawn = self.drawn
        k, n = drawn.omega.shape
        matrix = damping * 0.5 * (drawn.cross + drawn.cross.T) + drawn.squares
        values, vectors = np.linalg.eigh(matrix)
        least = k * np.finfo(values.dtype).eps * values[-1]
        if values[-1] <= 0:  # A has shown nothing: x = v / damping is right
            return np.zeros(drawn.along.shape[1])
        if values[0] < least and not self.complete:
            return np.full(drawn.along.shape[1], np.inf)
        scaled = vectors / np.maximum(values, least)
        left_out = (scaled @ (vectors.T @ drawn.along)) / (scaled * vectors).sum(1)[:, None]
        estimates: Numbers = np.sqrt((n / k) * np.square(left_out / damping).sum(0))
        return estimates

    def clearly_below(self) -> float:
        """The relative estimate below which a residual is taken to be smaller than v.

        The estimate's square is |r|^2 times a mean of k squares of nearly normal numbers: below its
        quantile of one hundredth, by Wilson and Hilferty (1931), and never above 1/2.  (Measured at
        rank 10 on five spectra, 67,500 answers at three dampings: of those with a residual between
        1 and 1.25 times |v| it passes 2 in 100, to 1.6 times 4 in 1,000, to 2.2 times 4 in 10,000.)
        """
        part = 2.0 / (9.0 * len(self.drawn.omega))
        quantile = max(0.0, 1.0 - part - _ONE_PERCENT * part**0.5) ** 3
        return float(min(0.5, quantile**0.5))


def combined_wide(coefficients: Numbers, rows: Tensor, wide: torch.dtype) -> Tensor:
    """Coefficients (r, k) times narrow rows (k, n), in the wide dtype, a slice at a time."""
    factors = torch.from_numpy(np.ascontiguousarray(coefficients)).to(rows.device, wide)
    out = torch.empty(len(factors), rows.shape[1], dtype=wide, device=rows.device)
    for part in _slices(rows):
        torch.matmul(factors, rows[:, part].to(wide), out=out[:, part])
    return out


def _inner_products(omega: Tensor, y: Tensor, b: Tensor) -> Numbers:
    """[Y; B] [Omega; Y]' and Omega Omega' on the host, one after the other, summed in B's dtype.

    The last in that of Omega: it only says which combinations are orthonormal, to a few digits.
    """
    (k, _), m, wide = omega.shape, len(b), b.dtype
    total = torch.zeros(k + m, 2 * k, dtype=wide, device=y.device)
    slices = _slices(y)
    rows = torch.empty(2 * k + m, min(slices[0].stop, y.shape[1]), dtype=wide, device=y.device)
    for part in slices:
        piece = omega[:, part]
        both = rows[:, : piece.shape[1]]
        both[:k] = piece
        both[k : 2 * k] = y[:, part]
        both[2 * k :] = b[:, part]
        total.addmm_(both[k:], both[: 2 * k].T)
    own = omega @ omega.T
    sums: Numbers = torch.cat([total.view(-1), own.view(-1).to(wide)]).cpu().numpy()
    return sums


def _slices(rows: Tensor) -> list[slice]:
    if rows.device.type != "cpu":  # there a launch costs more than the memory
        return [slice(0, rows.shape[1])]
    step = max(1, _SLICE // max(1, len(rows)))
    return [slice(start, start + step) for start in range(0, rows.shape[1], step)]
