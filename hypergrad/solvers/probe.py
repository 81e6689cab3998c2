"""A short Lanczos run on a system, and what it foretells of a Krylov method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem


@dataclass(frozen=True)
class Probe:
    """What k Lanczos steps from one start say of A.

    Attributes:
        tridiagonal: (k + 1, k), float64 on the CPU: A V_k = V_{k+1} T.
        basis: V_k', shape (k, n), in the working dtype.
        invariant: whether the Krylov space is an invariant one, so that nothing is left to see.
        symmetric: whether the products are those of a symmetric operator, as far as they show.
    """

    tridiagonal: Tensor
    basis: Tensor
    invariant: bool
    symmetric: bool

    @property
    def steps(self) -> int:
        """How many products were made."""
        return len(self.basis)

    @property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, smallest first, and the share of the start along each (they sum to one)."""
        square = self.tridiagonal[: self.steps]
        values, vectors = torch.linalg.eigh(0.5 * (square + square.T))
        return values, vectors[0] ** 2

    def effective_dimension(self, damping: float) -> float:
        """The dimension n times the Gauss quadrature of lambda / (lambda + damping).

        For a random start, an estimate of the sum over all eigenvalues (Ubaru, Chen, Saad, SIAM J.
        Matrix Anal. Appl. 38, 2017).
        """
        values, shares = self.ritz
        positive = values.clamp(min=0.0)
        return self.basis.shape[1] * float((shares * positive / (positive + damping)).sum())

    def eigenvalue(self, index: float) -> float:
        """The ``index``-th largest eigenvalue, or 0 where it is not positive: an estimate.

        As many eigenvalues as n times its share are counted for each Ritz value, which for a
        random start is their number in the mean.
        """
        values, shares = self.ritz
        counts = self.basis.shape[1] * shares.flip(0).cumsum(0)
        beyond = torch.nonzero(counts > index).flatten()
        return max(float(values.flip(0)[beyond[0]]), 0.0) if len(beyond) else 0.0

    def least_residual(self, damping: float, steps: int | None = None) -> tuple[float, Tensor]:
        """The least |q - (A + damping I) V_j y| over y for the unit start q, and that y."""
        j = self.steps if steps is None else steps
        matrix = self.tridiagonal[: j + 1, :j].clone()
        matrix.diagonal().add_(damping)
        # In units of its own size, so that no square over- or underflows.
        size = float(matrix.abs().max()) or 1.0
        target = torch.zeros(j + 1, 1, dtype=matrix.dtype)
        target[0] = 1.0
        y = torch.linalg.pinv(matrix / size, rtol=1e-14) @ target
        residual = float(torch.linalg.vector_norm(target - (matrix / size) @ y))
        return residual, y[:, 0] / size

    def iterations(self, damping: float, rtol: float) -> float:
        """Iterations after which CG or MINRES will have lowered the start's residual to ``rtol``.

        Where the probe has not seen the end: at the pace of its second half, but no more than the
        Chebyshev bound allows at the condition number (largest + damping) / damping, nor than 2 n.
        """
        history = [self.least_residual(damping, j)[0] for j in range(1, self.steps + 1)]
        for j, residual in enumerate(history, start=1):
            if residual <= rtol:
                return j
        if self.invariant:
            return self.steps
        last, before = history[-1], history[(len(history) - 1) // 2]
        span = len(history) - 1 - (len(history) - 1) // 2
        pace = math.log(before / last) / span if span and last < before else 0.0
        most = 2.0 * self.basis.shape[1]
        values = self.ritz[0]
        if damping > 0 and float(values[0]) >= 0:
            condition = float(values[-1]) / damping + 1.0
            most = min(most, chebyshev_iterations(condition, rtol))
        if pace <= 0.0:
            return max(most, self.steps)
        return max(min(most, self.steps + math.log(last / rtol) / pace), self.steps)


def chebyshev_iterations(condition: float, rtol: float) -> float:
    """Iterations after which CG has lowered the residual to ``rtol``, by the Chebyshev bound.

    In the residual's norm, which exceeds the bound on that of A by the root of the condition.
    """
    root = math.sqrt(max(condition, 1.1))
    pace = math.log1p(2.0 / (root - 1.0))  # of (root + 1) / (root - 1), which rounds to one
    return math.log(2.0 * root / rtol) / pace + 1.0 if pace > 0.0 else math.inf


def probe(system: DampedSystem, start: Tensor, steps: int, rtol: float | None) -> Probe:
    """At most ``steps`` Lanczos steps from ``start``, shape (n,), with full reorthogonalisation.

    Args:
        system: its damping is left out, unless ``rtol`` is given.
        start: not zero.
        steps: >= 1, capped at n.
        rtol: where given, stop once the start's residual is lowered to this.

    Cost: a product a step.
    """
    n = len(start)
    steps = min(steps, n)
    eps = torch.finfo(start.dtype).eps
    allowed = torch.finfo(system.operator.dtype).eps ** 0.25  # as in check_skew
    tridiagonal = torch.zeros(steps + 1, steps, dtype=torch.float64, device="cpu")
    basis = start.new_zeros(steps, n)
    basis[0] = start / row_norms(start[None])
    largest = 0.0
    for j in range(steps):
        known = basis[: j + 1]
        image = system.product(known[-1:])[0]
        size = float(row_norms(image[None]))
        largest = max(largest, size)
        shares = known @ image
        # A symmetric A has q_i'A q_j = 0 for i < j - 1, and the last off-diagonal entry again.
        expected = torch.zeros_like(shares)
        expected[j] = shares[j]
        if j:
            expected[j - 1] = float(tridiagonal[j, j - 1])
        skew = float(row_norms((shares - expected)[None]))
        if skew > allowed * largest:
            return Probe(tridiagonal[: j + 2, : j + 1], basis[: j + 1], False, False)
        image = image - shares @ known
        image = image - (known @ image) @ known  # twice is enough (Parlett 1998, section 6.9)
        left = float(row_norms(image[None]))
        ended = left <= 10 * eps * size or j + 1 == n
        tridiagonal[j, j] = float(shares[j])
        tridiagonal[j + 1, j] = 0.0 if ended else left
        if j + 1 < steps and not ended:
            tridiagonal[j, j + 1] = left
            basis[j + 1] = image / left
        seen = Probe(tridiagonal[: j + 2, : j + 1], basis[: j + 1], ended, True)
        if ended or (rtol is not None and seen.least_residual(float(system.damping))[0] <= rtol):
            break
    return seen
