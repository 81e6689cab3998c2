"""Killed at any moment and resumed, a run is that of an uninterrupted one, to the last bit."""

import csv
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from hypergrad_rl import (
    CheckpointError,
    EnvironmentFault,
    RunDirectoryError,
    make_config,
    train,
    trainer,
)
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.run_directory import RunLog, held
from tests.rl.small import leaves

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 32, "epochs": 1, "hidden": (8, 8), "total_steps": 64 * 12,
}  # fmt: skip
NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}
CONFIGS = [
    make_config("ppo", env="Pendulum-v1", **SMALL, **NORMALIZED),
    make_config("blpo", env="CartPole-v1", nested_steps=2, rank=4, **SMALL),
    make_config("ppo", env="CartPole-v1", num_minibatches=3, **SMALL),
    make_config("blpo", env="Pendulum-v1", nested_steps=2, rank=4, **SMALL, **NORMALIZED),
]
NAMES = [f"{config.algo} {config.env}" for config in CONFIGS]


pytestmark = pytest.mark.usefixtures("no_curve")


def forkserver() -> Any:
    """Processes that start within milliseconds: their parent has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hypergrad_rl", "hypergrad_rl.report"])
    return context


def work(config: Any, run_dir: Path, kill_at: int | None, **options: Any) -> None:
    """Start or resume; SIGKILL itself at the ``kill_at``-th event of writing a file."""
    events = iter(range(10**9))

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = deadly(os.fsync)
    Path.open = deadly(Path.open)  # type: ignore[method-assign]
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    trainer._draw = lambda directory: None
    train(config, run_dir, resume=(run_dir / "config.json").exists(), **options)


def run(
    config: Any, run_dir: Path, kill_at: int | None, after: float | None, **options: Any
) -> int:
    process = forkserver().Process(target=work, args=(config, run_dir, kill_at), kwargs=options)
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)


def columns(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what is measured in seconds, as written."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def assert_the_same_run(run_dir: Path, expected: Path) -> None:
    assert columns(run_dir) == columns(expected)
    states = [leaves(load_checkpoint(d / "checkpoint.safetensors")) for d in (run_dir, expected)]
    np.testing.assert_equal(states[0], states[1])


@pytest.mark.parametrize(
    "config", [*CONFIGS[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS[2:])],
    ids=NAMES,
)  # fmt: skip
def test_killed_at_random_moments(config: Any, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    delays = np.random.default_rng(CONFIGS.index(config)).uniform(0.05, 0.6, size=4)
    ends = [run(config, tmp_path / "killed", None, x, checkpoint_every=0) for x in (*delays, None)]
    assert set(ends[:-1]) <= {-signal.SIGKILL, 0}
    assert ends[-1] == 0
    assert_the_same_run(tmp_path / "killed", tmp_path / "whole")


def test_killed_at_every_event_of_writing(tmp_path: Path) -> None:
    """Before each file is opened, synced and renamed, and its directory synced."""
    config = CONFIGS[0]
    train(config, tmp_path / "whole")
    for event in range(100):
        end = run(config, tmp_path / "killed", event, None, checkpoint_every=0)
        if end == 0:
            break
        assert end == -signal.SIGKILL
    assert end == 0
    assert event > 10
    assert_the_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", CONFIGS[:2], ids=NAMES[:2])
def test_killed_while_compiled(config: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(config, compile=True, total_steps=64 * 200)
    end = run(config, tmp_path / "whole", None, None)
    assert end == 0
    for delay in np.random.default_rng(0).uniform(3, 12, size=8):
        run(config, tmp_path / "killed", None, delay, checkpoint_every=0)
    assert run(config, tmp_path / "killed", None, None, checkpoint_every=0) == 0
    assert_the_same_run(tmp_path / "killed", tmp_path / "whole")


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    train(CONFIGS[2], tmp_path / "whole")
    (tmp_path / "begun").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "begun")
    (tmp_path / "begun" / "metrics.csv").write_text("update,env_st")
    train(CONFIGS[2], tmp_path / "begun", resume=True)
    assert_the_same_run(tmp_path / "begun", tmp_path / "whole")


class Faulty(gym.Env[Any, Any]):
    """Raises ``Faulty.error`` at step ``Faulty.at``, counted over all environments."""

    observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gym.Space[Any] = gym.spaces.Discrete(2)
    error: BaseException | None = None
    at = 0
    count = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.normal(size=1).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Faulty.count += 1
        if Faulty.count == Faulty.at and Faulty.error is not None:
            raise Faulty.error
        obs = self.np_random.normal(size=1).astype(np.float32)
        return obs, float(action == (obs[0] > 0)), bool(obs[0] > 1.5), False, {}


@pytest.fixture
def faulty() -> Iterator[str]:
    gym.register("Faulty-v0", lambda **_: Faulty())
    Faulty.error, Faulty.count = None, 0
    yield "Faulty-v0"
    del gym.registry["Faulty-v0"]


@pytest.mark.parametrize("error", [RuntimeError("the motor is hot"), KeyboardInterrupt()])
def test_an_exception_loses_nothing_of_what_was_completed(
    error: BaseException, faulty: str, tmp_path: Path
) -> None:
    config = make_config("ppo", env=faulty, **SMALL, **NORMALIZED)
    train(config, tmp_path / "whole")
    Faulty.error, Faulty.count, Faulty.at = error, 0, 5 * 64 + 30  # in the sixth update
    expected = EnvironmentFault if isinstance(error, Exception) else type(error)
    with pytest.raises(expected):
        train(config, tmp_path / "run", checkpoint_every=1e9)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["update"] == 5
    train(config, tmp_path / "run", resume=True)
    assert_the_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_exception_in_a_callback_can_be_resumed(tmp_path: Path) -> None:
    def fail(update: int, metrics: dict[str, float], agent: Any) -> None:
        if update == 4:
            raise ZeroDivisionError

    train(CONFIGS[2], tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(CONFIGS[2], tmp_path / "run", callbacks=[fail])
    train(CONFIGS[2], tmp_path / "run", resume=True)
    assert_the_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    def begin_another(update: int, metrics: dict[str, float], agent: Any) -> bool:
        for resume in (False, True):
            with pytest.raises(RunDirectoryError, match="in use by a run that is still going"):
                train(CONFIGS[2], tmp_path, resume=resume)
        return True

    assert train(CONFIGS[2], tmp_path, callbacks=[begin_another]).ended == "a callback ended it"
    with held(tmp_path):  # and is let go of
        pass


def test_of_many_runs_that_begin_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    processes = [
        forkserver().Process(target=work, args=(CONFIGS[2], tmp_path / "run", None))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes].count(0) >= 1
    train(CONFIGS[2], tmp_path / "whole")
    assert_the_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_with_a_checkpoint_of_another_format_is_not_begun_anew(tmp_path: Path) -> None:
    train(CONFIGS[2], tmp_path)
    (tmp_path / "checkpoint.safetensors").rename(tmp_path / "checkpoint.pt")
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        train(CONFIGS[2], tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_lost_rows_are_not_made_up(tmp_path: Path) -> None:
    train(CONFIGS[2], tmp_path)
    lines = (tmp_path / "metrics.csv").read_bytes().splitlines(True)
    (tmp_path / "metrics.csv").write_bytes(b"".join(lines[:4]))
    with pytest.raises(RunDirectoryError, match="fewer than the 12 rows"):
        train(CONFIGS[2], tmp_path, resume=True)


def test_resume_keeps_the_goal_and_a_run_that_ended_is_left_alone(tmp_path: Path) -> None:
    config = make_config("ppo", env="CartPole-v1", **{**SMALL, "total_steps": 64 * 40})
    whole = train(config, tmp_path / "whole", stop_at_return=17.0)
    assert whole.ended.startswith("mean return of 20 episodes")
    assert 3 < len(whole.metrics) < 40
    info = json.loads((tmp_path / "whole" / "run_info.json").read_text())
    assert info["ended"] == whole.ended

    def interrupt(update: int, metrics: dict[str, float], agent: Any) -> None:
        if update == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", stop_at_return=17.0, callbacks=[interrupt])
    assert train(config, tmp_path / "run", resume=True).ended == whole.ended
    assert_the_same_run(tmp_path / "run", tmp_path / "whole")
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    again = train(config, tmp_path / "run", resume=True)
    assert (again.metrics, again.ended) == ([], whole.ended)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_only_a_run_of_this_configuration_is_continued(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        train(CONFIGS[2], tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    train(CONFIGS[2], tmp_path / "run")
    other = dataclasses.replace(CONFIGS[2], learning_rate=0.5)
    with pytest.raises(RunDirectoryError, match=r"learning_rate=0.00025, .* has 0\.5"):
        train(other, tmp_path / "run", resume=True)
    with pytest.raises(RunDirectoryError, match=r"algo='ppo', .* has 'blpo'"):
        train(CONFIGS[1], tmp_path / "run", resume=True)
    (tmp_path / "run" / "run_info.json").write_text("3")
    with pytest.raises(RunDirectoryError, match=r"run_info.json is damaged"):
        train(CONFIGS[2], tmp_path / "run", resume=True)
    (tmp_path / "run" / "run_info.json").unlink()
    (tmp_path / "run" / "metrics.csv").unlink()
    with pytest.raises(RunDirectoryError, match="fewer than the 12 rows"):
        train(CONFIGS[2], tmp_path / "run", resume=True)


def test_events_that_cannot_be_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = threading.excepthook
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        RunLog(tmp_path, CONFIGS[2], 0, True, None)
    assert threading.excepthook is hook


def test_counts_are_written_in_full(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIGS[2], 0, False, None)
    log.write({"update": 1, "env_steps": 1_234_567_891, "loss": 1 / 3})
    log.close()
    assert (tmp_path / "metrics.csv").read_text().split("\n")[1] == "1,1234567891,0.33333333"
