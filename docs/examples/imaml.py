"""Few-shot meta-learning with implicit gradients (iMAML) on digits in bad light.

A task shows one image of each of four digits, labelled 0 to 3 in random order, and asks which of
the four other images show. Every image has its own lighting: a brightness and a slope that are
added to its pixels, and are larger than what tells digits apart. Tasks for meta-training are made
of six digits; those for the test are made of the other four, which were never seen.

The outer parameters are a network's initial parameters theta; each task trains its own phi, held to
theta by a proximal term, and the query images say how good a start theta was:

    inner:  phi*(theta) = argmin over phi of  support(phi) + lambda/2 |phi - theta|^2
    outer:  min over theta of the mean of query(phi*(theta)) over tasks

The gradient in theta is (I + H / lambda)^-1 grad query(phi*), with H the Hessian of the support
loss: the implicit theorem (Rajeswaran, Finn, Kakade, Levine, arXiv 1909.04630, lemma 1), which
``hypergrad.hypergradient`` applies to a batch of tasks in one call.

    python docs/examples/imaml.py --run-dir runs/imaml
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import (
    BLUE,
    ORANGE,
    begin,
    csv_table,
    parser_of,
    save_picture,
    side_by_side,
    write_json,
)
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

F64 = torch.float64
IMAML, FIRST_ORDER = "iMAML, CG", "first order"
RANDOM, PRETRAINED = "random start", "pre-trained start"
SOLVERS: dict[str, hypergrad.Solver] = {
    IMAML: hypergrad.CG(rtol=1e-3),
    # H is left out: the gradient at phi* is taken for that in theta.
    FIRST_ORDER: hypergrad.Identity(),
}
#: For the starts that are not meta-learned, the best on the test tasks themselves counts.
PROXIMAL_GRID = (2.0, 0.2, 0.02)
Params = dict[str, Tensor]
Loss = Callable[[Params, Params], Tensor]
Problem = tuple[Loss, Loss, Params, Params]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        way: digits in a task.
        shot: support images of each.
        query: query images of each.
        light: standard deviation of the brightness and of the two slopes; pixels are in [0, 1].
        hidden: units of the hidden layer.
        proximal: lambda, the paper's value.  At 1 training on the tasks can stop near a saddle,
            where H + lambda I is not positive definite; CG then warns.
        inner_tolerance: largest entry of the inner gradient at which a task is trained.
        meta_steps: Adam steps on theta.
        meta_batch: tasks in each.
        meta_lr: Adam's step size.
        test_tasks: tasks that the test accuracy is the mean of.
        curve_every: meta-steps between two measurements of it.
    """

    way: int = 4
    shot: int = 1
    query: int = 10
    light: float = 0.3
    hidden: int = 64
    proximal: float = 2.0
    inner_tolerance: float = 1e-3
    meta_steps: int = 60
    meta_batch: int = 8
    meta_lr: float = 3e-3
    test_tasks: int = 100
    curve_every: int = 15


# --------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks: images of shape (tasks, images, 64), labels of shape (images,)."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def batches(self, size: int) -> Iterator[Tasks]:
        """The same tasks, a few at a time."""
        pairs = zip(torch.split(self.support_x, size), torch.split(self.query_x, size), strict=True)
        for support_x, query_x in pairs:
            yield Tasks(support_x, self.support_y, query_x, self.query_y)


@dataclass(frozen=True)
class Digits:
    """Images of some of the ten digits, by digit, each (n, 8, 8) with pixels in [0, 1]."""

    images: dict[int, Tensor]

    def lit(self, digit: int, count: int, light: float, draw: torch.Generator) -> Tensor:
        """Random images of a digit, each in a lighting of its own, shape (count, 64)."""
        chosen = torch.randperm(len(self.images[digit]), generator=draw)[:count]
        ramp = torch.linspace(-1, 1, 8, dtype=F64)
        level, across, down = light * torch.randn(3, count, 1, 1, generator=draw, dtype=F64)
        lit: Tensor = self.images[digit][chosen] + level + across * ramp + down * ramp[:, None]
        return lit.reshape(count, 64)

    def tasks(self, count: int, config: Config, draw: torch.Generator) -> Tasks:
        """Random tasks: which digits, in which order, which images."""
        support, query = [], []
        every = list(self.images)
        for _ in range(count):
            order = torch.randperm(len(every), generator=draw)[: config.way].tolist()
            images = [
                self.lit(every[i], config.shot + config.query, config.light, draw) for i in order
            ]
            support.append(torch.cat([each[: config.shot] for each in images]))
            query.append(torch.cat([each[config.shot :] for each in images]))
        labels = torch.arange(config.way)
        return Tasks(
            torch.stack(support),
            labels.repeat_interleave(config.shot),
            torch.stack(query),
            labels.repeat_interleave(config.query),
        )


def split_digits(draw: torch.Generator) -> tuple[Digits, Digits]:
    """Six digits to meta-train with, and the other four for the test."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=F64) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(10, generator=draw).tolist()
    known, unseen = ({digit: x[y == digit] for digit in part} for part in (order[:6], order[6:]))
    return Digits(known), Digits(unseen)


# ----------------------------------------------------------------- inner problem: training on tasks


def fresh_network(outputs: int, config: Config, draw: torch.Generator) -> Params:
    """A random start, uniform with the variances of 1 / inputs and, before the output, a third."""

    def uniform(bound: float, *shape: int) -> Tensor:
        return bound * (2 * torch.rand(*shape, generator=draw, dtype=F64) - 1)

    hidden = config.hidden
    return {
        "weight1": uniform((3 / 64) ** 0.5, 64, hidden),
        "bias1": uniform(1 / 8, 1, hidden),
        "weight2": uniform(hidden**-0.5, hidden, outputs),
        "bias2": uniform(hidden**-0.5, 1, outputs),
    }


def network(params: Params, x: Tensor) -> Tensor:
    """Scores; one network for all tasks, or leaves with a leading dimension: one for each."""
    hidden = torch.tanh(x @ params["weight1"] + params["bias1"])
    return hidden @ params["weight2"] + params["bias2"]


def sum_of_losses(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Sum over tasks of the mean cross-entropy."""
    scores = network(params, x)
    return len(x) * cross_entropy(scores.flatten(0, 1), y.repeat(len(x)))


def proximal_loss(phi: Params, theta: Params, tasks: Tasks, proximal: float) -> Tensor:
    """The inner loss of a batch of tasks: a sum, so that no task knows of the others."""
    distance = sum((phi[name] - theta[name]).square().sum() for name in phi)
    return sum_of_losses(phi, tasks.support_x, tasks.support_y) + 0.5 * proximal * distance


def adapt(theta: Params, tasks: Tasks, proximal: float, config: Config) -> Params:
    """phi* of each task, leaves with a leading dimension, by L-BFGS from theta."""
    count = len(tasks.support_x)
    phi = {
        name: leaf.expand(count, *leaf.shape).clone().requires_grad_()
        for name, leaf in theta.items()
    }
    optimizer = torch.optim.LBFGS(
        list(phi.values()),
        max_iter=1000,
        tolerance_grad=config.inner_tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = proximal_loss(phi, theta, tasks, proximal)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()  # the gradient where it ended
    largest = max(float(leaf.grad.abs().max()) for leaf in phi.values() if leaf.grad is not None)
    if largest > config.inner_tolerance:
        raise RuntimeError(f"training on the tasks stopped at gradient {largest:.1e}")
    return {name: leaf.detach() for name, leaf in phi.items()}


def task_accuracy(theta: Params, tasks: Tasks, proximal: float, config: Config) -> float:
    """Share of the query images that are classified rightly after training on the tasks."""
    right = []
    for some in tasks.batches(config.meta_batch):
        phi = adapt(theta, some, proximal, config)
        right.append((network(phi, some.query_x).argmax(-1) == tasks.query_y).double().mean(1))
    return float(torch.cat(right).mean())


# ----------------------------------------------------------------- outer problem: a start for tasks


def meta_gradient(
    theta: Params, tasks: Tasks, solver: hypergrad.Solver, config: Config
) -> tuple[hypergrad.Hypergradient, Problem]:
    """The gradient in theta of the mean query loss of a batch of tasks, and the problem.

    The tasks are independent, so that H is block diagonal and one solve serves them all.
    """
    phi = adapt(theta, tasks, config.proximal, config)

    def inner_loss(phi: Params, theta: Params) -> Tensor:
        return proximal_loss(phi, theta, tasks, config.proximal)

    def outer_loss(phi: Params, theta: Params) -> Tensor:
        return sum_of_losses(phi, tasks.query_x, tasks.query_y) / len(tasks.query_x)

    problem = (inner_loss, outer_loss, phi, theta)
    return hypergrad.hypergradient(*problem, solver=solver), problem


@dataclass
class MetaLearned:
    """A start, how it came about and how right the linear solves were."""

    theta: Params
    curve: list[tuple[int, float]]  # meta-step, test accuracy
    relative_residual: float  # the largest
    num_hvps: int
    certificate: str


def meta_learn(
    start: Params,
    name: str,
    known: Digits,
    test: Tasks,
    config: Config,
    draw: torch.Generator,
    progress: Any,
) -> MetaLearned:
    """Adam on theta, with fresh tasks at each step."""
    theta = {leaf: value.clone() for leaf, value in start.items()}
    adam = torch.optim.Adam(theta.values(), lr=config.meta_lr)
    learned = MetaLearned(theta, [], 0.0, 0, "")
    for step in range(config.meta_steps + 1):
        if step % config.curve_every == 0 or step == config.meta_steps:
            learned.curve.append((step, task_accuracy(theta, test, config.proximal, config)))
        tasks = known.tasks(config.meta_batch, config, draw)
        result, problem = meta_gradient(theta, tasks, SOLVERS[name], config)
        if step == config.meta_steps:
            certificate = hypergrad.hypergradient_certificate(*problem, result)
            learned.certificate = certificate.message
            return learned
        for leaf, value in theta.items():
            value.grad = result.grad[leaf]
        adam.step()
        learned.relative_residual = max(learned.relative_residual, result.info.relative_residual)
        learned.num_hvps += result.info.num_hvps
        progress.update()
    raise AssertionError


def pretrain(start: Params, known: Digits, config: Config, draw: torch.Generator) -> Params:
    """The other way to use the six digits: learn to tell them apart, then take a fresh last layer.

    As many images as meta-learning sees, in the same lighting.
    """
    classes = list(known.images)
    fresh = fresh_network(len(classes), config, draw)
    params = {**start, "weight2": fresh["weight2"], "bias2": fresh["bias2"]}
    params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    adam = torch.optim.Adam(params.values(), lr=config.meta_lr)
    images = config.meta_batch * config.way * (config.shot + config.query) // len(classes)
    labels = torch.arange(len(classes)).repeat_interleave(images)
    for _ in range(config.meta_steps):
        x = torch.cat([known.lit(digit, images, config.light, draw) for digit in classes])
        adam.zero_grad()
        cross_entropy(network(params, x), labels).backward()  # type: ignore[no-untyped-call]
        adam.step()
    trained = {name: params[name].detach() for name in ("weight1", "bias1")}
    return {**trained, "weight2": start["weight2"], "bias2": start["bias2"]}


# ---------------------------------------------------------------------------------- the comparison


def nearest_neighbour(tasks: Tasks) -> float:
    """Accuracy of giving a query image the label of the nearest support image."""
    nearest = torch.cdist(tasks.query_x, tasks.support_x).argmin(-1)
    return float((tasks.support_y[nearest] == tasks.query_y).double().mean())


def run_seed(
    seed: int, solvers: Sequence[str], config: Config, progress: Any
) -> tuple[dict[str, Any], Tasks]:
    """One split of the digits, one random start, and the same test tasks for everybody."""
    draw = torch.Generator().manual_seed(seed)
    known, unseen = split_digits(draw)
    test = unseen.tasks(config.test_tasks, config, draw)
    start = fresh_network(config.way, config, draw)
    progress.set_description(f"seed {seed}, baselines")
    body = pretrain(start, known, config, draw)
    random, pretrained = (
        {value: task_accuracy(theta, test, value, config) for value in PROXIMAL_GRID}
        for theta in (start, body)
    )
    accuracies = {
        "nearest neighbour": nearest_neighbour(test),
        f"{RANDOM}, same lambda": task_accuracy(start, test, config.proximal, config),
        RANDOM: max(random.values()),
        PRETRAINED: max(pretrained.values()),
    }
    report: dict[str, Any] = {"unseen": list(unseen.images), "solvers": {}}
    tasks_seed = int(torch.randint(2**31, (), generator=draw))
    for name in solvers:
        progress.set_description(f"seed {seed}, {name}")
        same = torch.Generator().manual_seed(tasks_seed)  # the same tasks for each solver
        learned = meta_learn(start, name, known, test, config, same, progress)
        accuracies[name] = learned.curve[-1][1]
        report["solvers"][name] = {
            "curve": learned.curve,
            "relative_residual": learned.relative_residual,
            "num_hvps": learned.num_hvps,
            "certificate": learned.certificate,
        }
    report["test_accuracy"] = accuracies
    return report, test


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its 95% interval by Student's t; None for one seed."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * error


def in_words(mean: float, half: float | None) -> str:
    """A mean with its interval."""
    return f"{mean:.3f}" if half is None else f"{mean:.3f} +- {half:.3f}"


def summarise(reports: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means with their intervals: of each method, and of what iMAML is ahead by, seed by seed."""
    rows = [report["test_accuracy"] for report in reports.values()]
    return {
        "test_accuracy": {name: interval([row[name] for row in rows]) for name in rows[0]},
        "imaml_ahead_by": {
            name: interval([row[IMAML] - row[name] for row in rows])
            for name in rows[0]
            if name != IMAML and IMAML in rows[0]
        },
    }


# ------------------------------------------------------------------------------------- the output


def print_table(summary: dict[str, Any], reports: dict[int, dict[str, Any]]) -> None:
    """Print means, intervals and the reports of the linear solves."""
    print(f"\nTest accuracy on unseen digits, mean and 95% interval of seeds {[*reports]}")
    ahead = summary["imaml_ahead_by"]
    for name, figures in summary["test_accuracy"].items():
        line = f"  {name:<28}{in_words(*figures):<16}"
        print(line, f"iMAML is ahead by {in_words(*ahead[name])}" if name in ahead else "")
    for seed, report in reports.items():
        for name, row in report["solvers"].items():
            print(
                f"seed {seed}, {name}: relative residual {row['relative_residual']:.1e} at most, "
                f"{row['num_hvps']} HVPs. {row['certificate']}"
            )


def draw_figure(
    test: Tasks, reports: dict[int, dict[str, Any]], summary: dict[str, Any], config: Config
) -> Figure:
    """A task, the accuracy over the meta-steps, and every method with its interval."""
    looks = {IMAML: (BLUE, "-"), FIRST_ORDER: (ORANGE, "--")}
    figure, (left, middle, right) = side_by_side(5, 6, 7, height=4.6)

    left.suptitle("A task: one image a digit, then queries")
    columns = left.subplots(4, config.way)
    for label in range(config.way):
        images = [test.support_x[0, label * config.shot]]
        images += list(test.query_x[0, label * config.query :][:3])
        for row, image in enumerate(images):
            cell = columns[row, label]
            cell.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=2)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(row == 0)
            cell.spines[:].set_linewidth(2)
        columns[0, label].set_title(f"label {label}", fontsize=10)

    middle.suptitle("Unseen digits (mean and range of the seeds)")
    axes = middle.subplots()
    for name, (colour, line) in looks.items():
        curves = [r["solvers"][name]["curve"] for r in reports.values() if name in r["solvers"]]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        points = [[value for _, value in point] for point in zip(*curves, strict=True)]
        axes.fill_between(steps, [min(p) for p in points], [max(p) for p in points],
                          color=colour, alpha=0.15, lw=0)  # fmt: skip
        axes.plot(steps, [statistics.mean(p) for p in points], line, color=colour, lw=2, label=name)
    axes.axhline(1 / config.way, color="#555555", linestyle=":", lw=1.2, label="chance")
    axes.set(xlabel="meta-step", ylabel="accuracy after one image a digit", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")

    right.suptitle(f"Mean and 95% interval over seeds {', '.join(map(str, reports))}; a dot a seed")
    axes = right.subplots()
    for row, (name, (mean, half)) in enumerate(summary["test_accuracy"].items()):
        colour = looks.get(name, ("#555555", ""))[0]
        dots = [report["test_accuracy"][name] for report in reports.values()]
        axes.plot(dots, [row - 0.2] * len(dots), ".", color=colour, alpha=0.6)
        axes.errorbar(mean, row, xerr=half, fmt="o", color=colour, capsize=4, lw=2)
    axes.set_yticks(range(len(summary["test_accuracy"])), list(summary["test_accuracy"]))
    axes.set(xlabel="accuracy", xlim=(0, 1))
    axes.invert_yaxis()
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the seeds, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "imaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--meta-steps", type=int, default=Config.meta_steps)
    parser.add_argument("--test-tasks", type=int, default=Config.test_tasks)
    parser.add_argument("--proximal", type=float, default=Config.proximal, help="lambda")
    parser.add_argument("--light", type=float, default=Config.light)
    options = begin(parser, arguments)
    config = replace(
        Config(),
        meta_steps=options.meta_steps,
        test_tasks=options.test_tasks,
        proximal=options.proximal,
        light=options.light,
    )

    reports: dict[int, dict[str, Any]] = {}
    first: Tasks | None = None
    total = len(options.seeds) * len(options.solvers) * config.meta_steps
    with tqdm(total=total, unit="step") as progress:
        for seed in options.seeds:
            reports[seed], tasks = run_seed(seed, options.solvers, config, progress)
            first = first or tasks
    assert first is not None
    summary = summarise(reports)
    results = {"config": asdict(config), "summary": summary, "seeds": reports}
    write_json(options.run_dir, results)
    with csv_table(options.run_dir, ["seed", "method", "test_accuracy"]) as writer:
        for seed, report in reports.items():
            writer.writerows([seed, *row] for row in report["test_accuracy"].items())
    print_table(summary, reports)
    figure = draw_figure(first, reports, summary, config)
    save_picture(figure, options.run_dir, "imaml")
    return results


if __name__ == "__main__":
    main()
