"""Norms of the rows of a block, safe at every scale, and the powers of two next to them."""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import compiling, far


def row_norms(block: Tensor) -> Tensor:
    """Euclidean norm of each row of (m, n), safe from overflow and underflow; shape (m,)."""
    norms = plain_norms(block)
    # In this range no square that counts has left the dtype's: the usual case, in one pass.
    limits = torch.finfo(block.dtype)
    low, high = (limits.tiny / limits.eps) ** 0.5, limits.max**0.5
    if not (compiling() or far(norms)) and bool(((norms > low) & (norms < high)).all()):
        return norms
    return safe_norms(block)


def plain_norms(block: Tensor) -> Tensor:
    """Euclidean norm of each row of (m, n) whose squares are in the dtype's range; shape (m,)."""
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms


def safe_norms(block: Tensor) -> Tensor:
    """:func:`row_norms` without a branch on values, at two passes more."""
    largest = block.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return scale * plain_norms(block / scale[:, None])


def powers_of_two(norms: Tensor) -> Tensor:
    """A power of two next to each norm (1 for zero).

    Scaling by it is exact, so the answer for 2^k v is 2^k times the answer for v, to the bit.
    """
    limit = 1000 if norms.dtype == torch.float64 else 120  # keep 2^-e itself representable
    norms_in_range = norms.clamp(2.0 ** (-limit - 1), 2.0 ** (limit - 1))
    # The quotient of a number and its mantissa is exact. Of the exponents, which are integers,
    # PyTorch 2.13 makes code that does not compile where float32 and float64 meet.
    mantissas, _ = torch.frexp(norms_in_range)
    return torch.where(norms > 0, norms_in_range / mantissas, 1.0)
