"""The Hessian's spectrum of a convolutional network, before and after training.

A small CNN learns scikit-learn's handwritten digits. How does the Hessian of its training loss look
at the random start, and how at the end? Products with it tell, by ``hypergrad.spectral_density``:

    top eigenvalues    the largest Ritz values of Lanczos runs
    density            stochastic Lanczos quadrature, from the same runs

The same operator goes to SciPy's ``eigsh`` through ``to_scipy()``, and with a few thousand
parameters it can be written out, so that every figure is held against an independent one.

    python docs/examples/cnn_spectrum.py --run-dir runs/cnn_spectrum
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from common import (
    BLUE,
    GREY,
    ORANGE,
    begin,
    csv_table,
    parser_of,
    save_picture,
    shuffled_digits,
    side_by_side,
    write_json,
)
from matplotlib.figure import Figure
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_train: training digits; the Hessian is that of the mean loss over all of them.
        channels: of the two convolutions.
        epochs: of training with Adam.
        batch_size: of the training; the Hessian takes all digits at once.
        lr: Adam's step size.
        num_steps: Lanczos steps a probe.
        num_probes: of the density.
        num_top: largest eigenvalues that are named.
        dense: whether to write the Hessian out as well, for the exact spectrum.
        seed: of everything that is random.
    """

    num_train: int = 500
    channels: tuple[int, int] = (6, 12)
    epochs: int = 30
    batch_size: int = 25
    lr: float = 5e-3
    num_steps: int = 60
    num_probes: int = 8
    num_top: int = 12
    dense: bool = True
    seed: int = 0


# ------------------------------------------------------------------------------------ the network


class Network(nn.Module):
    """Two convolutions with pooling, and a linear layer; images of shape (n, 1, 8, 8)."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        first, second = channels
        self.first = nn.Conv2d(1, first, 3, padding=1)
        self.second = nn.Conv2d(first, second, 3, padding=1)
        self.out = nn.Linear(second * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, 10)."""
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
        logits: Tensor = self.out(x.flatten(1))
        return logits


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 1, 8, 8) in [0, 1], float32; labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_data(config: Config) -> Data:
    """Split the digits at random."""
    parts = shuffled_digits([config.num_train], torch.Generator().manual_seed(config.seed))
    train, test = ((x.float().reshape(-1, 1, 8, 8), y) for x, y in parts)
    return Data(*train, *test)


def make_network(config: Config) -> Network:
    """A network with random weights, without touching torch's global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Network(config.channels)


def train(network: Network, data: Data, config: Config, progress: Any) -> None:
    """Adam on minibatches."""
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr)
    for _ in range(config.epochs):
        order = torch.randperm(len(data.train_x), generator=generator)
        for batch in torch.split(order, config.batch_size):
            optimiser.zero_grad()
            cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        progress.update()


# ------------------------------------------------------------------------------------ the Hessian


def hessian_of(network: Network, data: Data) -> hypergrad.HessianOperator:
    """The Hessian of the mean training loss in all parameters, where they are now."""
    params = {name: leaf.detach().clone() for name, leaf in network.named_parameters()}

    def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, params, (x,)), y)

    return hypergrad.hessian(loss_fn, params, data.train_x, data.train_y)


@dataclass
class Spectrum:
    """What is known of one Hessian."""

    density: hypergrad.SpectralDensity
    exact: Tensor | None  # all eigenvalues, float64, ascending
    report: dict[str, Any]


def examine(network: Network, data: Data, config: Config) -> Spectrum:
    """Eigenvalues and density, by Lanczos here, by ARPACK in SciPy, and of the dense matrix."""
    hessian = hessian_of(network, data)
    density = hypergrad.spectral_density(
        hessian,
        num_steps=config.num_steps,
        num_probes=config.num_probes,
        generator=torch.Generator().manual_seed(config.seed),
    )
    ours = density.top(config.num_top)

    start = np.random.default_rng(config.seed).standard_normal(hessian.shape[0])
    operator = hessian.to_scipy()
    scipy = eigsh(operator, config.num_top, which="LA", v0=start, return_eigenvectors=False)
    lowest = eigsh(operator, 1, which="SA", v0=start, tol=1e-3, return_eigenvectors=False)

    report: dict[str, Any] = {
        "num_params": hessian.shape[0],
        "loss": float(hessian.loss),
        "test_accuracy": accuracy(network, data.test_x, data.test_y),
        "top": ours.tolist(),
        "top_scipy": sorted(map(float, scipy), reverse=True),
        "smallest": density.smallest,
        "smallest_scipy": float(lowest[0]),
        "mean": density.moment(1),
        # As many directions as there are classes, less one, against the whole trace.
        "share_of_nine": float(ours[:9].sum()) / (density.moment(1) * density.dim),
        "num_hvps": density.num_hvps,
    }
    exact = None
    if config.dense:
        exact = torch.linalg.eigvalsh(hessian.to_dense(chunk_size=32).double())
        report["top_dense"] = exact.flip(0)[: config.num_top].tolist()
        report["smallest_dense"] = float(exact[0])
        report["mean_dense"] = float(exact.mean())
        report["share_of_nine_dense"] = float(exact[-9:].sum() / exact.sum())
        report["distance"] = distance(density, exact)
    return Spectrum(density, exact, report)


def accuracy(network: Network, x: Tensor, y: Tensor) -> float:
    """Share of the images that are classified as labelled."""
    with torch.no_grad():
        return float((network(x).argmax(dim=1) == y).double().mean())


def distance(density: hypergrad.SpectralDensity, exact: Tensor) -> float:
    """How far the density is from the exact one: by how much eigenvalues have to move, on average.

    The Wasserstein distance of order one, over the spread of the exact eigenvalues.
    """
    from scipy.stats import wasserstein_distance

    weights = density.weights.flatten() / len(density.weights)
    moved = wasserstein_distance(density.nodes.flatten(), exact, u_weights=weights)
    return float(moved) / float(exact[-1] - exact[0])


# ------------------------------------------------------------------------------------- the output


def print_table(report: dict[str, dict[str, Any]]) -> None:
    """Print the top eigenvalues by each way, and the figures of the density."""
    for when, row in report.items():
        print(
            f"\n{when.capitalize()}: loss {row['loss']:.4f}, test accuracy "
            f"{row['test_accuracy']:.3f}, {row['num_params']} parameters, {row['num_hvps']} HVPs"
        )
        for name, key in (("Lanczos", "top"), ("eigsh", "top_scipy"), ("dense", "top_dense")):
            if key in row:
                print(f"  {name:<8}", " ".join(f"{value:8.4f}" for value in row[key]))
        for key in ("smallest", "mean", "share_of_nine"):
            others = [
                f"{name} {row[f'{key}_{name}']:.6g}"
                for name in ("scipy", "dense")
                if f"{key}_{name}" in row
            ]
            others = [f"({', '.join(others)})"] if others else []
            print(f"  {key:<14} {row[key]:.6g}", *others)
        if "distance" in row:
            print(f"  the density is {row['distance']:.1e} of the spread from the exact one")


def draw(spectra: dict[str, Spectrum], config: Config) -> Figure:
    """The densities with the exact eigenvalues as ticks, and the top eigenvalues by index."""
    figure, (left, right) = side_by_side(9, 5)
    left.suptitle("Density of the Hessian's eigenvalues")
    panels = left.subplots(len(spectra), 1, squeeze=False)[:, 0]
    for panel, (when, spectrum) in zip(panels, spectra.items(), strict=True):
        spectrum.density.plot(panel)
        row = spectrum.report
        panel.set_title(f"{when} (loss {row['loss']:.3f})", loc="left", fontsize=10)
        if spectrum.exact is not None:
            panel.plot(spectrum.exact, np.full(len(spectrum.exact), 0.025), "|", color=GREY,
                       transform=panel.get_xaxis_transform(), markersize=8)  # fmt: skip
        if panel is not panels[-1]:
            panel.set_xlabel("")
    right.suptitle(f"The {config.num_top} largest")
    axes = right.subplots()
    index = range(1, config.num_top + 1)
    for (when, spectrum), colour in zip(spectra.items(), (ORANGE, BLUE), strict=True):
        axes.semilogy(index, spectrum.report["top"], "o", color=colour, label=f"{when}, Lanczos")
        axes.semilogy(index, spectrum.report["top_scipy"], "x", color="black", markersize=9,
                      label="SciPy's eigsh" if colour == BLUE else None)  # fmt: skip
    axes.axvline(9.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="eigenvalue, largest first", xticks=list(index))
    axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Look at the Hessian, train, look again; print, write and draw what was seen."""
    parser = parser_of(__doc__, "cnn_spectrum")
    parser.add_argument("--num-train", type=int, default=Config.num_train)
    parser.add_argument("--channels", type=int, nargs=2, default=Config.channels)
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--num-probes", type=int, default=Config.num_probes)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=Config.dense)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = begin(parser, arguments)
    config = Config(
        num_train=options.num_train,
        channels=tuple(options.channels),
        epochs=options.epochs,
        num_probes=options.num_probes,
        dense=options.dense,
        seed=options.seed,
    )

    data, network = make_data(config), make_network(config)
    spectra: dict[str, Spectrum] = {}
    with tqdm(total=config.epochs, unit="epoch") as progress:
        progress.set_description("Hessian before training")
        spectra["before training"] = examine(network, data, config)
        progress.set_description("training")
        train(network, data, config, progress)
        progress.set_description("Hessian after training")
        spectra["after training"] = examine(network, data, config)
    report = {when: spectrum.report for when, spectrum in spectra.items()}
    results = {"config": asdict(config), "spectra": report}

    write_json(options.run_dir, results)
    with csv_table(options.run_dir, ["when", "index", "lanczos", "eigsh"]) as writer:
        for when, row in report.items():
            for index, pair in enumerate(zip(row["top"], row["top_scipy"], strict=True), start=1):
                writer.writerow([when, index, *pair])
    print_table(report)
    figure = draw(spectra, config)
    save_picture(figure, options.run_dir, "cnn_spectrum")
    return results


if __name__ == "__main__":
    main()
