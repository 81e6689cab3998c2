"""The comparison of trainings: what is read from a program's marks, its tables, a run of it all."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from benchmarks.rl_peers import __main__ as command
from benchmarks.rl_peers import box_cartpole, contestants, measure, places, report
from benchmarks.rl_peers.contestants import OURS, Program
from benchmarks.rl_peers.measure import ProgramError, Run
from benchmarks.rl_peers.places import Place

PEER = Program("PPO, x", "Peer", "cleanrl", ("script",), warm_up=100, compiles=True)
MINE = replace(PEER, name="mine", environment=OURS)


def output(marks: list[tuple[int, float, float]], said: str = "hello\n") -> str:
    record = {"begin": [1.0, 5.0], "marks": marks, "versions": {"torch": "2.13"}}
    return said + json.dumps(record) + "\n"


def test_steps_are_timed_after_the_warming_up_and_compiling_is_what_is_left_before() -> None:
    # 2 ms a step of CPU and 3 of wall; ten seconds of compiling within the first 100 steps.
    marks = [(50, 3.0, 9.0), (100, 11.2, 15.3), (200, 11.4, 15.6), (300, 11.6, 15.9)]
    run = measure.read(PEER, 2, output(marks))
    assert (run.round, run.steps, run.versions) == (2, 200, "torch 2.13")
    assert run.step_cpu == pytest.approx(2000.0)
    assert run.step_wall == pytest.approx(3000.0)
    assert run.start_cpu == pytest.approx(11.2 - 1.0 - 100 * 2e-3)
    assert run.start_wall == pytest.approx(15.3 - 5.0 - 100 * 3e-3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "no marks"),
        ("SPS: 4000\n", "SPS: 4000"),
        (output([(50, 1.0, 1.0), (100, 2.0, 2.0)]), "1 marks after 100 steps"),
    ],
)
def test_a_program_without_marks_is_a_failure(said: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        measure.read(PEER, 1, said)


def run(program: Program, number: int, cpu: float, start: float) -> Run:
    return Run(number, program.group, program.name, 200, cpu, 2 * cpu, start, start, "torch 2.13")


def test_ratios_are_those_of_minima_and_of_medians(tmp_path: Path) -> None:
    runs = [run(MINE, i + 1, cpu, 9.0 - i) for i, cpu in enumerate((10.0, 12.0, 30.0))]
    runs += [run(PEER, i + 1, cpu, 0.5) for i, cpu in enumerate((70.0, 50.0, 60.0))]
    measure.write(runs, tmp_path / "runs.csv")
    mine, peer = report.rows(measure.load(tmp_path / "runs.csv"), [MINE, PEER])
    assert peer.over(peer.ours) == pytest.approx(5.0)
    assert peer.over(peer.ours, "median") == pytest.approx(5.0)
    assert mine.over(mine.ours) == 1.0
    cells = mine.cells()
    assert cells["steps/s"] == "100,000"
    assert (cells["first start, CPU s"], cells["next start, CPU s"]) == ("9.0", "7.0")
    assert cells["CPU / its PPO"] == ""  # PPO alone is compared
    text = report.markdown([mine, peer], {"LeanRL": "not there"})
    assert text.count("| mine |") == 1
    assert "CPU / its PPO" not in text
    assert "- LeanRL: not there" in text
    assert "3 a program.\n" in text
    # What BLAS and compilers make of an update depends on where it ran.
    with_place = [replace(r, processor="Chip (AVX2)") for r in runs]
    measure.write(with_place, tmp_path / "runs.csv")
    assert measure.load(tmp_path / "runs.csv")[0].processor == "Chip (AVX2)"
    text = report.markdown(report.rows(with_place, [MINE, PEER]), {})
    assert "3 a program, on Chip (AVX2).\n" in text


def test_the_processor_has_a_name() -> None:
    assert measure.processor()
    assert "\n" not in measure.processor()


def test_algorithms_are_compared_with_their_own_and_with_ppo_of_the_same_authors() -> None:
    programs = [
        replace(program, name=f"{program.name} {algorithm}", algorithm=algorithm)
        for program in (MINE, PEER)
        for algorithm in ("PPO", "BLPO")
    ]
    runs = [run(p, 1, cpu, 1.0) for p, cpu in zip(programs, (10.0, 20.0, 5.0, 40.0), strict=True)]
    rows = report.rows(runs, programs)
    assert [row.over(row.ours) for row in rows] == [1.0, 1.0, 0.5, 2.0]
    assert [row.over(row.ppo) for row in rows] == [1.0, 2.0, 1.0, 8.0]
    # Without ours there is nothing to divide by, and the times stay.
    (alone,) = report.rows(runs[3:], programs)
    assert (alone.cells()["CPU / ours"], alone.cells()["CPU, us a step"]) == ("", "40")


FAKE = """#!{python}
import json, os, sys
from pathlib import Path
if "fails" in sys.argv:
    sys.exit("it does not run here")
assert os.sched_getaffinity(0) == {{{core}}} and os.environ["OMP_NUM_THREADS"] == "1"
step = float(sys.argv[-1])
log = Path(__file__).with_name("log")
before = log.read_text() if log.exists() else ""
log.write_text(before + "x")
wall = step * (1 + len(before))  # another one each time
marks = [(i, i * step, i * wall) for i in (100, 200, 300)]
print("global_step=300")
print(json.dumps({{"begin": [0, 0], "marks": marks, "versions": {{}}}}))
"""


def test_every_program_runs_in_turns_and_what_fails_or_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = max(os.sched_getaffinity(0))
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, core=core))
    fake.chmod(0o755)
    programs = [
        replace(MINE, command=("ours", "1e-3")),
        replace(PEER, command=("script", "4e-3")),
        replace(PEER, name="Broken", command=("script", "fails")),
        replace(PEER, name="Absent", environment="purejaxrl"),
        replace(MINE, group="BLPO", command=("ours", "1e-3")),
    ]
    found = {OURS: Place(str(fake)), "cleanrl": Place(str(fake))}
    monkeypatch.setattr(command, "PROGRAMS", programs)
    monkeypatch.setattr(
        command, "find", lambda name, *_: found.get(name, Place(missing=f"get {name}"))
    )
    words = ["--output", str(tmp_path / "out"), "--rounds", "2", "--core", str(core)]
    assert command.main(words) == 1
    printed = capsys.readouterr().out
    assert "purejaxrl: skipped: get purejaxrl" in printed
    order = [line.split(": ")[1] for line in printed.splitlines() if line.startswith("round")]
    assert order == ["mine", "Peer", "mine", "mine", "Peer", "mine"]
    # One run a round is enough for what is in both groups.
    runs = [r for r in measure.load(tmp_path / "out" / "runs.csv") if r.program == "mine"]
    assert len({run.step_wall for run in runs}) == 2
    with (tmp_path / "out" / "rl_peers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["program"], row["CPU / ours"]) for row in table] == [
        ("mine", "1.00"), ("Peer", "4.00"), ("mine", "1.00"),
    ]  # fmt: skip
    text = (tmp_path / "out" / "rl_peers.md").read_text()
    assert "- PPO, x: Broken: it does not run here" in text
    assert "- purejaxrl: get purejaxrl" in text
    assert (tmp_path / "out" / "rl_peers.png").stat().st_size > 5_000
    assert command.main([*words, "--draw-only"]) == 0
    assert (tmp_path / "out" / "rl_peers.md").read_text() == text


def test_a_checkout_that_is_not_there_is_skipped_with_a_word_on_how_to_get_it(
    tmp_path: Path,
) -> None:
    place = places.find("cleanrl", tmp_path, {}, {})
    assert "git clone https://github.com/vwxyzjn/cleanrl" in place.missing
    assert "--checkout cleanrl=PATH" in place.missing
    (tmp_path / "mine" / "cleanrl").mkdir(parents=True)
    (tmp_path / "mine" / "cleanrl" / "ppo.py").touch()
    place = places.find("cleanrl", tmp_path, {"cleanrl": tmp_path / "mine"}, {"cleanrl": "python9"})
    assert place == Place("python9", str(tmp_path / "mine"))
    with pytest.raises(SystemExit):
        command.main(["--checkout", "nobody=here"])


def test_each_group_begins_with_ours_and_no_name_is_twice() -> None:
    groups: dict[str, list[Program]] = {}
    for program in contestants.PROGRAMS:
        groups.setdefault(program.group, []).append(program)
        assert program.environment in contestants.ENVIRONMENTS
        module = measure.ROOT / "benchmarks" / "rl_peers" / "programs" / f"{program.command[0]}.py"
        assert module.is_file()
    for programs in groups.values():
        assert programs[0].environment == OURS
        assert len({program.name for program in programs}) == len(programs)
        for program in programs:
            assert any(p.environment == OURS and p.algorithm == program.algorithm for p in programs)


def test_cartpole_by_a_sign_is_cartpole() -> None:
    task: Any = gymnasium.make(f"{box_cartpole.__name__}:BoxCartPole-v1")
    plain: Any = gymnasium.make("CartPole-v1")
    assert task.spec.max_episode_steps == plain.spec.max_episode_steps
    obs, other = task.reset(seed=3)[0], plain.reset(seed=3)[0]
    for push in (0.3, -2.0, 1e-6, -1e-6):
        assert (obs == other).all()
        obs, other = task.step([push])[0], plain.step(int(push > 0))[0]
    assert (obs == other).all()
