"""Whether products are antisymmetric beyond rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotSymmetricError


def allowed_skew(dtype: torch.dtype) -> float:
    """Relative size up to which :func:`check_skew` takes an antisymmetric part for rounding."""
    return float(torch.finfo(dtype).eps ** 0.25)


def check_skew(skew: Tensor | float, size: Tensor | float, dtype: torch.dtype) -> None:
    """Raise :class:`NotSymmetricError` where products are antisymmetric beyond rounding.

    The tolerance is generous (the fourth root of the products' eps): it passes rounding and
    catches what is wrong in kind, such as a Jacobian that is no Hessian, or random products.

    Args:
        skew: sizes of antisymmetric parts, any shape, or one number.
        size: what they are measured against, same shape.
        dtype: dtype of the products.
    """
    allowed = allowed_skew(dtype)
    found = skew > allowed * size
    if found if isinstance(found, bool) else bool(found.any()):
        ratio = skew / size
        worst = float(ratio.max() if isinstance(ratio, Tensor) else ratio)
        raise NotSymmetricError(
            f"the operator is not symmetric: the antisymmetric part of its products has relative "
            f"size {worst:.1e}, expected rounding only (at most {allowed:.0e}). Common causes: a "
            "Jacobian that is not a Hessian, dropout or fresh minibatches (products differ from "
            "call to call), BatchNorm in training mode."
        )
