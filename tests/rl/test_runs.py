"""Which runs a comparison takes, how it tells them apart, and what it refuses."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from hypergrad_rl import ConfigError, RunDirectoryError
from hypergrad_rl.cli import main, parse
from hypergrad_rl.comparison import compare_runs
from hypergrad_rl.report import read_metrics
from hypergrad_rl.runs import find_runs
from tests.rl.written_runs import FAST, ROLLOUT, write_run, write_runs


def test_variants_of_an_algorithm_are_told_apart_by_a_setting(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [1, 2])
    write_runs(tmp_path, "blpo", [3, 4], "cg-", solver="cg")
    write_runs(tmp_path, "blpo", [5, 6], "ny-", solver="nystrom")
    with pytest.raises(ConfigError, match=r'differ in solver: "cg" in .*cg-blpo-0, "nystrom" in'):
        compare_runs([tmp_path])
    results = compare_runs([tmp_path], by=["solver"], bootstrap=FAST)
    labels = list(results["tasks"]["CartPole-v1"]["algorithms"])
    assert labels == ["blpo solver=cg", "blpo solver=nystrom", "ppo"]
    with pytest.raises(ConfigError, match="are both blpo on CartPole-v1 with seed 0"):
        compare_runs([tmp_path], mix=["solver"])


def test_settings_may_differ_where_that_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "ppo", 0, 1.0)
    write_run(tmp_path / "1", "ppo", 1, 2.0, hidden=(8,))
    with pytest.raises(ConfigError, match=r"differ in hidden: \[64, 64\] in .*--mix hidden"):
        compare_runs([tmp_path])
    results = compare_runs([tmp_path], mix=["hidden"], bootstrap=FAST)
    assert results["mix"] == ["hidden"]
    assert list(results["tasks"]["CartPole-v1"]["algorithms"]) == ["ppo"]
    with pytest.raises(ConfigError, match="hiden: no run has this setting; they have adam_eps"):
        compare_runs([tmp_path], by=["hiden"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("own_networks", ["critic"], "networks="), ("own_environment", True, "env_fn=")],
)
def test_networks_and_environments_of_ones_own_tell_runs_apart(
    name: str, value: Any, words: str, tmp_path: Path
) -> None:
    write_runs(tmp_path, "ppo", [1, 2, 3])
    (tmp_path / "ppo-2" / "run_info.json").write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=rf"differ in {name}: false in .*ppo-0, .*--by {name}"):
        compare_runs([tmp_path])
    task = compare_runs([tmp_path], by=[name], bootstrap=FAST)["tasks"]["CartPole-v1"]
    default, own = task["algorithms"].values()
    assert (len(default["runs"]), len(own["runs"])) == (2, 1)
    assert own["runs"][0]["command"].endswith(f"# and, from Python, {words} of one's own")
    assert name.replace("_", "-") not in default["runs"][0]["command"]


def test_a_setting_that_an_older_run_lacks_is_a_difference(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [1, 2])
    path = tmp_path / "ppo-1" / "config.json"
    settings = json.loads(path.read_text())
    del settings["anneal"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r'anneal: true in .*ppo-0, "\(not recorded\)" in'):
        compare_runs([tmp_path])


def test_unfinished_runs_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path, "ppo", [1, 2])
    unfinished = write_run(tmp_path / "ppo-2", "ppo", 2, 3.0, updates=15)
    with (unfinished / "metrics.csv").open("a") as file:
        file.write("16,81")  # killed in the middle of a row
    assert len(read_metrics(unfinished)["update"]) == 15
    results = compare_runs([tmp_path], bootstrap=FAST)
    assert len(results["tasks"]["CartPole-v1"]["algorithms"]["ppo"]["runs"]) == 2
    assert results["notes"][0].endswith("ppo-2 has made 7,680 of 10,240 steps")
    assert main(["report", str(unfinished)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "holds no finished run" in message
    assert "`resume` continues" in message
    (unfinished / "metrics.csv").unlink()
    with pytest.raises(RunDirectoryError, match="has made no step of 10,240"):
        compare_runs([unfinished])
    results = compare_runs([tmp_path], steps=5120, bootstrap=FAST)
    assert results["tasks"]["CartPole-v1"]["env_steps"] == 5120


def test_trainings_of_different_lengths(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [1, 2])
    write_runs(tmp_path, "blpo", [1, 2], total_steps=5120)
    with pytest.raises(ConfigError, match=r"5120 steps in .*, 10240 steps in .*--steps 5120"):
        compare_runs([tmp_path])
    results = compare_runs([tmp_path], steps=5120, bootstrap=FAST)
    assert results["tasks"]["CartPole-v1"]["env_steps"] == 5120
    with pytest.raises(RunDirectoryError, match="first row is at 512 steps, beyond --steps 100"):
        compare_runs([tmp_path], steps=100)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (["CartPole-v1", "0", "500"], "the runs are on CartPole-v1, Acrobot-v1"),
        (["CartPole-v1", "0", "x"], "expected ENV LOW HIGH, could not convert"),
        (["CartPole-v1", "9", "9", "Acrobot-v1", "-500", "-80"], "a low and a higher return"),
        (["CartPole-v1", "0", "9", "Acrobot-v1", "-500", "-80"], "ppo has 3 runs on CartPole-v1"),
    ],
)
def test_ranges_that_say_nothing(
    ranges: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path / "c", "ppo", [1, 2, 3])
    write_runs(tmp_path / "a", "ppo", [1, 2], env="Acrobot-v1")
    flags = [f for i in range(0, len(ranges), 3) for f in ("--range", *ranges[i : i + 3])]
    command = ["report", str(tmp_path / "c"), str(tmp_path / "a"), *flags]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_directories_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run: there is no config"):
        compare_runs([tmp_path])
    with pytest.raises(RunDirectoryError, match="none holds no run"):
        compare_runs([tmp_path / "none"])
    write_runs(tmp_path, "ppo", [1, 2])
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write the comparison into" in capsys.readouterr().err
    damaged = tmp_path / "ppo-0"
    (damaged / "metrics.csv").write_text("env_steps,seconds,episodes\n1,2,3\n")
    with pytest.raises(RunDirectoryError, match="lacks episode_return"):
        compare_runs([tmp_path])
    (damaged / "metrics.csv").write_text("env_steps,seconds\n1,two\n")
    with pytest.raises(RunDirectoryError, match="is damaged: could not convert"):
        compare_runs([tmp_path])
    for content in ("{", "[]", '{"env": "CartPole-v1"}'):
        (damaged / "config.json").write_text(content)
        with pytest.raises(RunDirectoryError, match="damaged or no run's"):
            compare_runs([tmp_path])


def test_a_run_without_a_whole_row_is_unfinished(tmp_path: Path) -> None:
    """As one that compiles, or was killed before its first update ended."""
    write_runs(tmp_path, "ppo", [400, 410])
    for i, text in enumerate(["", "update,env_steps,seconds,episodes,episode_return\n"]):
        begun = write_run(tmp_path / f"begun-{i}", "ppo", 7 + i, 400)
        (begun / "metrics.csv").write_text(text)
    runs, left_out = find_runs([tmp_path])
    assert len(runs) == 2
    assert [text.split(" has ")[1] for text in left_out] == ["made no step of 10,240"] * 2


def test_runs_that_ended_early_are_told_of(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [400, 410])
    early = write_run(tmp_path / "early", "ppo", 2, 480, updates=5)
    (early / "run_info.json").write_text('{"ended": "480 >= 475", "stop_at_return": 475.0}')
    results = compare_runs([tmp_path], bootstrap=FAST)
    assert results["notes"][0].startswith(
        "CartPole-v1: 1 of 3 runs ended early, the first at 2,560 steps"
    )
    command = parse(shlex.split(find_runs([early])[0][0].command)[3:])
    assert command.stop_at_return == 475.0
    assert command.config().total_steps == ROLLOUT * 20
    assert not any("early" in n for n in compare_runs([tmp_path], steps=2560)["notes"])
