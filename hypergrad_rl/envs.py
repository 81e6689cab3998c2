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
    if not isinstance(obs, gym.spaces.Box) or not obs.shape or 0 in obs.shape:
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
    action is ignored, and its ``SyncVectorEnv`` costs a third more a step than this loop.

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
        for env in self.envs:
            if not hasattr(env, "observation_space"):
                raise EnvironmentUnsupported(
                    f"env_fn returned a {type(env).__name__}, expected a gymnasium.Env"
                )
        if len({id(env.unwrapped) for env in self.envs}) < num_envs:
            # Each step would be one of all of them.
            raise EnvironmentUnsupported(
                f"env_fn returned one environment for several of {num_envs}; expected a new one at "
                "each call: env_fn=lambda: gymnasium.make(...)"
            )
        self._describe(env_id, num_envs, self.envs[0].observation_space, self.envs[0].action_space)

    def _describe(
        self, env_id: str, num_envs: int, obs: gym.Space[Any], action: gym.Space[Any]
    ) -> None:
        self.policy = policy_for(env_id, obs, action)
        self.env_id, self.num_envs, self.action_space = env_id, num_envs, action
        self.obs_shape: tuple[int, ...] = obs.shape or ()
        self.obs_dim = int(np.prod(self.obs_shape))
        # The actions so far, (steps, num_envs, ...); of them ``filled`` are there.
        drawn = np.int64 if isinstance(action, gym.spaces.Discrete) else np.float32
        dtype = np.result_type(drawn, action.dtype or drawn)
        self.taken = np.empty((256, num_envs, *(action.shape or ())), dtype)

    # What a simulator does; the rest is the same for all of them.

    def _begin(self, envs: NDArray[np.intp]) -> Array:
        """Begin episode ``self.episodes[i]`` in each of ``envs``; first observations, flat."""
        first = np.empty((len(envs), self.obs_dim), np.float32)
        for row, i in zip(first.reshape(-1, *self.obs_shape), envs, strict=True):
            self.current = i
            seed = episode_seed(self.seed, i, self.episodes[i])
            row[...] = self._fitting("reset", self.envs[i].reset(seed=seed)[0])
        return first

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """One step: flat observations, rewards, terminated, truncated; nothing begins anew."""
        obs = np.empty((self.num_envs, self.obs_dim), np.float32)
        shaped = obs.reshape(-1, *self.obs_shape)
        rewards, ends = np.empty(self.num_envs), np.empty((2, self.num_envs), np.bool_)
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            self.current = i
            seen, rewards[i], ends[0, i], ends[1, i], _ = env.step(action)
            shaped[i] = self._fitting("step", seen)
        return obs, rewards, ends[0], ends[1]

    def _fitting(self, call: str, obs: Any) -> Any:
        if np.shape(obs) != self.obs_shape:  # NumPy would spread a smaller one
            raise ValueError(
                f"{call} gave an observation of shape {np.shape(obs)}; the observation space has "
                f"{self.obs_shape}"
            )
        return obs

    def _where(self) -> str:
        """What was being stepped, for errors."""
        i = self.current
        return self.place(i, self.episodes[i], self.lengths[i])

    def reset(self, seed: int) -> Array:
        """Start episode 0 everywhere; first observations (num_envs, obs_dim).

        Episode j of environment i is reset with the :func:`episode_seed` of (seed, i, j).
        """
        self.seed, self.filled = seed, 0
        self.episodes, self.lengths = np.zeros((2, self.num_envs), np.int64)
        self.returns = np.zeros(self.num_envs)
        try:
            self.obs = self._begin(np.arange(self.num_envs))
        except Exception as error:  # each environment has its own, here and below
            raise self._fault(error) from error
        return self.obs

    def step(self, actions: NDArray[np.generic]) -> Transition:
        """One step of every environment.

        Box actions are clipped to the action space's bounds, as is usual for a Gaussian policy;
        probabilities stay those of the unclipped action.

        Raises:
            EnvironmentFault: an environment raised; its own error is the cause.
        """
        actions = self._legal(actions)
        self._remember(actions)
        self.lengths += 1
        ended: list[tuple[int, float, int]] = []
        try:
            next_obs, rewards, terminated, truncated = self._advance(actions)
            self.obs, over = next_obs, terminated | truncated
            self.returns += rewards
            if over.any():
                (envs,) = over.nonzero()
                ended = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in envs]
                self.obs = next_obs.copy()
                self._next_episodes(envs)
        except Exception as error:
            raise self._fault(error) from error
        return Transition(self.obs, next_obs, rewards, terminated, truncated, ended)

    def _next_episodes(self, envs: NDArray[np.intp]) -> None:
        self.episodes[envs] += 1
        self.lengths[envs], self.returns[envs] = 0, 0.0
        self.obs[envs] = self._begin(envs)

    def _legal(self, actions: NDArray[Any]) -> Any:
        if isinstance(self.action_space, gym.spaces.Box):
            return np.clip(actions, self.action_space.low, self.action_space.high)
        if isinstance(self.action_space, gym.spaces.Discrete) and self.action_space.start:
            return actions + self.action_space.start
        return actions

    def _remember(self, actions: NDArray[np.generic]) -> None:
        if self.filled == len(self.taken):  # what is not of a running episode is let go
            running = self.taken[self.filled - self.lengths.max() :]
            self.filled = len(running)
            shape = (2 * self.filled + 256, *self.taken.shape[1:])
            self.taken = np.empty(shape, self.taken.dtype)
            self.taken[: self.filled] = running
        self.taken[self.filled] = actions
        self.filled += 1

    def place(self, env: int, episode: int, step: int) -> str:
        """How errors name a step of an episode (episodes count from 0, their steps from 1)."""
        return f"{self.env_id} (environment {env}, episode {episode}, step {step})"

    def _fault(self, error: Exception) -> EnvironmentFault:
        return EnvironmentFault(f"{self._where()} raised {type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """The state of all environments: their episodes' numbers and actions so far.

        Tensors, numbers and strings alone, and nothing of an environment's inside: from its seed
        and its actions an episode is played again. The actions are no copy: they stay as they are.
        """
        running = self.taken[self.filled - self.lengths.max() : self.filled]
        return {
            **self._progress(),
            "actions": torch.from_numpy(running),  # environment i's are the last lengths[i]
            "obs": torch.from_numpy(self.obs),
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            **{n: getattr(self, n).tolist() for n in ("episodes", "lengths", "returns")},
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
        if state["actions"].shape[:2] != (max(state["lengths"]), self.num_envs):
            raise CheckpointError(
                f"the state is that of {len(state['episodes'])} environments; expected "
                f"{self.num_envs}, and actions (steps, {self.num_envs}, ...), which here are "
                f"{tuple(state['actions'].shape)}: use the num_envs, and the version, of the run "
                "that is continued"
            )
        self._resume(state)
        self.taken, self.obs = state["actions"].numpy(), state["obs"].numpy().copy()
        self.filled = len(self.taken)
        try:
            lost = [i for i in range(self.num_envs) if not self._replay(i)]
            if lost:
                self._next_episodes(np.array(lost))
        except Exception as error:
            raise self._fault(error) from error
        if lost:
            warnings.warn(
                f"{self.env_id}: played again from their seeds and actions, the episodes of "
                f"environments {lost} came out otherwise, so new ones begin there and this run is "
                "not that of an uninterrupted one. An environment is reproducible when all its "
                "random numbers come from the seed given to reset (self.np_random).",
                EnvironmentNotReproducible,
                stacklevel=2,
            )
        return lost

    def _resume(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.episodes, self.lengths = np.array([state["episodes"], state["lengths"]])
        self.returns = np.array(state["returns"], np.float64)

    def _replay(self, i: int) -> bool:
        """Whether the actions of environment i's episode lead to its observation and return."""
        obs, total = self._begin(np.array([i])), 0.0
        for action in self.taken[self.filled - self.lengths[i] :, i]:
            last, reward, terminated, truncated, _ = self.envs[i].step(action)
            obs.reshape(self.obs_shape)[...] = last
            total += float(reward)
            if terminated or truncated:
                return False
        return np.array_equal(obs[0], self.obs[i]) and total == self.returns[i]

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
