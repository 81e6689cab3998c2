"""The ends of an operator's spectrum, and the damping chosen from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..pytree import Tree
from .lanczos import Tridiagonal, tridiagonalise
from .products import Products, check_count

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
        smallest_bound: ``smallest`` less the norm of its Ritz vector's own residual: some
            eigenvalue lies between the two, in a short run not yet the smallest one.
        num_hvps: products used.
    """

    smallest: float
    largest: float
    largest_bound: float
    smallest_bound: float
    num_hvps: int


def extreme_eigenvalues(
    operator: Any,
    like: Tree | None = None,
    *,
    num_steps: int = 20,
    generator: torch.Generator | None = None,
) -> ExtremeEigenvalues:
    """Estimate the smallest and largest eigenvalue by Lanczos with full reorthogonalisation.

    Args:
        operator: the operator A, or anything else that :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of the operator's argument; callables need it.
        num_steps: Lanczos steps; capped at the dimension, where the values are exact.
        generator: source of the random start; the default is seeded, so the estimate is the
            same every time and the global random state is left alone.

    Raises:
        SolverOptionError: ``num_steps`` below one.
        NonFiniteError: a product holds nan or inf.
        NotSymmetricError: the products are not those of a symmetric operator.

    Cost: at most ``num_steps`` products and as many vectors of memory.

    Examples:
        >>> import torch, hypergrad
        >>> a = hypergrad.as_operator(torch.diag(torch.arange(1.0, 6.0)))
        >>> ends = hypergrad.extreme_eigenvalues(a)
        >>> round(ends.smallest, 4), round(ends.largest, 4), ends.num_hvps
        (1.0, 5.0, 5)
    """
    check_count(num_steps, "num_steps")
    products = Products(operator, like)
    start = _start(products.dim, products.dtype, products.operator.device, generator)
    allowed = products.asymmetry_allowed
    (found,) = tridiagonalise(products, start[None], num_steps, asymmetry_allowed=allowed)
    return _ends(found)


def lanczos_extremes(
    product: Callable[[Tensor], Tensor],
    dim: int,
    num_steps: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> ExtremeEigenvalues:
    """:func:`extreme_eigenvalues` on flat vectors of shape (n,); ``start`` is random if None."""
    if start is None:
        start = _start(dim, dtype, device, generator)
    (found,) = tridiagonalise(lambda block: product(block[0])[None], start[None], num_steps)
    return _ends(found)


def _start(
    dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(dim, generator=generator, device=generator.device, dtype=torch.float32)
    return start.to(device=device, dtype=dtype)


def _ends(found: Tridiagonal) -> ExtremeEigenvalues:
    smallest, largest = float(found.nodes[0]), float(found.nodes[-1])
    return ExtremeEigenvalues(
        smallest=smallest,
        largest=largest,
        largest_bound=largest + found.residual,
        smallest_bound=smallest - found.residual * abs(float(found.last[0])),
        num_hvps=len(found.nodes),
    )


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
