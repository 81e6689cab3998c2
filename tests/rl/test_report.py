"""Comparisons from run directories that the tests write: their figures, files and pictures."""

import csv
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypergrad_rl import EnvironmentFault, make_config
from hypergrad_rl.cli import main, parse
from hypergrad_rl.comparison import compare_runs, write_comparison
from hypergrad_rl.report import comparison_table, learning_curve, to_metrics
from hypergrad_rl.runs import find_runs
from tests.rl.written_runs import FAST, ROLLOUT, write_run, write_runs


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


def test_curves_of_runs_with_longer_rollouts(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "ppo", 0, 400, updates=3, total_steps=1500)
    longer = write_run(tmp_path / "b", "ppo", 1, 400, updates=1, total_steps=1500, num_steps=512)
    text = (longer / "metrics.csv").read_text()
    (longer / "metrics.csv").write_text(text.replace("1,512,", "1,2048,"))
    task = compare_runs([tmp_path], mix=["num_steps"], bootstrap=FAST)["tasks"]["CartPole-v1"]
    assert task["env_steps"] == 1536
    assert task["algorithms"]["ppo"]["curve"]["iqm"] == [None]  # b has made no step by then
