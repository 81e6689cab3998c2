"""Small networks of the kinds that people have, with data and losses of several output shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests.strategies import F64, gaussian, generator, orthogonal


@dataclass(frozen=True)
class Case:
    """A module with a batch, and a loss that is convex in the outputs."""

    module: torch.nn.Module
    inputs: Tensor
    targets: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor]

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def model_fn(self, params: Any, inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(self.module, params, (inputs,))


class Recurrent(torch.nn.Module):
    """An LSTM whose last state is read out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(2, 3, batch_first=True)
        self.head = torch.nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(torch.nn.Module):
    """One Transformer layer with logits at each position, shape (samples, positions, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def labels(*shape: int, classes: int, seed: int = 7) -> Tensor:
    return torch.randint(classes, shape, generator=generator(seed))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(outputs, targets)


def squared_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(outputs, targets, reduction="sum")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets)


def cross_entropy_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")


def of_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (samples, positions, classes)."""
    return torch.nn.functional.cross_entropy(outputs.movedim(-1, 1), targets)


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own, convex for targets >= 0."""
    return (outputs.exp() - targets.abs() * outputs).mean()


def log_cosh_of_all(outputs: Tensor, targets: Tensor) -> Tensor:
    """Convex, and every sample is coupled to every other."""
    return torch.logsumexp((outputs - targets).reshape(-1), 0)


def _mlp(*sizes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def mlp(*sizes: int, dtype: torch.dtype = F64) -> torch.nn.Sequential:
    """A network of tanh layers whose seeded weights keep the size of its signals."""
    module = _mlp(*sizes).to(dtype)
    for i, p in enumerate(module.parameters()):
        p.data = (gaussian(*p.shape, seed=i) / p.shape[-1] ** 0.5).to(dtype)
    return module


def correlated() -> tuple[Any, dict[str, Tensor], torch.nn.Module, tuple[Tensor, Tensor]]:
    """A Gauss-Newton operator of more samples than parameters and ill-conditioned inputs.

    With its parameters, module and batch; the largest eigenvalue is near one.
    """
    module = mlp(20, 4, 3)
    x = (torch.logspace(0, -3, 20, dtype=F64) * gaussian(500, 20)) @ orthogonal(20).T
    y = labels(500, classes=3)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def call(p: Any, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (inputs,))

    return hypergrad.ggn(call, cross_entropy, params, x, y), params, module, (x, y)


def _cnn() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )


def _segmenter() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Conv2d(2, 3, 1))


#: How to make each; double precision, on seeded parameters.
_MAKERS: dict[str, Callable[[], tuple[torch.nn.Module, Tensor, Tensor, Any]]] = {
    "mlp, squared": lambda: (_mlp(3, 4, 2), gaussian(5, 3), gaussian(5, 2), squared_error),
    "mlp, squared sum": lambda: (_mlp(3, 4, 2), gaussian(5, 3), gaussian(5, 2), squared_sum),
    "mlp, classes": lambda: (_mlp(3, 4, 3), gaussian(5, 3), labels(5, classes=3), cross_entropy),
    "mlp, classes sum": lambda: (
        _mlp(3, 4, 3), gaussian(5, 3), labels(5, classes=3), cross_entropy_sum,
    ),
    "mlp, probabilities": lambda: (
        _mlp(3, 4, 3), gaussian(5, 3), gaussian(5, 3).softmax(1), cross_entropy,
    ),
    "mlp, poisson": lambda: (_mlp(3, 4, 2), gaussian(5, 3), gaussian(5, 2), poisson),
    "mlp, coupled": lambda: (_mlp(3, 4, 2), gaussian(5, 3), gaussian(5, 2), log_cosh_of_all),
    "cnn, classes": lambda: (_cnn(), gaussian(4, 1, 6, 6), labels(4, classes=3), cross_entropy),
    "pixels, classes": lambda: (
        _segmenter(), gaussian(3, 1, 4, 5), labels(3, 2, 3, classes=3), cross_entropy,
    ),
    "lstm, classes": lambda: (Recurrent(), gaussian(4, 5, 2), labels(4, classes=3), cross_entropy),
    "transformer, positions": lambda: (
        Attention(), gaussian(3, 4, 4), labels(3, 4, classes=3).reshape(3, 4), of_positions,
    ),
    "transformer, squared": lambda: (
        Attention(), gaussian(2, 3, 4), gaussian(2, 3, 3), squared_error,
    ),
}  # fmt: skip
NAMES = tuple(_MAKERS)


def case(name: str, dtype: torch.dtype = F64) -> Case:
    module, inputs, targets, loss_fn = _MAKERS[name]()
    for i, p in enumerate(module.parameters()):
        p.data = (0.5 * gaussian(*p.shape, seed=100 + i)).to(dtype)
    module = module.to(dtype)
    wide = targets.is_floating_point()
    return Case(module, inputs.to(dtype), targets.to(dtype) if wide else targets, loss_fn)
