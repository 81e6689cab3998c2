"""Simulators that step all environments in one call: EnvPool and Brax."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hypergrad_rl.envs import Array, Transition, VectorEnv, episode_seed
from hypergrad_rl.errors import (
    EnvironmentFault,
    EnvironmentNotReproducible,
    EnvironmentUnsupported,
)


class Pool(VectorEnv, ABC):
    """A :class:`VectorEnv` over such a simulator: episodes that end begin anew in the same step."""

    @abstractmethod
    def _start(self) -> NDArray[Any]:
        """Begin episode 0 everywhere by ``self.seed``; first observations."""

    @abstractmethod
    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """One step: observations, rewards, terminated, truncated; nothing begins anew."""

    @abstractmethod
    def _restart(self, envs: NDArray[np.intp]) -> NDArray[Any]:
        """Begin the next episode in these environments; their first observations."""

    def reset(self, seed: int) -> Array:
        """Start episodes everywhere; first observations (num_envs, obs_dim)."""
        self.seed, self.filled = seed, 0
        self.episodes, self.start = [0] * self.num_envs, [0] * self.num_envs
        self.returns = [0.0] * self.num_envs
        self.obs = self._flat(self._start())
        return self.obs

    def step(self, actions: NDArray[np.generic]) -> Transition:
        """One step of every environment.

        Raises:
            EnvironmentFault: the simulator raised; its own error is the cause.
        """
        self.filled += 1
        try:
            raw, rewards, terminated, truncated = self._advance(self._legal(actions))
        except Exception as error:
            raise EnvironmentFault(
                f"{self.env_id} (step {self.filled} of all environments) raised "
                f"{type(error).__name__}: {error}"
            ) from error
        next_obs = self.obs = self._flat(raw)
        self.returns = (np.asarray(self.returns) + rewards).tolist()
        over = np.flatnonzero(terminated | truncated)
        ended = [(int(i), self.returns[i], self.filled - self.start[i]) for i in over]
        if len(over):
            self.obs = next_obs.copy()
            for i in over:
                self.episodes[i], self.start[i], self.returns[i] = (
                    self.episodes[i] + 1, self.filled, 0.0,
                )  # fmt: skip
            self.obs[over] = self._flat(self._restart(over))
        return Transition(
            self.obs, next_obs, rewards.astype(np.float64), terminated, truncated, ended
        )

    def _flat(self, raw: NDArray[Any]) -> Array:
        return np.array(raw, np.float32).reshape(len(raw), self.obs_dim)

    def state_dict(self) -> dict[str, Any]:
        """How far the episodes are; what else is needed is the simulator's to save."""
        return {
            "seed": self.seed,
            "episodes": list(self.episodes),
            "lengths": [self.filled - start for start in self.start],
            "returns": list(self.returns),
        }


class EnvPoolEnv(Pool):
    """EnvPool (Weng et al. 2022): environments in C++, here on one thread.

    Left to itself, it begins a new episode in the step after an end, whose action it ignores; here
    the environments that ended are reset at once, so that every transition is a real one. The
    inside of its environments cannot be saved: a run that is continued begins new episodes.

    Raises:
        EnvironmentUnsupported: it is not installed, or does not have the task.
    """

    def __init__(self, env_id: str, num_envs: int) -> None:
        try:
            known = importlib.import_module("envpool").list_all_envs()
        except ImportError as error:
            raise EnvironmentUnsupported(
                'env_backend="envpool" needs EnvPool, which is not installed: '
                'pip install "hypergrad-torch[envpool]", or use the backend gymnasium'
            ) from error
        if env_id not in known:
            raise EnvironmentUnsupported(
                f'env_backend="envpool" with env={env_id!r}: EnvPool has no such task; use the '
                "backend gymnasium"
            )
        self.pool, observation, action = self._make(env_id, num_envs, 0)
        self._describe(env_id, num_envs, observation, action)

    @staticmethod
    def _make(env_id: str, num_envs: int, seed: int) -> tuple[Any, Any, Any]:
        make = importlib.import_module("envpool").make_gymnasium
        with warnings.catch_warnings():
            # Of bounds, which are infinite or small numbers in any precision.
            warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")
            pool = make(env_id, num_envs=num_envs, num_threads=1, seed=seed)
            return pool, pool.observation_space, pool.action_space

    def _start(self) -> NDArray[Any]:
        self.pool.close()
        # Environment i gets this seed + i, and its episodes follow from one another.
        self.pool = self._make(self.env_id, self.num_envs, episode_seed(self.seed, 0, 0))[0]
        return _in_order(*self.pool.reset())

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        result: tuple[NDArray[Any], ...] = self.pool.step(actions.astype(self.action_space.dtype))
        return result[:4]

    def _restart(self, envs: NDArray[np.intp]) -> NDArray[Any]:
        return _in_order(*self.pool.reset(envs.astype(np.int32)))

    def load_state_dict(self, state: dict[str, Any]) -> list[int]:
        """New episodes everywhere, others than the former ones.

        Warns:
            EnvironmentNotReproducible: always.
        """
        warnings.warn(
            f"{self.env_id}: EnvPool cannot restore episodes, so new ones begin and this run is "
            'not that of an uninterrupted one; env_backend="gymnasium" restores them',
            EnvironmentNotReproducible,
            stacklevel=2,
        )
        self.reset(episode_seed(state["seed"], 1, sum(state["episodes"]) + sum(state["lengths"])))
        return list(range(self.num_envs))

    def close(self) -> None:
        """Close the environments."""
        self.pool.close()


def _in_order(obs: NDArray[Any], info: dict[str, Any]) -> NDArray[Any]:
    ordered: NDArray[Any] = obs[np.argsort(info["env_id"])]
    return ordered


class BraxEnv(Pool):
    """A task of Brax, the paper's simulator: the id is ``brax/`` and its name there.

    One compiled step of all environments, on whatever device JAX has. Its state is a tree of
    arrays, which is saved as it is.

    Raises:
        EnvironmentUnsupported: Brax is not installed, or does not have the task.
    """

    episode_length = 1000

    def __init__(self, env_id: str, num_envs: int) -> None:
        try:
            self.jax = importlib.import_module("jax")
            self.brax_env = importlib.import_module("brax.envs").create(
                env_id.removeprefix("brax/"), episode_length=self.episode_length, auto_reset=False
            )
        except (ImportError, KeyError) as error:
            reason = (
                f"Brax has no task {error}."
                if isinstance(error, KeyError)
                else f'{error}. Install it: pip install "hypergrad-torch[brax]".'
            )
            raise EnvironmentUnsupported(f"cannot make environment {env_id!r}: {reason}") from error
        inf, env, jax = np.float32(np.inf), self.brax_env, self.jax
        self._describe(
            env_id,
            num_envs,
            # Brax's own observation_size runs a reset uncompiled, which takes minutes.
            gym.spaces.Box(-inf, inf, jax.eval_shape(env.reset, jax.random.PRNGKey(0)).obs.shape),
            gym.spaces.Box(-1.0, 1.0, (env.action_size,)),
        )
        self.begin, self.advance = jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))

        def choose(mask: Any, new: Any, old: Any) -> Any:
            def pick(a: Any, b: Any) -> Any:
                return jax.numpy.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            return jax.tree.map(pick, new, old)

        self.choose = jax.jit(choose)

    def _first(self) -> Any:
        seeds = [episode_seed(self.seed, i, j) for i, j in enumerate(self.episodes)]
        return self.begin(self.jax.vmap(self.jax.random.PRNGKey)(np.array(seeds, np.uint32)))

    def _start(self) -> NDArray[Any]:
        self.state = self._first()
        return np.asarray(self.state.obs)

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        self.state = self.advance(self.state, actions)
        obs, reward, done = (np.asarray(getattr(self.state, n)) for n in ("obs", "reward", "done"))
        truncated = np.asarray(self.state.info["truncation"]) > 0
        return obs, reward, (done > 0) & ~truncated, truncated

    def _restart(self, envs: NDArray[np.intp]) -> NDArray[Any]:
        mask = np.isin(np.arange(self.num_envs), envs)
        self.state = self.choose(mask, self._first(), self.state)
        return np.asarray(self.state.obs)[envs]

    def state_dict(self) -> dict[str, Any]:
        """The simulator's arrays, and how far the episodes are."""
        leaves = [torch.from_numpy(np.array(leaf)) for leaf in self.jax.tree.leaves(self.state)]
        arrays = {str(i): leaf for i, leaf in enumerate(leaves)}
        return {**super().state_dict(), "arrays": arrays}

    def load_state_dict(self, state: dict[str, Any]) -> list[int]:
        """Continue where ``state_dict`` was called."""
        self.reset(state["seed"])
        leaves = [self.jax.numpy.asarray(leaf.numpy()) for leaf in state["arrays"].values()]
        self.state = self.jax.tree.unflatten(self.jax.tree.structure(self.state), leaves)
        self.episodes, self.returns = list(state["episodes"]), list(state["returns"])
        self.filled = max(state["lengths"])
        self.start = [self.filled - length for length in state["lengths"]]
        self.obs = self._flat(np.asarray(self.state.obs))
        return []

    def close(self) -> None:
        """Nothing is held that needs closing."""
