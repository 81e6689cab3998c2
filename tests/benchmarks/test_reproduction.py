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
    arms = ["nested", "paper_nystrom", "ppo"]
    words = ["run", "--tasks", "CartPole-v1", "--arms", *arms, "--seeds", "0..1", "--jobs", "1",
             "--run-dir", str(tmp_path), "--total-steps", str(STEPS)]  # fmt: skip
    runs = plan(tmp_path, ["CartPole-v1"], [0, 1], arms, total_steps=STEPS, compile=False)
    finished, killed, blocked = (
        tmp_path / arm / "CartPole-v1" / str(seed)
        for arm, seed in (("nested", 0), ("paper_nystrom", 1), ("ppo", 0))
    )
    for path, config in runs.items():
        if path.parts[-3] != "ppo":
            training._train(path, config)
    left = (finished / "metrics.csv").read_bytes()
    # Before its first checkpoint a run has a configuration, and rows.
    whole = (killed / "metrics.csv").read_text().splitlines()
    for name in ("checkpoint.safetensors", training.PROVENANCE):
        (killed / name).unlink()
    (killed / "metrics.csv").write_text("\n".join(whole[:2]) + "\n")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run's directory belongs")

    assert main(words) == 2  # one fails, the others are finished
    printed = capsys.readouterr().err
    assert "3 of 6 runs are finished" in printed
    assert f"1 runs failed:\n{blocked}" in printed
    assert (finished / "metrics.csv").read_bytes() == left
    again = (killed / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[5] for row in again] == [row.split(",")[5] for row in whole]
    assert (blocked.parent / "1" / training.PROVENANCE).exists()

    output = tmp_path / "report"
    assert main(["report", "--run-dir", str(tmp_path), "--output", str(output)]) == 0
    with (output / "CartPole-v1.csv").open(newline="") as file:
        table = {row["arm"]: row for row in csv.DictReader(file)}
    assert {arm: row["seeds"] for arm, row in table.items()} == {
        "ppo": "1", "nested": "2", "paper_nystrom": "2"
    }  # fmt: skip
    assert "[" in table["paper_nystrom"]["P(area under curve > nested)"]
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

    blocked.unlink()
    words[words.index(str(STEPS))] = "2048"
    assert main(words) == 2
    assert "other settings than its arm has now" in capsys.readouterr().err


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
