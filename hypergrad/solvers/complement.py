"""What a sketch does with the directions that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..norms import row_norms

ComplementKind = Literal["quadrature", "zero"]

#: Lanczos steps, and so products, that the distribution is measured with.
STEPS = 5
#: Where the last eigenvalue of a sketch is below this share of the damping, so is what it leaves
#: out, and 1/damping is good enough.  ``damping="auto"`` keeps it at a third or less.
TAIL_THAT_MATTERS = 0.5
#: Share, of the distance that the upper bound on the mean stays below 1/damping, by which the
#: lower one may undercut the upper.  Below one the error in mean square is below that of
#: 1/damping; the rest is for the noise of a single probe.
_MARGIN = 0.5


@dataclass(frozen=True)
class Complement:
    """The eigenvalue distribution of a positive A outside a sketch's range, by two quadratures.

    With P the projector on what lies outside, of dimension n - r, the multiple of P nearest to
    the inverse that belongs there, in the mean over all right-hand sides, is c P with c the mean
    of 1/(l + damping) over the eigenvalues l of P A P.  Lanczos from a random vector of the
    complement gives a Gauss rule for that mean, which is a lower bound (for the distribution seen
    from that vector), and with a node at zero a Gauss-Radau rule, which is an upper bound, since
    the derivatives of 1/(l + damping) alternate in sign (Golub and Meurant, "Matrices, moments
    and quadrature", 1993, theorems 3.2 and 3.4).  Both hold at any damping.

    Attributes:
        nodes: of the Gauss rule, shape (m,), on the CPU as the others.
        weights: of the Gauss rule, shape (m,), of sum one.
        radau_nodes: of the Gauss-Radau rule, shape (m,) or (m + 1,).
        radau_weights: its weights.
    """

    nodes: Tensor
    weights: Tensor
    radau_nodes: Tensor
    radau_weights: Tensor

    @property
    def mean(self) -> float:
        """Estimate of the mean eigenvalue, the trace over the dimension."""
        return float(self.weights @ self.nodes)

    def inverse(self, damping: float) -> float:
        """What to answer with in place of 1/damping; in (0, 1/damping].

        The lower bound g, unless the mean might be so much nearer to 1/damping that g could be
        worse than that: the squared error of c is (c - mean)^2 and a constant, so every c
        from 2 u - 1/damping up, with u the upper bound, is no worse than 1/damping.
        """
        lower = float((self.weights / (self.nodes + damping)).sum())
        upper = float((self.radau_weights / (self.radau_nodes + damping)).sum())
        safe = upper - _MARGIN * (1.0 / damping - upper)
        return min(max(lower, safe), 1.0 / damping)

    @classmethod
    def of_steps(
        cls, diagonal: list[float], off_diagonal: list[float], dtype: torch.dtype, noise: float
    ) -> tuple[Complement | None, float]:
        """:meth:`of`, and zero; None and the smallest Ritz value where that is below ``-noise``."""
        # A few numbers, which the host decides by.
        alpha, beta = (torch.tensor(x, dtype=dtype, device="cpu") for x in (diagonal, off_diagonal))
        inner = beta[: len(alpha) - 1]
        jacobi = torch.diag(alpha) + torch.diag(inner, 1) + torch.diag(inner, -1)
        smallest = float(torch.linalg.eigvalsh(jacobi)[0])
        return (None, smallest) if smallest < -noise else (cls.of(alpha, beta), 0.0)

    @classmethod
    def of(cls, diagonal: Tensor, off_diagonal: Tensor) -> Complement:
        """From the Jacobi matrix of m Lanczos steps and its m off-diagonal entries.

        The last of these leads out of the matrix; it is zero where the space ended.
        """
        size = float(diagonal.abs().max()) or 1.0
        inner = off_diagonal[:-1]
        jacobi = torch.diag(diagonal) + torch.diag(inner, 1) + torch.diag(inner, -1)
        values, vectors = torch.linalg.eigh(jacobi)
        gauss = values.clamp(min=0.0), vectors[0] ** 2
        last = float(off_diagonal[-1])
        # A node at zero to rounding is the one that the Radau rule would add.
        if last == 0.0 or float(values[0]) <= torch.finfo(values.dtype).eps * size:
            return cls(*gauss, *gauss)
        # The last diagonal entry that makes the extended matrix singular: Golub and Meurant, 3.3.
        unit = torch.zeros_like(diagonal)
        unit[-1] = 1.0
        end = last * float((vectors[-1] ** 2 / values).sum()) * last
        extended = jacobi.new_zeros(len(diagonal) + 1, len(diagonal) + 1)
        extended[:-1, :-1] = jacobi
        extended[-1, -2] = extended[-2, -1] = last
        extended[-1, -1] = end
        values, vectors = torch.linalg.eigh(extended)
        return cls(*gauss, values.clamp(min=0.0), vectors[0] ** 2)


def measure_complement(
    product: Callable[[Tensor], Tensor],
    basis: Tensor,
    size: float,
    rounding: float,
    generator: torch.Generator | None,
) -> tuple[Complement | None, float]:
    """The complement of the orthonormal rows ``basis``, and the smallest Ritz value seen there.

    The first is None where A vanishes there to rounding (``rounding`` times ``size``), and where
    it is not positive.  Cost: at most :data:`STEPS` products, one where A vanishes.
    """
    dim = basis.shape[1] - len(basis)
    if dim == 0:
        return None, 0.0
    place = basis.device if generator is None else generator.device
    start = torch.randn(
        1, basis.shape[1], generator=generator, device=place, dtype=torch.float32
    ).to(basis)

    def outside(rows: Tensor) -> Tensor:
        for _ in range(2):
            rows = rows - (rows @ basis.T) @ basis
        return rows

    start = outside(start)
    start = start / row_norms(start)
    seen = start
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(STEPS, dim)):
        image = outside(product(seen[-1:]))
        share, whole = (seen[-1:] * image).sum(), row_norms(image)[0]
        for _ in range(2):
            image = image - (image @ seen.T) @ seen
        # In one transfer from the device.
        along, length, norm = torch.stack([share, whole, row_norms(image)[0]]).tolist()
        if not diagonal and length <= rounding * size:
            return None, 0.0
        diagonal.append(along)
        if norm <= rounding * size or len(diagonal) == dim:
            off_diagonal.append(0.0)
            break
        off_diagonal.append(norm)
        # What is left of a small image leans back into the sketch by the rounding of a large one:
        # there A is no longer small, and its Ritz values no longer those of the complement.
        following = outside(image / norm)
        following = following - (following @ seen.T) @ seen
        seen = torch.cat([seen, following / row_norms(following)])
    return Complement.of_steps(diagonal, off_diagonal, start.dtype, rounding * size)
