"""Draw what the suites measure: errors against products, and the ratios of times.

    python -m benchmarks.report [--output runs/bench] [--trial]

Writes ``errors.png``, ``ratios.png`` and a CSV of each, and prints the figures.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import hypergrad

from .benchmarks.problems import PROBLEMS, SMALL_PROBLEMS, spectral
from .benchmarks.speed import ProductRatios, SolverRatios
from .benchmarks.timing import single_threaded

DAMPING = 1e-2
SPECTRA = ("rank-deficient", "exponential", "1/i", "flat")
COUNTS = (2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100)
SEEDS = 5
#: Colours that people with any colour vision tell apart (Okabe and Ito).
COLOURS = {"Nyström": "#D55E00", "CG": "#0072B2", "Neumann": "#009E73"}
PRODUCT_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7")


def solver_of(name: str, count: int, seed: int) -> hypergrad.Solver:
    if name == "Nyström":
        return hypergrad.Nystrom(count, generator=torch.Generator().manual_seed(seed))
    if name == "CG":
        return hypergrad.CG(rtol=0.0, max_iters=count)
    return hypergrad.Neumann(num_terms=count)


def error_rows(counts: Sequence[int], seeds: int) -> list[dict[str, object]]:
    """Median relative error by spectrum, solver and products used."""
    rows: list[dict[str, object]] = []
    for spectrum in SPECTRA:
        for name in COLOURS:
            for count in counts:
                errors, hvps = [], 0
                for seed in range(seeds):
                    a = spectral(spectrum, torch.float64, seed=seed)
                    generator = torch.Generator().manual_seed(100 + seed)
                    v = torch.randn(len(a.basis), generator=generator, dtype=torch.float64)
                    truth = torch.linalg.solve(a.dense() + DAMPING * torch.eye(len(v)).double(), v)
                    solver = solver_of(name, count, seed)
                    solution = hypergrad.solve(a, v, solver, damping=DAMPING, on_failure="ignore")
                    errors.append(float((solution.value - truth).norm() / truth.norm()))
                    hvps = solution.info.num_hvps
                row = {"spectrum": spectrum, "solver": name, "budget": count, "hvps": hvps}
                rows.append(row | {"error": median(errors)})
    return rows


def ratio_rows(*, trial: bool) -> list[dict[str, object]]:
    """Every ratio of the speed suite."""
    problems = SMALL_PROBLEMS if trial else PROBLEMS
    rows: list[dict[str, object]] = []
    for problem in problems:
        solvers = SolverRatios()
        solvers.problems = problems  # type: ignore[misc]
        solvers.setup(problem)
        for what, value in (
            ("Nyström rank 10 / 10 products", solvers.track_nystrom_over_products(problem)),
            ("CG 20 iterations / 20 products", solvers.track_cg_over_products(problem)),
        ):
            rows.append({"problem": problem, "what": what, "ratio": value})
        for kind in ProductRatios.kinds:
            products = ProductRatios()
            products.problems = problems  # type: ignore[misc]
            products.setup(problem, kind)
            label = kind.replace("_", " ")
            one = products.track_one_product(problem, kind)
            ten = products.track_ten_products(problem, kind)
            rows.append({"problem": problem, "what": f"1 product, {label}", "ratio": one})
            rows.append({"problem": problem, "what": f"10 products, {label}", "ratio": ten})
    return rows


def draw_errors(rows: list[dict[str, object]], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(SPECTRA), figsize=(12, 3.6), sharey=True, layout="constrained"
    )
    for axis, spectrum in zip(axes, SPECTRA, strict=True):
        for name, colour in COLOURS.items():
            mine = [row for row in rows if (row["spectrum"], row["solver"]) == (spectrum, name)]
            axis.plot(
                [row["hvps"] for row in mine],
                [row["error"] for row in mine],
                color=colour, marker="o", markersize=3, label=name,
            )  # fmt: skip
        axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=spectrum, xlabel="HVPs", xscale="log", yscale="log")
        axis.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Error of one solve, n = 200, |A| = 1, damping {DAMPING:g}, float64 (dotted: x = 0)"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_ratios(rows: list[dict[str, object]], path: Path) -> None:
    """Two panels: solvers in their own products, products in gradients."""
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4.2), width_ratios=[2, 3, 3], layout="constrained"
    )
    groups = {
        "solve / its products": [row for row in rows if "/" in str(row["what"])],
        "1 product / gradient": [row for row in rows if str(row["what"]).startswith("1 p")],
        "10 products / gradient": [row for row in rows if str(row["what"]).startswith("10 p")],
    }
    floors = {
        "solve / its products": 1.0,
        "1 product / gradient": 2.0,
        "10 products / gradient": 20.0,
    }
    for axis, (title, mine) in zip(axes, groups.items(), strict=True):
        _bars(axis, mine, list(COLOURS.values()) if "solve" in title else PRODUCT_COLOURS)
        axis.axhline(floors[title], color="0.3", linewidth=0.9, linestyle=":")
        axis.set_title(f"{title} (dotted: {floors[title]:g})", fontsize=10)
    axes[0].set_ylabel("ratio of processor times, one thread")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Axes, rows: list[dict[str, object]], colours: Sequence[str]) -> None:
    problems = list(dict.fromkeys(str(row["problem"]) for row in rows))
    whats = list(dict.fromkeys(str(row["what"]) for row in rows))
    width = 0.8 / len(whats)
    for i, (what, colour) in enumerate(zip(whats, colours, strict=False)):
        heights = [float(str(row["ratio"])) for row in rows if row["what"] == what]
        places = [j + (i - (len(whats) - 1) / 2) * width for j in range(len(problems))]
        label = what.split(" / ")[0].split(", ")[-1]
        bars = axis.bar(places, heights, width, color=colour, label=label)
        axis.bar_label(bars, fmt="%.2g", fontsize=7)
    axis.set_xticks(range(len(problems)), problems)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


def write_csv(rows: list[dict[str, object]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, object]], row_key: str, column_key: str, value: str) -> None:
    columns = list(dict.fromkeys(str(row[column_key]) for row in rows))
    print(" " * 44 + "".join(f"{column:>16}" for column in columns))
    for name in dict.fromkeys(str(row[row_key]) for row in rows):
        cells = {str(row[column_key]): row[value] for row in rows if str(row[row_key]) == name}
        line = (f"{float(str(cells[column])):16.2g}" for column in columns)
        print(f"{name:44}" + "".join(line))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--trial", action="store_true", help="the smallest case of everything")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    single_threaded()
    mpl.use("Agg")

    errors = error_rows(COUNTS[:2] if options.trial else COUNTS, 1 if options.trial else SEEDS)
    write_csv(errors, options.output / "errors.csv")
    draw_errors(errors, options.output / "errors.png")
    ratios = ratio_rows(trial=options.trial)
    write_csv(ratios, options.output / "ratios.csv")
    draw_ratios(ratios, options.output / "ratios.png")

    shown = [
        row | {"what": f"{row['solver']}, rank, iterations or terms {row['budget']}"}
        for row in errors
        if row["budget"] in (COUNTS[0], 25, COUNTS[-1])
    ]
    print("Relative error:")
    print_table(shown, "what", "spectrum", "error")
    print("\nRatios of processor times, one thread:")
    print_table(ratios, "what", "problem", "ratio")
    print(f"\nPictures and CSV files are in {options.output}.")


if __name__ == "__main__":
    main()
