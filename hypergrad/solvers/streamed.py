"""A Gaussian sketch of very many parameters in the memory of little more than its own basis.

The test matrix, its products and the basis take turns in one block of k rows, in the dtype of the
products.  Sums over the columns are made in the solvers' wider dtype, a slice of columns at a time,
and what needs the rows as a whole needs only their inner products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..norms import row_norms
from .base import DampedSystem
from .complement import STEPS, Complement
from .core import ABOVE, Approximation, Check, Core, Numbers
from .skew import check_skew

#: A block of this many numbers is streamed; a smaller one is held several times in wide dtypes,
#: which costs less than the memory is worth.
_WORTH_STREAMING = 2**25
#: Numbers of a block that are widened at a time.
_SLICE = 2**18


def worth_streaming(rank: int, n: int) -> bool:
    """Whether a block of ``rank`` rows is large, and flat enough to be orthonormalised so."""
    return rank * n >= _WORTH_STREAMING and 4 * rank <= n


def held_twice(rank: int, n: int) -> bool:
    """Whether a test matrix and its products may be held for one solve, in their own dtype."""
    return rank * n < 4 * _WORTH_STREAMING


def projected(rows: Tensor, basis: Tensor) -> Tensor:
    """Inner products of (m, n) with (k, n), shape (m, k), summed in the wider of their dtypes."""
    if rows.dtype == basis.dtype:
        return rows @ basis.T
    return _inner(rows, basis, torch.promote_types(rows.dtype, basis.dtype))


def _inner(rows: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(len(rows), len(basis), dtype=dtype, device=basis.device)
    for part in _slices(basis):
        total += rows[:, part].to(dtype) @ basis[:, part].to(dtype).T
    return total


def combined(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Coefficients (m, k) times the rows of (k, n), in the dtype of the coefficients."""
    if coefficients.dtype == basis.dtype:
        return coefficients @ basis
    out = coefficients.new_empty(len(coefficients), basis.shape[1])
    for part in _slices(basis):
        torch.matmul(coefficients, basis[:, part].to(coefficients.dtype), out=out[:, part])
    return out


def _slices(rows: Tensor) -> list[slice]:
    step = max(1, _SLICE // max(1, len(rows)))
    return [slice(start, start + step) for start in range(0, rows.shape[1], step)]


def _on(rows: Tensor, numbers: Numbers) -> Tensor:
    return torch.from_numpy(numbers.copy()).to(rows.device)


def _recombine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Coefficients (r, k), r <= k, times the rows of (k, n), which they replace."""
    count = len(coefficients)
    for part in _slices(rows):
        rows[:count, part] = (coefficients @ rows[:, part].to(coefficients.dtype)).to(rows.dtype)
    return rows[:count]


def _subtract(rows: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Take coefficients (m, k) times the rows of (k, n) off rows (m, n), in place."""
    for part in _slices(basis):
        rows[:, part] -= (coefficients @ basis[:, part].to(coefficients.dtype)).to(rows.dtype)


def streamed_approximation(
    system: DampedSystem, rank: int, generator: torch.Generator | None, check: Check = True
) -> Approximation:
    """The eigenpairs of a Gaussian sketch; what asks for a second pass is what asks for it there.

    Where A is not positive, the Ritz pairs on the range of A Omega: one step of subspace
    iteration, with half as many vectors as the span of Omega and A Omega.
    """
    rows = _gaussian(system, rank, generator)
    core = _multiplied(system, rows)
    if core.indefinite:
        return _ritz_pairs(system, _orthonormal(rows, system.b.dtype))
    eigenvalues, combination = core.combinations()
    if not _vouched(system, core, eigenvalues, combination, check):
        return _ritz_pairs(system, _orthonormal(rows, system.b.dtype))
    trace = core.trace(float(eigenvalues.sum()))
    found = Approximation.truncated(
        torch.from_numpy(eigenvalues.copy()), rows, rank, trace, generic=True
    )
    damping = found.damping(system, tail=found.tail)
    if core.blurred(damping) or core.noisy(found.largest, damping):
        return streamed_again(system, rows, trace, positive=True)
    return streamed_basis(system, rows, eigenvalues, combination, trace)


def streamed_again(
    system: DampedSystem, rows: Tensor, trace: float | None, *, positive: bool
) -> Approximation:
    """From products that do not serve, and are replaced: a second pass.

    Where A is not positive, the Ritz pairs on their range.
    """
    rows = _orthonormal(rows, system.b.dtype)
    if not positive:
        return _ritz_pairs(system, rows)
    rows = _rounded(system, rows)
    core = _multiplied(system, rows)
    eigenvalues, combination = core.combinations()
    if core.indefinite or not _vouched(system, core, eigenvalues, combination):
        return _ritz_pairs(system, _orthonormal(rows, system.b.dtype))
    return streamed_basis(system, rows, eigenvalues, combination, trace)


def streamed_basis(
    system: DampedSystem,
    rows: Tensor,
    eigenvalues: Numbers,
    combination: Numbers,
    trace: float | None,
) -> Approximation:
    """The approximation from the products ``rows``, which its basis replaces."""
    rank = len(rows)
    basis = _polished(_recombine(_on(rows, combination), rows), system.b.dtype)
    return Approximation.truncated(_on(rows, eigenvalues), basis, rank, trace, generic=True)


def _gaussian(system: DampedSystem, rank: int, generator: torch.Generator | None) -> Tensor:
    operator = system.operator
    device = operator.device if generator is None else generator.device
    # 16-bit numbers are too coarse for a basis.
    dtype = torch.promote_types(operator.dtype, torch.float32)
    rows = torch.empty(rank, operator.layout.dim, dtype=dtype, device=operator.device)
    for row in rows:
        row.copy_(torch.randn(len(row), generator=generator, device=device, dtype=torch.float32))
    return _rounded(system, _orthonormal(rows, system.b.dtype))


def _rounded(system: DampedSystem, rows: Tensor) -> Tensor:
    """Rows as the operator will multiply them: rounded to its dtype, in place."""
    if rows.dtype != system.operator.dtype:
        for row in rows:
            row.copy_(row.to(system.operator.dtype))
    return rows


def _orthonormal(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormal rows of the same span, in place; without directions that are rounding.

    From the eigenpairs of the Gram matrix, twice: the first leaves rows that are independent, the
    second finds them well conditioned.
    """
    for _ in range(2):
        gram, top = _scaled_gram(rows, dtype)
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 10.0 * len(rows) * torch.finfo(dtype).eps * values[-1]
        rows = _recombine((vectors[:, kept] / (values[kept].sqrt() * top)).T, rows)
    return rows


def _polished(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly orthonormal rows as orthonormal ones, in place, each changed as little as can be.

    The squares that they were made of cost digits; each turn squares what is left of that.
    """
    eye = torch.eye(len(rows), dtype=dtype, device=rows.device)
    for _ in range(3):
        gram = _inner(rows, rows, dtype)
        rounding = len(rows) * torch.finfo(rows.dtype).eps
        if len(rows) == 0 or float((gram - eye).abs().max()) <= rounding:
            break
        values, vectors = torch.linalg.eigh(gram)
        _recombine((vectors / values.sqrt()) @ vectors.T, rows)
    return rows


def _largest_norm(rows: Tensor) -> float:
    return max(float(row_norms(row[None])) for row in rows)


def _scaled_gram(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Inner products of the rows over the square of the largest norm, and that norm."""
    top = _largest_norm(rows)
    total = torch.zeros(len(rows), len(rows), dtype=dtype, device=rows.device)
    for part in _slices(rows):
        wide = rows[:, part].to(dtype) / (top or 1.0)
        total += wide @ wide.T
    return total, top


def _product(system: DampedSystem, row: Tensor) -> list[Tensor]:
    """A times one row of shape (n,), by leaves: nothing of size n is held beside them."""
    operator = system.operator
    tree = operator.layout.unflatten(row.to(operator.dtype))
    leaves = operator.layout.leaves_unchecked(operator.matvec(tree))
    system.num_hvps += 1
    for leaf in leaves:
        # Through the whole vector's check only if there is something to be named.
        if not bool(torch.isfinite(leaf.sum())):
            flat = torch.cat([x.reshape(-1).to(operator.dtype) for x in leaves])
            operator.layout.check_finite(flat, "the output of the operator")
    return leaves


def _views(system: DampedSystem, rows: Tensor) -> list[Tensor]:
    """The columns of each leaf in rows of shape (m, n)."""
    sizes = [shape.numel() for shape in system.operator.layout.shapes]
    return list(rows.split_with_sizes(sizes, dim=-1))


def _along(system: DampedSystem, leaves: list[Tensor], rows: Tensor) -> Tensor:
    """Inner products of a vector, given by leaves, with rows of shape (k, n); shape (k,)."""
    total = system.b.new_zeros(len(rows))
    for leaf, columns in zip(leaves, _views(system, rows), strict=True):
        if leaf.numel():
            total += _inner(leaf.reshape(1, -1), columns, system.b.dtype)[0]
    return total


def _multiplied(system: DampedSystem, rows: Tensor) -> Core:
    """The core of the test matrix ``rows``, which is replaced by its rotated products.

    Product i is made when rows j < i are products already, so w_j'A w_i is taken from product j.
    A copy of the first row is kept: with it both w_0'A w_i and w_i'A w_0 are known, which is what
    tells of asymmetry.  The antisymmetric part of a whole matrix of such entries has about twice
    the norm of that of one row and column (Wigner's semicircle law).
    """
    operator, (k, n) = system.operator, rows.shape
    first = rows[:1].clone()
    w = system.b.new_zeros(k, k)
    transposed = system.b.new_zeros(k)
    for i in range(k):
        leaves = _product(system, rows[i])
        w[i, i:] = _along(system, leaves, rows[i:])
        transposed[i] = _along(system, leaves, first)[0]
        for into, leaf in zip(_views(system, rows[i]), leaves, strict=True):
            into.copy_(leaf.reshape(-1))
    skew = row_norms((w[0] - transposed)[None])[0]
    w[0] = 0.5 * (w[0] + transposed)
    w = w.triu() + w.triu(1).T
    gram, top = _scaled_gram(rows, system.b.dtype)
    size = top * float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt())
    check_skew(skew, skew.new_tensor(size * (k / n) ** 0.5), operator.dtype)
    values, vectors = torch.linalg.eigh(w)
    gram = vectors.T @ gram @ vectors
    eps = torch.finfo(operator.dtype).eps
    return Core(
        values=values.cpu().numpy(),
        vectors=vectors.cpu().numpy(),
        products=_recombine(vectors.T.contiguous(), rows),
        sizes=(top * gram.diagonal().clamp(min=0.0).sqrt()).cpu().numpy(),
        gram=(gram * ((top / size) ** 2 if size > 0 else 1.0)).cpu().numpy(),
        noise=max(float(skew), eps * size / n**0.5),
        silence=Core.silent(eps, size),
        size=size,
        eps=eps,
    )


def _vouched(
    system: DampedSystem,
    core: Core,
    eigenvalues: Numbers,
    combination: Numbers,
    check: Check = True,
) -> bool:
    """Whether the largest eigenvalue can be one of a positive operator: l <= u'A u for its pair."""
    if len(eigenvalues) == 0:
        return core.silent_throughout
    largest = float(eigenvalues[0])
    if check is False or largest <= core.size * (1 + ABOVE):
        return True
    top = combined(_on(core.products, combination[:1]).to(core.products.dtype), core.products)
    top = _rounded(system, top / row_norms(top)[:, None].to(top.dtype))
    return float(_along(system, _product(system, top[0]), top)[0]) >= largest * (1 - ABOVE)


def _ritz_pairs(system: DampedSystem, rows: Tensor) -> Approximation:
    """Ritz pairs on the span of orthonormal rows; the tail bounds A's coupling to what is outside.

    It is the Frobenius norm of (I - Q Q')A Q, which the products give one at a time.
    """
    k = len(rows)
    small, missed = system.b.new_zeros(k, k), 0.0
    for i in range(k):
        leaves = _product(system, rows[i])
        small[i] = _along(system, leaves, rows)
        for leaf, columns in zip(leaves, _views(system, rows), strict=True):
            for part in _slices(columns):
                image = leaf.reshape(-1)[part].to(small.dtype)
                gap = image - small[i] @ columns[:, part].to(small.dtype)
                missed = math.hypot(missed, float(row_norms(gap[None])))
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    basis = _recombine(vectors.flip(1).T.contiguous(), rows)
    return Approximation(values.flip(0), basis, missed, float(values[0]))


def streamed_complement(
    system: DampedSystem, basis: Tensor, size: float, generator: torch.Generator | None
) -> tuple[Complement | None, float]:
    """:func:`hypergrad.solvers.complement.measure_complement` by the recurrence of three terms.

    Few steps need no more: rounding makes Lanczos vectors lean on older ones only once a Ritz
    value has converged.
    """
    n, rounding = basis.shape[1], system.rounding
    place = basis.device if generator is None else generator.device
    drawn = torch.randn(1, n, generator=generator, device=place, dtype=torch.float32)
    now = drawn.to(basis)
    del drawn
    for _ in range(2):
        _subtract(now, _inner(now, basis, system.b.dtype), basis)
    now /= row_norms(now)[:, None]
    before = torch.zeros_like(now)
    diagonal: list[float] = []
    off_diagonal: list[float] = [0.0]
    for _ in range(min(STEPS, n - len(basis))):
        before *= -off_diagonal[-1]
        for into, leaf in zip(_views(system, before[0]), _product(system, now[0]), strict=True):
            into += leaf.reshape(-1)
        image, before = before, now
        for _ in range(2):
            _subtract(image, _inner(image, basis, system.b.dtype), basis)
        along = float(_inner(before, image, system.b.dtype))
        if not diagonal and float(row_norms(image)) <= rounding * size:
            return None, 0.0
        diagonal.append(along)
        image.add_(before, alpha=-along)
        image.add_(before, alpha=-float(_inner(before, image, system.b.dtype)))
        norm = float(row_norms(image))
        if norm <= rounding * size or len(diagonal) == n - len(basis):
            off_diagonal.append(0.0)
            break
        off_diagonal.append(norm)
        now = image.div_(norm)
    return Complement.of_steps(diagonal, off_diagonal[1:], system.b.dtype, rounding * size)
