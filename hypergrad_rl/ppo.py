"""PPO: the baseline."""

from __future__ import annotations

import torch

from hypergrad_rl.agent import Agent, mean_stats, policy_stats
from hypergrad_rl.config import PPOConfig
from hypergrad_rl.networks import critic_value
from hypergrad_rl.objectives import clipped_surrogate, value_loss
from hypergrad_rl.rollout import Rollout


class PPO(Agent):
    """Proximal policy optimisation on Gymnasium vector environments.

    ``update`` runs, for a rollout with pi_old and advantages under the old critic::

        repeat epochs times, over shuffled minibatches of single samples:
            theta <- Adam(theta, clip(grad f - c_H grad entropy));   w <- Adam(w, clip(grad g))

    Schulman et al. 2017, arXiv 1707.06347. The networks are separate and Adam does not feel the
    scale of a loss, so there is no value coefficient.
    """

    config: PPOConfig

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
        flat = batch.flatten()
        if config.anneal:
            self.actor_optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - progress)
            self.critic_optimizer.param_groups[0]["lr"] = config.critic_learning_rate * (
                1 - progress
            )
        params = [*self.actor.values(), *self.critic.values()]
        size = len(flat.obs)
        stats = []
        for _ in range(config.epochs):
            order = torch.randperm(size, generator=self.generator)
            for rows in order.tensor_split(config.num_minibatches):
                b = flat.select(rows)
                log_probs, entropy = self.policy.log_prob(self.actor, b.obs, b.actions)
                log_ratio = log_probs - b.log_probs
                adv = b.advantages
                if config.normalize_advantages:
                    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                policy_loss = clipped_surrogate(log_ratio, adv, config.clip).mean()
                critic_loss = value_loss(critic_value(self.critic, b.obs), b.targets)
                loss = policy_loss - config.entropy_bonus * entropy.mean() + critic_loss
                for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                    p.grad = grad
                # Separately: clipped together, the critic's large gradients would shrink the
                # actor's to below Adam's epsilon while the values are still far off.
                for net in (self.actor, self.critic):
                    torch.nn.utils.clip_grad_norm_(net.values(), config.max_grad_norm)
                self.actor_optimizer.step()
                self.critic_optimizer.step()
                stats.append(
                    {
                        "policy_loss": policy_loss.detach(),
                        "value_loss": critic_loss.detach(),
                        **policy_stats(log_ratio, entropy, config.clip),
                    }
                )
        return mean_stats(stats, batch)
