"""The distillation example: its gradients, what it keeps from the images, and what it claims."""

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
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "distillation.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(example: dict[str, Any]) -> Any:
    return replace(example["Config"](), softmax_steps=2, network_steps=2)


@pytest.fixture
def data(example: dict[str, Any], config: Any) -> Any:
    return example["make_data"](config, torch.Generator().manual_seed(3))


def test_no_image_is_in_two_sets(data: Any) -> None:
    every = torch.cat([data.train_x, data.validation_x, data.test_x])
    assert [len(data.train_x), len(data.validation_x), len(data.test_x)] == [1000, 250, 547]
    # All images of the set differ, so a repeated row would be a shared one.
    assert len(set(map(tuple, every.tolist()))) == 1797


def test_the_ten_real_images_have_the_ten_labels(data: Any) -> None:
    ten = data.one_a_class(torch.Generator().manual_seed(0))
    for label, image in enumerate(ten):
        rows = (data.train_x == image).all(dim=1)
        assert data.train_y[rows].tolist() == [label]


def test_gradient_is_that_of_finite_differences(
    example: dict[str, Any], config: Any, data: Any
) -> None:
    config = replace(config, l2=0.1, inner_tolerance=1e-8)
    fit = example["differentiable_softmax"](config)
    zero = {
        "weight": torch.zeros(64, 10, dtype=torch.float64),
        "bias": torch.zeros(10, dtype=torch.float64),
    }

    def outer(images: Any) -> Any:
        return cross_entropy(example["linear"](fit(zero, images), data.train_x), data.train_y)

    images = data.one_a_class(torch.Generator().manual_seed(0)).requires_grad_()
    outer(images).backward()
    assert images.grad is not None
    direction = torch.sign(images.grad)
    step = 1e-3
    with torch.no_grad():
        ends = [float(outer(images + t * direction)) for t in (step, -step)]
    # Central differences err by the order of step^2 = 1e-6, relatively; the minima by 1e-8 / l2 an
    # entry, so the outer losses by 1e-6 at most, of a difference of 2e-3 |gradient|_1.
    size = float(images.grad.abs().sum())
    assert 2 * step * size > 1e-3
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(size, rel=2e-3)


def test_what_is_differentiated_is_training_from_scratch(
    example: dict[str, Any], config: Any, data: Any
) -> None:
    ten = data.one_a_class(torch.Generator().manual_seed(0))
    start = example["fresh_network"](config, torch.Generator().manual_seed(1))
    labels = example["LABELS"]

    def loss(params: Any, images: Any) -> Any:
        return cross_entropy(example["network"](params, images), labels)

    unrolled = hypergrad.unrolled_hypergradient(
        loss, loss, start, ten, num_steps=12, optimizer=hypergrad.SGD(lr=config.network_lr)
    )
    trained = example["fit_network"](start, ten, labels, config.network_lr, 12)
    torch.testing.assert_close(unrolled.inner_params, trained, rtol=1e-10, atol=1e-12)


def test_the_test_images_take_no_part(example: dict[str, Any], config: Any, data: Any) -> None:
    blind = replace(data, test_x=1 - data.test_x, test_y=9 - data.test_y)
    start = data.one_a_class(torch.Generator().manual_seed(0))
    progress = tqdm(disable=True)
    for one, other in (
        [example["distill_softmax"](each, start, config, progress) for each in (data, blind)],
        [
            example["distill_network"](
                each, start, config, torch.Generator().manual_seed(1), progress
            )
            for each in (data, blind)
        ],
    ):
        assert torch.equal(one.images, other.images)
        assert one.test_accuracy != other.test_accuracy
        assert not torch.equal(one.images, start)
        assert 0.0 <= float(one.images.min()) <= float(one.images.max()) <= 1.0


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    options = ["--seeds", "1", "--softmax-steps", "15", "--network-steps", "25"]
    results = example["main"](["--run-dir", str(tmp_path), *options, "--num-draws", "1"])
    mean = results["mean"]
    for source, model in (
        ("distilled, softmax", "softmax"),
        ("distilled, network", "network, 40 steps"),
    ):
        # Ten random real images, from which the distilling starts, are worth some 0.63.
        assert mean[source][model] >= 0.8
        assert mean[source][model] > mean["random real"][model] + 0.1
    assert "within" in results["seeds"][1]["certificate"]

    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["mean"] == mean
    images = json.loads((tmp_path / "images.json").read_text("utf-8"))
    ten = torch.tensor(images["1"]["distilled, network"], dtype=torch.float64)
    assert ten.shape == (10, 64)
    assert 0.0 <= float(ten.min()) <= float(ten.max()) <= 1.0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Five sets, each with three trainings from scratch.
    assert len(rows) == 5 * 3
    assert (tmp_path / "distillation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ten_images_teach_the_digits(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path), "--seeds", "0", "1", "2"])
    mean = results["mean"]
    models = list(mean["whole set"])
    for source in ("distilled, softmax", "distilled, network"):
        for model in models:  # also the one that the images were not made for
            assert mean[source][model] >= 0.8
            assert mean[source][model] > mean["random real"][model] + 0.15
    # For the model that they were made for, every single training, and more than class means.
    for source, model in (
        ("distilled, softmax", "softmax"),
        ("distilled, network", "network, 40 steps"),
    ):
        for report in results["seeds"].values():
            assert min(report["test_accuracy"][source][model]) >= 0.88
        best_of_means = max(mean["class means"][each] for each in models if each[:4] == model[:4])
        assert mean[source][model] > best_of_means + 0.03
