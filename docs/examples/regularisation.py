"""One regularisation strength per feature, learned: ridge and logistic regression.

Three data sets that come with scikit-learn, and for each the same search: the strengths alpha_j
that make the cross-validation loss small.

    inner:  w_k*(z) = argmin over w of  mean loss of w on the training part of fold k
                                        + 1/2 sum_j exp(z_j) w_j^2,          k = 1, ..., K
    outer:  min over z of the mean over k of the loss of w_k*(z) on the held-out part of fold k

Random search over z, grid search over one strength for all features, and L-BFGS with the
hypergradient, all with the same inner solver, are timed in turns. The test set is only measured.

    python docs/examples/regularisation.py --run-dir runs/regularisation
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import begin, csv_table, parser_of, save_picture, set_style, write_json
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

import hypergrad

F64 = torch.float64
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_folds: parts that the training rows are split into, as often as the task says.
        low, high: logarithms of the least and the greatest strength, for every method.
        num_random: points of a random search.
        num_grid: points of the grid over one strength.
        spread: half the width of an offset in the random search around a level, in logs.
        first_step: by L-BFGS, in the logarithm of the strength that the loss depends on most.
        evaluations: of the outer loss and its hypergradient by L-BFGS, at most.
        rtol: relative residual at which CG stops.
        newton_tolerance: decrement of Newton's method at which an inner problem is solved.
        rounds: how often everything is timed; the least time counts.
    """

    num_folds: int = 10
    low: float = -9.0
    high: float = 3.0
    num_random: int = 100
    num_grid: int = 25
    spread: float = 3.0
    first_step: float = 2.0
    evaluations: int = 20
    rtol: float = 1e-6
    newton_tolerance: float = 1e-12
    rounds: int = 3


# -------------------------------------------------------------------------- the data and the losses


@dataclass(frozen=True)
class Data:
    """Rows of features, the last one constant; which fold trains on which rows, (K, n)."""

    x: Tensor
    y: Tensor
    trains: Tensor
    test_x: Tensor
    test_y: Tensor


def squares(margin: Tensor, y: Tensor) -> Tensor:
    """Half the squared error, entry by entry."""
    return 0.5 * (margin - y).square()


@dataclass(frozen=True)
class Task:
    """A loss with its first two derivatives in the margin, and the rows it is used on.

    Attributes:
        loss, slope, curvature: called as ``loss(margin, y)``, entry by entry.
        load: the rows of features and the targets.
        num_train: rows that are split into folds; all others are for the test.
        repeats: how often they are split.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]
    load: Callable[[], tuple[Array, Array]]
    num_train: int
    repeats: int


def diabetes() -> tuple[Array, Array]:
    """442 patients: 10 features and their 55 products; how far the disease went, standardised."""
    data = load_diabetes()
    x = PolynomialFeatures(2, include_bias=False).fit_transform(data.data / data.data.std(0))
    return x, (data.target - data.target.mean()) / data.target.std()


def even_digits() -> tuple[Array, Array]:
    """1797 digits: the pixels that vary; even (-1) or odd (1)."""
    data = load_digits()
    return data.data[:, data.data.std(0) > 0.3], 2.0 * (data.target % 2) - 1.0


def breast_cancer() -> tuple[Array, Array]:
    """569 tumours: 30 features; benign (1) or malignant (-1)."""
    data = load_breast_cancer()
    return data.data, 2.0 * data.target - 1.0


def logistic_task(load: Callable[[], tuple[Array, Array]], num_train: int, repeats: int) -> Task:
    """Logistic regression on these rows."""
    return Task(
        lambda m, y: softplus(-y * m),
        lambda m, y: -y * torch.sigmoid(-y * m),
        lambda m, y: torch.sigmoid(m) * torch.sigmoid(-m),
        load,
        num_train,
        repeats,
    )


TASKS = {
    "diabetes": Task(
        squares, lambda m, y: m - y, lambda m, y: torch.ones_like(m), diabetes, 300, 10
    ),
    "digits": logistic_task(even_digits, 600, 1),
    "breast cancer": logistic_task(breast_cancer, 300, 3),
}


def make_data(task: Task, seed: int, config: Config) -> Data:
    """Split rows into test, training and folds, all drawn with the seed; standardise features."""
    columns, targets = (torch.from_numpy(a) for a in task.load())
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=draw)
    train, test = order[: task.num_train], order[task.num_train :]
    mean, deviation = columns[train].mean(0), columns[train].std(0)
    x = torch.cat([(columns - mean) / deviation, torch.ones(len(columns), 1, dtype=F64)], dim=1)
    held_out = []
    for _ in range(task.repeats):
        fold = torch.randperm(len(train), generator=draw) % config.num_folds
        held_out += [fold == k for k in range(config.num_folds)]
    trains = (~torch.stack(held_out)).to(F64)
    return Data(x[train], targets[train], trains, x[test], targets[test])


# -------------------------------------------------------------------------------- the two problems


class Problem:
    """Cross-validation of one task: inner losses of all folds at once, and the outer loss.

    The inner parameters are the K models, (K, p + 1), the outer ones the p log-strengths; the
    constant is not penalised. The inner loss is the sum of the folds', which has the solution of
    each on its own.
    """

    def __init__(self, task: Task, data: Data) -> None:
        self.task, self.data = task, data
        self.trains = data.trains / data.trains.sum(1, keepdim=True)
        held_out = 1 - data.trains
        self.held_out = held_out / held_out.sum(1, keepdim=True)
        # The curvature of squares is 1 everywhere, so its Hessians are made once and for all.
        self.gram = self.weighted_gram(self.trains) if task.loss is squares else None

    @property
    def num_strengths(self) -> int:
        """One a feature, none for the constant."""
        return self.data.x.shape[1] - 1

    def weighted_gram(self, rows: Tensor) -> Tensor:
        """sum_i rows_ki x_i x_i', shape (K, p + 1, p + 1)."""
        x = self.data.x
        return (rows[:, None, :] * x.T) @ x

    def penalty(self, z: Tensor) -> Tensor:
        """The strength of every coefficient, zero for the constant."""
        return torch.cat([z.exp(), z.new_zeros(1)])

    def inner_loss(self, w: Tensor, z: Tensor) -> Tensor:
        """Training losses with their penalties, summed over the folds."""
        losses = self.task.loss(w @ self.data.x.T, self.data.y)
        return (self.trains * losses).sum() + 0.5 * (self.penalty(z) * w.square()).sum()

    def outer_loss(self, w: Tensor, z: Tensor) -> Tensor:
        """Held-out loss, the mean over the folds."""
        losses = self.task.loss(w @ self.data.x.T, self.data.y)
        return (self.held_out * losses).sum() / len(w)

    def solve(self, z: Tensor, start: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Newton's method on every fold at once: the models and the last Hessians' factors.

        A quadratic loss is solved by its one step. A step is halved until the loss falls; the
        search ends at a decrement (the square of the gradient's norm in the inverse Hessian).
        """
        x, y, w = self.data.x, self.data.y, start
        penalty = self.penalty(z)
        diagonal = torch.diag(penalty)
        value = self.inner_loss(w, z) if self.gram is None else None
        for _ in range(100):
            margin = w @ x.T
            gradient = (self.trains * self.task.slope(margin, y)) @ x + penalty * w
            gram = self.gram
            if gram is None:
                gram = self.weighted_gram(self.trains * self.task.curvature(margin, y))
            factor = torch.linalg.cholesky(gram + diagonal)
            step = torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]
            if value is None:
                return w - step, factor
            decrement = float((gradient * step).sum())
            if decrement < tolerance:
                return w - step, factor
            size = 1.0
            while True:
                moved = w - size * step
                new = self.inner_loss(moved, z)
                if new < value - 0.1 * size * decrement or size < 1e-8:
                    break
                size /= 2
            w, value = moved, new
        raise RuntimeError(f"Newton's method stopped at a decrement of {decrement:.1e}")

    def start(self) -> Tensor:
        """Models of zeros."""
        return torch.zeros(len(self.trains), self.data.x.shape[1], dtype=F64)

    def test_loss(self, z: Tensor, tolerance: float) -> float:
        """Loss on the test set of one model, trained on all rows of the folds."""
        data = self.data
        ones = torch.ones(1, len(data.y), dtype=F64)
        whole = Problem(self.task, Data(data.x, data.y, ones, data.test_x, data.test_y))
        w, _ = whole.solve(z, whole.start(), tolerance)
        return float(self.task.loss(data.test_x @ w[0], data.test_y).mean())


# ------------------------------------------------------------------------------------ the searches


@dataclass
class Trace:
    """One search: after each evaluation the seconds so far, the strengths and their loss."""

    seconds: list[float]
    points: list[Tensor]
    losses: list[float]

    def best(self, evaluations: int | None = None) -> int:
        """Which of the first evaluations had the least loss."""
        losses = self.losses[:evaluations]
        return losses.index(min(losses))


def points_of(name: str, p: int, seed: int, config: Config) -> Iterator[Tensor]:
    """The strengths that a search without gradients tries, in order."""
    draw = torch.Generator().manual_seed(seed)
    low, width = config.low, config.high - config.low
    if name == "grid, one strength":
        for level in torch.linspace(low, config.high, config.num_grid, dtype=F64):
            yield level.expand(p)
        return
    for _ in range(config.num_random):
        if name == "random":
            yield low + width * torch.rand(p, generator=draw, dtype=F64)
        else:  # around a level: one strength for all, and each feature's offset from it
            level = low + width * torch.rand((), generator=draw, dtype=F64)
            offset = (2 * torch.rand(p, generator=draw, dtype=F64) - 1) * config.spread
            yield (level + offset).clamp(low, config.high)


def search(name: str, problem: Problem, seed: int, config: Config) -> Trace:
    """Try the points one after the other; each inner solution is the start of the next."""
    trace, w, begin = Trace([], [], []), problem.start(), time.perf_counter()
    for z in points_of(name, problem.num_strengths, seed, config):
        w, _ = problem.solve(z, w, config.newton_tolerance)
        trace.losses.append(float(problem.outer_loss(w, z)))
        trace.points.append(z)
        trace.seconds.append(time.perf_counter() - begin)
    return trace


def descend(problem: Problem, config: Config) -> Trace:
    """L-BFGS with the hypergradient, from the middle of the range in every strength."""
    trace, w, begin = Trace([], [], []), problem.start(), time.perf_counter()

    scale = 0.0

    def value_and_gradient(point: Array) -> tuple[float, Array]:
        nonlocal w, scale
        z = torch.from_numpy(point.copy())
        w, factor = problem.solve(z, w, config.newton_tolerance)
        # Newton's method leaves the factors of a Hessian next to the one that is needed: a
        # preconditioner with which CG is done at once, and which need not be exact.
        solver = hypergrad.CG(
            rtol=config.rtol,
            preconditioner=lambda v: torch.cholesky_solve(v[:, :, None], factor)[:, :, 0],
        )
        got = hypergrad.hypergradient(problem.inner_loss, problem.outer_loss, w, z, solver=solver)
        trace.losses.append(float(problem.outer_loss(w, z)))
        trace.points.append(z)
        trace.seconds.append(time.perf_counter() - begin)
        # The first step of L-BFGS is the gradient itself: losses are scaled so that it is sensible.
        scale = scale or config.first_step / float(got.grad.abs().max())
        return scale * trace.losses[-1], scale * got.grad.numpy()

    p = problem.num_strengths
    minimize(
        value_and_gradient,
        np.full(p, (config.low + config.high) / 2),
        jac=True,
        method="L-BFGS-B",
        bounds=[(config.low, config.high)] * p,
        options={"maxfun": config.evaluations, "maxiter": config.evaluations},
    )
    return trace


RANDOM = ("random", "random around a level")
METHODS = ("grid, one strength", *RANDOM, "hypergradient")


def race(problem: Problem, seed: int, config: Config, progress: Any) -> dict[str, Trace]:
    """Every method, ``rounds`` times in turns; the least time of each evaluation counts."""
    traces: dict[str, Trace] = {}
    for _ in range(config.rounds):
        for name in METHODS:
            if name == "hypergradient":
                new = descend(problem, config)
            else:
                new = search(name, problem, seed, config)
            old = traces.setdefault(name, new)
            old.seconds = [min(pair) for pair in zip(old.seconds, new.seconds, strict=True)]
            progress.update()
    return traces


def report(problem: Problem, traces: dict[str, Trace], config: Config) -> dict[str, Any]:
    """Figures of one data set and seed, ready for JSON."""
    methods: dict[str, Any] = {}
    tested: dict[int, float] = {}

    def test_loss(z: Tensor) -> float:
        if id(z) not in tested:
            tested[id(z)] = problem.test_loss(z, config.newton_tolerance)
        return tested[id(z)]

    for name, trace in traces.items():
        curve, best = [], -1
        for k, second in enumerate(trace.seconds):
            best = k if best < 0 or trace.losses[k] < trace.losses[best] else best
            curve.append((second, trace.losses[best], test_loss(trace.points[best])))
        methods[name] = {
            "loss": curve[-1][1],
            "test_loss": curve[-1][2],
            "seconds": curve[-1][0],
            "evaluations": len(curve),
            "curve": curve,
        }
    # The better of the two random searches is the one to beat, at the time that it took.
    rival = min((methods[name] for name in RANDOM), key=lambda method: method["loss"])
    curve = methods["hypergradient"]["curve"]
    fifth = max(k for k, point in enumerate(curve) if k == 0 or point[0] <= rival["seconds"] / 5)
    as_good = [k for k, point in enumerate(curve) if point[1] <= rival["loss"]]
    return {
        "methods": methods,
        "random_loss": rival["loss"],
        "random_test_loss": rival["test_loss"],
        "loss_at_a_fifth": curve[fifth][1],
        "test_loss_at_a_fifth": curve[fifth][2],
        "evaluations_until_as_good": as_good[0] + 1 if as_good else None,
        "time_share": curve[as_good[0]][0] / rival["seconds"] if as_good else None,
    }


# ------------------------------------------------------------------------------------- the output


def print_table(results: dict[str, Any]) -> None:
    """Print, for each data set, means over the seeds and how soon the hypergradient was as good."""
    for task, seeds in results["tasks"].items():
        rows = list(seeds.values())
        print(f"\n{task}: means over seeds {', '.join(map(str, seeds))}")
        print(f"  {'':<28} evaluations  seconds  validation loss  test loss")

        def line(name: str, number: float, seconds: float, loss: float, test: float) -> None:
            print(f"  {name:<28} {number:11.0f}  {seconds:7.3f}  {loss:15.4f}  {test:9.4f}")

        for name in METHODS:
            of = [row["methods"][name] for row in rows]
            keys = ("evaluations", "seconds", "loss", "test_loss")
            line(name, *(statistics.mean(one[key] for one in of) for key in keys))
        fifth = [statistics.mean(row[f"{key}_at_a_fifth"] for row in rows) for key in LOSSES]
        label = "  in a fifth of random's time"
        print(f"  {label:<28} {'':11}  {'':7}  {fifth[0]:15.4f}  {fifth[1]:9.4f}")
        shares = [row["time_share"] for row in rows]
        counts = [row["evaluations_until_as_good"] for row in rows]
        print(
            "  as good as the better random search after "
            f"{', '.join(map(str, counts))} evaluations: "
            + ", ".join("never" if share is None else f"{share:.2f}" for share in shares)
            + " of its time"
        )


LOSSES = ("loss", "test_loss")
LOOKS = {  # Okabe and Ito
    "grid, one strength": ("#555555", ":"),
    "random": ("#E69F00", "--"),
    "random around a level": ("#D55E00", "-."),
    "hypergradient": ("#0072B2", "-"),
}


def draw(results: dict[str, Any]) -> Figure:
    """Best validation loss so far against time, and the test loss of the same strengths."""
    set_style()
    tasks = results["tasks"]
    figure, panels = plt.subplots(
        2, len(tasks), figsize=(4.6 * len(tasks), 6.4), sharex="col", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, (task, seeds) in zip(panels.T, tasks.items(), strict=True):
        rows = list(seeds.values())
        for name, (colour, line) in LOOKS.items():
            # Seeds differ in their splits and not in their work: number k is one point for all.
            curves = [row["methods"][name]["curve"] for row in rows]
            points = np.array([curve[: min(map(len, curves))] for curve in curves]).mean(0)
            points[:, 0] /= statistics.mean(row["methods"]["random"]["seconds"] for row in rows)
            for axes, values in zip(column, points.T[1:], strict=True):
                axes.plot(points[:, 0], values, line, color=colour, lw=1.8, label=name)
                axes.plot(points[-1:, 0], values[-1:], "o", color=colour, ms=4)
        column[0].set_title(task, loc="left")
        column[1].set_xlabel("time; the random search takes 1")
        column[1].set_xscale("log")
    panels[0, 0].set_ylabel("validation loss, best so far")
    panels[1, 0].set_ylabel("test loss of those strengths")
    panels[0, -1].legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the data sets and seeds, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "regularisation")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    options = begin(parser, arguments)
    config = Config(rounds=options.rounds)

    results: dict[str, Any] = {"config": asdict(config), "tasks": {}}
    total = len(options.tasks) * len(options.seeds) * config.rounds * len(METHODS)
    with tqdm(total=total, unit="search") as progress:
        for name in options.tasks:
            results["tasks"][name] = {}
            for seed in options.seeds:
                progress.set_description(f"{name}, seed {seed}")
                problem = Problem(TASKS[name], make_data(TASKS[name], seed, config))
                traces = race(problem, seed, config, progress)
                results["tasks"][name][seed] = report(problem, traces, config)

    print_table(results)
    write_json(options.run_dir, results)
    with csv_table(
        options.run_dir, ["task", "seed", "method", "evaluations", "seconds", *LOSSES]
    ) as writer:
        for name, seeds in results["tasks"].items():
            for seed, row in seeds.items():
                for method, of in row["methods"].items():
                    figures = [of[key] for key in ("evaluations", "seconds", *LOSSES)]
                    writer.writerow([name, seed, method, *figures])
    figure = draw(results)
    save_picture(figure, options.run_dir, "regularisation")
    return results


if __name__ == "__main__":
    main()
