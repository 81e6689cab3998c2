"""The one verb behind all others: solve (A + damping I) x = v and say how right x is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import SolverOptionError, TreeStructureError
from ..operators import LinearOperator
from ..operators.interop import operator_on
from ..pytree import Tree, TreeLayout
from ..tracing import compiling
from ..transforms import differentiable
from .base import Solution, Solver
from .cg import CG
from .choice import Auto
from .differentiable import answer
from .options import Damping, check_damping, is_one_of
from .run import BlockSolve, OnFailure, act_on_failure, summary, traced


def solve(
    operator: Any,
    v: Tree,
    solver: Solver | Literal["auto"] | None = None,
    *,
    damping: Damping | Tensor | None = None,
    x0: Tree | None = None,
    batched: bool = False,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Solve (A + damping I) x = v, and report the true residual of the answer.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes: an operator, a callable v -> A v,
            a matrix, a SciPy operator.
        v: right-hand side, any tree of floating-point tensors; with ``batched``, every leaf has
            one more leading dimension m.
        solver: a configuration such as ``CG(rtol=1e-8)`` or ``Nystrom(rank=20)``; ``CG()`` if None;
            ``"auto"`` for :class:`hypergrad.Auto`, which chooses.
        damping: the multiple of the identity that is added, or ``"auto"``: see
            :func:`hypergrad.spectrum.damping_from_extremes`.  None is the solver's own default: 0,
            or ``"auto"`` for ``Nystrom`` and ``NystromPCG``, which need a positive one.  A 0-d
            tensor that requires grad gets a gradient; what ``"auto"`` came to is a constant.
        x0: a warm start of v's structure; the direct solvers solve for the correction to it.
        batched: whether v stacks m right-hand sides.
        on_failure: what a status that ``failed`` does: ``"raise"`` :class:`ConvergenceError` (it
            carries the solution), ``"warn"`` :class:`ConvergenceWarning`, or ``"ignore"``.

    Returns:
        A :class:`Solution`: ``value`` with the structure, dtypes and device of v, and ``info``.
        v = 0 gives x = 0.  The answer scales with v, exactly so by powers of two (short of under-
        and overflow).

        As with ``torch.linalg.solve``, ``value`` is attached where grad mode is on and v, the
        damping or a tensor that the operator depends on requires grad, and detached otherwise.
        Its derivatives are the implicit ones, x = (A + damping I)^-1 v being what the solver
        approximates: not those of the iteration, nor of ``x0``.  For Nyström, v goes through the
        same sketch once more, and A's tensors get -d(u'A x) with u and x from the sketch.  Each
        backward pass is one solve by the same solver with the same damping (and the same sketch),
        reported in ``Solution.backward``, and one product.  All of ``torch.func`` applies; under
        ``torch.func.vmap`` there is one batched solve and ``info`` describes all of it.  See
        "Differentiating through a solve" in the documentation, also for closures.

        Under ``torch.compile`` solvers with a fixed amount of work run as one graph, detached.
        What looks at values is left out: the checks for nan and inf, for symmetry, for a positive
        definite preconditioner, for params modified in place, and the warning of a failure.
        ``info`` then has status FIXED_ITERATIONS, and 0-d tensors for the two residuals.

    Raises:
        NonFiniteError: nan or inf in v, x0 or a product, or an answer too large for the dtype.
        DampingError: a negative or non-finite damping.
        NotSymmetricError: the products are not those of a symmetric operator.
        TreeStructureError: v, x0 or a product has other keys, leaves or shapes than expected.
        LeafTypeError: a leaf is no real floating-point tensor, or has another dtype.
        DeviceError: tensors on different devices.
        EmptyTreeError: v has no entries.
        DifferentiationError: a derivative was asked for, in tensors that a callable reaches
            through a closure, that would not come out right.

    Cost: the solver's products, one to check the answer, and up to 20 for ``damping="auto"``
    (none with Nyström, which takes it from its sketch); ``info.num_hvps`` counts them all.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> solution = hypergrad.solve(a, torch.tensor([1.0, 2.0]), hypergrad.CG(rtol=1e-6))
        >>> solution.value
        tensor([0.0909, 0.6364])
        >>> solution.info.status
        <Status.CONVERGED: 'the true residual is within the tolerance'>

        The gradient in v is one more solve, here with the cotangent (1, 1):

        >>> v = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> solution = hypergrad.solve(a, v)
        >>> solution.value.sum().backward()
        >>> v.grad
        tensor([0.1818, 0.2727])
        >>> solution.backward[0].converged
        True
    """
    if solver is None or is_one_of(solver, ("auto",)):
        solver = CG() if solver is None else Auto()
    if not isinstance(solver, Solver):
        raise SolverOptionError(
            f"solver is {solver!r}, expected a configuration such as hypergrad.CG(), or 'auto'."
        )
    if not is_one_of(on_failure, get_args(OnFailure)):
        raise SolverOptionError(
            f"on_failure is {on_failure!r}, expected one of {get_args(OnFailure)}."
        )
    layout = TreeLayout.of(v, name="v", batched=batched)
    op = operator_on(operator, layout)
    rho = None
    if isinstance(damping, Tensor) and damping.numel() == 1 and differentiable(damping):
        rho, damping = damping.reshape(()), None
    number = solver.default_damping if damping is None else check_damping(damping)
    block = op.layout.rows(v, batched=batched)
    start = None if x0 is None else op.layout.rows(x0, name="x0", batched=batched)
    if start is not None and start.shape != block.shape:
        raise TreeStructureError(
            f"x0 stacks {start.shape[0]} trees, but v stacks {block.shape[0]}; expected the same."
        )
    if compiling():
        x, info = traced(op, solver, number, block, start, batched=batched)
        return Solution(_tree(op, layout, x, batched), info)
    call = BlockSolve(op, solver, number, on_failure, torch.is_grad_enabled())
    x = answer(call, block, start, rho)
    info = summary(call.columns) if batched or len(call.columns) > 1 else call.columns[0]
    value = _tree(op, layout, x, batched)
    if info.num_hvps != sum(call.hvps):
        info = replace(info, num_hvps=sum(call.hvps))
    solution = Solution(value, info, call.later)
    act_on_failure(solution, on_failure)
    return solution


def _tree(op: LinearOperator, layout: TreeLayout, x: Tensor, batched: bool) -> Tree:
    """The rows of x as a tree of v's own layout.

    It may order its keys differently from the operator, or be a list where that has a tuple.
    """
    tree = op.layout.unflatten_block(x) if batched else op.layout.unflatten(x[0])
    if layout is op.layout:
        return tree
    return layout.unflatten_leaves(layout.leaves(tree, name="x", batched=batched))
