"""Test matrices: the random orthonormal rows that an operator is sketched with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError

SketchKind = Literal["gaussian", "columns", "diagonal", "structured"]

#: Products that estimate a diagonal.  Drawing columns needs its size to a factor of two or so,
#: which is the noise that this many leave where off-diagonal entries are of a row's own size.
DIAGONAL_PROBES = 10


class Embedding:
    """Draws rows of shape (n,), each orthonormal to all that were drawn before.

    So a test matrix can grow and keep its rows, and with them their products.

    Args:
        kind: ``"gaussian"``: a uniformly random subspace; ``"columns"``: rows of the identity,
            drawn uniformly; ``"diagonal"``: rows of the identity, drawn with probability
            proportional to ``weights``; ``"structured"``: rows of a cosine transform, drawn
            uniformly, after random signs.  The last three draw without replacement.
        generator: source of randomness; None for torch's global one.
        n: length of a row.
        device: of the rows.
        dtype: of the rows.
        weights: shape (n,), for ``"diagonal"``: the diagonal of the operator.  A negative entry
            counts by its size, since negative curvature is curvature; rows of weight zero are
            drawn, uniformly, when no others are left.
    """

    def __init__(
        self,
        kind: SketchKind,
        generator: torch.Generator | None,
        n: int,
        device: torch.device,
        dtype: torch.dtype,
        weights: Tensor | None = None,
    ) -> None:
        self.kind, self.generator, self.n = kind, generator, n
        self.device, self.dtype = device, dtype
        # Random numbers are drawn where their source lives.
        self.place = device if generator is None else generator.device
        self.known: Tensor | None = None
        self.drawn = 0
        if kind == "structured":
            bits = torch.randint(0, 2, (n,), generator=generator, device=self.place)
            self.signs = (2 * bits - 1).to(device=device, dtype=dtype)
        if kind == "diagonal":
            assert weights is not None
            self.order = self._weighted_order(weights)
        elif kind != "gaussian":
            order = torch.randperm(n, generator=generator, device=self.place)
            self.order = order.to(device)

    def rows(self, count: int) -> Tensor:
        """The next ``count`` rows, shape (count, n)."""
        if self.kind == "gaussian":
            rows = self._gaussian(count)
        else:
            chosen = self.order[self.drawn : self.drawn + count]
            rows = self._cosines(chosen) if self.kind == "structured" else self._unit(chosen)
        self.drawn += count
        return rows

    def _unit(self, chosen: Tensor) -> Tensor:
        rows = torch.zeros(len(chosen), self.n, dtype=self.dtype, device=self.device)
        rows[torch.arange(len(chosen), device=self.device), chosen] = 1.0
        return rows

    def _cosines(self, chosen: Tensor) -> Tensor:
        """Rows j of the orthonormal DCT-II, sqrt(2/n) cos(pi j (2i + 1) / 2n), times the signs.

        Entry by entry: a fast transform of k unit vectors would cost a factor log n more.
        """
        odd = 2 * torch.arange(self.n, device=self.device) + 1
        # The phase has the period 4n: as an integer it is exact for every n.
        phase = (chosen[:, None] * odd).remainder_(4 * self.n).to(self.dtype)
        rows = phase.mul_(torch.pi / (2 * self.n)).cos_().mul_((2.0 / self.n) ** 0.5)
        rows[chosen == 0] = (1.0 / self.n) ** 0.5
        return rows.mul_(self.signs)

    def _weighted_order(self, weights: Tensor) -> Tensor:
        """All indices in the order of successive draws in proportion to the weights.

        Sorting by E_i / w_i, with E_i exponential, is drawing without replacement (Efraimidis
        and Spirakis, Inf. Process. Lett. 97, 2006).
        """
        size = weights.abs().to(device=self.place, dtype=self.dtype)
        if not bool(torch.isfinite(size).all()):
            raise NonFiniteError(
                f"the diagonal that columns are drawn by holds nan or inf "
                f"({int((~torch.isfinite(size)).sum())} of {self.n} entries)."
            )
        times = torch.empty_like(size).exponential_(generator=self.generator)
        largest = float(size.max())
        keys = times.log() - (size / (largest or 1.0)).log()
        # Of weight zero: after all others, in random order; all of them if there is nothing else.
        order = torch.argsort(torch.where(size > 0, keys, 1e30 * (1.0 + times)))
        return order.to(self.device)

    def _gaussian(self, count: int) -> Tensor:
        drawn = gaussian_rows(count, self.n, self.generator, self.device).to(self.dtype)
        if self.known is None:
            rows = orthonormal_rows(drawn)
            self.known = rows
            return rows
        rows = extension(self.known, drawn)
        self.known = torch.cat([self.known, rows])
        return rows


def gaussian_rows(
    count: int, n: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Rows of independent entries of variance 1/n, in float32, drawn where their source lives.

    Random directions need no more digits than float32 has, and those cost a fifth.
    """
    place = device if generator is None else generator.device
    rows = torch.empty(count, n, device=place, dtype=torch.float32)
    return rows.normal_(0.0, n**-0.5, generator=generator).to(device)


def orthonormal_rows(gaussian: Tensor) -> Tensor:
    """Orthonormal rows of the span of Gaussian ones, shape (k, n), k <= n."""
    k, n = gaussian.shape
    if 4 * k > n:
        q: Tensor = torch.linalg.qr(gaussian.T)[0]
        return q.T.contiguous()
    # Cholesky QR.  The rows are nearly orthogonal already (condition at most about 3: Davidson and
    # Szarek 2001, theorem II.13), so it is as accurate as Householder's and a few times as fast.
    factor = torch.linalg.cholesky(gaussian @ gaussian.T)
    eye = torch.eye(k, dtype=gaussian.dtype, device=gaussian.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse @ gaussian


def extension(known: Tensor, drawn: Tensor) -> Tensor:
    """As many orthonormal rows as ``drawn`` has, orthogonal to the orthonormal rows ``known``."""
    rows = drawn
    for _ in range(2):  # twice is enough (Kahan; Parlett 1998, section 6.9)
        rows = rows - (rows @ known.T) @ known
        rows = torch.linalg.qr(rows.T)[0].T.contiguous()
    return rows
