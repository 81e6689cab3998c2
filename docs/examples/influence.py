"""Influence functions: which training digits made this prediction?

Softmax regression on scikit-learn's handwritten digits, with an L2 term. How would the loss of a
test digit change if one training digit were left out? To first order in 1/n, by Koh and Liang
(2017, arXiv 1703.04730),

    loss_t(W without i) - loss_t(W)  ~  1/n <grad loss_t, H^-1 grad loss_i>

with H the Hessian of the training loss at its minimiser W: one inverse-Hessian-vector product a
test digit answers it for every training digit. They come from ``hypergrad.solve``, with an exact
solver, by CG and by Nyström-preconditioned CG, and all of them are compared with the truth: every
training digit is in fact left out, and the model trained again until its gradient has a norm of
1e-12.

    python docs/examples/influence.py --run-dir runs/influence
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure, SubFigure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_train: training digits.
        num_test: test digits whose predictions are explained.
        num_retrained: training digits that are left out, one by one: the first so many.
        l2: strength of the L2 term.
        other_l2: strengths for which the comparison is made once more, with the exact solver.
        rtol: relative residual at which CG stops, with and without a sketch.
        rank: of the Nyström sketch, of 650 parameters.
        gradient_tolerance: norm of the gradient at which a training has converged.
        seed: of the split and of the sketch.
    """

    num_train: int = 1000
    num_test: int = 100
    num_retrained: int = 1000
    l2: float = 3e-3
    other_l2: tuple[float, ...] = (3e-2, 1e-2, 1e-3, 3e-4, 1e-4)
    rtol: float = 1e-6
    rank: int = 200
    gradient_tolerance: float = 1e-12
    seed: int = 0


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 65), 64 pixels in [0, 1] and a constant; labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_data(config: Config) -> Data:
    """Split the digits at random."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float64) / 16.0
    x, y = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))
    train, test = order[: config.num_train], order[config.num_train :][: config.num_test]
    return Data(x[train], y[train], x[test], y[test])


def losses(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example, shape (n,)."""
    return cross_entropy(x @ w, y, reduction="none")


def gradients(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of each example's loss, shape (n, 65, 10)."""
    each = torch.func.grad(lambda w, x, y: cross_entropy(x @ w, y))
    found: Tensor = torch.func.vmap(each, in_dims=(None, 0, 0))(w, x, y)
    return found


# --------------------------------------------------------------------------------------- training


def weighted_loss(w: Tensor, data: Data, weights: Tensor) -> Tensor:
    """Data term of the training loss, 1/n sum_i weights_i loss_i; a weight of 0 leaves one out."""
    return (weights * losses(w, data.train_x, data.train_y)).sum() / len(data.train_y)


def train(
    data: Data,
    weights: Tensor,
    l2: float,
    w: Tensor,
    tolerance: float,
    preconditioner: hypergrad.LinearOperator | None = None,
    max_steps: int = 50,
) -> Tensor:
    """Minimise the data term and l2/2 |W|^2 from ``w`` by Newton's method.

    The loss is strongly convex: at a gradient g the minimiser is within |g| / l2. The Newton
    systems are solved with a relative residual of 1e-4, so a step near the solution takes four
    digits off the gradient.
    """

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        (found,) = torch.autograd.grad(weighted_loss(w, data, weights), w)
        return found + l2 * w.detach()

    solver = hypergrad.CG(rtol=1e-4, preconditioner=preconditioner)
    g = gradient(w)
    for _ in range(max_steps):
        if float(g.norm()) <= tolerance:
            return w
        hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, weights), w)
        step = hypergrad.solve(hessian, g, solver, damping=l2, on_failure="raise").value
        # Far from the solution a whole step can be too long: halve it until the gradient's norm
        # falls by a quarter of what it would in a quadratic.
        scale = 1.0
        while float(gradient(w - scale * step).norm()) > (1.0 - 0.25 * scale) * float(g.norm()):
            scale /= 2.0
            if scale < 1e-6:
                raise RuntimeError(f"no step lowers the gradient, which is {float(g.norm()):.1e}")
        w = w - scale * step
        g = gradient(w)
    raise RuntimeError(f"training stopped at a gradient of {float(g.norm()):.1e}")


def leave_one_out(data: Data, l2: float, w: Tensor, config: Config, progress: Any) -> Tensor:
    """How much each test loss rises when a training digit is left out: the exact answer.

    Shape (num_test, num_retrained). Trains anew for each digit, from the solution with all of
    them. Every Newton system is close to the one there, so one sketch preconditions them all.
    """
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    sketch = hypergrad.nystrom_sketch(
        hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w),
        config.rank,
        damping=l2,
        generator=torch.Generator().manual_seed(config.seed),
    )
    preconditioner = sketch.preconditioner(l2)
    before = losses(w, data.test_x, data.test_y)
    changes = []
    progress.set_description(f"l2 {l2:g}, leaving one out")
    for left_out in range(config.num_retrained):
        weights = ones.clone()
        weights[left_out] = 0.0
        without = train(data, weights, l2, w, config.gradient_tolerance, preconditioner)
        changes.append(losses(without, data.test_x, data.test_y) - before)
        progress.update()
    return torch.stack(changes, dim=1)


# -------------------------------------------------------------------------------------- influence


def make_solvers(config: Config) -> dict[str, hypergrad.Solver]:
    """The three solvers that are compared."""
    generator = torch.Generator().manual_seed(config.seed)
    return {
        "exact": hypergrad.Exact(),
        "cg": hypergrad.CG(rtol=config.rtol),
        "nystrom_pcg": hypergrad.NystromPCG(config.rank, rtol=config.rtol, generator=generator),
    }


def influence(
    data: Data, l2: float, w: Tensor, solver: hypergrad.Solver
) -> tuple[Tensor, hypergrad.SolveInfo]:
    """1/n <grad loss_t, H^-1 grad loss_i> for each test digit t and training digit i.

    Shape (num_test, num_train). One solve a test digit, all of them in one batch.
    """
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    # The L2 term adds l2 I to the Hessian: that is known, and goes where multiples of the identity
    # go. It is not a choice of the solver here; the minimiser is that of the loss with it.
    hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w)
    test_gradients = gradients(w, data.test_x, data.test_y)
    solution = hypergrad.solve(hessian, test_gradients, solver, damping=l2, batched=True)
    train_gradients = gradients(w, data.train_x, data.train_y)
    scores = solution.value.flatten(1) @ train_gradients.flatten(1).T / len(data.train_y)
    return scores, solution.info


def one_newton_step(data: Data, l2: float, w: Tensor, count: int) -> Tensor:
    """How much each test loss rises by the first Newton step of each retraining.

    Shape (num_test, count). The step is 1/n (H - H_i/n)^-1 grad loss_i: what influence leaves out
    is that the Hessian changes, too, and that the test loss is curved (Pregibon 1981). The Hessian
    of one example with probabilities p is the Kronecker product of x x' and diag(p) - p p' = S S',
    of rank 9, so the inverse follows from that of H by the Woodbury identity.
    """
    n, features, classes = len(data.train_y), *w.shape
    ones = torch.ones(n, dtype=torch.float64)
    hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w) + l2
    inverse = torch.linalg.inv(hessian.to_dense()).reshape(features, classes, features, classes)

    x, y = data.train_x[:count], data.train_y[:count]
    p = torch.softmax(x @ w, dim=1)
    r = p - torch.nn.functional.one_hot(y, classes)  # grad loss_i is the outer product of x_i, r_i
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # S
    # With K_i what H^-1 makes of x_i in its own logits, (H - H_i/n)^-1 grad loss_i is H^-1 times
    # the outer product of x_i and r + S (n I - S'K S)^-1 S'K r.
    own = torch.einsum("na,acbd,nb->ncd", x, inverse, x)
    pulled = root.mT @ own
    small = n * torch.eye(classes, dtype=torch.float64) - pulled @ root
    r = r + (root @ torch.linalg.solve(small, pulled @ r[:, :, None]))[:, :, 0]
    steps = torch.einsum("acbd,nb,nd->nac", inverse, x, r) / n

    before = losses(w, data.test_x, data.test_y)
    after = torch.func.vmap(losses, in_dims=(0, None, None))(w + steps, data.test_x, data.test_y)
    return (after - before).T


# ---------------------------------------------------------------------------------- the comparison


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of all entries."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def compare(predicted: Tensor, exact: Tensor) -> dict[str, Any]:
    """How well the prediction agrees with retraining; both of shape (num_test, num_retrained).

    A correlation for each test digit, over the training digits, and one over all pairs.
    """
    predicted = predicted[:, : exact.shape[1]]  # of the training digits that were left out
    rows = [correlation(*pair) for pair in zip(predicted, exact, strict=True)]
    return {
        "correlation_all_pairs": correlation(predicted, exact),
        "correlation_worst": min(rows),
        "correlation_median": float(torch.tensor(rows).median()),
        # Correlation is blind to a common factor; the slope of exact on predicted is not.
        "slope": float((predicted * exact).sum() / predicted.square().sum()),
        "correlation_by_test_digit": rows,
    }


@dataclass
class Explained:
    """What is known of the test digits at one strength."""

    w: Tensor
    exact: Tensor  # (num_test, num_retrained)
    influence: dict[str, Tensor]  # by solver, (num_test, num_train)
    report: dict[str, Any]


def explain(
    data: Data, l2: float, solvers: dict[str, hypergrad.Solver], config: Config, progress: Any
) -> Explained:
    """Train, predict the changes by each solver, and retrain for the exact ones."""
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    w = train(data, ones, l2, torch.zeros(65, 10, dtype=torch.float64), config.gradient_tolerance)
    scores, reports = {}, {}
    exact = leave_one_out(data, l2, w, config, progress)
    for name, solver in solvers.items():
        scores[name], info = influence(data, l2, w, solver)
        reports[name] = {
            **compare(scores[name], exact),
            "relative_residual_worst": info.relative_residual,
            "iterations": max((c.iterations for c in info.columns), default=info.iterations),
            "num_hvps": info.num_hvps,
        }
    report = {
        "l2": l2,
        "test_accuracy": float(((data.test_x @ w).argmax(1) == data.test_y).double().mean()),
        "test_loss": float(losses(w, data.test_x, data.test_y).mean()),
        "exact_change_median": float(exact.abs().median()),
        "exact_change_largest": float(exact.abs().max()),
        "solvers": reports,
        "newton_step": compare(one_newton_step(data, l2, w, config.num_retrained), exact),
    }
    return Explained(w, exact, scores, report)


# ------------------------------------------------------------------------------------- the output


def print_table(results: dict[str, Any], config: Config) -> None:
    """Print the correlations, by solver and by strength."""
    main = results["main"]
    print(
        f"\nChange of {config.num_test} test losses when one of {config.num_retrained} training "
        f"digits is left out, l2 = {config.l2:g}:\npredicted by influence functions, against "
        "training again without it; test digits one by one, then all pairs"
    )
    print("  solver        worst    median   all pairs  relative residual  HVPs")
    for name, row in main["solvers"].items():
        print(
            f"  {name:<12}  {row['correlation_worst']:.5f}  {row['correlation_median']:.5f}  "
            f"{row['correlation_all_pairs']:.5f}    {row['relative_residual_worst']:.1e}"
            f"            {row['num_hvps']}"
        )
    print("\nBy strength: influence by the exact solver, and one Newton step of the retraining")
    print("  l2       accuracy  test loss  influence: worst, median, all   Newton: worst, all")
    for report in results["strengths"]:
        row, step = report["solvers"]["exact"], report["newton_step"]
        print(
            f"  {report['l2']:<7g}  {report['test_accuracy']:.2f}      {report['test_loss']:.3f}"
            f"      {row['correlation_worst']:.4f}  {row['correlation_median']:.4f}  "
            f"{row['correlation_all_pairs']:.4f}          {step['correlation_worst']:.4f}  "
            f"{step['correlation_all_pairs']:.4f}"
        )


BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito


def draw_digit(axes: Any, x: Tensor, title: str, colour: str = "black") -> None:
    """One image with its title."""
    axes.imshow(x[:64].reshape(8, 8).numpy(), cmap="gray_r")
    axes.set_title(title, fontsize=9, pad=3, color=colour)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_explanations(figure: SubFigure, data: Data, explained: Explained) -> None:
    """The two test digits that are furthest from right, with what helped and harmed them most."""
    figure.suptitle("Which training digits made this prediction?")
    scores = explained.influence["cg"]
    probabilities = torch.softmax(data.test_x @ explained.w, dim=1)
    right = probabilities.gather(1, data.test_y[:, None])
    others = probabilities.scatter(1, data.test_y[:, None], 0.0)
    hardest = (right[:, 0] - others.max(dim=1).values).argsort()[:2].tolist()
    # Two rows a test digit; the first two columns are its own.
    grid = figure.add_gridspec(4, 7)
    for place, test in enumerate(hardest):
        share, best = probabilities[test].max(dim=0)
        title = (
            f"test digit: a {int(data.test_y[test])}\npredicted: {int(best)} ({float(share):.0%})"
        )
        cell = figure.add_subplot(grid[2 * place : 2 * place + 2, :2])
        draw_digit(cell, data.test_x[test], title)
        order = scores[test].argsort(descending=True).tolist()
        rows = ((order[:5], "helps", GREEN), (order[::-1][:5], "harms", ORANGE))
        for below, (chosen, verb, colour) in enumerate(rows):
            for column, index in enumerate(chosen):
                cell = figure.add_subplot(grid[2 * place + below, 2 + column])
                change = float(scores[test, index])
                title = f"{int(data.train_y[index])}: {change:+.3f}"
                draw_digit(cell, data.train_x[index], title, colour)
                if column == 0:
                    cell.set_ylabel(verb, color=colour)


def draw(data: Data, explained: Explained, results: dict[str, Any]) -> Figure:
    """Predicted against exact changes, correlations by strength, and two explanations."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 4.9), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=(6, 6, 9))[0]

    row = results["main"]["solvers"]["cg"]
    left.suptitle(f"All pairs, l2 = {results['main']['l2']:g} (CG)")
    axes = left.subplots()
    predicted = explained.influence["cg"][:, : explained.exact.shape[1]]
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    axes.plot(predicted.flatten(), explained.exact.flatten(), ".", color=BLUE, markersize=2,
              alpha=0.4, rasterized=True)  # fmt: skip
    text = (
        f"correlation {row['correlation_all_pairs']:.4f};\n"
        f"by test digit {row['correlation_worst']:.4f} or more"
    )
    axes.annotate(text, (0.04, 0.9), xycoords="axes fraction", color=GREY)
    axes.set(xlabel="change of the test loss by influence", ylabel="the same by training again")

    middle.suptitle("Correlation by strength of the L2 term")
    axes = middle.subplots()
    reports = sorted(results["strengths"], key=lambda report: report["l2"])
    strengths = [report["l2"] for report in reports]
    for rows, line, colour, label in (
        ([r["solvers"]["exact"] for r in reports], "-", BLUE, "influence"),
        ([r["newton_step"] for r in reports], "--", ORANGE, "one Newton step"),
    ):
        # Distance from 1, on a logarithmic scale: the interesting end of it.
        median = [1 - r["correlation_median"] for r in rows]
        worst = [1 - r["correlation_worst"] for r in rows]
        axes.loglog(strengths, worst, line, color=colour, marker="o", markersize=4,
                    label=f"{label}, worst test digit")  # fmt: skip
        axes.loglog(strengths, median, line, color=colour, alpha=0.45, label=f"{label}, median")
    axes.axhline(0.01, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("0.99", (1, 0.01), (0, 3), ("axes fraction", "data"), "offset points",
                  color=GREY, ha="right")  # fmt: skip
    axes.set(xlabel="l2", ylabel="1 - correlation with retraining")
    axes.legend(frameon=False, fontsize=8, loc="lower left")

    draw_explanations(right, data, explained)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, explain, retrain, print the table, write the results and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/influence"))
    parser.add_argument("--num-retrained", type=int, default=Config.num_retrained)
    parser.add_argument("--other-l2", type=float, nargs="*", default=Config.other_l2)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args(arguments)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    config = Config(
        num_retrained=options.num_retrained, other_l2=tuple(options.other_l2), seed=options.seed
    )
    # The products are small: more threads in a process cost more than they bring.
    torch.set_num_threads(1)

    data, solvers = make_data(config), make_solvers(config)
    with tqdm(total=config.num_retrained * (1 + len(config.other_l2)), unit="model") as progress:
        explained = explain(data, config.l2, solvers, config, progress)
        exact = {"exact": solvers["exact"]}
        others = [explain(data, l2, exact, config, progress).report for l2 in config.other_l2]
    strengths = sorted([explained.report, *others], key=lambda report: -report["l2"])
    results = {"config": asdict(config), "main": explained.report, "strengths": strengths}

    (options.run_dir / "results.json").write_text(json.dumps(results, indent=1), "utf-8")
    with (options.run_dir / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["test_digit", "train_digit", *explained.influence, "retrained"])
        for test, row in enumerate(explained.exact.tolist()):
            for left_out, change in enumerate(row):
                scores = [float(s[test, left_out]) for s in explained.influence.values()]
                writer.writerow([test, left_out, *scores, change])
    print_table(results, config)
    figure = draw(data, explained, results)
    figure.savefig(options.run_dir / "influence.png", dpi=110)
    plt.close(figure)
    print(f"\nresults.json, results.csv and influence.png are in {options.run_dir}")
    return results


if __name__ == "__main__":
    main()
