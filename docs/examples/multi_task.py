"""Multi-task loss weights, learned through the solution of the training.

Few digits have labels, and many are unlabelled. One network learns four further tasks on the
unlabelled ones, which share its hidden layer with the main task. Some help, and one cannot: its
labels are random. What each is worth is learned on validation images of the main task:

    inner:  p*(z) = argmin over p of  sum_k weights(z)_k ce_k(p) + l2/2 |p|^2
    outer:  min over z of the cross-entropy of p*(z) on the main task's validation images

with weights(z) = K softmax(z) for the K tasks, which are one on average.

    python docs/examples/multi_task.py --run-dir runs/multi_task
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import torch
from common import begin, csv_table, parser_of, save_picture, set_style, shuffled_digits, write_json
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

F64 = torch.float64
Params: TypeAlias = dict[str, Tensor]

MAIN = "which digit"
# The further tasks, and how many answers each has.
FURTHER = {"five or more": 2, "even or odd": 2, "quarter turns": 4, "random labels": 10}
TASKS = {MAIN: 10, **FURTHER}
HARMFUL = "random labels"


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_labelled: images with labels of the main task.
        num_validation: images with labels of the main task, for the outer loss.
        num_further: images for the further tasks; all that remain are for the test.
        hidden: units of the one hidden layer.
        l2: strength of the L2 term on all parameters.
        inner_tolerance: largest entry of the inner gradient at which L-BFGS stops.
        inner_steps: of L-BFGS, at most.
        damping: multiple of the identity that is added to the Hessian of the inner loss.
        cg_rtol: relative residual at which CG stops.
        outer_steps: Adam steps on z.
        outer_lr: Adam's step size.
    """

    num_labelled: int = 60
    num_validation: int = 100
    num_further: int = 500
    hidden: int = 16
    l2: float = 3e-3
    inner_tolerance: float = 3e-4
    inner_steps: int = 400
    damping: float = 1e-2
    cg_rtol: float = 1e-2
    outer_steps: int = 25
    outer_lr: float = 0.3


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 64) in [0, 1] and labels of shape (n,) for each task, and two more."""

    tasks: dict[str, tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def with_validation(self) -> Data:
        """The same, where the main task trains on the validation images as well."""
        main = [torch.cat(pair) for pair in zip(self.tasks[MAIN], self.validation, strict=True)]
        return Data({**self.tasks, MAIN: (main[0], main[1])}, self.validation, self.test)


def make_data(seed: int, config: Config) -> Data:
    """Split the digits, turn some and make up labels, all drawn with the seed."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (config.num_labelled, config.num_validation, config.num_further)
    labelled, validation, (x, y), test = shuffled_digits(sizes, draw)
    turns = torch.randint(4, (len(x),), generator=draw)
    images = x.reshape(-1, 8, 8)
    turned = torch.stack([image.rot90(int(k)) for image, k in zip(images, turns, strict=True)])
    tasks = {
        MAIN: labelled,
        "five or more": (x, (y >= 5).long()),
        "even or odd": (x, y % 2),
        "quarter turns": (turned.reshape(-1, 64), turns),
        HARMFUL: (x, torch.randint(10, (len(x),), generator=draw)),
    }
    return Data(tasks, validation, test)


# ------------------------------------------------------------ inner problem: all tasks, one network


def initial_params(seed: int, config: Config) -> Params:
    """One hidden layer, shared, and one linear layer for each task."""
    draw = torch.Generator().manual_seed(seed)

    def normal(fan_in: int, fan_out: int) -> Tensor:
        return torch.randn(fan_in, fan_out, generator=draw, dtype=F64) / math.sqrt(fan_in)

    params = {"hidden": normal(64, config.hidden), "bias": torch.zeros(config.hidden, dtype=F64)}
    for task, classes in TASKS.items():
        params[task] = normal(config.hidden, classes)
        params[f"{task}, bias"] = torch.zeros(classes, dtype=F64)
    return params


def features(params: Params, x: Tensor) -> Tensor:
    """The hidden layer, which the tasks share."""
    return torch.tanh(x @ params["hidden"] + params["bias"])


def answers(params: Params, task: str, hidden: Tensor) -> Tensor:
    """The logits of one task."""
    return hidden @ params[task] + params[f"{task}, bias"]


def weights_of(z: Tensor) -> Tensor:
    """The weight of each task: positive, one on average, all one at z = 0."""
    return len(z) * z.softmax(0)


def inner_loss(params: Params, weights: Tensor, data: Data, l2: float) -> Tensor:
    """Weighted losses of the tasks, and the L2 term."""
    total = 0.5 * l2 * torch.stack([leaf.square().sum() for leaf in params.values()]).sum()
    hidden: dict[int, Tensor] = {}  # by the images: three tasks share theirs
    for weight, (task, (x, y)) in zip(weights, data.tasks.items(), strict=True):
        if id(x) not in hidden:
            hidden[id(x)] = features(params, x)
        total = total + weight * cross_entropy(answers(params, task, hidden[id(x)]), y)
    return total


def train(params: Params, weights: Tensor, data: Data, config: Config) -> Params:
    """L-BFGS from ``params``. The loss is not convex: what is found depends on the start."""
    found = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimiser = torch.optim.LBFGS(
        list(found.values()),
        max_iter=config.inner_steps,
        tolerance_grad=config.inner_tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = inner_loss(found, weights, data, config.l2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return {name: leaf.detach() for name, leaf in found.items()}


def main_loss(params: Params, examples: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the main task."""
    return cross_entropy(answers(params, MAIN, features(params, examples[0])), examples[1])


def accuracy(params: Params, examples: tuple[Tensor, Tensor]) -> float:
    """Share of the digits that are recognised."""
    best = answers(params, MAIN, features(params, examples[0])).argmax(1)
    return float((best == examples[1]).double().mean())


# ------------------------------------------------------------------ outer problem: the task weights


@dataclass
class Learned:
    """How the weights came about; a row for each outer step, from before the first."""

    weights: list[list[float]]
    validation_loss: list[float]
    relative_residuals: list[float]
    num_hvps: int


def learn_weights(start: Params, data: Data, config: Config, progress: Any) -> Learned:
    """Adam on z; each step trains from where the step before ended, and solves from there too."""
    z, params, x0 = torch.zeros(len(TASKS), dtype=F64), start, None
    adam = torch.optim.Adam([z], lr=config.outer_lr)
    learned = Learned([], [], [], 0)
    for step in range(config.outer_steps + 1):
        params = train(params, weights_of(z), data, config)
        learned.weights.append(weights_of(z).tolist())
        learned.validation_loss.append(float(main_loss(params, data.validation)))
        if step == config.outer_steps:
            return learned
        result = hypergrad.hypergradient(
            lambda params, z: inner_loss(params, weights_of(z), data, config.l2),
            lambda params, z: main_loss(params, data.validation),
            params,
            z,
            solver=hypergrad.CG(rtol=config.cg_rtol),
            damping=config.damping,
            x0=x0,
        )
        z.grad, x0 = result.grad, result.ihvp
        adam.step()
        learned.relative_residuals.append(result.info.relative_residual)
        learned.num_hvps += result.info.num_hvps
        progress.update()
    raise AssertionError("the loop returns")


def run_seed(seed: int, config: Config, progress: Any) -> dict[str, Any]:
    """Learn the weights, and train anew with these and with those of the alternatives."""
    data, start = make_data(seed, config), initial_params(seed, config)
    progress.set_description(f"seed {seed}")
    learned = learn_weights(start, data, config, progress)
    ones = torch.ones(len(TASKS), dtype=F64)
    alone = torch.tensor([task == MAIN for task in TASKS], dtype=F64)
    choices = {
        "the main task alone": alone,
        "equal weights": ones,
        "learned weights": torch.tensor(learned.weights[-1], dtype=F64),
        "equal, without the random labels": torch.tensor(
            [task != HARMFUL for task in TASKS], dtype=F64
        ),
    }
    rows = {}
    for name, weights in choices.items():
        params = train(start, weights, data, config)
        both = train(start, weights, data.with_validation(), config)
        rows[name] = {
            "weights": dict(zip(TASKS, weights.tolist(), strict=True)),
            "validation_loss": float(main_loss(params, data.validation)),
            "test_accuracy": accuracy(params, data.test),
            "test_accuracy_both": accuracy(both, data.test),
        }
    return {"choices": rows, "learned": asdict(learned)}


# ------------------------------------------------------------------------------------- the output


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t (nan for a single value)."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    quantile = float(student_t.ppf(0.975, n - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / n**0.5


def summary(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and by how much learned weights are better, seed by seed."""
    names = list(next(iter(seeds.values()))["choices"])
    rows: dict[str, Any] = {}
    for name in names:
        of = [seed["choices"][name] for seed in seeds.values()]
        ours = [seed["choices"]["learned weights"] for seed in seeds.values()]
        rows[name] = {
            "weights": {
                task: statistics.mean(row["weights"][task] for row in of) for task in TASKS
            },
            "validation_loss": statistics.mean(row["validation_loss"] for row in of),
        }
        for key in ("test_accuracy", "test_accuracy_both"):
            rows[name][key] = statistics.mean(row[key] for row in of)
            gains = [a[key] - b[key] for a, b in zip(ours, of, strict=True)]
            rows[name][f"learned_minus_this_{key}"] = interval(gains)
    return rows


def print_table(rows: dict[str, Any], seeds: dict[int, dict[str, Any]], config: Config) -> None:
    """Print the means, and how far the learned weights are ahead."""
    print(f"\nMeans over seeds {', '.join(map(str, seeds))}; learned minus this, 95% interval")
    print(f"{'':<34} validation  test accuracy, trained on {config.num_labelled} labels")
    print(f"{'':<34}       loss  and on these and the {config.num_validation} of the validation")
    for name, row in rows.items():
        print(f"  {name:<32} {row['validation_loss']:10.3f}", end="")
        for key in ("test_accuracy", "test_accuracy_both"):
            gain, half = row[f"learned_minus_this_{key}"]
            ahead = "" if name == "learned weights" else f"({gain:+.3f} +- {half:.3f})"
            print(f"  {row[key]:.3f} {ahead:<19}", end="")
        print()
    print("\nLearned weights, which began at 1")
    for task, weight in rows["learned weights"]["weights"].items():
        values = [
            seed["learned"]["weights"][-1][list(TASKS).index(task)] for seed in seeds.values()
        ]
        print(f"  {task:<16} {weight:.2f}  (by seed {', '.join(f'{v:.2f}' for v in values)})")


def draw(rows: dict[str, Any], seeds: dict[int, dict[str, Any]]) -> Figure:
    """The weights over the outer steps, and what they bring on the test set, seed by seed."""
    looks = {  # Okabe and Ito
        MAIN: ("#000000", "-"),
        "five or more": ("#0072B2", "-"),
        "even or odd": ("#009E73", "-"),
        "quarter turns": ("#CC79A7", "--"),
        HARMFUL: ("#D55E00", "-."),
    }
    set_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    paths = torch.tensor([seed["learned"]["weights"] for seed in seeds.values()])
    for k, (task, (colour, line)) in enumerate(looks.items()):
        left.plot(paths[:, :, k].mean(0), line, color=colour, lw=2, label=task)
        left.plot(paths[:, :, k].T, line, color=colour, lw=0.7, alpha=0.35)
    left.set_title("Task weights (thick: the mean of the seeds)", loc="left")
    left.set_xlabel("outer step")
    left.legend(frameon=False, loc="upper left")

    names = list(rows)
    for seed in seeds.values():
        values = [100 * seed["choices"][name]["test_accuracy"] for name in names]
        right.plot(values, range(len(names)), "o-", color="#555555", alpha=0.35, ms=4, lw=0.8)
    means = [100 * rows[name]["test_accuracy"] for name in names]
    right.plot(means, range(len(names)), "D", color="#0072B2", ms=8, label="mean")
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlabel("test accuracy of the main task, % (one grey line a seed)")
    right.set_title("What the weights bring", loc="left")
    right.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the seeds, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "multi_task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--outer-steps", type=int, default=Config.outer_steps)
    parser.add_argument("--further", type=int, default=Config.num_further, help="images")
    parser.add_argument("--inner-steps", type=int, default=Config.inner_steps, help="of L-BFGS")
    options = begin(parser, arguments)
    config = Config(
        outer_steps=options.outer_steps,
        num_further=options.further,
        inner_steps=options.inner_steps,
    )

    with tqdm(total=len(options.seeds) * config.outer_steps, unit="step") as progress:
        seeds = {seed: run_seed(seed, config, progress) for seed in options.seeds}
    rows = summary(seeds)
    print_table(rows, seeds, config)
    results = {"config": asdict(config), "mean": rows, "seeds": seeds}
    write_json(options.run_dir, results)
    keys = ("validation_loss", "test_accuracy", "test_accuracy_both")
    with csv_table(options.run_dir, ["seed", "weights", *TASKS, *keys]) as writer:
        for seed, of in seeds.items():
            for name, row in of["choices"].items():
                figures = [*row["weights"].values(), *(row[key] for key in keys)]
                writer.writerow([seed, name, *figures])
    figure = draw(rows, seeds)
    save_picture(figure, options.run_dir, "multi_task")
    return results


if __name__ == "__main__":
    main()
