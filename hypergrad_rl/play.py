"""A trained policy at work: evaluated, watched, exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.envs import VectorEnv
from hypergrad_rl.errors import ConfigError
from hypergrad_rl.rollout import Collector, normalize
from hypergrad_rl.run_directory import CHECKPOINT, load_config
from hypergrad_rl.trainer import make_agent


def evaluate(
    run_dir: str | Path, episodes: int = 20, *, seed: int = 1_000_000, deterministic: bool = True
) -> list[float]:
    """Returns of ``episodes`` fresh episodes of the checkpointed policy, on separate environments.

    Every environment plays its own episodes to the end and as many as any other, so that short
    episodes are not over-represented.

    Args:
        run_dir: a run directory with a checkpoint.
        episodes: how many, rounded up to a multiple of the environments (at most 8).
        seed: of the environments and of sampled actions.
        deterministic: take the most likely action (the mean) instead of sampling.

    Raises:
        ConfigError: ``episodes`` below 1 or a negative ``seed``.
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint.
    """
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value}: expected an integer >= {least}")
    config = load_config(run_dir)
    state = load_checkpoint(Path(run_dir) / CHECKPOINT)
    generator = torch.Generator().manual_seed(seed)
    env = VectorEnv(config.env, min(8, episodes))
    agent = make_agent(config, env, generator)
    agent.load_state_dict(state["agent"])
    generator.manual_seed(seed)
    collector = Collector(env, dataclasses.replace(config, num_envs=env.num_envs), generator)
    collector.load_statistics(state["collector"])
    obs, running = env.reset(seed), np.zeros(env.num_envs)
    finished: list[list[float]] = [[] for _ in range(env.num_envs)]
    per_env = -(-episodes // env.num_envs)
    with torch.inference_mode():
        while min(map(len, finished)) < per_env:
            normalized = torch.from_numpy(normalize(collector.obs_moments, obs))
            noise = None if deterministic else env.policy.noise(1, env.num_envs, generator)[0]
            step = env.step(env.policy.act(agent.actor, normalized, noise).numpy())
            running += step.rewards
            for i in np.flatnonzero(step.terminated | step.truncated):
                if len(finished[i]) < per_env:
                    finished[i].append(float(running[i]))
                running[i] = 0.0
            obs = step.obs
    env.close()
    return [r for returns in finished for r in returns]
