"""Environments: episodes with seeds of their own, states that are saved and restored."""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from hypergrad_rl import PPOConfig
from hypergrad_rl.envs import VectorEnv, episode_seed, make_env
from hypergrad_rl.errors import (
    CheckpointError,
    EnvironmentFault,
    EnvironmentNotReproducible,
    EnvironmentUnsupported,
)
from hypergrad_rl.presets import STYLES
from hypergrad_rl.rollout import Collector
from tests.rl.conftest import Register


class Scripted(gym.Env[Any, Any]):
    """A random walk that ends after ``end`` steps; with hidden randomness, and faults, if asked."""

    observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: gym.Space[Any] = gym.spaces.Discrete(2)

    def __init__(
        self,
        end: int = 9,
        hidden: bool = False,
        raises: int = -1,
        bad_obs: int = -1,
        bad_reward: int = -1,
    ) -> None:
        self.end, self.hidden = end, hidden
        self.raises, self.bad_obs, self.bad_reward = raises, bad_obs, bad_reward
        self.secret = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.x = 0, self.np_random.normal()
        return np.array([self.x, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == self.raises:
            raise ValueError("out of fuel")
        self.x += (self.secret if self.hidden else self.np_random).normal() + float(action)
        obs = np.array([np.nan if self.steps == self.bad_obs else self.x, self.steps], np.float32)
        reward = float("inf") if self.steps == self.bad_reward else self.x
        return obs, reward, self.steps >= self.end, False, {}


def random_actions(env: VectorEnv, steps: int, rng: np.random.Generator) -> list[Any]:
    if isinstance(env.action_space, gym.spaces.Discrete):
        return list(rng.integers(env.action_space.n, size=(steps, env.num_envs)))
    shape = (steps, env.num_envs, *(env.action_space.shape or ()))
    return list(rng.normal(size=shape).astype(np.float32))


def assert_same_steps(one: VectorEnv, other: VectorEnv, actions: list[Any]) -> None:
    for action in actions:
        a, b = one.step(action), other.step(action)
        for name, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


@pytest.mark.parametrize(
    ("env_id", "case"),
    [("CartPole-v1", 0), ("CartPole-v1", 1), ("CartPole-v1", 2), ("Acrobot-v1", 0),
     ("Pendulum-v1", 0), ("Pendulum-v1", 1), ("Hopper-v5", 0), ("MinAtar/Breakout-v1", 0),
     ("MinAtar/SpaceInvaders-v1", 0)],
)  # fmt: skip
def test_a_restored_environment_goes_on_as_if_nothing_had_been(env_id: str, case: int) -> None:
    rng = np.random.default_rng(case)
    env, again = VectorEnv(env_id, 2), VectorEnv(env_id, 2)
    env.reset(seed=7 + case)
    for action in random_actions(env, int(rng.integers(700)), rng):  # beyond the first buffer
        env.step(action)
    state = torch_copy(env.state_dict())
    assert again.load_state_dict(state) == []
    np.testing.assert_array_equal(env.obs, again.obs)
    assert_same_steps(env, again, random_actions(env, 500, rng))


PAPER_TASKS = {
    "CartPole-v1": (4, 2), "Acrobot-v1": (6, 3),
    "MinAtar/SpaceInvaders-v1": (600, 4), "MinAtar/Breakout-v1": (400, 3),
    "Hopper-v5": (11, 3), "Walker2d-v5": (17, 6), "HalfCheetah-v5": (17, 6),
    "Humanoid-v5": (348, 17), "HumanoidStandup-v5": (348, 17), "Reacher-v5": (10, 2),
    "Pusher-v5": (23, 7), "InvertedPendulum-v5": (4, 1), "InvertedDoublePendulum-v5": (9, 1),
    "Ant-v5": (105, 8), "Swimmer-v5": (8, 2),
}  # fmt: skip


@pytest.mark.parametrize("env_id", PAPER_TASKS)
def test_every_task_of_the_paper_runs(env_id: str) -> None:
    env = VectorEnv(env_id, 2)
    actor = env.policy.init(env.obs_dim, (8,), torch.Generator().manual_seed(0))
    collector = Collector(
        env,
        PPOConfig(env=env_id, num_envs=2, num_steps=30),
        torch.Generator().manual_seed(0),
    )
    rollout, _ = collector.collect(actor)
    obs_dim, actions = PAPER_TASKS[env_id]
    assert rollout.obs.shape == (2, 30, obs_dim)
    assert rollout.obs.dtype == torch.float32
    if isinstance(env.action_space, gym.spaces.Discrete):
        assert env.action_space.n == actions
    else:
        assert rollout.actions.shape == (2, 30, actions)
    env.close()


def test_presets_and_tasks_agree() -> None:
    assert sorted(PAPER_TASKS) == sorted(STYLES["paper"])


def test_minatar_episodes_depend_on_nothing_before_them() -> None:
    env = make_env("MinAtar/Breakout-v1")
    game: Any = env.unwrapped
    env.reset(seed=0)
    game.game.act(1)
    assert game.game.last_action != 0
    env.reset(seed=1)
    assert game.game.last_action == 0


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minatar", None)
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    for name in [name for name in gym.registry if name.startswith("MinAtar/")]:
        monkeypatch.delitem(gym.registry, name)
    with pytest.raises(EnvironmentUnsupported, match=r'pip install "hypergrad-torch\[minatar\]"'):
        VectorEnv("MinAtar/Breakout-v1", 1)


def test_environments_from_a_function() -> None:
    env = VectorEnv("a walk", 2, env_fn=lambda: Scripted(end=4))
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.int64)) for _ in range(4)]
    assert steps[-1].terminated.all()
    assert [length for _, _, length in steps[-1].ended] == [4, 4]


def test_an_environment_that_cannot_be_made() -> None:
    def broken() -> gym.Env[Any, Any]:
        raise RuntimeError("no display")

    with pytest.raises(EnvironmentUnsupported, match="'a walk': RuntimeError: no display"):
        VectorEnv("a walk", 2, env_fn=broken)


def test_ids_that_name_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "gymnasium.envs.classic_control:CartPoleEnv"
    (tmp_path / "walks.py").write_text(
        f"import gymnasium as gym\ngym.register('FromModule-v0', '{entry}')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert VectorEnv("walks:FromModule-v0", 1).obs_dim == 4
    finally:
        del gym.registry["FromModule-v0"]
    with pytest.raises(EnvironmentUnsupported, match="No module named 'no_walks'"):
        VectorEnv("no_walks:FromModule-v0", 1)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (gym.spaces.Discrete(3), None, "observation space Discrete.*FlattenObservation"),
        (gym.spaces.Dict(a=gym.spaces.Discrete(3)), None, "observation space Dict"),
        (gym.spaces.Tuple((gym.spaces.Discrete(3),)), None, "observation space Tuple"),
        (None, gym.spaces.MultiDiscrete([2, 2]), "MultiDiscrete.* not supported; .* Discrete over"),
        (None, gym.spaces.Box(0, 1, (2, 2)), "one-dimensional Box of floats"),
        (None, gym.spaces.Box(0, 9, (2,), np.int64), "one-dimensional Box of floats"),
    ],
)
def test_unsupported_spaces_are_refused(
    observation: gym.Space[Any] | None, action: gym.Space[Any] | None, message: str
) -> None:
    def make() -> Scripted:
        env = Scripted()
        env.observation_space = observation or env.observation_space
        env.action_space = action or env.action_space
        return env

    with pytest.raises(EnvironmentUnsupported, match=message) as caught:
        VectorEnv("odd", 1, env_fn=make)
    assert "\n" not in str(caught.value)


def test_an_observation_of_another_shape_than_its_space_is_named() -> None:
    class Short(Scripted):
        observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)

        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            super().reset(**kwargs)
            return np.zeros(1, np.float32), {}

    with pytest.raises(
        EnvironmentFault, match=r"of shape \(1,\); the observation space has \(3,\)"
    ):
        VectorEnv("short", 1, env_fn=Short).reset(seed=0)


def torch_copy(state: dict[str, Any]) -> dict[str, Any]:
    """Through JSON what is no tensor: all that a state may hold."""
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if k not in tensors}
    return {**json.loads(json.dumps(rest)), **tensors}


def test_a_state_costs_no_copy_and_stays_as_it_was() -> None:
    env = VectorEnv("Pendulum-v1", 2)
    env.reset(seed=0)
    rng, states = np.random.default_rng(0), []
    for action in random_actions(env, 900, rng):  # more than the first buffer, and episodes end
        state = env.state_dict()
        states.append((state, torch_copy(state)))
        assert np.shares_memory(state["actions"].numpy(), env.taken) or not state["actions"].numel()
        env.step(action)
    for state, then in states:
        assert all(torch.equal(state[name], then[name]) for name in ("actions", "obs"))


def test_hidden_randomness_is_reported_and_new_episodes_begin(
    registered: Register,
) -> None:
    env_id = registered(Scripted, hidden=True)
    env, again = VectorEnv(env_id, 2), VectorEnv(env_id, 2)
    env.reset(seed=0)
    for _ in range(12):
        env.step(np.zeros(2, np.int64))
    with pytest.warns(EnvironmentNotReproducible, match=r"Scripted0-v0: .* environments \[0, 1\]"):
        assert again.load_state_dict(env.state_dict()) == [0, 1]
    assert again.episodes.tolist() == [2, 2]
    assert again.obs[:, 1].tolist() == [0, 0]
    assert again.returns.tolist() == [0, 0]


def test_states_do_not_fit_other_numbers_of_environments() -> None:
    env = VectorEnv("CartPole-v1", 2)
    env.reset(seed=0)
    with pytest.raises(CheckpointError, match="that of 2 environments; expected 3"):
        VectorEnv("CartPole-v1", 3).load_state_dict(env.state_dict())


def test_every_episode_has_a_seed_of_its_own(registered: Register) -> None:
    env = VectorEnv(registered(Scripted, end=1), 2)
    firsts = [env.reset(seed=3).copy()]
    firsts += [env.step(np.zeros(2, np.int64)).obs.copy() for _ in range(4)]
    assert len(np.unique(np.array(firsts)[..., 0])) == 10
    expected = np.random.default_rng(episode_seed(3, 1, 4)).normal()
    assert firsts[4][1, 0] == np.float32(expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_restored_collector_goes_on_as_if_nothing_had_been(
    normalize: bool, registered: Register
) -> None:
    config = PPOConfig(
        env=registered(Scripted, end=11, limit=8), num_envs=3, num_steps=20, num_minibatches=1,
        normalize_observations=normalize, normalize_rewards=normalize,
    )  # fmt: skip
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = (Collector(VectorEnv(config.env, 3), config, g) for g in generators)
    actor = one.env.policy.init(2, (4,), torch.Generator().manual_seed(1))
    one.collect(actor)
    generators[1].set_state(generators[0].get_state())
    other.load_state_dict(one.state_dict())
    for _ in range(2):
        (a, episodes), (b, others) = one.collect(actor), other.collect(actor)
        assert episodes == others
        for name, value in vars(a).items():
            assert torch.equal(value, getattr(b, name)), name


def collect(env_id: str) -> None:
    config = PPOConfig(env=env_id, num_envs=2, num_steps=10, num_minibatches=1,
                       normalize_observations=True)  # fmt: skip
    collector = Collector(VectorEnv(env_id, 2), config, torch.Generator().manual_seed(0))
    actor = collector.env.policy.init(2, (4,), torch.Generator().manual_seed(1))
    for _ in range(3):
        collector.collect(actor)


def test_an_environment_that_raises_is_named(registered: Register) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        collect(registered(Scripted, raises=7))
    message = "Scripted0-v0 (environment 0, episode 0, step 7) raised ValueError: out of fuel"
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_obs": 5, "end": 4}, ""),
        ({"bad_obs": 5}, r"\(environment 0, episode 0, step 5\) returned a non-finite observation"),
        ({"bad_reward": 9}, r"\(environment 0, episode 0, step 9\) .* non-finite reward"),
        ({"bad_reward": 13, "end": 20}, r"\(environment 0, episode 0, step 13\) .* reward"),
    ],
)
def test_what_is_not_finite_is_named(
    settings: dict[str, Any], message: str, registered: Register
) -> None:
    env_id = registered(Scripted, **settings)
    if not message:  # the fault lies behind the episode's end
        return collect(env_id)
    with pytest.raises(EnvironmentFault, match=message):
        collect(env_id)
    return None
