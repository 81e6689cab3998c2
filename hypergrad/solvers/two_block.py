"""A Nyström sketch of fixed work: two blocks of products, whatever the operator is like.

What ``sketching`` decides by looking at values (a second pass where rounding could be felt, Ritz
pairs where there is negative curvature) is always done here: Ritz pairs on the span of the test
matrix and of its products.  So the same code runs eagerly and, as one graph, compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NegativeCurvatureError, SolverOptionError
from .base import DampedSystem
from .sketch import NegativeCurvature, NystromSketch
from .skew import check_skew

#: Rows whose part outside the others' span is below this many eps count as dependent.
_DEPENDENT = 10.0


def two_block_sketch(
    system: DampedSystem, test_matrix: Tensor, policy: NegativeCurvature, *, traced: bool = False
) -> NystromSketch:
    """Ritz pairs of A on the span of Omega and A Omega: 2 k products, at most n.

    Ritz values never leave the spectrum, whatever its signs, and eigenpairs of the span are as
    right as products are.  Omega belongs to the space because the range of A Omega alone may show
    nothing (columns of one block of [[0, B], [B', 0]]).

    Args:
        system: whose operator it is.
        test_matrix: shape (k, n), independent rows.
        policy: what to make of negative Ritz values.
        traced: whether values cannot be looked at: all checks are left out, and the sketch's
            figures other than eigenvalues and basis are blank.

    Raises:
        SolverOptionError: rows of another length than n, or dependent ones.
        NotSymmetricError: the products are not those of a symmetric operator.
        NegativeCurvatureError: there is negative curvature and the policy is ``"raise"``.
    """
    layout, b = system.operator.layout, system.b
    before = system.num_hvps
    k, n = test_matrix.shape
    if n != layout.dim or k > n:
        raise SolverOptionError(
            f"test_matrix is of shape {(k, n)}, but v has {layout.dim} entries; expected "
            f"{layout.dim} columns and at most as many rows."
        )
    omega = system.rounded(test_matrix.detach().to(b))  # what the products really are of
    y = system.product(omega)
    # A Householder QR: orthonormal also where Y adds nothing to the span.  R11 is that of Omega.
    columns, r = torch.linalg.qr(torch.cat([omega, y]).T)
    head = r[:k, :k]
    if not traced:
        _check_independent(head)
    q = columns.T.contiguous()
    # The products with the first k are known: q1 = R11^-T Omega, hence A q1 = R11^-T Y.
    image = torch.linalg.solve_triangular(head.T, y, upper=False)
    if len(q) > k:
        image = torch.cat([image, system.product(q[k:])])
    small = q @ image.T
    symmetric = 0.5 * (small + small.T)
    values, vectors = torch.linalg.eigh(symmetric)
    eps = torch.finfo(system.operator.dtype).eps
    # Below zero by rounding is zero.
    negative = values[0] < -10.0 * eps * values.abs().amax()
    kept = torch.where(negative, values, values.clamp(min=0.0))
    if policy == "absolute":
        kept = kept.abs()
    elif policy == "clip":
        kept = kept.clamp(min=0.0)
    figures: dict[str, Any] = {"smallest_eigenvalue": float("nan"), "tail": float("nan")}
    if not traced:
        check_skew(
            torch.linalg.matrix_norm(small - small.T, ord=2) / 2,
            torch.linalg.matrix_norm(image, ord=2),
            system.operator.dtype,
        )
        lowest = float(values[0]) if bool(negative) else max(float(values[0]), 0.0)
        if policy == "raise" and lowest < 0:
            raise NegativeCurvatureError(
                f"the operator has negative curvature: smallest Ritz value {lowest:.3e}, largest "
                f"{float(values[-1]):.3e}. Solve the inner problem further, use a Gauss-Newton "
                "operator, add damping with negative_curvature='keep', or choose 'absolute' or "
                "'clip'."
            )
        coupling = float(torch.linalg.matrix_norm(image - symmetric @ q, ord=2))
        figures = {"smallest_eigenvalue": lowest, "tail": coupling}
    return NystromSketch(
        eigenvalues=kept.flip(0),
        basis=(vectors.T @ q).flip(0),
        layout=layout,
        operator_dtype=system.operator.dtype,
        num_hvps=system.num_hvps - before,
        negative_curvature=policy,
        **figures,
    )


def _check_independent(head: Tensor) -> None:
    """By the QR factor of the test matrix, whose diagonal is what each row adds to the span."""
    own = head.diagonal().abs()
    sizes = torch.linalg.vector_norm(head, dim=0)
    least = _DEPENDENT * torch.finfo(head.dtype).eps * sizes
    if bool((own <= least).any()):
        raise SolverOptionError(
            f"test_matrix has dependent rows: {int((own <= least).sum())} of its {len(own)} add "
            "nothing to the span of those before. Draw them at random, as torch.randn does."
        )
