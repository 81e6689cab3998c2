"""Stochastic estimates of the diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..pytree import Tree
from .products import Products, check_choice, check_count, range_of, scale_of

DiagonalMethod = Literal["xdiag", "hutchinson"]


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class DiagonalEstimate:
    """An estimate of a diagonal with its own error, entry by entry.

    Attributes:
        value: the estimate, a tree of the operator's structure.
        standard_error: estimated standard deviation of each entry of ``value``, a tree of the same
            structure: 0 where it is exact, inf where too few independent samples were drawn.
        num_hvps: products used.
    """

    value: Tree
    standard_error: Tree
    num_hvps: int


def diagonal(
    operator: Any,
    like: Tree | None = None,
    *,
    num_hvps: int = 60,
    method: DiagonalMethod = "xdiag",
    generator: torch.Generator | None = None,
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric operator from ``num_hvps`` products.

    ``"hutchinson"`` is the mean of z * Az over random signs z: entry i has the variance
    (sum of A_ij^2 over j != i) / m.  ``"xdiag"`` takes the diagonal on the range of a sketch
    exactly and estimates that of the rest, leaving one vector out at a time: better where the
    spectrum falls fast, at most a factor sqrt(2) worse where it is flat.  Both are unbiased.  With
    ``num_hvps`` of at least the dimension n the diagonal is read off n columns and exact.

    Args:
        operator: the operator A, or anything else that :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of the operator's argument; callables need it.
        num_hvps: budget of products; at least 2 for ``"xdiag"``, which spends an even number, and
            1 for ``"hutchinson"``.  Twice as many say how far off the values may be.
        method: see above.
        generator: source of the random signs; None for torch's global one.

    Returns:
        A :class:`DiagonalEstimate`.  Entries of a positive semi-definite operator can come out
        negative, as unbiased estimates do.

    Raises:
        SolverOptionError: an unknown method, or ``num_hvps`` too small for it.
        NonFiniteError: a product holds nan or inf.

    Cost: at most ``num_hvps`` products, in blocks; O(n num_hvps^2) operations.
    Sources: Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57 (2007); Epperly, Tropp, Webber, arXiv
    2301.07825 (XDiag, section 2.4).

    Examples:
        >>> import torch, hypergrad
        >>> a = {"w": torch.tensor([3.0, 2.0]), "b": torch.tensor(1.0)}
        >>> hvp = lambda v: {name: a[name] * x for name, x in v.items()}
        >>> hypergrad.diagonal(hvp, like=a, num_hvps=2, method="hutchinson").value
        {'w': tensor([3., 2.]), 'b': tensor(1.)}
    """
    check_choice(method, "method", DiagonalMethod)
    check_count(num_hvps, "num_hvps", 2 if method == "xdiag" else 1)
    products = Products(operator, like)
    if num_hvps >= products.dim:
        value, error = _exact(products)
    else:
        sample = _xdiag if method == "xdiag" else _hutchinson
        value, error = _mean_and_error(sample(products, num_hvps, generator))
    layout = products.operator.layout
    return DiagonalEstimate(
        layout.unflatten(value.to(layout.dtype)),
        layout.unflatten(error.to(layout.dtype)),
        products.num_hvps,
    )


def _exact(products: Products) -> tuple[Tensor, Tensor]:
    pieces = []
    for columns in products.identity_chunks():
        image = products(products.unit_rows(columns))
        pieces.append(image[:, columns.start : columns.stop].diagonal())
    value = torch.cat(pieces)
    return value, torch.zeros_like(value)


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the rows of (m, n) and its standard error, shape (n,) each."""
    mean = samples.mean(dim=0)
    if len(samples) == 1:
        return mean, torch.full_like(mean, math.inf)
    unit = scale_of(samples)  # so that no square over- or underflows
    return mean, unit * (samples / unit).std(dim=0) / len(samples) ** 0.5


def _hutchinson(products: Products, num_hvps: int, generator: torch.Generator | None) -> Tensor:
    z = products.signs(num_hvps, generator)
    return z * products(z)


def _xdiag(products: Products, num_hvps: int, generator: torch.Generator | None) -> Tensor:
    """diag(P_i A) + w_i * (I - P_i) A w_i, with P_i the projector of ``_xtrace``."""
    omega = products.signs(num_hvps // 2, generator)
    y = products(omega)
    q, missing = range_of(y / scale_of(y), products.rounding)
    if len(q) == 0:  # nothing but rounding is seen: A is zero but for what the signs cancel
        return omega * y
    q = products.rounded(q)
    z = products(q)
    on_range = (q * z).sum(0) - (missing @ q) * (missing @ z)
    shares = y @ q.T
    shares = shares - torch.linalg.vecdot(shares, missing)[:, None] * missing
    samples: Tensor = on_range + omega * (y - shares @ q)
    return samples
