"""Implicit differentiation through an inner solver, whatever it does: ``@implicit``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..operators.point import check_differentiable
from ..pytree import Tree, TreeLayout
from ..solvers import CG, GMRES, SolveInfo, Solver
from ..solvers.options import Damping, check_damping, check_option
from ..solvers.run import OnFailure
from ..transforms import carries_derivatives, differentiable, tangents, transforming
from .implicit_rules import Call, Configuration, InnerSolver, solution
from .optimality import Map, Minimum, optimality


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class ImplicitSolution:
    """An inner solution with its implicit derivatives, and what they cost.

    Attributes:
        value: w*(y), the tree that the inner solver returned, attached to ``outer_params``.
        residual_norm: |F(w*, y)|: for an inner loss the norm of its gradient, 0 at an exact
            solution.  None where nothing was being differentiated, and F was not evaluated.
            Under ``torch.func.vmap``, the largest of the batch.
    """

    value: Tree
    residual_norm: float | None
    _solves: list[tuple[SolveInfo, list[SolveInfo]]] = field(repr=False)

    @property
    def backward(self) -> list[SolveInfo]:
        """The report of each linear solve that differentiating ``value`` has taken so far.

        One a backward pass, or forward-mode tangent, each followed by those that differentiating
        it has taken in turn.
        """
        return [info for first, later in self._solves for info in (first, *later)]


class ImplicitFunction:
    """An inner solver with implicit derivatives; made by :func:`hypergrad.implicit`.

    Call it as the solver itself, ``solve(init, outer_params)``, for the attached inner solution.
    """

    #: The solver's own.
    __name__: str

    def __init__(self, config: Configuration) -> None:
        self._config = config
        # Its name and docstring; a callable object's attributes stay its own.
        functools.update_wrapper(self, config.inner_solver, updated=())

    def __call__(self, init: Tree, outer_params: Tree) -> Tree:
        """The inner solution, attached to ``outer_params``."""
        return self.solution(init, outer_params).value

    def solution(self, init: Tree, outer_params: Tree) -> ImplicitSolution:
        """The same with the reports of the backward passes.

        Raises as :func:`hypergrad.implicit` says.
        """
        outer_layout = TreeLayout.of(outer_params, name="outer_params")
        outer = outer_layout.leaves(outer_params, name="outer_params")
        layout = None if init is None else TreeLayout.of(init, name="init")
        start = [] if layout is None else layout.leaves(init, name="init")
        check_differentiable([*start, *outer])
        watched = torch.is_grad_enabled() or any(differentiable(leaf) for leaf in outer)
        call = Call(self._config, outer_layout, layout, len(start), watched)
        w = solution(call, *start, *outer)
        assert call.layout is not None
        if (transforming() or tangents()) and carries_derivatives(lambda: call.constant(w, outer)):
            raise call.closure_error()
        return ImplicitSolution(call.layout.unflatten(w), call.residual_norm, call.solves)


def implicit(
    inner_loss: Callable[[Tree, Tree], Tensor] | None = None,
    solver: Solver | Literal["auto"] | None = None,
    damping: Damping | None = None,
    *,
    root: Map | None = None,
    fixed_point: Map | None = None,
    on_failure: OnFailure = "warn",
) -> Callable[[InnerSolver], ImplicitFunction]:
    """Give an inner solver its implicit derivatives: a decorator.

    It decorates ``solve(init, outer_params) -> inner_params``, after which

        outer_loss(solve(init, outer_params), outer_params).backward()

    is right.  What is differentiated is the solution, and not what the solver did: at w* with
    F(w*, y) = 0 and A = dF/dw,

        dw*/dy = -(A + damping I)^-1 dF/dy.

    So the solver may be anything: a loop, ``torch.optim``, SciPy, a closed form.  It is called
    once a forward pass, with detached copies of both arguments and grad mode on, and nothing of
    its graph is kept.  (The user's other state, such as a module that it trains, is its own.)

    Args:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params)``, a real scalar that
            the solver minimises: F = grad_w g.  The same at each call: for a stochastic loss, fix
            the data.
        solver: how linear systems are solved: if None, ``CG()`` for an inner loss (A is its
            Hessian) and ``GMRES()`` for the others (A need not be symmetric).
        damping: see :func:`hypergrad.solve`; a number.
        root: instead of ``inner_loss``: F itself, called in the same way; a tree shaped like the
            inner parameters.
        fixed_point: instead of both: T with w* = T(w*, y), so that F = w - T.
        on_failure: what a failed linear solve does, see :func:`hypergrad.solve`.

    Returns:
        A decorator.  Decorated, the solver is called as before, with ``init`` and
        ``outer_params`` any trees; ``solve.solution(init, outer_params)`` returns an
        :class:`hypergrad.ImplicitSolution`, whose ``backward`` has the report of each backward
        pass.  ``init`` gets no gradient, as w* does not depend on it; it may be None.  If not,
        the solver must return a tree like it.

        Derivatives of any order, in reverse and forward mode, and ``torch.func`` (``vmap``,
        ``jacrev``, ``jacfwd``, ``hessian``) apply; under ``vmap`` over ``outer_params`` the
        problems are solved one by one.  Their accuracy is that of w* and of the linear solves:
        ``CG(rtol=1e-10)`` where second derivatives are to be tight.

    Raises:
        LossError: not exactly one of ``inner_loss``, ``root`` and ``fixed_point``; one that is no
            real scalar, or does not depend on its arguments.
        SolverOptionError: ``solver`` is no configuration, or an unknown ``on_failure``.
        DampingError: a negative or non-finite damping.
        TreeStructureError, LeafTypeError, DeviceError: (at a call) the solver returned something
            else than a tree of tensors like ``init``.
        NonFiniteError: (at a call) nan or inf in its result, or in F there.
        DifferentiationError: (at a call) F depends on tensors that require grad through a
            closure.
        ConvergenceError: (in a backward pass) a linear solve failed, with ``on_failure="raise"``.

    Warns:
        InnerProblemWarning: the result visibly does not solve the problem: a Newton step from it
            would be longer than a tenth of it.
        ConvergenceWarning: a linear solve failed.

    Cost: a call, one evaluation of F and one product with A' besides the solver (neither under
    ``torch.no_grad()``); a backward pass, one linear solve and one gradient of <F, u> in y.
    Source: Bengio, Neural Computation 12 (2000); as a decorator, Blondel et al., "Efficient and
    modular implicit differentiation", arXiv 2105.15183, section 2.1.

    Examples:
        The inner solution of 0.5 |w - y|^2 is w = y, so F(y) = sum(w^3) has gradient 3 y^2:

        >>> import torch, hypergrad
        >>> @hypergrad.implicit(lambda w, y: 0.5 * ((w - y) ** 2).sum())
        ... def solve(init, y):
        ...     return y.clone()  # any solver
        >>> y = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> solution = solve.solution(torch.zeros(2), y)
        >>> (solution.value**3).sum().backward()
        >>> y.grad, solution.backward[0].converged
        (tensor([ 3., 12.]), True)

        A square root, as the root of w^2 = y that bisection finds:

        >>> @hypergrad.implicit(root=lambda w, y: w**2 - y)
        ... def square_root(init, y):
        ...     low, high = torch.zeros_like(y), y + 1
        ...     for _ in range(40):
        ...         middle = (low + high) / 2
        ...         below = middle**2 < y
        ...         low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        ...     return middle
        >>> torch.func.vmap(torch.func.grad(lambda y: square_root(None, y)))(torch.tensor([1., 4.]))
        tensor([0.5000, 0.2500])
    """
    condition = optimality(inner_loss, root, fixed_point)
    if solver is None:
        solver = CG() if isinstance(condition, Minimum) else GMRES()
    if solver != "auto" and not isinstance(solver, Solver):
        raise SolverOptionError(
            f"solver is {solver!r}, expected a configuration such as hypergrad.CG(), or 'auto'."
        )
    check_option(
        on_failure in get_args(OnFailure), "on_failure", on_failure, f"one of {get_args(OnFailure)}"
    )
    number = None if damping is None else check_damping(damping)

    def decorate(inner_solver: InnerSolver) -> ImplicitFunction:
        return ImplicitFunction(Configuration(inner_solver, condition, solver, number, on_failure))

    return decorate
