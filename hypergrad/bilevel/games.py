"""Stackelberg games: the leader's total derivative, and whether a point is an equilibrium."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, warn
from ..operators import LinearOperator
from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from ..solvers import CG, Exact, Solver
from ..solvers.options import Damping, check_option, is_count, is_tolerance
from ..spectrum import extreme_eigenvalues
from .corrections import norm
from .hypergradient import BilevelPoint, Hypergradient, Loss, hypergradient
from .total_hessian import Game, TotalHessian

#: Of the largest eigenvalue, in eps of the dtype: what a smaller one cannot be told from zero by.
_ROUNDING = 1e3
#: Lanczos steps for the ends of a spectrum that is too large to be computed whole.
_STEPS = 60


def stackelberg_gradient(
    leader_loss: Loss,
    follower_loss: Loss,
    leader_params: Tree,
    follower_params: Tree,
    *,
    solver: Solver | None = None,
    damping: Damping | None = None,
    x0: Tree | None = None,
) -> Hypergradient:
    """The leader's total derivative, with the follower's best response r.

    The leader plays x first, the follower answers with r(x), the minimiser of f2(x, .), and

        D f1 = grad_x f1 - (d2 f2 / dx dz) (d2 f2 / dz dz + damping I)^-1 grad_z f1  at z = r(x).

    It is :func:`hypergrad.hypergradient` in a game's words: the leader's parameters are the outer
    ones and the follower's the inner ones, which the messages of errors call them.

    Args:
        leader_loss: f1, called as ``leader_loss(leader_params, follower_params)``; a real scalar
            that the leader minimises.
        follower_loss: f2, called in the same way, which the follower minimises.
        leader_params: x, any tree.
        follower_params: the best response z = r(x): what your own loop found for the follower.
        solver: see :func:`hypergrad.hypergradient`.
        damping: see there.
        x0: see there; shaped like ``follower_params``.

    Returns:
        A :class:`hypergrad.Hypergradient` whose parts are shaped like ``leader_params``.

    Raises and warns as :func:`hypergrad.hypergradient` does.

    Source: Fiez, Chasnov and Ratliff, "Convergence of learning dynamics in Stackelberg games",
    arXiv 1906.01217, section 2.1 (published as "Implicit learning dynamics in Stackelberg games",
    ICML 2020).

    Examples:
        Two firms choose amounts x and z at the price 10 - x - z; the one that moves first ends
        with half of the market at x = 5, and earns more for it:

        >>> import torch, hypergrad
        >>> leader = lambda x, z: -x * (10 - x - z)
        >>> follower = lambda x, z: -z * (10 - x - z)
        >>> x = torch.tensor(4.0)
        >>> hypergrad.stackelberg_gradient(leader, follower, x, (10 - x) / 2).grad
        tensor(-1.)
    """
    return hypergradient(
        _swapped(follower_loss),
        _swapped(leader_loss),
        follower_params,
        leader_params,
        solver=solver,
        damping=damping,
        x0=x0,
    )


@dataclass(frozen=True, eq=False)
class StackelbergCheck:
    """The conditions of a local strong Stackelberg equilibrium at a point, with their figures.

    Attributes:
        follower_gradient_norm: |grad_z f2|: zero where the follower cannot gain to first order.
        follower_curvature: smallest eigenvalue of d2 f2 / dz dz: where it is positive the
            response is a strict local minimiser, and unique near by.
        leader_gradient_norm: |D f1|, the total derivative.  None where ``follower_curvature`` is
            not positive: there is no best response to differentiate.
        leader_curvature: smallest eigenvalue of D2 f1, the Hessian of x -> f1(x, r(x)); None as
            above.
        follower_rounding: what ``follower_curvature`` must exceed to be told from zero.
        leader_rounding: the same of ``leader_curvature``; None as above.
        gradient_tol: up to which a gradient's norm counts as zero.
        estimated: whether an eigenvalue is a Ritz value, which is never below the smallest
            eigenvalue: a positive one is then no proof.
        num_hvps: products with the follower's Hessian, those of linear solves included.
    """

    follower_gradient_norm: float
    follower_curvature: float
    leader_gradient_norm: float | None
    leader_curvature: float | None
    follower_rounding: float
    leader_rounding: float | None
    gradient_tol: float
    estimated: bool
    num_hvps: int

    @property
    def failures(self) -> tuple[str, ...]:
        """The conditions that do not hold, each in a few words; empty at an equilibrium."""
        found = []
        if not self.follower_gradient_norm <= self.gradient_tol:
            found.append(
                f"the follower's gradient is not zero ({self.follower_gradient_norm:.1e}), so that"
                " it does not play a best response"
            )
        if not self.follower_curvature > self.follower_rounding:
            found.append(
                "the follower's Hessian is not positive definite "
                f"({_eigenvalue(self.follower_curvature, self.follower_rounding)}), so that there "
                "is no isolated best response"
            )
        if self.leader_gradient_norm is not None:
            if not self.leader_gradient_norm <= self.gradient_tol:
                found.append(
                    "the leader's total gradient is not zero "
                    f"({self.leader_gradient_norm:.1e}), so that it can gain by moving"
                )
            assert self.leader_curvature is not None
            assert self.leader_rounding is not None
            if not self.leader_curvature > self.leader_rounding:
                found.append(
                    "the leader's total Hessian is not positive definite "
                    f"({_eigenvalue(self.leader_curvature, self.leader_rounding)}), so that the "
                    "point is no strict minimum for it"
                )
        return tuple(found)

    @property
    def is_equilibrium(self) -> bool:
        """Whether all four conditions hold."""
        return not self.failures

    @property
    def meets_necessary(self) -> bool:
        """Whether no first- or second-order condition that an equilibrium must meet is broken.

        The two gradients are zero, the follower's Hessian is positive definite (so that there is a
        response to differentiate), and the leader's total Hessian is positive *semi*-definite to
        rounding: its smallest eigenvalue is at least ``-leader_rounding``.
        """
        return (
            self.follower_gradient_norm <= self.gradient_tol
            and self.leader_gradient_norm is not None
            and self.leader_gradient_norm <= self.gradient_tol
            and self.leader_curvature is not None
            and self.leader_rounding is not None
            and self.leader_curvature >= -self.leader_rounding
        )

    @property
    def follower_distance(self) -> float | None:
        """How far, at most and to first order, z is from r(x), by |grad_z f2| over its curvature.

        A gradient measured in the units of the parameters, whatever the scale of the losses.  None
        without a positive curvature.
        """
        if not self.follower_curvature > self.follower_rounding:
            return None
        return self.follower_gradient_norm / self.follower_curvature

    @property
    def leader_distance(self) -> float | None:
        """How far, at most and to first order, x is from the minimum, by |D f1| over its curvature.

        None without a positive curvature.
        """
        if self.leader_gradient_norm is None or self.leader_curvature is None:
            return None
        if not self.leader_curvature > (self.leader_rounding or 0.0):
            return None
        return self.leader_gradient_norm / self.leader_curvature

    @property
    def message(self) -> str:
        """One sentence for people, with the figures."""
        if self.failures:
            return f"No local Stackelberg equilibrium was shown: {'; '.join(self.failures)}."
        how = " (estimated by Lanczos, from above)" if self.estimated else ""
        return (
            "A local strong Stackelberg equilibrium: gradients of "
            f"{self.leader_gradient_norm:.1e} (leader, total) and "
            f"{self.follower_gradient_norm:.1e} (follower), at most {self.gradient_tol:.1e}, and "
            f"smallest curvatures of {self.leader_curvature:.2e} (leader, total) and "
            f"{self.follower_curvature:.2e} (follower){how}."
        )

    def __str__(self) -> str:
        return self.message


def check_stackelberg(
    leader_loss: Loss,
    follower_loss: Loss,
    leader_params: Tree,
    follower_params: Tree,
    *,
    gradient_tol: float = 1e-5,
    max_dense: int = 500,
    solver: Solver | None = None,
) -> StackelbergCheck:
    """Is this point a local strong Stackelberg equilibrium?  Four conditions, with figures.

    With the follower's response r defined by grad_z f2(x, r(x)) = 0, the point (x, z) is one if

        grad_z f2 = 0,  d2 f2 / dz dz > 0,  D f1 = 0,  D2 f1 > 0,

    D being total derivatives of x -> f1(x, r(x)).  The first two make z a strict local best
    response, the last two make x a strict local minimum of what the leader gets for it.  They are
    sufficient; without ">", necessary.  (Strong, or optimistic: where the follower is indifferent
    it is taken to favour the leader.  A strict response leaves nothing to be indifferent about.)

    The second total derivative is, with S = dr/dx = -H^-1 (d2 f2 / dz dx), H = d2 f2 / dz dz and
    the multiplier u = H^-1 grad_z f1 held fixed,

        D2 f1 = (I, S') [Hessian in (x, z) of f1 - <u, grad_z f2>] (I, S')'.

    Args:
        leader_loss: f1, called as ``leader_loss(leader_params, follower_params)``; three times
            differentiable, like ``follower_loss``.
        follower_loss: f2, called in the same way.  Both the same at each call.
        leader_params: x, any tree.
        follower_params: z, any tree.
        gradient_tol: up to which the norm of a gradient counts as zero, in the units of your
            losses and parameters.
        max_dense: up to this many parameters of a player the whole spectrum is computed; beyond,
            its ends are estimated by Lanczos.
        solver: of the linear systems with H: if None, ``Exact()`` up to ``max_dense`` and
            ``CG(rtol=1e-10)`` (in single precision 1e-6) beyond.

    Returns:
        A :class:`StackelbergCheck`; ``print(check)``.

    Raises:
        SolverOptionError: an option outside its range.
        HypergradError: see :func:`hypergrad.hypergradient`.

    Warns:
        ConvergenceWarning: a linear solve failed, and the leader's figures are not to be trusted.

    Cost: n2 products with H for its spectrum (60 where that is estimated); then, for each of n1
    (or 60) products with D2 f1, two solves and one product with the Hessian in both.
    Source: Fiez, Chasnov and Ratliff, arXiv 1906.01217, definition 4 (differential Stackelberg
    equilibrium); the second derivative is the usual one of a constrained minimum, Nocedal and
    Wright, "Numerical Optimization", 2nd edition, theorem 12.6.

    Examples:
        >>> import torch, hypergrad
        >>> leader = lambda x, z: -x * (10 - x - z)
        >>> follower = lambda x, z: -z * (10 - x - z)
        >>> check = hypergrad.check_stackelberg(
        ...     leader, follower, torch.tensor(5.0), torch.tensor(2.5))
        >>> check.is_equilibrium, check.follower_curvature, check.leader_curvature
        (True, 2.0, 1.0)

        Where both move at once, each ends with a third of the market.  It is no place for a leader:

        >>> third = torch.tensor(10 / 3)
        >>> print(hypergrad.check_stackelberg(leader, follower, third, third))
        No local Stackelberg equilibrium was shown: the leader's total gradient is not zero
        (1.7e+00), so that it can gain by moving.
    """
    good = is_tolerance(gradient_tol)
    check_option(good, "gradient_tol", gradient_tol, "a finite number >= 0")
    check_option(is_count(max_dense), "max_dense", max_dense, "an integer >= 1")
    good = solver is None or isinstance(solver, Solver)
    check_option(good, "solver", solver, "None or a configuration such as hypergrad.CG()")
    point = BilevelPoint(
        _swapped(follower_loss), _swapped(leader_loss), follower_params, leader_params
    )
    follower = _Ends.of(point.curvature, max_dense)
    gradient = norm(_wide(point.inner_layout, point.inner_gradient))
    estimated, num_hvps = follower.estimated, follower.num_products
    leader_gradient = leader_curvature = leader_rounding = None
    if follower.smallest > follower.rounding:
        game = Game(point, leader_loss, follower_loss, solver or _solver(point, max_dense))
        hypergradient = game.hypergradient()
        leader_gradient = norm(_wide(point.outer_layout, hypergradient.grad))
        leader = _Ends.of(TotalHessian(game, hypergradient.ihvp), max_dense)
        leader_curvature, leader_rounding = leader.smallest, leader.rounding
        estimated = estimated or leader.estimated
        num_hvps += game.num_hvps
        if game.failed is not None:
            warn(
                f"the leader's figures rest on a failed linear solve: {game.failed}",
                ConvergenceWarning,
            )
    return StackelbergCheck(
        follower_gradient_norm=gradient,
        follower_curvature=follower.smallest,
        leader_gradient_norm=leader_gradient,
        leader_curvature=leader_curvature,
        follower_rounding=follower.rounding,
        leader_rounding=leader_rounding,
        gradient_tol=float(gradient_tol),
        estimated=estimated,
        num_hvps=num_hvps,
    )


def _swapped(loss: Loss) -> Loss:
    """A loss of (leader, follower) as one of (inner, outer)."""
    return lambda follower, leader: loss(leader, follower)


def _eigenvalue(value: float, rounding: float) -> str:
    if abs(value) <= rounding:
        return f"its smallest eigenvalue, {value:.1e}, cannot be told from zero"
    return f"its smallest eigenvalue is {value:.1e}"


def _wide(layout: TreeLayout, tree: Tree) -> Tensor:
    return layout.flatten(tree).to(working_dtype(torch.float64, layout.device))


def _solver(point: BilevelPoint, max_dense: int) -> Solver:
    if point.inner_layout.dim <= max_dense:
        return Exact()
    eps = max(torch.finfo(dtype).eps for dtype in point.inner_layout.dtypes)
    return CG(rtol=max(1e-10, 10.0 * eps))


@dataclass(frozen=True)
class _Ends:
    """The smallest eigenvalue of an operator, and what cannot be told from zero beside it."""

    smallest: float
    rounding: float
    estimated: bool
    num_products: int

    @classmethod
    def of(cls, operator: LinearOperator, max_dense: int) -> _Ends:
        n = operator.layout.dim
        if n <= max_dense:
            matrix = operator.to_dense().cpu().to(torch.float64)
            values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
            smallest, size = float(values[0]), float(values.abs().max())
            products = n
        else:
            ends = extreme_eigenvalues(operator, num_steps=min(n, _STEPS))
            smallest, size = ends.smallest, max(abs(ends.smallest), abs(ends.largest))
            products = ends.num_hvps
        eps = max(torch.finfo(dtype).eps for dtype in operator.layout.dtypes)
        return cls(smallest, _ROUNDING * eps * size, products < n, products)
