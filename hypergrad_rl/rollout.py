"""Rollouts: N environments x T steps under a fixed policy, stored environment by environment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypergrad_rl.advantages import discount_matrix, gae
from hypergrad_rl.config import AgentConfig
from hypergrad_rl.envs import Array, RunningMoments, VectorEnv
from hypergrad_rl.errors import EnvironmentFault
from hypergrad_rl.networks import DEFAULT_CRITIC, Params, Policy, ValueFn

NORMALIZED_LIMIT = 10.0  # normalised observations and rewards are clipped to +-10, as is usual


@dataclass
class Rollout:
    """Transitions (N, T, ...); ``next_obs`` is a transition's own next state, never a reset one."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminated: Tensor
    done: Tensor  # terminated or truncated


def example_rollout(policy: Policy, actor: Params, config: AgentConfig, obs_dim: int) -> Rollout:
    """Made-up transitions in the shapes and dtypes of a real rollout: to compile with."""
    shape = config.num_envs, config.num_steps
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape[0], shape[1] + 1, obs_dim, generator=generator)
    obs, next_obs = states[:, :-1].clone(), states[:, 1:].clone()
    none = torch.zeros(shape, dtype=torch.bool)
    rewards = torch.randn(shape, generator=generator)
    return Rollout(obs, policy.act(actor, obs, None), rewards, next_obs, none, none.clone())


@dataclass
class Batch(Rollout):
    """A rollout with everything that stays fixed while the policy is improved on it."""

    log_probs: Tensor  # log pi_old(a_t|s_t)
    values: Tensor  # V_w0(s_t), the critic before the update
    matrix: Tensor  # (N, T, T), see discount_matrix
    advantages: Tensor  # GAE under w0
    targets: Tensor  # lambda-returns G_t = A_t + V_w0(s_t)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], rows: Tensor) -> Batch:
        """The given rows of every field."""
        return cls(*[tensor[rows] for tensor in tensors])

    def select(self, envs: Tensor) -> Batch:
        """The whole trajectories of some environments: (len(envs), T, ...)."""
        return Batch(**{f.name: getattr(self, f.name)[envs] for f in fields(self)})

    def flatten(self) -> Batch:
        """All N T samples in one dimension (without ``matrix``, which needs trajectories)."""
        samples = {f.name: getattr(self, f.name).flatten(0, 1) for f in fields(self)}
        return Batch(**{**samples, "matrix": torch.empty(len(samples["obs"]), 0)})


@torch.no_grad()
def make_batch(
    policy: Policy,
    actor: Params,
    critic: Params,
    rollout: Rollout,
    gamma: float,
    gae_lambda: float,
    value_fn: ValueFn = DEFAULT_CRITIC,
) -> Batch:
    """Log-probabilities, values, advantages and targets of a rollout, in a few batched calls."""
    values = value_fn(critic, rollout.obs)
    next_values = value_fn(critic, rollout.next_obs)
    matrix = discount_matrix(rollout.done, gamma * gae_lambda, values.dtype)
    advantages = gae(matrix, rollout.rewards, values, next_values, rollout.terminated, gamma)
    return Batch(
        **vars(rollout),
        log_probs=policy.log_prob(actor, rollout.obs, rollout.actions)[0],
        values=values,
        matrix=matrix,
        advantages=advantages,
        targets=advantages + values,
    )


@dataclass
class Episodes:
    """Returns and lengths (undiscounted, unnormalised) of the episodes that ended in a rollout."""

    returns: list[float]
    lengths: list[int]


class Collector:
    """Steps the environments with a policy and keeps what must survive between rollouts.

    That is the current observations, the running returns, the normalisers' statistics. The latter
    are frozen during a rollout and updated after it, so that all states of one rollout, final ones
    included, are normalised alike.
    """

    def __init__(self, env: VectorEnv, config: AgentConfig, generator: torch.Generator) -> None:
        self.env, self.config, self.generator = env, config, generator
        self.obs_moments = RunningMoments(env.obs_dim) if config.normalize_observations else None
        self.return_moments = RunningMoments(1) if config.normalize_rewards else None
        self.reset(config.seed)

    def reset(self, seed: int) -> None:
        """Start new episodes everywhere."""
        self.obs = self.env.reset(seed)
        self.discounted = np.zeros(self.env.num_envs)

    @property
    def policy(self) -> Policy:
        """The policy for the environments' actions."""
        return self.env.policy

    @property
    def obs_dim(self) -> int:
        """Entries of an observation."""
        return self.env.obs_dim

    def warm_up(self, actor: Params) -> float:
        """Nothing is compiled here: 0 seconds."""
        return 0.0

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def collect(self, actor: Params) -> tuple[Rollout, Episodes]:
        """One rollout of ``config.num_steps`` steps in each environment.

        Raises:
            EnvironmentFault: an environment raised, or a non-finite observation or reward.
        """
        steps, env = self.config.num_steps, self.env
        act = env.policy.numpy_step(actor)
        noise = env.policy.noise(steps, env.num_envs, self.generator).numpy()
        obs = np.empty((steps, env.num_envs, env.obs_dim), np.float32)
        next_obs, rewards = np.empty_like(obs), np.empty((steps, env.num_envs))
        terminated, done = np.empty((2, steps, env.num_envs), np.bool_)
        actions: NDArray[np.generic] | None = None
        raw = np.empty_like(obs) if self.obs_moments else obs
        episodes, lengths = Episodes([], []), env.lengths.copy()
        for t in range(steps):
            raw[t] = self.obs
            if self.obs_moments:
                obs[t] = normalize(self.obs_moments, self.obs)
            action = act(obs[t], noise[t])
            if actions is None:
                actions = np.empty((steps, *action.shape), action.dtype)
            actions[t] = action
            step = env.step(action)
            self.obs, rewards[t], terminated[t] = step.obs, step.rewards, step.terminated
            next_obs[t] = step.next_obs
            np.logical_or(step.terminated, step.truncated, out=done[t])
            for _, value, length in step.ended:
                episodes.returns.append(value)
                episodes.lengths.append(length)
        assert actions is not None
        bad_obs = ~np.asarray((np.isfinite(raw) & np.isfinite(next_obs)).all(-1))
        bad = bad_obs | ~np.isfinite(rewards)
        if bad.any():
            t, i = (int(index) for index in np.argwhere(bad)[0])
            what = "observation" if bad_obs[t, i] else "reward"
            raise EnvironmentFault(
                f"{self._place(t, i, done, lengths[i])} returned a non-finite {what}; training "
                "stopped at the last checkpoint"
            )
        # Normalised by what was known before this rollout, as the states acted in.
        next_obs = normalize(self.obs_moments, next_obs)
        if self.obs_moments:
            self.obs_moments.update(raw)
        if self.return_moments:
            self.return_moments.update(self._discounted_returns(rewards, done))
            rewards /= np.sqrt(self.return_moments.variance + 1e-8)
            rewards = rewards.clip(-NORMALIZED_LIMIT, NORMALIZED_LIMIT)
        arrays = (obs, actions, rewards.astype(np.float32), next_obs, terminated, done)
        # (T, N, ...) -> (N, T, ...)
        return Rollout(*(torch.from_numpy(a.swapaxes(0, 1).copy()) for a in arrays)), episodes

    def _place(self, t: int, i: int, done: NDArray[np.bool_], length: int) -> str:
        """How errors name step t of a rollout that began ``length`` steps into an episode."""
        ends = np.flatnonzero(done[:t, i])
        episode = self.env.episodes[i] - int(done[t:, i].sum())
        return self.env.place(i, episode, t - int(ends[-1]) if len(ends) else t + 1 + length)

    def _discounted_returns(
        self, rewards: NDArray[np.float64], done: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """The running discounted returns of all environments at each step, (T, N)."""
        discounted = np.empty_like(rewards)
        for t, over in enumerate(done):
            discounted[t] = self.discounted = self.config.gamma * self.discounted + rewards[t]
            self.discounted[over] = 0
        return discounted

    def state_dict(self) -> dict[str, Any]:
        """Statistics, running episodes and returns: tensors, numbers and strings in nested dicts.

        With the policy's parameters and the generator's state, it is all that the next rollouts
        depend on.
        """
        state: dict[str, Any] = {
            "env": self.env.state_dict(),
            "discounted": torch.from_numpy(self.discounted.copy()),
        }
        for name, moments in self._moments():
            state |= {f"{name}.{part}": torch.tensor(x) for part, x in vars(moments).items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was called; see :meth:`VectorEnv.load_state_dict`."""
        for name, moments in self._moments():
            for part in vars(moments):
                setattr(moments, part, state[f"{name}.{part}"].numpy().copy())
        begun = self.env.load_state_dict(state["env"])
        self.obs, self.discounted = self.env.obs, state["discounted"].numpy().copy()
        self.discounted[begun] = 0

    def _moments(self) -> list[tuple[str, RunningMoments]]:
        named = ("obs_moments", self.obs_moments), ("return_moments", self.return_moments)
        return [(name, moments) for name, moments in named if moments is not None]


def normalize(moments: RunningMoments | None, obs: Array) -> Array:
    """(obs - mean) / std, clipped; obs unchanged without moments."""
    if moments is None:
        return obs
    scaled = (obs - moments.mean) / np.sqrt(moments.variance + 1e-8)
    return scaled.clip(-NORMALIZED_LIMIT, NORMALIZED_LIMIT).astype(np.float32)
