"""The array tasks against Gymnasium's environments, and the two ways of running them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from hypergrad_rl import make_config
from hypergrad_rl.networks import Params
from hypergrad_rl.rollout import Episodes, Rollout
from hypergrad_rl.tensor_envs import TASKS, ArrayCollector

FIELDS = ("obs", "actions", "rewards", "next_obs", "terminated", "done")


def collector(
    task: str, backend: str | None = None, seed: int = 0
) -> tuple[ArrayCollector, Params]:
    config = make_config("ppo", env=task, seed=seed)
    made = ArrayCollector(TASKS[task], config, torch.Generator().manual_seed(seed), backend)
    actor = made.policy.init(TASKS[task].obs_dim, (8, 8), torch.Generator().manual_seed(1))
    return made, actor


def rollouts(made: ArrayCollector, actor: Params, count: int) -> list[tuple[Rollout, Episodes]]:
    return [made.collect(actor) for _ in range(count)]


@pytest.mark.parametrize("xp", [np, torch])
@pytest.mark.parametrize("name", list(TASKS))
def test_a_step_is_that_of_gymnasium(name: str, xp: object) -> None:
    task, env = TASKS[name], gym.make(name, max_episode_steps=300)
    rng, ends = np.random.default_rng(0), 0
    env.reset(seed=0)
    for step in range(2000):
        before = np.array(env.unwrapped.state, np.float64)[None]  # type: ignore[attr-defined]
        action = int(rng.integers(task.num_actions))
        if name == "Acrobot-v1" and step % 4:  # swung up, which random torques seldom do
            action = 2 * int(before[0, 2] < 0)
        obs, reward, terminated, truncated, _ = env.step(action)
        convert = torch.from_numpy if xp is torch else np.asarray
        after, got_reward, got_end = task.step(xp, convert(before), convert(np.array([action])))
        state = np.array(env.unwrapped.state, np.float64)  # type: ignore[attr-defined]
        np.testing.assert_allclose(after[0], state, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(task.observe(xp, after)[0], obs, rtol=1e-6, atol=1e-6)
        assert float(got_reward[0]) == reward
        assert bool(got_end[0]) == terminated
        if terminated or truncated:
            ends += terminated
            env.reset()
    assert ends > 3


@pytest.mark.parametrize("name", list(TASKS))
def test_specification_is_that_of_gymnasium(name: str) -> None:
    task, spec, env = TASKS[name], gym.spec(name), gym.make(name)
    assert spec.max_episode_steps == task.time_limit
    assert env.observation_space.shape == (task.obs_dim,)
    assert isinstance(env.action_space, gym.spaces.Discrete)
    assert env.action_space.n == task.num_actions
    starts = np.stack([env.reset(seed=i) and env.unwrapped.state for i in range(500)])  # type: ignore[attr-defined]
    assert task.spread * 0.97 < np.abs(starts).max() <= task.spread
    ours = collector(name)[0]._fresh(500).abs().max()
    assert task.spread * 0.97 < ours <= task.spread


@pytest.mark.parametrize("name", list(TASKS))
def test_rollouts_are_transitions_of_the_task_and_episodes_their_returns(name: str) -> None:
    made, actor = collector(name)
    running, lengths = np.zeros(4), np.zeros(4, np.int64)
    expected = Episodes([], [])
    got = Episodes([], [])
    previous: Rollout | None = None
    for rollout, episodes in rollouts(made, actor, 10):
        got.returns += episodes.returns
        got.lengths += episodes.lengths
        for t in range(rollout.rewards.shape[1]):
            running += rollout.rewards[:, t].numpy()
            lengths += 1
            for i in np.flatnonzero(rollout.done[:, t].numpy()):
                expected.returns.append(float(running[i]))
                expected.lengths.append(int(lengths[i]))
                running[i] = lengths[i] = 0
        going_on = ~rollout.done[:, :-1]
        torch.testing.assert_close(
            rollout.obs[:, 1:][going_on], rollout.next_obs[:, :-1][going_on], rtol=0, atol=0
        )
        if previous is not None:  # a rollout goes on where the last one stopped
            still = ~previous.done[:, -1]
            torch.testing.assert_close(
                rollout.obs[:, 0][still], previous.next_obs[:, -1][still], rtol=0, atol=0
            )
        previous = rollout
    assert got == expected
    assert len(got.returns) > 3
    if name == "Acrobot-v1":
        assert got.lengths[0] == 500  # the time limit


def test_time_limit_truncates_and_does_not_terminate() -> None:
    made, actor = collector("Acrobot-v1")
    for rollout, _ in rollouts(made, actor, 4):
        limit = rollout.done & ~rollout.terminated
    assert limit.sum() == 4  # 512 steps, and the limit is 500
    assert (limit.nonzero()[:, 1] == 500 - 3 * 128 - 1).all()


@pytest.mark.parametrize(
    "name", ["CartPole-v1", pytest.param("Acrobot-v1", marks=pytest.mark.slow)]
)
def test_compiled_rollouts_are_the_others(name: str) -> None:
    (eager, actor), (compiled, _) = collector(name), collector(name, "inductor")
    compiled.warm_up(actor)
    for (a, ours), (b, theirs) in zip(
        rollouts(eager, actor, 8), rollouts(compiled, actor, 8), strict=True
    ):
        for field in FIELDS:
            x, y = getattr(a, field), getattr(b, field)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert ours == theirs
    assert compiled._graph.compiles


@pytest.mark.parametrize("name", list(TASKS))
def test_a_state_that_was_saved_goes_on_to_the_last_bit(name: str) -> None:
    made, actor = collector(name)
    rollouts(made, actor, 3)
    kept, generator = made.state_dict(), made.generator.get_state()
    kept = {key: value.clone() for key, value in kept.items()}
    expected = rollouts(made, actor, 3)
    other, _ = collector(name, seed=5)
    other.load_state_dict(kept)
    other.generator.set_state(generator)
    for (a, ours), (b, theirs) in zip(rollouts(other, actor, 3), expected, strict=True):
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)
        assert ours == theirs


def test_warming_up_takes_no_step() -> None:
    (warm, actor), (cold, _) = collector("CartPole-v1"), collector("CartPole-v1")
    warm.warm_up(actor)
    assert torch.equal(warm.collect(actor)[0].obs, cold.collect(actor)[0].obs)
