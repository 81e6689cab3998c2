"""PPO: the baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad_rl.agent import Agent, mean_stats
from hypergrad_rl.compiled import Compiled
from hypergrad_rl.config import PPOConfig
from hypergrad_rl.functional import AdamState, adam_scales, adam_step, flatten, gradient, unflatten
from hypergrad_rl.hypergradient import direct_gradient
from hypergrad_rl.networks import Params
from hypergrad_rl.objectives import value_loss
from hypergrad_rl.rollout import Batch, Rollout


class PPO(Agent):
    """Proximal policy optimisation on Gymnasium vector environments.

    ``update`` runs, for a rollout with pi_old and advantages under the old critic::

        repeat epochs times, over shuffled minibatches of single samples:
            theta <- Adam(theta, clip(grad f - c_H grad entropy));   w <- Adam(w, clip(grad g))

    Schulman et al. 2017, arXiv 1707.06347. The networks are separate and Adam does not feel the
    scale of a loss, so there is no value coefficient.
    """

    config: PPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._minibatch = Compiled(self._one_minibatch, self.backend)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve actor and critic on one rollout.

        Args:
            rollout: of shape (num_envs, num_steps, ...).
            progress: fraction of the training done, for the annealing.

        Returns:
            Statistics averaged over the minibatches.
        """
        config = self.config
        batch = self.make_batch(rollout)
        tensors = batch.flatten().tensors()
        left = 1 - progress if config.anneal else 1.0
        minibatches = config.epochs * config.num_minibatches
        actor_steps = adam_scales(
            self.actor_state.step, left * config.learning_rate, minibatches
        )
        critic_steps = adam_scales(
            self.critic_state.step, left * config.critic_learning_rate, minibatches
        )
        size, stats = rollout.rewards.numel(), []
        for _ in range(config.epochs):
            order = torch.randperm(size, generator=self.generator)
            for rows in order.tensor_split(config.num_minibatches):
                self.actor_state, self.critic_state, entry = self._minibatch(
                    self.actor_state, self.critic_state, tensors, rows,
                    actor_steps[len(stats)], critic_steps[len(stats)],
                )  # fmt: skip
                stats.append(entry)
        return mean_stats(stats, batch)

    def _one_minibatch(
        self,
        actor: AdamState,
        critic: AdamState,
        tensors: tuple[Tensor, ...],
        rows: Tensor,
        actor_step: Tensor,
        critic_step: Tensor,
    ) -> tuple[AdamState, AdamState, dict[str, Tensor]]:
        """The states after one minibatch, which is the samples ``rows``: a pure function."""
        config, b = self.config, Batch.of(tensors, rows)
        adv = b.advantages
        if config.normalize_advantages:
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)

        def g(w: Params) -> tuple[Tensor, dict[str, Tensor]]:
            return value_loss(self.value_fn(w, b.obs), b.targets), {}

        theta = unflatten(actor.params, self.actor_shapes)
        d, stats = direct_gradient(self.policy, theta, b, adv, config)
        del stats["log_ratio"]
        grads, loss, _ = gradient(g, unflatten(critic.params, self.critic_shapes))
        # Separately: clipped together, the critic's large gradients would shrink the actor's to
        # below Adam's epsilon while the values are still far off.
        actor = adam_step(actor, self._clipped(flatten(d)), actor_step, config.adam_eps)
        critic = adam_step(critic, self._clipped(flatten(grads)), critic_step, config.adam_eps)
        return actor, critic, {**stats, "value_loss": loss}

    def _clipped(self, grad: Tensor) -> Tensor:
        """The gradient, cut to the largest norm."""
        norm: Tensor = grad.norm()
        return grad * (self.config.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
