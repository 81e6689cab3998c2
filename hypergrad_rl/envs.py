"""Gymnasium vector environments with one convention for episode ends, and running normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hypergrad_rl.errors import EnvironmentUnsupported
from hypergrad_rl.networks import CategoricalPolicy, GaussianPolicy, Policy

Array = NDArray[np.float32]


@dataclass
class Transition:
    """What one step of all environments returns; shapes (num_envs, ...)."""

    obs: Array  # where the next action is chosen: after an episode's end, the next episode's first
    next_obs: Array  # s_{t+1} of the transition: after an episode's end, its last observation
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


class VectorEnv:
    """``num_envs`` copies of a Gymnasium environment, stepped in this process.

    An environment that ends is reset in the same step and its final observation is kept, so that
    every stored transition is a real one and a time limit is bootstrapped with V(s_T). Gymnasium's
    own vector CartPole only resets in the next step, which stores one transition per episode whose
    action is ignored, and at 4 environments it is no faster; its ``SyncVectorEnv`` costs a third
    more a step than this loop (CartPole-v1, 4 environments, one thread, CPU time of a step of one
    environment: 11 us, 14 us and, here, 11 us).

    Raises:
        EnvironmentUnsupported: an unknown id, or spaces other than Box observations with Discrete
            or Box actions.
    """

    def __init__(self, env_id: str, num_envs: int, render_mode: str | None = None) -> None:
        try:
            self.envs = [gym.make(env_id, render_mode=render_mode) for _ in range(num_envs)]
        except (gym.error.Error, ModuleNotFoundError) as error:
            reason = " ".join(str(error).split())
            raise EnvironmentUnsupported(
                f"cannot make environment {env_id!r}: {reason} Expected the id of a registered "
                "Gymnasium environment whose packages are installed, for instance CartPole-v1."
            ) from error
        obs_space, action_space = self.envs[0].observation_space, self.envs[0].action_space
        if not isinstance(obs_space, gym.spaces.Box):
            raise EnvironmentUnsupported(
                f"{env_id}: observation space {obs_space} is not supported; expected a Box "
                "(wrap the environment, for instance in FlattenObservation)"
            )
        self.policy: Policy
        if isinstance(action_space, gym.spaces.Discrete):
            self.policy = CategoricalPolicy(int(action_space.n))
        elif isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1:
            self.policy = GaussianPolicy(action_space.shape[0])
        else:
            raise EnvironmentUnsupported(
                f"{env_id}: action space {action_space} is not supported; expected Discrete or a "
                "one-dimensional Box"
            )
        self.env_id, self.num_envs, self.action_space = env_id, num_envs, action_space
        self.obs_dim = int(np.prod(obs_space.shape))

    def reset(self, seed: int) -> Array:
        """First observations (num_envs, obs_dim); environment i is seeded with ``seed + i``."""
        obs = np.empty((self.num_envs, self.obs_dim), np.float32)
        for i, env in enumerate(self.envs):
            obs[i] = np.reshape(env.reset(seed=seed + i)[0], -1)
        return obs

    def step(self, actions: NDArray[np.generic]) -> Transition:
        """One step of every environment.

        Box actions are clipped to the action space's bounds, as is usual for a Gaussian policy;
        probabilities stay those of the unclipped action.
        """
        if isinstance(self.action_space, gym.spaces.Box):
            actions = np.clip(actions, self.action_space.low, self.action_space.high)
        else:
            actions = actions + self.action_space.start
        next_obs = np.empty((self.num_envs, self.obs_dim), np.float32)
        rewards, ends = np.empty(self.num_envs), np.empty((2, self.num_envs), np.bool_)
        resets: dict[int, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            raw, rewards[i], ends[0, i], ends[1, i], _ = env.step(action)
            next_obs[i] = np.reshape(raw, -1)
            if ends[0, i] or ends[1, i]:
                resets[i] = env.reset()[0]
        obs = next_obs
        if resets:
            obs = next_obs.copy()
            for i, first in resets.items():
                obs[i] = np.reshape(first, -1)
        return Transition(obs, next_obs, rewards, ends[0], ends[1])

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


class RunningMoments:
    """Mean and variance of all samples seen, merged batch by batch (Chan et al. 1983).

    >>> moments = RunningMoments(1)
    >>> moments.update(np.array([[1.0], [3.0]]))
    >>> moments.mean.item(), moments.variance.item()
    (2.0, 1.0)
    """

    def __init__(self, size: int) -> None:
        self.mean = np.zeros(size)
        self.squares = np.zeros(size)  # sum of squared deviations from the mean
        self.count = 0

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance; 1 before any sample."""
        return self.squares / self.count if self.count else np.ones_like(self.squares)

    def update(self, samples: NDArray[np.floating]) -> None:
        """Merge samples (..., size)."""
        samples = samples.reshape(-1, self.mean.size).astype(np.float64)
        count, delta = len(samples), samples.mean(0) - self.mean
        total = self.count + count
        self.squares += ((samples - samples.mean(0)) ** 2).sum(0)
        self.squares += delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total
