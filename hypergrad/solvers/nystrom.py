"""Nyström: one sketch of A, inverted by construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..errors import RankError, SolverOptionError
from ..norms import row_norms
from ..pytree import Tree
from .base import DampedSystem, Outcome, Solver, Status
from .complement import ComplementKind
from .core import Check
from .embedding import SketchKind
from .narrow import FactoredSketch, NarrowSketch
from .options import check_option, is_count, is_one_of, is_tolerance
from .sketch import NegativeCurvature, NystromSketch, positive_damping
from .sketching import doubted_sketch, make_sketch
from .traced import begin_traced, residual_traced, safe_norms
from .two_block import two_block_sketch

if TYPE_CHECKING:
    from .compiled_nystrom import Answered

#: Relative residual up to which an answer vouches for its sketch.  In 2,400 solves (four indefinite
#: spectra, three dampings, two kinds of v) whose damping did not exceed the negative curvature, it
#: went unseen once where a product with the largest eigenvector showed it; at 0.5, 160 times.
NO_DOUBT = 0.2

#: Named once: torch.compile cannot trace the call.
_CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sketch", get_args(SketchKind)),
    ("negative_curvature", get_args(NegativeCurvature)),
    ("complement", get_args(ComplementKind)),
)


@dataclass(frozen=True)
class Nystrom(Solver):
    """x = (A_nys + damping I)^-1 v with A_nys of rank ``rank``: see :func:`nystrom_sketch`.

    A direct method: its accuracy is that of the rank, there is no tolerance to reach, and the
    status is FIXED_ITERATIONS, with the true residual in the report.  It is STAGNATED when the
    residual is no smaller than v itself, or when an automatic rank ended at its cap, and
    NEGATIVE_CURVATURE when the damping does not exceed the negative curvature that policy
    ``"keep"`` leaves in.

    Outside the sketch's range the answer is a multiple of v: v/damping, or less where the
    complement shows that A is not small there.  So for one right-hand side of a
    moderately conditioned system CG is more accurate at equal HVPs; a sketch earns its place
    through reuse, many right-hand sides, batched products and as a preconditioner.

    With a ``test_matrix`` the work is fixed and runs under ``torch.compile(fullgraph=True)``: Ritz
    pairs on the span of the test matrix and its products, 2 ``rank`` of them, whatever the
    operator's signature.  Compiled and not, it is the same computation.

    Attributes:
        rank: k >= 1, or ``"auto"``.
        sketch: ``"gaussian"``, ``"columns"``, ``"diagonal"`` or ``"structured"``.
        generator: source of the test matrix; None for torch's global one.
        negative_curvature: ``"keep"``, ``"absolute"``, ``"clip"`` or ``"raise"``.
        complement: ``"quadrature"`` or ``"zero"``.
        diagonal: of A, for ``"diagonal"`` draws; None to estimate it.
        tol: for ``"auto"``: the preconditioned condition number is to be at most 1 + tol.
        max_rank: cap of ``"auto"``; None for 256.
        test_matrix: shape (rank, n), linearly independent rows in the flat coordinates of v (its
            leaves in order), drawn by the caller in place of ``sketch`` and ``generator``: what is
            random cannot be drawn in a compiled graph as it is outside.  Needs
            ``complement="zero"``.  None to draw one.
        check: whether products are spent on vouching for the sketch's largest eigenvalue and on
            the true residual of the answer.  With False a solve of a positive operator costs
            ``rank`` products and no more; the answer is the same, the two residuals in the report
            are nan, and a status other than FIXED_ITERATIONS shows what is known without them.
            Leave them in until a setting has proved itself.
            With ``"estimate"`` they are spent only where estimates from the sketch's own products
            do not do: of the residual, by leaving out one row of the test matrix at a time, below
            half of v; of the norm of A, above half of the largest eigenvalue.  A residual as large
            as v passes twice in a hundred, one of twice that size in none of ten thousand
            (measured at rank 10); negative curvature that the core does not show goes unseen.  The
            residuals in the report are then the estimates, within a factor of two of the true ones
            as a rule and for a rank less by one.  That is for Gaussian sketches of fixed rank, of
            a float32 operator, without ``x0``; elsewhere it is as with True.
        compile: whether a solve is one graph of ``torch.compile``: the products, the answer, and
            its residual, while all decisions are those of the eager code.  The test matrix is the
            same, and so is the answer to rounding.  What leaves doubt, such as negative curvature,
            goes on eagerly with the products that are there.  For Gaussian sketches of fixed rank,
            at most a quarter of the dimension and up to 2^22 numbers in a block, of a float32
            operator that ``CG(compile=True)`` takes; elsewhere it is as with False.  Operators of
            the same functions, shapes and dtypes share a graph; compiling takes seconds, which the
            logger ``"hypergrad"`` tells.

    Warns (when solving):
        CompilationWarning: with ``compile``, an operator that is not known to be tensor code, or
            no compiler; the solve is then an eager one.

    Cost: ``rank`` HVPs and one to check the sketch, 5 for the complement where the sketch's last
    eigenvalue exceeds half the damping (see :func:`nystrom_sketch` for when more are spent), one
    a right-hand side to check the answer; with a ``test_matrix`` 2 ``rank`` and that one.  With
    ``check=False`` without the two that check.  Of a float32 operator under policy ``"keep"`` the
    answer's check serves for the sketch's, too, where it leaves a residual below a fifth of v.
    With ``compile`` two more once a graph, which prove it, and the answer's check is one that is
    made too soon where the sketch turns out to need more.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
        >>> info = hypergrad.solve(a, torch.ones(4), hypergrad.Nystrom(rank=3), damping=0.1).info
        >>> info.relative_residual < 1e-5, info.rank, info.num_hvps
        (True, 2, 5)

        As a part of a compiled function (the backend here generates no code):

        >>> def ihvp(v, omega):
        ...     solver = hypergrad.Nystrom(rank=2, test_matrix=omega, complement="zero")
        ...     return hypergrad.solve(a, v, solver, damping=0.1).value
        >>> omega = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        >>> compiled = torch.compile(ihvp, fullgraph=True, backend="eager")
        >>> compiled(torch.ones(4), omega)
        tensor([ 0.1961,  0.9091, 10.0000, 10.0000])
    """

    rank: int | Literal["auto"]
    sketch: SketchKind = "gaussian"
    generator: torch.Generator | None = None
    negative_curvature: NegativeCurvature = "keep"
    complement: ComplementKind = "quadrature"
    # Tensors have no truth value to compare by.
    diagonal: Tree | None = field(default=None, compare=False, repr=False)
    tol: float = 9.0
    max_rank: int | None = None
    test_matrix: Tensor | None = field(default=None, compare=False, repr=False)
    check: Check = True
    compile: bool = False

    default_damping = "auto"

    def __post_init__(self) -> None:
        if not (is_one_of(self.rank, ("auto",)) or is_count(self.rank)):
            raise RankError(f"rank is {self.rank!r}, expected an integer >= 1 or 'auto'.")
        for name, kinds in _CHOICES:
            value = getattr(self, name)
            check_option(is_one_of(value, kinds), name, value, f"one of {kinds}")
        good = self.generator is None or isinstance(self.generator, torch.Generator)
        check_option(good, "generator", self.generator, "None or a torch.Generator")
        unused = self.diagonal is not None and self.sketch != "diagonal"
        check_option(not unused, "sketch", self.sketch, "'diagonal' where a diagonal is given")
        check_option(
            is_tolerance(self.tol) and self.tol > 0, "tol", self.tol, "a finite number > 0"
        )
        good = self.max_rank is None or is_count(self.max_rank)
        check_option(good, "max_rank", self.max_rank, "None or an integer >= 1")
        good = isinstance(self.check, bool) or is_one_of(self.check, ("estimate",))
        check_option(good, "check", self.check, "True, False or 'estimate'")
        check_option(isinstance(self.compile, bool), "compile", self.compile, "True or False")
        if self.test_matrix is not None:
            self._check_test_matrix(self.test_matrix)

    def _check_test_matrix(self, matrix: Tensor) -> None:
        for name, usual in (("complement", "zero"), ("sketch", "gaussian"), ("generator", None)):
            value = getattr(self, name)
            check_option(value == usual, name, value, f"{usual!r} where a test matrix is given")
        is_matrix = isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.is_floating_point()
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else matrix
        fits = is_matrix and matrix.shape[0] == self.rank
        check_option(fits, "test_matrix", got, f"floating-point, of {self.rank!r} (the rank) rows")

    def _sketch_of(self, system: DampedSystem, *, any_damping: bool = False) -> NystromSketch:
        """The sketch that this configuration makes of a system's operator.

        ``any_damping``: to be solved with at others than the system's, too.
        """
        sketch = self._sketch(system, any_damping=any_damping)
        assert isinstance(sketch, NystromSketch)
        return sketch

    def _sketch(
        self,
        system: DampedSystem,
        *,
        any_damping: bool = False,
        once: bool = False,
        drawn: NarrowSketch | None = None,
    ) -> NystromSketch | FactoredSketch:
        """The same; with ``once`` it may come as its factors, for the system's own damping."""
        if self.test_matrix is not None:
            return two_block_sketch(system, self.test_matrix, self.negative_curvature)
        return make_sketch(
            system,
            self.rank,
            self.sketch,
            self.generator,
            self.negative_curvature,
            complement=self.complement,
            diagonal=self.diagonal,
            tol=self.tol,
            max_rank=self.max_rank,
            any_damping=any_damping,
            check=self.check,
            once=once,
            drawn=drawn,
        )

    def _holding(self, sketch: NystromSketch | FactoredSketch) -> Nystrom:
        """The same configuration, which solves with a sketch that is made."""
        holding = object.__new__(_Sketched)  # what was checked once need not be checked again
        holding.__dict__.update(self.__dict__, made=sketch, compile=False)
        return holding

    def _capped(self, sketch: NystromSketch | FactoredSketch) -> bool:
        """Whether an automatic rank ended short of its tolerance."""
        bound = getattr(sketch, "condition_bound", None)
        return bound is not None and bound > 1.0 + self.tol

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if system.damping != "auto":
            positive_damping(system.damping)  # before any product is spent
        if self.compile and x0 is None:
            from .compiled_nystrom import run_compiled  # with parts that take long to import

            found = run_compiled(self, system)
            if found is not None:
                return found
        return self._finished(system, self._sketch(system, once=True), x0)

    def _finished(
        self,
        system: DampedSystem,
        sketch: NystromSketch | FactoredSketch,
        x0: Tensor | None,
        answered: Answered | None = None,
    ) -> Outcome:
        """The answer by a sketch, if there is none yet, and what is to be said of it."""
        damping = self._damping(sketch, system)
        x = self._answer(sketch, system, x0, damping) if answered is None else answered.x
        known = self._estimated(sketch, system, damping) if x0 is None else None
        if answered is not None and answered.statuses is not None:
            assert answered.norms is not None
            norms, statuses = answered.norms, answered.statuses
        elif known is not None:
            norms, statuses = known
        elif self.check:
            residual = None if answered is None else answered.residual
            if residual is None:
                residual = system.residual(x, damping)
            if isinstance(sketch, FactoredSketch) and not sketch.vouched:
                better = self._doubted(sketch, system, x, residual)
                if better is not None:
                    sketch, damping = better, self._damping(better, system)
                    x = self._answer(better, system, x0, damping)
                    residual = system.residual(x, damping)
            norms, statuses = self._judged(sketch, system, x, residual, damping)
        else:
            norms, statuses = self._unchecked(sketch, system, damping)
        return Outcome(
            x=x,
            residual_norms=norms,
            statuses=statuses,
            iterations=[0] * len(x),
            damping=damping,
            rank=sketch.rank,
            smallest_eigenvalue=sketch.smallest_eigenvalue,
            backward_solver=self._holding(sketch),
        )

    def _run_traced(self, system: DampedSystem, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with a given test matrix, whose work depends on no value."""
        if self.test_matrix is None:
            raise SolverOptionError(
                f"{self} draws its test matrix and decides on values as it goes, which "
                "torch.compile cannot trace. Draw one outside the compiled function and pass it: "
                "Nystrom(rank, test_matrix=torch.randn(rank, n), complement='zero')."
            )
        if system.damping == "auto" or self.negative_curvature == "raise":
            raise SolverOptionError(
                "damping='auto' and negative_curvature='raise' look at values, which torch.compile "
                "cannot trace; expected a positive number (info.damping of a solve outside the "
                "compiled function), and another policy."
            )
        damping = positive_damping(system.damping)
        sketch = two_block_sketch(system, self.test_matrix, self.negative_curvature, traced=True)
        start, residual = begin_traced(system, x0, damping)
        x = start + sketch.solve_block(residual, damping)
        return x, safe_norms(residual_traced(system, x, damping))

    @staticmethod
    def _answer(
        sketch: NystromSketch | FactoredSketch,
        system: DampedSystem,
        x0: Tensor | None,
        damping: float,
    ) -> Tensor:
        if x0 is None:
            return sketch.solve_block(system.b, damping)
        start, residual = system.begin(x0, damping)
        return start + sketch.solve_block(residual, damping)

    @staticmethod
    def _damping(sketch: NystromSketch | FactoredSketch, system: DampedSystem) -> float:
        return sketch.auto_damping() if system.damping == "auto" else float(system.damping)

    def _doubted(
        self, sketch: FactoredSketch, system: DampedSystem, x: Tensor, residual: Tensor
    ) -> NystromSketch | None:
        """A sketch that looks at signs, where an answer of this one shows that it should have.

        An eigenvalue that A does not have leaves a residual, or bends the damping (which the
        estimate of |A| sees); of the rest the answers are right as they are.
        """
        along = torch.linalg.vecdot(x, system.b - residual)
        good = (row_norms(residual) <= NO_DOUBT * system.b_norms) & (along > 0)
        if bool((good | (system.b_norms == 0)).all()):
            return None
        return doubted_sketch(system, sketch, self.complement)

    def _indefinite(self, sketch: NystromSketch | FactoredSketch, rho: float) -> bool:
        return self.negative_curvature == "keep" and sketch.smallest_eigenvalue + rho <= 0

    def _estimated(
        self, sketch: NystromSketch | FactoredSketch, system: DampedSystem, rho: float
    ) -> tuple[Tensor, list[Status]] | None:
        """Estimates of the residuals, where they are asked for and leave no doubt."""
        if self.check != "estimate" or not isinstance(sketch, FactoredSketch):
            return None
        estimates, sizes = sketch.residual_estimates(rho), system.b_norms.cpu().numpy()
        if not (estimates <= sketch.clearly_below() * sizes).all():
            return None
        statuses = [Status.FIXED_ITERATIONS if size else Status.CONVERGED for size in sizes]
        return torch.from_numpy(estimates).to(system.b), statuses

    def _unchecked(
        self, sketch: NystromSketch | FactoredSketch, system: DampedSystem, rho: float
    ) -> tuple[Tensor, list[Status]]:
        """What is known of answers without a product with them."""
        zero = system.b_norms == 0
        status = Status.FIXED_ITERATIONS
        if self._indefinite(sketch, rho):
            status = Status.NEGATIVE_CURVATURE
        elif self._capped(sketch):
            status = Status.STAGNATED
        norms = torch.where(zero, 0.0, torch.full_like(system.b_norms, torch.nan))
        return norms, [Status.CONVERGED if none else status for none in zero.tolist()]

    def _judged(
        self,
        sketch: NystromSketch | FactoredSketch,
        system: DampedSystem,
        x: Tensor,
        residual: Tensor,
        rho: float,
    ) -> tuple[Tensor, list[Status]]:
        """The norms of the residuals, and what they say."""
        keep = self.negative_curvature == "keep"
        indefinite = self._indefinite(sketch, rho)
        # x'(A + rho I) x, at no further product: proof of negative curvature that lies outside.
        curvatures = torch.linalg.vecdot(x, system.b - residual).tolist()
        if min(curvatures) <= 0:
            # An answer that underflowed has no product, which proves nothing.
            vanished = (~system.returned(x).any(dim=1)).tolist()
            curvatures = [1.0 if no else c for no, c in zip(vanished, curvatures, strict=True)]
        norms = counted = row_norms(residual)
        changed = self.negative_curvature in ("absolute", "clip")
        if changed and isinstance(sketch, NystromSketch) and sketch.smallest_eigenvalue < 0:
            # The policy changed the system on purpose: along the basis the answer is exact for
            # the changed one, so only what lies outside can be wrong.
            counted = row_norms(sketch.outside(residual))
        statuses = []
        for norm, size, along in zip(
            counted.tolist(), system.b_norms.tolist(), curvatures, strict=True
        ):
            if size == 0:
                statuses.append(Status.CONVERGED)
            elif indefinite or (keep and along <= 0):
                statuses.append(Status.NEGATIVE_CURVATURE)
            else:
                good = norm < size and not self._capped(sketch)
                statuses.append(Status.FIXED_ITERATIONS if good else Status.STAGNATED)
        return norms, statuses


@dataclass(frozen=True)
class _Sketched(Nystrom):
    """The same configuration with its sketch made: what solves again at no new sketch."""

    made: NystromSketch | FactoredSketch | None = None

    def _sketch(
        self,
        system: DampedSystem,
        *,
        any_damping: bool = False,
        once: bool = False,
        drawn: NarrowSketch | None = None,
    ) -> NystromSketch | FactoredSketch:
        assert self.made is not None
        return self.made
