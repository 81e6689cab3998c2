"""The Nyström sketch: a low-rank approximation of A, solved with at any damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DampingError, SolverOptionError
from ..operators import LinearOperator, as_operator
from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from ..spectrum import ExtremeEigenvalues, damping_from_extremes, lanczos_extremes
from .base import DampedSystem
from .complement import TAIL_THAT_MATTERS, Complement
from .embedding import SketchKind
from .options import Damping, check_damping, check_option, is_count
from .streamed import combined, projected

#: Named here too, for those that take a sketch's options.
__all__ = ["NegativeCurvature", "NystromSketch", "SketchKind"]

#: Weights below this many eps are lost, to a few digits, when one is taken off them.
_FEW = 1e3
#: Of the start that measures a sketch's error.  Not zero, the seed of many a test matrix: from a
#: row of that the error looks like none.
_ERROR_SEED = 0x4E79737472

NegativeCurvature = Literal["keep", "absolute", "clip", "raise"]


@dataclass(frozen=True)
class NystromSketch:
    """A rank-r approximation U diag(L) U' of A, made once and solved with at any damping.

    Made by :func:`nystrom_sketch`.

    Attributes:
        eigenvalues: L, shape (r,), largest first.
        basis: U', orthonormal rows of shape (r, n) in the flat coordinates of ``layout``; in the
            dtype of the solvers' vectors, or, where that would be too large, of A's products.
        layout: of the trees that A acts on.
        operator_dtype: dtype of A's products.
        smallest_eigenvalue: smallest eigenvalue seen: the smallest Ritz value where there is
            negative curvature, else that of the sketch (0 when it is complete below its rank).
        tail: size of what the sketch does not see: its last eigenvalue when the rank was used
            up; with negative curvature, the norm of A's coupling of the basis to the rest; 0
            when the operator had no more to show.
        num_hvps: products used.
        negative_curvature: what was made of negative eigenvalues.
        complement: the eigenvalue distribution of A outside the basis, where it was measured;
            with None A counts as zero there.
        condition_bound: of a sketch of ``rank="auto"``, the bound on the condition number of the
            preconditioned system that it was grown for, 1 + (last eigenvalue + estimate of
            |A - U diag(L) U'|) / damping; else None.
        trace_estimate: leave-one-out estimate of A's trace; None where the sketch gives none.

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
    complement: Complement | None = None
    condition_bound: float | None = None
    trace_estimate: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that the sketch is applied to by solvers."""
        return self.eigenvalues.dtype

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

    def solve(self, v: Tree, damping: Damping = "auto", *, batched: bool = False) -> Tree:
        """(U diag(L) U' + damping I)^-1 v, with no further HVP.

        Symmetric positive definite with norm at most 1/damping whenever L >= 0, by construction.

        Args:
            v: right-hand side, a tree like the operator's argument.
            damping: the multiple of the identity, > 0, or ``"auto"``.
            batched: whether v stacks m right-hand sides: every leaf has one more leading dimension.

        Raises:
            DampingError: damping is not positive.
            TreeStructureError, LeafTypeError, DeviceError: v does not fit the operator.
        """
        rho = self.auto_damping() if damping == "auto" else positive_damping(damping)
        block = self.layout.rows(v, batched=batched).detach()
        self.layout.check_finite(block, "v")
        x = self.solve_block(block.to(self.dtype), rho).to(self.layout.dtype)
        x = self.layout.narrowed(x)
        self.layout.check_finite(x, "the answer")
        return self.layout.unflatten_block(x) if batched else self.layout.unflatten(x[0])

    def solve_block(self, block: Tensor, damping: float) -> Tensor:
        """:meth:`solve` for rows of shape (m, n) in :attr:`dtype`.

        x = (U [damping / (L + damping)] U'v + c (v - U U'v)) / damping, with c = 1 where the
        complement was not measured.  The Woodbury form is the same in exact arithmetic, but
        subtracts numbers (L + damping)/damping times larger than the answer.
        """
        along = projected(block, self.basis)
        if self.rank == self.layout.dim:  # nothing lies outside, so nothing needs to cancel there
            return combined(along / self._damped(damping), self.basis)
        # v - U U'v is divided by the damping, and so is what it holds of the basis by rounding,
        # some eps |v|: where v lies in the range of A, as much as |A|/damping times eps of the
        # answer. A second projection takes it out.
        outside = block - combined(along, self.basis)
        rest = projected(outside, self.basis)
        along = (along + rest) * (damping / self._damped(damping))
        if self.complement is None or self.tail <= TAIL_THAT_MATTERS * damping:
            return (outside + combined(along - rest, self.basis)) / damping
        share = damping * self.complement.inverse(damping)
        return (share * outside + combined(along - share * rest, self.basis)) / damping

    def _damped(self, damping: float) -> Tensor:
        """L + damping, kept away from zero by the rounding of the sum.

        Only negative L can cancel the damping; the solve then reports negative curvature.
        """
        total = self.eigenvalues + damping
        least = torch.finfo(total.dtype).eps * self.eigenvalues.abs().clamp(min=damping)
        return torch.where(total.abs() < least, least, total)

    def effective_dimension(self, damping: float) -> float:
        """The sum of L/(L + damping): how many directions the damping leaves to be learned."""
        rho = positive_damping(damping)
        positive = self.eigenvalues.clamp(min=0.0)
        return float((positive / (positive + rho)).sum())

    def error_estimate(
        self,
        operator: Any,
        *,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
    ) -> ExtremeEigenvalues:
        """How far the sketch is from A: the extreme eigenvalues of A - U diag(L) U' by Lanczos.

        ``max(largest, -smallest)`` is a lower estimate of the spectral norm of the difference,
        ``largest_bound`` an upper one in practice, for positive semidefinite A.

        Args:
            operator: A, anything that :func:`hypergrad.as_operator` takes.
            num_steps: Lanczos steps.
            generator: of the random start; the default is seeded, so that the estimate is the same
                every time.  Not one in the state that the sketch was drawn with: A and the sketch
                agree on the rows of the test matrix, so a start among them sees no error.

        Raises:
            SolverOptionError: ``num_steps`` below one.
            TreeStructureError, LeafTypeError, DeviceError: the operator acts on other trees.

        Cost: ``num_steps`` HVPs, which are counted in the answer.  Source for its use: Frangella,
        Tropp and Udell, arXiv 2110.02820, who take power iteration; Lanczos gives more for the
        same products.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(1.0 / torch.arange(1.0, 101.0, dtype=torch.float64))
            >>> sketch = hypergrad.nystrom_sketch(a, rank=20)
            >>> ends = sketch.error_estimate(a)
            >>> 0.0 < ends.largest <= ends.largest_bound < 1.0, ends.num_hvps
            (True, 10)
        """
        check_option(is_count(num_steps), "num_steps", num_steps, "an integer >= 1")
        if generator is None:
            generator = torch.Generator().manual_seed(_ERROR_SEED)
        system = bare_system(operator, self.layout)

        def difference(vector: Tensor) -> Tensor:
            return system.product(vector[None])[0] - self._image(vector[None])[0]

        return lanczos_extremes(
            difference, self.layout.dim, num_steps, self.dtype, self.layout.device, generator
        )

    def trace(
        self,
        operator: Any = None,
        *,
        num_probes: int = 10,
        generator: torch.Generator | None = None,
    ) -> float:
        """Estimate of the trace of A, without bias for positive semidefinite A.

        Without ``operator``, from the sketch's own products by leaving out one row of the test
        matrix at a time (XNysTrace: Epperly, Tropp and Webber, arXiv 2301.07825).  With it, the
        trace of U diag(L) U' and the mean of z'(A - U diag(L) U')z over random signs z
        (Nyström++: Persson, Cortinovis and Kressner, arXiv 2109.10659).

        Args:
            operator: A, anything that :func:`hypergrad.as_operator` takes, or None.
            num_probes: how many z, with ``operator``.
            generator: of the signs; None for torch's global one.

        Raises:
            SolverOptionError: the sketch has no estimate of its own (``"diagonal"`` draws,
                negative curvature, or an update), or ``num_probes`` below one.

        Cost: no HVP, or ``num_probes`` of them.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.0]))
            >>> round(hypergrad.nystrom_sketch(a, rank=4).trace(), 4)
            6.5
        """
        if operator is None:
            if self.trace_estimate is None:
                raise SolverOptionError(
                    "this sketch gives no estimate of the trace by itself: its test matrix was "
                    "not drawn uniformly, or the operator is not positive. Pass the operator."
                )
            return self.trace_estimate
        check_option(is_count(num_probes), "num_probes", num_probes, "an integer >= 1")
        system = bare_system(operator, self.layout)
        place = self.layout.device if generator is None else generator.device
        bits = torch.randint(0, 2, (num_probes, self.layout.dim), generator=generator, device=place)
        signs = (2 * bits - 1).to(device=self.basis.device, dtype=self.dtype)
        along = (signs * (system.product(signs) - self._image(signs))).sum(1)
        return float(self.eigenvalues.sum() + along.mean())

    def _image(self, rows: Tensor) -> Tensor:
        """U diag(L) U' times each row."""
        return combined(projected(rows, self.basis) * self.eigenvalues, self.basis)

    def outside(self, rows: Tensor) -> Tensor:
        """Rows of shape (m, n) without their part in the basis."""
        return rows - combined(projected(rows, self.basis), self.basis)

    def update(
        self,
        operator: Any,
        *,
        fresh: int | None = None,
        damping: Damping = "auto",
        generator: torch.Generator | None = None,
    ) -> NystromSketch:
        """A new sketch, of an operator that has moved a little, by one block of products.

        The test matrix is the old basis with its last rows replaced by random ones: one step of
        subspace iteration, whose error is far below that of a fresh random sketch as long as the
        leading eigenvectors have turned by little.  The random rows find what is new.

        Args:
            operator: the new A, on the same trees.
            fresh: how many random rows; None for a tenth of the rank, at least one.  A sketch that
                was complete below its rank keeps all of its basis and gains them.
            damping: what the sketch will be used at; see :func:`hypergrad.nystrom_sketch`.
            generator: of the random rows; None for torch's global one.

        Raises:
            SolverOptionError: ``fresh`` is no integer >= 0, or would leave nothing to sketch with.
            HypergradError: see :func:`hypergrad.nystrom_sketch`.

        Cost: one HVP a row of the test matrix and one to vouch for the largest eigenvalue; as many
        more as :func:`hypergrad.nystrom_sketch` says where there is negative curvature or rounding
        asks for it.

        Examples:
            >>> import torch, hypergrad
            >>> a = torch.diag(torch.logspace(0, -4, 50, dtype=torch.float64))
            >>> old = hypergrad.nystrom_sketch(a, rank=10)
            >>> new = old.update(1.01 * a)
            >>> new.rank, new.error_estimate(1.01 * a).largest < old.error_estimate(a).largest
            (10, True)
        """
        from .sketching import SketchOptions, renewed_sketch  # it makes sketches: of this class

        n = self.layout.dim
        if fresh is None:
            fresh = max(1, self.rank // 10)
        valid = not isinstance(fresh, bool) and isinstance(fresh, int) and fresh >= 0
        check_option(valid, "fresh", fresh, "None or an integer >= 0")
        keep = self.rank
        if self.tail > 0:
            keep = max(self.rank - fresh, (self.rank + 1) // 2)
        fresh = min(fresh, n - keep)
        check_option(keep + fresh > 0, "fresh", fresh, "at least 1, as the old sketch is empty")
        largest = self.eigenvalues.abs().argsort(descending=True)[:keep]
        system = bare_system(operator, self.layout, damping)
        options = SketchOptions(
            rank=keep + fresh,
            generator=generator,
            negative_curvature=self.negative_curvature,
            complement="zero" if self.complement is None else "quadrature",
            any_damping=damping == "auto",
        )
        return renewed_sketch(system, self.basis[largest], fresh, options)

    def preconditioner(self, damping: float) -> LinearOperator:
        """P^-1 = (l + damping) U (L + damping)^-1 U' + (I - U U'), with l the :attr:`tail`.

        Source: Frangella, Tropp, Udell, arXiv 2110.02820, equation (5.3), where l is the last of
        L: the tail, unless the sketch is complete, where A is zero outside and l must be, too.
        Negative L enter by their absolute value, so that it is always positive definite.

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
        self.sketch, self.basis = sketch, sketch.basis
        size = sketch.eigenvalues.abs()
        self.weights = (sketch.tail + damping) / (size + damping)
        # Where the smallest weight is rounding next to one, w - 1 forgets it.
        least = _FEW * torch.finfo(self.weights.dtype).eps
        self.careful = bool((self.weights < least).any())

    def _apply(self, block: Tensor) -> Tensor:
        wide = block.to(self.weights.dtype)
        inside = projected(wide, self.basis)
        if not self.careful:
            return (wide + combined(inside * (self.weights - 1.0), self.basis)).to(block.dtype)
        # Twice: what is left of the basis is rounding, of which r'M r must not be made.
        outside = self.sketch.outside(self.sketch.outside(wide))
        return (outside + combined(inside * self.weights, self.basis)).to(block.dtype)


def bare_system(
    operator: Any, layout: TreeLayout | None = None, damping: Damping = "auto"
) -> DampedSystem:
    """A system with no right-hand side: the operator's products, counted and in working dtype."""
    like = None
    if layout is not None:
        like = layout.unflatten(torch.zeros(layout.dim, dtype=layout.dtype, device=layout.device))
    op = as_operator(operator, like=like)
    dtype = working_dtype(op.dtype, op.device)
    # One zero, seen n times: it takes no memory.
    empty = torch.zeros(1, 1, dtype=dtype, device=op.device).expand(1, op.layout.dim)
    return DampedSystem(op, empty, torch.ones_like(empty[:, 0]), damping)


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
