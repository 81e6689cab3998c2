"""Laplace's method: how sure is the network, and is it less sure where it saw no data?

Train a network to the mode of its posterior: data, and a normal prior of precision delta. Replace
the network by its linearisation there and the posterior of the parameters by the normal one with

    precision  P = G + delta I,    G the Gauss-Newton matrix of the negative log-likelihood,

and the output at any input x has the covariance J(x) P^-1 J(x)', J the Jacobian of the outputs in
the parameters (MacKay 1992; Immer, Korzepa and Bauer 2021, arXiv 2008.08400). That is one solve an
output, with the prior precision as the damping: a question for ``hypergrad.solve``. The evidence
for delta needs log det P, a trace of a function of G: ``hypergrad.spectral_density``. One
``hypergrad.nystrom_sketch`` of G serves any number of inputs, and errs on the side of caution:
what it does not see of G it takes for directions that the data say nothing about.

Two problems: a curve with a gap in its data, and scikit-learn's handwritten digits, upright for
training and turned for the test. Both are small enough for the dense posterior, which is formed
from Jacobians and a Cholesky factorisation and says how right the rest is.

    python docs/examples/laplace.py --run-dir runs/laplace
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        curve_hidden: widths of the hidden layers for the curve.
        digits_hidden: the same for the digits.
        precisions: prior precisions to choose from.
        noise: standard deviation of the curve's noise, which the likelihood knows.
        num_curve: points on the curve.
        num_train: training digits.
        num_validation: digits that choose the prior precision of their network.
        num_test: test digits.
        angles: by which the test digits are turned, in degrees.
        training_iterations: iterations of L-BFGS.
        num_probes: of the spectral density of the digits' Gauss-Newton matrix.
        num_compared: test digits on which the solvers are compared.
        rank: of the sketches; the curve's Gauss-Newton matrix has no more than ``num_curve``.
        rtol: relative residual at which CG stops.
        num_samples: draws of the logits that make the predictive probabilities.
        seed: of everything that is random.
    """

    curve_hidden: tuple[int, ...] = (16, 16)
    digits_hidden: tuple[int, ...] = (20,)
    precisions: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    noise: float = 0.1
    num_curve: int = 60
    num_train: int = 1000
    num_validation: int = 200
    num_test: int = 200
    angles: tuple[int, ...] = (0, 15, 30, 45, 60, 75, 90)
    training_iterations: int = 500
    num_probes: int = 16
    num_compared: int = 20
    rank: int = 400
    rtol: float = 1e-6
    num_samples: int = 500
    seed: int = 0


# -------------------------------------------------------------------------------- the probability


@dataclass(frozen=True)
class Problem:
    """Data and a likelihood; ``nll`` is the negative log-likelihood, a sum over the examples."""

    x: Tensor
    y: Tensor
    nll: Callable[[Tensor, Tensor], Tensor]


def network(params: Params, x: Tensor) -> Tensor:
    """A multilayer perceptron with tanh units; x of shape (n, inputs)."""
    depth = len(params) // 2
    for layer in range(depth):
        x = x @ params[f"weight{layer}"] + params[f"bias{layer}"]
        x = torch.tanh(x) if layer < depth - 1 else x
    return x


def initial(sizes: Sequence[int], seed: int) -> Params:
    """Random parameters."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        weight = torch.randn(fan_in, fan_out, generator=generator, dtype=torch.float64)
        params[f"weight{layer}"] = weight / fan_in**0.5
        params[f"bias{layer}"] = torch.zeros(fan_out, dtype=torch.float64)
    return params


def train(
    params: Params, problem: Problem, precision: float, iterations: int
) -> tuple[Params, float]:
    """Minimise nll + precision/2 |params|^2; also returns its value at the end."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimiser = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=iterations,
        tolerance_grad=1e-5,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        squares = torch.stack([leaf.square().sum() for leaf in leaves.values()]).sum()
        loss = problem.nll(network(leaves, problem.x), problem.y) + 0.5 * precision * squares
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    loss = float(closure().detach())
    return {name: leaf.detach() for name, leaf in leaves.items()}, loss


def gauss_newton(params: Params, problem: Problem) -> hypergrad.GaussNewtonOperator:
    """G, the Gauss-Newton matrix of the whole negative log-likelihood: a sum, not a mean."""
    return hypergrad.ggn(network, problem.nll, params, problem.x, problem.y)


@dataclass(frozen=True)
class Fit:
    """A network at the mode, the prior precision of which it is the mode, and its evidence."""

    params: Params
    precision: float
    report: dict[str, float]


def fit_each_precision(
    problem: Problem, sizes: Sequence[int], num_probes: int, config: Config, progress: Any
) -> list[Fit]:
    """Train once for each prior precision.

    Up to what does not depend on delta, Laplace's approximation of the log evidence is

        -nll - delta/2 |params|^2 - 1/2 log det (I + G/delta).
    """
    fits = []
    for precision in config.precisions:
        start = initial(sizes, config.seed + 1)
        params, loss = train(start, problem, precision, config.training_iterations)
        density = hypergrad.spectral_density(
            gauss_newton(params, problem),
            num_steps=60,
            num_probes=num_probes,
            # The same probes for all: their differences are surer than the values.
            generator=torch.Generator().manual_seed(config.seed),
        )
        determinant = density.integrate(lambda x, d=precision: torch.log1p(positive(x) / d))  # type: ignore[misc]
        # How many directions the data, and not the prior, decide.
        dimension = density.integrate(lambda x, d=precision: positive(x) / (positive(x) + d))  # type: ignore[misc]
        report = {
            "precision": precision,
            "log_evidence": -loss - 0.5 * determinant.value,
            "standard_error": 0.5 * determinant.standard_error,
            "effective_dimension": dimension.value,
        }
        fits.append(Fit(params, precision, report))
        progress.update()
    return fits


def positive(eigenvalues: Tensor) -> Tensor:
    """Without the rounding of Ritz values that should be zero: G is positive semi-definite."""
    return eigenvalues.clamp(min=0.0)


# ------------------------------------------------------------------------------------ the solves


def jacobians(params: Params, x: Tensor) -> Params:
    """J(x): a tree of derivatives for each input and output, stacked; leaves (n * outputs, ...)."""

    def outputs(params: Params, row: Tensor) -> Tensor:
        return network(params, row[None])[0]

    found = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(params, x)
    return {name: leaf.flatten(0, 1) for name, leaf in found.items()}


def flat(trees: Params) -> Tensor:
    """Stacked trees as the rows of a matrix."""
    return torch.cat([leaf.flatten(1) for leaf in trees.values()], dim=1)


def covariances(rows: Params, solved: Params, outputs: int) -> Tensor:
    """J P^-1 J' for each input, shape (n, outputs, outputs)."""
    left, right = flat(rows), flat(solved)
    shape = (-1, outputs, left.shape[1])
    return left.reshape(shape) @ right.reshape(shape).mT


def dense_covariances(fit: Fit, problem: Problem, x: Tensor) -> Tensor:
    """The same without this library: Jacobians of all training data, and a Cholesky factor."""
    output = network(fit.params, problem.x)
    outputs = output.shape[1]
    rows = flat(jacobians(fit.params, problem.x)).reshape(len(problem.x), outputs, -1)
    # H_i, the Hessian of one example's negative log-likelihood in its outputs.
    curvature = torch.func.hessian(lambda row, target: problem.nll(row[None], target[None]))
    weights = torch.func.vmap(curvature)(output, problem.y)
    weighted = (weights @ rows).flatten(0, 1)
    gauss_newton = rows.flatten(0, 1).T @ weighted
    eye = torch.eye(len(gauss_newton), dtype=x.dtype)
    factor = torch.linalg.cholesky(gauss_newton + fit.precision * eye)
    new = flat(jacobians(fit.params, x))
    half = torch.linalg.solve_triangular(factor, new.T, upper=False).T
    half = half.reshape(len(x), outputs, -1)
    covariance: Tensor = half @ half.mT
    return covariance


def make_sketch(fit: Fit, problem: Problem, rank: int, seed: int) -> hypergrad.NystromSketch:
    """One sketch of G that serves every input from then on, without another product.

    It never exceeds G, and where it sees nothing G counts as zero ("zero"), so that the inverse and
    with it every variance is too large, if anything.
    """
    operator = gauss_newton(fit.params, problem)
    return hypergrad.nystrom_sketch(
        operator,
        min(rank, operator.shape[0]),
        damping=fit.precision,
        generator=torch.Generator().manual_seed(seed),
        complement="zero",
    )


def compare_solvers(
    fit: Fit, problem: Problem, x: Tensor, config: Config, rank: int
) -> dict[str, dict[str, Any]]:
    """Covariances at the inputs x by each solver, against the dense ones."""
    rows = jacobians(fit.params, x)
    exact = dense_covariances(fit, problem, x)
    outputs = exact.shape[-1]
    operator = gauss_newton(fit.params, problem)
    rank = min(rank, operator.shape[0])
    solvers: dict[str, hypergrad.Solver] = {
        "exact": hypergrad.Exact(),
        "cg": hypergrad.CG(rtol=config.rtol),
        "nystrom_pcg": hypergrad.NystromPCG(
            rank, rtol=config.rtol, generator=torch.Generator().manual_seed(config.seed)
        ),
    }
    found: dict[str, tuple[Tensor, int, float | None]] = {}
    for name, solver in solvers.items():
        solution = hypergrad.solve(operator, rows, solver, damping=fit.precision, batched=True)
        info = solution.info
        cost = (info.num_hvps, info.relative_residual)
        found[name] = (covariances(rows, solution.value, outputs), *cost)
    sketch = make_sketch(fit, problem, rank, config.seed)
    solved = sketch.solve(rows, fit.precision, batched=True)
    found["sketch"] = (covariances(rows, solved, outputs), sketch.num_hvps, None)
    true = exact.diagonal(dim1=1, dim2=2).sqrt()
    report = {}
    for name, (covariance, num_hvps, residual) in found.items():
        sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
        report[name] = {
            "relative_error_largest": float(((sd - true) / true).abs().max()),
            "ratio_smallest": float((sd / true).min()),
            "ratio_median": float((sd / true).median()),
            "num_hvps": num_hvps,
            "relative_residual_worst": residual,
        }
    return report


# -------------------------------------------------------------------------------------- the curve


@dataclass
class Curve:
    """The curve's data, and its posterior on a grid."""

    problem: Problem
    grid: Tensor
    mean: Tensor
    sd: Tensor  # of the noiseless curve, from the sketch
    dense_sd: Tensor
    report: dict[str, Any]


def true_curve(x: Tensor) -> Tensor:
    """What the data are drawn around."""
    return torch.sin(2.5 * x)


def fit_curve(config: Config, progress: Any) -> Curve:
    """Points on both sides of a gap."""
    generator = torch.Generator().manual_seed(config.seed)
    half = config.num_curve // 2
    draws = torch.rand(config.num_curve, 1, generator=generator, dtype=torch.float64)
    x = torch.cat([-2.0 + 1.2 * draws[:half], 0.6 + 1.4 * draws[half:]])
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = true_curve(x) + config.noise * noise
    problem = Problem(x, y, lambda out, y: 0.5 * ((out - y) / config.noise).square().sum())
    progress.set_description("curve")
    sizes = (1, *config.curve_hidden, 1)
    size = sum(leaf.numel() for leaf in initial(sizes, 0).values())
    # As many probes as parameters are a whole basis: nothing is random about the evidence then.
    fits = fit_each_precision(problem, sizes, size, config, progress)
    fit = max(fits, key=lambda fit: fit.report["log_evidence"])

    grid = torch.linspace(-3.0, 3.0, 201, dtype=torch.float64)[:, None]
    rows = jacobians(fit.params, grid)
    sketch = make_sketch(fit, problem, config.num_curve, config.seed)
    solved = sketch.solve(rows, fit.precision, batched=True)
    sd = covariances(rows, solved, 1)[:, 0, 0].sqrt()
    exact = dense_covariances(fit, problem, grid)[:, 0, 0].sqrt()
    mean = network(fit.params, grid)[:, 0]
    near = (grid - problem.x.T).abs().min(dim=1).values < 0.1
    gap = (grid[:, 0] > -0.5) & (grid[:, 0] < 0.3)
    inside, outside = grid[:, 0].abs() < 2.0, grid[:, 0].abs() > 2.5
    miss = (mean - true_curve(grid)[:, 0]).abs()
    report = {
        "num_params": size,
        "precision": fit.precision,
        "fits": [fit.report for fit in fits],
        "rank": sketch.rank,
        "solvers": compare_solvers(fit, problem, grid[::10], config, config.num_curve),
        "sd_near_data": float(sd[near].median()),
        "sd_in_gap": float(sd[gap].median()),
        "sd_outside": float(sd[outside].median()),
        "within_two_sd": float((miss <= 2 * sd)[inside].double().mean()),
        "sd_relative_error": float(((sd - exact) / exact).abs().max()),
    }
    return Curve(problem, grid[:, 0], mean, sd, exact, report)


# ------------------------------------------------------------------------------------- the digits


@dataclass
class Digits:
    """What the digits' picture shows."""

    examples: list[Tensor]
    report: dict[str, Any]


def predictive(logits: Tensor, covariance: Tensor, config: Config) -> Tensor:
    """Mean of softmax over normal logits, by sampling; shape (n, 10)."""
    # The covariance of ten logits can be singular to rounding; its square root is not unique, so
    # the symmetric one is as good as Cholesky's and always exists.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
    generator = torch.Generator().manual_seed(config.seed)
    normal = torch.randn(config.num_samples, *logits.shape, generator=generator, dtype=logits.dtype)
    draws = logits + (root @ normal[..., None])[..., 0]
    return torch.softmax(draws, dim=-1).mean(dim=0)


def figures(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """How good predictive probabilities are, and how sure of themselves."""
    confidence, chosen = probabilities.max(dim=1)
    return {
        "accuracy": float((chosen == y).double().mean()),
        "nll": float(-probabilities.gather(1, y[:, None]).log().mean()),
        "confidence": float(confidence.mean()),
    }


def area_under_roc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score outside is above one inside."""
    difference = outside[:, None] - inside[None, :]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def entropy(probabilities: Tensor) -> Tensor:
    """Of each row, in nats."""
    return -(probabilities * probabilities.clamp(min=1e-300).log()).sum(dim=1)


class Predictor:
    """Plain and predictive probabilities at any input, from one sketch."""

    def __init__(self, fit: Fit, problem: Problem, config: Config) -> None:
        self.fit, self.config = fit, config
        self.sketch = make_sketch(fit, problem, config.rank, config.seed)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Plain probabilities, predictive ones, and the standard deviation of the logits.

        The last is the root of their mean variance, about their common mean, which softmax does
        not see.
        """
        rows = jacobians(self.fit.params, x)
        solved = self.sketch.solve(rows, self.fit.precision, batched=True)
        covariance = covariances(rows, solved, 10)
        logits = network(self.fit.params, x)
        variances = covariance.diagonal(dim1=1, dim2=2).mean(dim=1) - covariance.mean(dim=(1, 2))
        plain = torch.softmax(logits, dim=1)
        return plain, predictive(logits, covariance, self.config), variances.sqrt()


def classify_digits(config: Config, progress: Any) -> Digits:
    """Train on upright digits; predict turned ones, and images of noise."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data) / 16.0, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator)
    sizes = [config.num_train, config.num_validation, config.num_test]
    (x, y), (validation_x, validation_y), (test_x, test_y) = (
        (images[chosen], labels[chosen]) for chosen in torch.split(order[: sum(sizes)], sizes)
    )
    problem = Problem(x, y, lambda out, y: cross_entropy(out, y, reduction="sum"))
    progress.set_description("digits")
    layers = (64, *config.digits_hidden, 10)
    fits = fit_each_precision(problem, layers, config.num_probes, config, progress)
    # By what the predictions are worth, on digits like those of the training.
    for fit in fits:
        plain, laplace, _ = Predictor(fit, problem, config)(validation_x)
        fit.report["validation_nll_plain"] = figures(plain, validation_y)["nll"]
        fit.report["validation_nll"] = figures(laplace, validation_y)["nll"]
    fit = min(fits, key=lambda fit: fit.report["validation_nll"])
    predict = Predictor(fit, problem, config)

    turned = {angle: turn(test_x, angle) for angle in config.angles}
    by_angle = []
    for angle, inputs in turned.items():
        plain, laplace, sd = predict(inputs)
        by_angle.append(
            {
                "angle": angle,
                "plain": figures(plain, test_y),
                "laplace": figures(laplace, test_y),
                "sd_of_logits": float(sd.mean()),
            }
        )
        progress.update()
    upright = predict(test_x)
    noise = predict(torch.rand(test_x.shape, generator=generator, dtype=torch.float64))
    report = {
        "num_params": predict.sketch.layout.dim,
        "precision": fit.precision,
        "fits": [fit.report for fit in fits],
        "rank": predict.sketch.rank,
        "solvers": compare_solvers(
            fit, problem, test_x[: config.num_compared], config, config.rank
        ),
        "by_angle": by_angle,
        "noise": {
            "sd_of_logits": float(noise[2].mean()),
            "confidence_plain": float(noise[0].max(dim=1).values.mean()),
            "confidence_laplace": float(noise[1].max(dim=1).values.mean()),
            "detected_plain": area_under_roc(entropy(upright[0]), entropy(noise[0])),
            "detected_laplace": area_under_roc(entropy(upright[1]), entropy(noise[1])),
            "detected_sd": area_under_roc(upright[2], noise[2]),
        },
    }
    shown = int((test_y == 3).nonzero()[0])
    return Digits([inputs[shown] for inputs in turned.values()], report)


def turn(x: Tensor, angle: float) -> Tensor:
    """Images turned by an angle in degrees, what comes in from outside is empty."""
    pictures = x.reshape(-1, 8, 8).numpy()
    turned = rotate(pictures, angle, axes=(1, 2), reshape=False, order=1)
    return torch.as_tensor(turned).reshape(-1, 64).clamp(0.0, 1.0)


# ------------------------------------------------------------------------------------- the output


def print_table(curve: dict[str, Any], digits: dict[str, Any]) -> None:
    """Print how right the variances are, and what they are good for."""
    for name, report in (("Curve", curve), ("Digits", digits)):
        print(
            f"\n{name}: {report['num_params']} parameters, prior precision "
            f"{report['precision']:g}, standard deviations against the dense posterior's"
        )
        for solver, row in report["solvers"].items():
            print(
                f"  {solver:<18} off by at most {row['relative_error_largest']:.1e}, ratio "
                f"{row['ratio_smallest']:.6f} or more, median {row['ratio_median']:.6f}; "
                f"{row['num_hvps']} HVPs"
            )
        for row in report["fits"]:
            validation = (
                f"; validation -log p {row['validation_nll_plain']:.3f} plain, "
                f"{row['validation_nll']:.3f} Laplace"
                if "validation_nll" in row
                else ""
            )
            print(
                f"  precision {row['precision']:<5g} log evidence {row['log_evidence']:.1f} "
                f"+- {row['standard_error']:.1f}, effective dimension "
                f"{row['effective_dimension']:.1f}{validation}"
            )
    print(
        f"\nStandard deviation of the curve: {curve['sd_near_data']:.3f} near data, "
        f"{curve['sd_in_gap']:.3f} in the gap, {curve['sd_outside']:.3f} outside; the truth is "
        f"within two of them on {curve['within_two_sd']:.0%} of [-2, 2]"
    )
    print(
        "\nDigits turned by   accuracy   -log p: plain, Laplace   confidence: plain, Laplace   sd"
    )
    for row in digits["by_angle"]:
        plain, laplace = row["plain"], row["laplace"]
        print(
            f"  {row['angle']:>3} degrees       {plain['accuracy']:.2f}       {plain['nll']:.3f}, "
            f"{laplace['nll']:.3f}             {plain['confidence']:.3f}, "
            f"{laplace['confidence']:.3f}                 {row['sd_of_logits']:.2f}"
        )
    noise = digits["noise"]
    print(
        f"Images of noise: confidence {noise['confidence_plain']:.2f} plain, "
        f"{noise['confidence_laplace']:.2f} Laplace, sd {noise['sd_of_logits']:.2f}; told from "
        f"digits (area under the ROC) by entropy {noise['detected_plain']:.3f} plain, "
        f"{noise['detected_laplace']:.3f} Laplace, by sd {noise['detected_sd']:.3f}"
    )


BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito


def draw_curve(figure: SubFigure, curve: Curve) -> None:
    """The band of the posterior, with the dense one as dots on its edge."""
    figure.suptitle("A curve with a gap in its data")
    axes = figure.subplots()
    x, mean, sd = (t.numpy() for t in (curve.grid, curve.mean, curve.sd))
    axes.fill_between(x, mean - 2 * sd, mean + 2 * sd, color=BLUE, alpha=0.2, linewidth=0,
                      label="two standard deviations")  # fmt: skip
    axes.plot(x, mean, color=BLUE, linewidth=2, label="network")
    axes.plot(x, true_curve(curve.grid).numpy(), "--", color=GREY, linewidth=1, label="truth")
    for sign in (-1, 1):
        edge = curve.mean + 2 * sign * curve.dense_sd
        axes.plot(x[::8], edge.numpy()[::8], ".", color=ORANGE, markersize=4,
                  label="dense posterior" if sign > 0 else None)  # fmt: skip
    axes.plot(curve.problem.x, curve.problem.y, "x", color="black", markersize=4, label="data")
    axes.set(xlabel="x", ylabel="y", ylim=(-3.2, 2.8))
    axes.legend(frameon=False, fontsize=8, loc="lower center", ncols=2)


def draw_digits(figure: SubFigure, digits: Digits) -> None:
    """What turning the digits does to the two kinds of prediction."""
    rows = digits.report["by_angle"]
    angles = [row["angle"] for row in rows]
    figure.suptitle("Trained on upright digits, shown turned ones")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 7))
    strip = grid[0, :].subgridspec(1, len(angles))
    for column, (angle, image) in enumerate(zip(angles, digits.examples, strict=True)):
        axes = figure.add_subplot(strip[column])
        axes.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
        axes.set_title(f"{angle}°", fontsize=8, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    axes = figure.add_subplot(grid[1, 0])
    axes.plot(angles, [r["plain"]["confidence"] for r in rows], ":", color=ORANGE, marker="o",
              markersize=4, label="confidence, plain")  # fmt: skip
    axes.plot(angles, [r["laplace"]["confidence"] for r in rows], "-", color=BLUE, marker="o",
              markersize=4, label="confidence, Laplace")  # fmt: skip
    axes.plot(angles, [r["plain"]["accuracy"] for r in rows], "--", color=GREY, label="accuracy")
    axes.set(xlabel="angle in degrees", ylim=(0, 1.02), xticks=angles[::2])
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes = figure.add_subplot(grid[1, 1])
    axes.plot(angles, [r["plain"]["nll"] for r in rows], ":", color=ORANGE, marker="o",
              markersize=4, label="plain")  # fmt: skip
    axes.plot(angles, [r["laplace"]["nll"] for r in rows], "-", color=BLUE, marker="o",
              markersize=4, label="Laplace")  # fmt: skip
    axes.set(xlabel="angle in degrees", ylabel="-log p of the right class", xticks=angles[::2])
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both problems, print the table, write the results and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/laplace"))
    parser.add_argument("--precisions", type=float, nargs="+", default=Config.precisions)
    parser.add_argument("--angles", type=int, nargs="+", default=Config.angles)
    parser.add_argument("--num-test", type=int, default=Config.num_test)
    parser.add_argument("--num-compared", type=int, default=Config.num_compared)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args(arguments)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    config = Config(
        precisions=tuple(options.precisions),
        angles=tuple(options.angles),
        num_test=options.num_test,
        num_compared=options.num_compared,
        seed=options.seed,
    )
    # The products are small: more threads in a process cost more than they bring.
    torch.set_num_threads(1)

    with tqdm(total=2 * len(config.precisions) + len(config.angles), unit="step") as progress:
        curve = fit_curve(config, progress)
        digits = classify_digits(config, progress)
    results = {"config": asdict(config), "curve": curve.report, "digits": digits.report}
    (options.run_dir / "results.json").write_text(json.dumps(results, indent=1), "utf-8")
    with (options.run_dir / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["angle", "prediction", "accuracy", "nll", "confidence"])
        for row in digits.report["by_angle"]:
            for kind in ("plain", "laplace"):
                writer.writerow([row["angle"], kind, *row[kind].values()])
    print_table(curve.report, digits.report)

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 4.9), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(6, 8))[0]
    draw_curve(left, curve)
    draw_digits(right, digits)
    figure.savefig(options.run_dir / "laplace.png", dpi=110)
    plt.close(figure)
    print(f"\nresults.json, results.csv and laplace.png are in {options.run_dir}")
    return results


if __name__ == "__main__":
    main()
