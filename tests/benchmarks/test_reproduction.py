"""The reproduction's command at a small size: runs skipped, continued and refused; a report."""

import csv
from pathlib import Path

import pytest

from benchmarks.reproduction import training
from benchmarks.reproduction.__main__ import _seeds, main
from benchmarks.reproduction.arms import ARMS, TASKS, plan
from hypergrad_rl import ConfigError

STEPS = 1536


def test_what_was_begun_is_finished_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["nested", "paper_nystrom"]
    words = ["run", "--tasks", "CartPole-v1", "--arms", *arms, "--seeds", "0..1", "--jobs", "1",
             "--run-dir", str(tmp_path), "--total-steps", str(STEPS)]  # fmt: skip
    runs = plan(tmp_path, ["CartPole-v1"], [0, 1], arms, total_steps=STEPS, compile=False)
    first, *_, last = runs
    training._train(first, runs[first])
    finished = (first / "metrics.csv").read_bytes()
    # Killed before its first checkpoint: a configuration, and a row at most.
    training._train(last, runs[last])
    whole = (last / "metrics.csv").read_text().splitlines()
    for name in ("checkpoint.pt", training.PROVENANCE):
        (last / name).unlink()
    (last / "metrics.csv").write_text("\n".join(whole[:2]) + "\n")

    assert main(words) == 0
    assert "1 of 4 runs are finished" in capsys.readouterr().err
    assert (first / "metrics.csv").read_bytes() == finished
    again = (last / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[5] for row in again] == [row.split(",")[5] for row in whole]

    output = tmp_path / "report"
    assert main(["report", "--run-dir", str(tmp_path), "--output", str(output)]) == 0
    with (output / "CartPole-v1.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["seeds"]) for row in table] == [("nested", "2"), (arms[1], "2")]
    assert table[1]["P(final_return over nested)"]
    with (output / "instrumentation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["arm"] == "paper_nystrom"
    # rho = 50 is above most of the spectrum: what five columns change is well below x itself.
    assert 0 < float(row["change of x against v / damping"]) < 1
    with (output / "runs.csv").open(newline="") as file:
        assert all(f"--total-steps {STEPS}" in run["command"] for run in csv.DictReader(file))
    assert (output / "comparison.png").stat().st_size > 10_000
    with (output / "provenance.csv").open(newline="") as file:
        assert len({run["commit"] for run in csv.DictReader(file)}) == 1

    words[words.index(str(STEPS))] = "2048"
    assert main(words) == 2
    assert "other settings than its arm has now" in capsys.readouterr().err


def test_a_failed_run_stops_no_other_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--tasks", "CartPole-v1", "--arms", "ppo", "--seeds", "0", "1", "--jobs", "1",
             "--run-dir", str(tmp_path), "--total-steps", "512"]  # fmt: skip
    blocked = tmp_path / "ppo" / "CartPole-v1" / "0"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run's directory belongs")
    assert main(words) == 2
    assert f"1 runs failed:\n{blocked}" in capsys.readouterr().err
    assert (blocked.parent / "1" / training.PROVENANCE).exists()


def test_every_arm_is_a_configuration_of_every_task_that_has_it() -> None:
    for task, (steps, arms) in TASKS.items():
        runs = plan(Path("x"), [task], [0, 1])
        assert len(runs) == 2 * len(arms)
        assert {config.total_steps for config in runs.values()} == {steps}
        configs = [config for path, config in runs.items() if path.name == "0"]
        assert len(set(configs)) == len(arms)  # no two arms are the same
    assert set(TASKS["CartPole-v1"][1]) == set(ARMS)
    with pytest.raises(ConfigError, match="paper_cg: not compared on Hopper-v5"):
        plan(Path("x"), ["CartPole-v1", "Hopper-v5"], [0], ["ppo", "paper_cg"])


def test_seeds_are_numbers_and_ranges() -> None:
    assert _seeds(["0..3", "2", "7"]) == [0, 1, 2, 3, 7]
