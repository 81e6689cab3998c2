"""How a Nyström sketch is made: one block of products, and a second where rounding or signs ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NegativeCurvatureError, RankError
from ..pytree import row_norms
from ..spectrum import damping_from_extremes
from .base import DampedSystem, check_skew
from .sketch import NegativeCurvature, NystromSketch, SketchKind

#: A core eigenvalue within this many times the core's rounding carries no information.
_CORE_NOISE = 3.0
#: By how much, relatively, the sketch's largest eigenvalue may exceed its Rayleigh quotient: more
#: than the rounding of 16-bit products, less than what would matter.
_ABOVE = 1e-2
#: Below this, relatively, what Ritz pairs miss is taken for amplified rounding.
_NEARLY_COMPLETE = 1e-3
#: A product within this many eps of the largest is rounding itself.
_PRODUCT_NOISE = 4.0
#: Relative change of the answer by amplified rounding that is worth a second pass, as a power of
#: eps: 7e-5 in float32, 4e-10 in float64.
_WORTH_A_PASS = 0.6


@dataclass(frozen=True)
class _Core:
    """The core W = Omega' A Omega of one block of products Y = A Omega, diagonalised.

    Attributes:
        values: eigenvalues of W, smallest first, shape (k,).
        products: rows (Y z)' for each eigenvector z, shape (k, n).
        sizes: their norms.
        noise: rounding of the eigenvalues: the larger of the antisymmetric part, which measures
            it, and eps |Y| / sqrt(n), what independent errors of relative size eps project to.
        gram: inner products of the rows of ``products``, over the square of ``size``.
        silence: size below which a row of ``products`` is rounding.
        size: |Y|, the spectral norm.
        eps: of the products' dtype.
    """

    values: Tensor
    products: Tensor
    sizes: Tensor
    gram: Tensor
    noise: float
    silence: float
    size: float
    eps: float

    @classmethod
    def of(cls, omega: Tensor, y: Tensor, dtype: torch.dtype) -> _Core:
        k, n = y.shape
        core = omega @ y.T
        skew = torch.linalg.matrix_norm(core - core.T, ord=2) / 2
        # The norm from the Gram matrix: as accurate for the largest as an SVD, at one pass.  The
        # scale keeps the squares in range.
        top = float(row_norms(y).max())
        scaled = y / top if top > 0 else y
        gram = scaled @ scaled.T
        size = top * float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt())
        # Against what products with unrelated vectors would leave in the core.
        check_skew(skew, skew.new_tensor(size * (k / n) ** 0.5), dtype)
        values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
        products = vectors.T @ y
        eps = torch.finfo(dtype).eps
        return cls(
            values=values,
            products=products,
            sizes=row_norms(products),
            gram=vectors.T @ gram @ vectors * ((top / size) ** 2 if size > 0 else 1.0),
            noise=max(float(skew), eps * size / n**0.5),
            silence=_PRODUCT_NOISE * eps * size,
            size=size,
            eps=eps,
        )

    @property
    def kept(self) -> Tensor:
        """Directions with positive curvature and a product, both above their rounding."""
        return (self.values > _CORE_NOISE * self.noise) & (self.sizes > self.silence)

    @property
    def indefinite(self) -> bool:
        """Whether there is negative curvature beyond rounding."""
        return bool((self.values < -_CORE_NOISE * self.noise).any())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenpairs (largest first) of Y W^+ Y' on the directions kept."""
        kept = self.kept
        return _squared_svd(self.products[kept] / self.values[kept].sqrt()[:, None])

    def noisy(self, eigenvalues: Tensor, damping: float) -> bool:
        """Whether the products' rounding, amplified by Y W^+, could be felt at this damping.

        To first order an error E in Y changes Y W^+ Y' by E W^+ Y' and its transpose, and the
        answer by that over the damping.  |Y W^+| is large where the test matrix, by bad luck, is
        nearly orthogonal to an eigenvector, which happens when the rank just covers that of A.
        (Measured in both dtypes: the error in the answer is at most 0.8 of this prediction, and
        sketches of operators with more eigenvalues than the rank amplify by less than four.)
        """
        kept = self.kept
        if not bool(kept.any()):
            return False
        inverse = self.size / self.values[kept]
        squared = self.gram[kept][:, kept] * inverse[:, None] * inverse
        lift = float(torch.linalg.eigvalsh(squared)[-1].clamp(min=0.0).sqrt())  # |Y W^+|
        largest, n = float(eigenvalues[0]), self.products.shape[1]
        # A test matrix that nearly misses A makes small products, but no smaller errors.
        error: float = self.eps * max(self.size, largest / n**0.5) * lift
        worth: float = self.eps**_WORTH_A_PASS * damping
        return error > 3.0 * self.eps * largest + worth  # the first is what rounding A costs

    def blurred(self, damping: float) -> bool:
        """Whether the rounding of the core's eigenvalues could be felt at this damping.

        Along a direction with eigenvalue b = |Y z|^2 / w of the sketch, an error e in w changes
        the answer, relative to |v|/damping, by (e / w) b damping / (b + damping)^2.
        """
        heard = self.sizes > self.silence
        w = self.values[heard].clamp(min=self.noise)
        b = self.sizes[heard] * (self.sizes[heard] / w)
        lost = self.values[heard] <= _CORE_NOISE * self.noise
        change = self.noise / w * b * damping / (b + damping) ** 2
        # A direction that would be dropped changes the answer by all that it would contribute.
        change = torch.where(lost, b / (b + damping), change)
        return bool((change > self.eps**_WORTH_A_PASS).any())


def make_sketch(
    system: DampedSystem,
    rank: int,
    kind: SketchKind,
    generator: torch.Generator | None,
    policy: NegativeCurvature,
) -> NystromSketch:
    """Sketch the system's operator; see :func:`hypergrad.nystrom_sketch`."""
    operator, layout = system.operator, system.operator.layout
    n = layout.dim
    if rank > n:
        raise RankError(
            f"rank is {rank}, but the operator has dimension {n}; expected 1 <= rank <= {n}."
        )
    before = system.num_hvps
    omega = _test_matrix(rank, kind, generator, n, system)
    omega = system.rounded(omega)  # what the products really are of
    y = system.product(omega)
    core = _Core.of(omega, y, operator.dtype)
    eigenvalues, basis = core.decompose()
    tail = _tail(eigenvalues, rank, n)
    lowest = 0.0
    if core.indefinite or not _vouched(system, core, eigenvalues, basis):
        eigenvalues, basis, tail, lowest = _rayleigh_ritz(system, omega, y)
    else:
        damping = system.damping
        if damping == "auto":
            largest = float(eigenvalues[0]) if len(eigenvalues) else 0.0
            damping = damping_from_extremes(0.0, largest, rounding=0.0, tail=tail)
        assert not isinstance(damping, str)
        if core.blurred(damping) or core.noisy(eigenvalues, damping):
            eigenvalues, basis, tail, lowest = _second_pass(system, y)
    smallest = _smallest(eigenvalues, lowest, rank, torch.finfo(operator.dtype).eps)
    if smallest < 0:
        eigenvalues = _apply_policy(eigenvalues, smallest, policy)
    else:  # a Ritz value below zero by rounding is zero
        eigenvalues = eigenvalues.clamp(min=0.0)
    return NystromSketch(
        eigenvalues=eigenvalues,
        basis=basis,
        layout=layout,
        operator_dtype=operator.dtype,
        smallest_eigenvalue=smallest,
        tail=tail,
        num_hvps=system.num_hvps - before,
        negative_curvature=policy,
    )


def _test_matrix(
    rank: int, kind: SketchKind, generator: torch.Generator | None, n: int, system: DampedSystem
) -> Tensor:
    """Orthonormal rows, shape (k, n)."""
    device, dtype = system.b.device, system.b.dtype
    place = device if generator is None else generator.device
    if kind == "columns":
        chosen = torch.randperm(n, generator=generator, device=place)[:rank].to(device)
        omega = torch.zeros(rank, n, dtype=dtype, device=device)
        omega[torch.arange(rank, device=device), chosen] = 1.0
        return omega
    # Random directions need no more digits than float32 has, and those cost a fifth.
    gaussian = torch.randn(rank, n, generator=generator, device=place, dtype=torch.float32)
    gaussian = gaussian.to(device=device, dtype=dtype)
    if 4 * rank > n:
        q: Tensor = torch.linalg.qr(gaussian.T)[0]
        return q.T.contiguous()
    # Cholesky QR.  The rows are nearly orthogonal already (condition at most about 3: Davidson and
    # Szarek 2001, theorem II.13), so it is as accurate as Householder's and a few times as fast.
    factor = torch.linalg.cholesky(gaussian @ gaussian.T)
    eye = torch.eye(rank, dtype=dtype, device=device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse @ gaussian


def _vouched(system: DampedSystem, core: _Core, eigenvalues: Tensor, basis: Tensor) -> bool:
    """Whether the largest eigenvalue of the sketch can be one of a positive operator.

    For positive A, A_nys <= A, so that l = u'A_nys u <= u'A u for the first eigenpair.  For an
    indefinite A whose core is positive by cancellation l can be anything: the core of
    [[e, 1], [1, 0]] on its first coordinate is e, and l is 1/e.
    """
    if len(eigenvalues) == 0:
        return core.size == 0 or not bool((core.sizes > core.silence).any())
    largest = float(eigenvalues[0])
    # |A| >= |A Omega| for orthonormal Omega, and then no product is needed.
    if largest <= core.size * (1 + _ABOVE):
        return True
    top = system.rounded(basis[:1])
    return float((top * system.product(top)).sum()) >= largest * (1 - _ABOVE)


def _second_pass(system: DampedSystem, y: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Sketch once more, with the range Q of Y as test matrix; see :func:`_rayleigh_ritz`.

    Q leans towards the eigenvectors that matter, so its core is as well conditioned as A there.
    """
    q: Tensor = torch.linalg.qr(y.T)[0]
    q = system.rounded(q.T.contiguous())
    image = system.product(q)
    core = _Core.of(q, image, system.operator.dtype)
    eigenvalues, basis = core.decompose()
    if core.indefinite or not _vouched(system, core, eigenvalues, basis):
        return _ritz_pairs(q, image, len(q))
    return eigenvalues, basis, _tail(eigenvalues, len(y), y.shape[1]), 0.0


def _rayleigh_ritz(
    system: DampedSystem, omega: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, float, float]:
    """Ritz pairs on the span of Omega and A Omega: eigenvalues, basis, tail, smallest value.

    Ritz values never leave the spectrum.  Omega belongs to the space because the range of A Omega
    alone may show nothing: of [[0, B], [B', 0]] and columns of one block its Ritz values are zero.
    """
    k = len(omega)
    columns, r = torch.linalg.qr(torch.cat([omega, y]).T)
    q = columns.T.contiguous()
    # The products with the first k are known: q1 = R11^-T Omega', hence A q1 = R11^-T Y'.
    image = torch.linalg.solve_triangular(r[:k, :k].T, y, upper=False)
    if len(q) > k:
        image = torch.cat([image, system.product(q[k:])])
    found = _ritz_pairs(q, image, k)
    values, _, missed, _ = found
    rounding = torch.finfo(system.operator.dtype).eps * float(values.abs().max())
    if 3.0 * rounding < missed < _NEARLY_COMPLETE * float(values.abs().max()):
        # All but complete: what is missed is rounding that an unlucky Omega amplified, and the
        # span leans away from the range of A by it.  The image of the span does not.
        kept = torch.linalg.svd(image, full_matrices=False)[2][:k]
        kept = torch.linalg.qr(system.rounded(kept).T)[0].T.contiguous()
        found = _ritz_pairs(kept, system.product(kept), k)
    return found


def _ritz_pairs(q: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The ``rank`` pairs of largest size on the span of q, given its image under A.

    The tail is the size of what is left out: Ritz values not kept, and the coupling (I - QQ')AQ
    to what is outside the span, which is 0 when that is invariant.
    """
    small = q @ image.T
    small = 0.5 * (small + small.T)
    values, vectors = torch.linalg.eigh(small)
    by_size = values.abs().argsort(descending=True)
    missed = float(torch.linalg.matrix_norm(image - small @ q, ord=2))
    if len(by_size) > rank:
        missed = max(missed, float(values[by_size[rank]].abs()))
    kept = by_size[:rank]
    kept = kept[values[kept].argsort(descending=True)]
    return values[kept], vectors[:, kept].T @ q, missed, float(values[0])


def _squared_svd(half: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of half' half, for half of shape (r, n), without squaring its condition."""
    if len(half) == 0:
        return half.new_zeros(0), half
    q, r = torch.linalg.qr(half.T)
    left, singular, _ = torch.linalg.svd(r)
    return singular**2, left.T @ q.T


def _tail(eigenvalues: Tensor, rank: int, n: int) -> float:
    """The last eigenvalue, unless the operator had no more to show."""
    complete = len(eigenvalues) < rank or rank == n
    return 0.0 if complete else float(eigenvalues[-1])


def _smallest(eigenvalues: Tensor, lowest: float, rank: int, eps: float) -> float:
    """Smallest eigenvalue seen; 0 when that is rounding, or when the sketch met a null space."""
    if len(eigenvalues) == 0:
        return 0.0
    if lowest < -10.0 * eps * float(eigenvalues.abs().max()):
        return lowest
    return max(float(eigenvalues.min()), 0.0) if len(eigenvalues) == rank else 0.0


def _apply_policy(eigenvalues: Tensor, smallest: float, policy: NegativeCurvature) -> Tensor:
    if policy == "raise":
        raise NegativeCurvatureError(
            f"the operator has negative curvature: smallest Ritz value {smallest:.3e}, largest "
            f"kept {float(eigenvalues.max()):.3e}. Solve the inner problem further, use a "
            "Gauss-Newton operator, add damping with negative_curvature='keep', or choose "
            "'absolute' or 'clip'."
        )
    if policy == "absolute":
        return eigenvalues.abs()
    return eigenvalues.clamp(min=0.0) if policy == "clip" else eigenvalues
