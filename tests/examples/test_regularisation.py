"""The regularisation example: its inner solver, its gradient, and what it claims of its speed."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "regularisation.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


def make_problem(example: dict[str, Any], name: str, **changes: Any) -> Any:
    task = replace(example["TASKS"][name], **changes)
    return example["Problem"](task, example["make_data"](task, 3, example["Config"]()))


@pytest.mark.parametrize("name", ["diabetes", "digits", "breast cancer"])
def test_every_fold_is_held_out_once_and_the_test_rows_never_seen(
    example: dict[str, Any], name: str
) -> None:
    data = make_problem(example, name).data
    repeats = len(data.trains) // 10
    assert torch.equal(10 * repeats - data.trains.sum(0), torch.full((len(data.y),), repeats))
    seen = set(map(tuple, data.x.tolist()))
    # No two rows of a set are alike, so a repeated one would be a shared example.
    assert not any(tuple(row) in seen for row in data.test_x.tolist())
    assert len(data.y) + len(data.test_y) in (442, 1797, 569)


@pytest.mark.parametrize("name", ["diabetes", "digits", "breast cancer"])
def test_derivatives_of_the_losses_are_those_of_autograd(
    example: dict[str, Any], name: str
) -> None:
    task = example["TASKS"][name]
    margin = torch.linspace(-3, 3, 7, dtype=torch.float64)
    y = torch.tensor([-1.0, 1, -1, 1, 1, -1, 1], dtype=torch.float64)
    slope = torch.func.grad(lambda m: task.loss(m, y).sum())
    torch.testing.assert_close(task.slope(margin, y), slope(margin))
    curvature = torch.func.jvp(slope, (margin,), (torch.ones_like(margin),))[1]
    torch.testing.assert_close(task.curvature(margin, y), curvature)


@pytest.mark.parametrize("name", ["diabetes", "digits", "breast cancer"])
def test_newton_solves_the_inner_problems(example: dict[str, Any], name: str) -> None:
    problem = make_problem(example, name, repeats=1)
    z = torch.linspace(-5, 1, problem.num_strengths, dtype=torch.float64)
    w, _ = problem.solve(z, problem.start(), 1e-12)
    gradient = torch.func.grad(problem.inner_loss)(w, z)
    # A decrement d leaves a gradient below sqrt(d L); one more step squares it.
    assert float(gradient.abs().max()) < 1e-7


def test_gradient_is_that_of_differences(example: dict[str, Any]) -> None:
    problem = make_problem(example, "breast cancer", repeats=1)
    z = torch.full((problem.num_strengths,), -3.0, dtype=torch.float64)

    def solve(init: Any, z: Any) -> Tensor:
        w: Tensor = problem.solve(z, init, 1e-16)[0]
        return w

    check = hypergrad.check_hypergradient(
        problem.inner_loss,
        problem.outer_loss,
        solve(problem.start(), z),
        z,
        solve_inner=solve,
        solver=hypergrad.CG(rtol=1e-10),
        generator=torch.Generator().manual_seed(0),
    )
    assert check.verdict is hypergrad.Verdict.PASSED, check.message


def test_ridge_on_each_fold_is_the_closed_form(example: dict[str, Any]) -> None:
    problem = make_problem(example, "diabetes", repeats=1)
    z = torch.linspace(-5, 1, problem.num_strengths, dtype=torch.float64)
    w, _ = problem.solve(z, problem.start(), 1e-12)
    rows = problem.data.trains[4].bool()
    x, y = problem.data.x[rows], problem.data.y[rows]
    penalty = torch.diag(problem.penalty(z))
    expected = torch.linalg.solve(x.T @ x / len(y) + penalty, x.T @ y / len(y))
    torch.testing.assert_close(w[4], expected, rtol=1e-9, atol=1e-11)


def test_a_few_hypergradients_beat_a_hundred_random_points(
    example: dict[str, Any], tmp_path: Path
) -> None:
    options = ["--run-dir", str(tmp_path), "--seeds", "0", "--rounds", "1"]
    results = example["main"]([*options, "--tasks", "digits"])
    row = results["tasks"]["digits"][0]
    # In evaluations, which do not depend on the machine: a fifth would be 20 of them.
    assert row["evaluations_until_as_good"] <= 5
    assert row["methods"]["hypergradient"]["loss"] < 0.9 * row["random_loss"]
    assert row["methods"]["random"]["evaluations"] == 100
    assert row["methods"]["random around a level"]["evaluations"] == 100
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["tasks"]["digits"]["0"]["random_loss"] == row["random_loss"]
    assert len((tmp_path / "results.csv").read_text("utf-8").splitlines()) == 1 + 4
    assert (tmp_path / "regularisation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_as_good_as_random_search_in_a_fifth_of_its_time(
    example: dict[str, Any], tmp_path: Path
) -> None:
    results = example["main"](["--run-dir", str(tmp_path)])
    for seeds in results["tasks"].values():
        assert len(seeds) == 5
        for row in seeds.values():
            # Both times are least times of three rounds in turns, so their ratio is the claim.
            assert row["time_share"] <= 1 / 5
            assert row["loss_at_a_fifth"] <= row["random_loss"]
