"""Implicit differentiation through an inner solver, whatever it does: ``@implicit``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import (
    DeviceError,
    DifferentiationError,
    HypergradError,
    InnerProblemWarning,
    SolverOptionError,
    warn,
)
from ..operators.hessian import check_differentiable
from ..pytree import Tree, TreeLayout, row_norms
from ..solvers import CG, GMRES, SolveInfo, Solver, solve
from ..solvers.base import Damping, check_damping, check_option
from ..solvers.run import OnFailure
from ..transforms import (
    apply,
    below_tangents,
    carries_derivatives,
    differentiable,
    pullback,
    pushforward,
    reaches_beyond,
    tangents,
    transforming,
    unwrapped,
)
from .optimality import Map, Minimum, Optimality, check_attached, optimality

InnerSolver = Callable[[Tree, Tree], Tree]

#: Relative length of a Newton step from which the inner problem is visibly not solved.
_VISIBLE = 0.1
_RESULT = "the inner solver's result"


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

    def __init__(
        self,
        inner_solver: InnerSolver,
        condition: Optimality,
        solver: Solver | Literal["auto"],
        damping: Damping | None,
        on_failure: OnFailure,
    ) -> None:
        self.inner_solver, self.condition = inner_solver, condition
        self.solver, self.damping, self.on_failure = solver, damping, on_failure
        functools.update_wrapper(self, inner_solver)

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
        call = _Call(self, outer_layout, layout, len(start), watched)
        w = apply(_Implicit, call, *start, *outer)
        assert call.layout is not None
        if (transforming() or tangents()) and carries_derivatives(lambda: call.constant(w, outer)):
            raise call.closure_error()
        return ImplicitSolution(call.layout.unflatten(w), call.residual_norm, call.solves)


@dataclass(eq=False)
class _Call:
    """One call of the inner solver: all of it that is no tensor.

    Attributes:
        function: the solver, the optimality condition and how systems are solved.
        outer_layout: layout of the outer parameters.
        layout: layout of the inner ones: that of ``init``, or else of the first solution.
        num_start: leaves of ``init``, which come before those of the outer parameters.
        watched: whether a derivative may be asked for, so that F is looked at.
        residual_norm: |F|, or the largest of several.
        solves: the reports of linear solves, each with those of its own derivatives.
    """

    function: ImplicitFunction
    outer_layout: TreeLayout
    layout: TreeLayout | None
    num_start: int
    watched: bool
    residual_norm: float | None = None
    solves: list[tuple[SolveInfo, list[SolveInfo]]] = field(default_factory=list)

    def run(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The inner solution, shape (n,), detached, after every check that looks at values."""
        # Copies: a solver that works in place must not reach the caller's tensors.
        copies = [x.detach().clone() for x in tensors]
        start, outer = copies[: self.num_start], copies[self.num_start :]
        init = None
        if self.layout is not None and start:
            init = self.layout.unflatten_leaves(start)
        with torch.enable_grad():  # a solver may call backward
            solution = self.function.inner_solver(init, self.outer_layout.unflatten_leaves(outer))
        if self.layout is None:
            self.layout = TreeLayout.of(solution, name=_RESULT)
        w = self.layout.rows(solution, name=_RESULT)[0].detach()
        if self.layout.device != self.outer_layout.device:
            raise DeviceError(
                f"{_RESULT} is on {self.layout.device}, but outer_params is on "
                f"{self.outer_layout.device}; move them to one device."
            )
        self.layout.check_finite(w, _RESULT)
        if self.watched:
            first = torch.cat([x.reshape(-1).to(w.dtype) for x in start]) if start else None
            self._look(w, [x.detach() for x in tensors[self.num_start :]], first)
        return w

    def _look(self, w: Tensor, outer: list[Tensor], start: Tensor | None) -> None:
        """Refuse what could not be differentiated, and warn where w does not solve the problem.

        For a positive definite A, |A^-1 F| >= |F|^2 / |A F|: the length of the Newton step from w
        is no less than what one product shows.
        """
        assert self.layout is not None
        condition = self.function.condition
        leaves = [x.requires_grad_() for x in outer]
        point = w.clone().requires_grad_()
        with torch.enable_grad():
            residual = check_attached(self._first_residual(point, leaves), condition.name)
        if reaches_beyond([residual], [point, *leaves]):
            raise self.closure_error()
        value = residual.detach()
        self.layout.check_finite(value, f"the optimality condition ({condition.name}) at {_RESULT}")
        norms = row_norms(value[None])
        size = float(norms)
        self.residual_norm = max(size, self.residual_norm or 0.0)
        if size == 0.0:
            return
        # From the other side: |A' F|, which for a Hessian is the same, is on the graph already.
        (product,) = torch.autograd.grad(
            residual, point, value / norms[0].to(value.dtype), allow_unused=True
        )
        image = 0.0 if product is None else float(row_norms(product[None]))
        scale = float(row_norms(w[None]))
        if start is not None:  # where the solution is zero, the way to it has a size
            scale = max(scale, float(row_norms((w - start)[None])))
        if size > _VISIBLE * scale * image:
            what = "gradient" if isinstance(condition, Minimum) else "residual"
            # Few digits, so that Python shows the warning once a place and not at each outer step.
            warn(
                f"the inner problem is visibly not solved: the {what} of {condition.name} at "
                f"{_RESULT} has norm about {size:.0e}, and a Newton step would move it by a tenth "
                "of its size or more. The derivatives are those of another point: run the inner "
                f"solver further, or check that it solves the problem that {condition.name} says.",
                InnerProblemWarning,
            )

    def _first_residual(self, w: Tensor, outer: list[Tensor]) -> Tensor:
        try:
            return self.residual(w, outer)
        except RuntimeError as error:
            # A batch of torch.func.vmap in a closure has escaped from it here.
            if not isinstance(error, HypergradError) and carries_derivatives(
                lambda: self.constant(w, outer)
            ):
                raise self.closure_error() from error
            raise

    def closure_error(self) -> DifferentiationError:
        """The refusal of what is differentiated, or batched, and not in ``outer_params``."""
        return DifferentiationError(
            f"{self.function.condition.name} depends on tensors that require grad, or that a "
            "torch.func transform runs over, through a closure: their part of the gradient would "
            "be missing. Use the second argument for outer_params, put the others into "
            "outer_params too, or detach them."
        )

    def constant(self, w: Tensor, outer: list[Tensor]) -> Tensor:
        """F at the plain values of its arguments."""
        return self.residual(unwrapped(w), [unwrapped(leaf) for leaf in outer])

    def solved(self, w: Tensor, outer: list[Tensor], v: Tensor, *, adjoint: bool) -> Tensor:
        """S v, or S' v, for S = (A + damping I)^-1 at (w, y); differentiable in all three."""
        assert self.layout is not None
        function = self.function
        operator = function.condition.derivative(
            self.layout, w, self.outer_layout.unflatten_leaves(outer)
        )
        if adjoint:
            operator = function.condition.adjoint(operator)
        solution = solve(
            operator,
            operator.layout.unflatten(v),
            function.solver,
            damping=function.damping,
            on_failure=function.on_failure,
        )
        self.solves.append((solution.info, solution.backward))
        return operator.layout.rows(solution.value)[0]

    def residual(self, w: Tensor, outer: list[Tensor]) -> Tensor:
        """F(w, y)."""
        assert self.layout is not None
        tree = self.outer_layout.unflatten_leaves(outer)
        return self.function.condition.residual(self.layout, w, tree)


class _Implicit(torch.autograd.Function):
    """w*(y), flat, as a function of the outer leaves; the start is no argument of it.

    From F(w*(y), y) = 0 follows dw* = -A^-1 dF, with A = dF/dw and dF at constant w.  The rules
    name w* itself, which is attached, so that they can be differentiated again.
    """

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensor:
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        outer = tensors[ctx.call.num_start :]
        ctx.save_for_backward(output, *outer)
        ctx.save_for_forward(output, *outer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, *outer = ctx.saved_tensors
        call: _Call = ctx.call
        u = call.solved(w, outer, grad, adjoint=True)
        first = 1 + call.num_start
        in_outer = pullback(
            lambda leaves: call.residual(w, leaves), outer, ctx.needs_input_grad[first:], -u
        )
        return (*(None,) * first, *in_outer)

    @staticmethod
    def jvp(ctx: Any, _call: None, *moves: Tensor | None) -> Tensor:
        call: _Call = ctx.call
        w, *outer = ctx.saved_tensors
        count = len(outer)

        def tangent(*values: Any) -> Tensor:
            w, leaves, in_outer = values[0], list(values[1 : 1 + count]), values[1 + count :]
            moving = [i for i, move in enumerate(in_outer) if move is not None]

            def residual(*chosen: Tensor) -> Tensor:
                every = list(leaves)
                for i, leaf in zip(moving, chosen, strict=True):
                    every[i] = leaf
                return call.residual(w, every)

            if not moving:
                return torch.zeros_like(w)
            change = pushforward(
                residual,
                tuple(leaves[i] for i in moving),
                tuple(move for move in in_outer if move is not None),
            )
            return call.solved(w, leaves, -change, adjoint=False)

        return below_tangents(tangent, w, *outer, *moves[call.num_start :])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        answers = []
        for i in range(info.batch_size):  # the inner solver knows of one problem
            one = [
                x if dim is None else x.select(dim, i)
                for x, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            answers.append(apply(_Implicit, call, *one))
        return torch.stack(answers), 0


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
            the solver minimises: F = grad_w g.
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
        return ImplicitFunction(inner_solver, condition, solver, number, on_failure)

    return decorate
