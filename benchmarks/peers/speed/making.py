"""How the systems come about: trained networks on real and made data, and stated spectra.

A Hessian is taken as it is, indefinite where it is, and the damping is large enough to make the
system positive definite: 1.2 times the size of the smallest eigenvalue where that is negative (but
no less than ``DAMPING``), so that every solver of every package is in its element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh

from .problems import Array, Facts, Problem
from .torch_problems import Given, layer_shapes, make_loss

#: Of the systems without negative curvature, and the least elsewhere.
DAMPING = 1e-3

#: Kind, widths, arrays, and the words for the table.
Made = tuple[str, tuple[int, ...], dict[str, Array], str]


def _rounded(array: Array) -> Array:
    """Float32 numbers, held in float64."""
    return array.astype(np.float32).astype(np.float64)


def _digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data / 16.0, digits.target.astype(np.int64)


def _trained(
    kind: str, widths: tuple[int, ...], inputs: Array, targets: Array, steps: int
) -> dict[str, Array]:
    """Parameters after a few hundred steps of Adam on all of the data, and the data."""
    source = torch.Generator().manual_seed(0)
    leaves = []
    for shape in layer_shapes(kind, widths):
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.0
        leaves.append(scale * torch.randn(shape, generator=source, dtype=torch.float64).flatten())
    params = torch.cat(leaves).requires_grad_()
    inputs = _rounded(inputs)
    targets = _rounded(targets) if targets.dtype.kind == "f" else targets
    loss, batch = make_loss(kind, widths), (torch.from_numpy(inputs), torch.from_numpy(targets))
    optimizer = torch.optim.Adam([params], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params, *batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"params": _rounded(params.detach().numpy()), "inputs": inputs, "targets": targets}


def logistic(samples: int = 1797) -> Made:
    inputs, targets = _digits()
    arrays = _trained("logistic", (64, 10), inputs[:samples], targets[:samples], 200)
    words = f"Hessian of multinomial logistic regression on {samples} digits"
    return "logistic", (64, 10), arrays, words


def critic(samples: int, width: int = 64) -> Made:
    """A value network fitted for a while to returns that it cannot fit."""
    source = np.random.default_rng(0)
    inputs = source.standard_normal((samples, 4))
    targets = np.sin(inputs.sum(1)) + 0.5 * source.standard_normal(samples)
    widths = (4, width, width, 1)
    arrays = _trained("mlp", widths, inputs, targets, 200)
    words = f"Hessian of a 4-{width}-{width}-1 tanh critic, {samples} samples"
    return "mlp", widths, arrays, words


def cnn(samples: int = 128) -> Made:
    inputs, targets = _digits()
    images = inputs[:samples].reshape(-1, 1, 8, 8)
    arrays = _trained("cnn", (), images, targets[:samples], 100)
    words = f"Hessian of a CNN, two 3 x 3 layers of 8 and 16 channels, {samples} digits"
    return "cnn", (), arrays, words


def dense(size: int = 1000) -> Made:
    source = np.random.default_rng(0)
    basis, _ = np.linalg.qr(source.standard_normal((size, size)))
    values = 1.0 / np.arange(1, size + 1)
    matrix = _rounded((basis * values) @ basis.T)
    words = f"dense quadratic, {size} eigenvalues 1/i"
    return "dense", (), {"matrix": (matrix + matrix.T) / 2}, words


def mirror(size: int, values: Array, words: str) -> Made:
    unit = np.random.default_rng(0).standard_normal(size)
    arrays = {"values": _rounded(values), "mirror": _rounded(unit / np.linalg.norm(unit))}
    return "mirror", (), arrays, words


def _exponential(size: int) -> Made:
    values = np.exp(-np.arange(size) / (0.03 * size))
    words = f"quadratic, eigenvalues exp(-i/{0.03 * size:g}), eigenvectors a mirrored unit basis"
    return mirror(size, values, words)


def _power(size: int) -> Made:
    words = "quadratic, eigenvalues 1/i, eigenvectors a mirrored unit basis"
    return mirror(size, 1.0 / np.arange(1, size + 1), words)


def _known_end(kind: str, which: str, size: int, arrays: dict[str, Array]) -> float | None:
    """The smallest ("SA") or largest ("LA") eigenvalue where it is known without a computation.

    Where the smallest is nearly zero, Lanczos would take very long to say so.
    """
    if kind == "mirror":
        return float(arrays["values"].min() if which == "SA" else arrays["values"].max())
    if kind == "dense":
        return 1.0 / size if which == "SA" else 1.0
    if kind == "logistic" and which == "SA":  # convex; adding the same to all classes is no change
        return 0.0
    return None


Maker = Callable[[], Made]
FULL: dict[str, Maker] = {
    "logistic regression": logistic,
    "critic, 128 samples": partial(critic, 128),
    "critic, 640 samples": partial(critic, 640),
    "CNN": cnn,
    "quadratic, n = 1,000": dense,
    "quadratic, n = 10,000": partial(_exponential, 10_000),
    "quadratic, n = 100,000": partial(_power, 100_000),
}
#: The same kinds at the smallest size, for a trial.
SMALL: dict[str, Maker] = {
    "logistic regression": partial(logistic, 20),
    "critic": partial(critic, 10, 3),
    "dense quadratic": partial(dense, 12),
    "mirrored quadratic": partial(_power, 20),
}


def make(name: str, maker: Maker) -> Problem:
    """The problem with its damping and its reference solution."""
    kind, widths, arrays, words = maker()
    size = len(next(arrays[key] for key in ("params", "matrix", "values") if key in arrays))
    v = _rounded(np.random.default_rng(1).standard_normal(size))
    blank = Facts(name, kind, widths, size, 0.0, 1.0, 0.0, 0.0, words)
    hvp = Given(Problem(blank, arrays, v, v)).product()

    def product(x: Array) -> Array:
        result: Array = hvp(torch.from_numpy(np.ascontiguousarray(x.reshape(-1)))).numpy()
        return result

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)

    def end(which: str) -> float:
        known = _known_end(kind, which, size, arrays)
        if known is not None:
            return known
        found = eigsh(operator, 1, which=which, tol=1e-3, return_eigenvectors=False, v0=v)
        return float(found[0])

    smallest, norm = end("SA"), end("LA")
    damping = max(DAMPING, float(f"{-1.2 * smallest:.2g}"))
    damped = LinearOperator(
        (size, size), matvec=lambda x: product(x) + damping * x.reshape(-1), dtype=np.float64
    )
    x = np.zeros(size)
    for _ in range(3):  # refined: each solve is for the residual of those before
        x = x + cg(damped, v - damped.matvec(x), rtol=1e-12, maxiter=20 * size + 100)[0]
    # |x - truth| <= |r| / (smallest eigenvalue of the system); eigsh knows it to a part in 1e3.
    residual = float(np.linalg.norm(v - damped.matvec(x)))
    bound = residual / (0.9 * (smallest + damping)) / float(np.linalg.norm(x))
    facts = Facts(name, kind, widths, size, damping, norm, smallest, bound, words)
    return Problem(facts, arrays, v, x)


def make_all(makers: Mapping[str, Maker]) -> Iterator[Problem]:
    """The problems, each with a line about it."""
    for name, maker in makers.items():
        problem = make(name, maker)
        facts = problem.facts
        # A tenth of the smallest level would do; this leaves room.
        if not facts.error_bound < 1e-10:
            raise RuntimeError(f"{facts.name}: the reference is only good to {facts.error_bound}")
        print(
            f"{facts.name}: n = {facts.size}, eigenvalues {facts.smallest:.2g} to {facts.norm:.2g},"
            f" damping {facts.damping:.2g}, reference good to {facts.error_bound:.0e}",
            flush=True,
        )
        yield problem
