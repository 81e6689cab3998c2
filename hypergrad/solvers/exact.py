"""The exact solver: assemble the matrix, factorise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem, Outcome, Solver, Status
from .memory import refuse_if_too_large
from .options import check_option, is_count, is_one_of, is_tolerance
from .skew import check_skew
from .traced import begin_traced, residual_traced, safe_norms

Fallback = Literal["eigh", "ldl"]

#: Columns multiplied at a time, and the memory that they may take, where nobody says.
_CHUNK, _CHUNK_BYTES = 256, 64 * 2**20


@dataclass(frozen=True)
class Exact(Solver):
    """Dense assembly, then Cholesky; another factorisation when A is not safely positive.

    The policy: A + damping I is factorised by Cholesky.  Where that fails, or an inverse
    iteration finds the matrix singular to rounding, ``fallback`` takes over.  ``"eigh"`` is the
    eigendecomposition: an indefinite system is solved as it is, with ``info.smallest_eigenvalue``
    (that of A, without damping) reported; of a singular one the answer is the least-squares
    solution of smallest norm: CONVERGED when v lies in the range, STAGNATED when it does not.
    ``"ldl"`` is Bunch and Kaufman's symmetric-indefinite factorisation, about as fast as Cholesky
    (and 13 times as fast as the other at n = 2000), which reports no eigenvalue; where it finds the
    matrix singular to rounding, or its answer's true residual misses ``rtol``, the
    eigendecomposition follows and the better answer is kept.  The true residual, not the
    factorisation, decides on the status.

    Attributes:
        rtol: relative residual above which the status is STAGNATED.
        max_bytes: memory allowed for the matrix; refused, before allocating, beyond it.
        fallback: ``"eigh"`` or ``"ldl"``, where Cholesky does not serve.
        chunk_size: columns of A that are multiplied at a time; None for 256, or fewer where those
            would take more than 64 MiB.

    Raises (when solving):
        OperatorTooLargeError: before any product: more than ``max_bytes``, or than is free.
        NotSymmetricError: the matrix is not symmetric beyond the rounding of its products.

    Cost: n HVPs and one a right-hand side to check the answer (two where LDL was not enough);
    n^3/3 operations and 4 n^2 numbers of memory, or about 9 n^3 and 6 n^2 with eigenvectors.
    Source: Bunch and Kaufman, Math. Comp. 31 (1977).

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> solution = hypergrad.solve(a, torch.tensor([2.0, 3.0]), hypergrad.Exact())
        >>> solution.value, solution.info.smallest_eigenvalue
        (tensor([ 1., -3.]), -1.0)
    """

    rtol: float = 1e-5
    max_bytes: int = 4 * 2**30
    fallback: Fallback = "eigh"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_option(is_tolerance(self.rtol), "rtol", self.rtol, "a finite number >= 0")
        check_option(
            is_count(self.max_bytes), "max_bytes", self.max_bytes, "a positive number of bytes"
        )
        good = is_one_of(self.fallback, get_args(Fallback))
        check_option(good, "fallback", self.fallback, f"one of {get_args(Fallback)}")
        good = self.chunk_size is None or is_count(self.chunk_size)
        check_option(good, "chunk_size", self.chunk_size, "None or an integer >= 1")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        self._check_memory(system)
        matrix = self._assemble(system)
        skew = row_norms((matrix - matrix.T).reshape(1, -1)) / 2
        check_skew(skew, row_norms(matrix.reshape(1, -1)), system.operator.dtype)
        matrix = 0.5 * (matrix + matrix.T)
        damping = system.resolve_damping()
        matrix.diagonal().add_(damping)
        # A direct solve from x0 is one for the correction to it.
        start, target = system.begin(x0, damping)
        # Of an undamped matrix, eigenvalues below the rounding of its products are zero; damping
        # is exact, so that of a damped one only the arithmetic's own rounding counts.
        eps = torch.finfo(system.operator.dtype if damping == 0 else system.b.dtype).eps
        tolerances = system.tolerances(self.rtol, 0.0)
        solve = _factorised(matrix, eps, self.fallback)
        smallest: float | None = None
        x, norms = start, torch.full_like(tolerances, torch.inf)
        if solve is not None:
            x = start + solve(target.T).T
            norms = row_norms(system.residual(x, damping))
        if solve is None or (solve.indefinite and bool((norms > tolerances).any())):
            correction, smallest = _least_squares(matrix, target, eps)
            smallest -= damping
            other = start + correction
            other_norms = row_norms(system.residual(other, damping))
            better = other_norms < norms
            x = torch.where(better[:, None], other, x)
            norms = torch.where(better, other_norms, norms)
        met = norms <= tolerances
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=[Status.CONVERGED if ok else Status.STAGNATED for ok in met.tolist()],
            iterations=[0] * len(x),
            damping=damping,
            smallest_eigenvalue=smallest,
        )

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """LU with pivoting, for which an indefinite matrix is no special case.

        A singular one gives inf or nan, or an answer whose residual shows it.
        """
        if system.damping == "auto":
            return super()._run_traced(system, x0)
        damping = float(system.damping)
        matrix = self._assemble(system)
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix = 0.5 * (matrix + matrix.T) + damping * eye
        start, target = begin_traced(system, x0, damping)
        x = start + torch.linalg.solve_ex(matrix, target.T)[0].T
        return x, safe_norms(residual_traced(system, x, damping))

    def _check_memory(self, system: DampedSystem) -> None:
        n = system.operator.layout.dim
        needed = 6 * n * n * system.b.element_size()  # measured: 5.7 with the eigendecomposition
        refuse_if_too_large(
            f"an exact solve of dimension {n}",
            needed, self.max_bytes, system.b.device, instead="CG or Nystrom", solver="Exact",
        )  # fmt: skip

    def _assemble(self, system: DampedSystem) -> Tensor:
        """The rows A e_i."""
        n = system.b.shape[1]
        chunk = self.chunk_size or max(
            1, min(_CHUNK, _CHUNK_BYTES // (n * system.b.element_size()))
        )
        matrix = system.b.new_empty(n, n)
        for first in range(0, n, chunk):
            last = min(first + chunk, n)
            # Not filled in place: torch.compile functionalises no fill of a view's diagonal.
            eye = torch.eye(last - first, dtype=system.b.dtype, device=system.b.device)
            rows = torch.nn.functional.pad(eye, (first, n - last))
            matrix[first:last] = system.product(rows)
        return matrix


@dataclass(frozen=True)
class _Factorised:
    """A factorisation that has been found safe: a call solves for columns."""

    apply: Callable[[Tensor], Tensor]
    indefinite: bool

    def __call__(self, columns: Tensor) -> Tensor:
        return self.apply(columns)


def _factorised(matrix: Tensor, eps: float, fallback: Fallback) -> _Factorised | None:
    """Cholesky or what follows it; None where only eigenvalues help."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        positive = _Factorised(lambda columns: torch.cholesky_solve(columns, factor), False)
        return None if _is_singular(matrix, positive, eps) else positive
    if fallback == "eigh":
        return None
    packed, pivots, failed = torch.linalg.ldl_factor_ex(matrix)
    if int(failed) != 0:
        return None
    general = _Factorised(lambda columns: torch.linalg.ldl_solve(packed, pivots, columns), True)
    return None if _is_singular(matrix, general, eps) else general


def _least_squares(matrix: Tensor, target: Tensor, eps: float) -> tuple[Tensor, float]:
    """Least-squares solutions of smallest norm, shape (m, n), and the smallest eigenvalue."""
    values, vectors = torch.linalg.eigh(matrix)
    # Roundings of size eps |A| make a matrix of norm n eps |A| at worst, and of about sqrt(n) eps
    # |A| when they are independent; 16 bits leave no more than the cap.
    n = len(matrix)
    floor = min(n * eps, 4.0 * n**0.5 * eps, 1e-2) * values.abs().max()
    inverse = torch.where(values.abs() > floor, 1.0 / values, torch.zeros_like(values))
    return ((target @ vectors) * inverse) @ vectors.T, float(values[0])


def _is_singular(matrix: Tensor, solve: Callable[[Tensor], Tensor], eps: float) -> bool:
    """Whether a matrix that was factorised is singular to rounding.

    Rounding gives a zero eigenvalue either sign, so the factorisation of a singular matrix
    succeeds half of the time.  Two inverse iterations find the smallest eigenvalue then: the
    start's share along its eigenvector, 1/sqrt(n) or so, is amplified by its inverse twice.
    """
    source = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), 1, generator=source, device="cpu", dtype=torch.float32).to(
        matrix
    )
    # In units of the matrix's own size, so that no scale over- or underflows.
    size = float(row_norms(matrix).max())
    for _ in range(2):
        vector = solve(size * (vector / row_norms(vector.T)))
    smallest = 1.0 / float(row_norms(vector.T))
    largest = float((matrix / size).abs().sum(dim=0).max())
    return not smallest > eps * largest
