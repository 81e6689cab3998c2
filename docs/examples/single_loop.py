"""Single-loop bilevel methods on a quadratic problem whose answer is known.

The problem is the simulated one of the benchmark benchopt/benchmark_bilevel: both losses are means
over samples of random quadratics,

    g(w, y) = 1/n sum_i  (a_i'w)^2 / 2 + (p_i'y) (q_i'w) + l_i'w        (inner, n = 32768)
    f(w, y) = 1/m sum_j  (b_j'w)^2 / 2 + (c_j'y)^2 / 2 + (r_j'y) (s_j'w) + h_j'w + k_j'y

with w of 100 entries, y of 10. As everything is quadratic, w*(y), v*(y) and the hypergradient have
closed forms in the means over all samples, and the methods can be judged by the true hypergradient.

    python docs/examples/single_loop.py --run-dir runs/single_loop
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Side:
    """One loss: rows are samples.

    Attributes:
        curvature_w: a_i, shape (n, p): the Hessian in w is their mean outer product.
        curvature_y: c_i, shape (n, d).
        cross_y: p_i, shape (n, d): the cross derivative is the mean of p_i q_i'.
        cross_w: q_i, shape (n, p).
        linear_w: l_i, shape (n, p).
        linear_y: k_i, shape (n, d).
    """

    curvature_w: Tensor
    curvature_y: Tensor
    cross_y: Tensor
    cross_w: Tensor
    linear_w: Tensor
    linear_y: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, ...]:
        """Some samples, as the further arguments of :func:`quadratic`."""
        return tuple(getattr(self, name)[rows] for name in self.__dataclass_fields__)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Hessian in w, Hessian in y, cross derivative (d, p), and the two linear terms."""
        n = len(self.linear_w)
        return (
            self.curvature_w.T @ self.curvature_w / n,
            self.curvature_y.T @ self.curvature_y / n,
            self.cross_y.T @ self.cross_w / n,
            self.linear_w.mean(0),
            self.linear_y.mean(0),
        )


def quadratic(w: Tensor, y: Tensor, *batch: Tensor) -> Tensor:
    """The mean over a batch of samples of either loss."""
    curvature_w, curvature_y, cross_y, cross_w, linear_w, linear_y = batch
    return (
        0.5 * (curvature_w @ w).square().mean()
        + 0.5 * (curvature_y @ y).square().mean()
        + ((cross_y @ y) * (cross_w @ w)).mean()
        + linear_w.mean(0) @ w
        + linear_y.mean(0) @ y
    )


def make_side(n: int, p: int, d: int, mu: float, cross: float, draw: torch.Generator) -> Side:
    """Samples of one loss: Hessians with spectra in [mu, 1], a cross derivative of that norm."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=F64)

    def correlated(size: int, spectrum: Tensor) -> Tensor:
        basis = torch.linalg.svd(normal(size, 1))[0]
        return normal(n, size) @ ((basis * spectrum) @ basis.T)

    half = torch.tensor(mu, dtype=F64).log10().item() / 2
    in_w = torch.logspace(half, 0, p, dtype=F64)
    # One direction of y has no curvature of its own in either loss.
    in_y = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(half, 0, d - 1, dtype=F64)])
    curvature_w, curvature_y = correlated(p, in_w), correlated(d, in_y)
    left, _, right = torch.linalg.svd(normal(d, p))
    rank = min(d, p)
    low, high = (torch.tensor(x, dtype=F64).log10().item() for x in (mu, cross))
    values = torch.logspace(low, high, rank, dtype=F64)
    seeds = normal(n, p)
    cross_y = (seeds[:, :rank] * values) @ left[:, :rank].T
    return Side(curvature_w, curvature_y, cross_y, seeds @ right.T, normal(n, p), normal(n, d))


@dataclass(frozen=True)
class Problem:
    """Both losses, and what the closed forms need."""

    inner: Side
    outer: Side

    def __post_init__(self) -> None:
        object.__setattr__(self, "_inner_means", self.inner.means())
        object.__setattr__(self, "_outer_means", self.outer.means())

    def hypergradient(self, y: Tensor) -> Tensor:
        """The true hypergradient at y."""
        hess, _, cross, linear, _ = self._inner_means
        outer_w, outer_y, outer_cross, outer_lin_w, outer_lin_y = self._outer_means
        w = -torch.linalg.solve(hess, cross.T @ y + linear)
        v = torch.linalg.solve(hess, outer_w @ w + outer_cross.T @ y + outer_lin_w)
        return outer_y @ y + outer_cross @ w + outer_lin_y - cross @ v

    def curvature(self) -> Tensor:
        """The Hessian of the outer problem, (d, d)."""
        eye = torch.eye(self.outer.linear_y.shape[1], dtype=F64)
        zero = self.hypergradient(torch.zeros(len(eye), dtype=F64))
        return torch.stack([self.hypergradient(e) - zero for e in eye])


def make_problem(
    seed: int = 0,
    *,
    n: int = 32768,
    m: int = 1024,
    p: int = 100,
    d: int = 10,
    mu: float = 0.1,
    cross: float = 0.1,
) -> Problem:
    """A problem whose outer curvature is positive: drawn anew until it is."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(20):
        problem = Problem(
            make_side(n, p, d, mu, cross, draw), make_side(m, p, d, mu, cross, draw)
        )
        hess = problem.curvature()
        if float(torch.linalg.eigvalsh(0.5 * (hess + hess.T))[0]) > 1e-12:
            return problem
    raise ValueError("20 draws gave no problem with a positive outer curvature")
