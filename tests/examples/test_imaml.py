"""The iMAML example: its tasks, its gradient against the paper's formula, and what it claims."""

from __future__ import annotations

import csv
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "imaml.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(example: dict[str, Any]) -> Any:
    return replace(example["Config"](), hidden=3, query=2, inner_tolerance=1e-7)


def problem(example: dict[str, Any], config: Any, count: int) -> tuple[Any, Any]:
    """A start and a few tasks."""
    draw = torch.Generator().manual_seed(5)
    known, _ = example["split_digits"](draw)
    theta = example["fresh_network"](config.way, config, draw)
    return theta, known.tasks(count, config, draw)


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def shaped(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    pieces = torch.split(vector, [leaf.numel() for leaf in like.values()])
    return {
        name: piece.reshape(leaf.shape)
        for (name, leaf), piece in zip(like.items(), pieces, strict=True)
    }


def test_the_digits_of_the_test_are_never_met_before(example: dict[str, Any]) -> None:
    known, unseen = example["split_digits"](torch.Generator().manual_seed(2))
    assert len(known.images) == 6
    assert set(known.images) | set(unseen.images) == set(range(10))
    assert not set(known.images) & set(unseen.images)
    every = torch.cat([*known.images.values(), *unseen.images.values()])
    assert len(set(map(tuple, every.reshape(-1, 64).tolist()))) == 1797


def test_a_task_shows_different_images_of_one_digit_a_label(
    example: dict[str, Any], config: Any
) -> None:
    _, unseen = example["split_digits"](torch.Generator().manual_seed(2))
    dark = replace(config, light=0.0, shot=2)
    tasks = unseen.tasks(3, dark, torch.Generator().manual_seed(0))
    labels = torch.cat([tasks.support_y, tasks.query_y])
    orders = []
    for support, query in zip(tasks.support_x, tasks.query_x, strict=True):
        images = torch.cat([support, query])
        assert len(set(map(tuple, images.tolist()))) == dark.way * (dark.shot + dark.query)
        digits = [
            next(
                digit
                for digit, known in unseen.images.items()
                if bool((known.reshape(-1, 64) == image).all(1).any())
            )
            for image in images
        ]
        order = [digits[labels.tolist().index(label)] for label in range(dark.way)]
        assert digits == [order[label] for label in labels.tolist()]
        orders.append(order)
    assert orders[0] != orders[1] or orders[1] != orders[2]  # labels say nothing across tasks


def test_training_on_a_task_knows_of_no_other(example: dict[str, Any], config: Any) -> None:
    config = replace(config, inner_tolerance=1e-5)
    theta, tasks = problem(example, config, 3)
    together = example["adapt"](theta, tasks, config.proximal, config)
    for index, alone in enumerate(tasks.batches(1)):
        phi = example["adapt"](theta, alone, config.proximal, config)
        for name, leaf in phi.items():
            # Both end within |gradient| / curvature of the minimum, 1e-5 sqrt(211) / 0.3.
            torch.testing.assert_close(together[name][index], leaf[0], rtol=0, atol=1e-3)


def test_gradient_is_the_papers(example: dict[str, Any], config: Any) -> None:
    theta, tasks = problem(example, config, 2)
    result, (_, _, phi, _) = example["meta_gradient"](
        theta, tasks, hypergrad.CG(rtol=1e-11), config
    )
    expected = torch.zeros_like(flat(theta))
    for index in range(2):
        point = flat({name: leaf[index] for name, leaf in phi.items()})

        def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(example["network"](shaped(vector, theta), x), y)

        support = (tasks.support_x[index], tasks.support_y)
        query = (tasks.query_x[index], tasks.query_y)
        # Stationarity: phi = theta - grad / lambda, to the tolerance of each entry.
        moved = flat(theta) - torch.func.grad(loss)(point, *support) / config.proximal
        torch.testing.assert_close(point, moved, rtol=0, atol=1.01e-7 / config.proximal)
        curvature = torch.func.hessian(loss)(point, *support)
        matrix = torch.eye(len(point), dtype=torch.float64) + curvature / config.proximal
        expected += 0.5 * torch.linalg.solve(matrix, torch.func.grad(loss)(point, *query))
    # CG's relative residual times the condition of I + H / lambda, which is below 1e2.
    error = float((flat(result.grad) - expected).norm() / expected.norm())
    assert error < 1e-9
    # And it is H that makes the difference: without it the gradient is another.
    plain, _ = example["meta_gradient"](theta, tasks, hypergrad.Identity(), config)
    assert float((flat(plain.grad) - expected).norm() / expected.norm()) > 0.1


def test_interval_is_students(example: dict[str, Any]) -> None:
    mean, half = example["interval"]([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    # The table's quantile for four degrees of freedom, 2.7764, times sqrt(2.5 / 5).
    assert half == pytest.approx(2.7764 * 0.5**0.5, abs=1e-4)
    assert example["interval"]([0.5]) == (0.5, None)


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    options = ["--seeds", "1", "--meta-steps", "30", "--test-tasks", "24"]
    results = example["main"](["--run-dir", str(tmp_path), *options])
    accuracy = results["seeds"][1]["test_accuracy"]
    # The queries are 960 for all: a difference by chance has a standard error below 0.023.
    assert accuracy[example["IMAML"]] > accuracy[example["RANDOM"]] + 0.05
    assert accuracy[example["FIRST_ORDER"]] > accuracy[example["RANDOM"] + ", same lambda"] + 0.05
    solvers = results["seeds"][1]["solvers"]
    assert solvers[example["IMAML"]]["relative_residual"] <= 1e-3
    assert solvers[example["IMAML"]]["certificate"].startswith("The hypergradient is within")

    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["summary"]["test_accuracy"]["iMAML, CG"] == [accuracy["iMAML, CG"], None]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(accuracy)
    assert (tmp_path / "imaml.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_imaml_beats_the_start_that_is_not_learned(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path)])
    assert list(results["seeds"]) == [0, 1, 2, 3, 4]
    summary = results["summary"]
    low = summary["test_accuracy"]["iMAML, CG"][0] - summary["test_accuracy"]["iMAML, CG"][1]
    for name in ("nearest neighbour", "random start, same lambda", "random start"):
        mean, half = summary["test_accuracy"][name]
        assert low > mean + half  # the two intervals are apart
        ahead, error = summary["imaml_ahead_by"][name]
        assert ahead > error  # and so is the difference, seed by seed, from zero
    # Smaller, and of no agreed size: what H and what learning to learn add.
    for name in (example["PRETRAINED"], example["FIRST_ORDER"]):
        assert summary["imaml_ahead_by"][name][0] > 0
    for report in results["seeds"].values():
        assert report["solvers"][example["IMAML"]]["relative_residual"] <= 1e-3
