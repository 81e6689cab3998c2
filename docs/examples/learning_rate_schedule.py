"""A learning-rate schedule, learned through the steps of the training that it drives.

A small network learns scikit-learn's digits in 100 steps of minibatch gradient descent. Its step
sizes follow a curve through six points, whose logarithms are the outer parameters z:

    inner:  w_(t+1) = w_t - lr_t(z) grad ce(w_t; batch_t),    t = 0, ..., T - 1
    outer:  min over z of the mean, over starts and batches, of the validation loss of w_T

The gradient goes back through all T steps; or, truncated, through the last 40 of them, to learn how
a constant rate should end; or through windows of 20 steps, each asked to make the loss at its own
end small, and not what that is good for afterwards. The rivals are the best constant rate and the
best linear decay of a grid.

    python docs/examples/learning_rate_schedule.py --run-dir runs/learning_rate_schedule
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import torch
from common import (
    BLUE,
    ORANGE,
    begin,
    csv_table,
    parser_of,
    save_picture,
    set_style,
    shuffled_digits,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

Params: TypeAlias = dict[str, Tensor]
Examples: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_steps: of gradient descent in one training.
        batch_size: examples a step.
        hidden: units of the one hidden layer.
        num_knots: points of the schedule; log rates are linear between them.
        first_rate: the rate in every step before the schedule is learned; the schedule whose end
            alone is learned begins as the best constant rate instead.
        truncate: steps that the truncated gradient goes through.
        window: steps in a window.
        outer_steps: Adam steps on z.
        outer_lr: Adam's step size at first; it falls to zero along a cosine.
        tuned_lr: the same where the schedule begins as the best constant rate: not far above it,
            training breaks down, and has no useful gradient any more.
        runs: trainings, each with a start and batches of its own, for one outer gradient.
        clip: longest gradient of one run. Where a rate is too large, training is chaotic, and
            gradients through it grow with each step.
        grid: from which and to which rate the rivals are tried, and how many rates.
        num_evaluations: trainings that a schedule is judged by, the same for all schedules.
    """

    num_steps: int = 100
    batch_size: int = 64
    hidden: int = 32
    num_knots: int = 6
    first_rate: float = 0.1
    truncate: int = 40
    window: int = 20
    outer_steps: int = 40
    outer_lr: float = 0.15
    tuned_lr: float = 0.05
    runs: int = 2
    clip: float = 0.3
    grid: tuple[float, float, int] = (0.1, 3.2, 13)
    num_evaluations: int = 10


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 64) in [0, 1], and their labels."""

    train: Examples
    validation: Examples
    test: Examples


def make_data(seed: int) -> Data:
    """1000 digits to train on, 400 for validation, 397 for the test, drawn with the seed."""
    parts = shuffled_digits([1000, 400], torch.Generator().manual_seed(seed))
    return Data(*((x.float(), y) for x, y in parts))


# -------------------------------------------------------------------------- inner problem: training


def loss(params: Params, examples: Examples) -> Tensor:
    """Cross-entropy of the network."""
    return cross_entropy(logits(params, examples[0]), examples[1])


def logits(params: Params, x: Tensor) -> Tensor:
    """One hidden layer."""
    return torch.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@dataclass(frozen=True)
class Run:
    """What chance decides in one training: the start and the batches."""

    start: Params
    batches: list[Examples]


def make_run(seed: int, data: Data, config: Config) -> Run:
    """Draw a start and batches."""
    draw = torch.Generator().manual_seed(seed)
    x, y = data.train
    start = {
        "w1": torch.randn(64, config.hidden, generator=draw) / 8,
        "b1": torch.zeros(config.hidden),
        "w2": torch.randn(config.hidden, 10, generator=draw) / config.hidden**0.5,
        "b2": torch.zeros(10),
    }
    shape = (config.num_steps, config.batch_size)
    rows = torch.randint(len(x), shape, generator=draw)
    return Run(start, [(x[row], y[row]) for row in rows])


def rates_of(z: Tensor, num_steps: int) -> Tensor:
    """The rate of every step: log rates are linear between the knots, which are evenly spaced."""
    place = torch.linspace(0, len(z) - 1, num_steps)
    left = place.floor().long().clamp(max=len(z) - 2)
    share = place - left
    return ((1 - share) * z[left] + share * z[left + 1]).exp()


def train(run: Run, rates: Tensor, data: Data) -> dict[str, Any]:
    """Train with these rates: validation loss every fifth step, where it ends and how well."""
    params, curve = run.start, []
    sgd = hypergrad.SGD(lr=rates)
    state = sgd.init(params)
    for step, batch in enumerate(run.batches):
        if step % 5 == 0:
            curve.append(float(loss(params, data.validation)))
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        grads = torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
        with torch.no_grad():
            params, state = sgd.step(leaves, state, dict(zip(leaves, grads, strict=True)))
    x, y = data.test
    return {
        "validation_loss": float(loss(params, data.validation)),
        "test_loss": float(loss(params, data.test)),
        "test_accuracy": float((logits(params, x).argmax(1) == y).double().mean()),
        "curve": [*curve, float(loss(params, data.validation))],
        "params": params,
    }


# ----------------------------------------------------------------------- outer problem: the schedul


def gradient(
    run: Run, z: Tensor, data: Data, *, window: int | None = None, truncate: int | None = None
) -> Tensor:
    """The gradient in z of the validation loss at the end of the training, or of every window.

    Each window begins at parameters that are held constant. A truncated gradient is exact in the
    rates of the steps it goes through, as the steps before do not depend on them, and zero in all
    others.
    """
    params, total = run.start, torch.zeros_like(z)
    num_steps = len(run.batches)
    for first in range(0, num_steps, window or num_steps):
        steps = slice(first, min(first + (window or num_steps), num_steps))

        def optimizer(z: Tensor, steps: slice = steps) -> hypergrad.SGD:
            return hypergrad.SGD(lr=rates_of(z, num_steps)[steps])

        result = hypergrad.unrolled_hypergradient(
            lambda params, z, batch: loss(params, batch),
            lambda params, z: loss(params, data.validation),
            params,
            z,
            num_steps=steps.stop - first,
            optimizer=optimizer,
            mode="truncated" if truncate else "reverse",
            truncate=truncate,
            checkpoint_every=num_steps,  # one graph: it is small, and no step is done twice
            batches=run.batches[steps],
        )
        params, total = result.inner_params, total + result.grad
    return total


ALL, LAST, WINDOWS = "all", "last", "windows"
ROUTES = (ALL, LAST, WINDOWS)


def learn_schedule(
    route: str, first_rate: float, seed: int, data: Data, config: Config, progress: Any
) -> Tensor:
    """Adam on the logarithms of the rates, on new starts and batches at each step."""
    z = torch.full((config.num_knots,), first_rate).log()
    window = config.window if route == WINDOWS else None
    truncate = config.truncate if route == LAST else None
    adam = torch.optim.Adam([z], lr=config.tuned_lr if route == LAST else config.outer_lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.outer_steps)
    for step in range(config.outer_steps):
        total = torch.zeros_like(z)
        for k in range(config.runs):
            number = step * config.runs + k
            run = make_run(1_000_000 * (seed + 1) + number, data, config)
            grad = gradient(run, z, data, window=window, truncate=truncate)
            total += grad * min(1.0, config.clip / max(float(grad.norm()), 1e-30))
        z.grad = total / config.runs
        adam.step()
        cosine.step()
        progress.update()
    return z


# ---------------------------------------------------------------------------------- the comparison


def evaluate(rates: Tensor, data: Data, config: Config) -> dict[str, Any]:
    """Means over the evaluation runs, none of which was learned from."""
    rows = [
        train(make_run(seed, data, config), rates, data) for seed in range(config.num_evaluations)
    ]
    means: dict[str, Any] = {
        key: statistics.mean(row[key] for row in rows)
        for key in ("validation_loss", "test_loss", "test_accuracy")
    }
    means["curve"] = torch.tensor([row["curve"] for row in rows]).mean(0).tolist()
    means["by_run"] = [row["validation_loss"] for row in rows]
    means["rates"] = rates.tolist()
    return means


def best_of_grid(shape: Tensor, data: Data, config: Config, progress: Any) -> dict[str, Any]:
    """The best multiple of a shape: the one with the least mean validation loss."""
    low, high, count = config.grid
    tried = []
    for scale in torch.linspace(math.log(low), math.log(high), count).exp():
        tried.append(evaluate(scale * shape, data, config))
        progress.update()
    return min(tried, key=lambda row: row["validation_loss"])


def name_of(route: str, config: Config) -> str:
    """What a learned schedule is called."""
    if route == LAST:
        return f"learned through the last {config.truncate} steps"
    return "learned through " + (
        f"windows of {config.window} steps" if route == WINDOWS else "all steps"
    )


def run_all(routes: Sequence[str], seeds: Sequence[int], config: Config) -> dict[str, Any]:
    """The rivals, and a schedule for each route and seed."""
    data = make_data(0)
    ones = torch.ones(config.num_steps)
    linear = torch.linspace(1, 0, config.num_steps + 1)[: config.num_steps]
    total = 2 * config.grid[2] + len(routes) * len(seeds) * config.outer_steps
    with tqdm(total=total, unit="step") as progress:
        progress.set_description("grid")
        constant = best_of_grid(ones, data, config, progress)
        decay = best_of_grid(linear, data, config, progress)
        schedules = {"best constant rate": [constant], "best linear decay": [decay]}
        for route in routes:
            rows = schedules[name_of(route, config)] = []
            first_rate = constant["rates"][0] if route == LAST else config.first_rate
            for seed in seeds:
                progress.set_description(f"{route}, seed {seed}")
                z = learn_schedule(route, first_rate, seed, data, config, progress)
                rows.append(evaluate(rates_of(z.detach(), config.num_steps), data, config))
    return {"config": asdict(config), "schedules": schedules}


# ------------------------------------------------------------------------------------- the output

KEYS = ("validation_loss", "test_loss", "test_accuracy")


def print_table(results: dict[str, Any]) -> None:
    """Print how well training ends with each schedule."""
    print(f"\nMeans over {results['config']['num_evaluations']} trainings")
    print(f"{'':<48} validation loss  test loss  test accuracy")
    for name, rows in results["schedules"].items():
        for row in rows:
            label = f"{name}, {row['rates'][0]:.2f} at first"
            figures = [row[key] for key in KEYS]
            print("  {:<46} {:15.4f}  {:9.4f}  {:13.4f}".format(label, *figures))


def draw(results: dict[str, Any]) -> Figure:
    """The schedules, and the validation loss on the way."""
    styles = [(BLUE, "-"), (ORANGE, "--"), ("#CC79A7", "-.")]
    set_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    learned = iter(styles)
    for name, rows in results["schedules"].items():
        if "constant" in name:
            colour, line = "#555555", ":"
        elif "decay" in name:
            colour, line = "#009E73", "--"
        else:
            colour, line = next(learned, styles[-1])
        for k, row in enumerate(rows):
            label = name if k == 0 else None
            steps = range(len(row["rates"]))
            left.plot(steps, row["rates"], line, color=colour, lw=1.6, alpha=0.8, label=label)
            on_the_way = [min(5 * k, len(steps)) for k in range(len(row["curve"]))]
            right.plot(on_the_way, row["curve"], line, color=colour, lw=1.6, alpha=0.8)
    left.set_title("Learning rate", loc="left")
    left.set_yscale("log")
    left.set_ylim(0.05, 4)
    right.set_title("Validation loss (mean of new trainings)", loc="left")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("step of the training")
    left.legend(frameon=False, loc="lower left")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn the schedules, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "learning_rate_schedule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Config.num_steps, help="of one training")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--truncate", type=int, default=Config.truncate, help="to the last steps")
    parser.add_argument("--outer-steps", type=int, default=Config.outer_steps)
    parser.add_argument("--evaluations", type=int, default=Config.num_evaluations)
    options = begin(parser, arguments)
    config = Config(
        num_steps=options.steps,
        truncate=options.truncate,
        outer_steps=options.outer_steps,
        num_evaluations=options.evaluations,
    )

    results = run_all(options.routes, options.seeds, config)
    print_table(results)
    write_json(options.run_dir, results, indent=None)
    with csv_table(options.run_dir, ["schedule", "number", *KEYS]) as writer:
        for name, rows in results["schedules"].items():
            writer.writerows([name, k, *(row[key] for key in KEYS)] for k, row in enumerate(rows))
    figure = draw(results)
    save_picture(figure, options.run_dir, "learning_rate_schedule")
    return results


if __name__ == "__main__":
    main()
