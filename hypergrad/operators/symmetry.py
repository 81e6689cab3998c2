"""Whether products are those of one symmetric operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotSymmetricError, SolverOptionError
from ..norms import powers_of_two
from ..precision import working_dtype
from ..pytree import Tree
from .interop import as_operator


def check_symmetric(
    operator: Any,
    like: Tree | None = None,
    *,
    num_pairs: int = 3,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Compare v'A w with w'A v for random pairs, and raise where they differ beyond rounding.

    A loss whose derivatives are right and that is the same function in every product passes.  What
    fails: a custom backward pass with a wrong or missing second derivative, dropout or minibatches
    that are drawn afresh in a callable, a Jacobian that is no Hessian.

    Args:
        operator: anything that :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of its argument; callables need it.
        num_pairs: how many pairs are tried.
        rtol: how far the two may differ, relative to |v| |A w| + |w| |A v|; None for the root of
            the dtype's rounding, 1.5e-8 in float64 and 3.5e-4 in float32.
        generator: source of the pairs; None for a fixed seed.

    Returns:
        The largest relative difference that was seen; 0.0 for an operator that is zero.

    Raises:
        NotSymmetricError: a difference above ``rtol``.
        NonFiniteError: a product holds nan or inf.
        SolverOptionError: ``num_pairs`` < 1 or a negative ``rtol``.

    Cost: 2 ``num_pairs`` products.

    Examples:
        >>> import torch, hypergrad
        >>> hypergrad.check_symmetric(torch.tensor([[2.0, 1.0], [1.0, 3.0]])) < 1e-6
        True
        >>> hypergrad.check_symmetric(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
        Traceback (most recent call last):
            ...
        hypergrad.errors.NotSymmetricError: v'A w and w'A v differ by ...
    """
    op = as_operator(operator, like=like)
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int) or num_pairs < 1:
        raise SolverOptionError(f"num_pairs is {num_pairs!r}, expected an integer >= 1.")
    allowed = float(torch.finfo(op.dtype).eps ** 0.5) if rtol is None else float(rtol)
    if not allowed >= 0:
        raise SolverOptionError(f"rtol is {rtol!r}, expected a number >= 0 or None.")
    source = torch.Generator().manual_seed(0) if generator is None else generator
    wide = working_dtype(op.dtype, op.device)

    def drawn() -> Tensor:
        block = torch.randn(
            num_pairs, op.layout.dim, generator=source, device=source.device,
            dtype=working_dtype(torch.float64, source.device),
        )  # fmt: skip
        # As the operator multiplies it: rounded to the dtype of each leaf.
        return op.layout.narrowed(block.to(dtype=op.dtype, device=op.device))

    v, w = drawn(), drawn()
    # One call after the other, so that what differs from call to call shows.
    images = [op._apply(v), op._apply(w)]
    for image in images:
        op.layout.check_finite(image, "a product")
    v, w, av, aw = (block.to(wide) for block in (v, w, *images))
    # In units of the largest entry: products of very large or small numbers leave the range, and
    # with them any difference.
    largest = torch.maximum(av.abs().max(), aw.abs().max())
    unit = powers_of_two(largest)
    av, aw = av / unit, aw / unit
    if rtol is None and bool(largest > 0):  # near the end of the range there are fewer digits
        limits = torch.finfo(op.dtype)
        coarse = op.layout.dim * limits.smallest_normal * limits.eps / float(largest)
        allowed = max(allowed, coarse)
    gaps = ((w * av).sum(dim=1) - (v * aw).sum(dim=1)).abs()
    sizes = v.norm(dim=1) * aw.norm(dim=1) + w.norm(dim=1) * av.norm(dim=1)
    worst = float(torch.where(sizes > 0, gaps / sizes, 0.0).max())
    if worst != worst:
        raise NonFiniteError("products overflow in v'A w: the operator or its loss is too large.")
    if worst > allowed:
        raise NotSymmetricError(
            f"v'A w and w'A v differ by {worst:.1e} of their scale, expected rounding (at most "
            f"{allowed:.1e}). Likely causes: a custom autograd Function whose backward pass is not "
            "differentiable, products that differ from call to call (dropout or minibatches drawn "
            "afresh in a callable), a Jacobian that is not a Hessian."
        )
    return worst
