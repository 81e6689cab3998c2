"""F2SA: a penalty method that needs no second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ...errors import SolverOptionError, StateError
from ...solvers.options import check_option
from .base import SingleLoop, Vectors
from .oracles import Batch, Oracle
from .schedules import check_schedule, value_at
from .state import SingleLoopState


@dataclass(frozen=True)
class F2SA(SingleLoop):
    """F2SA: the gap between two minimisers instead of a linear system; first derivatives only.

    One inner variable, w, follows the minimiser of g, another, u, that of f + lambda g.  Then

        grad_y f(u, y) + lambda (grad_y g(u, y) - grad_y g(w, y))

    is the hypergradient up to O(1 / lambda), so that the multiplier lambda has to grow, and with
    it the noise of the difference: that is why its rate is slower than those of the others.

    Attributes:
        inner_loss: see :class:`SingleLoop`; one derivative is enough.
        outer_loss: see :class:`SingleLoop`.
        inner_lr: step size gamma of w.
        outer_lr: step size of y, xi alpha in the paper.
        penalty_lr: step size alpha of u, along grad f + lambda grad g.
        multiplier: lambda, a number > 0 or a function of the step; if None,
            ``inner_lr / (2 penalty_lr)`` of the step, so that u and w follow g about equally fast.
        inner_steps: steps T on w and u before one on y; may be 1.
        shared_batches: whether w and u see the same batches of g.  The paper draws them apart;
            on the same ones most of the noise that lambda would enlarge cancels.

    Schedules: with noise in both problems the paper's alpha falls as k^(-5/7) and gamma as
    k^(-4/7), so that lambda grows as k^(1/7): ``PowerSchedule(gamma_0, 4 / 7)``,
    ``PowerSchedule(alpha_0, 5 / 7)``.  Its squared norm of the hypergradient then falls as
    K^(-2/7) up to logarithms (epsilon after epsilon^(-7/2) steps, its abstract); K^(-2/3)
    without noise.

    Cost of a step: ``2 inner_steps + 2`` gradients of the inner loss, ``inner_steps + 1`` of the
    outer loss, no second derivative.
    Source: Kwon, Kwon, Wright and Nowak, "A fully first-order method for stochastic bilevel
    optimization", ICML 2023, arXiv 2301.10945, algorithm 1.

    Examples:
        >>> import torch, hypergrad
        >>> inner = lambda w, y: 0.5 * ((w - y) ** 2).sum()
        >>> outer = lambda w, y: 0.5 * ((w - torch.tensor([1.0, 2.0])) ** 2).sum()
        >>> method = hypergrad.F2SA(
        ...     inner, outer, inner_lr=0.5, outer_lr=0.1, penalty_lr=0.05, multiplier=10.0
        ... )
        >>> state = method.init(torch.zeros(2), torch.zeros(2))
        >>> for _ in range(200):
        ...     state = method.step(state)
        >>> state.outer_params.round(decimals=3)
        tensor([1., 2.])
    """

    _: KW_ONLY
    penalty_lr: float | Callable[[int], float]
    multiplier: float | Callable[[int], float] | None = None
    inner_steps: int = 10
    shared_batches: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiplier is not None:
            check_schedule(self.multiplier, "multiplier")
        shared = self.shared_batches
        check_option(isinstance(shared, bool), "shared_batches", shared, "True or False")

    @property
    def num_inner_batches(self) -> int:
        """Batches of the inner problem that a step takes."""
        return (self.inner_steps + 1) * (1 if self.shared_batches else 2)

    @property
    def num_outer_batches(self) -> int:
        """Batches of the outer problem that a step takes."""
        return self.inner_steps + 1

    def _auxiliary(self, inner: Tensor, ihvp: Tensor, *, given: bool) -> Vectors:
        if given:
            raise StateError("F2SA solves no linear system: it has no ihvp to start from.")
        return {"penalised": inner.clone()}

    def _multiplier(self, step: int) -> float:
        if self.multiplier is not None:
            value = value_at(self.multiplier, step, "multiplier")
        else:
            alpha = self._rate("penalty_lr", step)
            value = self._rate("inner_lr", step) / (2.0 * alpha) if alpha else 0.0
        if value == 0.0:
            raise SolverOptionError(
                f"the multiplier is 0 at step {step}, expected a number > 0: without it, u ignores "
                "the inner problem. If it was not given, it is inner_lr / (2 penalty_lr)."
            )
        return value

    def _update(
        self, oracle: Oracle, now: SingleLoopState, inner: list[Batch], outer: list[Batch]
    ) -> Vectors:
        w, u, y = (now.vectors[name] for name in ("inner", "penalised", "outer"))
        pairs, outer_batches = self._pairs(inner), iter(outer)
        gamma, alpha = self._rate("inner_lr", now.step), self._rate("penalty_lr", now.step)
        multiplier = self._multiplier(now.step)
        for _ in range(self.inner_steps):
            for_w, for_u = next(pairs)
            f_inner, _ = oracle.outer_gradients(u, y, next(outer_batches))
            pull = f_inner + multiplier * oracle.inner_gradient(u, y, for_u)
            w = w - gamma * oracle.inner_gradient(w, y, for_w)
            u = u - alpha * pull
        for_w, for_u = next(pairs)
        _, f_outer = oracle.outer_gradients(u, y, next(outer_batches))
        _, at_u = oracle.both_inner_gradients(u, y, for_u)
        _, at_w = oracle.both_inner_gradients(w, y, for_w)
        direction = f_outer + multiplier * (at_u - at_w)
        return {
            "inner": w,
            "penalised": u,
            "outer": y - self._rate("outer_lr", now.step) * direction,
            "outer_direction": direction,
        }

    def _pairs(self, inner: list[Batch]) -> Iterator[tuple[Batch, Batch]]:
        """For each sub-step a batch for w and one for u."""
        if self.shared_batches:
            return iter([(batch, batch) for batch in inner])
        return iter(list(zip(inner[::2], inner[1::2], strict=True)))
