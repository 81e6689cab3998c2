"""The normal posterior of a network that is linearised at its mode, for ``laplace.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import hypergrad

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Data and a likelihood; ``nll`` is the negative log-likelihood, a sum over the examples."""

    x: Tensor
    y: Tensor
    nll: Callable[[Tensor, Tensor], Tensor]


def network(params: Params, x: Tensor) -> Tensor:
    """A multilayer perceptron with tanh units; x of shape (n, inputs)."""
    depth = len(params) // 2
    for layer in range(depth):
        x = x @ params[f"weight{layer}"] + params[f"bias{layer}"]
        x = torch.tanh(x) if layer < depth - 1 else x
    return x


def initial(sizes: Sequence[int], seed: int) -> Params:
    """Random parameters."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        weight = torch.randn(fan_in, fan_out, generator=generator, dtype=torch.float64)
        params[f"weight{layer}"] = weight / fan_in**0.5
        params[f"bias{layer}"] = torch.zeros(fan_out, dtype=torch.float64)
    return params


def train(
    params: Params, problem: Problem, precision: float, iterations: int
) -> tuple[Params, float]:
    """Minimise nll + precision/2 |params|^2; also returns its value at the end."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimiser = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=iterations,
        tolerance_grad=1e-5,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        squares = torch.stack([leaf.square().sum() for leaf in leaves.values()]).sum()
        loss = problem.nll(network(leaves, problem.x), problem.y) + 0.5 * precision * squares
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    loss = float(closure().detach())
    return {name: leaf.detach() for name, leaf in leaves.items()}, loss


def gauss_newton(params: Params, problem: Problem) -> hypergrad.GaussNewtonOperator:
    """G, the Gauss-Newton matrix of the whole negative log-likelihood: a sum, not a mean."""
    return hypergrad.ggn(network, problem.nll, params, problem.x, problem.y)


@dataclass(frozen=True)
class Fit:
    """A network at the mode, the prior precision of which it is the mode, and its evidence."""

    params: Params
    precision: float
    report: dict[str, float]


# ------------------------------------------------------------------------------- the covariances


def jacobians(params: Params, x: Tensor) -> Params:
    """J(x): a tree of derivatives for each input and output, stacked; leaves (n * outputs, ...)."""

    def outputs(params: Params, row: Tensor) -> Tensor:
        return network(params, row[None])[0]

    found = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(params, x)
    return {name: leaf.flatten(0, 1) for name, leaf in found.items()}


def flat(trees: Params) -> Tensor:
    """Stacked trees as the rows of a matrix."""
    return torch.cat([leaf.flatten(1) for leaf in trees.values()], dim=1)


def covariances(rows: Params, solved: Params, outputs: int) -> Tensor:
    """J P^-1 J' for each input, shape (n, outputs, outputs)."""
    left, right = flat(rows), flat(solved)
    shape = (-1, outputs, left.shape[1])
    return left.reshape(shape) @ right.reshape(shape).mT


def dense_covariances(fit: Fit, problem: Problem, x: Tensor) -> Tensor:
    """The same without this library: Jacobians of all training data, and a Cholesky factor."""
    output = network(fit.params, problem.x)
    outputs = output.shape[1]
    rows = flat(jacobians(fit.params, problem.x)).reshape(len(problem.x), outputs, -1)
    # H_i, the Hessian of one example's negative log-likelihood in its outputs.
    curvature = torch.func.hessian(lambda row, target: problem.nll(row[None], target[None]))
    weights = torch.func.vmap(curvature)(output, problem.y)
    weighted = (weights @ rows).flatten(0, 1)
    gauss_newton = rows.flatten(0, 1).T @ weighted
    eye = torch.eye(len(gauss_newton), dtype=x.dtype)
    factor = torch.linalg.cholesky(gauss_newton + fit.precision * eye)
    new = flat(jacobians(fit.params, x))
    half = torch.linalg.solve_triangular(factor, new.T, upper=False).T
    half = half.reshape(len(x), outputs, -1)
    covariance: Tensor = half @ half.mT
    return covariance


def make_sketch(fit: Fit, problem: Problem, rank: int, seed: int) -> hypergrad.NystromSketch:
    """One sketch of G that serves every input from then on, without another product.

    It never exceeds G, and where it sees nothing G counts as zero ("zero"), so that the inverse and
    with it every variance is too large, if anything.
    """
    operator = gauss_newton(fit.params, problem)
    return hypergrad.nystrom_sketch(
        operator,
        min(rank, operator.shape[0]),
        damping=fit.precision,
        generator=torch.Generator().manual_seed(seed),
        complement="zero",
    )
