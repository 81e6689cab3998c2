"""Comparisons from run directories that the tests write: statistics, files, what is refused."""

import csv
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hypergrad_rl import ConfigError, EnvironmentFault, RunDirectoryError, make_config
from hypergrad_rl.cli import main, parse
from hypergrad_rl.comparison import compare_runs, write_comparison
from hypergrad_rl.report import comparison_table, learning_curve, read_metrics, to_metrics
from hypergrad_rl.runs import find_runs
from hypergrad_rl.statistics import Bootstrap, interquartile_mean, probability_of_improvement

FAST = Bootstrap(resamples=499)
ROLLOUT = 512


def write_run(
    path: Path, algo: str, seed: int, level: float | Sequence[float], *, updates: int = 20,
    **settings: Any,
) -> Path:  # fmt: skip
    """A run in which the episodes of an update return ``level`` (one for all, or one each)."""
    settings = {"total_steps": ROLLOUT * 20, **settings}
    config = make_config(algo, seed=seed, **settings)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"algo": algo, **dataclasses.asdict(config)}))
    levels = np.broadcast_to(level, updates)  # nan where no episode ends
    rows = [
        {"update": i + 1, "env_steps": (i + 1) * ROLLOUT, "seconds": i + 1.0,
         "episodes": 0 if np.isnan(r) else 2, "episode_return": "" if np.isnan(r) else r}
        for i, r in enumerate(levels)
    ]  # fmt: skip
    with (path / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def write_runs(
    root: Path, algo: str, levels: Sequence[float], prefix: str = "", **settings: Any
) -> None:
    for seed, level in enumerate(levels):
        write_run(root / f"{prefix}{algo}-{seed}", algo, seed, level, **settings)


# ------------------------------------------------------------------------------------- statistics


def test_interquartile_mean_of_known_samples() -> None:
    assert interquartile_mean(np.array([4.0, 1.0])) == 2.5  # nothing to cut
    assert interquartile_mean(np.array([9.0, 2.0, 1.0, 4.0, 5.0])) == (2 + 4 + 5) / 3
    two_tasks = interquartile_mean(np.array([0.0, 0.1, 0.2, 0.9]), np.array([0.3, 0.4, 0.5, 1.0]))
    assert two_tasks == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)  # the middle of all eight
    assert np.isnan(interquartile_mean(np.array([1.0, 2.0, 3.0, np.nan])))


@given(st.lists(st.floats(-1e6, 1e6), min_size=8, max_size=8), st.floats(1e6, 1e12))
def test_one_outlier_of_eight_does_not_move_it(returns: list[float], outlier: float) -> None:
    top = np.sort(np.array(returns))
    moved = np.append(top[:-1], outlier)
    assert interquartile_mean(moved) == interquartile_mean(top)
    assert moved.mean() > top.mean() or outlier == top[-1]  # where a mean would


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
)
def test_probability_of_improvement_is_the_mann_whitney_statistic(
    first: list[int], second: list[int]
) -> None:
    x, y = np.array(first, float), np.array(second, float)
    expected = scipy.stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y))
    assert probability_of_improvement(x, y) == pytest.approx(expected, abs=1e-12)
    both = probability_of_improvement(x, y) + probability_of_improvement(y, x)
    assert both == pytest.approx(1.0)
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 10, y) == 1.0
    # Over tasks it is the mean of theirs, whatever the scale of each.
    tasks = probability_of_improvement(x, 1e3 * y, y, 1e3 * x)
    assert tasks == pytest.approx(0.5)


def test_unknown_returns_are_not_counted_as_losses() -> None:
    x, y = np.array([np.nan, 2.0]), np.array([1.0, 1.0])
    assert np.isnan(probability_of_improvement(x, y))
    assert np.isnan(probability_of_improvement(y, x))
    interval = FAST.interval([np.array([[1.0, np.nan, 2.0], [1.0, 1.0, 1.0]])])
    np.testing.assert_equal(interval, ([np.nan, 1.0], [np.nan, 1.0]))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_interval_of_few_runs_is_their_range(n: int) -> None:
    """A resample of n runs has the lowest as its statistic with probability above 2.5%.

    That takes n times the lowest of 2 or 3 (1/4, 1/27), at least 3 times of 4 (13/256).
    """
    runs = np.random.default_rng(0).normal(size=(5, n))
    interval = Bootstrap().interval([runs])
    assert interval is not None
    np.testing.assert_allclose(interval, (runs.min(1), runs.max(1)), rtol=1e-12)


@pytest.mark.parametrize(("n", "share"), [(2, 0.5), (5, 0.9), (10, 0.94)])
def test_intervals_hold_the_truth_as_often_as_documented(n: int, share: float) -> None:
    trials = 1000
    runs = np.random.default_rng(1).normal(3.0, 2.0, (trials, n))
    interval = Bootstrap(resamples=999).interval([runs])
    assert interval is not None
    held = np.mean((interval[0] <= 3.0) & (interval[1] >= 3.0))
    # Four standard errors, and two in a hundred for the rounding of the documented share.
    assert abs(held - share) < 4 * np.sqrt(share * (1 - share) / trials) + 0.02


def test_intervals_of_probabilities_hold_the_truth() -> None:
    rng = np.random.default_rng(2)
    trials, shift = 400, 0.5
    x, y = rng.normal(shift, 1, (trials, 10)), rng.normal(0, 1, (trials, 10))
    interval = FAST.interval([x, y], probability_of_improvement)
    assert interval is not None
    truth = scipy.stats.norm.cdf(shift / np.sqrt(2))
    held = np.mean((interval[0] <= truth) & (truth <= interval[1]))
    assert 0.89 < held < 0.99  # 0.93 to 0.95 in 1,000 trials; four standard errors


def test_the_bootstrap_is_stratified_and_repeats_itself() -> None:
    """Runs of one task never stand in for another's: two constant tasks leave no spread."""
    samples = [np.zeros(5), np.ones(5)]
    np.testing.assert_equal(Bootstrap().interval(samples), (0.5, 0.5))
    assert Bootstrap().interval([np.arange(5.0), np.zeros(1)]) is None
    runs = [np.random.default_rng(3).normal(size=6)]
    np.testing.assert_equal(Bootstrap().interval(runs), Bootstrap().interval(runs))
    wide, narrow = (Bootstrap(confidence=c).interval(runs) for c in (0.95, 0.5))
    assert wide is not None
    assert narrow is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


# ------------------------------------------------------------------------------------- the report


def test_figures_of_a_comparison(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [10, 20, 30, 40, 1000])
    write_runs(tmp_path, "blpo", [2000, 2000, 2000, 3000, 3000])
    results = compare_runs([tmp_path], bootstrap=FAST)
    task = results["tasks"]["CartPole-v1"]
    assert list(task["algorithms"]) == ["blpo", "ppo"]
    assert task["env_steps"] == 20 * ROLLOUT
    ppo = task["algorithms"]["ppo"]
    for name in ("final_return", "area"):
        assert ppo[name]["iqm"] == 30
        assert ppo[name]["mean"] == 220
        assert 10 <= ppo[name]["low"] < 30 < ppo[name]["high"] <= 1000
    assert ppo["curve"]["iqm"] == [30.0] * 20
    assert ppo["curve"]["env_steps"][-1] == 20 * ROLLOUT
    assert len(ppo["curve"]["low"]) == 20
    (pair,) = results["improvement"]
    assert (pair["x"], pair["y"]) == ("blpo", "ppo")
    assert pair["area"] == {"probability": 1.0, "low": 1.0, "high": 1.0}
    assert any("no width" in note for note in results["notes"])
    assert results["aggregate"] is None
    json.dumps(results, allow_nan=False)


def test_identical_runs_are_even(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [500] * 5)
    write_runs(tmp_path, "nested", [500] * 5)
    results = compare_runs([tmp_path], bootstrap=FAST)
    assert results["improvement"][0]["area"] == {"probability": 0.5, "low": 0.5, "high": 0.5}
    assert "500.0 [500.0, 500.0]" in comparison_table(results)
    assert results["notes"] == []


def test_curves_meet_on_a_common_grid() -> None:
    """Rollouts of 512 and of 1,024 steps: every interval has an update of each."""

    def rows(rollout: int, count: int) -> list[dict[str, float]]:
        return [
            {"env_steps": rollout * (i + 1), "episodes": 1, "episode_return": i}
            for i in range(count)
        ]

    short, long = rows(512, 20), rows(1024, 11)
    long[0] |= {"episodes": 0, "episode_return": np.nan}
    steps, values = learning_curve(to_metrics(short), 10, 10_240)
    assert steps.tolist() == [1024.0 * (i + 1) for i in range(10)]
    assert values.tolist() == [2 * i + 0.5 for i in range(10)]
    steps_long, values_long = learning_curve(to_metrics(long), 10, 10_240)
    assert steps_long.tolist() == steps.tolist()
    np.testing.assert_equal(values_long, [np.nan, *range(1, 10)])  # and the 11th is beyond


def test_the_files_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path / "early", "ppo", [100, 110, 120])
    write_runs(tmp_path / "late", "blpo", [130, 140, 150])
    output = tmp_path / "out"
    command = ["report", str(tmp_path / "early"), str(tmp_path / "late"), "--output", str(output)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in output.iterdir()) == [
        "comparison.png", "comparison.txt", "results.csv", "results.json", "runs.csv",
    ]  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert results["command"] == shlex.join(["python", "-m", "hypergrad_rl", *command])
    with (output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["algorithm"], r["seeds"], r["figure"], float(r["iqm"])) for r in rows] == [
        ("ppo", "3", "final_return", 110), ("ppo", "3", "area", 110),
        ("blpo", "3", "final_return", 140), ("blpo", "3", "area", 140),
    ]  # fmt: skip
    text = (output / "comparison.txt").read_text()
    for line in printed.split("\n\ncurves")[0].splitlines():
        assert line in text
    with (output / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 6
    assert all(run["command"] in text for run in runs)


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("ppo", {"normalize_observations": True, "anneal": False, "hidden": [8, 16]}),
        ("nested", {"nested_steps": 3}),
        ("blpo", {"correction_bound": None, "damping": 1e-3, "env": "Acrobot-v1"}),
    ],
)
def test_the_recorded_command_makes_the_same_run(
    algo: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the presets: Acrobot's has another damping."""
    path = write_run(tmp_path / "a run", algo, 7, 0.0, **settings)
    ((run,), _) = find_runs([path])
    python, dash_m, package, *words = shlex.split(run.command)
    assert (python, dash_m, package) == ("python", "-m", "hypergrad_rl")
    command = parse(words)
    expected = make_config(algo, seed=7, total_steps=20 * ROLLOUT, **settings)
    assert command.config() == expected
    assert command.run_dir == path


def test_tasks_are_never_averaged_raw(tmp_path: Path) -> None:
    write_runs(tmp_path / "c", "ppo", [250, 500, 500, 500])
    write_runs(tmp_path / "c", "blpo", [500, 500, 500, 500])
    write_runs(tmp_path / "a", "ppo", [-80, -80, -80, -80], env="Acrobot-v1")
    write_runs(tmp_path / "a", "blpo", [-290, -290, -290, -290], env="Acrobot-v1")
    results = compare_runs([tmp_path / "c", tmp_path / "a"], bootstrap=FAST)
    assert list(results["tasks"]) == ["CartPole-v1", "Acrobot-v1"]
    assert results["aggregate"] is None  # nobody has said what the returns are worth
    by_scope = {pair["env"]: pair["area"]["probability"] for pair in results["improvement"]}
    assert by_scope == {
        "CartPole-v1": 1 / 8 + 1 / 2, "Acrobot-v1": 0.0, "all tasks": pytest.approx(5 / 16),
    }  # fmt: skip
    ranges = {"CartPole-v1": (0.0, 500.0), "Acrobot-v1": (-500.0, -80.0)}
    results = compare_runs([tmp_path / "c", tmp_path / "a"], ranges=ranges, bootstrap=FAST)
    figures = {label: entry["area"]["iqm"] for label, entry in results["aggregate"].items()}
    assert figures == {"ppo": 1.0, "blpo": pytest.approx(0.75)}  # the middle 4 of .5, .5, .5, .5, 1
    write_comparison(results, tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert [row["env"] for row in csv.DictReader(file)][-4:] == ["all tasks"] * 4


def test_compare_trains_every_task_and_reports_them_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(runs: dict[Path, Any], jobs: int, tensorboard: bool) -> dict[Path, Any]:
        assert (jobs, tensorboard) == (3, False)
        for path, config in runs.items():
            settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            write_run(path, config.algo, settings.pop("seed"), 5.0, **settings)
        return {}

    monkeypatch.setattr("hypergrad_rl.runs.train_all", finish)
    command = ["compare", "--algos", "ppo", "blpo", "--env", "CartPole-v1", "Acrobot-v1", "--seeds",
               "0", "1", "--jobs", "3", "--total-steps", "10240", "--no-tensorboard"]  # fmt: skip
    assert main([*command, "--run-dir", str(tmp_path)]) == 0
    assert "all tasks: ppo over blpo" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {env: list(task["algorithms"]) for env, task in results["tasks"].items()} == {
        "CartPole-v1": ["ppo", "blpo"], "Acrobot-v1": ["ppo", "blpo"],
    }  # fmt: skip
    assert (tmp_path / "Acrobot-v1" / "blpo-1" / "config.json").exists()
    assert main([*command, "--run-dir", str(tmp_path)]) == 2
    assert f"or `report {tmp_path}`" in capsys.readouterr().err


def test_compare_says_how_failed_runs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(runs: dict[Path, Any], jobs: int, tensorboard: bool) -> dict[Path, Any]:
        first, *others = runs
        for path in others if begin else ():
            write_run(path, "ppo", int(path.name[-1]), 5.0, total_steps=ROLLOUT * 20)
        return {path: EnvironmentFault(f"hot\nmotor {path.name}") for path in runs if path != first}

    monkeypatch.setattr("hypergrad_rl.runs.train_all", fail)
    run_dir = tmp_path / "a comparison"
    command = ["compare", "--algos", "ppo", "--seeds", "0", "1", "2", "--run-dir", str(run_dir)]
    begin = False
    assert main(command) == 2  # nothing has begun
    assert capsys.readouterr().err == "hypergrad_rl: hot motor ppo-1\n"
    begin = True
    write_run(run_dir / "ppo-0", "ppo", 0, 5.0)
    (run_dir / "ppo-0" / "metrics.csv").rename(tmp_path / "metrics.csv")
    monkeypatch.setattr("hypergrad_rl.cli._write_report", lambda runs, *_: print(*runs))
    assert main(command) == 1
    out, error = capsys.readouterr()
    assert out == f"{run_dir / 'ppo-0'}\n"
    assert error.splitlines() == [
        f"hypergrad_rl: hot motor ppo-{i}; {run_dir / f'ppo-{i}'} is not finished: "
        f"python -m hypergrad_rl resume '{run_dir / f'ppo-{i}'}'"
        for i in (1, 2)
    ]


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


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [7.0])
    write_runs(tmp_path, "blpo", [8.0, 9.0])
    results = compare_runs([tmp_path], bootstrap=FAST)
    algorithms = results["tasks"]["CartPole-v1"]["algorithms"]
    assert algorithms["ppo"]["area"]["low"] is None
    assert algorithms["ppo"]["curve"]["low"] is None
    assert algorithms["blpo"]["area"]["low"] == 8.0
    assert results["improvement"][0]["area"] == {"probability": 1.0, "low": None, "high": None}
    table = write_comparison(results, tmp_path / "out")
    assert "7.0 (no interval)" in table
    assert "note: ppo on CartPole-v1: 1 seed, so no interval is given" in table


def test_a_run_whose_last_tenth_has_no_episode_is_not_dropped(tmp_path: Path) -> None:
    write_runs(tmp_path, "ppo", [7.0, 8.0, 9.0])
    write_run(tmp_path / "ppo-3", "ppo", 3, [np.nan] * 2 + [6.0] * 16 + [np.nan] * 2)
    results = compare_runs([tmp_path], bootstrap=FAST)
    entry = results["tasks"]["CartPole-v1"]["algorithms"]["ppo"]
    assert entry["final_return"]["iqm"] is None
    assert entry["area"]["iqm"] == 7.5
    assert entry["curve"]["iqm"][:3] == [None, None, 7.5]
    table = write_comparison(results, tmp_path / "out")
    assert "unknown" in table
    assert "no episode ended in the last tenth of 1 of 4 runs" in table


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


def test_plot_draws_from_run_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path, "ppo", [1, 2])
    write_runs(tmp_path, "blpo", [3, 4])
    unfinished = write_run(tmp_path / "other" / "nested", "nested", 2, 3.0, updates=5)
    assert main(["plot", str(tmp_path)]) == 0
    assert "left out" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert main(["plot", str(unfinished)]) == 0  # a curve needs no end
    assert capsys.readouterr().out == f"{unfinished / 'learning_curve.png'}\n"
    picture = tmp_path / "pictures" / "c.pdf"
    assert main(["plot", str(tmp_path / "ppo-0"), str(tmp_path / "blpo-0"),
                 "--output", str(picture)]) == 0  # fmt: skip
    assert picture.read_bytes().startswith(b"%PDF")
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "c.docx")]) == 2
    assert "cannot draw" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


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


def test_curves_of_runs_with_longer_rollouts(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "ppo", 0, 400, updates=3, total_steps=1500)
    longer = write_run(tmp_path / "b", "ppo", 1, 400, updates=1, total_steps=1500, num_steps=512)
    text = (longer / "metrics.csv").read_text()
    (longer / "metrics.csv").write_text(text.replace("1,512,", "1,2048,"))
    task = compare_runs([tmp_path], mix=["num_steps"], bootstrap=FAST)["tasks"]["CartPole-v1"]
    assert task["env_steps"] == 1536
    assert task["algorithms"]["ppo"]["curve"]["iqm"] == [None]  # b has made no step by then
