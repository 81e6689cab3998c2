"""What is measured on: training problems for the times, prescribed spectra for the errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model, a loss and one batch, with the yardsticks written by hand in plain PyTorch.

    Attributes:
        params: the point at which everything is measured.
        model_fn: (params, inputs) -> outputs.
        output_loss: (outputs, targets) -> scalar.
        inputs: shape (batch, features).
        targets: what ``output_loss`` needs.
        repeats: runs that a ratio of times takes its minima of.
    """

    params: Params
    model_fn: Callable[[Params, Tensor], Tensor]
    output_loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    repeats: int

    def loss_fn(self, params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.output_loss(self.model_fn(params, inputs), targets)

    def gradient(self) -> tuple[Tensor, ...]:
        """One gradient from scratch: the unit of all costs."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.params.items()}
        loss = self.loss_fn(leaves, self.inputs, self.targets)
        return torch.autograd.grad(loss, list(leaves.values()))

    def hvp_fn(self) -> Callable[[Params], Params]:
        """v -> H v as most people write it: reverse mode over a kept graph of the gradient."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.params.items()}
        loss = self.loss_fn(leaves, self.inputs, self.targets)
        inputs = list(leaves.values())
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)

        def hvp(v: Params) -> Params:
            outputs = [v[name] for name in leaves]
            products = torch.autograd.grad(gradients, inputs, outputs, retain_graph=True)
            return dict(zip(leaves, products, strict=True))

        return hvp

    def in_float64(self) -> Problem:
        """The same numbers in the wider dtype."""

        def widened(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        params = {name: widened(leaf) for name, leaf in self.params.items()}
        return replace(
            self, params=params, inputs=widened(self.inputs), targets=widened(self.targets)
        )

    def right_hand_side(self) -> Params:
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for name, leaf in self.params.items()
        }


def _mlp(params: Params, inputs: Tensor) -> Tensor:
    depth = len(params) // 2
    for layer in range(depth):
        inputs = F.linear(inputs, params[f"weight{layer}"], params[f"bias{layer}"])
        inputs = torch.tanh(inputs) if layer < depth - 1 else inputs
    return inputs


def _mlp_params(widths: list[int], generator: torch.Generator) -> Params:
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        weight = torch.randn(fan_out, fan_in, generator=generator)
        params[f"weight{layer}"] = weight / fan_in**0.5
        params[f"bias{layer}"] = torch.zeros(fan_out)
    return params


def _half_mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    # Not F.mse_loss: forward mode through its gradient fails under vmap in PyTorch 2.13
    # ("ZeroTensors are immutable").
    return 0.5 * (outputs - targets).square().mean()


def critic(batch: int = 640, width: int = 64) -> Problem:
    """The value network of a small actor-critic: 4 observations, two tanh layers of ``width``."""
    generator = torch.Generator().manual_seed(0)
    params = _mlp_params([4, width, width, 1], generator)
    inputs = torch.randn(batch, 4, generator=generator)
    # Targets that are fitted exactly: the Hessian has no negative part, which would cost Nyström
    # as many products again.
    return Problem(
        params=params,
        model_fn=_mlp,
        output_loss=_half_mean_square,
        inputs=inputs,
        targets=_mlp(params, inputs),
        repeats=30,
    )


def classifier(batch: int = 256, widths: tuple[int, int] = (800, 500)) -> Problem:
    """A tanh network of about a million parameters on inputs of the size of MNIST's."""
    generator = torch.Generator().manual_seed(0)
    params = _mlp_params([784, *widths, 10], generator)
    inputs = torch.randn(batch, 784, generator=generator)
    # Soft labels that are fitted exactly: see critic.
    return Problem(
        params=params,
        model_fn=_mlp,
        output_loss=F.cross_entropy,
        inputs=inputs,
        targets=torch.softmax(_mlp(params, inputs), dim=1),
        repeats=3,
    )


def logistic(batch: int = 1797, features: int = 64) -> Problem:
    """Multinomial logistic regression of the size of scikit-learn's digits, on random data."""
    generator = torch.Generator().manual_seed(0)
    return Problem(
        params=_mlp_params([features, 10], generator),
        model_fn=_mlp,
        output_loss=F.cross_entropy,
        inputs=torch.randn(batch, features, generator=generator),
        targets=torch.randint(10, (batch,), generator=generator),
        repeats=30,
    )


def quadratic(dim: int = 2000) -> Problem:
    """|X p - y|^2 / (2 dim): a dense matrix and nothing else, the cheapest product there is."""
    generator = torch.Generator().manual_seed(0)
    return Problem(
        params={"p": torch.randn(dim, generator=generator)},
        model_fn=lambda params, inputs: inputs @ params["p"],
        output_loss=_half_mean_square,
        inputs=torch.randn(dim, dim, generator=generator),
        targets=torch.randn(dim, generator=generator),
        repeats=30,
    )


#: The training problems by name, and the smallest version of each for a trial run.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "critic": critic,
    "classifier": classifier,
    "logistic": logistic,
    "quadratic": quadratic,
}
SMALL_PROBLEMS: dict[str, Callable[[], Problem]] = {
    "critic": partial(critic, 64, 8),
    "classifier": partial(classifier, 4, (5, 3)),
    "logistic": partial(logistic, 6, 3),
    "quadratic": partial(quadratic, 20),
}

#: Dimension of the prescribed spectra, and the eigenvalues that the low-rank ones keep.
DIM = 200
LOW_RANK = 20


def _eigenvalues(spectrum: str, dim: int, condition: float | None = None) -> Tensor:
    """Eigenvalues of largest size 1; ``condition`` is that of the full-rank spectra, if not None.

    A spectrum keeps its shape: evenly spaced, three clusters, a geometric sequence, a power of i.
    """
    index = torch.arange(dim, dtype=torch.float64)
    low = None if condition is None else 1.0 / condition
    if spectrum == "flat":
        return torch.linspace(1.0, 0.5 if low is None else low, dim, dtype=torch.float64)
    if spectrum == "clustered":  # three clusters, four decades apart from end to end
        ends = 1e-4 if low is None else low
        return torch.tensor([1.0, ends**0.5, ends], dtype=torch.float64)[(index * 3 // dim).long()]
    if spectrum == "exponential":
        return torch.exp(-index / 10.0) if low is None else low ** (index / (dim - 1))
    if spectrum == "1/i":
        power = 1.0 if low is None else -math.log(low) / math.log(dim)
        return (index + 1.0) ** -power
    if spectrum == "indefinite":  # like 1/i, the sign of every fourth turned; none is -damping
        power = 1.0 if low is None else -math.log(low) / math.log((dim + 0.5) / 1.5)
        return torch.where(index % 4 == 3, -1.0, 1.0) * ((index + 1.5) / 1.5) ** -power
    if spectrum in ("rank-deficient", "dead rows"):
        if condition is not None:
            raise ValueError(f"{spectrum} has no condition number to choose, got {condition}.")
        rank = min(LOW_RANK, dim)
        kept = torch.logspace(0, -2, rank, dtype=torch.float64)
        return torch.cat([kept, torch.zeros(dim - rank, dtype=torch.float64)])
    raise ValueError(f"spectrum is {spectrum!r}, expected one of {SPECTRA}")


SPECTRA = (
    "flat", "clustered", "exponential", "1/i", "rank-deficient", "indefinite", "dead rows",
)  # fmt: skip


@dataclass(frozen=True)
class Spectral:
    """A = U diag(values) U' by its factors, in one dtype: its products keep a low rank exact.

    A dense matrix of rank 20, once rounded, has full rank, with eigenvalues of a roundoff in
    place of zero; the Hessian of a network does not.

    Attributes:
        basis: U, shape (dim, r).
        values: shape (r,).
    """

    basis: Tensor
    values: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        return self.basis @ (self.values * (self.basis.T @ v))

    def dense(self) -> Tensor:
        """A of these very factors in float64, shape (dim, dim)."""
        basis = self.basis.double()
        return (basis * self.values.double()) @ basis.T


def spectral(
    spectrum: str,
    dtype: torch.dtype,
    dim: int = DIM,
    seed: int = 0,
    condition: float | None = None,
) -> Spectral:
    """A symmetric operator of norm 1 with the named spectrum, at its own condition or a given one.

    The eigenvectors are random and dense, but for "dead rows": there they live on 20 coordinates
    and all other rows of A are zero, as in the Hessian of a network with dead units.
    """
    generator = torch.Generator().manual_seed(seed)
    values = _eigenvalues(spectrum, dim, condition)
    values = values[values != 0]
    rows = len(values) if spectrum == "dead rows" else dim
    gaussian = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    basis = torch.zeros(dim, len(values), dtype=torch.float64)
    basis[torch.randperm(dim, generator=generator)[:rows]] = torch.linalg.qr(gaussian).Q
    return Spectral(basis.to(dtype), values.to(dtype))
