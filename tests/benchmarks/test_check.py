"""The check for regressions: it passes, it fails, and it knows what it does not know."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import check
from benchmarks.benchmarks import timing

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")


def test_more_than_a_fifth_is_a_fault() -> None:
    assert check.compare({"a": 1.19, "b": 0.5}, {"a": 1.0, "b": 1.0}) == []
    assert check.compare({"a": 1.21}, {"a": 1.0}) == ["a: 1.21, 21% more than 1.00"]
    (unknown,) = check.compare({"a": 1.0}, {})
    assert "without a baseline" in unknown
    (gone,) = check.compare({}, {"a": 1.0})
    assert "not measured" in gone


def test_the_baseline_holds_every_ratio() -> None:
    ratios = json.loads(check.BASELINE.read_text("utf-8"))["ratios"]
    assert ratios.keys() == check.CASES.keys()
    assert all(0 < value < 100 for value in ratios.values())


def test_a_run_compares_with_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.json"
    arguments = ["--trial", "--baseline", str(baseline)]
    assert check.main([*arguments, "--update"]) == 0
    record = json.loads(baseline.read_text("utf-8"))
    assert record["ratios"].keys() == check.CASES.keys()
    for factor, code in ((100.0, 0), (0.01, 1)):
        ratios = {name: factor * value for name, value in record["ratios"].items()}
        baseline.write_text(json.dumps(record | {"ratios": ratios}), encoding="utf-8")
        assert check.main(arguments) == code
    assert "more than" in capsys.readouterr().out


@pytest.mark.parametrize(("slower", "code"), [(0.5, 0), (1.0, 0), (1.19, 0), (1.21, 1), (2.0, 1)])
def test_a_solver_that_became_slower_fails_the_check(
    slower: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the clock to the exit code: a solver that takes its time by a clock of its own."""
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing, "clock", lambda: now)
    case = check.Case(
        "critic",
        lambda problem: partial(spend, 1.5 * slower),
        lambda problem: partial(spend, 1.0),
    )
    monkeypatch.setattr(check, "CASES", {"solver / products": case})
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"ratios": {"solver / products": 1.5}}), encoding="utf-8")
    assert check.main(["--baseline", str(baseline)]) == code
