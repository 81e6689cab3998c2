"""The one verb behind all others: solve (A + damping I) x = v and say how right x is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import (
    ConvergenceError,
    ConvergenceWarning,
    SolverOptionError,
    TreeStructureError,
    warn,
)
from ..operators import LinearOperator, as_operator
from ..pytree import Tree, TreeLayout, powers_of_two, working_dtype
from .base import (
    DampedSystem,
    Damping,
    Outcome,
    Solution,
    SolveInfo,
    Solver,
    Status,
    check_damping,
)
from .cg import CG
from .choice import Auto

OnFailure = Literal["raise", "warn", "ignore"]


def solve(
    operator: Any,
    v: Tree,
    solver: Solver | Literal["auto"] | None = None,
    *,
    damping: Damping | None = None,
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
            or ``"auto"`` for Nyström, which needs a positive one.
        x0: a warm start of v's structure; the direct solvers solve for the correction to it.
        batched: whether v stacks m right-hand sides.
        on_failure: what a status that ``failed`` does: ``"raise"`` :class:`ConvergenceError` (it
            carries the solution), ``"warn"`` :class:`ConvergenceWarning`, or ``"ignore"``.

    Returns:
        A :class:`Solution`: ``value`` with the structure, dtypes and device of v, detached from
        any graph, and ``info``.  v = 0 gives x = 0.  The answer scales with v,
        exactly so by powers of two (short of under- and overflow).

    Raises:
        NonFiniteError: nan or inf in v, x0 or a product, or an answer too large for the dtype.
        DampingError: a negative or non-finite damping.
        NotSymmetricError: the products are not those of a symmetric operator.
        TreeStructureError: v, x0 or a product has other keys, leaves or shapes than expected.
        LeafTypeError: a leaf is no real floating-point tensor, or has another dtype.
        DeviceError: tensors on different devices.
        EmptyTreeError: v has no entries.

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
    """
    if solver is None or solver == "auto":
        solver = CG() if solver is None else Auto()
    if not isinstance(solver, Solver):
        raise SolverOptionError(
            f"solver is {solver!r}, expected a configuration such as hypergrad.CG(), or 'auto'."
        )
    if on_failure not in get_args(OnFailure):
        raise SolverOptionError(
            f"on_failure is {on_failure!r}, expected one of {get_args(OnFailure)}."
        )
    damping = solver.default_damping if damping is None else check_damping(damping)
    layout = TreeLayout.of(v, name="v", batched=batched)
    op = as_operator(operator, like=_one_tree(layout, v, batched))

    rows = _rows(op, v, "v", batched)
    # By the largest entry and not by the norm, which may itself overflow.
    scales = powers_of_two(rows.abs().amax(dim=1))
    b = rows / scales[:, None]
    start = None if x0 is None else _rows(op, x0, "x0", batched)
    if start is not None:
        if start.shape != b.shape:
            raise TreeStructureError(
                f"x0 stacks {start.shape[0]} trees, but v stacks {b.shape[0]}; expected the same."
            )
        start = start / scales[:, None]
    system = DampedSystem(op, b, scales, damping)
    outcome = solver._run(system, start)

    x = (system.returned(outcome.x) * scales[:, None]).to(op.dtype)
    tree = op.layout.unflatten_block(x) if batched else op.layout.unflatten(x[0])
    # v may order its keys differently from the operator, or be a list where that has a tuple.
    value = layout.unflatten_leaves(layout.leaves(tree, name="x", batched=batched))
    solution = Solution(value, _report(outcome, system, solver, batched))
    if solution.info.status.failed and on_failure != "ignore":
        if on_failure == "raise":
            raise ConvergenceError(solution.info.message, solution)
        # Few digits, so that Python shows the warning once a place and not at each outer step.
        info = solution.info
        figure = f"relative residual about {info.relative_residual:.0e}"
        warn(f"{type(solver).__name__}: {info.status.value} ({figure}).", ConvergenceWarning)
    return solution


def _one_tree(layout: TreeLayout, v: Tree, batched: bool) -> Tree:
    leaves = layout.leaves(v, batched=batched)
    return layout.unflatten_leaves([leaf[0] for leaf in leaves]) if batched else v


def _rows(op: LinearOperator, tree: Tree, name: str, batched: bool) -> Tensor:
    """The tree as rows in the working dtype, shape (m, n), finite."""
    if batched:
        block = op.layout.flatten_block(tree, name=name)
    else:
        block = op.layout.flatten(tree, name=name)[None]
    op.layout.check_finite(block, name)
    return block.to(working_dtype(op.dtype, op.device))


def _report(outcome: Outcome, system: DampedSystem, solver: Solver, batched: bool) -> SolveInfo:
    b_norms = torch.where(system.b_norms > 0, system.b_norms, torch.ones_like(system.b_norms))
    relative = (outcome.residual_norms / b_norms).tolist()
    norms = (outcome.residual_norms * system.scales).tolist()
    columns = []
    for row, status in enumerate(outcome.statuses):
        direction = outcome.directions.get(row)
        columns.append(
            SolveInfo(
                status=status,
                converged=status is Status.CONVERGED,
                residual_norm=norms[row],
                relative_residual=relative[row],
                iterations=outcome.iterations[row],
                num_hvps=system.num_hvps,
                damping=outcome.damping,
                solver=outcome.solver or solver,
                reason=outcome.reason,
                rank=outcome.rank,
                smallest_eigenvalue=outcome.smallest_eigenvalue,
                direction=None
                if direction is None
                else system.operator.layout.unflatten(direction.to(system.operator.dtype)),
            )
        )
    if not batched:
        return columns[0]
    worst = max(columns, key=lambda info: (info.status.failed, info.relative_residual))
    return replace(
        worst,
        converged=all(info.converged for info in columns),
        iterations=max(info.iterations for info in columns),
        columns=tuple(columns),
    )
