"""Scaling curves: the fit is right, every piece runs, and the command writes what it says."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import growth
from benchmarks.benchmarks import growth as suite
from benchmarks.benchmarks.memory import peak_bytes
from benchmarks.benchmarks.updates import one_update


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_power_is_fitted_by_itself() -> None:
    sizes = suite.powers(2, 1, 9)
    found = growth.fit(sizes, [3.0 * size**1.5 for size in sizes])
    assert found.exponent == pytest.approx(1.5)
    assert found.error == pytest.approx(0.0, abs=1e-7)
    assert found.factor == pytest.approx(3.0)
    assert found.first == pytest.approx(16)


def test_the_lower_half_does_not_count() -> None:
    sizes = suite.powers(10, 1, 9)
    found = growth.fit(sizes, [max(size, 10_000.0) for size in sizes])
    assert found.exponent == pytest.approx(1.0)
    assert growth.fit(sizes, [min(size, 10_000.0) for size in sizes]).exponent == pytest.approx(0)


def test_the_error_is_that_of_least_squares() -> None:
    sizes = suite.powers(2, 1, 13)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, len(sizes)))
    values = [size * n for size, n in zip(sizes, noise, strict=True)]
    x, y = np.log(sizes[6:]), np.log(values[6:])
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    found = growth.fit(sizes, values)
    assert found.exponent == pytest.approx(coefficients[0])
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]))


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="2 sizes"):
        growth.fit([1, 2, 4], [1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="positive"):
        growth.fit([1, 2, 4, 8, 16], [0.0, 2.0, 4.0, 8.0, 16.0])


def test_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "TURN_SECONDS", 1e-4)
    runs: list[int] = []

    def work(size: int) -> Callable[[], None]:
        return lambda: runs.append(size)

    least = growth.least_seconds({size: work(size) for size in (1, 2)})
    assert all(0 <= value < 1 for value in least.values())
    assert (
        runs[0] == 2
    )  # a turn is many runs, and each begins with the size that the last ended with
    assert sum(a != b for a, b in itertools.pairwise(runs)) == growth.TURNS


@pytest.mark.parametrize("curve", suite.CURVES)
def test_every_piece_has_a_theory_and_runs(curve: str) -> None:
    sizes, theory = suite.CURVES[curve].sizes, suite.CURVES[curve].theory
    assert list(sizes) == sorted(set(sizes))
    assert sum(size >= math.sqrt(sizes[0] * sizes[-1]) for size in sizes) >= 3
    works = suite.CURVES[curve].works(sizes[0])
    assert list(works) == list(theory)
    for run in works.values():
        assert peak_bytes(run) > 0


@pytest.mark.parametrize("size", suite.CURVES["parameters"].sizes[:4])
def test_as_many_parameters_as_it_says(size: int) -> None:
    v = suite.in_parameters(size)["product"].args[0]  # type: ignore[attr-defined]
    assert sum(leaf.numel() for leaf in v.values()) == pytest.approx(size, rel=0.05)


def test_every_curve_is_in_asv() -> None:
    classes = suite._Growth.__subclasses__()
    assert {cls.curve for cls in classes} == set(suite.CURVES)
    cls = next(cls for cls in classes if cls.curve == "right-hand sides")
    case, (work, size) = cls(), (cls.params[0][0], cls.params[1][0])
    case.setup(work, size)
    case.time_work(work, size)
    assert case.track_peak_bytes(work, size) > 0


@pytest.mark.parametrize("algo", ["ppo", "blpo"])
def test_an_update_is_the_same_each_time(algo: str) -> None:
    update = one_update(algo, num_envs=2, num_steps=8, epochs=1)
    assert repr(update()) == repr(update())  # by text: a statistic may be nan


def test_memory_of_a_block_grows_with_its_vectors() -> None:
    """Bytes are counted, not measured, so that theory can be held to."""
    sizes = (4, 8, 16, 32, 64)
    solves = [suite.in_right_hand_sides(m, batch=8, width=8)["CG, 20 iterations"] for m in sizes]
    peaks = [peak_bytes(solve) for solve in solves]
    found = growth.fit(sizes, peaks)
    assert found.exponent == pytest.approx(1.0, abs=0.1)


def test_the_command_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "TURNS", 1)
    growth.main(["--trial", "--only", "rank", "batch", "--output", str(tmp_path)])
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    with (tmp_path / "points.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5 * (1 + 3)
    record = json.loads((tmp_path / "exponents.json").read_text("utf-8"))
    assert [row["work"] for row in record["exponents"]][:2] == ["Nyström", "product"]
    assert all(row["memory"]["error"] >= 0 for row in record["exponents"])
    table = (tmp_path / "growth.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 4
