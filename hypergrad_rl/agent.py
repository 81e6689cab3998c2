"""What PPO and BLPO share: parameters, optimisers, their state, and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hypergrad_rl.config import AgentConfig
from hypergrad_rl.networks import Params, Policy, init_critic
from hypergrad_rl.rollout import Batch, Rollout, make_batch


class Agent(ABC):
    """Actor and critic parameters with an Adam optimiser each; what PPO and BLPO share."""

    def __init__(
        self, config: AgentConfig, policy: Policy, obs_dim: int, generator: torch.Generator
    ) -> None:
        self.config, self.policy, self.generator = config, policy, generator
        self.actor: Params = policy.init(obs_dim, config.hidden, generator)
        self.critic: Params = init_critic(obs_dim, config.hidden, generator)
        self.actor_optimizer = torch.optim.Adam(
            self.actor.values(), config.learning_rate, eps=config.adam_eps, fused=True
        )
        self.critic_optimizer = torch.optim.Adam(
            self.critic.values(), config.critic_learning_rate, eps=config.adam_eps, fused=True
        )

    @abstractmethod
    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve actor and critic on one rollout; statistics of the update.

        ``progress`` is the fraction of the training that is done.
        """

    def make_batch(self, rollout: Rollout) -> Batch:
        """The rollout with what stays fixed while the agent improves on it."""
        config = self.config
        return make_batch(
            self.policy, self.actor, self.critic, rollout, config.gamma, config.gae_lambda
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: parameters, optimisers, the generator."""
        return {
            "actor": {name: p.detach() for name, p in self.actor.items()},
            "critic": {name: p.detach() for name, p in self.critic.items()},
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that ``state_dict`` returned."""
        with torch.no_grad():
            for params, saved in ((self.actor, state["actor"]), (self.critic, state["critic"])):
                for name, p in params.items():
                    p.copy_(saved[name])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.generator.set_state(state["generator"])


def apply_gradient(
    optimizer: torch.optim.Optimizer, params: Params, grads: Iterable[Tensor]
) -> None:
    """One step of the optimiser along given gradients."""
    for p, grad in zip(params.values(), grads, strict=True):
        p.grad = grad
    optimizer.step()


def policy_stats(log_ratio: Tensor, entropy: Tensor, clip: float) -> dict[str, Tensor]:
    """Entropy, KL(old || new) by the estimator (rho - 1) - log rho, and the clipped fraction."""
    ratio = log_ratio.detach().exp()
    return {
        "entropy": entropy.detach().mean(),
        "approx_kl": (ratio - 1 - log_ratio.detach()).mean(),
        "clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
    }


def mean_stats(stats: list[dict[str, Tensor]], batch: Batch) -> dict[str, float]:
    """Means over the minibatches where defined, and the explained variance before the update."""
    means = {name: torch.stack([s[name] for s in stats]).nanmean().item() for name in stats[0]}
    residual = (batch.targets - batch.values).var()
    means["explained_variance"] = (1 - residual / batch.targets.var()).item()
    return means
