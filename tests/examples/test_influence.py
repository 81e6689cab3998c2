"""The influence example: its derivatives, its retraining, and how the one predicts the other."""

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

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "influence.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def small(example: dict[str, Any]) -> tuple[Any, Any, Tensor]:
    """150 training and 10 test digits, and the model trained on all of them."""
    config = replace(example["Config"](), num_train=150, num_test=10, num_retrained=8)
    data = example["make_data"](config)
    return config, data, trained(example, data, torch.ones(150, dtype=torch.float64), 0.01)


def trained(example: dict[str, Any], data: Any, weights: Tensor, l2: float) -> Tensor:
    w: Tensor = example["train"](data, weights, l2, torch.zeros(65, 10, dtype=torch.float64), 1e-12)
    return w


def test_training_ends_at_the_minimum(example: dict[str, Any], small: Any) -> None:
    _, data, w = small
    w = w.clone().requires_grad_()
    loss = cross_entropy(data.train_x @ w, data.train_y) + 0.005 * w.square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.norm()) <= 1.1e-12  # the same sum in another order


def test_training_that_does_not_converge_is_an_error(example: dict[str, Any], small: Any) -> None:
    _, data, w = small
    ones = torch.ones(150, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="training stopped at a gradient"):
        example["train"](data, ones, 0.01, torch.zeros_like(w), 1e-12, max_steps=2)


def test_leaving_one_out_is_training_on_the_others(example: dict[str, Any], small: Any) -> None:
    config, data, w = small

    class Silent:
        def update(self) -> None: ...
        def set_description(self, text: str) -> None: ...

    changes = example["leave_one_out"](data, 0.01, w, config, Silent())
    assert changes.shape == (10, 8)
    rest = example["Data"](data.train_x[1:], data.train_y[1:], data.test_x, data.test_y)
    # The mean over one fewer, with a weight that keeps the L2 term's share as it was.
    weights = torch.full((149,), 149 / 150, dtype=torch.float64)
    without = trained(example, rest, weights, 0.01)
    expected = cross_entropy(data.test_x @ without, data.test_y, reduction="none")
    expected = expected - cross_entropy(data.test_x @ w, data.test_y, reduction="none")
    # Both minimisers are within 1e-12 / l2 = 1e-10, and the losses' slopes are at most |x| <= 6.
    torch.testing.assert_close(changes[:, 0], expected, rtol=0, atol=2e-9)


def test_influence_is_the_derivative_in_the_weight(example: dict[str, Any], small: Any) -> None:
    _, data, w = small
    scores, info = example["influence"](data, 0.01, w, hypergrad.CG(rtol=1e-10))
    assert info.converged
    step = 1e-3

    def test_losses(shift: float) -> Tensor:
        weights = torch.ones(150, dtype=torch.float64)
        weights[3] += shift
        moved = trained(example, data, weights, 0.01)
        return cross_entropy(data.test_x @ moved, data.test_y, reduction="none")

    difference = (test_losses(-step) - test_losses(step)) / (2 * step)
    # Differences err by step^2 times a third derivative of the size of the first, and by
    # 2e-9 / step, from minimisers that are good to 1e-10.
    torch.testing.assert_close(
        scores[:, 3], difference, rtol=1e-4, atol=1e-4 * float(difference.abs().max())
    )


def test_the_newton_step_is_that_of_the_dense_hessian(example: dict[str, Any], small: Any) -> None:
    _, data, w = small
    changes = example["one_newton_step"](data, 0.01, w, 4)
    weights = torch.ones(150, dtype=torch.float64)
    weights[3] = 0.0

    def loss(flat: Tensor) -> Tensor:
        data_term: Tensor = example["weighted_loss"](flat.reshape(65, 10), data, weights)
        return data_term + 0.005 * flat.square().sum()

    flat = w.flatten()
    step = torch.linalg.solve(torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat))
    after = cross_entropy(
        data.test_x @ (flat - step).reshape(65, 10), data.test_y, reduction="none"
    )
    before = cross_entropy(data.test_x @ w, data.test_y, reduction="none")
    # Rounding times the condition number of the Hessian, at most (|x|^2 / 2 + l2) / l2 = 2e3.
    torch.testing.assert_close(changes[:, 3], after - before, rtol=0, atol=1e-11)


def check_claim(main: dict[str, Any]) -> None:
    """At the strength of the page: what every solver reaches."""
    for name in ("exact", "cg", "nystrom_pcg"):
        row = main["solvers"][name]
        assert row["correlation_worst"] >= 0.99, name
        assert row["correlation_all_pairs"] >= 0.99
        assert row["relative_residual_worst"] <= 1e-6
        # The scale is right as well, to the few percent that the next order is worth.
        assert 0.9 < row["slope"] < 1.2
    hvps = {name: row["num_hvps"] for name, row in main["solvers"].items()}
    assert hvps["nystrom_pcg"] < 0.5 * hvps["cg"]
    assert main["newton_step"]["correlation_worst"] > 0.99


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path), "--num-retrained", "40", "--other-l2"])
    check_claim(results["main"])

    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["main"] == results["main"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100 * 40
    assert (tmp_path / "influence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_influence_predicts_every_retraining(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path), "--other-l2", "1e-4"])
    check_claim(results["main"])
    assert all(c >= 0.99 for c in results["main"]["solvers"]["cg"]["correlation_by_test_digit"])
    weak = results["strengths"][-1]
    # Where the first order is not enough, the comparison says so,
    assert weak["solvers"]["exact"]["correlation_worst"] < 0.9
    # and one Newton step makes up for most of it.
    assert weak["newton_step"]["correlation_all_pairs"] > 0.99
