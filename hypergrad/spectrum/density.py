"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverOptionError
from ..norms import row_norms
from ..pytree import Tree
from .lanczos import tridiagonalise
from .products import Products, check_count
from .traces import TraceEstimate, estimate_from


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class SpectralDensity:
    """How an operator's eigenvalues are distributed, as quadrature nodes and weights.

    Made by :func:`spectral_density`.  For each probe u the weights put on the nodes are those of
    Gauss quadrature for the measure sum_i (u'q_i)^2 delta(x - lambda_i), so that polynomials of
    degree below twice the number of steps are integrated exactly.

    Attributes:
        nodes: Ritz values, shape (num_probes, k), float64 on the CPU, ascending.
        weights: shape (num_probes, k), each row sums to one; rows whose Krylov space was
            exhausted early are padded with weights of zero.
        dim: the dimension n.
        smallest: smallest Ritz value; never below the smallest eigenvalue (up to rounding).
        largest: largest Ritz value; never above the largest eigenvalue (up to rounding).
        complete: whether the probes were a whole orthonormal basis, so that nothing is random.
        num_hvps: products used.
    """

    nodes: Tensor
    weights: Tensor
    dim: int
    smallest: float
    largest: float
    complete: bool
    num_hvps: int

    def integrate(self, f: Callable[[Tensor], Tensor]) -> TraceEstimate:
        """Estimate trace f(A) = sum_i f(lambda_i), with no further product.

        Args:
            f: elementwise on a float64 tensor of nodes, such as ``torch.log1p``, or
                ``lambda x: x / (x + damping)`` for the effective dimension.

        Raises:
            NonFiniteError: f is not finite at a node that counts.
        """
        values = f(self.nodes.clone())
        counts = self.weights > 0
        if not bool(torch.isfinite(values[counts]).all()):
            bad = float(self.nodes[counts][~torch.isfinite(values[counts])][0])
            raise NonFiniteError(
                f"f is not finite at the node {bad:.6g}; it must be defined on the whole spectrum, "
                f"here [{self.smallest:.6g}, {self.largest:.6g}] and rounding around it."
            )
        sums = torch.where(counts, self.weights * values, torch.zeros_like(values)).sum(dim=1)
        estimate = estimate_from(0.0, (self.dim * sums).tolist(), self.num_hvps)
        if self.complete:
            return TraceEstimate(estimate.value, 0.0, self.num_hvps)
        return estimate

    def top(self, count: int) -> Tensor:
        """The ``count`` largest eigenvalues as far as the runs have found them, largest first.

        The k-th largest Ritz value of a Lanczos run is at most the k-th largest eigenvalue, by
        Cauchy's interlacing theorem, so the largest one over the probes is the best of them: no
        entry is above its eigenvalue, up to rounding.  Those at the end of the spectrum that stand
        apart are exact first; more steps reach further down.  One run sees a multiple eigenvalue
        once.

        Args:
            count: how many, from one to the number of steps that the runs took.

        Returns:
            Shape (count,), float64 on the CPU.

        Raises:
            SolverOptionError: ``count`` is below one, or no run took so many steps.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(torch.tensor([9.0, 5.0, *[0.1] * 50, -1.0], dtype=torch.float64))
            >>> generator = torch.Generator().manual_seed(0)
            >>> density = hypergrad.spectral_density(a, num_probes=2, generator=generator)
            >>> density.top(3).numpy().round(4).tolist()
            [9.0, 5.0, 0.1]
        """
        check_count(count, "count")
        # Padding repeats the largest node, with a weight of zero.
        values = torch.where(self.weights > 0, self.nodes, -torch.inf)
        ranked = values.sort(dim=1, descending=True).values.max(dim=0).values
        found = int(torch.isfinite(ranked).sum())
        if count > found:
            raise SolverOptionError(
                f"count is {count}, but the longest Lanczos run found {found} values. Take more "
                "steps (num_steps); where a run ended early it has seen all that its probe can."
            )
        return ranked[:count]

    def moment(self, order: int) -> float:
        """The mean of the eigenvalues to the power ``order``: trace(A^order) / n."""
        check_count(order, "order")
        return self.integrate(lambda x: x**order).value / self.dim

    def default_width(self) -> float:
        """Width of the smoothing where none is named: a hundredth of the range seen."""
        width = (self.largest - self.smallest) / 100.0
        return width or abs(self.largest) / 100.0 or 0.01

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density of eigenvalues at ``grid``, smoothed with Gaussians; its integral is one.

        Args:
            grid: points, any shape.
            width: standard deviation of the Gaussians, > 0; None for a hundredth of the range.

        Returns:
            Shape, dtype and device of ``grid``.
        """
        width = self.default_width() if width is None else float(width)
        if not (math.isfinite(width) and width > 0):
            raise SolverOptionError(f"width is {width!r}, expected a finite number > 0 or None.")
        points = grid.detach().cpu().to(torch.float64).reshape(-1, 1)
        total = torch.zeros_like(points[:, 0])
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            bumps = torch.exp(-0.5 * ((points - nodes) / width) ** 2)
            total += bumps @ weights
        total /= len(self.nodes) * width * math.sqrt(2.0 * math.pi)
        return total.reshape(grid.shape).to(grid)

    def plot(self, ax: Any = None, path: str | Path | None = None) -> Any:
        """Draw the smoothed density on a logarithmic scale; needs matplotlib.

        Args:
            ax: the axes to draw on; None for those of a new figure.
            path: where to save the figure as well.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "SpectralDensity.plot needs matplotlib, which is not installed: pip install "
                "matplotlib, or draw .density(grid) with what you have."
            ) from error
        width = self.default_width()
        grid = torch.linspace(
            self.smallest - 5 * width,
            self.largest + 5 * width,
            1000,
            dtype=torch.float64,
            device="cpu",
        )
        if ax is None:  # not pyplot, which would keep the figure and choose a window system
            ax = Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
        curve = self.density(grid)
        ax.fill_between(grid.numpy(), curve.numpy(), alpha=0.3, linewidth=0)
        ax.plot(grid.numpy(), curve.numpy(), linewidth=1.2)
        ax.set_yscale("log")
        # One eigenvalue of n is a bump of height 1 / (n width sqrt(2 pi)): a tenth of it is noise.
        one = 1.0 / (self.dim * width * math.sqrt(2.0 * math.pi))
        ax.set_ylim(0.1 * one, max(2.0 * float(curve.max()), one))
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        if path is not None:
            ax.figure.savefig(path, dpi=150)
        return ax


def spectral_density(
    operator: Any,
    like: Tree | None = None,
    *,
    num_steps: int = 40,
    num_probes: int = 8,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate how the eigenvalues are distributed, by stochastic Lanczos quadrature.

    Each probe, uniform on the unit sphere, gives the quadrature of one Lanczos run; their mean is
    an unbiased view of the spectrum through polynomials of degree below ``2 num_steps``.  With
    ``num_probes`` of at least the dimension n the probes are the n columns of the identity, and
    with ``num_steps`` of at least n too, every integral is exact.

    Args:
        operator: the operator A, or anything else that :func:`hypergrad.as_operator` takes.
        like: a tree of the structure of the operator's argument; callables need it.
        num_steps: Lanczos steps a probe: resolution.  Capped at n.
        num_probes: random probes: the error of an integral falls like 1 / sqrt(num_probes n).
        generator: source of the probes; None for torch's global one.

    Raises:
        SolverOptionError: ``num_steps`` or ``num_probes`` below one.
        NonFiniteError: a product holds nan or inf.
        NotSymmetricError: the products are not those of a symmetric operator.

    Cost: at most ``num_steps * num_probes`` products, in blocks of ``num_probes``, and as many
    vectors of memory.
    Sources: Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017); for neural networks Ghorbani,
    Krishnan, Xiao, arXiv 1901.10159.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64))
        >>> density = hypergrad.spectral_density(a, num_steps=4, num_probes=4)
        >>> round(density.integrate(torch.log).value, 4)  # log det
        1.6094
        >>> round(density.moment(1), 4), density.num_hvps
        (2.0, 4)
    """
    check_count(num_steps, "num_steps")
    check_count(num_probes, "num_probes")
    products = Products(operator, like)
    n = products.dim
    complete = num_probes >= n
    if complete:
        starts = products.unit_rows(range(n))
    else:
        starts = products.gaussian(num_probes, generator)
        starts = starts / row_norms(starts)[:, None]
    found = tridiagonalise(
        products, starts, num_steps, asymmetry_allowed=products.asymmetry_allowed
    )
    longest = max(len(run.nodes) for run in found)
    nodes = torch.stack([_padded(run.nodes, longest, float(run.nodes[-1])) for run in found])
    weights = torch.stack([_padded(run.first**2, longest, 0.0) for run in found])
    counted = nodes[weights > 0]  # one of no weight is one of its neighbours once more
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        dim=n,
        smallest=float(counted.min()),
        largest=float(counted.max()),
        complete=complete,
        num_hvps=products.num_hvps,
    )


def _padded(values: Tensor, length: int, filler: float) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), filler)])
