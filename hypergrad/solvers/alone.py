"""A Nyström sketch by itself: to be looked at, reused, or a preconditioner."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..errors import ConvergenceWarning, warn
from ..operators import as_operator
from ..pytree import Tree
from .complement import ComplementKind
from .embedding import SketchKind
from .nystrom import Nystrom
from .options import Damping
from .sketch import NegativeCurvature, NystromSketch, bare_system, positive_damping


def nystrom_sketch(
    operator: Any,
    rank: int | Literal["auto"],
    like: Tree | None = None,
    *,
    damping: Damping = "auto",
    sketch: SketchKind = "gaussian",
    generator: torch.Generator | None = None,
    negative_curvature: NegativeCurvature = "keep",
    complement: ComplementKind = "quadrature",
    diagonal: Tree | None = None,
    tol: float = 9.0,
    max_rank: int | None = None,
) -> NystromSketch:
    """Sketch a symmetric operator with ``rank`` products.

    With test matrix Omega (n x k, orthonormal), Y = A Omega and core W = Omega' Y, the Nyström
    approximation is Y W^+ Y'.  The core is truncated at the rounding of the products, so nothing
    is shifted and a singular core is no special case.  Of an indefinite A, Y W^+ Y' can have
    eigenvalues far outside the spectrum; where W or the Rayleigh quotient of the largest shows
    that, the sketch is the Rayleigh-Ritz one on the span of Omega and Y, at ``rank`` more
    products.  Where the rounding of the products, amplified by W^+, could be felt in an answer,
    the range of Y becomes the test matrix of a second pass, also at ``rank`` more products.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes.
        rank: k, from 1 to the dimension n; or ``"auto"``: doubled from 8, keeping all products,
            until the condition number of the system preconditioned with the sketch is bounded by
            1 + ``tol``, or to ``max_rank``.
        like: a tree of the structure of the operator's argument; callables need it.
        damping: the smallest one that the sketch will be used at.  It can be solved with at any
            other, but what rounding, an automatic rank or the complement are worth depends on it.
            With ``"auto"`` the first two go by that of :meth:`NystromSketch.auto_damping`, and
            the complement is measured for any.
        sketch: ``"gaussian"`` (orthonormalised); ``"columns"``: k columns of the identity, drawn
            uniformly (Hataya and Yamada); ``"diagonal"``: columns drawn in proportion to the
            diagonal of A, without replacement; ``"structured"``: rows of a cosine transform with
            random signs.
        generator: source of the random test matrix; None for torch's global one.
        negative_curvature: what to make of negative eigenvalues: ``"keep"`` them (A + damping I
            as it is), ``"absolute"`` values (saddle-free), ``"clip"`` to zero (the positive
            part), or ``"raise"``.
        complement: what A is taken for outside the sketch: ``"zero"``, or ``"quadrature"``: a
            multiple of the identity from at most five Lanczos steps there
            (Golub and Meurant 1993), spent only where the last
            eigenvalue of the sketch exceeds half the damping, or the rank was used up and the
            damping is ``"auto"``.
        diagonal: for ``sketch="diagonal"``, the diagonal of A, a tree like its argument; entries
            count by their size.  None to estimate it with 10 more products.
        tol: for ``rank="auto"``; 9 bounds the condition number by 10.
        max_rank: for ``rank="auto"``; None for 256.

    Raises:
        RankError: rank below 1 or above n.
        SolverOptionError: an unknown ``sketch``, policy or ``complement``, or ``tol`` <= 0.
        NotSymmetricError: the products are not those of a symmetric operator.
        NonFiniteError: a product, or the diagonal, holds nan or inf.
        NegativeCurvatureError: there is negative curvature and the policy is ``"raise"``.

    Warns:
        ConvergenceWarning: ``rank="auto"`` ended at ``max_rank`` short of ``tol``.

    Cost: k HVPs in one block and one to vouch for the largest eigenvalue; k more if there is
    negative curvature or rounding asks for a second pass (2 k more where both do); 5 for the
    complement, 10 for a diagonal, 10 for each time an automatic rank looks at its error;
    O(n k^2) operations, three n x k blocks of memory; of 2^25 numbers or more (Gaussian, of fixed
    rank) one block in the products' dtype and three vectors, and where there is negative curvature
    the Ritz pairs are those on the range of A Omega alone.
    Sources: Hataya and Yamada, AISTATS 2023 (columns); Frangella, Tropp, Udell, arXiv 2110.02820
    (Gaussian, algorithm 2.1; automatic rank, section 5.4); Nakatsukasa and Park, arXiv 2212.01127
    (indefinite A).

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.logspace(0, -8, 200, dtype=torch.float64))
        >>> sketch = hypergrad.nystrom_sketch(a, rank="auto", damping=1e-4)
        >>> sketch.condition_bound <= 10.0, sketch.rank < 200
        (True, True)
    """
    config = Nystrom(
        rank, sketch, generator, negative_curvature, complement, diagonal, tol, max_rank
    )
    op = as_operator(operator, like=like)
    if damping != "auto":
        damping = positive_damping(damping)
    made = config._sketch_of(bare_system(op, damping=damping), any_damping=damping == "auto")
    if config._capped(made):
        warn(
            f"rank='auto' ended at its cap, rank {made.rank}: the condition number of the "
            f"preconditioned system is bounded by {made.condition_bound:.2g}, more than the "
            f"{1.0 + tol:.2g} asked for. Raise max_rank, tol or damping.",
            ConvergenceWarning,
        )
    return made
