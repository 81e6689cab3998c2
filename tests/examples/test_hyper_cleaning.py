"""The hyper-cleaning example: its gradient, its data, and what it claims to recover."""

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

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "hyper_cleaning.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(example: dict[str, Any]) -> Any:
    return example["Config"]()


def test_exactly_the_stated_share_of_labels_is_wrong(example: dict[str, Any], config: Any) -> None:
    data = example["make_data"](3, config)
    assert torch.equal(data.train_y != data.true_y, data.corrupted)
    assert int(data.corrupted.sum()) == 400
    assert set(data.train_y.tolist()) <= set(range(10))


def test_no_example_is_in_two_sets(example: dict[str, Any], config: Any) -> None:
    data = example["make_data"](3, config)
    every = torch.cat([data.train_x, data.validation_x, data.test_x])
    assert len(every) == 1797
    # All images of the set differ, so a repeated row would be a shared example.
    assert len(set(map(tuple, every.tolist()))) == 1797


def test_copies_are_shifted_training_images(example: dict[str, Any], config: Any) -> None:
    once = example["make_data"](3, config)
    data = example["make_data"](3, replace(config, copies=2))
    assert torch.equal(data.train_x[:1000], once.train_x)
    assert torch.equal(data.test_x, once.test_x)
    assert torch.equal(data.validation_x, once.validation_x)
    assert torch.equal(data.true_y, once.true_y.repeat(2))
    # Exactly 40% of all are wrong, whatever became of the image that a copy was made from.
    assert torch.equal(data.train_y != data.true_y, data.corrupted)
    assert int(data.corrupted.sum()) == 800
    differing = data.corrupted[:1000] != data.corrupted[1000:]
    assert 300 < int(differing.sum()) < 660  # 480 are expected, with a deviation of 22
    # Zeros come in at one side; what goes out at the other is lost. Both are undone by rolling.
    moves = set()
    images = data.train_x[:, :64].reshape(2, 1000, 8, 8)
    for image, copy in zip(images[0], images[1], strict=True):
        found = []
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            rolled = image.roll(shift, axis)
            rolled.select(axis, 0 if shift == 1 else 7).zero_()
            if torch.equal(rolled, copy):
                found.append((shift, axis))
        assert found
        moves.update(found)
    assert len(moves) == 4
    assert torch.equal(data.train_x[:, 64], torch.ones(2000, dtype=torch.float64))


def small_problem(example: dict[str, Any], config: Any) -> tuple[Any, Tensor, Tensor]:
    """A hundred examples at an inner solution, with weights that are not all alike."""
    full = example["make_data"](0, config)
    data = example["Data"](
        full.train_x[:100],
        full.train_y[:100],
        full.corrupted[:100],
        full.true_y[:100],
        full.validation_x,
        full.validation_y,
        full.test_x,
        full.test_y,
    )
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(100, dtype=torch.float64, generator=generator, requires_grad=True)
    return data, logits, solution(example, config, data, logits)


def solution(example: dict[str, Any], config: Any, data: Any, logits: Tensor) -> Tensor:
    weights = torch.sigmoid(logits).detach()
    start = torch.zeros(65, 10, dtype=torch.float64)
    return example["train"](data.train_x, data.train_y, weights, config.l2, start, 1e-8)


def test_gradient_is_that_of_finite_differences(example: dict[str, Any], config: Any) -> None:
    config = replace(config, l2=0.1)  # quick to solve to many digits
    data, logits, w = small_problem(example, config)

    def ihvp(hvp_fn: Any, v: Tensor) -> Any:
        return hypergrad.cg_ihvp(hvp_fn, v, damping=config.l2, rtol=1e-10, return_info=True)

    gradient, _ = example["implicit_gradient"](data, w, logits, ihvp)
    direction = torch.sign(gradient)  # all entries add up: the difference is far from rounding
    step = 1e-2

    def outer(t: float) -> float:
        shifted = solution(example, config, data, logits.detach() + t * direction)
        return float(cross_entropy(data.validation_x @ shifted, data.validation_y))

    difference = (outer(step) - outer(-step)) / (2 * step)
    # Central differences err by step^2 = 1e-4, relatively; the inner solutions by at most 25 * 1e-8
    # / l2 in norm, so the outer losses by 1e-6 at worst, of a difference of 2 step * 0.19.
    assert float(gradient @ direction) == pytest.approx(difference, rel=1e-3)


def test_gradient_is_that_of_hypergradient(example: dict[str, Any], config: Any) -> None:
    config = replace(config, l2=0.1)  # quick to solve to many digits
    data, logits, w = small_problem(example, config)

    def inner(w: Any, z: Any) -> Tensor:
        data_term = example["weighted_loss"](w, data.train_x, data.train_y, torch.sigmoid(z))
        return data_term + 0.5 * config.l2 * w.square().sum()

    def outer(w: Any, z: Any) -> Tensor:
        return cross_entropy(data.validation_x @ w, data.validation_y)

    one_call = hypergrad.hypergradient(
        inner, outer, w, logits.detach(), solver=hypergrad.CG(rtol=1e-12), damping=config.damping
    )

    def exact(hvp_fn: Any, v: Tensor) -> Any:
        damping = config.l2 + config.damping
        return hypergrad.exact_ihvp(hvp_fn, v, damping=damping, return_info=True)

    gradient, _ = example["implicit_gradient"](data, w, logits, exact)
    # CG's relative residual times the condition number of the damped Hessian, below 1e3.
    torch.testing.assert_close(gradient, one_call.grad, rtol=0, atol=1e-9 * float(gradient.norm()))


def test_training_that_does_not_converge_is_an_error(example: dict[str, Any], config: Any) -> None:
    data = example["make_data"](0, config)
    ones = torch.ones(config.num_train, dtype=torch.float64)
    start = torch.zeros(65, 10, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="training stopped at gradient"):
        example["train"](data.train_x, data.train_y, ones, config.l2, start, 1e-9, 10)


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path), "--seeds", "1", "--outer-steps", "12"])
    for name in ("nystrom", "cg"):
        row = results["seeds"][1]["solvers"][name]
        # Random weights would separate by 0.5 and recover nothing; the full run reaches 0.97, 1.0.
        assert row["gap_recovered"] > 0.5
        assert row["separation"] > 0.9
        assert row["corrupted_low"] > 0.8 * 400
        assert row["clean_low"] < 0.2 * 600
        assert row["validation_loss_by_step"][-1] < 0.8 * row["validation_loss_by_step"][0]
    assert results["seeds"][1]["solvers"]["cg"]["relative_residual_worst"] <= 1e-3
    assert results["seeds"][1]["solvers"]["nystrom"]["relative_residual_worst"] < 1.0

    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["mean"] == results["mean"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows][-2:] == ["nystrom_ihvp", "cg_ihvp"]
    assert (tmp_path / "hyper_cleaning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
def test_learned_weights_recover_the_gap(
    example: dict[str, Any], tmp_path: Path, copies: int
) -> None:
    options = ["--seeds", "0", "1", "2", "--copies", str(copies)]
    results = example["main"](["--run-dir", str(tmp_path), *options])
    baseline = results["mean"]["test_accuracy"]
    # A gap that is worth recovering: five times the standard error of an accuracy of 0.9 or more
    # on three test sets of 547.
    assert baseline["clean subset"] - baseline["everything"] > 5 * (0.9 * 0.1 / (3 * 547)) ** 0.5
    for name in ("nystrom", "cg"):
        row = results["mean"]["solvers"][name]
        assert row["gap_recovered"] >= 0.8
        # Nor is it the clean validation examples alone, or a better l2, that do it.
        assert row["test_accuracy"] > baseline["validation set alone"]
        assert row["test_accuracy"] > baseline["everything, tuned l2"]
        assert row["test_accuracy"] > baseline["everything + validation, tuned l2"]
        for report in results["seeds"].values():
            assert report["solvers"][name]["separation"] > (0.95 if copies == 1 else 0.85)
        if copies == 2:
            # Shifts harm this model, so the ceiling of the same inner problem is a low one. That of
            # the clean images without their copies is not.
            low, high = baseline["everything"], baseline["clean subset, no copies"]
            assert row["test_accuracy"] - low >= 0.8 * (high - low)
