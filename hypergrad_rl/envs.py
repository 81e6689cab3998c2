"""Gymnasium vector environments with one convention for episode ends, and running normalisation."""

from __future__ import annotations

import functools
import hashlib
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hypergrad_rl.errors import (
    CheckpointError,
    EnvironmentFault,
    EnvironmentNotReproducible,
    EnvironmentUnsupported,
    HypergradRLError,
)
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
    ended: list[tuple[int, float, int]]  # environment, return and length of the episodes that ended


def episode_seed(seed: int, env: int, episode: int) -> int:
    """A seed for one episode of one environment, below 2^31: a hash, so that no state is kept.

    >>> episode_seed(0, 0, 1) == episode_seed(0, 1, 0)
    False
    """
    digest = hashlib.blake2b(b"%d %d %d" % (seed, env, episode), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """``gym.make``, which knows MinAtar's environments too.

    A MinAtar game repeats the former action now and then, after a reset that of the former episode;
    here an episode depends on nothing before it.

    Raises:
        EnvironmentUnsupported: the environment cannot be made, with Gymnasium's reason.
    """
    try:
        if not env_id.startswith("MinAtar/"):
            return gym.make(env_id, render_mode=render_mode)
        if env_id not in gym.registry:
            importlib.import_module("minatar.gym").register_envs()
        return FreshStickyAction(gym.make(env_id, render_mode=render_mode))
    except (gym.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        missing = isinstance(error, (ImportError, gym.error.DependencyNotInstalled))
        extras = [e for e in ("minatar", "mujoco") if missing and e in reason.lower()]
        advice = (
            f'Install it: pip install "hypergrad-torch[{extras[0]}]".'
            if extras
            else "Expected the id of a registered Gymnasium environment, for instance CartPole-v1, "
            "or MODULE:ID for one that importing MODULE registers."
        )
        raise EnvironmentUnsupported(
            f"cannot make environment {env_id!r}: {reason.rstrip('.?')}. {advice}"
        ) from error


class FreshStickyAction(gym.Wrapper[Any, Any, Any, Any]):
    """A MinAtar game whose first action to be repeated is 0 in every episode."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset, and forget the last action."""
        self.unwrapped.game.last_action = 0  # type: ignore[attr-defined]
        return super().reset(**kwargs)


def policy_for(env_id: str, obs: gym.Space[Any], action: gym.Space[Any]) -> Policy:
    """The policy for these spaces.

    Raises:
        EnvironmentUnsupported: there is none, with what to do.
    """
    if not isinstance(obs, gym.spaces.Box):
        raise EnvironmentUnsupported(
            f"{env_id}: observation space {obs} is not supported; expected a Box (wrap the "
            "environment in gymnasium.wrappers.FlattenObservation)"
        )
    if isinstance(action, gym.spaces.Discrete):
        return CategoricalPolicy(int(action.n))
    if isinstance(action, gym.spaces.Box) and len(action.shape) == 1 and action.dtype.kind == "f":
        return GaussianPolicy(action.shape[0])
    raise EnvironmentUnsupported(
        f"{env_id}: action space {action} is not supported; expected Discrete or a one-dimensional "
        "Box of floats (a gymnasium.ActionWrapper can make one of the two of it: a Discrete over "
        "all combinations of a MultiDiscrete, a flat Box of a larger one)"
    )


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

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        render_mode: str | None = None,
        env_fn: Callable[[], gym.Env[Any, Any]] | None = None,
    ) -> None:
        """``env_fn`` makes one environment, in place of the registered one; the id names it."""
        make = env_fn or functools.partial(make_env, env_id, render_mode)
        try:
            self.envs = [make() for _ in range(num_envs)]
        except HypergradRLError:
            raise
        except Exception as error:  # each environment has its own
            raise EnvironmentUnsupported(
                f"cannot make environment {env_id!r}: {type(error).__name__}: {error}"
            ) from error
        self._describe(env_id, num_envs, self.envs[0].observation_space, self.envs[0].action_space)

    def _describe(
        self, env_id: str, num_envs: int, obs: gym.Space[Any], action: gym.Space[Any]
    ) -> None:
        self.policy = policy_for(env_id, obs, action)
        self.env_id, self.num_envs, self.action_space = env_id, num_envs, action
        self.obs_shape: tuple[int, ...] = obs.shape or ()
        self.obs_dim = int(np.prod(self.obs_shape))
        # The actions of the running episodes, step by step: environment i's since ``start[i]``.
        drawn = np.int64 if isinstance(action, gym.spaces.Discrete) else np.float32
        dtype = np.result_type(drawn, action.dtype or drawn)
        self.taken = np.empty((256, num_envs, *(action.shape or ())), dtype)

    def reset(self, seed: int) -> Array:
        """Start episode 0 everywhere; first observations (num_envs, obs_dim).

        Episode j of environment i is reset with the :func:`episode_seed` of (seed, i, j).
        """
        self.seed, self.filled = seed, 0
        self.episodes, self.start = [0] * self.num_envs, [0] * self.num_envs
        self.returns = [0.0] * self.num_envs
        self.obs = np.empty((self.num_envs, self.obs_dim), np.float32)
        i = 0
        try:
            for i in range(self.num_envs):
                self._begin(i, 0, self.obs)
        except Exception as error:
            raise self._fault(i, error) from error
        return self.obs

    def _begin(self, i: int, episode: int, obs: Array) -> None:
        """Start that episode in environment i, its first observation into ``obs[i]``."""
        self.episodes[i], self.start[i], self.returns[i] = episode, self.filled, 0.0
        first = self.envs[i].reset(seed=episode_seed(self.seed, i, episode))[0]
        if np.shape(first) != self.obs_shape:  # NumPy would spread a smaller one
            raise ValueError(
                f"reset gave an observation of shape {np.shape(first)}; the observation space "
                f"has {self.obs_shape}"
            )
        obs.reshape(-1, *self.obs_shape)[i] = first

    def step(self, actions: NDArray[np.generic]) -> Transition:
        """One step of every environment.

        Box actions are clipped to the action space's bounds, as is usual for a Gaussian policy;
        probabilities stay those of the unclipped action.

        Raises:
            EnvironmentFault: an environment raised; its own error is the cause.
        """
        actions = self._legal(actions)
        self._remember(actions)
        next_obs = np.empty((self.num_envs, self.obs_dim), np.float32)
        shaped = next_obs.reshape(-1, *self.obs_shape)
        rewards, ends = np.empty(self.num_envs), np.empty((2, self.num_envs), np.bool_)
        ended: list[tuple[int, float, int]] = []
        i = 0
        try:
            for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
                shaped[i], reward, terminated, truncated, _ = env.step(action)
                rewards[i], ends[0, i], ends[1, i] = reward, terminated, truncated
                self.returns[i] += float(reward)
                if terminated or truncated:
                    ended.append((i, self.returns[i], self.filled - self.start[i]))
            self.obs = next_obs
            if ended:
                self.obs = next_obs.copy()
                for i, _, _ in ended:
                    self._begin(i, self.episodes[i] + 1, self.obs)
        except Exception as error:
            raise self._fault(i, error) from error
        return Transition(self.obs, next_obs, rewards, ends[0], ends[1], ended)

    def _legal(self, actions: NDArray[Any]) -> Any:
        if isinstance(self.action_space, gym.spaces.Box):
            return np.clip(actions, self.action_space.low, self.action_space.high)
        if isinstance(self.action_space, gym.spaces.Discrete) and self.action_space.start:
            return actions + self.action_space.start
        return actions

    def place(self, env: int, episode: int, step: int) -> str:
        """How errors name a step of an episode (episodes count from 0, their steps from 1)."""
        return f"{self.env_id} (environment {env}, episode {episode}, step {step})"

    def _fault(self, i: int, error: Exception) -> EnvironmentFault:
        place = self.place(i, self.episodes[i], self.filled - self.start[i])
        return EnvironmentFault(f"{place} raised {type(error).__name__}: {error}")

    def _remember(self, actions: NDArray[np.generic]) -> None:
        if self.filled == len(self.taken):
            first = min(self.start)  # what was before belongs to episodes that are over
            kept = self.taken[first:]
            shape = (2 * len(kept) + 256, *self.taken.shape[1:])
            self.taken = np.empty(shape, self.taken.dtype)
            self.taken[: len(kept)] = kept
            self.filled, self.start = len(kept), [s - first for s in self.start]
        self.taken[self.filled] = actions
        self.filled += 1

    def state_dict(self) -> dict[str, Any]:
        """The state of all environments: their episodes' numbers and actions so far.

        Tensors, numbers and strings alone, and nothing of an environment's inside: from its seed
        and its actions an episode is played again.
        """
        actions = [self.taken[s : self.filled, i] for i, s in enumerate(self.start)]
        return {
            "seed": self.seed,
            "episodes": list(self.episodes),
            "lengths": [len(part) for part in actions],
            "actions": torch.from_numpy(np.concatenate(actions)),
            "returns": list(self.returns),
            "obs": torch.from_numpy(self.obs.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[int]:
        """Continue where ``state_dict`` was called, by playing the running episodes again.

        Costs as many steps as they have had. An environment whose episode does not come out the
        same to the last bit (it draws random numbers from elsewhere than its seed, or remembers
        former episodes) begins the next one instead.

        Returns:
            The indices of the environments which had to begin a new episode.

        Warns:
            EnvironmentNotReproducible: there is such an environment.

        Raises:
            CheckpointError: the state of another number of environments.
        """
        if len(state["episodes"]) != self.num_envs:
            raise CheckpointError(
                f"the state is that of {len(state['episodes'])} environments; expected "
                f"{self.num_envs}: use the num_envs of the run that is continued"
            )
        self.reset(state["seed"])
        self.filled = max(state["lengths"])
        self.taken = np.empty((self.filled + 256, *self.taken.shape[1:]), self.taken.dtype)
        obs, lost = state["obs"].numpy().copy(), []
        for i, actions in enumerate(state["actions"].split(state["lengths"])):
            if self._replay(i, state["episodes"][i], actions.numpy(), obs[i], state["returns"][i]):
                self.start[i] -= len(actions)
                self.taken[self.start[i] : self.filled, i] = actions
            else:
                lost.append(i)
                self._begin(i, state["episodes"][i] + 1, obs)
        if lost:
            warnings.warn(
                f"{self.env_id}: played again from their seeds and actions, the episodes of "
                f"environments {lost} came out otherwise, so new ones begin there and this run is "
                "not that of an uninterrupted one. An environment is reproducible when all its "
                "random numbers come from the seed given to reset (self.np_random).",
                EnvironmentNotReproducible,
                stacklevel=2,
            )
        self.obs = obs
        return lost

    def _replay(
        self, i: int, episode: int, actions: NDArray[np.generic], last: Array, total: float
    ) -> bool:
        """Whether these actions in that episode lead to the observation and the return given."""
        obs = np.empty_like(self.obs)
        self._begin(i, episode, obs)
        shaped = obs.reshape(-1, *self.obs_shape)
        try:
            for action in actions:
                shaped[i], reward, terminated, truncated, _ = self.envs[i].step(action)
                self.returns[i] += float(reward)
                if terminated or truncated:
                    return False
        except Exception as error:
            raise self._fault(i, error) from error
        return np.array_equal(obs[i], last) and self.returns[i] == total

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def make_vector_env(
    env_id: str,
    num_envs: int,
    backend: str = "gymnasium",
    render_mode: str | None = None,
    env_fn: Callable[[], gym.Env[Any, Any]] | None = None,
) -> VectorEnv:
    """``brax/...`` by Brax, all by EnvPool for ``backend="envpool"``, Gymnasium's otherwise.

    Raises:
        EnvironmentUnsupported: see :class:`VectorEnv`; or the simulator lacks the task.
    """
    from hypergrad_rl import pools  # which imports this module

    if env_fn is None and env_id.startswith("brax/"):
        return pools.BraxEnv(env_id, num_envs)
    if env_fn is None and backend == "envpool":
        return pools.EnvPoolEnv(env_id, num_envs)
    return VectorEnv(env_id, num_envs, render_mode, env_fn)


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
