"""Simulators that step all environments in one call: EnvPool and Brax."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hypergrad_rl.envs import Array, VectorEnv, episode_seed
from hypergrad_rl.errors import EnvironmentNotReproducible, EnvironmentUnsupported


class Pool(VectorEnv):
    """A :class:`VectorEnv` over such a simulator."""

    def _where(self) -> str:
        return f"{self.env_id} (step {self.filled} of all environments)"

    def _remember(self, actions: NDArray[np.generic]) -> None:
        self.filled += 1  # how a state is restored is the simulator's own affair

    def _flat(self, raw: Any) -> Array:
        return np.array(raw, np.float32).reshape(len(raw), self.obs_dim)

    def state_dict(self) -> dict[str, Any]:
        """How far the episodes are."""
        return self._progress()


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

    def reset(self, seed: int) -> Array:
        """Start episodes everywhere; first observations (num_envs, obs_dim)."""
        self.pool.close()
        # Environment i gets this seed + i, and its episodes follow from one another.
        self.pool = self._make(self.env_id, self.num_envs, episode_seed(seed, 0, 0))[0]
        return super().reset(seed)

    def _begin(self, envs: NDArray[np.intp]) -> Array:
        obs, info = self.pool.reset(envs.astype(np.int32))
        return self._flat(obs[np.argsort(info["env_id"])])

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        obs, rewards, *ends = self.pool.step(actions.astype(self.action_space.dtype))[:4]
        return self._flat(obs), rewards.astype(np.float64), *ends

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


class BraxEnv(Pool):
    """A task of Brax, the paper's simulator: the id is ``brax/`` and its name there.

    One compiled step of all environments, on whatever device JAX has. Its state is a tree of
    arrays, which is saved as it is.

    Raises:
        EnvironmentUnsupported: Brax is not installed, or does not have the task.
    """

    episode_length = 1000
    state: Any  # of the simulator: arrays for all environments

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

    def _begin(self, envs: NDArray[np.intp]) -> Array:
        seeds = [episode_seed(self.seed, i, j) for i, j in enumerate(self.episodes)]
        first = self.begin(self.jax.vmap(self.jax.random.PRNGKey)(np.array(seeds, np.uint32)))
        mask = np.isin(np.arange(self.num_envs), envs)
        self.state = first if mask.all() else self.choose(mask, first, self.state)
        return self._flat(self.state.obs)[envs]

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        self.state = self.advance(self.state, actions)
        truncated = np.asarray(self.state.info["truncation"]) > 0
        terminated = (np.asarray(self.state.done) > 0) & ~truncated
        rewards = np.asarray(self.state.reward, np.float64)
        return self._flat(self.state.obs), rewards, terminated, truncated

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
        self._resume(state)
        self.filled, self.obs = max(state["lengths"]), self._flat(self.state.obs)
        return []

    def close(self) -> None:
        """Nothing is held that needs closing."""
