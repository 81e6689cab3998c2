"""What a model's outputs say of its targets: how these are drawn, and how likely they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import LossError, SolverOptionError
from ..precision import working_dtype
from .evaluation import seeded

#: Draws targets, ``(outputs, generator) -> targets``, and their negative log-likelihood,
#: ``(outputs, targets) -> tensor``, of which the sum is differentiated.
Sampler: TypeAlias = tuple[
    Callable[[Tensor, torch.Generator | None], Any], Callable[[Tensor, Any], Tensor]
]
#: A named likelihood, one as a ``torch.distributions`` object of the outputs, or a sampler.
Likelihood: TypeAlias = (
    Literal["gaussian", "categorical", "bernoulli"] | Callable[[Tensor], Distribution] | Sampler
)


def sampler_of(likelihood: Any) -> Sampler:
    """How targets are drawn, and their negative log-likelihood.

    Raises:
        SolverOptionError: none of the forms of a likelihood.
    """
    if isinstance(likelihood, str) and likelihood in _NAMED:
        return _NAMED[likelihood]
    if isinstance(likelihood, tuple) and len(likelihood) == 2 and all(map(callable, likelihood)):
        return likelihood
    if callable(likelihood):
        return _of_distribution(likelihood)
    raise SolverOptionError(
        f"likelihood is {likelihood!r}, expected one of {tuple(_NAMED)}, a callable from outputs "
        "to a torch.distributions object, or a pair (sampler, negative_log_likelihood)."
    )


def _of_distribution(make: Callable[[Tensor], Distribution]) -> Sampler:
    def draw(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        distribution = make(outputs)
        if not isinstance(distribution, Distribution):
            raise SolverOptionError(
                f"likelihood returned a {type(distribution).__name__}, expected a "
                "torch.distributions.Distribution."
            )
        if generator is None:
            return distribution.sample()
        # Distributions draw from the global source only: it is seeded here, and put back after.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with seeded(seed, outputs.device):
            return distribution.sample()

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        return -make(outputs).log_prob(targets)

    return draw, nll


def _draw_gaussian(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    # In a wider dtype: beside large outputs the noise would be rounded away, and the score with it.
    wide = outputs.to(working_dtype(outputs.dtype, outputs.device))
    return wide + _noise(wide, generator, normal=True)


def _draw_bernoulli(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    return (_noise(outputs, generator) < outputs.sigmoid()).to(outputs.dtype)


def _draw_categorical(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    if outputs.ndim < 2:
        raise LossError(
            f"outputs have shape {tuple(outputs.shape)}, expected logits along dimension 1: "
            '(samples, classes, ...). For one logit a sample use likelihood="bernoulli".'
        )
    logits = outputs.movedim(1, -1)
    chances = logits.reshape(-1, logits.shape[-1]).softmax(-1, dtype=torch.float32)
    device = outputs.device if generator is None else generator.device
    drawn = torch.multinomial(chances.to(device), 1, generator=generator)
    return drawn.reshape(logits.shape[:-1]).to(outputs.device)


def _noise(outputs: Tensor, generator: torch.Generator | None, *, normal: bool = False) -> Tensor:
    device = outputs.device if generator is None else generator.device
    make = torch.randn if normal else torch.rand
    made: Tensor = make(outputs.shape, generator=generator, device=device, dtype=torch.float32)
    return made.to(outputs)


def _half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


_NAMED: dict[str, Sampler] = {
    "gaussian": (_draw_gaussian, _half_squares),
    "categorical": (_draw_categorical, _cross_entropy),
    "bernoulli": (_draw_bernoulli, _binary_cross_entropy),
}
