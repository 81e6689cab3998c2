"""The benchmarks run: each one once, in its smallest case."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import itertools
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks import report
from benchmarks.benchmarks import problems, speed, stability
from hypergrad.operators import compilation

ROOT = Path(__file__).parents[2]


# What is timed is the work, however right the answer of so small a sketch is.
pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measurements(suite: type) -> list[str]:
    names = [name for name, _ in inspect.getmembers(suite, inspect.isfunction)]
    return [name for name in names if name.startswith(("time_", "track_"))]


@pytest.mark.parametrize("problem", list(problems.PROBLEMS))
@pytest.mark.parametrize(
    ("suite", "name"),
    [
        (suite, name)
        for suite in (speed.SolverRatios, speed.Seconds)
        for name in measurements(suite)
    ],
)
def test_solver_speed(suite: type, name: str, problem: str) -> None:
    small = type("Small", (suite,), {"problems": problems.SMALL_PROBLEMS})()
    small.setup(problem)
    value = getattr(small, name)(problem)
    if name.startswith("track_"):
        assert 0 < value < math.inf


@pytest.mark.parametrize("problem", list(problems.PROBLEMS))
@pytest.mark.parametrize("kind", speed.ProductRatios.kinds)
def test_product_speed(kind: str, problem: str) -> None:
    class Small(speed.ProductRatios):
        problems = problems.SMALL_PROBLEMS

    small = Small()
    small.setup(problem, kind)
    for name in measurements(Small):
        assert 0 < getattr(small, name)(problem, kind) < math.inf


def test_own_seconds() -> None:
    suite = speed.OwnSeconds()
    suite.setup(30)
    for name in measurements(speed.OwnSeconds):
        getattr(suite, name)(30)


class FewRightHandSides(speed.ManyRightHandSides):
    problems = problems.SMALL_PROBLEMS
    many = 3


@pytest.mark.parametrize("mode", speed.ManyRightHandSides.modes)
@pytest.mark.parametrize("solver", speed.ManyRightHandSides.solvers)
def test_many_right_hand_sides_have_the_answers_of_separate_solves(
    solver: str, mode: Literal["reverse_over_reverse"]
) -> None:
    suite = FewRightHandSides()
    suite.setup(solver, mode)
    together = suite.together()
    for i, one in enumerate(suite.apart()):
        gap = torch.cat([(together[name][i] - leaf).reshape(-1) for name, leaf in one.items()])
        size = torch.cat([leaf.reshape(-1) for leaf in one.values()])
        # The same iterations; but 20 of them amplify the rounding of float32 products.
        assert float(gap.norm()) <= 0.03 * float(size.norm())
    assert 0 < suite.track_block_over_separate(solver, mode) < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("solver", speed.ManyRightHandSides.solvers)
def test_many_right_hand_sides_cost_a_third_of_separate_solves(solver: str) -> None:
    suite = speed.ManyRightHandSides()
    suite.setup(solver, "forward_over_reverse")  # type: ignore[arg-type]
    assert suite.track_block_over_separate(solver, "forward_over_reverse") <= 0.35


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        pytest.param(problem, solver, marks=() if solver == "CG" else pytest.mark.slow)
        for problem, solver in itertools.product(*speed.OneGraph.params)
        if problem == "logistic" or solver != "CG"
    ],
)
@pytest.mark.usefixtures("capture_only")
def test_a_solve_as_one_graph_is_the_same_solve(problem: str, solver: str) -> None:
    suite = speed.OneGraph()
    suite.setup(problem, solver)
    eager, compiled = (suite.solve(solver, compile).info for compile in (False, True))
    assert compiled.status is eager.status
    # Those of twenty iterations in float32 are the rounding of their directions, too.
    assert 0.1 < compiled.relative_residual / eager.relative_residual < 10
    assert suite.track_compiled_over_eager(problem, solver) > 0


@pytest.mark.usefixtures("capture_only")
def test_a_solve_in_mixed_precision_is_the_same_solve() -> None:
    suite = speed.MixedPrecision()
    suite.setup("logistic")
    suite.problem = dataclasses.replace(suite.problem, repeats=1)
    mixed, wide = (suite.solve(mixed).info for mixed in (True, False))
    assert max(mixed.relative_residual, wide.relative_residual) <= suite.RTOL
    assert any("in float32" in graph.what for graph in compilation._graphs.values())
    assert suite.track_mixed_over_float64("logistic") > 0


@pytest.mark.parametrize("spectrum", problems.SPECTRA)
@pytest.mark.parametrize("solver", list(stability.SOLVERS))
def test_errors(solver: str, spectrum: str) -> None:
    value = stability.log10_error(solver, spectrum, "float64", 1e-2, dim=12)
    assert not math.isnan(value)
    if solver == "exact":
        # The error of a backward stable solve is about n eps over the gap to zero, here >= 1e-4.
        assert value < -9


def test_asv_publishes_what_has_no_answer() -> None:
    from asv.step_detect import detect_steps

    suite = stability.Errors()
    values = [
        suite.track_error(solver, "dead rows", "float64", 1e-2)
        for solver in ("exact", "woodbury columns")  # the latter divides by zero there
    ]
    assert stability.log10_error("woodbury columns", "dead rows", "float64", 1e-2) == math.inf
    assert [len(detect_steps([value])) for value in values] == [1, 0]


def test_an_error_is_one_that_is_made() -> None:
    # Half the answer has the relative error 1/2.
    exact = stability.SOLVERS["exact"]
    stability.SOLVERS["half"] = lambda a, v, damping: 0.5 * exact(a, v, damping)
    try:
        value = stability.log10_error("half", "flat", "float64", 1e-2, dim=12)
    finally:
        del stability.SOLVERS["half"]
    assert value == pytest.approx(math.log10(0.5), abs=0.01)


@pytest.mark.parametrize(
    ("sketch", "dim"),
    # The same columns are drawn by both; of Gaussian sketches only a complete one is the same.
    [("columns", stability.RANK + 10), ("gaussian", stability.RANK)],
)
def test_the_two_forms_of_nystrom_are_the_same_map(sketch: stability.Sketch, dim: int) -> None:
    # On an easy system both are right to rounding, so they solve the same one.
    a = problems.spectral("1/i", torch.float64, dim=dim)
    v = torch.ones(dim, dtype=torch.float64)
    raw = stability.woodbury(a, v, 1.0, sketch)
    torch.testing.assert_close(raw, stability.nystrom(a, v, 1.0, sketch), rtol=1e-8, atol=0)


@pytest.mark.parametrize("solver", list(stability.SOLVERS))
def test_scales(solver: str) -> None:
    suite = stability.Scales()
    suite.setup(solver, "float64", 1e30)
    assert not math.isnan(suite.track_error(solver, "float64", 1e30))


@pytest.mark.parametrize("spectrum", problems.SPECTRA)
def test_a_spectrum_is_what_it_says(spectrum: str) -> None:
    a = problems.spectral(spectrum, torch.float64, dim=60)
    values = torch.linalg.eigvalsh(a.dense())
    assert float(values.abs().max()) == pytest.approx(1.0)
    assert bool((values < -1e-12).any()) == (spectrum == "indefinite")
    rank = int((values.abs() > 1e-12).sum())
    assert rank == (20 if spectrum in ("rank-deficient", "dead rows") else 60)
    dead = int((a.dense() == 0).all(dim=1).sum())
    assert dead == (40 if spectrum == "dead rows" else 0)


def test_the_report_draws(tmp_path: Path) -> None:
    report.main(["--trial", "--output", str(tmp_path)])
    for name in ("errors", "ratios"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) > 10


def test_the_configuration_measures_this_checkout() -> None:
    config = json.loads((ROOT / "benchmarks" / "asv.conf.json").read_text("utf-8"))
    assert config["environment_type"] == "existing"
    assert (ROOT / "benchmarks" / config["benchmark_dir"] / "speed.py").is_file()
    assert (ROOT / "benchmarks" / config["repo"] / "pyproject.toml").is_file()


def test_one_command_measures_publishes_and_draws() -> None:
    made = (ROOT / "Makefile").read_text("utf-8").split("\nbench: ")[1].split("\n\n")[0]
    steps = [line.split(" -m ")[1].split(" >")[0] for line in made.splitlines()[1:]]
    assert [step.split(" --python")[0] for step in steps] == [
        "asv machine --yes", "asv run", "asv publish", "benchmarks.report",
    ]  # fmt: skip
    # Without a commit's name asv keeps nothing of a run in an existing environment.
    assert "--set-commit-hash $$(git rev-parse HEAD)" in steps[1]
