"""The exact solver: assemble the matrix, factorise it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OperatorTooLargeError
from ..pytree import row_norms
from .base import (
    DampedSystem,
    Outcome,
    Solver,
    Status,
    check_option,
    check_skew,
    is_count,
    is_tolerance,
)


@dataclass(frozen=True)
class Exact(Solver):
    """Dense assembly, then Cholesky; the eigendecomposition when A is not safely positive.

    An indefinite system is solved as it is, with ``info.smallest_eigenvalue`` (that of A, without
    damping) reported.  Of a singular one the answer is the least-squares solution of smallest
    norm: CONVERGED when v lies in the range, STAGNATED when it does not.

    Attributes:
        rtol: relative residual above which the status is STAGNATED.
        max_bytes: memory allowed for the matrix; refused, before allocating, beyond it.

    Raises (when solving):
        OperatorTooLargeError: the float64 matrix and its factor would need more than ``max_bytes``.
        NotSymmetricError: the matrix is not symmetric beyond the rounding of its products.

    Cost: n HVPs and one a right-hand side to check the answer; n^3/3 operations and 4 n^2 numbers
    of memory, or about 9 n^3 and 6 n^2 where the matrix is not positive definite.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> solution = hypergrad.solve(a, torch.tensor([2.0, 3.0]), hypergrad.Exact())
        >>> solution.value, solution.info.smallest_eigenvalue
        (tensor([ 1., -3.]), -1.0)
    """

    rtol: float = 1e-5
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        check_option(is_tolerance(self.rtol), "rtol", self.rtol, "a finite number >= 0")
        check_option(
            is_count(self.max_bytes), "max_bytes", self.max_bytes, "a positive number of bytes"
        )

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        matrix = self._assemble(system)
        damping = system.resolve_damping()
        n = matrix.shape[0]
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        # A direct solve from x0 is one for the correction to it.
        start, target = system.begin(x0, damping)
        # Of an undamped matrix, eigenvalues below the rounding of its products are zero; damping
        # is exact, so that of a damped one only the arithmetic's own rounding counts.
        eps = torch.finfo(system.operator.dtype if damping == 0 else system.b.dtype).eps
        factor, failed = torch.linalg.cholesky_ex(damped)
        smallest: float | None = None
        if int(failed) == 0 and not _is_singular(damped, factor, eps):
            x = start + torch.cholesky_solve(target.T, factor).T
        else:
            values, vectors = torch.linalg.eigh(damped)
            smallest = float(values[0]) - damping
            # Roundings of size eps |A| make a matrix of norm n eps |A| at worst, and of about
            # sqrt(n) eps |A| when they are independent; 16 bits leave no more than the cap.
            floor = min(n * eps, 4.0 * n**0.5 * eps, 1e-2) * values.abs().max()
            inverse = torch.where(values.abs() > floor, 1.0 / values, torch.zeros_like(values))
            x = start + ((target @ vectors) * inverse) @ vectors.T
        norms = row_norms(system.residual(x, damping))
        met = norms <= system.tolerances(self.rtol, 0.0)
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=[Status.CONVERGED if ok else Status.STAGNATED for ok in met.tolist()],
            iterations=[0] * len(x),
            damping=damping,
            smallest_eigenvalue=smallest,
        )

    def _assemble(self, system: DampedSystem) -> Tensor:
        n = system.operator.layout.dim
        needed = 6 * n * n * system.b.element_size()  # measured: 5.7 with the eigendecomposition
        if needed > self.max_bytes:
            raise OperatorTooLargeError(
                f"an exact solve of dimension {n} needs {needed / 2**30:.1f} GiB, more than the "
                f"{self.max_bytes / 2**30:.1f} GiB of max_bytes. Use CG or Nystrom, or "
                f"allow it with Exact(max_bytes={needed})."
            )
        matrix = torch.empty(n, n, dtype=system.b.dtype, device=system.b.device)
        chunk = 256
        for first in range(0, n, chunk):
            last = min(first + chunk, n)
            rows = torch.zeros(last - first, n, dtype=system.b.dtype, device=system.b.device)
            rows[torch.arange(last - first), torch.arange(first, last)] = 1.0
            matrix[first:last] = system.product(rows)
        skew = torch.linalg.vector_norm(matrix - matrix.T) / 2
        check_skew(skew, torch.linalg.vector_norm(matrix), system.operator.dtype)
        return 0.5 * (matrix + matrix.T)


def _is_singular(matrix: Tensor, factor: Tensor, eps: float) -> bool:
    """Whether a matrix that Cholesky accepted is singular to rounding.

    Rounding gives a zero eigenvalue either sign, so the factorisation of a singular matrix
    succeeds half of the time.  Two inverse iterations find the smallest eigenvalue then: the
    start's share along its eigenvector, 1/sqrt(n) or so, is amplified by its inverse twice.
    """
    source = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), 1, generator=source, dtype=torch.float32).to(matrix)
    # In units of the matrix's own size, so that no scale over- or underflows.
    size = float(row_norms(matrix).max())
    for _ in range(2):
        vector = torch.cholesky_solve(size * (vector / row_norms(vector.T)), factor)
    smallest = 1.0 / float(row_norms(vector.T))
    largest = float((matrix / size).abs().sum(dim=0).max())
    return not smallest > eps * largest
