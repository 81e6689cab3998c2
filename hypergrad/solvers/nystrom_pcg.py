"""Conjugate gradients, preconditioned with a Nyström sketch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from .base import DampedSystem, Outcome, Solver
from .cg import run_cg
from .krylov import check_krylov_options
from .nystrom import Nystrom
from .sketch import NystromSketch, SketchKind, positive_damping


@dataclass(frozen=True)
class NystromPCG(Solver):
    """CG on (A + damping I) x = v with a sketch of A as preconditioner.

    The sketch takes the large eigenvalues out of the condition number: with l its smallest
    eigenvalue and E = A - A_nys what it missed, that of the preconditioned system is at most
    (l + damping + |E|) / damping.  So a rank near the effective dimension
    sum_i lambda_i / (lambda_i + damping) makes the number of iterations a small constant, where
    plain CG needs the root of |A| / damping.  Everything else is as with :class:`hypergrad.CG`:
    tolerances on the true residual, negative curvature reported, many right-hand sides in one
    recurrence, which share the sketch.

    Attributes:
        rank: size of the sketch, >= 1, or ``"auto"``: see :func:`hypergrad.nystrom_sketch`.
        rtol: tolerance relative to |v|.
        atol: absolute tolerance.  With ``rtol=0, atol=0`` exactly ``max_iters`` iterations.
        max_iters: iteration budget; None for 10,000.
        sketch: kind of the sketch, see :func:`hypergrad.nystrom_sketch`.
        generator: source of the test matrix; None for torch's global one.

    Raises (when solving):
        RankError: rank above the dimension.
        DampingError: damping is not positive.
        NotSymmetricError: products show an operator that is not symmetric.

    Cost: the products of the sketch (see :func:`hypergrad.nystrom_sketch`), then one HVP an
    iteration, one a check of the true residual; O(n rank) operations an iteration besides.
    Source: Frangella, Tropp and Udell, arXiv 2110.02820, section 5.

    Examples:
        >>> import torch, hypergrad
        >>> a = torch.diag(torch.logspace(0, -6, 300, dtype=torch.float64))
        >>> v = torch.ones(300, dtype=torch.float64)
        >>> solver = hypergrad.NystromPCG(rank=250, generator=torch.Generator().manual_seed(0))
        >>> info = hypergrad.solve(a, v, solver, damping=1e-6).info
        >>> plain = hypergrad.solve(a, v, hypergrad.CG(), damping=1e-6).info
        >>> info.converged, info.iterations < 0.1 * plain.iterations
        (True, True)
    """

    rank: int | Literal["auto"]
    rtol: float = 1e-5
    atol: float = 0.0
    max_iters: int | None = None
    sketch: SketchKind = "gaussian"
    generator: torch.Generator | None = None

    default_damping = "auto"

    def __post_init__(self) -> None:
        check_krylov_options(self.rtol, self.atol, self.max_iters)
        self._nystrom()

    def _nystrom(self) -> Nystrom:
        """The sketch's own configuration, which checks its part of the options."""
        return Nystrom(self.rank, self.sketch, self.generator, complement="zero")

    def _run(self, system: DampedSystem, x0: Tensor | None) -> Outcome:
        if system.damping != "auto":
            positive_damping(system.damping)  # before any product is spent
        sketch = self._sketch_of(system)
        if system.damping == "auto":
            system.damping = sketch.auto_damping()
        # Its blocks are flat in the working dtype; narrowing them would cost the digits.
        precondition = sketch.preconditioner(float(system.damping))._apply
        outcome = run_cg(self, system, x0, precondition)
        return replace(
            outcome,
            rank=sketch.rank,
            smallest_eigenvalue=sketch.smallest_eigenvalue,
            backward_solver=self._holding(sketch),
        )

    def _sketch_of(self, system: DampedSystem) -> NystromSketch:
        return self._nystrom()._sketch_of(system)

    def _holding(self, sketch: NystromSketch) -> NystromPCG:
        """The same configuration, which solves with a sketch that is made."""
        options = {field.name: getattr(self, field.name) for field in fields(NystromPCG)}
        return _Sketched(**options, made=sketch)


@dataclass(frozen=True)
class _Sketched(NystromPCG):
    """The same configuration with its sketch made: what solves again at no new sketch."""

    made: NystromSketch | None = None

    def _sketch_of(self, system: DampedSystem) -> NystromSketch:
        assert self.made is not None
        return self.made
