"""The table and the picture of ``influence.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from common import BLUE, GREEN, GREY, ORANGE, draw_image, side_by_side
from matplotlib.figure import Figure, SubFigure

if TYPE_CHECKING:
    from influence import Config, Data, Explained


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
        draw_image(cell, data.test_x[test])
        cell.set_title(title, fontsize=9, pad=3)
        order = scores[test].argsort(descending=True).tolist()
        rows = ((order[:5], "helps", GREEN), (order[::-1][:5], "harms", ORANGE))
        for below, (chosen, verb, colour) in enumerate(rows):
            for column, index in enumerate(chosen):
                cell = figure.add_subplot(grid[2 * place + below, 2 + column])
                change = float(scores[test, index])
                title = f"{int(data.train_y[index])}: {change:+.3f}"
                draw_image(cell, data.train_x[index])
                cell.set_title(title, fontsize=9, pad=3, color=colour)
                if column == 0:
                    cell.set_ylabel(verb, color=colour)


def draw(data: Data, explained: Explained, results: dict[str, Any]) -> Figure:
    """Predicted against exact changes, correlations by strength, and two explanations."""
    figure, (left, middle, right) = side_by_side(6, 6, 9)

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
