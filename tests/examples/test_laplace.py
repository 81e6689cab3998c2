"""The Laplace example: its covariances, its evidence, and where it is unsure."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from laplace_posterior import flat
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "laplace.py"
PRECISION = 0.5


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


class Silent:
    def update(self) -> None: ...
    def set_description(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def small(example: dict[str, Any]) -> tuple[Any, Any]:
    """Three classes in the plane, a network of 43 parameters at the mode."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    problem = example["Problem"](x, y, lambda out, y: cross_entropy(out, y, reduction="sum"))
    params, _ = example["train"](example["initial"]((2, 5, 4, 3), 1), problem, PRECISION, 200)
    return problem, example["Fit"](params, PRECISION, {})


def posterior_precision(example: dict[str, Any], problem: Any, fit: Any) -> Tensor:
    """Written out: the Hessian of the likelihood of the linearised network, and the prior's."""
    names = list(fit.params)
    sizes = [fit.params[name].numel() for name in names]
    mode = torch.cat([fit.params[name].flatten() for name in names])

    def outputs(flat: Tensor) -> Tensor:
        parts = torch.split(flat, sizes)
        params = {
            name: part.reshape(fit.params[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
        found: Tensor = example["network"](params, problem.x)
        return found

    jacobian = torch.func.jacfwd(outputs)(mode)

    def nll(shift: Tensor) -> Tensor:
        found: Tensor = problem.nll(outputs(mode) + jacobian @ shift, problem.y)
        return found

    hessian = torch.func.hessian(nll)(torch.zeros_like(mode))
    return hessian + PRECISION * torch.eye(len(mode), dtype=torch.float64)


def test_covariances_are_those_of_the_posterior(example: dict[str, Any], small: Any) -> None:
    problem, fit = small
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    precision = posterior_precision(example, problem, fit)
    rows = example["jacobians"](fit.params, x)
    matrix = flat(rows).reshape(6, 3, -1)
    expected = matrix @ torch.linalg.inv(precision) @ matrix.mT

    dense = example["dense_covariances"](fit, problem, x)
    operator = example["gauss_newton"](fit.params, problem)
    solution = hypergrad.solve(
        operator, rows, hypergrad.CG(rtol=1e-12), damping=PRECISION, batched=True
    )
    # Rounding, or CG's residual, times the condition number, below 1e3.
    tolerance = 1e-8 * float(expected.abs().max())
    torch.testing.assert_close(dense, expected, rtol=0, atol=tolerance)
    ours = example["covariances"](rows, solution.value, 3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_a_sketch_is_never_too_sure(example: dict[str, Any], small: Any, rank: int) -> None:
    problem, fit = small
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = example["jacobians"](fit.params, x)
    sketch = example["make_sketch"](fit, problem, rank, 0)
    ours = example["covariances"](rows, sketch.solve(rows, PRECISION, batched=True), 3)
    excess = ours - example["dense_covariances"](fit, problem, x)
    # J ((G_nys + d I)^-1 - (G + d I)^-1) J' is positive semi-definite, as G_nys <= G.
    assert float(torch.linalg.eigvalsh(excess).min()) > -1e-10 * float(ours.abs().max())
    assert float(excess.abs().max()) > 1e-6  # and a small sketch is not the whole of G


def test_evidence_is_that_of_the_dense_determinant(example: dict[str, Any], small: Any) -> None:
    problem, _ = small
    config = example["Config"](precisions=(PRECISION, 2.0), training_iterations=200)
    fits = example["fit_each_precision"](problem, (2, 5, 4, 3), 100, config, Silent())
    for fit in fits:
        identity = torch.eye(54, dtype=torch.float64)
        dense = example["gauss_newton"](fit.params, problem).to_dense() / fit.precision
        squares = sum(float(leaf.square().sum()) for leaf in fit.params.values())
        nll = float(problem.nll(example["network"](fit.params, problem.x), problem.y))
        expected = -nll - 0.5 * fit.precision * squares - 0.5 * float(
            torch.logdet(identity + dense)
        )  # fmt: skip
        # At least as many probes as parameters: nothing is estimated.
        assert fit.report["standard_error"] == 0.0
        assert fit.report["log_evidence"] == pytest.approx(expected, abs=1e-6)


def test_predictive_probabilities(example: dict[str, Any]) -> None:
    config = example["Config"](num_samples=4000)
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    common = torch.ones(2, 2, dtype=torch.float64)
    covariance = torch.stack([torch.zeros_like(common), 9.0 * common, 9.0 * torch.eye(2)])
    none, shift, wide = example["predictive"](logits, covariance.double(), config)
    plain = torch.softmax(logits[0], dim=0)
    # No variance, or one that moves all logits alike, changes nothing.
    torch.testing.assert_close(none, plain)
    torch.testing.assert_close(shift, plain)
    # Against the integral over the normal difference of the two logits.
    t = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * t**2)
    expected = float((density * torch.sigmoid(2.0 + 18.0**0.5 * t)).sum() / density.sum())
    assert float(wide[0]) == pytest.approx(expected, abs=4 * 0.5 / 4000**0.5)


def check_claims(results: dict[str, Any]) -> None:
    for report in (results["curve"], results["digits"]):
        solvers = report["solvers"]
        assert solvers["exact"]["relative_error_largest"] < 1e-9
        for name in ("cg", "nystrom_pcg"):
            # CG from zero errs by r'P^-1 r in J x, so relatively by at most rtol^2 |J|^2 / delta
            # over the variance: the smallest one here is 1e-4, and |J|^2 below 1e3.
            assert solvers[name]["relative_error_largest"] < 1e-4
            assert solvers[name]["relative_residual_worst"] <= 1e-6
        assert solvers["nystrom_pcg"]["num_hvps"] < solvers["cg"]["num_hvps"]
        assert solvers["sketch"]["num_hvps"] < solvers["nystrom_pcg"]["num_hvps"]
        assert solvers["sketch"]["ratio_smallest"] > 1 - 1e-9
        assert solvers["sketch"]["relative_error_largest"] < 0.1
    curve = results["curve"]
    assert curve["sd_in_gap"] > 4 * curve["sd_near_data"]
    assert curve["sd_outside"] > 4 * curve["sd_near_data"]
    assert curve["sd_relative_error"] < 1e-6  # the sketch has the whole rank
    upright, *_, turned = results["digits"]["by_angle"]
    assert upright["angle"] == 0
    assert turned["sd_of_logits"] > upright["sd_of_logits"]
    assert upright["laplace"]["accuracy"] > 0.9
    # A network that is wrong most of the time is less sure of it, and loses less.
    assert turned["plain"]["accuracy"] < 0.4
    assert turned["laplace"]["confidence"] < turned["plain"]["confidence"] - 0.1
    assert turned["laplace"]["nll"] < 0.8 * turned["plain"]["nll"]
    noise = results["digits"]["noise"]
    assert noise["detected_laplace"] > max(0.97, noise["detected_plain"])
    assert noise["detected_sd"] > 0.97


def test_one_short_run(example: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--precisions", "3", "--angles", "0", "60", "--num-test", "60"]
    results = example["main"](["--run-dir", str(tmp_path), "--num-compared", "2", *arguments])
    check_claims(results)
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["curve"] == results["curve"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == ["plain", "laplace"] * 2
    assert (tmp_path / "laplace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_unsure_where_there_were_no_data(example: dict[str, Any], tmp_path: Path) -> None:
    results = example["main"](["--run-dir", str(tmp_path)])
    check_claims(results)
    assert results["curve"]["precision"] == 1.0
    assert results["curve"]["within_two_sd"] > 0.8
    assert results["digits"]["precision"] == 3.0
    for row in results["digits"]["by_angle"][2:]:
        assert row["laplace"]["nll"] < 0.9 * row["plain"]["nll"]
