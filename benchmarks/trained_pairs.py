"""Actor and critic trained by BLPO's exact updates on tabular MDPs: local Stackelberg equilibria?

``python -m benchmarks.trained_pairs`` trains softmax policies with a linear critic of 3 features
for 5 states, in float64 and without sampling, and checks the first- and second-order conditions at
the end.  Each rollout is a game, that of ``benchmarks.outer_objective``, with PPO's entropy bonus:
without it a softmax policy has no optimum at finite logits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad
from benchmarks.outer_objective import Game, policy_values
from benchmarks.tabular import ACTIONS, LAMBDA, STATES, TabularMDP

TAU = 2.0  # the weight of the entropy
FEATURES = 3
STEP = 0.3  # of the natural gradient, whose curvature is tau for the entropy alone
Loss = Callable[[Tensor, Tensor], Tensor]


def with_zero(theta: Tensor) -> Tensor:
    """Logits whose last action is fixed at 0: no direction is left that changes no policy."""
    return torch.cat([theta, torch.zeros_like(theta[:, :1])], -1)


@dataclass
class Pair:
    """A trained actor and critic, and the MDP and the critic's features that they live in."""

    mdp: TabularMDP
    features: Tensor
    theta: Tensor  # (STATES, ACTIONS - 1)
    w: Tensor

    def rollout(self, full: bool = False) -> tuple[Game, Loss, Loss]:
        """The game of a rollout under this actor, with targets from this critic; f and g.

        ``full``: with all logits free, one more for each state.
        """
        theta, values = with_zero(self.theta), self.features @ self.w
        mdp = replace(self.mdp, theta=theta, frozen_values=values)
        game = Game(mdp, self.features, LAMBDA, "return", "fixed")
        visits = game.visits.mean(0)[:, None]

        def f(free: Tensor, w: Tensor) -> Tensor:
            logits = free if full else with_zero(free)
            log_policy = logits.log_softmax(-1)
            negative_entropy = (visits * log_policy.exp() * log_policy).sum()
            return game.outer_loss(w, logits) + TAU * negative_entropy

        def g(free: Tensor, w: Tensor) -> Tensor:
            return game.inner_loss(w, free if full else with_zero(free))

        return game, f, g

    def check(self, full: bool = False) -> hypergrad.StackelbergCheck:
        """The conditions of an equilibrium of the next rollout's game."""
        _, f, g = self.rollout(full)
        theta = with_zero(self.theta) if full else self.theta
        return hypergrad.check_stackelberg(f, g, theta, self.w)


def untrained(seed: int) -> Pair:
    """A uniform policy and a critic of zeros in a random MDP."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(STATES, FEATURES, generator=generator, dtype=torch.float64)
    theta = torch.zeros(STATES, ACTIONS - 1, dtype=torch.float64)
    return Pair(TabularMDP.random(seed), features, theta, torch.zeros(FEATURES).to(features))


def train(seed: int, *, correction: bool, updates: int) -> Pair:
    """Rollout after rollout: the critic's best response, then a natural step along d - c, or d."""
    pair = untrained(seed)
    for _ in range(updates):
        game, f, g = pair.rollout()
        w = game.best_response()
        got = hypergrad.stackelberg_gradient(f, g, pair.theta, w, solver=hypergrad.Exact())
        gradient = got.grad if correction else got.direct
        assert isinstance(gradient, Tensor)
        # The Fisher matrix of each state's policy: diag(pi) - pi pi', as often as it is visited.
        policy = with_zero(pair.theta).softmax(-1)[:, :-1]
        fisher = torch.diag_embed(policy) - policy[:, :, None] * policy[:, None, :]
        fisher = game.visits.mean(0)[:, None, None] * fisher
        theta = pair.theta - STEP * torch.linalg.solve(fisher, gradient[..., None])[..., 0]
        pair = replace(pair, theta=theta, w=w)
    # Of the last actor's own rollout, and the targets that come from the critic itself.
    for _ in range(30):
        pair = replace(pair, w=pair.rollout()[0].best_response())
    return pair


def main() -> None:
    """Train, check, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mdps", type=int, default=20)
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    print("| step along | equilibria | total gradient | curvature | follower's | entropy | J |")
    print("|---|---|---|---|---|---|---|")
    for correction in (True, False):
        rows = []
        for seed in tqdm(range(arguments.mdps), desc="MDPs"):
            pair = train(seed, correction=correction, updates=arguments.updates)
            check = pair.check()
            logits = with_zero(pair.theta)
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            values = policy_values(pair.mdp, logits)
            rows.append((check, float(entropy), float(pair.mdp.start @ values)))
        checks = [row[0] for row in rows]
        gradients = [c.leader_gradient_norm or 0.0 for c in checks]
        print(
            f"| {'d - c' if correction else 'd'} | {sum(c.is_equilibrium for c in checks)} "
            f"of {len(rows)} | {min(gradients):.1e} to {max(gradients):.1e} "
            f"| {min(c.leader_curvature or 0.0 for c in checks):.1e} at least "
            f"| {min(c.follower_curvature for c in checks):.1e} at least "
            f"| {statistics.mean(r[1] for r in rows):.2f} "
            f"| {statistics.mean(r[2] for r in rows):.2f} |"
        )


if __name__ == "__main__":
    main()
