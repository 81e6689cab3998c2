"""The second total derivative of a leader's loss, as an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators import LinearOperator, hessian
from ..pytree import Tree
from ..solvers import Solution, Solver, solve
from .hypergradient import BilevelPoint, Hypergradient, Loss, filled


class Game:
    """A point of the game, and solves with the follower's Hessian there."""

    def __init__(
        self, point: BilevelPoint, leader_loss: Loss, follower_loss: Loss, solver: Solver
    ) -> None:
        self.point, self.solver = point, solver
        self.leader_loss, self.follower_loss = leader_loss, follower_loss
        self.num_hvps = 0
        self.failed: str | None = None

    def solved(self, v: Tree, *, batched: bool) -> Solution:
        """H^-1 v."""
        with torch.no_grad():  # only the value is of use
            solution = solve(
                self.point.curvature, v, self.solver, batched=batched, on_failure="ignore"
            )
        self.num_hvps += solution.info.num_hvps
        if solution.info.status.failed:
            self.failed = solution.info.message
        return solution

    def hypergradient(self) -> Hypergradient:
        """The leader's total derivative."""
        return self.point.assemble(self.solved(self.point.v, batched=False))

    def lagrangian(self, u: Tree) -> Callable[[Tree], Tensor]:
        """f1 - <u, grad_z f2> of both players' parameters, with u held fixed."""
        layout = self.point.inner_layout
        multipliers = layout.leaves(u)

        def value(both: Tree) -> Tensor:
            leader, follower = both["leader"], both["follower"]
            leaves = layout.leaves(follower, name="follower_params")
            loss = self.follower_loss(leader, follower)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            total = self.leader_loss(leader, follower)
            for gradient, multiplier in zip(grads, multipliers, strict=True):
                if gradient is not None:
                    total = total - (gradient * multiplier).sum()
            return total

        return value


class TotalHessian(LinearOperator):
    """D2 f1, on the leader's parameters; see :func:`hypergrad.check_stackelberg`."""

    def __init__(self, game: Game, u: Tree) -> None:
        point = game.point
        super().__init__(point.outer_layout)
        self.game = game
        leader = point.outer_layout.unflatten_leaves([x.detach() for x in point.outer])
        follower = point.inner_layout.unflatten_leaves([x.detach() for x in point.inner])
        self.both = hessian(game.lagrangian(u), {"leader": leader, "follower": follower})

    def _apply(self, block: Tensor) -> Tensor:
        point, inner, outer = self.game.point, self.game.point.inner_layout, self.layout
        moves = [point.mixed_transposed(outer.unflatten(row)) for row in block]
        stacked = inner.unflatten_block(torch.stack([inner.flatten(move) for move in moves]))
        response = self.game.solved(stacked, batched=True).value  # -S of each row
        turned = inner.unflatten_block(-inner.flatten_block(response))
        image = self.both.matmat({"leader": outer.unflatten_block(block), "follower": turned})
        back = self.game.solved(image["follower"], batched=True).value
        rows = []
        for i, direct in enumerate(outer.flatten_block(image["leader"]).unbind()):
            x = inner.unflatten(inner.flatten_block(back)[i])
            through = filled(point.mixed(x), point.outer)
            rows.append(direct - outer.flatten(outer.unflatten_leaves(through)))
        return torch.stack(rows)
