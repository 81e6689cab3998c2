"""PPO: the baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad_rl.agent import Agent
from hypergrad_rl.config import PPOConfig
from hypergrad_rl.functional import AdamState, adam_scales, adam_step, flatten, unflatten
from hypergrad_rl.hypergradient import critic_gradient, direct_gradient
from hypergrad_rl.rollout import Batch


class PPO(Agent):
    """Proximal policy optimisation on Gymnasium vector environments.

    ``update`` runs, for a rollout with pi_old and advantages under the old critic::

        repeat epochs times, over shuffled minibatches of single samples:
            theta <- Adam(theta, clip(grad f - c_H grad entropy));   w <- Adam(w, clip(grad g))

    Schulman et al. 2017, arXiv 1707.06347. The networks are separate and Adam does not feel the
    scale of a loss, so there is no value coefficient.
    """

    config: PPOConfig

    @property
    def folds(self) -> bool:
        """Whether the minibatches of an update are alike, so that one graph serves for all."""
        return self.config.num_envs * self.config.num_steps % self.config.num_minibatches == 0

    def _samples(self, batch: Batch) -> Batch:
        """What minibatches are rows of: single samples."""
        return batch.flatten()

    def _draw(self, progress: float) -> tuple[Any, ...]:
        """The samples of every minibatch, and the actor's and the critic's Adam scales."""
        config = self.config
        size, left = config.num_envs * config.num_steps, 1 - progress if config.anneal else 1.0
        orders = [torch.randperm(size, generator=self.generator) for _ in range(config.epochs)]
        rows = [rows for order in orders for rows in order.tensor_split(config.num_minibatches)]
        return (
            torch.stack(rows) if self.folds else rows,
            adam_scales(self.actor_state.step, left * config.learning_rate, len(rows)),
            adam_scales(self.critic_state.step, left * config.critic_learning_rate, len(rows)),
        )

    def _one_minibatch(
        self,
        carry: tuple[AdamState, AdamState, Any],
        tensors: tuple[Tensor, ...],
        row: tuple[Tensor, ...],
    ) -> tuple[tuple[AdamState, AdamState, Any], tuple[dict[str, Tensor], Any]]:
        actor, critic, _ = carry
        rows, actor_step, critic_step = row
        config, b = self.config, Batch.of(tensors, rows)
        adv = b.advantages
        if config.normalize_advantages:
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        theta = unflatten(actor.params, self.actor_shapes)
        d, stats = direct_gradient(self.policy, theta, b, adv, config)
        del stats["log_ratio"]
        w = unflatten(critic.params, self.critic_shapes)
        grads, loss = critic_gradient(w, b.obs, b.targets, self.value_fn)
        # Separately: clipped together, the critic's large gradients would shrink the actor's to
        # below Adam's epsilon while the values are still far off.
        actor = adam_step(actor, self._clipped(flatten(d)), actor_step, config.adam_eps)
        critic = adam_step(critic, self._clipped(flatten(grads)), critic_step, config.adam_eps)
        return (actor, critic, ()), ({**stats, "value_loss": loss}, ())

    def _clipped(self, grad: Tensor) -> Tensor:
        """The gradient, cut to the largest norm."""
        norm: Tensor = grad.norm()
        return grad * (self.config.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
