"""The ends of an operator's spectrum, and the damping chosen from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError, SolverOptionError
from .operators import as_operator
from .pytree import row_norms, working_dtype

#: damping="auto" bounds the condition number of a positive semi-definite system by about this.
AUTO_DAMPING_CONDITION = 1e3
#: damping="auto" exceeds the last eigenvalue of a sketch by this factor.
AUTO_DAMPING_TAIL = 3.0
#: damping="auto" exceeds the most negative eigenvalue seen by this factor.
AUTO_DAMPING_MARGIN = 1.5


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """What a short Lanczos run says about the ends of the spectrum.

    Attributes:
        smallest: smallest Ritz value; never below the smallest eigenvalue (up to rounding).
        largest: largest Ritz value; never above the largest eigenvalue (up to rounding).
        largest_bound: ``largest`` plus the norm of the last Lanczos residual: at or above the
            largest eigenvalue in practice (Zhou and Li, Numer. Linear Algebra Appl. 18, 2011).
        num_hvps: products used.
    """

    smallest: float
    largest: float
    largest_bound: float
    num_hvps: int


def extreme_eigenvalues(
    operator: Any, *, num_steps: int = 20, generator: torch.Generator | None = None
) -> ExtremeEigenvalues:
    """Estimate the smallest and largest eigenvalue by Lanczos with full reorthogonalisation.

    Args:
        operator: the operator A, or a matrix that :func:`hypergrad.as_operator` takes.
        num_steps: Lanczos steps; capped at the dimension, where the values are exact.
        generator: source of the random start; the default is seeded, so the estimate is the
            same every time and the global random state is left alone.

    Raises:
        SolverOptionError: ``num_steps`` below one.
        NonFiniteError: a product holds nan or inf.

    Cost: at most ``num_steps`` products and as many vectors of memory.

    Examples:
        >>> import torch, hypergrad
        >>> a = hypergrad.as_operator(torch.diag(torch.arange(1.0, 6.0)))
        >>> ends = hypergrad.extreme_eigenvalues(a)
        >>> round(ends.smallest, 4), round(ends.largest, 4), ends.num_hvps
        (1.0, 5.0, 5)
    """
    if not (isinstance(num_steps, int) and num_steps >= 1):
        raise SolverOptionError(f"num_steps is {num_steps!r}, expected an integer >= 1.")
    operator = as_operator(operator)
    dtype = working_dtype(operator.dtype, operator.device)

    def product(vector: Tensor) -> Tensor:
        out = operator._apply(vector.to(operator.dtype)[None])[0]
        operator.layout.check_finite(out, "the output of the operator")
        wide: Tensor = out.to(dtype)
        return wide

    return lanczos_extremes(
        product, operator.layout.dim, num_steps, dtype, operator.device, generator
    )


def lanczos_extremes(
    product: Callable[[Tensor], Tensor],
    dim: int,
    num_steps: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> ExtremeEigenvalues:
    """:func:`extreme_eigenvalues` on flat vectors of shape (n,)."""
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(dim, generator=generator, device=generator.device, dtype=torch.float32)
    start = start.to(device=device, dtype=dtype)
    basis = [start / torch.linalg.vector_norm(start)]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    residual = 0.0
    for _ in range(min(num_steps, dim)):
        image = product(basis[-1])
        norm = float(row_norms(image[None]))
        diagonal.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan; Parlett 1998, section 6.9)
            image = image - (known @ image) @ known
        residual = float(row_norms(image[None]))
        # An exactly invariant subspace: the Ritz values are eigenvalues, nothing is left to see.
        if len(basis) == dim or residual <= 10 * torch.finfo(dtype).eps * norm:
            residual = 0.0
            break
        off_diagonal.append(residual)
        basis.append(image / residual)
    steps = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, beta in enumerate(off_diagonal[: steps - 1]):
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = beta
    ritz = torch.linalg.eigvalsh(tridiagonal)
    smallest, largest = float(ritz[0]), float(ritz[-1])
    return ExtremeEigenvalues(smallest, largest, largest + residual, steps)


def damping_from_extremes(
    smallest: float, largest: float, *, rounding: float, tail: float = 0.0
) -> float:
    """The value of ``damping="auto"``, from the ends of the (sketched) spectrum.

    For a positive semi-definite operator: the larger of ``largest`` / 1000, which bounds the
    condition number of the damped system, and three times ``tail``, the eigenvalue at which a
    sketch stops seeing, so that what it missed is well below the damping.  (Measured with ranks
    5, 20 and 80 on flat, linear, 1/i, 1/i^2, exponential and outlier spectra of dimension 300, ten
    sketches each: relative residuals of at most 0.75; with a factor of one, up to 1.8.  An unlucky
    sketch of just as many vectors as there are outliers can leave more.)  With negative
    curvature: also at least 1.5 times the sum of ``tail`` and the most negative eigenvalue
    seen, so that the damped operator is positive definite there.  For the zero operator: 1, so
    that the answer is v.

    Args:
        smallest: smallest eigenvalue seen.
        largest: largest eigenvalue seen.
        rounding: relative size below which a negative eigenvalue is rounding.
        tail: see above.

    Raises:
        NonFiniteError: the eigenvalues are not finite, or too large for a finite damping.
    """
    scale = max(abs(smallest), abs(largest))
    if scale == 0.0:
        return 1.0
    damping = max(scale / AUTO_DAMPING_CONDITION, AUTO_DAMPING_TAIL * tail)
    if smallest < -rounding * scale:
        damping = max(damping, AUTO_DAMPING_MARGIN * (tail - smallest))
    if not 0.0 < damping < float("inf"):
        raise NonFiniteError(
            f"no finite positive damping fits eigenvalues in [{smallest}, {largest}]. "
            "Rescale the problem."
        )
    return damping
