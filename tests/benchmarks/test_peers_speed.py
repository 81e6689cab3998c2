"""The comparison of times: everybody solves the same system, and the tables say what was found."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import __main__ as peers
from benchmarks.peers.speed import __main__ as speed
from benchmarks.peers.speed import making, ours, report, serve, torch_peers, turns
from benchmarks.peers.speed.contenders import Contender, Solved, Team
from benchmarks.peers.speed.problems import LEVELS, Problem, load, save
from benchmarks.peers.speed.torch_problems import Given, TorchProduct
from benchmarks.peers.speed.turns import Row, Trial, least_work


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {problem.facts.name: problem for problem in making.make_all(making.SMALL)}


def row(problem: str, level: float, owner: str, seconds: float, **other: Any) -> Row:
    known: dict[str, Any] = {
        "solver": "cg", "knob": "iterations", "work": 7, "median": seconds, "error": level / 2,
        "hvps": 8, "products": 1e-4, "compiled": 0.0, "note": "",
    }  # fmt: skip
    return Row(problem, level, LEVELS[level], owner, seconds=seconds, **(known | other))


# Problems -------------------------------------------------------------------------------------


def test_the_references_solve_the_systems_in_both_dtypes(problems: dict[str, Problem]) -> None:
    kinds = set()
    for problem in problems.values():
        facts = problem.facts
        kinds.add(facts.kind)
        assert facts.smallest + facts.damping > 0  # positive definite: everybody is in his element
        assert facts.error_bound < 1e-10
        for dtype, allowed in (("float64", 1e-9), ("float32", 1e-4)):
            cast = problem.as_dtype(dtype)
            product = Given(cast).product()
            image = product(torch.from_numpy(cast.truth.astype(dtype))).numpy()
            residual = cast.v - image - facts.damping * cast.truth
            assert np.linalg.norm(residual) <= allowed * np.linalg.norm(cast.v)
            # No rounding of what the problem is made of: the same solution in both.
            for name, array in cast.arrays.items():
                assert np.array_equal(
                    array.astype(problem.arrays[name].dtype), problem.arrays[name]
                )
    assert kinds == {"logistic", "mlp", "dense", "mirror"}


def test_a_file_holds_all_of_a_problem(problems: dict[str, Problem], tmp_path: Path) -> None:
    save(problems.values(), tmp_path / "problems.npz")
    again = load(tmp_path / "problems.npz")
    assert list(again) == list(problems)
    for name, problem in problems.items():
        assert again[name].facts == problem.facts
        assert again[name].arrays.keys() == problem.arrays.keys()
        assert again[name].relative_error(problem.truth) == 0.0
        assert again[name].relative_error(np.full_like(problem.truth, np.nan)) == math.inf


def test_products_of_columns_are_counted_as_products(problems: dict[str, Problem]) -> None:
    problem = next(problem for problem in problems.values() if problem.facts.kind == "mirror")
    product = TorchProduct(Given(problem).product())
    columns = np.eye(problem.facts.size)[:, :3]
    alone = np.stack([product(column) for column in columns.T.copy()], axis=1)
    np.testing.assert_allclose(product(columns), alone)
    assert product.count == 6


# The search -----------------------------------------------------------------------------------


def halving(work: int) -> Trial:
    """An error that halves with each iteration, a millisecond each."""
    return Trial(1e-3 * work, 2.0**-work)


def test_the_least_work_that_suffices_is_found() -> None:
    assert least_work(halving, 0.01, limit=10.0) == 7  # 2^-7 < 0.01 < 2^-6
    assert least_work(halving, 0.6, limit=10.0) == 1


def test_who_never_arrives_costs_no_more_than_the_limit() -> None:
    seen: list[int] = []

    def slow(work: int) -> Trial:
        seen.append(work)
        return Trial(0.1 * work, 1.0 / work)

    assert least_work(slow, 1e-9, limit=1.0) is None
    assert max(seen) == 16

    seen.clear()

    def stuck(work: int) -> Trial:
        seen.append(work)
        return Trial(1e-6, 0.5)

    assert least_work(stuck, 1e-9, limit=1.0) is None
    assert max(seen) <= 16
    assert least_work(lambda work: None, 0.1, limit=1.0) is None


# Processes and rounds -------------------------------------------------------------------------


class Local:
    """A server in this process, behind the same lines of JSON."""

    def __init__(self, members: Team, problems: dict[str, Problem]) -> None:
        self.members, self.problems, self.asked = members, problems, 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked += 1
        out = io.StringIO()
        serve.serve(self.members, self.problems, [json.dumps(request)], out)
        answer: dict[str, Any] = json.loads(out.getvalue())
        return answer

    def close(self) -> None:
        pass


def fake() -> Team:
    """One that is exact, one that is always wrong, one that raises, one that does not suit."""

    def exact(problem: Problem) -> Any:
        return lambda work: Solved(problem.truth * (1 + 2.0**-work), work)

    def wrong(problem: Problem) -> Any:
        return lambda work: Solved(np.zeros_like(problem.truth), work)

    def raising(problem: Problem) -> Any:
        def solve(work: int) -> Solved:
            raise ZeroDivisionError("no such thing")

        return solve

    members = (
        Contender("exact", exact), Contender("wrong", wrong), Contender("raising", raising),
        Contender("large", exact, suits=lambda facts: "too large for it"),
    )  # fmt: skip
    return Team("fake", members, {"absent": "No module named 'absent'"})


def test_every_contender_has_a_row_at_every_level(problems: dict[str, Problem]) -> None:
    name = next(iter(problems))
    rows = turns.compare(
        name, [Local(fake(), problems)], rounds=2, limit=1.0, patience=1e9, say=lambda words: None
    )
    assert len(rows) == 5 * len(LEVELS)
    by = {(one.solver, one.level): one for one in rows}
    for level in LEVELS:
        assert by["exact", level].error <= level
        assert by["exact", level].seconds <= by["exact", level].median < math.inf
        # The quickest setting: an iteration less would not do.
        assert 2.0 ** -(by["exact", level].work * 0.95 - 1) > level
        assert by["wrong", level].seconds == math.inf
        assert "not reached: 1.0e+00 at best" in by["wrong", level].note
        assert by["raising", level].note == "ZeroDivisionError: no such thing"
        assert by["large", level].note == "too large for it"
        assert by["absent", level].note == "No module named 'absent'"


@pytest.mark.parametrize("solver", ["CG", "CG, fixed", "MINRES", "GMRES", "Exact", "auto"])
def test_ours_reaches_the_references(problems: dict[str, Problem], solver: str) -> None:
    contender = next(one for one in ours.team().contenders if one.name == solver)
    for problem in problems.values():
        answer = contender.prepare(problem)(40)
        assert problem.relative_error(np.asarray(answer.x)) < 1e-7
        assert answer.hvps is not None


def test_adapters_of_the_atlas_serve_here_too(problems: dict[str, Problem]) -> None:
    members = torch_peers.team("scipy")
    assert [one.name for one in members.contenders] == ["cg", "minres", "gmres"]
    for problem in problems.values():
        answer = members.contenders[0].prepare(problem)(2 * problem.facts.size)
        assert problem.relative_error(np.asarray(answer.x)) < 1e-7
        assert answer.hvps is not None
    assert torch_peers._small_enough(replace(next(iter(problems.values())).facts, size=801))


def test_a_process_answers_and_its_last_words_are_kept(
    problems: dict[str, Problem], tmp_path: Path
) -> None:
    save(list(problems.values())[-1:], tmp_path / "problems.npz")
    name = list(problems)[-1]
    worker = turns.Worker(sys.executable, "scipy", tmp_path / "problems.npz", 0)
    request = {"do": "solve", "problem": name, "dtype": "float64", "solver": "cg", "work": 40,
               "times": 2}  # fmt: skip
    answer = worker.ask(request)
    worker.close()
    assert answer["error"] < 1e-7
    assert len(answer["seconds"]) == 2
    broken = turns.Worker(sys.executable, "no_such_adapter", tmp_path / "problems.npz", 0)
    with pytest.raises(ConnectionError, match="no_such_adapter"):
        broken.ask(request)


# Tables ---------------------------------------------------------------------------------------


def some_rows() -> list[Row]:
    return [
        row("a", 1e-2, "hypergrad", 1e-3),
        row("a", 1e-2, "hypergrad", 2e-3, solver="MINRES"),
        row("a", 1e-2, "SciPy", 1.5e-3),
        row("a", 1e-2, "JAX", 0.5e-3, hvps=None, compiled=1.5),
        row("a", 1e-2, "betty", math.inf, error=0.3, note="not reached"),
        row("a", 1e-8, "hypergrad", 1e-3),
        row("a", 1e-8, "SciPy", 9e-3),
        row("a", 1e-8, "JAX", 2e-3),
        row("a", 1e-8, "betty", math.inf, error=math.nan, note="ZeroDivisionError"),
    ]


def test_ratios_are_of_the_best_of_each(tmp_path: Path) -> None:
    lines = report.ratio_table(some_rows()).splitlines()
    assert lines[0] == "| | error | library, ms | SciPy | JAX | betty |"
    assert lines[2] == "| a | $10^{-2}$ | 1, cg | 1.5 | 0.5 | no (3e-01) |"
    assert lines[3] == "| a | $10^{-8}$ | 1, cg | 9 | 2 | no |"


def test_what_falls_short_is_listed_with_what_the_time_goes_to() -> None:
    lines = report.short_of(some_rows()).splitlines()[2:]
    assert len(lines) == 2  # SciPy below twice, JAX below once; none at 1e-8
    assert lines[0].startswith("| a | $10^{-2}$ | PyTorch | 1.5 | cg, 1 ms | 8 HVPs, 0.1 ms |")
    assert lines[1].startswith("| a | $10^{-2}$ | JAX | 0.5 |")
    rows = [row("b", 1e-2, "hypergrad", math.inf), row("b", 1e-2, "JAX", 1.0)]
    assert "not reached" in report.short_of(rows).splitlines()[2]
    assert "JAX cg | 1.5 |" in report.compiled_table(some_rows())


def test_a_csv_is_read_as_it_was_written_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    assert report.read(path) == []
    rows = some_rows()
    report.append(rows[:5], path)
    report.append(rows[5:], path)
    assert [repr(one) for one in report.read(path)] == [repr(one) for one in rows]
    report.write(tmp_path)
    assert (tmp_path / "ratios.png").stat().st_size > 10_000
    assert "no (3e-01)" in (tmp_path / "ratios.md").read_text("utf-8")


# The command ----------------------------------------------------------------------------------


def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "install", lambda package, directory: "ERROR: no such thing")
    monkeypatch.setattr(speed, "version", lambda name, python: "")
    last = list(making.SMALL.items())[-1:]
    monkeypatch.setattr(making, "SMALL", dict(last))
    arguments = ["--trial", "--output", str(tmp_path), "--rounds", "1", "--limit", "0.01"]
    speed.main([*arguments, "--only", "pyDVL", "jax", "--python", "jax=/nowhere/python"])
    said = capsys.readouterr().out
    assert "pyDVL : ERROR: no such thing" in said
    assert "jax : /nowhere/python is no interpreter" in said
    assert "no such thing" in (tmp_path / "versions.csv").read_text("utf-8")


def test_the_environment_of_jax_holds_all_three() -> None:
    assert speed.JAX.beside == ("lineax", "jaxopt")
    assert {package.name for package in peers.PACKAGES} < set(speed.NAMES)
