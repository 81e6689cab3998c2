"""What the examples have in common: the digits, the options, the picture's style, the files."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure, SubFigure
from sklearn.datasets import load_digits
from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito

Examples = tuple[Tensor, Tensor]


def shuffled_digits(sizes: Sequence[int], generator: torch.Generator) -> list[Examples]:
    """Scikit-learn's handwritten digits, shuffled, in parts of these sizes; all others come last.

    Each part has images of shape (n, 64) with pixels in [0, 1], float64, and labels (n,).
    """
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float64) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=generator)
    parts = torch.split(order, [*sizes, len(x) - sum(sizes)])
    return [(x[part], y[part]) for part in parts]


def with_constant(x: Tensor) -> Tensor:
    """The images with a constant 1 behind their pixels, shape (n, 65)."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def parser_of(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser described by the first line of the script's docstring, with ``--run-dir``."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / name)
    return parser


def begin(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; the folder for the results is made."""
    options = parser.parse_args(arguments)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    # The examples are small: more threads in a process cost more than they bring.
    torch.set_num_threads(1)
    return options


def write_json(run_dir: Path, results: dict[str, Any], indent: int | None = 1) -> None:
    """All results, as ``results.json``."""
    (run_dir / "results.json").write_text(json.dumps(results, indent=indent), "utf-8")


@contextmanager
def csv_table(run_dir: Path, header: Sequence[str]) -> Iterator[Any]:
    """A writer of the rows of ``results.csv``."""
    with (run_dir / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        yield writer


def set_style() -> None:
    """The look of every picture."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def side_by_side(*widths: int, height: float = 4.9) -> tuple[Figure, Sequence[SubFigure]]:
    """A wide figure, and its parts from left to right, of these relative widths."""
    set_style()
    figure = plt.figure(figsize=(14, height), layout="constrained")
    return figure, figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]


def draw_image(axes: Any, x: Tensor, **limits: float) -> None:
    """One image of 64 pixels, without a frame."""
    axes.imshow(x[:64].reshape(8, 8).numpy(), cmap="gray_r", **limits)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save_picture(
    figure: Figure,
    run_dir: Path,
    name: str,
    others: Sequence[str] = ("results.json", "results.csv"),
) -> None:
    """Write the picture, and say where it and the other files are."""
    figure.savefig(run_dir / f"{name}.png", dpi=110)
    plt.close(figure)
    print(f"\n{', '.join(others)} and {name}.png are in {run_dir}")
