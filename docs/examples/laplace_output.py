"""The table and the picture of ``laplace.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import BLUE, GREY, ORANGE, draw_image, side_by_side
from matplotlib.figure import Figure, SubFigure

if TYPE_CHECKING:
    from laplace import Curve, Digits


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


def draw(curve: Curve, digits: Digits) -> Figure:
    """The curve's posterior, and the turned digits."""
    figure, (left, right) = side_by_side(6, 8)
    draw_curve(left, curve)
    draw_digits(right, digits)
    return figure


def draw_curve(figure: SubFigure, curve: Curve) -> None:
    """The band of the posterior, with the dense one as dots on its edge."""
    figure.suptitle("A curve with a gap in its data")
    axes = figure.subplots()
    x, mean, sd = (t.numpy() for t in (curve.grid, curve.mean, curve.sd))
    axes.fill_between(x, mean - 2 * sd, mean + 2 * sd, color=BLUE, alpha=0.2, linewidth=0,
                      label="two standard deviations")  # fmt: skip
    axes.plot(x, mean, color=BLUE, linewidth=2, label="network")
    axes.plot(x, curve.truth.numpy(), "--", color=GREY, linewidth=1, label="truth")
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
        draw_image(axes, image)
        axes.set_title(f"{angle}°", fontsize=8, pad=2)
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
