"""The spectrum example: its eigenvalues against SciPy's and those of the dense matrix."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "cnn_spectrum.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


def test_the_hessian_is_that_of_the_network(example: dict[str, Any]) -> None:
    config = example["Config"](num_train=20, channels=(2, 2))
    data, network = example["make_data"](config), example["make_network"](config).double()
    x, y = data.train_x.double(), data.train_y
    hessian = example["hessian_of"](network, example["Data"](x, y, x, y))
    names = [name for name, _ in network.named_parameters()]
    leaves = [leaf.detach() for leaf in network.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [leaf.numel() for leaf in leaves])
        params = {
            name: part.reshape(leaf.shape)
            for name, part, leaf in zip(names, parts, leaves, strict=True)
        }
        return cross_entropy(torch.func.functional_call(network, params, (x,)), y)

    expected = torch.func.hessian(loss)(torch.cat([leaf.flatten() for leaf in leaves]))
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_network(example: dict[str, Any]) -> None:
    config = example["Config"]()
    before = torch.get_rng_state()
    first, second = (example["make_network"](config).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, leaf in first.items():
        assert torch.equal(leaf, second[name])


def test_distance_of_a_density(example: dict[str, Any]) -> None:
    exact = torch.cat([torch.linspace(0.0, 1.0, 99), torch.tensor([10.0])]).double()
    whole = hypergrad.spectral_density(torch.diag(exact), num_steps=100, num_probes=100)
    assert example["distance"](whole, exact) < 1e-8
    one = hypergrad.spectral_density(torch.eye(100).double(), num_steps=1, num_probes=100)
    # All eigenvalues taken for ones: they move by 0.5 on average, the last by 9, of a spread of 10.
    assert example["distance"](one, exact) == pytest.approx((99 * 0.5 + 9.0) / 100 / 10)


def check_claims(results: dict[str, Any]) -> None:
    for row in results["spectra"].values():
        # Products in float32, of relative accuracy 1e-6 or so; the last of the twelve has not
        # converged to that in every run.
        largest = row["top"][0]
        assert row["top"] == pytest.approx(row["top_scipy"], abs=1e-4 * largest)
        # Interlacing: no Ritz value is above its eigenvalue, but for the rounding.
        for ours, theirs in zip(row["top"], row["top_scipy"], strict=True):
            assert ours < theirs + 1e-5 * largest
        assert row["smallest"] == pytest.approx(row["smallest_scipy"], abs=1e-2 * largest)
    before, after = results["spectra"].values()
    assert after["loss"] < before["loss"]
    assert after["test_accuracy"] > before["test_accuracy"] + 0.2


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--num-train", "200", "--channels", "3", "4", "--num-probes", "2", "--no-dense"]
    results = example["main"](["--run-dir", str(tmp_path), "--epochs", "10", *arguments])
    check_claims(results)
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert written["spectra"] == results["spectra"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert (tmp_path / "cnn_spectrum.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_nine_directions_carry_the_curvature(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path)])
    check_claims(results)
    before, after = results["spectra"].values()
    for row in (before, after):
        assert row["top"] == pytest.approx(row["top_dense"], abs=1e-4 * row["top"][0])
        assert row["smallest"] == pytest.approx(row["smallest_dense"], abs=1e-4 * row["top"][0])
        assert row["distance"] < 0.01
    assert after["test_accuracy"] > 0.9
    # Curvature grows and gathers in as many directions as there are classes, less one; what is
    # negative was of the same order at the start, and is small beside the rest at the end.
    assert after["top"][0] > 5 * before["top"][0]
    assert after["share_of_nine_dense"] > 0.8
    assert before["smallest"] < -0.2 * before["top"][0]
    assert -0.03 * after["top"][0] < after["smallest"] < 0
