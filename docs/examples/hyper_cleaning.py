"""Data hyper-cleaning: learn which training labels to trust, through the solution of the training.

40% of the training labels of scikit-learn's handwritten digits are replaced by wrong ones. Every
training example gets one weight, and the weights are learned: they are the outer parameters of

    inner:  W*(z) = argmin over W of  1/n sum_i sigmoid(z_i) ce(x_i W, y_i) + l2/2 |W|^2
    outer:  min over z of the cross-entropy of W*(z) on a small clean validation set

with the gradient in z by the implicit function theorem, once through ``hypergrad.nystrom_ihvp`` and
once through ``hypergrad.cg_ihvp``. Nothing in it knows which labels are wrong, and the test set is
only ever measured.

    python docs/examples/hyper_cleaning.py --run-dir runs/hyper_cleaning

With ``--copies 2`` the training set is twice as large: every image of it once more, shifted by a
pixel, with a label that is replaced, or not, on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    begin,
    csv_table,
    draw_image,
    parser_of,
    save_picture,
    shuffled_digits,
    side_by_side,
    with_constant,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

SOLVERS = ("nystrom", "cg")
L2_GRID = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
LOW_WEIGHT = 0.5  # where every weight starts


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_images: images to train on; 250 more are for validation and the other 547 for the test.
        copies: training examples made of each image: itself, and copies shifted by one pixel.
        num_validation: clean validation examples, used in the outer loss only.
        corrupted_share: share of the training labels that are replaced by another class.
        l2: strength of the L2 term: about where training on everything has its lowest
            validation loss, which is the outer loss.
        damping: multiple of the identity that is added to the Hessian of the inner loss.
        rank: of the Nyström sketch; at 200 its relative residuals stay below 0.1.
        cg_rtol: relative residual at which CG stops.
        outer_steps: Adam steps on the weights.
        outer_lr: Adam's step size, in logits.
        outer_eps: Adam's epsilon times the number of examples, of the size of a typical gradient
            times that number. With a tiny one all weights move equally fast: those that hardly
            matter as fast as those that do the harm.
        inner_tolerance: largest entry of the inner gradient at which training has converged.
    """

    num_images: int = 1000
    copies: int = 1
    num_validation: int = 250
    corrupted_share: float = 0.4
    l2: float = 1e-3
    damping: float = 1e-2
    rank: int = 200
    cg_rtol: float = 1e-3
    outer_steps: int = 60
    outer_lr: float = 0.3
    outer_eps: float = 0.3
    inner_tolerance: float = 1e-6

    @property
    def num_train(self) -> int:
        """Training examples."""
        return self.num_images * self.copies


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 65), 64 pixels in [0, 1] and a constant; labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor  # 40% of them wrong
    corrupted: Tensor  # bool, shape (n,): which; for the evaluation and for the ceiling only
    true_y: Tensor  # for the picture only
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """The images moved by one pixel up, down, left or right, drawn one by one; zeros come in."""
    padded = torch.nn.functional.pad(x[:, :64].reshape(-1, 8, 8), (1, 1, 1, 1))
    windows = [padded[:, r : r + 8, c : c + 8] for r, c in ((2, 1), (0, 1), (1, 2), (1, 0))]
    drawn = torch.randint(4, (len(x),), generator=generator)
    moved = torch.stack(windows)[drawn, torch.arange(len(x))].reshape(-1, 64)
    return torch.cat([moved, x[:, 64:]], dim=1)


def make_data(seed: int, config: Config) -> Data:
    """Split the digits and corrupt the training labels, all drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    parts = shuffled_digits([config.num_images, config.num_validation], generator)
    (x, y), validation, test = ((with_constant(x), y) for x, y in parts)
    # The copies are made of training images only, after the split: no test image has a relative.
    train_x = torch.cat([x, *(shifted(x, generator) for _ in range(1, config.copies))])
    true = y.repeat(config.copies)

    n = config.num_train
    wrong = torch.randperm(n, generator=generator)[: round(config.corrupted_share * n)]
    labels = true.clone()
    # A shift by 1 to 9 is one of the nine other classes, each as likely.
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    corrupted = torch.zeros(n, dtype=torch.bool)
    corrupted[wrong] = True
    return Data(train_x, labels, corrupted, true, *validation, *test)


# ---------------------------------------------------------------- inner problem: weighted training


def weighted_loss(w: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Data term of the inner loss: 1/n sum_i weights_i ce(x_i W, y_i)."""
    return (weights * cross_entropy(x @ w, y, reduction="none")).mean()


def train(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    l2: float,
    w: Tensor,
    tolerance: float,
    max_iter: int = 5000,
) -> Tensor:
    """Minimise the inner loss from ``w`` to stationarity: it is strongly convex.

    The implicit function theorem holds where the inner gradient is zero, so this stops at a
    gradient and not at a number of epochs, and fails where it does not get there.
    """
    w = w.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=max_iter,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = weighted_loss(w, x, y, weights) + 0.5 * l2 * w.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    closure()  # the gradient where it ended
    assert w.grad is not None
    if float(w.grad.abs().max()) > tolerance:
        raise RuntimeError(f"training stopped at gradient {float(w.grad.abs().max()):.1e}")
    return w.detach()


# ------------------------------------------------------------------- outer problem: the weights


def make_ihvp(solver: str, config: Config, seed: int) -> Callable[..., Any]:
    """The inverse-Hessian-vector product by the solver of that name, as a function (hvp_fn, v)."""
    # The L2 term adds l2 I to the Hessian. That is known exactly, so it goes where multiples of
    # the identity go, and neither solver has to find it by products.
    damping = config.l2 + config.damping
    if solver == "cg":
        return lambda hvp_fn, v: hypergrad.cg_ihvp(
            hvp_fn, v, damping=damping, rtol=config.cg_rtol, return_info=True
        )
    generator = torch.Generator().manual_seed(seed)  # of the random sketches
    return lambda hvp_fn, v: hypergrad.nystrom_ihvp(
        hvp_fn, v, rank=config.rank, damping=damping, generator=generator, return_info=True
    )


def implicit_gradient(
    data: Data, w: Tensor, logits: Tensor, ihvp: Callable[..., Any]
) -> tuple[Tensor, hypergrad.SolveInfo]:
    """The gradient of the validation loss of W*(logits) in the logits, shape (n,).

    ``hypergrad.hypergradient`` does these three steps in one call; here they are in the open.
    """

    def data_term(w: Tensor) -> Tensor:
        return weighted_loss(w, data.train_x, data.train_y, torch.sigmoid(logits))

    # 1. v, the gradient of the outer loss in the inner parameters.
    w = w.clone().requires_grad_()
    (v,) = torch.autograd.grad(cross_entropy(data.validation_x @ w, data.validation_y), w)
    # 2. x = (H + damping I)^-1 v, with H the Hessian of the inner loss.
    x, info = ihvp(hypergrad.hessian(data_term, w), v)
    # 3. -d/dlogits <grad_w inner loss, x>, with x held fixed.
    (inner_gradient,) = torch.autograd.grad(data_term(w), w, create_graph=True)
    (mixed,) = torch.autograd.grad(inner_gradient, logits, grad_outputs=x)
    return -mixed, info


@dataclass
class Learned:
    """Learned weights, how they came about and how right the linear solves were."""

    weights: Tensor
    test_accuracy: list[float]  # after each outer step, from before the first
    validation_loss: list[float]
    relative_residuals: list[float]
    num_hvps: int
    ihvp_seconds: float
    seconds: float


def learn_weights(data: Data, solver: str, config: Config, seed: int, progress: Any) -> Learned:
    """Adam on the logits of the weights; each step trains to stationarity, warm-started."""
    start = time.perf_counter()
    ihvp = make_ihvp(solver, config, seed)
    logits = torch.zeros(config.num_train, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=config.outer_lr, eps=config.outer_eps / config.num_train)
    w = torch.zeros(65, 10, dtype=torch.float64)
    learned = Learned(torch.empty(0), [], [], [], 0, 0.0, 0.0)
    progress.set_description(f"seed {seed}, {solver}_ihvp")
    for step in range(config.outer_steps + 1):
        weights = torch.sigmoid(logits).detach()
        w = train(data.train_x, data.train_y, weights, config.l2, w, config.inner_tolerance)
        learned.test_accuracy.append(accuracy(w, data.test_x, data.test_y))
        learned.validation_loss.append(
            float(cross_entropy(data.validation_x @ w, data.validation_y))
        )
        if step == config.outer_steps:
            break
        before = time.perf_counter()
        logits.grad, info = implicit_gradient(data, w, logits, ihvp)
        adam.step()
        learned.ihvp_seconds += time.perf_counter() - before
        learned.num_hvps += info.num_hvps
        learned.relative_residuals.append(info.relative_residual)
        progress.set_postfix_str(
            f"validation loss {learned.validation_loss[-1]:.3f}, "
            f"relative residual {info.relative_residual:.0e}",
            refresh=False,
        )
        progress.update()
    learned.weights = weights
    learned.seconds = time.perf_counter() - start
    return learned


# ---------------------------------------------------------------------------------- the comparison


def accuracy(w: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of the examples that are classified as labelled."""
    return float(((x @ w).argmax(dim=1) == y).double().mean())


def baselines(data: Data, config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """Test accuracies of the alternatives, and everything's validation loss by L2 strength."""
    ones = torch.ones(config.num_train, dtype=torch.float64)
    w0 = torch.zeros(65, 10, dtype=torch.float64)

    def fit(x: Tensor, y: Tensor, weights: Tensor, l2: float, start: Tensor = w0) -> Tensor:
        return train(x, y, weights, l2, start, config.inner_tolerance)

    everything, w = {}, w0
    for l2 in L2_GRID:
        everything[l2] = w = fit(data.train_x, data.train_y, ones, l2, w)
    tuned = max(
        L2_GRID, key=lambda q: accuracy(everything[q], data.validation_x, data.validation_y)
    )
    both_x = torch.cat([data.train_x, data.validation_x])
    both_y = torch.cat([data.train_y, data.validation_y])
    models = {
        "everything": fit(data.train_x, data.train_y, ones, config.l2),
        "everything, tuned l2": everything[tuned],
        "validation set alone": fit(
            data.validation_x, data.validation_y, ones[: config.num_validation], config.l2
        ),
        "everything + validation, tuned l2": fit(
            both_x, both_y, torch.ones(len(both_x), dtype=torch.float64), tuned
        ),
        "clean subset": fit(data.train_x, data.train_y, (~data.corrupted).double(), config.l2),
    }
    if config.copies > 1:
        clean = (~data.corrupted).double()[: config.num_images]
        images, labels = data.train_x[: len(clean)], data.train_y[: len(clean)]
        models["clean subset, no copies"] = fit(images, labels, clean, config.l2)
    losses = {
        f"{l2:g}": float(cross_entropy(data.validation_x @ everything[l2], data.validation_y))
        for l2 in L2_GRID
    }
    return {name: accuracy(w, data.test_x, data.test_y) for name, w in models.items()}, losses


def separation(weights: Tensor, corrupted: Tensor) -> float:
    """Probability that a corrupted example weighs less than a clean one (area under the ROC)."""
    difference = weights[~corrupted][None, :] - weights[corrupted][:, None]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def report_seed(
    data: Data, test_accuracy: dict[str, float], learned: dict[str, Learned]
) -> dict[str, Any]:
    """Figures of one seed, ready for JSON."""
    low, high = test_accuracy["everything"], test_accuracy["clean subset"]
    solvers = {}
    for name, run in learned.items():
        below = run.weights < LOW_WEIGHT
        solvers[name] = {
            "test_accuracy": run.test_accuracy[-1],
            "gap_recovered": (run.test_accuracy[-1] - low) / (high - low),
            "corrupted_low": int(below[data.corrupted].sum()),
            "clean_low": int(below[~data.corrupted].sum()),
            "separation": separation(run.weights, data.corrupted),
            "relative_residual_median": statistics.median(run.relative_residuals),
            "relative_residual_worst": max(run.relative_residuals),
            "num_hvps": run.num_hvps,
            "ihvp_seconds": run.ihvp_seconds,
            "seconds": run.seconds,
            "test_accuracy_by_step": run.test_accuracy,
            "validation_loss_by_step": run.validation_loss,
        }
    return {"test_accuracy": test_accuracy, "solvers": solvers}


def mean_over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same figures on the mean; the recovered share is that of the mean accuracies."""
    baseline = {
        name: statistics.mean(report["test_accuracy"][name] for report in reports)
        for name in reports[0]["test_accuracy"]
    }
    low, high = baseline["everything"], baseline["clean subset"]
    solvers = {}
    for name in reports[0]["solvers"]:
        rows = [report["solvers"][name] for report in reports]
        mean = {
            key: statistics.mean(row[key] for row in rows)
            for key, value in rows[0].items()
            if not isinstance(value, list)
        }
        mean["gap_recovered"] = (mean["test_accuracy"] - low) / (high - low)
        tuned = baseline["everything, tuned l2"]
        mean["gap_recovered_from_tuned"] = (mean["test_accuracy"] - tuned) / (high - tuned)
        mean["relative_residual_worst"] = max(row["relative_residual_worst"] for row in rows)
        solvers[name] = mean
    return {"test_accuracy": baseline, "solvers": solvers}


# ------------------------------------------------------------------------------------- the output


def print_table(mean: dict[str, Any], reports: dict[int, dict[str, Any]], config: Config) -> None:
    """Print the means over the seeds, and what a reader has to know to judge them."""
    print(f"\nTest accuracy, mean over seeds {', '.join(map(str, reports))}")
    baseline = dict(mean["test_accuracy"])
    low, ceiling = baseline["everything"], baseline.pop("clean subset")
    for name, value in baseline.items():
        print(f"  {name:<34} {value:.3f}  {(value - low) / (ceiling - low):4.0%} of the gap")
    for name, row in mean["solvers"].items():
        shares = [f"{r['solvers'][name]['gap_recovered']:.0%}" for r in reports.values()]
        print(
            f"  {f'learned weights, {name}_ihvp':<34} {row['test_accuracy']:.3f}  "
            f"{row['gap_recovered']:4.0%} of the gap (by seed {', '.join(shares)}); "
            f"{row['gap_recovered_from_tuned']:.0%} of that from tuned l2"
        )
    print(f"  {'clean subset (the ceiling)':<34} {ceiling:.3f}")
    print(
        f"\nExamples with weights below {LOW_WEIGHT}, where all start; linear solves; a seed's mean"
    )
    wrong = round(config.corrupted_share * config.num_train)
    for name, row in mean["solvers"].items():
        print(
            f"  {name + '_ihvp':<13} {row['corrupted_low']:.0f} of {wrong} corrupted, "
            f"{row['clean_low']:.0f} of {config.num_train - wrong} clean; relative residual "
            f"{row['relative_residual_median']:.1e} median, {row['relative_residual_worst']:.1e} "
            f"worst; {row['num_hvps']:.0f} HVPs; {row['ihvp_seconds']:.1f} s of hypergradients in "
            f"{row['seconds']:.1f} s"
        )
    losses = ", ".join(f"{value:.3f} at {l2}" for l2, value in mean["losses"].items())
    print(
        f"""
Everything, the learned weights and the clean subset share one inner problem, l2 = {config.l2:g}:
only the weights differ. Everything's validation loss by l2: {losses}.
Tuned l2 is what has the best validation accuracy instead, seed by seed. The learned weights see
the validation set through the outer loss only; nothing sees the test set."""
    )


def draw(
    data: Data,
    learned: dict[str, Learned],
    reports: dict[int, dict[str, Any]],
    mean: dict[str, Any],
) -> Figure:
    """Weights, accuracy by step, and the digits that are trusted least; weights of one seed."""
    styles = {"nystrom": ("-", BLUE), "cg": ("--", ORANGE)}
    figure, (left, middle, right) = side_by_side(6, 7, 7)

    left.suptitle(f"What the weights became (seed {next(iter(reports))})")
    groups = (
        (~data.corrupted, GREEN, "right label", ""),
        (data.corrupted, ORANGE, "wrong label", "///"),
    )
    panels = left.subplots(len(learned), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, run) in zip(panels, learned.items(), strict=True):
        for chosen, colour, label, hatch in groups:
            look = {"color": colour, "hatch": hatch, "label": label, "alpha": 0.65}
            panel.hist(run.weights[chosen].numpy(), bins=25, range=(0, 1), ec="white", **look)
        panel.axvline(LOW_WEIGHT, color=GREY, linestyle=":")
        panel.set_title(f"{name}_ihvp", loc="left", fontsize=10)
        panel.set_ylabel("training examples")
    panels[0].annotate("start", (LOW_WEIGHT, 0.85), (-4, 0), ("data", "axes fraction"),
                       "offset points", color=GREY, ha="right")  # fmt: skip
    panels[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(0.9, 1))
    panels[-1].set_xlabel("weight")

    middle.suptitle(f"Test accuracy (mean and range of {len(reports)} seeds)")
    axes = middle.subplots()
    for name, line in (
        ("clean subset", "-"),
        ("validation set alone", "--"),
        ("everything, tuned l2", "-."),
        ("everything", ":"),
    ):
        value = mean["test_accuracy"][name]
        axes.axhline(value, color=GREY, linestyle=line, linewidth=1.2)
        axes.annotate(name, (1.0, value), (0, 3), ("axes fraction", "data"), "offset points",
                      ha="right", color=GREY, fontsize=9)  # fmt: skip
    for name in learned:
        curves = [report["solvers"][name]["test_accuracy_by_step"] for report in reports.values()]
        points = list(zip(*curves, strict=True))
        line, colour = styles[name]
        lowest, highest = [min(point) for point in points], [max(point) for point in points]
        axes.plot(lowest, line, highest, line, color=colour, alpha=0.3, linewidth=0.8)
        average = [statistics.mean(point) for point in points]
        axes.plot(average, line, color=colour, linewidth=2, label=f"{name}_ihvp")
    axes.set_xlabel("outer step")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.36))

    name, run = next(iter(learned.items()))
    right.suptitle(f"The least trusted, as labelled and in truth ({name}_ihvp)")
    cells = right.subplots(4, 6).flat
    for cell, index in zip(cells, run.weights.argsort().tolist(), strict=False):
        draw_image(cell, data.train_x[index])
        given, true = int(data.train_y[index]), int(data.true_y[index])
        cell.set_title(f"“{given}” is {true}", fontsize=10, pad=3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the seeds, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "hyper_cleaning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--outer-steps", type=int, default=Config.outer_steps)
    parser.add_argument("--copies", type=int, default=Config.copies, help="examples an image")
    options = begin(parser, arguments)
    config = Config(outer_steps=options.outer_steps, copies=options.copies)

    reports: dict[int, dict[str, Any]] = {}
    losses = []
    first: tuple[Data, dict[str, Learned]] | None = None
    total = len(options.seeds) * len(options.solvers) * config.outer_steps
    with tqdm(total=total, unit="step") as progress:
        for seed in options.seeds:
            data = make_data(seed, config)
            progress.set_description(f"seed {seed}, baselines")
            accuracies, loss = baselines(data, config)
            losses.append(loss)
            learned = {
                solver: learn_weights(data, solver, config, seed, progress)
                for solver in options.solvers
            }
            reports[seed] = report_seed(data, accuracies, learned)
            first = first or (data, learned)
    assert first is not None
    mean = mean_over_seeds(list(reports.values()))
    mean["losses"] = {l2: statistics.mean(loss[l2] for loss in losses) for l2 in losses[0]}

    results = {"config": asdict(config), "mean": mean, "seeds": reports}
    write_json(options.run_dir, results)
    with csv_table(options.run_dir, ["seed", "method", "test_accuracy"]) as writer:
        for seed, report in reports.items():
            writer.writerows([seed, *row] for row in report["test_accuracy"].items())
            for name, row in report["solvers"].items():
                writer.writerow([seed, f"{name}_ihvp", row["test_accuracy"]])
    print_table(mean, reports, config)
    figure = draw(*first, reports, mean)
    save_picture(figure, options.run_dir, "hyper_cleaning")
    return results


if __name__ == "__main__":
    main()
