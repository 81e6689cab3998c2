"""Small tabular MDPs whose inner and outer objectives are exact sums, in float64.

The follower's loss over rollouts of T steps with restarts, targets G under a frozen critic w0:

    g(theta, w) = (1/T) sum_t E (G_t - V_w(s_t))^2

Its mixed derivative times x is d/dtheta of (1/T) sum_t E[-2 (G_t - V_w(s_t)) u(s_t)], u = V'_w x.
Forward recursion for the state distribution, backward recursion for E[G_t | s_t]: no sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATES, ACTIONS, STEPS = 5, 3, 20
GAMMA, LAMBDA = 0.9, 0.95


@dataclass
class TabularMDP:
    """P(s'|s,a), r(s,a), P(end|s,a), start distribution, and logits theta of a softmax policy."""

    transition: Tensor
    reward: Tensor
    end: Tensor
    start: Tensor
    theta: Tensor
    frozen_values: Tensor  # V_w0
    values: Tensor  # V_w
    value_change: Tensor  # u

    @classmethod
    def random(cls, seed: int, *, stay: float = 0.0) -> TabularMDP:
        """``stay`` is the probability that the state does not move, whatever the action."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return cls(
            transition=(1 - stay) * (2 * normal(STATES, ACTIONS, STATES)).softmax(-1)
            + stay * torch.eye(STATES, dtype=torch.float64)[:, None],
            reward=normal(STATES, ACTIONS),
            end=0.15 * torch.rand(STATES, ACTIONS, generator=generator, dtype=torch.float64),
            start=normal(STATES).softmax(-1),
            theta=0.5 * normal(STATES, ACTIONS),
            frozen_values=normal(STATES),
            values=normal(STATES),
            value_change=normal(STATES),
        )

    def lambda_action_values(
        self, theta: Tensor, values: Tensor, gae_lambda: float = LAMBDA
    ) -> list[Tensor]:
        """E[A_t + V(s_t) | s_t, a_t], (STATES, ACTIONS) for t = 0..T-1, under any V.

        A_t is the generalised advantage under V of a rollout that goes on by theta's policy.
        """
        policy, next_value = theta.softmax(-1), self.transition @ values
        advantage = torch.zeros(STATES, dtype=torch.float64)
        found = []
        for _ in range(STEPS):
            ahead = next_value + gae_lambda * (self.transition @ advantage)
            found.append(self.reward + (1 - self.end) * GAMMA * ahead)
            advantage = (policy * found[-1]).sum(-1) - values
        return found[::-1]

    def frozen_targets(self, theta: Tensor, gae_lambda: float = LAMBDA) -> list[Tensor]:
        """E[G_t | s_t = s] for t = 0..T-1, differentiable in theta."""
        policy = theta.softmax(-1)
        values = self.lambda_action_values(theta, self.frozen_values, gae_lambda)
        return [(policy * q).sum(-1) for q in values]

    def state_distributions(self, theta: Tensor) -> list[Tensor]:
        """P(s_t = s) for t = 0..T-1, differentiable in theta; an ended episode restarts."""
        policy, p = theta.softmax(-1), self.start
        distributions = []
        for _ in range(STEPS):
            distributions.append(p)
            taken = p[:, None] * policy
            p = torch.einsum("sa,sat->t", taken * (1 - self.end), self.transition)
            p = p + (taken * self.end).sum() * self.start
        return distributions

    def exact_cross_term(self, fixed_distribution: bool) -> Tensor:
        """(d2 g / dtheta dw) x; with the state distribution held fixed, or the whole of it."""
        theta = self.theta.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for p, target in zip(
            self.state_distributions(theta), self.frozen_targets(theta), strict=True
        ):
            weight = p.detach() if fixed_distribution else p
            total = total + (weight * -2 * (target - self.values) * self.value_change).sum()
        return torch.autograd.grad(total / STEPS, theta)[0]

    def sample(self, rollouts: int, seed: int) -> dict[str, Tensor]:
        """Rollouts of T steps: states, actions, rewards, next states, ends; each (rollouts, T)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(probabilities: Tensor) -> Tensor:
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

        policy = self.theta.softmax(-1)
        state = draw(self.start.expand(rollouts, -1))
        steps = []
        for _ in range(STEPS):
            action = draw(policy[state])
            end = torch.rand(rollouts, generator=generator) < self.end[state, action]
            following = draw(self.transition[state, action])
            steps.append((state, action, self.reward[state, action], following, end))
            state = torch.where(end, draw(self.start.expand(rollouts, -1)), following)
        names = ("states", "actions", "rewards", "next_states", "end")
        return {n: torch.stack(x, -1) for n, x in zip(names, zip(*steps, strict=True), strict=True)}
