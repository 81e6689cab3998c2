"""The core of a sketch: one block of products, and what its rounding allows to be said."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..norms import row_norms
from ..spectrum import damping_from_extremes
from .base import DampedSystem
from .skew import check_skew

#: A core eigenvalue within this many times the core's rounding carries no information.
_CORE_NOISE = 3.0
#: A product within this many eps of the largest is rounding itself.
_PRODUCT_NOISE = 4.0
#: Relative change of the answer by amplified rounding that is worth a second pass, as a power of
#: eps: 7e-5 in float32, 4e-10 in float64.
_WORTH_A_PASS = 0.6
#: By how much, relatively, the sketch's largest eigenvalue may exceed its Rayleigh quotient: more
#: than the rounding of 16-bit products, less than what would matter.
ABOVE = 1e-2


Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
#: Whether a sketch and its answers are checked: by products, by estimates, not at all.
Check: TypeAlias = bool | Literal["estimate"]


@dataclass(frozen=True)
class Core:
    """The core W = Omega' A Omega of one block of products Y = A Omega, diagonalised.

    All but the products are k x k numbers, kept on the host: what is decided on them makes no
    device wait, and NumPy handles so few of them in a third of PyTorch's time.

    Attributes:
        values: eigenvalues of W, smallest first, shape (k,).
        vectors: their eigenvectors, as columns, shape (k, k).
        products: rows (Y z)' for each eigenvector z, shape (k, n); of :meth:`of_sums` the rows
            that it was given.
        sizes: the norms of (Y z)'.
        noise: rounding of the eigenvalues: the larger of the antisymmetric part, which measures
            it, and eps |Y| / sqrt(n), what independent errors of relative size eps project to.
        gram: inner products of the rows (Y z)', over the square of ``size``.
        silence: size below which a row of ``products`` is rounding.
        size: |Y|, the spectral norm.
        eps: of the products' dtype.
    """

    values: Numbers
    vectors: Numbers
    products: Tensor
    sizes: Numbers
    gram: Numbers
    noise: float
    silence: float
    size: float
    eps: float

    @classmethod
    def of(cls, omega: Tensor, y: Tensor, dtype: torch.dtype) -> Core:
        """Of test rows ``omega`` and their products ``y``, both (k, n), made in ``dtype``."""
        # The scale keeps the squares in range.
        top = float(row_norms(y).max())
        scaled = y / top if top > 0 else y
        sums = torch.stack([omega @ scaled.T, scaled @ scaled.T]).cpu().numpy()
        core = cls.of_sums(sums[0], sums[1], y, dtype)
        rotation = torch.from_numpy(core.vectors.T.copy()).to(y)
        products = rotation @ y
        return replace(
            core,
            values=core.values * top,
            products=products,
            # Of the rows themselves: of a small one the Gram matrix knows half the digits.
            sizes=row_norms(products).cpu().numpy(),
            noise=core.noise * top,
            silence=core.silence * top,
            size=core.size * top,
        )

    @classmethod
    def of_sums(cls, core: Numbers, gram: Numbers, products: Tensor, dtype: torch.dtype) -> Core:
        """From Omega Y' and Y Y' alone, best in a dtype that resolves the squares of ``dtype``'s.

        Args:
            core: Omega Y', shape (k, k), for orthonormal rows Omega.
            gram: Y Y', shape (k, k).
            products: the rows that combinations will be made of, (k, n); passed on as they are.
            dtype: of the products.
        """
        k, n = products.shape
        gap = core - core.T
        # Spectral norms: that of Y as accurately as by an SVD, at one pass.
        squares = np.linalg.eigvalsh(np.stack([gap.T @ gap, gram]))[:, -1]
        skew, size = root(float(squares[0])) / 2, root(float(squares[1]))
        # Against what products with unrelated vectors would leave in the core.
        check_skew(skew, size * (k / n) ** 0.5, dtype)
        values, vectors = np.linalg.eigh(0.5 * (core + core.T))
        gram = vectors.T @ gram @ vectors
        eps = torch.finfo(dtype).eps
        return cls(
            values=values,
            vectors=vectors,
            products=products,
            sizes=np.sqrt(np.maximum(gram.diagonal(), 0.0)),
            gram=gram / (size**2 if size > 0 else 1.0),
            noise=max(skew, eps * size / n**0.5),
            silence=cls.silent(eps, size),
            size=size,
            eps=eps,
        )

    @staticmethod
    def silent(eps: float, size: float) -> float:
        """Size below which a product is rounding, of products of norm ``size``."""
        return _PRODUCT_NOISE * eps * size

    @cached_property
    def kept(self) -> Numbers:
        """Directions with positive curvature and a product, both above their rounding."""
        kept: Numbers = (self.values > _CORE_NOISE * self.noise) & (self.sizes > self.silence)
        return kept

    @property
    def indefinite(self) -> bool:
        """Whether there is negative curvature beyond rounding."""
        return bool(self.values[0] < -_CORE_NOISE * self.noise)  # the smallest

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenpairs (largest first) of Y W^+ Y' on the directions kept."""
        rows = self.products[torch.from_numpy(self.kept).to(self.products.device)]
        roots = torch.from_numpy(np.sqrt(self.values[self.kept])).to(rows)
        return squared_svd(rows / roots[:, None])

    def combinations(self) -> tuple[Numbers, Numbers]:
        """The same from the inner products: L, and U' as combinations of the rows (Y z)'."""
        kept = self.kept
        roots = np.sqrt(self.values[kept])
        # Of B B' for the rows B = W^(-1/2) Y', over |Y|^2: the eigenvalues of Y W^+ Y' are the
        # same.
        small = self._gram_kept / roots[:, None] / roots * self.size
        values, vectors = np.linalg.eigh(0.5 * (small + small.T))
        values, vectors = values[::-1], vectors[:, ::-1]
        if len(values):
            seen = values > len(values) * np.finfo(values.dtype).eps * values[0]
            values, vectors = values[seen], vectors[:, seen]
        combination = np.zeros((len(values), len(self.values)), self.values.dtype)
        eigenvalues = values * self.size
        combination[:, kept] = (vectors / roots[:, None] / np.sqrt(eigenvalues)).T
        return eigenvalues, combination

    @property
    def _gram_kept(self) -> Numbers:
        return self.gram[self.kept][:, self.kept]

    @property
    def silent_throughout(self) -> bool:
        """Whether all products are rounding."""
        return self.size == 0 or not bool((self.sizes > self.silence).any())

    def trace(self, total: float) -> float:
        """Estimate of the trace of A by leaving out one row of the test matrix at a time.

        The sketch without row i leaves A's trace over the complement of the other rows, of
        dimension n - k + 1, in which row i is a random direction: (n - k + 1) / [W^-1]_ii
        estimates it without bias, and the sketch's own trace, ``total``, shrinks by
        |Y W^-1 e_i|^2 / [W^-1]_ii.
        The mean over i, after Epperly, Tropp and Webber, arXiv 2301.07825, section 2.3.
        """
        if not bool(self.kept.all()):  # a direction without a product: W has no inverse
            return total
        n, k = self.products.shape[1], len(self.values)
        inverse = self.size / self.values
        scale = np.maximum(self.vectors**2 @ inverse, np.finfo(inverse.dtype).tiny)
        lifted = self.vectors * inverse  # e_i'W^-1 Y' Y W^-1 e_i, both over powers of |Y|
        own = ((lifted @ self.gram) * lifted).sum(1)
        return total + self.size * float((((n - k + 1) - own) / scale).mean())

    def noisy(self, largest: float, damping: float) -> bool:
        """Whether the products' rounding, amplified by Y W^+, could be felt at this damping.

        To first order an error E in Y changes Y W^+ Y' by E W^+ Y' and its transpose, and the
        answer by that over the damping.  |Y W^+| is large where the test matrix, by bad luck, is
        nearly orthogonal to an eigenvector, which happens when the rank just covers that of A.
        (Measured in both dtypes: the error in the answer is at most 0.8 of this prediction, and
        sketches of operators with more eigenvalues than the rank amplify by less than four.)
        ``largest`` is the sketch's largest eigenvalue.
        """
        kept = self.kept
        if not bool(kept.any()):
            return False
        inverse = self.size / self.values[kept]
        squared = self._gram_kept * inverse[:, None] * inverse
        n = self.products.shape[1]
        # A test matrix that nearly misses A makes small products, but no smaller errors.
        rounding = self.eps * max(self.size, largest / n**0.5)
        # What rounding A costs, and what is worth a pass.
        limit = 3.0 * self.eps * largest + self.eps**_WORTH_A_PASS * damping
        if rounding * root(float(squared.trace())) <= limit:  # the Frobenius norm is no smaller
            return False
        return bool(rounding * root(float(np.linalg.eigvalsh(squared)[-1])) > limit)  # |Y W^+|

    def blurred(self, damping: float) -> bool:
        """Whether the rounding of the core's eigenvalues could be felt at this damping.

        Along a direction with eigenvalue b = |Y z|^2 / w of the sketch, an error e in w changes
        the answer, relative to |v|/damping, by (e / w) b damping / (b + damping)^2.
        """
        heard = self.sizes > self.silence
        sizes, values = self.sizes[heard], self.values[heard]
        w = np.maximum(values, self.noise)
        b = sizes * (sizes / w)
        change = self.noise / w * (b / (b + damping)) * (damping / (b + damping))
        # A direction that would be dropped changes the answer by all that it would contribute.
        change = np.where(values <= _CORE_NOISE * self.noise, b / (b + damping), change)
        return bool((change > self.eps**_WORTH_A_PASS).any())


def root(square: float) -> float:
    """The square root of what is no less than zero, but for rounding."""
    return math.sqrt(max(square, 0.0))


def squared_svd(half: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of half' half, for half of shape (r, n), without squaring its condition."""
    if len(half) == 0:
        return half.new_zeros(0), half
    q, r = torch.linalg.qr(half.T)
    left, singular, _ = torch.linalg.svd(r)
    return singular**2, left.T @ q.T


@dataclass(frozen=True)
class Approximation:
    """U diag(L) U' as it comes out of one of the ways to make it.

    Attributes:
        eigenvalues: L, largest first.
        basis: U'.
        tail: see :class:`NystromSketch`.
        lowest: smallest Ritz value; 0 where none was computed.
        complete: whether directions were dropped as rounding: A had no more to show.
        trace: leave-one-out estimate of A's trace; None where there is none.
    """

    eigenvalues: Tensor
    basis: Tensor
    tail: float
    lowest: float = 0.0
    complete: bool = False
    trace: float | None = None

    @classmethod
    def truncated(
        cls, eigenvalues: Tensor, basis: Tensor, rank: int, trace: float | None, generic: bool
    ) -> Approximation:
        """Eigenpairs of a core of size ``rank``; no tail where the operator had no more to show.

        A product of zero shows that only for a vector with a part along everything (``generic``):
        a column of zeros says nothing of the other columns.
        """
        complete = len(eigenvalues) == 0 or (generic and len(eigenvalues) < rank)
        tail = 0.0 if complete or rank == basis.shape[1] else float(eigenvalues[-1])
        return cls(eigenvalues, basis, tail, complete=complete, trace=trace)

    @property
    def largest(self) -> float:
        """The size of the eigenvalue that is largest in size; 0 where there is none."""
        return float(self.eigenvalues.abs().max()) if len(self.eigenvalues) else 0.0

    def damping(self, system: DampedSystem, tail: float) -> float:
        """The system's damping, or what ``"auto"`` would make of it."""
        if system.damping != "auto":
            return float(system.damping)
        return damping_from_extremes(
            min(self.lowest, 0.0), self.largest, rounding=system.rounding, tail=tail
        )
