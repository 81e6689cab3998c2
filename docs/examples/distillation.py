"""Dataset distillation: ten synthetic digits that stand for a thousand real ones.

The outer parameters are ten images of 8 x 8 pixels in [0, 1], one a class, whose labels 0 to 9 stay
hard. They are learned so that a model trained on nothing else is right on the real training set:

    inner:  w*(images) = a model trained from scratch on the ten images
    outer:  min over images of the cross-entropy of w*(images) on 1000 real training images

Twice, with the two ways to differentiate a training:

- softmax regression with an L2 term, trained to its one minimum by L-BFGS, which
  ``hypergrad.implicit`` makes differentiable: ``loss.backward()`` goes through the solution;
- a network with a hidden layer, trained by 40 steps of gradient descent from a fresh random start
  each time: ``hypergrad.unrolled_hypergradient`` goes back through the steps.

The test images take part in neither.

    python docs/examples/distillation.py --run-dir runs/distillation
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import (
    BLUE,
    ORANGE,
    begin,
    csv_table,
    draw_image,
    parser_of,
    save_picture,
    shuffled_digits,
    side_by_side,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

F64 = torch.float64
LABELS = torch.arange(10)  # of the ten images
SOURCES = {
    "random real": "random real images",
    "class means": "class means",
    "distilled, softmax": "distilled for the softmax regression",
    "distilled, network": "distilled for the network",
    "whole set": "whole training set",
}
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_train: real images that the outer loss looks at.
        num_validation: images by which the settings below were chosen, on splits that are not
            reported; the other 547 are for the test.
        l2: strength of the softmax regression's L2 term, which makes its minimum unique.
        inner_tolerance: largest entry of its gradient at which it is trained.
        softmax_steps: Adam steps on the images, with that model.
        hidden: units of the network's hidden layer.
        network_lr: its step size.
        network_inner_steps: its steps of gradient descent, all differentiated.
        network_steps: Adam steps on the images, with the network.
        outer_lr: Adam's step size, in units of the pixels' range.
        num_draws: draws of ten random real images, and fresh networks trained on each set.
    """

    num_train: int = 1000
    num_validation: int = 250
    l2: float = 1e-2
    inner_tolerance: float = 1e-7
    softmax_steps: int = 60
    hidden: int = 64
    network_lr: float = 0.5
    network_inner_steps: int = 40
    network_steps: int = 150
    outer_lr: float = 0.05
    num_draws: int = 5


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 64) with pixels in [0, 1], labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def one_a_class(self, generator: torch.Generator) -> Tensor:
        """Ten random training images, one a class, shape (10, 64)."""
        rows = [torch.nonzero(self.train_y == label)[:, 0] for label in LABELS]
        chosen = [row[torch.randint(len(row), (), generator=generator)] for row in rows]
        return self.train_x[torch.stack(chosen)]

    def class_means(self) -> Tensor:
        """The mean training image of each class, shape (10, 64)."""
        return torch.stack([self.train_x[self.train_y == label].mean(0) for label in LABELS])


def make_data(config: Config, generator: torch.Generator) -> Data:
    """Split the digits at random."""
    train, validation, test = shuffled_digits([config.num_train, config.num_validation], generator)
    return Data(*train, *validation, *test)


# ------------------------------------------------------------- softmax regression: the implicit way


def linear(params: Params, x: Tensor) -> Tensor:
    """Scores of softmax regression, shape (n, 10)."""
    return x @ params["weight"] + params["bias"]


def softmax_loss(params: Params, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy with an L2 term on every parameter: strongly convex, by l2."""
    squares = params["weight"].square().sum() + params["bias"].square().sum()
    return cross_entropy(linear(params, x), y) + 0.5 * l2 * squares


def fit_softmax(init: Params, x: Tensor, y: Tensor, config: Config) -> Params:
    """Minimise the loss from ``init`` by L-BFGS; an error if it does not get there."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in init.items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()),
        max_iter=2000,
        tolerance_grad=config.inner_tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = softmax_loss(params, x, y, config.l2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()  # the gradient where it ended
    largest = max(float(leaf.grad.abs().max()) for leaf in params.values() if leaf.grad is not None)
    if largest > config.inner_tolerance:
        raise RuntimeError(f"training stopped at gradient {largest:.1e}")
    return {name: leaf.detach() for name, leaf in params.items()}


def differentiable_softmax(config: Config) -> hypergrad.ImplicitFunction:
    """``fit(init, images)`` on the ten images, with the derivatives of its minimum."""

    @hypergrad.implicit(
        lambda params, images: softmax_loss(params, images, LABELS, config.l2),
        solver=hypergrad.CG(rtol=1e-6),
        on_failure="raise",
    )
    def fit(init: Params, images: Tensor) -> Params:
        return fit_softmax(init, images, LABELS, config)

    return fit


# ------------------------------------------------------------------- the network: the unrolled way


def network(params: Params, x: Tensor) -> Tensor:
    """Scores of a network with one hidden layer, shape (n, 10)."""
    hidden = torch.tanh(x @ params["weight1"] + params["bias1"])
    scores: Tensor = hidden @ params["weight2"] + params["bias2"]
    return scores


def fresh_network(config: Config, generator: torch.Generator) -> Params:
    """A random start, uniform within 1 / sqrt(inputs) as in ``torch.nn.Linear``."""

    def uniform(inputs: int, *shape: int) -> Tensor:
        bound: float = inputs**-0.5
        return bound * (2 * torch.rand(*shape, generator=generator, dtype=F64) - 1)

    return {
        "weight1": uniform(64, 64, config.hidden),
        "bias1": uniform(64, config.hidden),
        "weight2": uniform(config.hidden, config.hidden, 10),
        "bias2": uniform(config.hidden, 10),
    }


def fit_network(init: Params, x: Tensor, y: Tensor, lr: float, num_steps: int) -> Params:
    """Gradient descent from ``init``."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in init.items()}
    optimizer = torch.optim.SGD(params.values(), lr=lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        cross_entropy(network(params, x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: leaf.detach() for name, leaf in params.items()}


# ---------------------------------------------------------------------------------- the distilling


def accuracy(
    model: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, y: Tensor
) -> float:
    """Share of the images that are classified as labelled."""
    return float((model(params, x).argmax(dim=1) == y).double().mean())


@dataclass
class Distilled:
    """Ten images, and the test accuracy after each outer step, from before the first."""

    images: Tensor
    test_accuracy: list[float]
    certificate: str | None = None


def distill_softmax(data: Data, start: Tensor, config: Config, progress: Any) -> Distilled:
    """Adam on the images, with the gradient through the minimum of the softmax regression."""
    fit = differentiable_softmax(config)
    images = start.clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=config.outer_lr)
    params = {"weight": torch.zeros(64, 10, dtype=F64), "bias": torch.zeros(10, dtype=F64)}
    distilled = Distilled(start, [])
    for _ in range(config.softmax_steps):
        adam.zero_grad()
        solution = fit(params, images)  # from the minimum of the step before
        loss = cross_entropy(linear(solution, data.train_x), data.train_y)
        loss.backward()  # type: ignore[no-untyped-call]
        params = {name: leaf.detach() for name, leaf in solution.items()}
        distilled.test_accuracy.append(accuracy(linear, params, data.test_x, data.test_y))
        progress.update()
        adam.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    distilled.images = images.detach()
    params = fit_softmax(params, distilled.images, LABELS, config)
    distilled.test_accuracy.append(accuracy(linear, params, data.test_x, data.test_y))
    distilled.certificate = certificate(data, params, distilled.images, config)
    return distilled


def certificate(data: Data, params: Params, images: Tensor, config: Config) -> str:
    """How far the hypergradient at the end can be from the true one."""

    def inner_loss(params: Params, images: Tensor) -> Tensor:
        return softmax_loss(params, images, LABELS, config.l2)

    def outer_loss(params: Params, images: Tensor) -> Tensor:
        return cross_entropy(linear(params, data.train_x), data.train_y)

    problem = (inner_loss, outer_loss, params, images)
    got = hypergrad.hypergradient(*problem, solver=hypergrad.CG(rtol=1e-6))
    return hypergrad.hypergradient_certificate(*problem, got, strong_convexity=config.l2).message


def distill_network(
    data: Data, start: Tensor, config: Config, generator: torch.Generator, progress: Any
) -> Distilled:
    """Adam on the images, with the gradient through all steps of a network's training.

    Each outer step trains another network: the images must serve starts that they never saw.
    """

    def inner_loss(params: Params, images: Tensor) -> Tensor:
        return cross_entropy(network(params, images), LABELS)

    def outer_loss(params: Params, images: Tensor) -> Tensor:
        return cross_entropy(network(params, data.train_x), data.train_y)

    images = start.clone()
    adam = torch.optim.Adam([images], lr=config.outer_lr)
    distilled = Distilled(start, [])
    for _ in range(config.network_steps):
        result = hypergrad.unrolled_hypergradient(
            inner_loss,
            outer_loss,
            fresh_network(config, generator),
            images,
            num_steps=config.network_inner_steps,
            optimizer=hypergrad.SGD(lr=config.network_lr),
        )
        # The network that was just trained has not been seen by the images either.
        trained = result.inner_params
        distilled.test_accuracy.append(accuracy(network, trained, data.test_x, data.test_y))
        progress.update()
        images.grad = result.grad
        adam.step()
        images.clamp_(0.0, 1.0)
    distilled.images = images
    return distilled


# ---------------------------------------------------------------------------------- the comparison


def evaluate(
    x: Tensor, y: Tensor, data: Data, config: Config, generator: torch.Generator
) -> dict[str, list[float]]:
    """Test accuracies of models trained from scratch on a set: each from fresh random starts."""
    init = {
        "weight": torch.randn(64, 10, generator=generator, dtype=F64),
        "bias": torch.zeros(10, dtype=F64),
    }
    fitted = fit_softmax(init, x, y, config)
    few = config.network_inner_steps
    result = {"softmax": [accuracy(linear, fitted, data.test_x, data.test_y)]}
    for num_steps in (few, 10 * few):
        name = f"network, {num_steps} steps"
        result[name] = []
        for _ in range(config.num_draws):
            start = fresh_network(config, generator)
            params = fit_network(start, x, y, config.network_lr, num_steps)
            result[name].append(accuracy(network, params, data.test_x, data.test_y))
    return result


def run_seed(seed: int, config: Config, progress: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distil both sets for one split of the digits and judge them: figures, and what to draw."""
    generator = torch.Generator().manual_seed(seed)
    data = make_data(config, generator)
    real = [data.one_a_class(generator) for _ in range(config.num_draws)]
    progress.set_description(f"seed {seed}, softmax regression")
    softmax = distill_softmax(data, real[0], config, progress)
    progress.set_description(f"seed {seed}, network")
    unrolled = distill_network(data, real[0], config, generator, progress)
    progress.set_description(f"seed {seed}, training from scratch")

    sets = {
        "class means": data.class_means(),
        "distilled, softmax": softmax.images,
        "distilled, network": unrolled.images,
    }
    scores = {
        name: evaluate(images, LABELS, data, config, generator) for name, images in sets.items()
    }
    scores["whole set"] = evaluate(data.train_x, data.train_y, data, config, generator)
    draws = [evaluate(images, LABELS, data, config, generator) for images in real]
    scores["random real"] = {
        model: [s for draw in draws for s in draw[model]] for model in draws[0]
    }
    figures = {
        "test_accuracy": {name: scores[name] for name in SOURCES},
        "softmax_by_step": softmax.test_accuracy,
        "network_by_step": unrolled.test_accuracy,
        "certificate": softmax.certificate,
    }
    return figures, {"random real": real[0], **sets}


# ------------------------------------------------------------------------------------- the output


def mean_over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean test accuracy by source and model: over starts and draws, then over seeds."""
    first = reports[0]["test_accuracy"]
    return {
        source: {
            model: statistics.mean(
                statistics.mean(report["test_accuracy"][source][model]) for report in reports
            )
            for model in first[source]
        }
        for source in first
    }


def print_table(mean: dict[str, dict[str, float]], reports: dict[int, dict[str, Any]]) -> None:
    """Print the mean test accuracies, and the certificates."""
    models = list(mean["whole set"])
    print(f"\nTest accuracy, mean over seeds {', '.join(map(str, reports))}")
    print(f"  {'trained from scratch on':<38}" + "".join(f"{name:>20}" for name in models))
    for source, label in SOURCES.items():
        row = "".join(f"{mean[source][model]:>20.3f}" for model in models)
        print(f"  {label:<38}{row}")
    for seed, report in reports.items():
        print(f"seed {seed}, softmax regression: {report['certificate']}")


def draw(
    images: dict[str, Tensor], reports: dict[int, dict[str, Any]], mean: dict[str, Any], seed: int
) -> Figure:
    """The sets of ten images, and the accuracy over the outer steps."""
    colours = {"softmax": BLUE, "network": ORANGE}
    figure, (left, right) = side_by_side(8, 6)
    left.suptitle(f"Ten images that stand for a thousand (seed {seed})")
    parts = left.subfigures(4, 1, squeeze=False)[:, 0]
    for part, (source, ten) in zip(parts, images.items(), strict=True):
        part.suptitle(SOURCES[source], x=0.01, ha="left", fontsize=10)
        for cell, image in zip(part.subplots(1, 10), ten, strict=True):
            draw_image(cell, image, vmin=0, vmax=1)
    right.suptitle(
        f"Test accuracy while distilling (mean and range, seeds {', '.join(map(str, reports))})"
    )
    panels = right.subplots(1, 2, sharey=True)
    titles = {"softmax": "softmax regression, implicit", "network": "network, unrolled"}
    for axes, (kind, colour) in zip(panels, colours.items(), strict=True):
        points = list(zip(*(r[f"{kind}_by_step"] for r in reports.values()), strict=True))
        axes.fill_between(range(len(points)), [min(p) for p in points], [max(p) for p in points],
                          color=colour, alpha=0.2, lw=0)  # fmt: skip
        average = [statistics.mean(p) for p in points]
        axes.plot(average, color=colour, lw=1.8)
        for source, line in (("random real", ":"), ("class means", "-."), ("whole set", "-")):
            model = max((m for m in mean[source] if m.startswith(kind)), key=mean[source].get)
            value = mean[source][model]
            axes.axhline(value, color="#555555", linestyle=line, lw=1.2)
            side, offset = ("top", -3) if average[-1] > value else ("bottom", 3)  # off the curve
            axes.annotate(SOURCES[source], (1.0, value), (0, offset), ("axes fraction", "data"),
                          "offset points", color="#555555", ha="right", va=side,
                          fontsize=9)  # fmt: skip
        axes.set_title(titles[kind], loc="left", fontsize=10)
        axes.set_xlabel("outer step")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the seeds, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "distillation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--softmax-steps", type=int, default=Config.softmax_steps)
    parser.add_argument("--network-steps", type=int, default=Config.network_steps)
    parser.add_argument("--num-draws", type=int, default=Config.num_draws)
    options = begin(parser, arguments)
    config = replace(
        Config(),
        softmax_steps=options.softmax_steps,
        network_steps=options.network_steps,
        num_draws=options.num_draws,
    )

    reports, images = {}, {}
    total = len(options.seeds) * (config.softmax_steps + config.network_steps)
    with tqdm(total=total, unit="step") as progress:
        for seed in options.seeds:
            reports[seed], images[seed] = run_seed(seed, config, progress)
    mean = mean_over_seeds(list(reports.values()))
    results = {"config": asdict(config), "mean": mean, "seeds": reports}
    write_json(options.run_dir, results)
    lists = {
        seed: {source: ten.tolist() for source, ten in sets.items()}
        for seed, sets in images.items()
    }
    (options.run_dir / "images.json").write_text(json.dumps(lists), "utf-8")
    with csv_table(options.run_dir, ["seed", "trained_on", "model", "test_accuracy"]) as writer:
        for seed, report in reports.items():
            for source, models in report["test_accuracy"].items():
                writer.writerows([seed, source, m, v] for m, vs in models.items() for v in vs)
    print_table(mean, reports)
    seed = options.seeds[0]
    figure = draw(images[seed], reports, mean, seed)
    save_picture(
        figure, options.run_dir, "distillation", ("results.json", "results.csv", "images.json")
    )
    return results


if __name__ == "__main__":
    main()
