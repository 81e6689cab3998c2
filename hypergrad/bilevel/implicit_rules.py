"""One call of an inner solver, and the derivatives of its result by the implicit theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import (
    DeviceError,
    DifferentiationError,
    HypergradError,
    InnerProblemWarning,
    warn,
)
from ..norms import row_norms
from ..pytree import Tree, TreeLayout
from ..solvers import SolveInfo, Solver, solve
from ..solvers.options import Damping
from ..solvers.run import OnFailure
from ..transforms import (
    apply,
    below_tangents,
    carries_derivatives,
    pullback,
    pushforward,
    reaches_beyond,
    unwrapped,
)
from .optimality import Minimum, Optimality, check_attached

InnerSolver = Callable[[Tree, Tree], Tree]

#: Relative length of a Newton step from which the inner problem is visibly not solved.
_VISIBLE = 0.1
#: Of the dtype's eps: a shorter step is rounding, where the solution itself is zero.
_ROUNDING = 1e3
_RESULT = "the inner solver's result"


@dataclass(frozen=True, eq=False)
class Configuration:
    """What is solved, by what, and how the linear systems of its derivatives are."""

    inner_solver: InnerSolver
    condition: Optimality
    solver: Solver | Literal["auto"]
    damping: Damping | None
    on_failure: OnFailure


@dataclass(eq=False)
class Call:
    """One call of the inner solver: all of it that is no tensor.

    Attributes:
        config: the solver, the optimality condition and how systems are solved.
        outer_layout: layout of the outer parameters.
        layout: layout of the inner ones: that of ``init``, or else of the first solution.
        num_start: leaves of ``init``, which come before those of the outer parameters.
        watched: whether a derivative may be asked for, so that F is looked at.
        residual_norm: |F|, or the largest of several.
        solves: the reports of linear solves, each with those of its own derivatives.
    """

    config: Configuration
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
            solution = self.config.inner_solver(init, self.outer_layout.unflatten_leaves(outer))
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
            plain = [x.detach() for x in tensors]
            self._look(w, plain[self.num_start :], plain[: self.num_start])
        return w

    def _look(self, w: Tensor, outer: list[Tensor], start: list[Tensor]) -> None:
        """Refuse what could not be differentiated, and warn where w does not solve the problem.

        For a positive definite A, |A^-1 F| >= |F|^2 / |A F|: the length of the Newton step from w
        is no less than what one product shows.
        """
        assert self.layout is not None
        condition = self.config.condition
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
        with condition.evaluated():
            (product,) = torch.autograd.grad(
                residual, point, value / norms[0].to(value.dtype), allow_unused=True
            )
        image = 0.0 if product is None else float(row_norms(product[None]))
        scale = float(row_norms(w[None]))
        if start:  # where the solution is zero, the way to it has a size
            way = w - torch.cat([x.reshape(-1).to(w.dtype) for x in start])
            scale = max(scale, float(row_norms(way[None])))
        eps = max(torch.finfo(dtype).eps for dtype in self.layout.dtypes)
        if size > max(_VISIBLE * scale, _ROUNDING * eps) * image:
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
            f"{self.config.condition.name} depends on tensors that require grad, or that a "
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
        config = self.config
        operator = config.condition.derivative(
            self.layout, w, self.outer_layout.unflatten_leaves(outer)
        )
        if adjoint:
            operator = config.condition.adjoint(operator)
        solution = solve(
            operator,
            operator.layout.unflatten(v),
            config.solver,
            damping=config.damping,
            on_failure=config.on_failure,
        )
        self.solves.append((solution.info, solution.backward))
        return operator.layout.rows(solution.value)[0]

    def residual(self, w: Tensor, outer: list[Tensor]) -> Tensor:
        """F(w, y)."""
        assert self.layout is not None
        tree = self.outer_layout.unflatten_leaves(outer)
        return self.config.condition.residual(self.layout, w, tree)


def solution(call: Call, *tensors: Tensor) -> Tensor:
    """The inner solution, flat, attached to the outer leaves.

    Args:
        call: the call; its ``layout`` is that of the answer afterwards.
        *tensors: the leaves of ``init``, then those of the outer parameters.
    """
    return apply(_Implicit, call, *tensors)


class _Implicit(torch.autograd.Function):
    """w*(y), flat, as a function of the outer leaves; the start is no argument of it.

    From F(w*(y), y) = 0 follows dw* = -A^-1 dF, with A = dF/dw and dF at constant w.  The rules
    name w* itself, which is attached, so that they can be differentiated again.
    """

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> Tensor:
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
        call: Call = ctx.call
        u = call.solved(w, outer, grad, adjoint=True)
        first = 1 + call.num_start
        with call.config.condition.evaluated():
            in_outer = pullback(
                lambda leaves: call.residual(w, leaves), outer, ctx.needs_input_grad[first:], -u
            )
        return (*(None,) * first, *in_outer)

    @staticmethod
    def jvp(ctx: Any, _call: None, *moves: Tensor | None) -> Tensor:
        call: Call = ctx.call
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
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        answers = []
        for i in range(info.batch_size):  # the inner solver knows of one problem
            one = [
                x if dim is None else x.select(dim, i)
                for x, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            answers.append(apply(_Implicit, call, *one))
        return torch.stack(answers), 0
