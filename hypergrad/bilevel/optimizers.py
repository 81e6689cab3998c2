"""Inner optimisers as pure functions of their state, so that their steps can be differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import LeafTypeError, SolverOptionError
from ..pytree import Tree

#: A number, a tensor of no dimension, or a tensor with one entry a step.
Rate: TypeAlias = float | Tensor


@runtime_checkable
class InnerOptimizer(Protocol):
    """What :func:`hypergrad.unrolled_hypergradient` asks of an optimiser: two pure functions.

    Any object with these two methods serves.  Both return new tensors and modify none; the
    state is a tree whose floating-point tensors are differentiated and whose other leaves (a
    step count, None) are passed on.

    Examples:
        >>> import torch, hypergrad
        >>> class SignDescent:
        ...     def init(self, params):
        ...         return None
        ...     def step(self, params, state, grads):
        ...         return params - 0.1 * torch.tanh(grads), state
        >>> isinstance(SignDescent(), hypergrad.InnerOptimizer)
        True
    """

    def init(self, params: Tree) -> Any:
        """The state before the first step."""

    def step(self, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        """New parameters and state; ``grads`` has the structure of ``params``."""


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class SGD:
    """Gradient descent with heavy-ball momentum, the steps of ``torch.optim.SGD``.

    b_t = momentum b_(t-1) + g_t and w_t = w_(t-1) - lr b_t, with b_0 = 0.

    Attributes:
        lr: step size > 0; a tensor of shape (num_steps,) gives each step its own.  Tensors may
            carry a graph: see ``optimizer`` of :func:`hypergrad.unrolled_hypergradient`.
        momentum: in [0, 1), or a tensor as ``lr``.

    Raises:
        SolverOptionError: a number outside its range, or a tensor of more than one dimension.
        LeafTypeError: a tensor that is not a real floating one.

    Examples:
        >>> import torch, hypergrad
        >>> sgd = hypergrad.SGD(lr=0.1, momentum=0.9)
        >>> w, state = torch.tensor([1.0]), sgd.init(torch.tensor([1.0]))
        >>> for _ in range(2):
        ...     w, state = sgd.step(w, state, torch.tensor([1.0]))
        >>> w
        tensor([0.7100])
    """

    lr: Rate
    momentum: Rate = 0.0

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr, 0.0, math.inf, "a finite number > 0", above=True)
        _check_rate("momentum", self.momentum, 0.0, 1.0, "a number in [0, 1)")

    def init(self, params: Tree) -> Any:
        """No step done, and no velocity."""
        plain = not isinstance(self.momentum, Tensor) and self.momentum == 0
        return {"step": 0, "velocity": None if plain else _zeros(params)}

    def step(self, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        """One step; see the class."""
        t, velocity = state["step"], grads
        if state["velocity"] is not None:
            velocity = torch_pytree.tree_map(
                lambda b, g: _at(self.momentum, t, g) * b + g, state["velocity"], grads
            )
        new = torch_pytree.tree_map(lambda w, b: w - _at(self.lr, t, w) * b, params, velocity)
        kept = None if state["velocity"] is None else velocity
        return new, {"step": t + 1, "velocity": kept}


@dataclass(frozen=True, eq=False)
class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), the steps of ``torch.optim.Adam``.

    Where the second moment is exactly zero (a parameter without gradient so far) its root is
    differentiated as zero, which is the derivative of the whole step there, and not as 0 times
    infinity.

    Attributes:
        lr: step size > 0, or a tensor as in :class:`hypergrad.SGD`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment; > 0.

    Raises:
        SolverOptionError: a number outside its range, or a tensor of more than one dimension.
        LeafTypeError: a tensor that is not a real floating one.

    Examples:
        >>> import torch, hypergrad
        >>> adam = hypergrad.Adam(lr=0.1)
        >>> w = torch.tensor([1.0])
        >>> adam.step(w, adam.init(w), torch.tensor([3.0]))[0]
        tensor([0.9000])
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr, 0.0, math.inf, "a finite number > 0", above=True)
        if not (isinstance(self.betas, tuple) and len(self.betas) == 2):
            raise SolverOptionError(f"betas is {self.betas!r}, expected two numbers in [0, 1).")
        for beta in self.betas:
            _check_rate("betas", beta, 0.0, 1.0, "two numbers in [0, 1)")
        _check_rate("eps", self.eps, 0.0, math.inf, "a finite number > 0", above=True)

    def init(self, params: Tree) -> Any:
        """No step done, and both moments zero."""
        return {"step": 0, "first": _zeros(params), "second": _zeros(params)}

    def step(self, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        """One step; see the class."""
        t, (beta1, beta2) = state["step"], self.betas
        first = torch_pytree.tree_map(
            lambda m, g: beta1 * m + (1 - beta1) * g, state["first"], grads
        )
        second = torch_pytree.tree_map(
            lambda s, g: beta2 * s + (1 - beta2) * g * g, state["second"], grads
        )
        unbias1, unbias2 = 1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1)

        def move(w: Tensor, m: Tensor, s: Tensor) -> Tensor:
            seen = s > 0
            root = torch.where(seen, torch.where(seen, s / unbias2, 1.0).sqrt(), 0.0)
            moved: Tensor = w - _at(self.lr, t, w) * (m / unbias1) / (root + self.eps)
            return moved

        new = torch_pytree.tree_map(move, params, first, second)
        return new, {"step": t + 1, "first": first, "second": second}


def _zeros(params: Tree) -> Tree:
    return torch_pytree.tree_map(torch.zeros_like, params)


def _at(rate: Rate, step: int, like: Tensor) -> Rate:
    """The rate of one step, in a dtype that does not promote ``like``."""
    if not isinstance(rate, Tensor):
        return rate
    if rate.ndim == 1:
        if step >= len(rate):
            raise SolverOptionError(
                f"a schedule of {len(rate)} entries was asked for step {step + 1}; expected one "
                "entry a step."
            )
        rate = rate[step]
    return rate.to(like.dtype)


def _check_rate(
    name: str, rate: Any, low: float, high: float, expected: str, *, above: bool = False
) -> None:
    if isinstance(rate, Tensor):
        # Its values may be a traced function's and are left alone.
        if not rate.is_floating_point():
            raise LeafTypeError(f"{name} has dtype {rate.dtype}, expected a real floating dtype.")
        if rate.ndim > 1:
            raise SolverOptionError(
                f"{name} has shape {tuple(rate.shape)}, expected () or (num_steps,)."
            )
        return
    real = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (real and (low < rate if above else low <= rate) and rate < high):
        raise SolverOptionError(f"{name} is {rate!r}, expected {expected}.")
