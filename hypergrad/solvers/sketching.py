"""From a test matrix to eigenpairs: the numerics of a sketch, apart from what it is used for.

How accurate can a sketch of a matrix of rank r be?  Products round by eps |A|.  With basis U of
the range, A Omega = U (L U'Omega): the smallest singular value of U'Omega, 1/amplification, decides
how far that rounding turns the range.  For a Gaussian Omega of just r columns it is about 1/r and,
once in t sketches, 1/(t r); the core squares it.  A second sketch with Omega = orth(A Omega), one
step of subspace iteration, has an amplification of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DampedSystem, check_skew

#: Core eigenvalues below this many eps of the products' dtype (relative to the largest) are
#: rounding.  Frangella, Tropp and Udell shift the core instead; at a singular core the shift
#: costs up to its own square root in accuracy, truncation does not.
_CORE_ROUNDING = 8.0
#: By how much, relatively, the sketch's largest eigenvalue may exceed its Rayleigh quotient.
#: More than the rounding of 16-bit products, less than what would matter.
_ABOVE = 1e-2
#: Products below this many eps of the largest eigenvalue are rounding.
_NOISE = 4.0


@dataclass(frozen=True)
class LowRank:
    """A sketch on flat vectors.

    Attributes:
        eigenvalues: shape (r,), largest first.
        basis: orthonormal rows, shape (r, n).
        smallest: the smallest eigenvalue seen, also among those not kept.
        products: A Omega as rows, shape (k, n).
        blur: about what rounding and truncation may have changed, in norm; mostly far less.
    """

    eigenvalues: Tensor
    basis: Tensor
    smallest: float
    products: Tensor
    blur: float


def low_rank(system: DampedSystem, omega: Tensor) -> LowRank:
    """Sketch A with orthonormal rows ``omega``, shape (k, n); see :func:`.nystrom_sketch`."""
    k, n = omega.shape
    eps = torch.finfo(system.operator.dtype).eps
    omega = system.rounded(omega)  # what the products really are of
    y = system.product(omega)
    core = omega @ y.T
    # Antisymmetry is measured against what products with unrelated vectors would leave in the core.
    skew = torch.linalg.vector_norm(core - core.T) / 2
    check_skew(skew, torch.linalg.vector_norm(y) * (k / n) ** 0.5, system.operator.dtype)
    values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
    # The antisymmetric part is a free measurement of the products' rounding.
    floor = max(_CORE_ROUNDING * eps * float(values.abs().max()), 2.0 * float(skew))
    kept = values > floor
    half = (vectors[:, kept].T @ y) / values[kept].sqrt()[:, None]
    eigenvalues, basis = _squared_svd(half)
    dropped = vectors[:, ~kept].T @ y
    smallest = float(eigenvalues[-1]) if len(eigenvalues) else 0.0
    if float(values[0]) < -floor or not _is_below(eigenvalues, basis, y, system):
        eigenvalues, basis, smallest = _rayleigh_ritz(system.product, omega, y)
        dropped = dropped[:0]
    largest = float(eigenvalues.abs().max()) if len(eigenvalues) else 0.0
    blur = eps * largest * _amplification(omega, basis) ** 2
    # Products with directions outside the range of A are rounding. Where they are more, an
    # eigenvector was lost to which Omega is nearly orthogonal; its eigenvalue may be any.
    if _norm(dropped) > _NOISE * eps * largest:
        direction = system.rounded(torch.linalg.svd(dropped, full_matrices=False).Vh[:1])
        blur += abs(float((direction * system.product(direction)).sum()))
    return LowRank(eigenvalues, basis, smallest, y, blur)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2)) if matrix.numel() else 0.0


def _amplification(omega: Tensor, basis: Tensor) -> float:
    if len(basis) == 0:
        return 1.0
    least = float(torch.linalg.svdvals(basis @ omega.T)[-1])
    return 1.0 / max(least, torch.finfo(basis.dtype).eps)


def _squared_svd(half: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of half' half, for half of shape (r, n), without squaring its condition."""
    if len(half) == 0:
        return half.new_zeros(0), half
    q, r = torch.linalg.qr(half.T)
    left, singular, _ = torch.linalg.svd(r)
    return singular**2, (q @ left).T.contiguous()


def _is_below(eigenvalues: Tensor, basis: Tensor, y: Tensor, system: DampedSystem) -> bool:
    """Whether the largest eigenvalue of the sketch can be one of a positive operator.

    For positive A, A_nys <= A, hence l = u'A_nys u <= u'A u for its first eigenpair.  For an
    indefinite A whose core happens to be positive l can be anything: the core of
    [[0, 1], [1, -1]] + small I on its first coordinate is small, and l is its inverse.
    """
    size = _norm(y)
    if len(eigenvalues) == 0:
        return size == 0  # a positive A with x'A x = 0 has A x = 0
    largest = float(eigenvalues[0])
    # |A| >= |A Omega| for orthonormal Omega: no product is needed.
    if largest <= size * (1 + _ABOVE):
        return True
    top = system.rounded(basis[:1])
    return float((top * system.product(top)).sum()) >= largest * (1 - _ABOVE)


def _rayleigh_ritz(
    product: Callable[[Tensor], Tensor], omega: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Ritz pairs on the span of Omega and A Omega, largest value first, and the smallest value.

    Ritz values never leave the spectrum.  Omega belongs to the space because the range of A Omega
    alone may show nothing: of [[0, B], [B', 0]] and columns of one block its Ritz values are zero.
    """
    k = len(omega)
    columns, r = torch.linalg.qr(torch.cat([omega, y]).T)
    q = columns.T.contiguous()
    # The products with the first k are known: q1 = R11^-T Omega', hence A q1 = R11^-T Y'.
    images = torch.linalg.solve_triangular(r[:k, :k].T, y, upper=False)
    if len(q) > k:
        images = torch.cat([images, product(q[k:])])
    small = q @ images.T
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    kept = values.abs().argsort(descending=True)[:k]
    kept = kept[values[kept].argsort(descending=True)]
    return values[kept], (vectors[:, kept].T @ q).contiguous(), float(values[0])
