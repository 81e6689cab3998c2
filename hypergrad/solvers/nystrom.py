"""Nyström: a low-rank sketch of A from one block of products, inverted by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import DampingError, NegativeCurvatureError, RankError
from ..operators import LinearOperator, as_operator
from ..pytree import Tree, TreeLayout, row_norms, working_dtype
from ..spectrum import damping_from_extremes
from .base import (
    DampedSystem,
    Damping,
    Outcome,
    Solver,
    Status,
    check_damping,
    check_option,
    is_count,
)
from .sketching import low_rank

SketchKind = Literal["gaussian", "columns"]
NegativeCurvature = Literal["keep", "absolute", "clip", "raise"]


#: The sketch is made anew, from a better test matrix, when blur/damping, by which each step of
#: refinement contracts the error, exceeds this.
_BLURRED = 0.03
#: The answer is refined while its relative error may exceed eps to this power (2e-10 for float64,
#: 5e-5 for float32 products), in at most so many steps.
_REFINED, _MOST_STEPS = 5 / 8, 3
#: Relative residual up to which rounding, not the rank, is what a sketch lacks.
_FITS = 0.1


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
        tail: eigenvalue at which the sketch stops seeing: its last one when the rank was used
            up, 0 when the operator had no more to show.
        blur: how far, in norm, the rounding of the products may have moved the sketch.  Where the
            rank is just that of A it is a large multiple of eps |A|.
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
    blur: float
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


def nystrom_sketch(
    operator: Any,
    rank: int,
    like: Tree | None = None,
    *,
    sketch: SketchKind = "gaussian",
    generator: torch.Generator | None = None,
    negative_curvature: NegativeCurvature = "keep",
) -> NystromSketch:
    """Sketch a symmetric operator with ``rank`` products.

    With test matrix Omega (n x k, orthonormal), Y = A Omega and core W = Omega' Y, the Nyström
    approximation is Y W^+ Y'.  The core is truncated at the rounding of the products, so nothing
    is shifted and a singular core is no special case.  Of an indefinite A, Y W^+ Y' can have
    eigenvalues far outside the spectrum; where W or the Rayleigh quotient of the largest shows
    that, the sketch is the Rayleigh-Ritz one on the span of Omega and Y, at ``rank`` more
    products.

    Args:
        operator: anything :func:`hypergrad.as_operator` takes.
        rank: k, from 1 to the dimension n.
        like: a tree of the structure of the operator's argument; callables need it.
        sketch: ``"gaussian"`` (orthonormalised) or ``"columns"``: k columns of the identity,
            drawn uniformly (Hataya and Yamada).
        generator: source of the random test matrix; None for torch's global one.
        negative_curvature: what to make of negative eigenvalues: ``"keep"`` them (A + damping I
            as it is), ``"absolute"`` values (saddle-free), ``"clip"`` to zero (the positive
            part), or ``"raise"``.

    Raises:
        RankError: rank below 1 or above n.
        SolverOptionError: an unknown ``sketch`` or policy.
        NotSymmetricError: the products are not those of a symmetric operator.
        NonFiniteError: a product holds nan or inf.
        NegativeCurvatureError: there is negative curvature and the policy is ``"raise"``.

    Cost: k HVPs in one block and at most two to check them, k more if there is negative
    curvature; O(n k^2) operations, three
    n x k blocks of memory.
    Sources: Hataya and Yamada, AISTATS 2023 (columns); Frangella, Tropp, Udell, arXiv 2110.02820
    (Gaussian, algorithm 2.1); Nakatsukasa and Park, arXiv 2212.01127 (indefinite A).
    """
    op = as_operator(operator, like=like)
    config = Nystrom(rank, sketch, generator, negative_curvature)
    dtype = working_dtype(op.dtype, op.device)
    empty = torch.zeros(1, op.layout.dim, dtype=dtype, device=op.device)
    system = DampedSystem(op, empty, torch.ones_like(empty[:, 0]), "auto")
    return _sketch(system, config)


@dataclass(frozen=True)
class Nystrom(Solver):
    """x = (A_nys + damping I)^-1 v with A_nys of rank ``rank``: see :func:`nystrom_sketch`.

    A direct method: its accuracy is that of the rank, there is no tolerance to reach, and the
    status is FIXED_ITERATIONS, with the true residual in the report.  It is STAGNATED when the
    residual is no smaller than v itself, and NEGATIVE_CURVATURE when the damping does not exceed
    the negative curvature that policy ``"keep"`` leaves in.

    Outside the sketch's range the answer is v/damping.  So for one right-hand side of a
    moderately conditioned system CG is more accurate at equal HVPs; a sketch earns its place
    through reuse, many right-hand sides, batched products and as a preconditioner.

    Attributes:
        rank: k >= 1.
        sketch: ``"gaussian"`` or ``"columns"``.
        generator: source of the test matrix; None for torch's global one.
        negative_curvature: ``"keep"``, ``"absolute"``, ``"clip"`` or ``"raise"``.

    Cost: ``rank`` HVPs (twice that where there is negative curvature), at most two to check the
    sketch and one a right-hand side to check the answer.  A damping near the rounding of the
    products costs as much again for a second sketch that rounding blurs less, and up to three a
    right-hand side for steps of iterative refinement.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
        >>> info = hypergrad.solve(a, torch.ones(4), hypergrad.Nystrom(rank=2), damping=1.0).info
        >>> info.relative_residual < 1e-5, info.rank, info.num_hvps
        (True, 2, 4)
    """

    rank: int
    sketch: SketchKind = "gaussian"
    generator: torch.Generator | None = None
    negative_curvature: NegativeCurvature = "keep"

    default_damping = "auto"

    def __post_init__(self) -> None:
        if not is_count(self.rank):
            raise RankError(f"rank is {self.rank!r}, expected an integer >= 1.")
        kinds, policies = get_args(SketchKind), get_args(NegativeCurvature)
        check_option(self.sketch in kinds, "sketch", self.sketch, f"one of {kinds}")
        check_option(
            self.negative_curvature in policies,
            "negative_curvature",
            self.negative_curvature,
            f"one of {policies}",
        )

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if system.damping != "auto":
            positive_damping(system.damping)  # before any product is spent
        sketch = _sketch(system, self)
        damping = sketch.auto_damping() if system.damping == "auto" else float(system.damping)
        if x0 is None:
            x = sketch.solve_block(system.b, damping)
        else:
            x = x0 + sketch.solve_block(system.residual(x0, damping), damping)
        residual = system.residual(x, damping)
        x, residual = self._refined(sketch, system, x, residual, damping)
        return Outcome(
            x=x,
            residual_norms=row_norms(residual),
            statuses=self._statuses(sketch, system, x, residual, damping),
            iterations=[0] * len(x),
            damping=damping,
            rank=sketch.rank,
            smallest_eigenvalue=sketch.smallest_eigenvalue,
        )

    def _refined(
        self, sketch: NystromSketch, system: DampedSystem, x: Tensor, residual: Tensor, rho: float
    ) -> tuple[Tensor, Tensor]:
        """Iterative refinement where rounding, not the rank, separates A from its sketch.

        For A >= 0 the error of x is at most |residual|/damping.  A large residual means that the
        rank is too small instead, where a step would not contract.
        """
        if self.negative_curvature != "keep" and sketch.smallest_eigenvalue < 0:
            return x, residual  # the system was changed on purpose
        goal = torch.finfo(system.operator.dtype).eps ** _REFINED
        rows = system.b_norms > 0
        for _ in range(_MOST_STEPS):
            size = row_norms(residual)
            rows = rows & (size <= _FITS * system.b_norms) & (size > goal * rho * row_norms(x))
            if not bool(rows.any()):
                break
            better = system.rounded(x[rows]) + sketch.solve_block(residual[rows], rho)
            after = system.residual(better, rho, rows)
            # The residual may already be at rounding; it must not grow beyond that.
            fine = (row_norms(after) <= 2.0 * size[rows])[:, None]
            x, residual = x.clone(), residual.clone()
            x[rows] = torch.where(fine, better, x[rows])
            residual[rows] = torch.where(fine, after, residual[rows])
            rows = rows & (row_norms(residual) < 0.5 * size)
        return x, residual

    def _statuses(
        self, sketch: NystromSketch, system: DampedSystem, x: Tensor, residual: Tensor, rho: float
    ) -> list[Status]:
        # The smallest eigenvalue may also lie outside the sketch; there it is not used.
        if sketch.rank and float(sketch.eigenvalues.min()) + rho <= 0:
            return [Status.NEGATIVE_CURVATURE] * len(x)
        norms = row_norms(residual)
        if self.negative_curvature in ("absolute", "clip") and sketch.smallest_eigenvalue < 0:
            # The policy changed the system on purpose: along the basis the answer is exact for
            # the changed one, so only what lies outside can be wrong.
            norms = row_norms(residual - (residual @ sketch.basis.T) @ sketch.basis)
        return [
            Status.CONVERGED
            if size == 0
            else (Status.FIXED_ITERATIONS if norm < size else Status.STAGNATED)
            for norm, size in zip(norms.tolist(), system.b_norms.tolist(), strict=True)
        ]


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


def _sketch(system: DampedSystem, config: Nystrom) -> NystromSketch:
    operator, rank = system.operator, config.rank
    layout, n = operator.layout, operator.layout.dim
    if rank > n:
        raise RankError(
            f"rank is {rank}, but the operator has dimension {n}; expected 1 <= rank <= {n}."
        )
    before, eps = system.num_hvps, torch.finfo(operator.dtype).eps
    found = low_rank(system, _test_matrix(config, n, system.b.dtype, system.b.device))
    if system.damping != "auto" and found.blur > _BLURRED * float(system.damping):
        found = low_rank(system, torch.linalg.qr(found.products.T).Q.T.contiguous())
    eigenvalues = found.eigenvalues
    smallest, tail = _ends(eigenvalues, found.smallest, rank, n, eps)
    if smallest < 0:
        eigenvalues = _apply_policy(eigenvalues, smallest, config.negative_curvature)
    return NystromSketch(
        eigenvalues=eigenvalues,
        basis=found.basis,
        layout=layout,
        operator_dtype=operator.dtype,
        smallest_eigenvalue=smallest,
        tail=tail,
        blur=found.blur,
        num_hvps=system.num_hvps - before,
        negative_curvature=config.negative_curvature,
    )


def _test_matrix(config: Nystrom, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal rows, shape (k, n)."""
    generator = config.generator
    place = device if generator is None else generator.device
    if config.sketch == "columns":
        chosen = torch.randperm(n, generator=generator, device=place)[: config.rank].to(device)
        omega = torch.zeros(config.rank, n, dtype=dtype, device=device)
        omega[torch.arange(config.rank, device=device), chosen] = 1.0
        return omega
    gaussian = torch.randn(n, config.rank, generator=generator, device=place, dtype=dtype)
    q: Tensor = torch.linalg.qr(gaussian.to(device))[0]
    return q.T.contiguous()


def _ends(
    eigenvalues: Tensor, smallest: float, rank: int, n: int, eps: float
) -> tuple[float, float]:
    """Smallest eigenvalue seen (0 when that is rounding), and where the sketch stops seeing."""
    if len(eigenvalues) == 0:
        return 0.0, 0.0
    last, largest = float(eigenvalues.min()), float(eigenvalues.abs().max())
    if smallest < -10.0 * eps * largest:
        return smallest, 0.0
    complete = len(eigenvalues) < rank or rank == n
    return (0.0 if len(eigenvalues) < n else max(smallest, 0.0)), (
        0.0 if complete else max(last, 0.0)
    )


def _apply_policy(eigenvalues: Tensor, smallest: float, policy: NegativeCurvature) -> Tensor:
    if policy == "raise":
        raise NegativeCurvatureError(
            f"the operator has negative curvature: smallest Ritz value "
            f"{smallest:.3e}, largest kept {float(eigenvalues.max()):.3e}. Solve the "
            "inner problem further, use a Gauss-Newton operator, add damping with "
            "negative_curvature='keep', or choose 'absolute' or 'clip'."
        )
    if policy == "absolute":
        return eigenvalues.abs()
    return eigenvalues.clamp(min=0.0) if policy == "clip" else eigenvalues
