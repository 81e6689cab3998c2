"""Nyström: one sketch of A, inverted by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import RankError
from ..operators import as_operator
from ..pytree import Tree, row_norms, working_dtype
from .base import DampedSystem, Outcome, Solver, Status, check_option, is_count
from .sketch import NegativeCurvature, NystromSketch, SketchKind, positive_damping
from .sketching import make_sketch


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
    products.  Where the rounding of the products, amplified by W^+, could be felt in an answer,
    the range of Y becomes the test matrix of a second pass, also at ``rank`` more products.

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

    Cost: k HVPs in one block and one to vouch for the largest eigenvalue; k more if there is
    negative curvature or rounding asks for a second pass (2 k more where both do); O(n k^2)
    operations, three n x k blocks of memory.
    Sources: Hataya and Yamada, AISTATS 2023 (columns); Frangella, Tropp, Udell, arXiv 2110.02820
    (Gaussian, algorithm 2.1); Nakatsukasa and Park, arXiv 2212.01127 (indefinite A).
    """
    op = as_operator(operator, like=like)
    config = Nystrom(rank, sketch, generator, negative_curvature)
    dtype = working_dtype(op.dtype, op.device)
    empty = torch.zeros(1, op.layout.dim, dtype=dtype, device=op.device)
    system = DampedSystem(op, empty, torch.ones_like(empty[:, 0]), "auto")
    return config._sketch_of(system)


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

    Cost: ``rank`` HVPs and one to check the sketch (see :func:`nystrom_sketch` for when ``rank``
    more are spent), one a right-hand side to check the answer.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
        >>> info = hypergrad.solve(a, torch.ones(4), hypergrad.Nystrom(rank=2), damping=0.1).info
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
        good = self.generator is None or isinstance(self.generator, torch.Generator)
        check_option(good, "generator", self.generator, "None or a torch.Generator")

    def _sketch_of(self, system: DampedSystem) -> NystromSketch:
        """The sketch that this configuration makes of a system's operator."""
        return make_sketch(system, self.rank, self.sketch, self.generator, self.negative_curvature)

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if system.damping != "auto":
            positive_damping(system.damping)  # before any product is spent
        sketch = self._sketch_of(system)
        damping = sketch.auto_damping() if system.damping == "auto" else float(system.damping)
        start, residual = system.begin(x0, damping)
        x = start + sketch.solve_block(residual, damping)
        residual = system.residual(x, damping)
        return Outcome(
            x=x,
            residual_norms=row_norms(residual),
            statuses=self._statuses(sketch, system, x, residual, damping),
            iterations=[0] * len(x),
            damping=damping,
            rank=sketch.rank,
            smallest_eigenvalue=sketch.smallest_eigenvalue,
            backward_solver=_Sketched(
                self.rank, self.sketch, self.generator, self.negative_curvature, made=sketch
            ),
        )

    def _statuses(
        self, sketch: NystromSketch, system: DampedSystem, x: Tensor, residual: Tensor, rho: float
    ) -> list[Status]:
        keep = self.negative_curvature == "keep"
        indefinite = keep and sketch.smallest_eigenvalue + rho <= 0
        # x'(A + rho I) x, at no further product: proof of negative curvature that lies outside.
        curvatures = (x * (system.b - residual)).sum(1).tolist()
        norms = row_norms(residual)
        if self.negative_curvature in ("absolute", "clip") and sketch.smallest_eigenvalue < 0:
            # The policy changed the system on purpose: along the basis the answer is exact for
            # the changed one, so only what lies outside can be wrong.
            norms = row_norms(residual - (residual @ sketch.basis.T) @ sketch.basis)
        statuses = []
        for norm, size, along in zip(
            norms.tolist(), system.b_norms.tolist(), curvatures, strict=True
        ):
            if size == 0:
                statuses.append(Status.CONVERGED)
            elif indefinite or (keep and along <= 0):
                statuses.append(Status.NEGATIVE_CURVATURE)
            else:
                statuses.append(Status.FIXED_ITERATIONS if norm < size else Status.STAGNATED)
        return statuses


@dataclass(frozen=True)
class _Sketched(Nystrom):
    """The same configuration with its sketch made: what solves again at no new sketch."""

    made: NystromSketch | None = None

    def _sketch_of(self, system: DampedSystem) -> NystromSketch:
        assert self.made is not None
        return self.made
