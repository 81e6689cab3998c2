"""The example of a learned schedule: its curve, its gradients, and that it beats constant rates."""

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

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "learning_rate_schedule.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(example: dict[str, Any]) -> Any:
    return replace(example["Config"](), num_steps=12)


@pytest.fixture(scope="module")
def data(example: dict[str, Any]) -> Any:
    return example["make_data"](0)


def test_rates_go_through_the_knots(example: dict[str, Any]) -> None:
    z = torch.tensor([0.0, 1.0, -1.0])
    rates = example["rates_of"](z, 9).log()
    expected = torch.tensor([0, 0.25, 0.5, 0.75, 1, 0.5, 0, -0.5, -1])
    torch.testing.assert_close(rates, expected, rtol=0, atol=1e-6)


def in_float64(example: dict[str, Any], config: Any, data: Any) -> tuple[Any, Any, Any, Tensor]:
    """A run, its start, the data and log rates."""
    sets = (data.train, data.validation, data.test)
    data = example["Data"](*[(x.double(), y) for x, y in sets])
    run = example["make_run"](0, data, config)
    params = {name: leaf.double() for name, leaf in run.start.items()}
    z = torch.linspace(-2, -1, config.num_knots, dtype=torch.float64)
    return example["Run"](params, run.batches), params, data, z


def differences(
    example: dict[str, Any], start: Any, batches: Any, window: slice, z: Tensor, data: Any
) -> Tensor:
    """The gradient in z of the validation loss after the steps of one window."""
    step, entries = 1e-5, []
    run = example["Run"](start, batches[window])
    for unit in step * torch.eye(len(z), dtype=z.dtype):
        ends = [
            example["train"](run, example["rates_of"](z + sign * unit, len(batches))[window], data)
            for sign in (1, -1)
        ]
        entries.append((ends[0]["validation_loss"] - ends[1]["validation_loss"]) / (2 * step))
    return torch.tensor(entries, dtype=z.dtype)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_are_those_of_differences(
    example: dict[str, Any], config: Any, data: Any, window: int | None
) -> None:
    run, params, data, z = in_float64(example, config, data)
    got = example["gradient"](run, z, data, window=window)

    # A window begins where those before it ended, whatever the rates there came from.
    expected, rates = torch.zeros_like(z), example["rates_of"](z, 12)
    for first in range(0, 12, window or 12):
        steps = slice(first, min(first + (window or 12), 12))
        expected += differences(example, params, run.batches, steps, z, data)
        end = example["train"](example["Run"](params, run.batches[steps]), rates[steps], data)
        params = end["params"]
    # Differences err by step^2, and by step times the jump in slope where a unit turns on.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_truncated_gradient_is_exact_in_the_last_rates(
    example: dict[str, Any], config: Any, data: Any
) -> None:
    run, _, data, z = in_float64(example, config, data)
    whole = example["gradient"](run, z, data)
    cut = example["gradient"](run, z, data, truncate=5)
    # Steps 0 to 11 over 6 knots 2.2 steps apart. The last five begin at step 7: the last two knots
    # act from 6.6 on, so there only; the first three act before it only.
    torch.testing.assert_close(cut[-2:], whole[-2:], rtol=1e-10, atol=0)
    assert torch.equal(cut[:3], torch.zeros_like(cut[:3]))
    assert float((cut[3] - whole[3]).abs()) > 1e-3 * float(whole[3].abs())


def test_a_learned_schedule_beats_the_best_constant_rate(
    example: dict[str, Any], tmp_path: Path
) -> None:
    options = ["--steps", "40", "--outer-steps", "10", "--evaluations", "4"]
    options += ["--routes", "last", "--truncate", "20"]
    results = example["main"](["--run-dir", str(tmp_path), "--seeds", "0", *options])
    constant = results["schedules"]["best constant rate"][0]
    (learned,) = results["schedules"]["learned through the last 20 steps"]
    assert learned["validation_loss"] < constant["validation_loss"]
    assert len(learned["rates"]) == 40
    assert len(learned["curve"]) == 9
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["schedules"]["best constant rate"][0] == constant
    assert len((tmp_path / "results.csv").read_text("utf-8").splitlines()) == 1 + 3
    assert (tmp_path / "learning_rate_schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_learned_through_all_steps_beats_every_rival(
    example: dict[str, Any], tmp_path: Path
) -> None:
    results = example["main"](["--run-dir", str(tmp_path)])
    schedules = results["schedules"]
    (constant,) = schedules["best constant rate"]
    (decay,) = schedules["best linear decay"]
    assert len(schedules["learned through all steps"]) == 3
    for learned in schedules["learned through all steps"]:
        for rival in (constant, decay):
            assert learned["validation_loss"] < 0.95 * rival["validation_loss"]
            assert learned["test_loss"] < rival["test_loss"]
    for learned in schedules["learned through windows of 20 steps"]:
        # Each window's own loss is not the loss at the end.
        assert learned["validation_loss"] > constant["validation_loss"]
