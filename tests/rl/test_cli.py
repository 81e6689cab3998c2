"""The command line: what a user does wrong is one line and status 2, and loses nothing."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch

from hypergrad_rl import BLPOConfig, PPOConfig, load_config
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.cli import main
from hypergrad_rl.meanings import MEANINGS
from hypergrad_rl.run_directory import has_ended, held
from hypergrad_rl.tensor_envs import ArrayCollector

QUICK = ["--total-steps", "256", "--num-envs", "2", "--num-steps", "32", "--epochs", "1",
         "--hidden", "8", "--no-tensorboard"]  # fmt: skip
PPO = ["train", "--algo", "ppo", *QUICK]
Refused = Callable[..., str]


pytestmark = pytest.mark.usefixtures("no_curve")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail in the user's way; its line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        out, error = capsys.readouterr()
        lines = [line for line in error.split("\n") if not line.startswith("\r")]
        assert out == ""
        assert lines[-2].startswith("hypergrad_rl: ")
        assert lines[-1] == ""
        assert len(lines) == 2 or "step/s" in error  # a progress bar before it
        return lines[-2]

    return run


class Broken(gym.Env[Any, Any]):
    """Fails in its own way in step 150, counted over all."""

    observation_space: gym.Space[Any] = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space: gym.Space[Any] = gym.spaces.Discrete(2)
    how, count = "", 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Broken.count += 1
        failing = Broken.count == 150
        if failing and Broken.how == "raises":
            raise ValueError("no such\nmotor")
        bad = float("nan") if failing and Broken.how == "nan" else 0.0
        return np.full(1, bad, np.float32), 1.0, False, False, {}


@pytest.fixture
def broken() -> Iterator[str]:
    gym.register("Broken-v0", lambda **kw: Broken(**kw), disable_env_checker=True)
    Broken.count, Broken.how = 0, ""
    yield "Broken-v0"
    del gym.registry["Broken-v0"]


def test_commands_that_are_none(refused: Refused, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for words, message in (
        ((), "Expected one of {train, resume,"),
        (("fly",), "Unrecognized options: fly"),
        (("train", "--algo", "sac"), "invalid choice 'sac' for argument '--algo'"),
        (("train", "--wings", "2"), "Unrecognized options: --wings"),
        (("train", "--damping", "much"), "--damping"),
        (("train", "--gamma", "2"), r"gamma=2.0: expected a number in [0, 1]"),
        (("train", "--algo", "ppo", "--rank", "3"), "rank=3: expected a hyper-parameter of ppo"),
        (("train", "--style", "paper", "--env", "Pendulum-v1"), "no paper settings"),
        (("resume",), "Missing"),
        (("resume", run), "holds no run"),
        (("evaluate", run), "holds no run"),
        (("watch", run), "holds no run"),
        (("export", run), "holds no run"),
        (("report",), "expected run directories"),
    ):
        assert message in refused(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["train", "resume", "evaluate", "watch", "compare", "sweep", "report"]
)
def test_help_is_no_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    assert f"usage: python -m hypergrad_rl {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_help_says_what_each_flag_means(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # nothing is broken into lines
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    ppo, blpo = ({field.name for field in fields(kind)} for kind in (PPOConfig, BLPOConfig))
    assert set(MEANINGS) == (ppo | blpo) - {"env", "seed"}
    for name, meaning in MEANINGS.items():
        flag = re.escape(f"--{name.replace('_', '-')}")
        assert re.search(rf"{flag}[ ,].*\n? *{re.escape(meaning)} \(default: the task's", told)
        # The algorithms that a flag belongs to stand in front.
        assert meaning.startswith("ppo: ") == (name in ppo - blpo)
        assert ("blpo: " in meaning) == (name in blpo - ppo)


def test_only_the_command_line_needs_tyro() -> None:
    code = "import sys, hypergrad_rl; sys.exit('tyro' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_extra_is_said_by_name() -> None:
    code = "import sys; sys.modules['gymnasium'] = sys.modules['tqdm'] = None; import hypergrad_rl"
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1
    assert last.startswith("hypergrad.errors.MissingPackageError: ")
    assert "not installed: gymnasium, tqdm. " in last
    assert 'pip install "hypergrad-torch[rl]"' in last


@pytest.mark.parametrize("flag", ["--algos", "--seeds", "--env"])
def test_compare_refuses_an_empty_list(flag: str, refused: Refused, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert f"{flag}: expected one or more" in refused("compare", "--run-dir", str(run), flag)
    assert not run.exists()


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--checkpoint-every", "-1", "checkpoint_every=-1.0: expected a number >= 0"),
        ("--checkpoint-every", "nan", "checkpoint_every=nan: expected a number >= 0"),
        ("--stop-at-return", "nan", "stop_at_return=nan: expected a finite number or None"),
    ],
)
def test_numbers_that_train_would_never_meet(
    flag: str, value: str, expected: str, refused: Refused, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert expected in refused(*PPO, "--run-dir", str(run), flag, value)
    assert not run.exists()


def test_compare_refuses_a_flag_that_no_algorithm_has(refused: Refused, tmp_path: Path) -> None:
    for algos, flag in ((["ppo"], "--rank"), (["ppo", "nested"], "--solver")):
        value = "3" if flag == "--rank" else "cg"
        words = ["compare", "--algos", *algos, flag, value, "--run-dir", str(tmp_path / "x")]
        assert f"{flag}: none of {', '.join(algos)} has it" in refused(*words)
    assert not (tmp_path / "x").exists()


def test_flags_reach_the_configuration(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *QUICK, "--compile=false", "--correction_bound", "none", "--solver",
                 "identity", "--seed", "4", "--run-dir", str(run)]) == 0  # fmt: skip
    config: Any = load_config(run)
    assert (config.compile, config.correction_bound, config.solver) == (False, None, "identity")
    assert (config.seed, config.hidden, config.algo) == (4, (8,), "blpo")
    assert main([*PPO, "--no-anneal", "--run-dir", str(tmp_path / "ppo")]) == 0
    config = load_config(tmp_path / "ppo")
    assert (config.anneal, config.normalize_advantages) == (False, True)


def test_unsupported_spaces(refused: Refused, broken: str, tmp_path: Path) -> None:
    space: Any = Broken.action_space
    try:
        Broken.action_space = gym.spaces.MultiDiscrete([2, 2])
        assert "action space MultiDiscrete([2 2]) is not supported" in refused(
            *PPO, "--env", broken, "--run-dir", str(tmp_path / "run")
        )
    finally:
        Broken.action_space = space
    assert "cannot make environment 'Lunar-v9'" in refused(*PPO, "--env", "Lunar-v9")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "message"), [("raises", "raised ValueError: no such motor"), ("nan", "non-finite")]
)
def test_a_broken_environment_loses_nothing(
    how: str, message: str, broken: str, refused: Refused, tmp_path: Path
) -> None:
    Broken.how = how
    run = tmp_path / "run"
    assert message in refused(*PPO, "--env", broken, "--run-dir", str(run))
    assert load_checkpoint(run / "checkpoint.safetensors")["update"] == 2  # of 64 steps each
    assert main(["resume", str(run), "--no-tensorboard"]) == 0
    assert json.loads((run / "run_info.json").read_text())["ended"] == "all steps are made"


def test_run_directories_that_cannot_be_used(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "cannot write into" in refused(*PPO, "--run-dir", str(file))
    assert "cannot write into" in refused(*PPO, "--run-dir", str(file / "below"))
    assert file.read_text() == "mine"
    # Nobody may make directories in /proc, not even an administrator.
    assert "cannot write into /proc/run" in refused(*PPO, "--run-dir", "/proc/run")
    run = tmp_path / "run"
    with held(run):
        assert "in use by a run that is still going" in refused(*PPO, "--run-dir", str(run))
    assert main([*PPO, "--run-dir", str(run)]) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "already holds a run" in refused(*PPO, "--run-dir", str(run))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("command", ["resume", "evaluate", "watch", "export"])
def test_checkpoints_that_cannot_be_used(command: str, refused: Refused, tmp_path: Path) -> None:
    assert main([*PPO, "--run-dir", str(tmp_path)]) == 0
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "is damaged or foreign" in refused(command, str(tmp_path))
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    assert "is not a 'hypergrad_rl checkpoint 3'" in refused(command, str(tmp_path))
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text('{"algo": "ppo", ')
    assert "is damaged or no run's" in refused(command, str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--hidden", "4"], "hidden"),
        # What follows was taken for this run's, where it raised no KeyError or ValueError.
        (["--seed", "7"], "seed"),
        (["--num-envs", "1"], "num_envs"),
        (["--env-backend", "gymnasium"], "env_backend"),
        (["--normalize-observations"], "normalize_observations"),
    ],
)
def test_a_checkpoint_of_another_run(
    flags: list[str], setting: str, refused: Refused, tmp_path: Path
) -> None:
    for name, more in (("a", []), ("b", flags)):
        assert main([*PPO, *more, "--run-dir", str(tmp_path / name)]) == 0
    (tmp_path / "a" / "checkpoint.safetensors").replace(tmp_path / "b" / "checkpoint.safetensors")
    assert f"is of another run: its {setting} is " in refused("resume", str(tmp_path / "b"))


def test_a_training_that_diverges(refused: Refused, tmp_path: Path) -> None:
    """It ended as a finished run whose last checkpoint, not a number in it, replaced the others."""
    flags = ["--learning-rate", "1e38", "--critic-learning-rate", "1e38", "--num-steps", "8"]
    line = refused(*PPO, *flags, "--run-dir", str(tmp_path))
    assert "diverged" in line
    assert json.loads((tmp_path / "run_info.json").read_text())["ended"] is None
    assert "nan" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "tensorboard", [pytest.param([], marks=pytest.mark.slow), ["--no-tensorboard"]]
)
def test_a_full_disk(tensorboard: list[str], tmp_path: Path) -> None:
    """The system refuses to make any file longer than a limit, between two checkpoints' sizes."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "hypergrad_rl",
        *PPO[:-1],
        "--num-steps",
        "8",
        "--total-steps",
        "2400",
    ]
    assert main([*PPO, "--num-steps", "8", "--total-steps", "16", "--run-dir", str(whole)]) == 0
    limit = (whole / "checkpoint.safetensors").stat().st_size + 500

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run(
        [*command, *tensorboard, "--checkpoint-every", "0", "--run-dir", str(run)],
        preexec_fn=full, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "cannot write" in ended.stderr.strip().split("\n")[-1]
    update = load_checkpoint(run / "checkpoint.safetensors")["update"]
    assert 0 < update < 150
    assert main(["resume", str(run), "--no-tensorboard"]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 151


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ArrayCollector, "collect", interrupt)
    assert main([*PPO, "--run-dir", str(tmp_path)]) == 130
    assert f"interrupted; `resume {tmp_path}` continues\n" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["resume", str(tmp_path), "--no-tensorboard"]) == 0  # from the beginning


def test_an_interrupted_comparison_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    runs, names = tmp_path / "runs", ("ppo-0", "nested-0", "blpo-0")
    words = ["compare", *QUICK[2:], "--seeds", "0", "--jobs", "1", "--total-steps", "100000000"]
    # What a shell begins in the background ignores Ctrl-C, and so would these tests' children.
    heeding = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('hypergrad_rl', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, *words, "--compile", "false", "--run-dir", runs],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not (runs / "ppo-0" / "metrics.csv").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        error = process.communicate(timeout=120)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert [(runs / name).exists() for name in names] == [True, False, False]
    *_, first, resume, nested, blpo = error.splitlines()
    assert first == f"interrupted; these, and `report {runs}`, go on:"
    assert resume == f"python -m hypergrad_rl resume {runs / 'ppo-0'}"
    for name, line in zip(names[1:], (nested, blpo), strict=True):
        algo = name.split("-")[0]
        assert line.startswith(f"python -m hypergrad_rl train --algo {algo} --env CartPole-v1 ")
        assert line.endswith(f" --run-dir {runs / name}")


def test_a_comparison_in_the_background_ignores_ctrl_c(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["compare", *QUICK[2:], "--algos", "ppo", "nested", "--seeds", "0", "--jobs", "1"]
    deaf = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "runpy.run_module('hypergrad_rl', run_name='__main__')"
    )
    words += ["--total-steps", "12800", "--compile", "false", "--run-dir", str(runs)]
    process = subprocess.Popen([sys.executable, "-c", deaf, *words], start_new_session=True)
    try:
        while not (runs / "ppo-0" / "metrics.csv").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert all(has_ended(runs / name) for name in ("ppo-0", "nested-0"))


@pytest.mark.parametrize(("chosen", "used"), [(None, "dummy"), ("x11", "x11")])
def test_watch_draws_without_a_display(
    chosen: str | None, used: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    if chosen is not None:
        monkeypatch.setenv("SDL_VIDEODRIVER", chosen)
    drivers = []

    def watch(*args: Any, **kwargs: Any) -> tuple[Path, list[float]]:
        drivers.append(os.environ["SDL_VIDEODRIVER"])
        return tmp_path, [1.0]

    monkeypatch.setattr("hypergrad_rl.play.watch", watch)
    assert main(["watch", str(tmp_path)]) == 0
    assert drivers == [used]


def test_weights_and_biases_where_it_is_installed(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(*PPO, "--wandb", "p", "--run-dir", str(run))
    assert not run.exists()

    begun: list[dict[str, Any]] = []
    rows: list[tuple[int, dict[str, float]]] = []
    fake: Any = types.ModuleType("wandb")

    def init(**options: Any) -> Any:
        begun.append(options)
        return types.SimpleNamespace(
            log=lambda row, step: rows.append((step, row)), finish=lambda: rows.append((-1, {}))
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main([*PPO, "--wandb", "p", "--run-dir", str(run)]) == 0
    assert [step for step, _ in rows] == [64, 128, 192, 256, -1]
    assert begun[0]["project"] == "p"
    assert begun[0]["config"]["total_steps"] == 256
    os.remove(run / "checkpoint.safetensors")  # noqa: PTH107
    assert main(["resume", str(run), "--no-tensorboard"]) == 0
    assert begun[1]["id"] == begun[0]["id"]  # the same run of theirs

    def fail(**options: Any) -> Any:
        raise RuntimeError("no\nnetwork")

    fake.init, other = fail, tmp_path / "other"
    message = refused(*PPO, "--wandb", "p", "--run-dir", str(other))
    assert "does not begin a run (RuntimeError: no network): run `wandb login`" in message
    fake.init = init
    assert main(["resume", str(other), "--no-tensorboard"]) == 0
    assert all(np.isfinite(list(row.values())).all() for _, row in rows)


def test_stop_at_return(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main([*PPO, "--total-steps", "100000", "--stop-at-return", "15", "--run-dir", run]) == 0
    assert "mean return of 20 episodes" in capsys.readouterr().out
    assert main([*PPO, "--total-steps", "512", "--run-dir", str(tmp_path / "other")]) == 0
    assert main(["report", run, "--output", str(tmp_path / "report")]) == 0
