"""The Lanczos process with full reorthogonalisation, for many starts in one recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotSymmetricError
from ..norms import row_norms


@dataclass(frozen=True)
class Tridiagonal:
    """V'AV for one start: the matrix of A on its Krylov space of dimension k.

    Attributes:
        nodes: its eigenvalues (Ritz values), shape (k,), float64 on the CPU, ascending.
        first: first entries of its eigenvectors: the start's share along each, shape (k,).
        last: last entries of its eigenvectors, shape (k,).
        residual: norm of the next Lanczos vector; 0 where the Krylov space is invariant.
    """

    nodes: Tensor
    first: Tensor
    last: Tensor
    residual: float


def tridiagonalise(
    product: Callable[[Tensor], Tensor],
    starts: Tensor,
    num_steps: int,
    *,
    asymmetry_allowed: float | None = None,
) -> list[Tridiagonal]:
    """At most ``num_steps`` Lanczos steps from each row of ``starts``.

    A row whose Krylov space turns out to be invariant stops there and costs no more products.

    Args:
        product: A times each row of a block (m, n), in the dtype of ``starts``.
        starts: shape (m, n), no row zero.
        num_steps: steps, capped at n.
        asymmetry_allowed: relative size of q_i'A q_j, i < j - 1, at which A counts as not
            symmetric; None does not look.

    Raises:
        NotSymmetricError: see ``asymmetry_allowed``.

    Cost: a product a step and start; ``num_steps`` vectors of memory a start.
    """
    m, n = starts.shape
    eps = torch.finfo(starts.dtype).eps
    steps = min(num_steps, n)
    basis = starts.new_zeros(m, steps, n)
    basis[:, 0] = starts / row_norms(starts)[:, None]
    diagonals: list[list[float]] = [[] for _ in range(m)]
    off_diagonals: list[list[float]] = [[] for _ in range(m)]
    residuals = [0.0] * m
    active, rows = torch.arange(m, device=starts.device), list(range(m))
    largest = torch.zeros_like(basis[:, 0, 0])  # |A| as seen so far, what rounding is relative to
    for step in range(steps):
        # Indexing with rows copies; as long as all are active a view does.
        known = basis[:, : step + 1] if len(active) == m else basis[active, : step + 1]
        image = product(known[:, -1])
        sizes = row_norms(image)
        largest[active] = torch.maximum(largest[active], sizes)
        entries = torch.linalg.vecdot(known[:, -1], image)
        for again in (False, True):  # twice is enough (Kahan; Parlett 1998, section 6.9)
            shares = (known @ image[:, :, None])[:, :, 0]
            if not again and step >= 2 and asymmetry_allowed is not None:
                _check_symmetric(row_norms(shares[:, :-2]), largest[active], asymmetry_allowed)
            image = image - (shares[:, None, :] @ known)[:, 0]
        left = row_norms(image)
        # An exactly invariant subspace: the Ritz values are eigenvalues, nothing is left to see.
        ended = left <= 10 * eps * sizes
        if step + 1 == n:
            ended = torch.ones_like(ended)
        # In one transfer from the device.
        report = torch.stack([entries, left, ended.to(left.dtype)]).tolist()
        going = []
        for place, (row, entry, rest, end) in enumerate(zip(rows, *report, strict=True)):
            diagonals[row].append(entry)
            residuals[row] = 0.0 if end else rest
            if not end:
                going.append(place)
                if step + 1 < steps:
                    off_diagonals[row].append(rest)
        if not going:
            break
        if step + 1 < steps:
            if len(going) < len(rows):
                index = torch.tensor(going, device=active.device)
                active, image, left = active[index], image[index], left[index]
                rows = [rows[place] for place in going]
            basis[active, step + 1] = image / left[:, None]
    return [
        _decompose(diagonal, off_diagonal, residual)
        for diagonal, off_diagonal, residual in zip(
            diagonals, off_diagonals, residuals, strict=True
        )
    ]


def _decompose(diagonal: list[float], off_diagonal: list[float], residual: float) -> Tridiagonal:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    for i, beta in enumerate(off_diagonal):
        matrix[i, i + 1] = matrix[i + 1, i] = beta
    nodes, vectors = torch.linalg.eigh(matrix)
    return Tridiagonal(nodes, vectors[0], vectors[-1], residual)


def _check_symmetric(skew: Tensor, size: Tensor, allowed: float) -> None:
    # q_i'A q_j = 0 for i < j - 1, since A q_i lies in the span of q_1 ... q_(i+1).
    if bool((skew > allowed * size).any()):
        worst = float((skew / size).max())
        raise NotSymmetricError(
            "the operator is not symmetric, or not the same from call to call: its products with "
            f"Lanczos vectors have relative asymmetry {worst:.1e}, expected rounding only (at most "
            f"{allowed:.0e}). Common causes: a Jacobian that is not a Hessian, dropout or fresh "
            "minibatches, BatchNorm in training mode."
        )
