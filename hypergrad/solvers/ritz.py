"""Ritz pairs of an operator on a sketch's span: the second pass of a Nyström sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DampedSystem
from .core import Approximation

#: Below this, relatively, what Ritz pairs miss is taken for amplified rounding.
_NEARLY_COMPLETE = 1e-3


def rayleigh_ritz(system: DampedSystem, omega: Tensor, y: Tensor) -> Approximation:
    """Ritz pairs on the span of Omega and A Omega.

    Ritz values never leave the spectrum.  Omega belongs to the space because the range of A Omega
    alone may show nothing: of [[0, B], [B', 0]] and columns of one block its Ritz values are zero.
    """
    k = len(omega)
    columns, r = torch.linalg.qr(torch.cat([omega, y]).T)
    q = columns.T.contiguous()
    # The products with the first k are known: q1 = R11^-T Omega', hence A q1 = R11^-T Y'.
    image = torch.linalg.solve_triangular(r[:k, :k].T, y, upper=False)
    if len(q) > k:
        image = torch.cat([image, system.product(q[k:])])
    found = ritz_pairs(q, image, k)
    largest = float(found.eigenvalues.abs().max())
    rounding = torch.finfo(system.operator.dtype).eps * largest
    if 3.0 * rounding < found.tail < _NEARLY_COMPLETE * largest:
        # All but complete: what is missed is rounding that an unlucky Omega amplified, and the
        # span leans away from the range of A by it.  The image of the span does not.
        kept = torch.linalg.svd(image, full_matrices=False)[2][:k]
        kept = torch.linalg.qr(system.rounded(kept).T)[0].T.contiguous()
        found = ritz_pairs(kept, system.product(kept), k)
    return found


def ritz_pairs(q: Tensor, image: Tensor, rank: int) -> Approximation:
    """The ``rank`` pairs of largest size on the span of q, given its image under A.

    The tail is the size of what is left out: Ritz values not kept, and the coupling (I - QQ')AQ
    to what is outside the span, which is 0 when that is invariant.
    """
    small = q @ image.T
    small = 0.5 * (small + small.T)
    values, vectors = torch.linalg.eigh(small)
    by_size = values.abs().argsort(descending=True)
    missed = float(torch.linalg.matrix_norm(image - small @ q, ord=2))
    if len(by_size) > rank:
        missed = max(missed, float(values[by_size[rank]].abs()))
    kept = by_size[:rank]
    kept = kept[values[kept].argsort(descending=True)]
    return Approximation(values[kept], vectors[:, kept].T @ q, missed, float(values[0]))
