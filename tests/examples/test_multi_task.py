"""The multi-task example: its data, its gradient, and what the learned weights do."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "multi_task.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def config(example: dict[str, Any]) -> Any:
    return example["Config"]()


def test_no_image_is_in_two_sets(example: dict[str, Any], config: Any) -> None:
    data = example["make_data"](3, config)
    sets = [data.tasks[example["MAIN"]], data.tasks["five or more"], data.validation, data.test]
    every = torch.cat([x for x, _ in sets])
    assert len(every) == len(set(map(tuple, every.tolist()))) == 1797


def test_labels_are_what_they_are_called(example: dict[str, Any], config: Any) -> None:
    data = example["make_data"](3, config)
    x, big = data.tasks["five or more"]
    _, odd = data.tasks["even or odd"]
    turned, turns = data.tasks["quarter turns"]
    for image, other, k in zip(x, turned, turns, strict=True):
        assert torch.equal(image.reshape(8, 8).rot90(int(k)), other.reshape(8, 8))
    # What is five or more and what is odd are independent, but for the uneven 0, ..., 4.
    assert sorted(set(zip(big.tolist(), odd.tolist(), strict=True))) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert int(data.tasks["random labels"][1].max()) == 9


def test_all_weights_are_one_at_first(example: dict[str, Any]) -> None:
    weights_of = example["weights_of"]
    torch.testing.assert_close(weights_of(torch.zeros(5)), torch.ones(5))
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights_of(drawn).mean(), torch.ones(()))


def test_gradient_is_that_of_differences(example: dict[str, Any], config: Any) -> None:
    # Few units and a strong L2 term: the inner problem is solved to many digits.
    config = replace(config, num_further=30, hidden=3, l2=0.3, inner_tolerance=1e-8)
    data = example["make_data"](0, config)

    def inner(params: Any, z: Any) -> torch.Tensor:
        loss: torch.Tensor = example["inner_loss"](
            params, example["weights_of"](z), data, config.l2
        )
        return loss

    def outer(params: Any, z: Any) -> torch.Tensor:
        loss: torch.Tensor = example["main_loss"](params, data.validation)
        return loss

    def solve(init: Any, z: Any) -> Any:
        return example["train"](init, example["weights_of"](z), data, config)

    z = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4], dtype=torch.float64)
    params = solve(example["initial_params"](0, config), z)
    check = hypergrad.check_hypergradient(
        inner,
        outer,
        params,
        z,
        solve_inner=solve,
        solver=hypergrad.CG(rtol=1e-10),
        num_directions=1,
    )
    assert check.verdict is hypergrad.Verdict.PASSED, check.message


def test_random_labels_lose_their_weight(example: dict[str, Any], tmp_path: Path) -> None:
    options = ["--seeds", "0", "--outer-steps", "6", "--further", "150", "--inner-steps", "100"]
    results = example["main"](["--run-dir", str(tmp_path), *options])
    learned = results["seeds"][0]["learned"]
    last = dict(zip(example["TASKS"], learned["weights"][-1], strict=True))
    assert last["random labels"] < 0.5
    assert last["random labels"] == min(last.values())
    assert learned["validation_loss"][-1] < 0.9 * learned["validation_loss"][0]
    rows = results["mean"]
    assert rows["learned weights"]["validation_loss"] < rows["equal weights"]["validation_loss"]
    assert rows["learned weights"]["test_accuracy"] > rows["equal weights"]["test_accuracy"]
    assert max(learned["relative_residuals"]) <= 1e-2
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["seeds"]["0"]["learned"] == learned
    assert len((tmp_path / "results.csv").read_text("utf-8").splitlines()) == 1 + 4
    assert (tmp_path / "multi_task.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_learned_weights_are_better_than_equal_ones(
    example: dict[str, Any], tmp_path: Path
) -> None:
    results = example["main"](["--run-dir", str(tmp_path), "--seeds", *map(str, range(5))])
    rows = results["mean"]
    for key in ("test_accuracy", "test_accuracy_both"):
        # Outside the 95% interval of five paired differences.
        gain, half = rows["equal weights"][f"learned_minus_this_{key}"]
        assert gain > half
        assert rows["the main task alone"][f"learned_minus_this_{key}"][0] > 0
    for seed in results["seeds"].values():
        last = dict(zip(example["TASKS"], seed["learned"]["weights"][-1], strict=True))
        assert last["random labels"] < 0.1
        assert last["which digit"] > 1
        assert max(last["five or more"], last["even or odd"]) > 10 * last["random labels"]
