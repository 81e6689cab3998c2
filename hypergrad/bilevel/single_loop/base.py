"""What the single-loop methods share: validation, batches, and the step around a direction."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from torch import Tensor

from ...errors import DeviceError, SolverOptionError, StateError
from ...pytree import Tree, TreeLayout
from ...solvers.options import check_option, is_count
from .oracles import Batch, Oracle
from .schedules import check_schedule, value_at
from .state import SingleLoopState, master_dtype

Vectors = dict[str, Tensor]


@dataclass(frozen=True)
class SingleLoop(ABC):
    """A single-loop stochastic bilevel method: its two losses and its step sizes.

    For min over y of f(w*(y), y) with w*(y) the minimiser over w of g(w, y), where g and f are
    means over data, each of which a step sees a few batches of.  The three variables w, v (which
    follows H^-1 grad_w f) and y move together, along estimates of

        D_w = grad_w g,   D_v = H v - grad_w f,   D_y = grad_y f - (d2 g / dy dw) v,

    where H = d2 g / dw dw.  (Dagreou et al., arXiv 2201.13409, equations 4 to 6, carry -v.)  At
    D_w = D_v = D_y = 0, D_y is the hypergradient, and it is zero.

    The loop is yours: ``init`` makes a state, ``step`` makes the next one of it and of batches.

    Attributes:
        inner_loss: g, called as ``inner_loss(inner_params, outer_params, *batch)``: the mean over
            the batch, a real scalar, twice differentiable (once for :class:`F2SA`).
        outer_loss: f, called as ``outer_loss(inner_params, outer_params, *batch)``: likewise.
        inner_lr: step size of w: a number >= 0, or a function of the step such as
            :class:`PowerSchedule`.
        outer_lr: step size of y: likewise.
    """

    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    _: KW_ONLY
    inner_lr: float | Callable[[int], float]
    outer_lr: float | Callable[[int], float]

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss"):
            loss = getattr(self, name)
            check_option(callable(loss), name, loss, "a function of two trees and a batch")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("_lr") and value is not None:
                check_schedule(value, one.name)
            if one.name.endswith("_steps") or one.name.startswith("num_"):
                check_option(is_count(value), one.name, value, "an integer >= 1")

    @property
    def num_inner_batches(self) -> int:
        """Batches of the inner problem that a step takes."""
        return 1

    @property
    def num_outer_batches(self) -> int:
        """Batches of the outer problem that a step takes."""
        return 1

    def init(
        self, inner_params: Tree, outer_params: Tree, *, ihvp: Tree | None = None
    ) -> SingleLoopState:
        """The state before the first step.

        Args:
            inner_params: where w starts, any tree; copied.
            outer_params: where y starts, any tree; copied.
            ihvp: where v starts, shaped like ``inner_params``, such as the ``ihvp`` of
                :func:`hypergrad.hypergradient`; zero if None.

        Raises:
            EmptyTreeError: a tree without entries.
            LeafTypeError: a leaf that is not a real floating-point tensor.
            TreeStructureError: ``ihvp`` has another structure than ``inner_params``.
            DeviceError: the trees are on different devices.
            NonFiniteError: a tree holds nan or inf.
            StateError: ``ihvp`` for a method that solves no linear system.
        """
        inner_layout = TreeLayout.of(inner_params, name="inner_params")
        outer_layout = TreeLayout.of(outer_params, name="outer_params")
        if inner_layout.device != outer_layout.device:
            raise DeviceError(
                f"inner_params is on {inner_layout.device}, outer_params on "
                f"{outer_layout.device}; move them to one device."
            )
        inner = inner_layout.flatten(inner_params, name="inner_params")
        outer = outer_layout.flatten(outer_params, name="outer_params")
        inner_layout.check_finite(inner, "inner_params")
        outer_layout.check_finite(outer, "outer_params")
        inner, outer = inner.to(master_dtype(inner_layout)), outer.to(master_dtype(outer_layout))
        start = inner.new_zeros(inner.shape)
        if ihvp is not None:
            flat = inner_layout.flatten(ihvp, name="ihvp")
            inner_layout.check_finite(flat, "ihvp")
            start = flat.to(inner.dtype)
        vectors = {"inner": inner, "outer": outer, "outer_direction": outer.new_zeros(outer.shape)}
        vectors |= self._auxiliary(inner, start, given=ihvp is not None)
        return SingleLoopState(type(self).__name__, 0, 0, 0, inner_layout, outer_layout, vectors)

    def step(
        self,
        state: SingleLoopState,
        inner_batches: Iterable[Any] | None = None,
        outer_batches: Iterable[Any] | None = None,
    ) -> SingleLoopState:
        """One step of all variables.

        Args:
            state: from :meth:`init` or the step before; not changed.
            inner_batches: the inner problem's batches, drawn independently: an iterator that
                the step takes ``num_inner_batches`` from, or a list of exactly so many.  A batch
                is a tuple or list, unpacked into the loss's further arguments, or one such
                argument.  None for losses that take no batch (a deterministic problem).
            outer_batches: the outer problem's, likewise.

        Returns:
            The next state.

        Raises:
            SolverOptionError: another number of batches, or a schedule's value out of range.
            StateError: the state of another method.
            LossError: a loss that is no real scalar, or that ignores what it must depend on.
            NonFiniteError: a loss, or a variable after the step, is nan or inf: mostly a step
                size above what the curvature allows.

        Warns:
            UnusedParameterWarning: at the first step, if a loss ignores some leaves, or nothing
                connects the two problems.
        """
        oracle, inner, outer = self._prepare(state, inner_batches, outer_batches)
        return self._advance(state, oracle, self._update(oracle, state, inner, outer))

    @abstractmethod
    def _update(
        self, oracle: Oracle, now: SingleLoopState, inner: list[Batch], outer: list[Batch]
    ) -> Vectors:
        """The flat variables after the step, and the outer direction it took."""

    def _auxiliary(self, inner: Tensor, ihvp: Tensor, *, given: bool) -> Vectors:
        """The variables besides the inner and the outer ones."""
        return {"ihvp": ihvp}

    def _prepare(
        self,
        state: SingleLoopState,
        inner_batches: Iterable[Any] | None,
        outer_batches: Iterable[Any] | None,
    ) -> tuple[Oracle, list[Batch], list[Batch]]:
        """What a step computes with, after checking all that can be wrong before it does."""
        if state.method != type(self).__name__:
            raise StateError(
                f"this is a state of {state.method}, expected one of {type(self).__name__}. "
                "Make it with this method's init."
            )
        oracle = Oracle(
            self.inner_loss,
            self.outer_loss,
            state.inner_layout,
            state.outer_layout,
            report=state.step == 0,
        )
        inner = take(inner_batches, self.num_inner_batches, "inner_batches")
        return oracle, inner, take(outer_batches, self.num_outer_batches, "outer_batches")

    def _advance(self, state: SingleLoopState, oracle: Oracle, vectors: Vectors) -> SingleLoopState:
        """The next state, from the variables after the step."""
        self._check_finite(state, vectors)
        return replace(
            state,
            step=state.step + 1,
            num_gradients=state.num_gradients + oracle.num_gradients,
            num_hvps=state.num_hvps + oracle.num_hvps,
            vectors=vectors,
        )

    def _check_finite(self, state: SingleLoopState, vectors: Vectors) -> None:
        for name, vector in vectors.items():
            state._layout(name).check_finite(vector, f"{name} after step {state.step}")

    def _rate(self, name: str, step: int) -> float:
        """A step size's value; one that is None is the inner step size, as in the papers."""
        schedule = getattr(self, name)
        if schedule is None:
            name, schedule = "inner_lr", self.inner_lr
        return value_at(schedule, step, name)


def take(batches: Iterable[Any] | None, count: int, name: str) -> list[Batch]:
    """Exactly ``count`` batches, each as the tuple of a loss's further arguments.

    Raises:
        SolverOptionError: too few in an iterator, or another number in a list.
    """
    if batches is None:
        return [()] * count
    advice = f"a step takes {count}: an iterator to draw them from, or a list of so many"
    if isinstance(batches, Tensor | dict) or not isinstance(batches, Iterable):
        raise SolverOptionError(
            f"{name} is a {type(batches).__name__}, expected batches; {advice}. Wrap a single "
            "batch: [batch]."
        )
    # A list is looked at one further than it is used; an iterator loses exactly what it gives.
    most = count if isinstance(batches, Iterator) else count + 1
    drawn = list(itertools.islice(batches, most))
    if len(drawn) != count:
        got = "more" if len(drawn) > count else str(len(drawn))
        raise SolverOptionError(f"{name} holds {got} batches, but {advice}.")
    return [tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in drawn]
