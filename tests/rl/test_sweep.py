"""Grids and sweeps: what is refused, what is trained, what is continued, and how points rank."""

import csv
import dataclasses
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypergrad_rl import ConfigError, EnvironmentFault, RunDirectoryError, make_config, train
from hypergrad_rl.cli import main, parse
from hypergrad_rl.comparison import compare_runs
from hypergrad_rl.config import ALGOS, hyper_parameters, read_setting, setting_text
from hypergrad_rl.grid import Point, plan, read_grid
from hypergrad_rl.report import read_metrics
from hypergrad_rl.run_directory import load_config
from hypergrad_rl.sweep import SHOWN, rank_points, sweep_table, write_sweep
from tests.rl.written_runs import FAST, ROLLOUT, write_run

STEPS = 20 * ROLLOUT
TINY = ["--total-steps", "256", "--num-envs", "2", "--num-steps", "32", "--epochs", "1",
        "--hidden", "8", "--compile", "false", "--no-tensorboard"]  # fmt: skip


def planned(root: Path, *words: str, seeds: Sequence[int] = (0, 1, 2), **fixed: Any) -> list[Point]:
    return plan(words, root, seeds, algo="blpo", env="CartPole-v1", style="tuned",
                fixed={"total_steps": STEPS, **fixed})  # fmt: skip


def finish(runs: Mapping[Path, Any], levels: Sequence[Any], ended: bool = True) -> None:
    """Write the runs as finished ones of these returns; none where that is None."""
    for (path, config), level in zip(runs.items(), levels, strict=True):
        if level is not None:
            settings = dataclasses.asdict(config)
            write_run(path, config.algo, settings.pop("seed"), level, **settings)
            reason = "all steps are made" if ended else None
            (path / "run_info.json").write_text(json.dumps({"ended": reason}))


def ranked(points: Sequence[Point], *levels: Sequence[Any]) -> dict[str, Any]:
    for point, returns in zip(points, levels, strict=True):
        finish(point.runs, returns)
    return rank_points(points, command="sweep", bootstrap=FAST)


def test_values_have_the_type_of_the_configuration() -> None:
    words = ["nested-steps=1, 5", "hidden=64x32,8", "damping=auto,1", "correction_bound=None,.5",
             "redraw_sketch=true,False", "compile=auto,false", "solver=cg"]  # fmt: skip
    grid = read_grid("blpo", words)
    assert grid == {
        "hidden": [(64, 32), (8,)], "compile": ["auto", False], "nested_steps": [1, 5],
        "solver": ["cg"], "damping": ["auto", 1.0], "redraw_sketch": [True, False],
        "correction_bound": [None, 0.5],
    }  # fmt: skip
    assert list(grid)[:2] == ["hidden", "compile"]  # as in the configuration
    assert type(grid["damping"][1]) is float
    assert grid["redraw_sketch"][0] is True


@pytest.mark.parametrize("algo", ALGOS)
def test_a_value_comes_back_from_its_text(algo: str) -> None:
    config = make_config(algo, learning_rate=1.2345678901234567e-5)
    for name in hyper_parameters(algo):
        value = getattr(config, name)
        read = read_setting(algo, name, setting_text(value))
        assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--grid: expected one or more, such as"),
        (["rank"], "--grid rank: expected NAME=VALUE,VALUE"),
        (["rank=4,0"], "--grid rank=4,0: rank='0': expected an integer >= 1"),
        (["rank=4,,8"], "rank='': expected an integer >= 1"),
        (["gamma=nan"], "gamma='nan': expected a number in [0, 1]"),
        (["rank=1e2"], "rank='1e2': expected an integer >= 1"),
        (["solver=nystorm"], "solver='nystorm': expected one of nystrom, nystrom_pcg, cg"),
        (["redraw_sketch=1"], "redraw_sketch='1': expected True or False"),
        (["hidden=64x"], "hidden='64x': expected one or more widths, each an integer >= 1, joined"),
        (["hidden=64,64"], "expected each value once (widths of one network are joined as in"),
        (["damping=1,1.0"], "--grid damping=1,1.0: expected each value once"),
        (["rank=1", "rank=2"], "rank is given twice"),
        (["nested_stps=1"], "no hyper-parameter nested_stps; did you mean nested_steps?"),
        (["actor_lr=1"], "did you mean critic_learning_rate or learning_rate?"),
        (["anneal=true"], "blpo has no hyper-parameter anneal; expected one of num_envs, "),
        (["seed=1,2"], "given by --seeds"),
        (["env=A,B"], "sweep each task by itself"),
        (["algo=ppo"], "given by --algo"),
        (["total_steps=5,6"], "given by --total-steps"),
        (["gamma=0.9,1"], "gamma is in the grid and given as --gamma"),
        (["num_envs=4,6", "envs_per_minibatch=3"], "expected a divisor of num_envs=4"),
        (["hidden=" + "x".join("9" * 130)], "expected at most 255 characters"),
    ],
)
def test_grids_that_are_refused_before_anything_trains(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for word in words for flag in ("--grid", word)]
    root = tmp_path / "sweep"
    assert main(["sweep", *flags, "--gamma", "0.95", "--run-dir", str(root)]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error
    assert not root.exists()


def test_a_grid_is_of_one_algorithm() -> None:
    assert read_grid("ppo", ["anneal=true,false"]) == {"anneal": [True, False]}
    with pytest.raises(ConfigError, match="nested has no hyper-parameter solver"):
        read_grid("nested", ["solver=cg"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--seeds", "0", "0"], "--seeds 0 0: expected each"), (["--seeds"], "--seeds: expected one"),
     (["--seeds", "-1"], "seed=-1: expected"), (["--jobs", "0"], "--jobs 0: expected"),
     (["--anneal"], "anneal=True: expected a hyper-parameter of blpo")],
)  # fmt: skip
def test_flags_that_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--grid", "rank=1,2", "--run-dir", str(tmp_path / "s"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_every_combination_has_a_directory_of_its_own(tmp_path: Path) -> None:
    points = planned(tmp_path, "rank=4,8", "learning_rate=1e-4", seeds=(0, 5), gamma=0.9)
    assert [point.name for point in points] == [
        "learning_rate=0.0001 rank=4", "learning_rate=0.0001 rank=8",
    ]  # fmt: skip
    assert [str(p.relative_to(tmp_path)) for point in points for p in point.runs] == [
        f"learning_rate=0.0001,rank={rank}/blpo-{seed}" for rank in (4, 8) for seed in (0, 5)
    ]  # fmt: skip
    config: Any = list(points[1].runs.values())[1]
    assert (config.rank, config.learning_rate, config.seed, config.gamma) == (8, 1e-4, 5, 0.9)


def test_points_rank_by_the_figures_of_a_report(tmp_path: Path) -> None:
    points = planned(tmp_path, "rank=4,8,16", seeds=range(4))
    results = ranked(points, [10, 20, 30, 400], [300, 310, 320, 30], [-40, -30, -20, -10])
    first, second, third = results["points"]
    assert [entry["values"]["rank"] for entry in (first, second, third)] == [8, 4, 16]
    task = compare_runs([tmp_path], by=["rank"], bootstrap=FAST)["tasks"]["CartPole-v1"]
    for entry in results["points"]:
        reported = task["algorithms"][f"blpo rank={entry['values']['rank']}"]
        for name in ("final_return", "area", "runs", "steps_per_second"):
            assert entry[name] == reported[name]
    notes = " ".join(results["notes"])
    assert "the intervals of 1 of 2 other points reach that of the best" in notes
    assert "intervals of fewer than 5 seeds" in notes
    assert "is the lowest" not in notes
    assert "is the highest" not in notes


def test_points_without_all_runs_come_last(tmp_path: Path) -> None:
    """The one seed that did not diverge would have been the best of all."""
    points = planned(tmp_path, "rank=4,8,16,32")
    results = ranked(points, [500, None, None], [None] * 3, [10, 20, 30], [np.nan, 1.0, 2.0])
    assert [entry["values"]["rank"] for entry in results["points"]] == [16, 32, 4, 8]
    assert "2 of 4 points lack runs" in results["notes"][0]
    assert "no episode ended" in results["notes"][1]
    unknown = ranked(planned(tmp_path / "other", "rank=4,8"), *[[np.nan, 1.0, 2.0]] * 2)
    assert not any("1 seed" in note or "reach" in note for note in unknown["notes"])
    lines = sweep_table(results).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["3", "3", "1 of 3", "0 of 3"]
    assert "unknown" in lines[3]
    assert "500.0 (no interval)" in lines[4]
    assert len({len(line) for line in lines}) == 1  # aligned
    write_sweep(results, tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    known = ("place", "rank", "finished", "final_return_iqm")
    assert [last[name] for name in known] == ["4", "8", "0", ""]


@pytest.mark.parametrize(("best", "edge"), [(1, "lowest"), (0, ""), (2, "highest")])
def test_a_best_value_at_the_edge_of_the_grid_is_told_of(
    best: int, edge: str, tmp_path: Path
) -> None:
    levels = [[400.0 if i == best else 100.0] for i in range(3)]
    notes = ranked(planned(tmp_path, "rank=16,8,32", seeds=[0]), *levels)["notes"]
    told = [note for note in notes if note.startswith("rank=")]
    assert [f"is the {edge} that was tried" in note for note in told] == [True] * bool(edge)
    assert any("1 seed has no interval" in note for note in notes)


def test_the_command_of_the_best_trains_with_its_settings_on_another_seed(tmp_path: Path) -> None:
    points = planned(tmp_path, "correction_bound=none,1", "hidden=8x16", seeds=(0, 4))
    results = ranked(points, [100, 100], [200, 200])
    words = shlex.split(results["points"][0]["command"])
    assert words[:3] == ["python", "-m", "hypergrad_rl"]
    command = parse(words[3:])
    expected = dataclasses.replace(next(iter(points[1].runs.values())), seed=5)
    assert command.config() == expected
    assert command.run_dir == next(iter(points[1].runs)).with_name("blpo-5")
    assert results["points"][0]["command"] in write_sweep(results, tmp_path)


@pytest.mark.parametrize(
    "words",
    [["rank=4"], ["rank=4,8,16"], ["rank=4,8", "damping=auto,1"],
     ["rank=4,8", "damping=auto,1", "solver=cg,exact", "hidden=8x8,64"]],
)  # fmt: skip
@pytest.mark.parametrize("level", [50.0, np.nan])
def test_pictures(words: list[str], level: float, tmp_path: Path) -> None:
    points = planned(tmp_path, *words, seeds=[0])
    write_sweep(ranked(points, *[[level]] * len(points)), tmp_path)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_files_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int]] = []

    def train_all(
        runs: Mapping[Path, Any], jobs: int, tensorboard: bool, begun: Collection[Path]
    ) -> dict[Path, Any]:
        assert (jobs, tensorboard) == (3, False)
        asked.append((len(runs), len(begun)))
        finish({p: c for p, c in runs.items() if p not in begun},
               [c.nested_steps for p, c in runs.items() if p not in begun])  # fmt: skip
        for path in begun:
            (path / "run_info.json").write_text('{"ended": "all steps are made"}')
        return {}

    monkeypatch.setattr("hypergrad_rl.sweep.train_all", train_all)
    command = ["sweep", "--grid", f"nested_steps={','.join(map(str, range(1, 31)))}", "--seeds",
               "0", "1", "--jobs", "3", "--total-steps", str(STEPS), "--no-tensorboard",
               "--run-dir", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("30 points, 60 runs of 10,240 steps; 3 at a time\n")
    assert f"and {30 - SHOWN} more, in {tmp_path / 'sweep.md'}" in out
    assert "best: nested_steps=30\npython -m hypergrad_rl train --algo blpo " in out
    page = (tmp_path / "sweep.md").read_text()
    assert f"`{shlex.join(['python', '-m', 'hypergrad_rl', *command])}`" in page
    assert page.count("\n| ") == 2 + 30  # a header and its rule
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["values"]["nested_steps"] for entry in results["points"]] == [*range(30, 0, -1)]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["nested_steps"] for row in rows] == [str(n) for n in range(30, 0, -1)]
    assert rows[0]["final_return_iqm"] == "30.0"
    # Again: what is finished stays, what has begun goes on, what is new begins.
    unfinished = tmp_path / "nested_steps=7" / "blpo-1"
    (unfinished / "run_info.json").write_text('{"ended": null}')
    assert main([*command, "--seeds", "0", "1", "2"]) == 0
    assert "90 runs of 10,240 steps, 59 of them finished and 1 begun" in capsys.readouterr().out
    assert asked == [(60, 0), (31, 1)]
    # With other flags these are other runs.
    assert main([*command, "--gamma", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "blpo-0 was trained with gamma=0.99, and the configuration has 0.5: give the" in error
    assert len(asked) == 2
    assert main(["report", str(tmp_path / "nested_steps=1"), str(tmp_path / "nested_steps=2"),
                 "--by", "nested_steps", "--output", str(tmp_path / "report")]) == 0  # fmt: skip


def test_failed_runs_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = False

    def train_all(runs: Mapping[Path, Any], *_: Any) -> dict[Path, Any]:
        first = next(iter(runs))
        if begin:
            finish({first: runs[first]}, [5.0])
        return {p: EnvironmentFault(f"hot\nmotor {p.name}") for p in list(runs)[begin:]}

    monkeypatch.setattr("hypergrad_rl.sweep.train_all", train_all)
    command = ["sweep", "--grid", "rank=4,8", "--seeds", "0", "--run-dir", str(tmp_path),
               "--total-steps", str(STEPS)]  # fmt: skip
    assert main(command) == 2  # none has begun
    assert capsys.readouterr().err == "hypergrad_rl: hot motor blpo-0\n"
    begin = True
    assert main(command) == 1
    out, error = capsys.readouterr()
    assert "| 5.0 (no interval) |" in out
    assert error.startswith(f"hypergrad_rl: hot motor blpo-0; {tmp_path / 'rank=8' / 'blpo-0'} is")
    assert error.count("\n") == 1


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hypergrad_rl.sweep.train_all", interrupt)
    command = ["sweep", "--grid", "rank=4,8", "--run-dir", str(tmp_path / "a sweep")]
    assert main(command) == 130
    again = shlex.join(["python", "-m", "hypergrad_rl", *command])
    assert capsys.readouterr().err == f"interrupted; the same command goes on: {again}\n"


def test_nothing_finished_is_no_ranking(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run of the sweep is finished"):
        rank_points(planned(tmp_path, "rank=4,8"))


def test_a_sweep_trains_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three runs one is finished and one stopped after two updates, of four."""
    command = ["sweep", "--algo", "ppo", "--grid", "clip=0.1,0.2,0.3", "--seeds", "3", "--jobs",
               "1", *TINY, "--run-dir", str(tmp_path / "sweep")]  # fmt: skip
    points = plan(["clip=0.1,0.2,0.3"], tmp_path / "sweep", [3], algo="ppo", env="CartPole-v1",
                  style="tuned", fixed={"total_steps": 256, "num_envs": 2, "num_steps": 32,
                  "epochs": 1, "hidden": (8,), "compile": False})  # fmt: skip
    (finished, config), (stopped, other), (new, _) = (
        next(iter(point.runs.items())) for point in points
    )
    train(config, finished)

    def kill(update: int, *_: Any) -> None:
        if update == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, stopped, callbacks=[kill])
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(command) == 0
    assert "1 of them finished and 1 begun" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    assert load_config(new).seed == 3
    whole = train(other).metrics
    for run in (stopped, new):
        assert read_metrics(run)["update"].tolist() == [1, 2, 3, 4]
    columns = read_metrics(stopped)
    assert columns["value_loss"].tolist() == pytest.approx([row["value_loss"] for row in whole])
    assert main(["evaluate", str(new), "--episodes", "1"]) == 0
    capsys.readouterr()
    assert main(command) == 0  # there is nothing left to train
    assert "3 of them finished and 0 begun" in capsys.readouterr().out
