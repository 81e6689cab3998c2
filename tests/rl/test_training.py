"""Training end to end: learning, determinism, checkpoints, run directories, bad input."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from hypergrad_rl import BLPOConfig, PPOConfig, evaluate, load_config, make_config, preset, train
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.cli import main
from hypergrad_rl.envs import RunningMoments, VectorEnv
from hypergrad_rl.errors import (
    ConfigError,
    EnvironmentFault,
    EnvironmentUnsupported,
    RolloutError,
    TrainingDiverged,
)
from hypergrad_rl.report import read_metrics, summarize, to_metrics
from hypergrad_rl.rollout import Collector
from hypergrad_rl.trainer import make_agent
from tests.rl.conftest import Register

ALGOS = ("ppo", "nested", "blpo")


class Countdown(gym.Env[Any, Any]):
    """Observation: steps taken. Reward 1 a step. Ends at step ``end``, or at a time limit."""

    observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gym.Space[Any] = gym.spaces.Discrete(2, start=3)

    def __init__(self, end: int = 10**9, fault: int | None = None) -> None:
        self.end, self.fault = end, fault

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (3, 4)
        self.steps += 1
        obs = np.array([self.steps], np.float32)
        reward = float("nan") if self.steps == self.fault else 1.0
        return obs, reward, self.steps >= self.end, False, {}


def collector_of(env_id: str, **settings: Any) -> tuple[Collector, VectorEnv]:
    config = PPOConfig(env=env_id, num_envs=2, num_steps=7, **settings)
    env = VectorEnv(env_id, 2)
    return Collector(env, config, torch.Generator().manual_seed(0)), env


def test_rollout_keeps_final_observations_and_true_returns(registered: Register) -> None:
    collector, env = collector_of(registered(Countdown, limit=3))
    actor = env.policy.init(1, (4,), torch.Generator())
    rollout, episodes = collector.collect(actor)
    assert rollout.obs[0, :, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert rollout.next_obs[0, :, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]  # 3: not the reset's 0
    assert rollout.done[0].tolist() == [False, False, True] * 2 + [False]
    assert not rollout.terminated.any()  # a time limit ends the episode, not the task
    assert episodes.returns == [3.0] * 4
    rollout, episodes = collector.collect(actor)  # episodes go on over rollouts
    assert rollout.obs[0, :, 0].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert episodes.returns == [3.0] * 4


@pytest.mark.parametrize("normalize", [False, True])
def test_next_states_are_the_states_of_the_steps_after(
    normalize: bool, registered: Register
) -> None:
    env_id = registered(Countdown, limit=4)
    collector, env = collector_of(env_id, normalize_observations=normalize)
    actor = env.policy.init(1, (4,), torch.Generator())
    for _ in range(3):
        rollout, _ = collector.collect(actor)
        going_on = ~rollout.done[:, :-1]
        assert going_on.any()
        assert torch.equal(rollout.next_obs[:, :-1][going_on], rollout.obs[:, 1:][going_on])
        # Where an episode ends they are not, which nobody may take for granted.
        assert (rollout.next_obs[:, :-1] != rollout.obs[:, 1:])[~going_on].all()


def test_an_update_that_needs_successive_states_says_so(registered: Register) -> None:
    collector, env = collector_of(registered(Countdown, limit=4))
    settings: dict[str, Any] = {"num_envs": 2, "num_steps": 7, "hidden": (4,), "compile": False}
    rollout, _ = collector.collect(env.policy.init(1, (4,), torch.Generator()))
    rollout.next_obs[1, 1] *= 1 + 1e-6  # the rounding of another observation of it
    rollout.next_obs[1, 2] += 1.0
    cases: list[tuple[bool, Any]] = [(True, "nystrom"), (False, "none"), (False, "nystrom")]
    for bootstrap, solver in cases:
        config = BLPOConfig(bootstrap_truncated=bootstrap, solver=solver, **settings)
        agent = make_agent(config, collector, torch.Generator().manual_seed(0))
        before = agent.actor_state.params.clone()
        if bootstrap or solver == "none":  # which take every next state as it is
            agent.update(rollout, 0.0)
            continue
        with pytest.raises(RolloutError, match=r"next_obs\[1, 2\] is not obs\[1, 3\].*expected"):
            agent.update(rollout, 0.0)
        assert torch.equal(agent.actor_state.params, before)
        rollout.done[1, 2] = rollout.terminated[1, 2] = True  # an end of an episode
        agent.update(rollout, 0.0)


def test_terminations_are_told_from_time_limits(registered: Register) -> None:
    collector, env = collector_of(registered(Countdown, limit=5, end=2))
    rollout, _ = collector.collect(env.policy.init(1, (4,), torch.Generator()))
    assert torch.equal(rollout.terminated, rollout.done)
    assert rollout.terminated[0].tolist() == [False, True] * 3 + [False]


@pytest.mark.parametrize("bootstrap", [True, False])
def test_time_limits_are_bootstrapped_unless_refused(bootstrap: bool, registered: Register) -> None:
    settings = {"num_minibatches": 2, "bootstrap_truncated": bootstrap}
    collector, _ = collector_of(registered(Countdown, limit=3), **settings)
    config = collector.config
    assert isinstance(config, PPOConfig)
    agent = make_agent(config, collector, collector.generator)
    batch = agent.make_batch(collector.collect(agent.actor)[0])
    after = agent.value_fn(agent.critic, batch.next_obs)
    assert batch.done.sum() == 4
    assert (after.abs() > 0.01).all()
    # The last step of an episode has no summand of later steps.
    expected = batch.rewards + config.gamma * after * bootstrap
    torch.testing.assert_close(batch.targets[batch.done], expected[batch.done])
    assert batch.terminated.any() == (not bootstrap)
    # A rollout that ends within an episode is bootstrapped always.
    goes_on = batch.rewards[:, -1] + config.gamma * after[:, -1]
    torch.testing.assert_close(batch.targets[:, -1], goes_on)


def test_a_nan_reward_stops_training_with_a_message(registered: Register, tmp_path: Path) -> None:
    config = PPOConfig(
        env=registered(Countdown, fault=3),
        num_envs=1,
        num_steps=8,
        num_minibatches=1,
        total_steps=8,
    )
    with pytest.raises(EnvironmentFault, match=r"step 3.* non-finite reward"):
        train(config, tmp_path)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algo", ["ppo", "blpo"])
def test_a_divergence_is_said_and_loses_nothing(
    algo: str, compiled: bool, registered: Register, tmp_path: Path
) -> None:
    class Explodes(Countdown):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, reward, *rest = super().step(action)
            return obs, 1e38 if self.steps == 40 else reward, *rest

    config = make_config(
        algo, env=registered(Explodes), num_envs=2, num_steps=16, total_steps=320,
        hidden=(8,), compile=compiled,
    )  # fmt: skip
    with pytest.raises(TrainingDiverged, match="update 3 diverged"):
        train(config, tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (state["update"], state["ended"]) == (2, None)
    assert all(leaf.isfinite().all() for leaf in state["agent"]["actor"].values())


def test_observation_statistics_are_those_of_the_samples() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, (1000, 2)) * [1.0, 1e-3]
    moments = RunningMoments(2)
    for part in np.array_split(samples, 7):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, samples.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, samples.var(0), rtol=1e-12)


def without_times(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in metrics]


@pytest.mark.parametrize("algo", ALGOS)
def test_the_same_seed_gives_the_same_metrics(algo: str) -> None:
    config = preset(algo, "CartPole-v1", total_steps=1536, seed=5)
    first, again = (without_times(train(config).metrics) for _ in range(2))
    np.testing.assert_equal(first, again)
    other = without_times(train(dataclasses.replace(config, seed=6)).metrics)
    assert first[0]["policy_loss"] != other[0]["policy_loss"]


@pytest.mark.parametrize("algo", ALGOS)
def test_continuous_actions_train_finite(algo: str) -> None:
    config = preset(algo, "Pendulum-v1", total_steps=1536, num_envs=2, epochs=2)
    metrics = to_metrics(train(config).metrics)
    for name, column in metrics.items():
        if name not in ("episode_return", "episode_length"):
            assert np.isfinite(column).all(), name
    assert (metrics["approx_kl"] > 0).all()  # the policy moved


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "cg"},
        {"solver": "exact"},
        {"solver": "identity", "correction_bound": 0.5},
        {"cross_term": "full", "correction_bound": 0.5},
        {"curvature": "hessian", "cross_term": "paper", "outer_objective": "advantage",
         "sketch": "columns", "rank": 5, "damping": 50.0, "correction_bound": 0.5},
        {"envs_per_minibatch": 2},
    ],
)  # fmt: skip
def test_every_option_trains(settings: dict[str, Any]) -> None:
    config = preset("blpo", "CartPole-v1", total_steps=1024, epochs=1, **settings)
    metrics = to_metrics(train(config).metrics)
    assert np.isfinite(metrics["correction_ratio"]).all()
    if "correction_bound" in settings:
        assert (metrics["bound_active"] >= 0).all()
    if settings.get("solver") in ("cg", "exact"):
        assert (metrics["ihvp_relative_residual"] <= 1e-3).all()


def test_blpo_solves_its_linear_system() -> None:
    metrics = to_metrics(train(preset("blpo", "CartPole-v1", total_steps=4096)).metrics)
    assert metrics["ihvp_relative_residual"].mean() < 0.1
    assert (np.abs(metrics["correction_cosine"]) <= 1 + 1e-6).all()


def test_nested_is_blpo_without_a_correction() -> None:
    metrics = train(preset("nested", "CartPole-v1", total_steps=512)).metrics
    assert "correction_ratio" not in metrics[0]


@pytest.mark.parametrize(("algo", "steps"), [("ppo", 30_000), ("nested", 16_000), ("blpo", 16_000)])
def test_learns_cartpole(algo: str, steps: int) -> None:
    """A random policy's mean return is about 22."""
    metrics = to_metrics(train(preset(algo, "CartPole-v1", total_steps=steps)).metrics)
    assert summarize(metrics).final_return > 100


@pytest.mark.parametrize("algo", ["ppo", "blpo"])
def test_checkpoints_round_trip(algo: str, tmp_path: Path) -> None:
    config = preset(
        algo, "Pendulum-v1", total_steps=1024, num_envs=2, epochs=1, num_steps=256, hidden=[16, 16]
    )
    trained = train(config, tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    torch.testing.assert_close(state["agent"], trained.agent.state_dict(), rtol=0, atol=0)
    assert state["update"] == config.num_updates
    assert state["collector"]["obs_moments.count"] == 1024
    assert load_config(tmp_path) == config
    assert evaluate(tmp_path, 4) == evaluate(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "checkpoint.safetensors", "config.json", "learning_curve.png", "metrics.csv",
        "run_info.json",
    ]  # fmt: skip


def test_a_used_run_directory_is_refused_and_keeps_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--algo",
        "ppo",
        "--total-steps",
        "512",
        "--run-dir",
        str(tmp_path),
        "--no-tensorboard",
    ]
    assert main(["train", *flags]) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(["train", *flags]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "already holds a run" in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_observation_of_another_shape_is_no_observation() -> None:
    class Shrinks(Countdown):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.steps, *super().step(action)[1:]

    env = VectorEnv("Shrinks", 2, env_fn=Shrinks)  # unregistered: Gymnasium checks nothing
    env.reset(0)
    with pytest.raises(EnvironmentFault, match=r"step gave an observation of shape \(\)"):
        env.step(np.zeros(2, np.int64))


def test_unknown_and_unsupported_environments(
    registered: Register, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["train", "--env", "CartPol-v1", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot make environment 'CartPol-v1'" in message
    assert not (tmp_path / "run").exists()

    class Odd(Countdown):
        pass

    odd = registered(Odd)
    Odd.action_space = gym.spaces.MultiDiscrete([2, 2])
    with pytest.raises(EnvironmentUnsupported, match="action space MultiDiscrete"):
        VectorEnv(odd, 1)
    for shape in ((), (0,)):
        Odd.observation_space = gym.spaces.Box(-1, 1, shape)
        with pytest.raises(EnvironmentUnsupported, match="observation space Box"):
            VectorEnv(odd, 1)
    Odd.observation_space = gym.spaces.Discrete(3)
    with pytest.raises(EnvironmentUnsupported, match="observation space Discrete"):
        VectorEnv(odd, 1)


@pytest.mark.parametrize(
    ("algo", "settings", "message"),
    [
        ("ppo", {"gamma": 1.1}, r"gamma=1.1: expected a number in \[0, 1\]"),
        ("ppo", {"learning_rate": float("nan")}, "learning_rate=nan: expected a number > 0"),
        ("ppo", {"num_envs": 0}, "num_envs=0: expected an integer >= 1"),
        ("ppo", {"num_minibatches": 512}, "at least 2 samples per minibatch of the 512"),
        ("ppo", {"hidden": ()}, "one or more widths"),
        ("ppo", {"hidden": 5}, "hidden=5: expected one or more widths"),
        ("ppo", {"hidden": (True,)}, r"hidden=\(True,\): expected one or more widths"),
        ("ppo", {"env": 5}, "env=5: expected a text"),
        ("ppo", {"compile": 1}, 'compile=1: expected True or False or "auto"'),
        ("blpo", {"damping": True}, 'damping=True: expected a number > 0 or "auto"'),
        ("blpo", {"rank": True}, "rank=True: expected an integer >= 1"),
        ("ppo", {"seed": 2**64}, "seed=18446744073709551616: expected an integer >= 0 and below 2"),
        ("ppo", {"rank": 5}, "rank=5: expected a hyper-parameter of ppo"),
        ("blpo", {"rank": 0}, "rank=0: expected an integer >= 1"),
        ("blpo", {"damping": 0.0}, "damping=0.0: expected a number > 0"),
        ("blpo", {"solver": "lu"}, "one of nystrom, nystrom_pcg, cg, exact"),
        ("blpo", {"correction_bound": -1.0}, "correction_bound=-1.0: expected a number > 0"),
        ("blpo", {"envs_per_minibatch": 3}, "a divisor of num_envs=4"),
        ("blpo", {"solver": "nystrom_pcg", "sketch_every": 2}, 'sketch_every=2: .* "nystrom_pcg"'),
        ("nested", {"solver": "cg"}, 'use algo "blpo"'),
        ("sac", {}, "one of ppo, nested, blpo"),
    ],
)
def test_bad_settings(algo: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(algo, **settings)


def test_a_flag_of_another_algorithm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--algo", "ppo", "--rank", "3", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert "rank=3: expected a hyper-parameter of ppo" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_configs_survive_json() -> None:
    for config in (PPOConfig(hidden=(8,)), BLPOConfig(solver="none"), BLPOConfig(rank=3)):
        settings = json.loads(json.dumps(dataclasses.asdict(config)))
        assert make_config(config.algo, **settings) == config


def test_summary_figures(tmp_path: Path) -> None:
    rows = [
        {"env_steps": 100 * (i + 1), "seconds": i + 1, "episodes": n, "episode_return": r}
        for i, (n, r) in enumerate(
            [(0, "")] + [(1, 5.0)] * 8 + [(0, "")] + [(3, 10.0), (1, 20.0)] * 5
        )
    ]
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = summarize(read_metrics(tmp_path))
    assert summary.final_return == (3 * 10.0 + 20.0) / 4  # the last 2 of 20 updates
    assert summary.area == pytest.approx((9 * 5.0 + 5 * 30.0) / 19)  # the first has no return
    assert summary.steps_per_second == 100


def test_compare_reports_every_algorithm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "compare", "--algos", "ppo", "nested", "--seeds", "0", "1", "--total-steps", "1024",
        "--run-dir", str(tmp_path), "--jobs", "2", "--nested-steps", "2", "--no-tensorboard",
    ]  # fmt: skip
    (tmp_path / "ppo-1").write_text("")  # no directory: this run fails
    assert main(command) == 1
    table, errors = capsys.readouterr()
    assert "return, last tenth" in table
    assert "nested" in table
    (line,) = [text for text in errors.split("\n") if text.startswith("hypergrad_rl: ")]
    assert f"cannot write into {tmp_path / 'ppo-1'}" in line
    assert f"{tmp_path / 'ppo-1'} is not finished: python -m hypergrad_rl train --algo ppo" in line
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert dataclasses.asdict(load_config(tmp_path / "nested-1"))["nested_steps"] == 2
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("twice", [("--seeds", "3", "3"), ("--algos", "ppo", "ppo")])
def test_compare_refuses_to_count_a_run_twice(
    twice: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *twice, "--run-dir", str(tmp_path / "new")]) == 2
    assert " ".join(twice) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "run", "--episodes", "0"),
        ("evaluate", "run", "--seed", "-1"),
        ("train", "--threads", "0"),
        ("compare", "--jobs", "0"),
    ],
)
def test_a_flag_outside_its_range_is_named(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(rf"{command[-2][2:]}.?{command[-1]}: expected an integer >= ", message)


def test_evaluate_refuses_no_episodes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="episodes=0: expected an integer >= 1"):
        evaluate(tmp_path, 0)


def test_train_evaluate_and_resume_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "--algo", "blpo", "--total-steps", "1024", "--epochs", "1",
                 "--rank", "3", "--correction-bound", "none", "--hidden", "32", "32",
                 "--run-dir", run]) == 0  # fmt: skip
    config = dataclasses.asdict(load_config(run))
    assert (config["rank"], config["correction_bound"], config["hidden"]) == (3, None, (32, 32))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert main(["evaluate", run, "--episodes", "3"]) == 0
    assert "3 episodes: mean return" in capsys.readouterr().out
    assert main(["resume", run]) == 0  # a finished run: nothing left to do
    assert len(read_metrics(run)["update"]) == 2


def test_arguments_of_another_kind_are_named() -> None:
    config = make_config("ppo", total_steps=512)
    shared = gym.make("CartPole-v1")
    wrong: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"config": {"algo": "ppo"}}, ConfigError, "config is a dict, expected a PPOConfig"),
        ({"callbacks": print}, ConfigError, "callbacks is a builtin_function.*a list"),
        (
            {"networks": torch.nn.Linear(4, 2)},
            ConfigError,
            "networks is a Linear, expected Networks",
        ),
        ({"env_fn": lambda: None}, EnvironmentUnsupported, "returned a NoneType, expected a gym"),
        # All environments would be one, which each of them steps: wrong without a word.
        ({"env_fn": lambda: shared}, EnvironmentUnsupported, "a new one at each call"),
        (
            {"env_fn": lambda: gym.wrappers.TimeLimit(shared, 9)},
            EnvironmentUnsupported,
            "a new one at each call",
        ),
    )
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            train(**{"config": config, **arguments})
