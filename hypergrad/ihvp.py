"""The one-call verbs: (A + damping I)^-1 v for a Hessian-vector product and a right-hand side.

Each is :func:`hypergrad.solve` with one solver; see there for the errors, which are common to
all, and for derivatives: the answers carry a graph where an input requires grad.  ``hvp_fn`` is
any Python callable v -> A v on trees (or anything else that :func:`hypergrad.as_operator` takes);
v is any tree of tensors; the answer has v's structure, dtype and device.  With
``return_info=True`` the answer is ``(x, info)``.  A failed solve warns
(:class:`hypergrad.ConvergenceWarning`) and returns the best answer found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from .operators import LinearOperator
from .pytree import Tree
from .solvers import CG, MINRES, Exact, Neumann, Nystrom, NystromPCG, Solver
from .solvers.options import Damping
from .solvers.sketch import SketchKind
from .solvers.solve import solve

HvpFn = Callable[[Tree], Tree] | Any


def exact_ihvp(hvp_fn: HvpFn, v: Tree, *, damping: Damping = 0.0, return_info: bool = False) -> Any:
    """(A + damping I)^-1 v by dense assembly and factorisation, for up to some thousand entries.

    Args:
        hvp_fn: the product v -> A v.
        v: right-hand side, any tree of floating-point tensors.
        damping: the multiple of the identity that is added, >= 0, or ``"auto"``.
        return_info: also return a :class:`hypergrad.SolveInfo`.

    Raises:
        OperatorTooLargeError: the matrix would need more than 4 GiB
            (``hypergrad.Exact(max_bytes=...)`` allows more), or more than is free.
        HypergradError: see :func:`hypergrad.solve`.

    Cost: n HVPs and one to check the answer.  See :class:`hypergrad.Exact`.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> hypergrad.exact_ihvp(lambda v: a @ v, torch.tensor([3.0, 0.0]))
        tensor([ 2., -1.])
    """
    return _one_call(hvp_fn, v, Exact(), damping, None, return_info)


def cg_ihvp(
    hvp_fn: HvpFn,
    v: Tree,
    *,
    damping: Damping = 0.0,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iters: int | None = None,
    preconditioner: Any = None,
    x0: Tree | None = None,
    return_info: bool = False,
) -> Any:
    """(A + damping I)^-1 v by conjugate gradients, to a tolerance on the true residual.

    Args:
        hvp_fn: the product v -> A v; A + damping I must be positive definite, or the solve ends
            with status NEGATIVE_CURVATURE.
        v: right-hand side, any tree of floating-point tensors.
        damping: the multiple of the identity that is added, >= 0, or ``"auto"``.
        rtol: stop when |v - (A + damping I) x| <= max(rtol |v|, atol).
        atol: see ``rtol``.  ``rtol=0, atol=0`` does exactly ``max_iters`` iterations.
        max_iters: iteration budget; None for 10,000.
        preconditioner: an approximate inverse of A + damping I.
        x0: warm start.
        return_info: also return a :class:`hypergrad.SolveInfo`.

    Raises:
        HypergradError: see :func:`hypergrad.solve`.

    Cost: one HVP an iteration, one a check of the true residual.  See :class:`hypergrad.CG`.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> x, info = hypergrad.cg_ihvp(lambda v: a @ v, torch.tensor([3.0, 0.0]), return_info=True)
        >>> x.round(decimals=4), info.converged
        (tensor([ 2., -1.]), True)
    """
    solver = CG(rtol=rtol, atol=atol, max_iters=max_iters, preconditioner=preconditioner)
    return _one_call(hvp_fn, v, solver, damping, x0, return_info)


def minres_ihvp(
    hvp_fn: HvpFn,
    v: Tree,
    *,
    damping: Damping = 0.0,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iters: int | None = None,
    preconditioner: Any = None,
    x0: Tree | None = None,
    return_info: bool = False,
) -> Any:
    """(A + damping I)^-1 v by MINRES, to a tolerance on the true residual; A may be indefinite.

    Args:
        hvp_fn: the product v -> A v, of any symmetric A.
        v: right-hand side, any tree of floating-point tensors.
        damping: the multiple of the identity that is added, >= 0, or ``"auto"``.
        rtol: stop when |v - (A + damping I) x| <= max(rtol |v|, atol).
        atol: see ``rtol``.  ``rtol=0, atol=0`` does exactly ``max_iters`` iterations.
        max_iters: iteration budget; None for 10,000.
        preconditioner: a symmetric positive definite approximate inverse of |A + damping I|.
        x0: warm start.
        return_info: also return a :class:`hypergrad.SolveInfo`, with the smallest Ritz value.

    Raises:
        HypergradError: see :func:`hypergrad.solve`.

    Cost: one HVP an iteration, one a check of the true residual.  See :class:`hypergrad.MINRES`.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> x, info = hypergrad.minres_ihvp(
        ...     lambda v: a @ v, torch.tensor([3.0, 0.0]), return_info=True
        ... )
        >>> x.round(decimals=4), info.converged
        (tensor([-1.,  2.]), True)
    """
    solver = MINRES(rtol=rtol, atol=atol, max_iters=max_iters, preconditioner=preconditioner)
    return _one_call(hvp_fn, v, solver, damping, x0, return_info)


def neumann_ihvp(
    hvp_fn: HvpFn,
    v: Tree,
    *,
    damping: Damping = 0.0,
    num_terms: int = 20,
    step_size: float | Literal["auto"] = "auto",
    return_info: bool = False,
) -> Any:
    """(A + damping I)^-1 v by a truncated Neumann series.

    Args:
        hvp_fn: the product v -> A v.
        v: right-hand side, any tree of floating-point tensors.
        damping: the multiple of the identity that is added, >= 0, or ``"auto"``.
        num_terms: terms of the series; the error falls like (1 - 1/condition)^num_terms.
        step_size: step of the series, or ``"auto"``: the inverse of a Lanczos bound on the
            largest eigenvalue.
        return_info: also return a :class:`hypergrad.SolveInfo`.

    Raises:
        HypergradError: see :func:`hypergrad.solve`.

    Cost: ``num_terms`` HVPs, at most 10 more for ``"auto"``.  See :class:`hypergrad.Neumann`, also
    for Chebyshev acceleration and for fresh minibatches (LiSSA), which :func:`hypergrad.solve`
    takes.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> hypergrad.neumann_ihvp(lambda v: a @ v, torch.tensor([3.0, 0.0]), num_terms=60)
        tensor([ 2., -1.])
    """
    solver = Neumann(num_terms=num_terms, step_size=step_size)
    return _one_call(hvp_fn, v, solver, damping, None, return_info)


def nystrom_ihvp(
    hvp_fn: HvpFn,
    v: Tree,
    *,
    rank: int | Literal["auto"],
    damping: Damping = "auto",
    sketch: SketchKind = "gaussian",
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Any:
    """(A + damping I)^-1 v with A replaced by its rank-``rank`` Nyström approximation.

    Finite and stable for every symmetric operator: singular, indefinite, zero, of any scale, in
    any dtype.  Where the approximation is too coarse (a residual no smaller than v) it warns.

    Args:
        hvp_fn: the product v -> A v.  Of an operator made with ``compile=True`` the whole solve is
            compiled, as by ``Nystrom(rank, compile=True)``.
        v: right-hand side, any tree of floating-point tensors.
        rank: size of the sketch, from 1 to the dimension; or ``"auto"``: see
            :class:`hypergrad.Nystrom`.
        damping: the multiple of the identity that is added, > 0.  ``"auto"`` takes it from the
            sketch: the larger of three times its last eigenvalue and a thousandth of its largest,
            and more than the negative curvature, if any.
        sketch: ``"gaussian"``, ``"columns"`` for uniformly drawn columns of A, ``"diagonal"``
            for columns drawn in proportion to its diagonal, or ``"structured"``.
        generator: source of the random sketch; None for torch's global one.
        return_info: also return a :class:`hypergrad.SolveInfo`, with the damping and residual.

    Raises:
        RankError: rank below 1 or above the dimension.
        DampingError: damping is not positive.
        HypergradError: see :func:`hypergrad.solve`.

    Cost: ``rank`` HVPs and one to check the answer; one to check the sketch, unless in float32 a
    residual below a fifth of v does that; ``rank`` more where there is negative curvature or
    rounding asks for a second pass, five where the sketch's last eigenvalue exceeds half the
    damping, ten to estimate the diagonal.  See
    :class:`hypergrad.Nystrom`, also for what :func:`hypergrad.solve` takes besides: a policy for
    negative curvature, no complement, no checks, a known diagonal, tolerance and cap of an
    automatic rank; to reuse a sketch, :func:`hypergrad.nystrom_sketch`.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0]))
        >>> v = torch.tensor([5.0, 2.0, 0.0, 1.0])
        >>> hypergrad.nystrom_ihvp(lambda v: a @ v, v, rank=2, damping=1.0)
        tensor([1., 1., 0., 1.])
    """
    # Its products would be compiled, one graph for the sketch and one for the check of the answer.
    compiled = isinstance(hvp_fn, LinearOperator) and getattr(hvp_fn, "compile", False)
    solver = Nystrom(rank=rank, sketch=sketch, generator=generator, compile=bool(compiled))
    return _one_call(hvp_fn, v, solver, damping, None, return_info)


def nystrom_pcg_ihvp(
    hvp_fn: HvpFn,
    v: Tree,
    *,
    rank: int | Literal["auto"],
    damping: Damping,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iters: int | None = None,
    x0: Tree | None = None,
    sketch: SketchKind = "gaussian",
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Any:
    """(A + damping I)^-1 v by conjugate gradients, preconditioned with a Nyström sketch of A.

    Args:
        hvp_fn: the product v -> A v; A + damping I must be positive definite, or the solve ends
            with status NEGATIVE_CURVATURE.
        v: right-hand side, any tree of floating-point tensors.
        rank: size of the sketch, from 1 to the dimension; or ``"auto"``: until the condition number
            of the preconditioned system is at most 10, or to 256.
        damping: the multiple of the identity that is added, > 0, or ``"auto"``, taken from the
            sketch as by :func:`nystrom_ihvp`.
        rtol: stop when |v - (A + damping I) x| <= max(rtol |v|, atol).
        atol: see ``rtol``.  ``rtol=0, atol=0`` does exactly ``max_iters`` iterations.
        max_iters: iteration budget; None for 10,000.
        x0: warm start.
        sketch: see :func:`hypergrad.nystrom_sketch`.
        generator: source of the random sketch; None for torch's global one.
        return_info: also return a :class:`hypergrad.SolveInfo`.

    Raises:
        RankError: rank below 1 or above the dimension.
        DampingError: damping is not positive.
        HypergradError: see :func:`hypergrad.solve`.

    Cost: the sketch's HVPs, then one an iteration, one a check of the true residual.  See
    :class:`hypergrad.NystromPCG`.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.logspace(0, 4, 50, dtype=torch.float64))
        >>> v = torch.ones(50, dtype=torch.float64)
        >>> x, info = hypergrad.nystrom_pcg_ihvp(
        ...     lambda v: a @ v, v, rank=40, damping=1e-3, return_info=True
        ... )
        >>> info.converged, info.iterations < 40
        (True, True)
    """
    solver = NystromPCG(
        rank=rank, rtol=rtol, atol=atol, max_iters=max_iters, sketch=sketch, generator=generator
    )
    return _one_call(hvp_fn, v, solver, damping, x0, return_info)


def _one_call(
    hvp_fn: HvpFn, v: Tree, solver: Solver, damping: Damping, x0: Tree | None, return_info: bool
) -> Any:
    solution = solve(hvp_fn, v, solver, damping=damping, x0=x0)
    return (solution.value, solution.info) if return_info else solution.value
