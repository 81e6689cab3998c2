"""The Nyström sketch: a low-rank approximation of A from one block of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DampingError, NegativeCurvatureError, RankError
from ..operators import LinearOperator
from ..pytree import Tree, TreeLayout
from ..spectrum import damping_from_extremes
from .base import DampedSystem, Damping, check_damping, check_skew

SketchKind = Literal["gaussian", "columns"]
NegativeCurvature = Literal["keep", "absolute", "clip", "raise"]

#: A core eigenvalue within this many times the core's rounding carries no information.
_CORE_NOISE = 3.0
#: A product within this many eps of the largest is rounding itself.
_PRODUCT_NOISE = 4.0
#: Relative change of the answer by amplified rounding that is worth a second pass, as a power of
#: eps: 7e-5 in float32, 4e-10 in float64.
_WORTH_A_PASS = 0.6


@dataclass(frozen=True)
class NystromSketch:
    """A rank-r approximation U diag(L) U' of A, made once and solved with at any damping.

    Made by :func:`nystrom_sketch`.

    Attributes:
        eigenvalues: L, shape (r,), largest first.
        basis: U', orthonormal rows of shape (r, n) in the flat coordinates of ``layout``.
        layout: of the trees that A acts on.
        operator_dtype: dtype of A's products.
        smallest_eigenvalue: smallest eigenvalue seen: the smallest Ritz value where there is
            negative curvature, else that of the sketch (0 when it is complete below rank).
        tail: size of what the sketch does not see: its last eigenvalue when the rank was used
            up; with negative curvature, the norm of A's coupling of the basis to the rest; 0
            when the operator had no more to show.
        num_hvps: products used.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
        >>> sketch = hypergrad.nystrom_sketch(a, rank=3)
        >>> [round(x, 4) for x in sketch.eigenvalues.tolist()]
        [5.0, 1.0]
        >>> sketch.solve(torch.ones(4), damping=1.0)
        tensor([0.1667, 0.5000, 1.0000, 1.0000])
        >>> round(sketch.effective_dimension(1.0), 4)
        1.3333
    """

    eigenvalues: Tensor
    basis: Tensor
    layout: TreeLayout
    operator_dtype: torch.dtype
    smallest_eigenvalue: float
    tail: float
    num_hvps: int
    negative_curvature: NegativeCurvature

    @property
    def rank(self) -> int:
        """r, the number of eigenpairs kept; at most the rank asked for."""
        return len(self.eigenvalues)

    def auto_damping(self) -> float:
        """The value of ``damping="auto"``; see :func:`hypergrad.spectrum.damping_from_extremes`."""
        if self.rank == 0:
            return damping_from_extremes(0.0, 0.0, rounding=0.0)
        keep = self.negative_curvature == "keep"
        return damping_from_extremes(
            min(self.smallest_eigenvalue, 0.0) if keep else 0.0,
            float(self.eigenvalues.abs().max()),
            rounding=10.0 * torch.finfo(self.operator_dtype).eps,
            tail=self.tail,
        )

    def solve(self, v: Tree, damping: Damping = "auto") -> Tree:
        """(U diag(L) U' + damping I)^-1 v, with no further HVP.

        Symmetric positive definite with norm at most 1/damping whenever L >= 0, by construction.

        Raises:
            DampingError: damping is not positive.
            TreeStructureError, LeafTypeError, DeviceError: v does not fit the operator.
        """
        rho = self.auto_damping() if damping == "auto" else positive_damping(damping)
        vector = self.layout.flatten(v)
        self.layout.check_finite(vector, "v")
        x = self.solve_block(vector.to(self.basis.dtype)[None], rho)[0].to(self.layout.dtype)
        self.layout.check_finite(x, "the answer")
        return self.layout.unflatten(x)

    def solve_block(self, block: Tensor, damping: float) -> Tensor:
        """:meth:`solve` for rows of shape (m, n) in the dtype of :attr:`basis`.

        x = (v + U [(damping / (L + damping) - 1) U'v]) / damping.  The Woodbury form is the same
        in exact arithmetic, but subtracts numbers (L + damping)/damping times larger than the
        answer.
        """
        shrink = damping / (self.eigenvalues + damping) - 1.0
        return (block + ((block @ self.basis.T) * shrink) @ self.basis) / damping

    def effective_dimension(self, damping: float) -> float:
        """The sum of L/(L + damping): how many directions the damping leaves to be learned."""
        rho = positive_damping(damping)
        positive = self.eigenvalues.clamp(min=0.0)
        return float((positive / (positive + rho)).sum())

    def preconditioner(self, damping: float) -> LinearOperator:
        """P^-1 = (l + damping) U (L + damping)^-1 U' + (I - U U'), with l the last of L.

        Source: Frangella, Tropp, Udell, arXiv 2110.02820, equation (5.3).  Negative L enter by
        their absolute value, so that it is always positive definite.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(torch.logspace(0, 4, 50, dtype=torch.float64))
            >>> v = torch.ones(50, dtype=torch.float64)
            >>> sketch = hypergrad.nystrom_sketch(a, rank=40)
            >>> plain = hypergrad.solve(a, v, hypergrad.CG(), damping=1e-3).info
            >>> better = hypergrad.CG(preconditioner=sketch.preconditioner(1e-3))
            >>> hypergrad.solve(a, v, better, damping=1e-3).info.iterations < plain.iterations
            True
        """
        return _Preconditioner(self, positive_damping(damping))


class _Preconditioner(LinearOperator):
    def __init__(self, sketch: NystromSketch, damping: float) -> None:
        super().__init__(sketch.layout)
        self.basis = sketch.basis
        size = sketch.eigenvalues.abs()
        last = float(size.min()) if sketch.rank else 0.0
        self.weights = (last + damping) / (size + damping) - 1.0

    def _apply(self, block: Tensor) -> Tensor:
        wide = block.to(self.basis.dtype)
        return (wide + ((wide @ self.basis.T) * self.weights) @ self.basis).to(block.dtype)


def positive_damping(damping: Any) -> float:
    """``damping`` as a positive float, or :class:`DampingError`."""
    value = check_damping(damping)
    if value == "auto" or value == 0.0:
        raise DampingError(
            f"Nyström needs a positive damping, got {damping!r}: outside the sketch its answer is "
            "v/damping. Pass a positive number, damping='auto' where the call takes it, or use CG "
            "or Exact."
        )
    return float(value)


@dataclass(frozen=True)
class _Core:
    """The core W = Omega' A Omega of one block of products Y = A Omega, diagonalised.

    Attributes:
        values: eigenvalues of W, smallest first, shape (k,).
        products: rows (Y z)' for each eigenvector z, shape (k, n).
        sizes: their norms.
        noise: rounding of the eigenvalues: the larger of the antisymmetric part, which measures
            it, and eps |Y| / sqrt(n), what independent errors of relative size eps project to.
        silence: size below which a row of ``products`` is rounding.
        size: |Y|, the spectral norm.
        eps: of the products' dtype.
    """

    values: Tensor
    products: Tensor
    sizes: Tensor
    noise: float
    silence: float
    size: float
    eps: float

    @classmethod
    def of(cls, omega: Tensor, y: Tensor, dtype: torch.dtype) -> _Core:
        k, n = y.shape
        core = omega @ y.T
        skew = torch.linalg.matrix_norm(core - core.T, ord=2) / 2
        size = float(torch.linalg.matrix_norm(y, ord=2))
        # Against what products with unrelated vectors would leave in the core.
        check_skew(skew, skew.new_tensor(size * (k / n) ** 0.5), dtype)
        values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
        products = vectors.T @ y
        eps = torch.finfo(dtype).eps
        return cls(
            values=values,
            products=products,
            sizes=torch.linalg.vector_norm(products, dim=1),
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

    def inflated(self, eigenvalues: Tensor, falls_short: float) -> bool:
        """Whether the largest eigenvalue is more than the products can vouch for.

        A core that is positive only by cancellation of positive and negative curvature (a sketch
        of one or two vectors can meet one) inflates it without limit.  ``falls_short`` is what
        |A| / |Y| typically is; three times that is rare above k = 3.
        """
        return len(eigenvalues) > 0 and float(eigenvalues[0]) > 3.0 * falls_short * self.size

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
        lift = float(
            torch.linalg.matrix_norm(self.products[kept] / self.values[kept][:, None], ord=2)
        )
        error = self.eps * self.size * lift
        rounding_of_a = self.eps * float(eigenvalues[0])
        return error > 4.0 * rounding_of_a and error > self.eps**_WORTH_A_PASS * damping

    def blurred(self, damping: float) -> bool:
        """Whether the rounding of the core's eigenvalues could be felt at this damping.

        Along a direction with eigenvalue b = |Y z|^2 / w of the sketch, an error e in w changes
        the answer, relative to |v|/damping, by (e / w) b damping / (b + damping)^2.
        """
        heard = self.sizes > self.silence
        w = self.values[heard].clamp(min=self.noise)
        b = self.sizes[heard] ** 2 / w
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
    damping = system.damping
    if damping == "auto":
        largest = float(eigenvalues[0]) if len(eigenvalues) else 0.0
        damping = damping_from_extremes(0.0, largest, rounding=0.0, tail=tail)
    assert not isinstance(damping, str)
    if (
        core.indefinite
        or core.inflated(eigenvalues, falls_short=(n / rank) ** 0.5)  # of a random subspace
        or core.blurred(damping)
        or core.noisy(eigenvalues, damping)
    ):
        eigenvalues, basis, tail = _second_pass(system, y)
    smallest = _smallest(eigenvalues, n, torch.finfo(operator.dtype).eps)
    if smallest < 0:
        eigenvalues = _apply_policy(eigenvalues, policy)
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
    return torch.linalg.solve_triangular(factor, eye, upper=False) @ gaussian


def _second_pass(system: DampedSystem, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Sketch once more, with the range Q of Y as test matrix: eigenvalues, basis, tail.

    Q leans towards the eigenvectors that matter, so its core is as well conditioned as A there.
    With negative curvature Y W^+ Y' has eigenvalues outside the spectrum; then Q Q'AQ Q' is taken
    instead (Rayleigh-Ritz), whose eigenvalues never leave it.
    """
    q: Tensor = torch.linalg.qr(y.T)[0]
    q = system.rounded(q.T.contiguous())
    image = system.product(q)
    core = _Core.of(q, image, system.operator.dtype)
    eigenvalues, basis = core.decompose()
    if not (core.indefinite or core.inflated(eigenvalues, falls_short=1.0)):
        return eigenvalues, basis, _tail(eigenvalues, len(y), y.shape[1])
    # Rounding to the products' dtype left q orthonormal to that rounding only.
    q = torch.linalg.qr(q.T)[0].T.contiguous()
    small = q @ image.T
    small = 0.5 * (small + small.T)
    values, vectors = torch.linalg.eigh(small)
    # How strongly A couples what is seen to what is not: 0 when Q is invariant.
    missed = torch.linalg.matrix_norm(image - small @ q, ord=2)
    return values.flip(0), (vectors.T @ q).flip(0).contiguous(), float(missed)


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


def _smallest(eigenvalues: Tensor, n: int, eps: float) -> float:
    """Smallest eigenvalue seen; 0 when that is rounding, or when the sketch leaves a null space."""
    if len(eigenvalues) == 0:
        return 0.0
    smallest = float(eigenvalues.min())
    if smallest < -10.0 * eps * float(eigenvalues.abs().max()):
        return smallest
    return max(smallest, 0.0) if len(eigenvalues) == n else 0.0


def _apply_policy(eigenvalues: Tensor, policy: NegativeCurvature) -> Tensor:
    if policy == "raise":
        raise NegativeCurvatureError(
            f"the operator has negative curvature: smallest Ritz value "
            f"{float(eigenvalues.min()):.3e}, largest {float(eigenvalues.max()):.3e}. Solve the "
            "inner problem further, use a Gauss-Newton operator, add damping with "
            "negative_curvature='keep', or choose 'absolute' or 'clip'."
        )
    if policy == "absolute":
        return eigenvalues.abs()
    return eigenvalues.clamp(min=0.0) if policy == "clip" else eigenvalues
