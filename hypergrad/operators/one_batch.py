"""What is asked of the operator of one minibatch among those of a loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import HypergradError, UnusedParameterWarning
from ..pytree import Tree
from .gauss_newton import GaussNewtonOperator
from .hessian import HessianOperator


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Say in which minibatch an error arose."""
    try:
        yield
    except HypergradError as error:
        raise type(error)(f"batch {index}: {error}") from error


def made(make: Callable[..., Any], params: Tree, batch: tuple[Any, ...]) -> Any:
    """The operator of one minibatch, without a word on parameters that it does not use."""
    with warnings.catch_warnings():  # another minibatch may use what this one does not
        warnings.simplefilter("ignore", UnusedParameterWarning)
        return make(params, batch)


def unused_by(operator: HessianOperator | GaussNewtonOperator) -> list[bool]:
    """Which leaves a minibatch does not use."""
    if isinstance(operator, HessianOperator):
        return [gradient is None for gradient in operator.gradients]
    return operator._unused()


def requires_grad(batch: tuple[Any, ...]) -> bool:
    """Whether a tensor of the minibatch does."""
    leaves = torch_pytree.tree_leaves(batch)
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
