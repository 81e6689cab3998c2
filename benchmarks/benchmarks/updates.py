"""One update of an agent on a stored rollout, by what ``hypergrad_rl`` exports alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import hypergrad_rl


def one_update(algo: str, **settings: Any) -> Callable[[], dict[str, float]]:
    """An update as a function of nothing: the same work, from the same state, in each call.

    Args:
        algo: "ppo", "nested" or "blpo".
        settings: hyper-parameters; the environment is CartPole-v1 unless they say otherwise.
    """
    config = hypergrad_rl.make_config(algo, **({"compile": False} | settings))
    # The first rollout of a training makes the agent; nothing else makes one with its policy.
    agent: Any = hypergrad_rl.train(config, callbacks=[lambda *_: True]).agent
    generator = torch.Generator().manual_seed(1)
    shape = config.num_envs, config.num_steps
    states = torch.randn(shape[0], shape[1] + 1, agent.obs_dim, generator=generator)
    obs, next_obs = states[:, :-1].clone(), states[:, 1:].clone()
    noise = agent.policy.noise(*shape, generator)
    ended = torch.rand(shape, generator=generator) < 0.02
    rollout = SimpleNamespace(
        obs=obs,
        actions=agent.policy.act(agent.actor, obs, noise),
        rewards=torch.ones(shape),
        next_obs=next_obs,
        terminated=ended,
        done=ended.clone(),
    )
    start, drawn = (agent.actor_state, agent.critic_state), agent.generator.get_state()

    def update() -> dict[str, float]:
        (agent.actor_state, agent.critic_state) = start
        agent.generator.set_state(drawn)
        stats: dict[str, float] = agent.update(rollout, progress=0.0)
        return stats

    return update
