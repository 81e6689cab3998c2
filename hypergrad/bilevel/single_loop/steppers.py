"""Steppers that need second derivatives: SOBA, AmIGO and stocBiO."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .base import SingleLoop, Vectors
from .oracles import Batch, Oracle
from .state import SingleLoopState

#: A product with the inner Hessian, on the next batch.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """SOBA: one stochastic step of each variable at once, all at the same point.

    The single-level method that it extends is SGD: with constant step sizes it stalls at a noise
    floor that falls with them; with decreasing ones it converges.

    Attributes:
        inner_loss: see :class:`SingleLoop`.
        outer_loss: see :class:`SingleLoop`.
        inner_lr: step size rho of w.
        outer_lr: step size gamma of y.
        linear_lr: step size of v; ``inner_lr`` if None, as in the paper: both problems have the
            conditioning of H.

    Cost of a step: one gradient of each loss and one pass through second derivatives, which gives
    the Hessian-vector and the cross product together.
    Source: Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022, arXiv 2201.13409,
    algorithm 1 with equations 10.  An early version proves that the squared norm of the
    hypergradient falls as T^(-2/5) for rho = t^(-2/5), gamma = t^(-3/5) (theorem 2).

    Examples:
        >>> import torch, hypergrad
        >>> inner = lambda w, y: 0.5 * ((w - y) ** 2).sum()
        >>> outer = lambda w, y: 0.5 * ((w - torch.tensor([1.0, 2.0])) ** 2).sum()
        >>> method = hypergrad.SOBA(inner, outer, inner_lr=0.5, outer_lr=0.1)
        >>> state = method.init(torch.zeros(2), torch.zeros(2))
        >>> for _ in range(200):
        ...     state = method.step(state)
        >>> state.outer_params.round(decimals=3)
        tensor([1., 2.])
    """

    _: KW_ONLY
    linear_lr: float | Callable[[int], float] | None = None

    def _update(
        self, oracle: Oracle, now: SingleLoopState, inner: list[Batch], outer: list[Batch]
    ) -> Vectors:
        w, y, v = (now.vectors[name] for name in ("inner", "outer", "ihvp"))
        g = oracle.inner_products(w, y, v, inner[0], hvp=True, cross=True)
        f_inner, f_outer = oracle.outer_gradients(w, y, outer[0])
        direction = f_outer - g.cross
        return {
            "inner": w - self._rate("inner_lr", now.step) * g.gradient,
            "ihvp": v - self._rate("linear_lr", now.step) * (g.hvp - f_inner),
            "outer": y - self._rate("outer_lr", now.step) * direction,
            "outer_direction": direction,
        }


@dataclass(frozen=True)
class InnerLoops(SingleLoop):
    """What AmIGO and stocBiO share: two inner loops before each outer step."""

    _: KW_ONLY
    linear_lr: float | Callable[[int], float] | None = None
    inner_steps: int = 10
    linear_steps: int = 10

    @property
    def num_inner_batches(self) -> int:
        """Batches of the inner problem that a step takes, one for each of its derivatives."""
        return self.inner_steps + self.linear_steps + 1

    @abstractmethod
    def _solved(self, product: Product, f_inner: Tensor, v: Tensor, rate: float) -> Tensor:
        """About H^-1 f_inner, by ``linear_steps`` products, each on a batch of its own."""

    def _update(
        self, oracle: Oracle, now: SingleLoopState, inner: list[Batch], outer: list[Batch]
    ) -> Vectors:
        w, y, v = (now.vectors[name] for name in ("inner", "outer", "ihvp"))
        batches = iter(inner)
        rate = self._rate("inner_lr", now.step)
        for _ in range(self.inner_steps):
            w = w - rate * oracle.inner_gradient(w, y, next(batches))
        # One outer batch serves the right-hand side of the system and the direct part.
        f_inner, f_outer = oracle.outer_gradients(w, y, outer[0])

        def product(x: Tensor) -> Tensor:
            return oracle.inner_products(w, y, x, next(batches), hvp=True, cross=False).hvp

        v = self._solved(product, f_inner, v, self._rate("linear_lr", now.step))
        g = oracle.inner_products(w, y, v, next(batches), hvp=False, cross=True)
        direction = f_outer - g.cross
        return {
            "inner": w,
            "ihvp": v,
            "outer": y - self._rate("outer_lr", now.step) * direction,
            "outer_direction": direction,
        }


@dataclass(frozen=True)
class AmIGO(InnerLoops):
    """AmIGO: some steps on the inner problem, some on the linear system, then one outer step.

    Both of the inner loops start where they last ended: that warm start amortises their cost over
    the outer steps, so that their lengths need not grow.

    Attributes:
        inner_loss: see :class:`SingleLoop`.
        outer_loss: see :class:`SingleLoop`.
        inner_lr: step size alpha of w.
        outer_lr: step size gamma of y.
        linear_lr: step size beta of v; ``inner_lr`` if None.
        inner_steps: SGD steps T on the inner problem.
        linear_steps: SGD steps N on the linear system.

    Cost of a step: ``inner_steps + linear_steps + 1`` gradients of the inner loss and as many
    batches, one gradient of the outer loss, ``linear_steps + 1`` passes through second derivatives.
    Source: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization", ICLR 2022, arXiv 2111.14580, algorithms 1 to 3.

    Examples:
        >>> import torch, hypergrad
        >>> inner = lambda w, y: 0.5 * ((w - y) ** 2).sum()
        >>> outer = lambda w, y: 0.5 * ((w - torch.tensor([1.0, 2.0])) ** 2).sum()
        >>> method = hypergrad.AmIGO(inner, outer, inner_lr=0.5, outer_lr=0.5, inner_steps=3)
        >>> state = method.init(torch.zeros(2), torch.zeros(2))
        >>> for _ in range(50):
        ...     state = method.step(state)
        >>> state.outer_params.round(decimals=3)
        tensor([1., 2.])
    """

    def _solved(self, product: Product, f_inner: Tensor, v: Tensor, rate: float) -> Tensor:
        for _ in range(self.linear_steps):
            v = v - rate * (product(v) - f_inner)
        return v


@dataclass(frozen=True)
class StocBiO(InnerLoops):
    """stocBiO: some steps on the inner problem, a stochastic Neumann series, one outer step.

    The series starts anew from the outer gradient in every step, so that its bias,
    (I - eta H)^(Q + 1) H^-1 grad_w f, stays: it is what ``linear_steps`` buys down.

    Attributes:
        inner_loss: see :class:`SingleLoop`.
        outer_loss: see :class:`SingleLoop`.
        inner_lr: step size alpha of w.
        outer_lr: step size beta of y.
        linear_lr: the series' step eta, below 1 / (largest eigenvalue of any batch's Hessian);
            ``inner_lr`` if None.
        inner_steps: SGD steps D on the inner problem, from where they last ended.
        linear_steps: products Q of the series, which has Q + 1 terms.

    Cost of a step: ``inner_steps + linear_steps + 1`` gradients of the inner loss and as many
    batches, one gradient of the outer loss, ``linear_steps + 1`` passes through second derivatives.
    The paper's batches for the series grow towards its end, where they matter most: yours may too.
    Source: Ji, Yang and Liang, "Bilevel optimization: convergence analysis and enhanced design",
    ICML 2021, arXiv 2010.07962, algorithms 2 and 3.

    Examples:
        >>> import torch, hypergrad
        >>> inner = lambda w, y: 0.5 * ((w - y) ** 2).sum()
        >>> outer = lambda w, y: 0.5 * ((w - torch.tensor([1.0, 2.0])) ** 2).sum()
        >>> method = hypergrad.StocBiO(inner, outer, inner_lr=0.5, outer_lr=0.5)
        >>> state = method.init(torch.zeros(2), torch.zeros(2))
        >>> for _ in range(50):
        ...     state = method.step(state)
        >>> state.outer_params.round(decimals=3)
        tensor([1., 2.])
    """

    def _solved(self, product: Product, f_inner: Tensor, v: Tensor, rate: float) -> Tensor:
        term = total = f_inner
        for _ in range(self.linear_steps):
            term = term - rate * product(term)
            total = total + term
        return rate * total
