"""Simulators that step all environments at once: their conventions become ours."""

import sys
import types
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from hypergrad_rl import PPOConfig
from hypergrad_rl.envs import VectorEnv, make_vector_env
from hypergrad_rl.errors import (
    EnvironmentFault,
    EnvironmentNotReproducible,
    EnvironmentUnsupported,
)
from hypergrad_rl.rollout import Collector

ENDS = (3, 4, 5)  # the episodes' lengths in the scripted pool; the last environment's is truncated


class ScriptedPool:
    """EnvPool's interface and its convention: a step after an end ignores its action and resets."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1, 2), np.float64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, num_envs: int, seed: int) -> None:
        self.seed, self.steps = seed, np.zeros(num_envs, int)
        self.over, self.sums = np.zeros(num_envs, bool), np.zeros(num_envs)

    def _obs(self, envs: Any) -> tuple[Any, dict[str, Any]]:
        rows = np.stack([self.steps[envs], self.sums[envs]], -1)[:, None].astype(np.float64)
        return rows, {"env_id": np.asarray(envs, np.int32)}

    def reset(self, env_id: Any = None) -> tuple[Any, dict[str, Any]]:
        envs = np.arange(len(self.steps)) if env_id is None else env_id
        self.steps[envs], self.over[envs], self.sums[envs] = 0, False, self.seed % 7
        return self._obs(envs[::-1])  # in any order

    def step(self, actions: Any) -> tuple[Any, ...]:
        assert actions.dtype == self.action_space.dtype
        assert not self.over.any(), "this action would be ignored"
        if self.steps[0] == 2 and actions[0] == 1 and self.seed == 0:
            raise RuntimeError("pool")
        self.steps += 1
        self.sums += actions
        self.over = self.steps >= np.array(ENDS[: len(self.steps)])
        last = np.arange(len(self.steps)) == len(self.steps) - 1
        obs, info = self._obs(np.arange(len(self.steps)))
        return obs, self.sums.copy(), self.over & ~last, self.over & last, info

    def close(self) -> None:
        pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """EnvPool with one task, the scripted one; the seeds of the pools that were made."""
    seeds: list[int] = []

    def make(env_id: str, num_envs: int, num_threads: int, seed: int) -> ScriptedPool:
        seeds.append(seed)
        return ScriptedPool(num_envs, seed)

    module = types.ModuleType("envpool")
    vars(module).update(make_gymnasium=make, list_all_envs=lambda: ["Scripted-v0", "CartPole-v1"])
    monkeypatch.setitem(sys.modules, "envpool", module)
    return seeds


def test_every_transition_of_a_pool_is_a_real_one(made: list[int]) -> None:
    env = make_vector_env("Scripted-v0", 3, "envpool")
    first = env.reset(seed=1)
    start = first[0, 1]
    obs, sums = first, np.full(3, start)
    seen: list[tuple[int, float, int]] = []
    rng, totals = np.random.default_rng(0), np.zeros(3)
    for _ in range(30):
        actions = rng.integers(2, size=3)
        step = env.step(actions)
        np.testing.assert_array_equal(step.next_obs[:, 0], obs[:, 0] + 1)  # no step is lost
        sums += actions
        totals += sums
        np.testing.assert_array_equal(step.next_obs[:, 1], sums)  # and no action
        np.testing.assert_array_equal(step.rewards, sums)
        over = step.next_obs[:, 0] == ENDS
        np.testing.assert_array_equal(step.terminated, over & [True, True, False])
        np.testing.assert_array_equal(step.truncated, over & [False, False, True])
        assert step.obs[over].tolist() == [[0, start]] * int(over.sum())
        assert [(i, r) for i, r, _ in step.ended] == [
            (int(i), totals[i]) for i in np.flatnonzero(over)
        ]
        assert all(length == ENDS[i] for i, _, length in step.ended)
        seen += step.ended
        sums[over], totals[over] = start, 0
        obs = step.obs
    assert {i for i, _, _ in seen} == {0, 1, 2}


def test_a_pools_seed_is_honoured(made: list[int]) -> None:
    env = make_vector_env("Scripted-v0", 2, "envpool")
    for seed in (5, 6, 5):
        env.reset(seed)
    assert made[1] == made[3] != made[2]


def test_a_pool_that_is_restored_says_that_new_episodes_begin(made: list[int]) -> None:
    config = PPOConfig(env="Scripted-v0", num_envs=3, num_steps=4, num_minibatches=1)
    collectors = [
        Collector(make_vector_env(config.env, 3, "envpool"), config, torch.Generator())
        for _ in range(2)
    ]
    actor = collectors[0].env.policy.init(2, (4,), torch.Generator().manual_seed(0))
    collectors[0].collect(actor)
    with pytest.warns(EnvironmentNotReproducible, match="EnvPool cannot restore") as caught:
        collectors[1].load_state_dict(collectors[0].state_dict())
    assert len(caught) == 1
    assert made[-1] not in made[:-1]  # others than the first episodes
    assert collectors[1].obs[:, 0].tolist() == [0, 0, 0]


def test_a_pool_that_raises_is_named(made: list[int]) -> None:
    env = make_vector_env("Scripted-v0", 2, "envpool")
    env.reset(seed=0)
    env.pool.seed = 0  # type: ignore[attr-defined]
    for _ in range(2):
        env.step(np.ones(2, np.int64))
    with pytest.raises(EnvironmentFault, match=r"Scripted-v0 \(step 3 .* raised RuntimeError: p"):
        env.step(np.ones(2, np.int64))


def test_the_backend_is_what_was_asked_for(made: list[int], monkeypatch: Any) -> None:
    assert type(make_vector_env("CartPole-v1", 1, "gymnasium")) is VectorEnv
    assert type(make_vector_env("Scripted-v0", 1, "envpool")) is not VectorEnv
    with pytest.raises(EnvironmentUnsupported, match="EnvPool has no such task"):
        make_vector_env("Acrobot-v1", 1, "envpool")
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(EnvironmentUnsupported, match=r"not installed.*hypergrad-torch\[envpool\]"):
        make_vector_env("Acrobot-v1", 1, "envpool")
    for name in ("jax", "brax", "brax.envs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentUnsupported, match=r"hypergrad-torch\[brax\]"):
        make_vector_env("brax/hopper", 1)


@pytest.mark.slow
def test_envpool_itself_truncates_and_goes_on() -> None:
    pytest.importorskip("envpool")
    env = make_vector_env("Pendulum-v1", 3, "envpool")
    first = env.reset(seed=3)
    assert len(np.unique(first[:, 0])) == 3
    for t in range(1, 401):
        step = env.step(np.zeros((3, 1), np.float32))
        assert not step.terminated.any()
        assert step.truncated.all() == step.truncated.any() == (t % 200 == 0)
        assert (step.next_obs != step.obs).any() == (t % 200 == 0)
        assert [length for _, _, length in step.ended] == [200] * 3 * (t % 200 == 0)
    np.testing.assert_array_equal(env.reset(seed=3), first)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Brax's own
def test_brax_is_restored_to_the_last_bit() -> None:
    pytest.importorskip("brax")
    env, again = (make_vector_env("brax/inverted_pendulum", 2) for _ in range(2))
    assert env.obs_dim == 4
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    lengths = []
    for t in range(160):
        if t == 60:
            again.load_state_dict(env.state_dict())
        actions = rng.normal(size=(2, 1)).astype(np.float32)
        step = env.step(actions)
        lengths += [length for _, _, length in step.ended]
        if t >= 60:
            for name, value in vars(again.step(actions)).items():
                np.testing.assert_array_equal(value, getattr(step, name), err_msg=name)
    assert lengths  # it falls
    assert not step.truncated.any()
    with pytest.raises(EnvironmentUnsupported, match="Brax has no task 'hoper'"):
        make_vector_env("brax/hoper", 1)
