"""Box and simplex on the outer parameters: projections, and maps from free parameters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConstraintError, LeafTypeError
from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from ..solvers.options import check_option, is_tolerance
from ..transforms import transforming

#: A lower or upper bound: a number, None for none, a tensor, or a tree like the parameters.
Bound = Any


def project_box(tree: Tree, low: Bound = None, high: Bound = None) -> Tree:
    """The nearest point of the box low <= y <= high, entry by entry.

    After a step of your own optimiser, ``y.copy_(project_box(y, 0.0, 1.0))`` under
    ``torch.no_grad()`` is projected gradient descent.

    Args:
        tree: any tree of floating-point tensors.
        low: lower bound: a number, a tensor that broadcasts to each leaf, a tree like ``tree``
            whose leaves do, or None for none.  Entries may be -inf.
        high: upper bound, likewise; entries may be inf.

    Returns:
        A tree like ``tree``, in its dtypes; attached to it where it requires grad (the derivative
        is 1 inside of the box and 0 where a bound holds the entry).

    Raises:
        ConstraintError: a bound is nan, does not fit ``tree``, or ``low`` exceeds ``high``.
        NonFiniteError: ``tree`` holds nan or inf.
        LeafTypeError, EmptyTreeError, DeviceError: ``tree`` is no tree of real tensors.

    Source: Bertsekas, "On the Goldstein-Levitin-Polyak gradient projection method", IEEE Trans.
    Automatic Control 21 (1976).

    Examples:
        >>> import torch, hypergrad
        >>> hypergrad.project_box({"rate": torch.tensor([-1.0, 0.5, 2.0])}, 0.0, 1.0)
        {'rate': tensor([0.0000, 0.5000, 1.0000])}
    """
    layout, leaves = _checked(tree)
    lows, highs = _bounds(layout, leaves, low, high)
    return layout.unflatten_leaves(
        [torch.clamp(leaf, a, b) for leaf, a, b in zip(leaves, lows, highs, strict=True)]
    )


def project_simplex(tree: Tree, total: float = 1.0) -> Tree:
    """The nearest point of the simplex {y >= 0, sum of y = total}, along the last dimension.

    Every leaf is a batch of vectors along its last dimension, each projected by itself: with the
    threshold t for which the sum of max(y - t, 0) is ``total``, the entries become max(y - t, 0).

    Args:
        tree: any tree of floating-point tensors of one dimension or more.
        total: the sum, > 0.

    Returns:
        A tree like ``tree``; entries are >= 0 and the sums are ``total`` to the rounding of the
        dtype.  Attached to ``tree`` where it requires grad.

    Raises:
        ConstraintError: a leaf has no last dimension, or one of size zero.
        SolverOptionError: ``total`` is no finite number > 0.
        NonFiniteError, LeafTypeError, EmptyTreeError, DeviceError: see :func:`project_box`.

    Cost: one sort.  Source: Held, Wolfe and Crowder, "Validation of subgradient optimization",
    Math. Programming 6 (1974); Duchi et al., ICML 2008, algorithm 1.

    Examples:
        >>> import torch, hypergrad
        >>> hypergrad.project_simplex(torch.tensor([[1.0, 0.5, -2.0], [0.0, 0.0, 0.0]]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """
    _check_total(total)
    layout, leaves = _checked(tree, vectors=True)
    return layout.unflatten_leaves([_on_simplex(leaf, float(total)) for leaf in leaves])


def sigmoid_box(free: Tree, low: Bound = None, high: Bound = None) -> Tree:
    """A point of the open box low < y < high from free parameters: a smooth map onto it.

    low + (high - low) sigmoid(z) between two bounds, low + softplus(z) or high - softplus(-z) with
    one, and z itself with none.  Increasing in every entry.  Learn z, and call it first in both
    losses: the chain rule is autograd's.

    Args:
        free: z, any tree of floating-point tensors.
        low: see :func:`project_box`.
        high: see :func:`project_box`.

    Returns:
        A tree like ``free``, attached to it.  Far out, rounding puts entries on the bound itself,
        where the gradient is zero.

    Raises:
        ConstraintError: a bound is nan or does not fit, ``low`` is not below ``high``, or their
            distance overflows the dtype.
        LeafTypeError, EmptyTreeError, DeviceError: see :func:`project_box`.

    Examples:
        >>> import torch, hypergrad
        >>> rate = hypergrad.sigmoid_box(torch.tensor([-2.0, 0.0]), 0.0, 0.5)
        >>> rate, hypergrad.sigmoid_box_inverse(rate, 0.0, 0.5)
        (tensor([0.0596, 0.2500]), tensor([-2.,  0.]))
    """
    return _mapped(free, low, high, _into_box)


def sigmoid_box_inverse(tree: Tree, low: Bound = None, high: Bound = None) -> Tree:
    """The free parameters z with ``sigmoid_box(z, low, high)`` = y: where to start from.

    Args:
        tree: y, strictly inside of the box.
        low: see :func:`project_box`.
        high: see :func:`project_box`.

    Raises:
        ConstraintError: an entry is on a bound or outside; or see :func:`sigmoid_box`.
        NonFiniteError, LeafTypeError, EmptyTreeError, DeviceError: see :func:`project_box`.
    """
    return _mapped(tree, low, high, _out_of_box)


def softmax_simplex(free: Tree, total: float = 1.0) -> Tree:
    """A point of the open simplex from free parameters: ``total`` times the softmax of each row.

    Args:
        free: z, any tree of floating-point tensors of one dimension or more.
        total: the sum of each row along the last dimension, > 0.

    Returns:
        A tree like ``free``, attached to it.  A constant added to a row of z changes nothing.

    Raises:
        ConstraintError, SolverOptionError, LeafTypeError, EmptyTreeError, DeviceError: see
            :func:`project_simplex`.

    Examples:
        >>> import torch, hypergrad
        >>> weights = hypergrad.softmax_simplex(torch.tensor([0.0, 1.0]))
        >>> weights, hypergrad.softmax_simplex_inverse(weights)
        (tensor([0.2689, 0.7311]), tensor([-0.5000,  0.5000]))
    """
    _check_total(total)
    layout, leaves = _checked(free, vectors=True, finite=False)
    return layout.unflatten_leaves([total * torch.softmax(leaf, dim=-1) for leaf in leaves])


def softmax_simplex_inverse(tree: Tree, total: float = 1.0) -> Tree:
    """The free parameters z with ``softmax_simplex(z, total)`` = y whose rows have mean zero.

    Args:
        tree: y > 0, rows of sum ``total`` to the square root of the dtype's eps.
        total: see :func:`softmax_simplex`.

    Raises:
        ConstraintError: an entry is not positive, or a row has another sum.
        SolverOptionError, NonFiniteError, LeafTypeError, EmptyTreeError, DeviceError: see
            :func:`project_simplex`.
    """
    _check_total(total)
    layout, leaves = _checked(tree, vectors=True)
    free = []
    for leaf, path in zip(leaves, layout.paths, strict=True):
        plain = leaf.detach().to(working_dtype(leaf.dtype, leaf.device))
        off = (plain.sum(-1) - total).abs() / total > math.sqrt(torch.finfo(leaf.dtype).eps)
        if not transforming() and bool((off | (plain <= 0).any(-1)).any()):
            worst = float((plain.sum(-1) - total).abs().max())
            raise ConstraintError(
                f"{path or 'the tensor'} is not inside of the simplex: its smallest entry is "
                f"{float(plain.min()):.3g} and a sum is off by {worst:.1e} of {total:.3g}. Expected"
                " positive entries; project_simplex takes any, and a step off the boundary."
            )
        logs = leaf.log()
        free.append(logs - logs.mean(-1, keepdim=True))
    return layout.unflatten_leaves(free)


def _on_simplex(leaf: Tensor, total: float) -> Tensor:
    wide = leaf.to(working_dtype(leaf.dtype, leaf.device))
    # The projection does not change with a constant added to the row: with the largest at zero, a
    # common offset does not take the digits.  Entries `total` below the largest become zero, so
    # that how far below they are does not matter, and cannot overflow a sum.
    wide = (wide - wide.detach().amax(-1, keepdim=True)).clamp(min=-total)
    ordered = wide.sort(dim=-1, descending=True).values
    counts = torch.arange(1, wide.shape[-1] + 1, dtype=wide.dtype, device=wide.device)
    # Candidates for the threshold: entry k is kept where it exceeds that of the first k.
    thresholds = (ordered.cumsum(-1) - total) / counts
    kept = (ordered > thresholds).sum(-1, keepdim=True)
    threshold = thresholds.gather(-1, kept - 1)
    return torch.clamp(wide - threshold, min=0.0).to(leaf.dtype)


def _into_box(z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    above, below, a, b = _sides(low, high)
    width = torch.where(above & below, b - a, 1.0)
    # From the nearer bound, so that neither is passed by rounding nor loses its digits.
    between = torch.where(z < 0, a + width * torch.sigmoid(z), b - width * torch.sigmoid(-z))
    one_sided = torch.where(
        above,
        a + _softplus(z),
        b - _softplus(-z),
    )
    return torch.where(above & below, between, torch.where(above | below, one_sided, z))


def _out_of_box(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    inside = (y.detach() > low) & (y.detach() < high)
    if not transforming() and not bool(inside.all()):
        worst = y.detach()[~inside].reshape(-1)[0]
        raise ConstraintError(
            f"{int((~inside).sum())} of {y.numel()} entries are not strictly inside of the box, "
            f"such as {float(worst):.6g}. The map reaches no bound: start inside, or use "
            "project_box."
        )
    above, below, a, b = _sides(low, high)
    # Where a bound is infinite its distance is never used; 1 keeps the branch's gradient finite.
    from_low = torch.where(above, y - a, 1.0)
    from_high = torch.where(below, b - y, 1.0)
    between = from_low.log() - from_high.log()
    one_sided = torch.where(above, _softplus_inverse(from_low), -_softplus_inverse(from_high))
    return torch.where(above & below, between, torch.where(above | below, one_sided, y))


def _softplus(z: Tensor) -> Tensor:
    # Beyond 50 log(1 + exp(z)) is z to the last digit of float64, and exp(z) is on its way out of
    # the range of float32: its gradient inf / inf would be nan in entries that do not use it too.
    return torch.nn.functional.softplus(z, threshold=50.0)


def _softplus_inverse(s: Tensor) -> Tensor:
    """The z with log(1 + exp(z)) = s, for s > 0."""
    return s + torch.log(-torch.expm1(-s))


def _sides(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which entries have a lower and an upper bound, and both with 0 in the place of infinities."""
    above, below = torch.isfinite(low), torch.isfinite(high)
    return above, below, torch.where(above, low, 0.0), torch.where(below, high, 0.0)


def _mapped(
    tree: Tree, low: Bound, high: Bound, function: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tree:
    layout, leaves = _checked(tree, finite=function is _out_of_box)
    lows, highs = _bounds(layout, leaves, low, high, strict=True)
    for a, b, path in zip(lows, highs, layout.paths, strict=True):
        _check_width(a, b, path)
    return layout.unflatten_leaves(
        [function(leaf, a, b) for leaf, a, b in zip(leaves, lows, highs, strict=True)]
    )


def _checked(
    tree: Tree, *, vectors: bool = False, finite: bool = True
) -> tuple[TreeLayout, list[Tensor]]:
    layout = TreeLayout.of(tree, name="the tree")
    leaves = layout.leaves(tree, name="the tree")
    if finite and not transforming():  # inside of vmap there is no value to look at
        layout.check_finite(layout.flatten(tree, name="the tree"), "the tree")
    if vectors:
        for leaf, path in zip(leaves, layout.paths, strict=True):
            if leaf.ndim == 0 or leaf.shape[-1] == 0:
                raise ConstraintError(
                    f"{path or 'the tensor'} has shape {tuple(leaf.shape)}, expected vectors along "
                    "a last dimension of at least 1 to put on a simplex."
                )
    return layout, leaves


def _check_total(total: Any) -> None:
    check_option(is_tolerance(total) and total > 0, "total", total, "a finite number > 0")


def _bounds(
    layout: TreeLayout, leaves: list[Tensor], low: Bound, high: Bound, *, strict: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Both bounds of each leaf, in its own shape, dtype and device."""
    lows = _bound(layout, leaves, low, "low", -math.inf)
    highs = _bound(layout, leaves, high, "high", math.inf)
    for a, b, path in zip(lows, highs, layout.paths, strict=True):
        wrong = (a >= b) if strict else (a > b)
        # A lower bound of +inf, or an upper one of -inf, leaves no finite point.
        wrong = wrong | (a == math.inf) | (b == -math.inf)
        if bool(wrong.any()):
            relation = "not below" if strict else "above"
            raise ConstraintError(
                f"low is {relation} high in {int(wrong.sum())} entries of {path or 'the tensor'}, "
                f"such as {float(a[wrong][0]):.6g} and {float(b[wrong][0]):.6g}: no point "
                "satisfies both."
            )
    return lows, highs


def _bound(
    layout: TreeLayout, leaves: list[Tensor], bound: Bound, name: str, none: float
) -> list[Tensor]:
    values: list[Any]
    if bound is None or isinstance(bound, numbers.Real | Tensor):
        values = [none if bound is None else bound] * len(leaves)
    else:
        given = TreeLayout.of(bound, name=name)
        if given.paths != layout.paths:
            raise ConstraintError(
                f"{name} has the leaves {list(given.paths)}, expected those of the tree, "
                f"{list(layout.paths)}; or one number or tensor for all."
            )
        values = given.leaves(bound, name=name)
    filled = []
    for value, leaf, path in zip(values, leaves, layout.paths, strict=True):
        if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
            raise LeafTypeError(f"{name} has dtype {value.dtype}, expected real numbers.")
        # A bound stands still: it gets no gradient.
        tensor = torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device).detach()
        try:
            tensor = tensor.expand(leaf.shape)
        except RuntimeError:
            raise ConstraintError(
                f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to "
                f"{path or 'the tensor'} of shape {tuple(leaf.shape)}."
            ) from None
        if bool(torch.isnan(tensor).any()):
            raise ConstraintError(f"{name} holds nan. Use None, or an infinity, for no bound.")
        filled.append(tensor)
    return filled


def _check_width(low: Tensor, high: Tensor, path: str) -> None:
    """Raise where two finite bounds are so far apart that their distance overflows."""
    wide = torch.isfinite(low) & torch.isfinite(high) & torch.isinf(high - low)
    if bool(wide.any()):
        raise ConstraintError(
            f"low and high are {float(low[wide][0]):.6g} and {float(high[wide][0]):.6g} in "
            f"{path or 'the tensor'}: {low.dtype} cannot hold their distance. Use None, or an "
            "infinity, for no bound, or a wider dtype."
        )
