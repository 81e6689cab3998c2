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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import (
    begin,
    csv_table,
    parser_of,
    save_picture,
    shuffled_digits,
    write_json,
)
from laplace_output import draw, print_table
from laplace_posterior import (
    Fit,
    Problem,
    covariances,
    dense_covariances,
    gauss_newton,
    initial,
    jacobians,
    make_sketch,
    network,
    train,
)
from scipy.ndimage import rotate
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad


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


# ----------------------------------------------------------------------------------- the evidence


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
    truth: Tensor
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
    truth = true_curve(grid[:, 0])
    miss = (mean - truth).abs()
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
    return Curve(problem, grid[:, 0], truth, mean, sd, exact, report)


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
    generator = torch.Generator().manual_seed(config.seed)
    sizes = [config.num_train, config.num_validation, config.num_test]
    (x, y), (validation_x, validation_y), (test_x, test_y), _ = shuffled_digits(sizes, generator)
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


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both problems, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "laplace")
    parser.add_argument("--precisions", type=float, nargs="+", default=Config.precisions)
    parser.add_argument("--angles", type=int, nargs="+", default=Config.angles)
    parser.add_argument("--num-test", type=int, default=Config.num_test)
    parser.add_argument("--num-compared", type=int, default=Config.num_compared)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = begin(parser, arguments)
    config = Config(
        precisions=tuple(options.precisions),
        angles=tuple(options.angles),
        num_test=options.num_test,
        num_compared=options.num_compared,
        seed=options.seed,
    )

    with tqdm(total=2 * len(config.precisions) + len(config.angles), unit="step") as progress:
        curve = fit_curve(config, progress)
        digits = classify_digits(config, progress)
    results = {"config": asdict(config), "curve": curve.report, "digits": digits.report}
    write_json(options.run_dir, results)
    with csv_table(
        options.run_dir, ["angle", "prediction", "accuracy", "nll", "confidence"]
    ) as writer:
        for row in digits.report["by_angle"]:
            for kind in ("plain", "laplace"):
                writer.writerow([row["angle"], kind, *row[kind].values()])
    print_table(curve.report, digits.report)

    save_picture(draw(curve, digits), options.run_dir, "laplace")
    return results


if __name__ == "__main__":
    main()
