"""One solve on flat blocks: from rows to rows, with the reports of what was done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConvergenceError, ConvergenceWarning, DifferentiationError, warn
from ..norms import powers_of_two
from ..operators import LinearOperator
from ..precision import working_dtype
from ..transforms import repeating
from .base import DampedSystem, Outcome, Solution, SolveInfo, Solver, Status, factors
from .options import Damping, check_damping

OnFailure = Literal["raise", "warn", "ignore"]


@dataclass(eq=False)
class BlockSolve:
    """A solve of (A + damping I) x = b for each row b of a block: all of it that is no tensor.

    Attributes:
        operator: A, of the tensors that the caller has.
        solver: the configuration that runs.
        damping: a number or ``"auto"``, where no tensor is passed to :meth:`run`.
        on_failure: what a failed solve does.
        grad_enabled: the caller's grad mode, in which products run (a callable may need it).
        columns: the reports so far, one a right-hand side.
        hvps: how many products each run made, and what attaches the answer to a graph.
        later: where the reports of the solves that derive from this one go.
        origin: for those: the solve whose damping, and prepared solver, they take over.
        transposed: whether the system is that of A'.
    """

    operator: LinearOperator
    solver: Solver
    damping: Damping
    on_failure: OnFailure
    grad_enabled: bool
    columns: list[SolveInfo] = field(default_factory=list)
    hvps: list[int] = field(default_factory=list)
    later: list[SolveInfo] = field(default_factory=list)
    origin: BlockSolve | None = None
    transposed: bool = False
    _next_solver: Solver | None = None
    _used_damping: float | None = None
    _parts: dict[int, BlockSolve] = field(default_factory=dict)

    def run(
        self,
        block: Tensor,
        start: Tensor | None,
        damping: Tensor | None,
        tensors: Sequence[Tensor],
    ) -> Tensor:
        """The answers, shape (m, n), detached; every check that looks at values is made here.

        Args:
            block: the right-hand sides, shape (m, n), in the operator's dtype.
            start: warm starts of the same shape, or None.
            damping: the damping where it is a tensor.
            tensors: those of the operator, with their values.
        """
        solver, number = self.solver, self.damping
        if self.origin is not None:
            solver = self.origin._next_solver or solver
            assert self.origin._used_damping is not None
            number = self.origin._used_damping
        if damping is not None:
            number = check_damping(damping)
        operator = self.operator_of(tensors)
        # Derived solves run in backward passes, where the mode is another.
        quiet = nullcontext() if self.origin is None else repeating()
        with torch.set_grad_enabled(self.grad_enabled), quiet:
            name = "v" if self.origin is None else "the gradient or tangent to solve for"
            values = block.detach()
            # By the largest entry and not by the norm, which may itself overflow.
            # (That of torch.linalg.vector_norm takes ten times as long as these two passes.)
            ends = torch.stack((values.amax(dim=1), values.amin(dim=1))).tolist()
            if not all(math.isfinite(end) for row in ends for end in row):
                operator.layout.check_finite(values, name)
            largest = [max(high, -low) for high, low in zip(*ends, strict=True)]
            rows = values.to(working_dtype(operator.dtype, operator.device))
            scales = rows.new_tensor([_power_of_two(size, rows.dtype) for size in largest])
            copied = rows.dtype is not block.dtype
            scaled = (rows.div_ if copied else rows.div)(factors(scales))
            system = DampedSystem(operator, scaled, scales, number)
            if start is not None:
                start = _finite(operator, start, "x0") / scales[:, None]
            outcome = solver._run(system, start)
            system.look()
            x = system.delivered(outcome.x)
        self._used_damping = outcome.damping
        self._next_solver = outcome.backward_solver or outcome.solver or solver
        columns = reports(outcome, system, self.solver)
        self.columns += columns
        self.hvps.append(system.num_hvps)
        if self.origin is not None:
            info = summary(columns)
            self.later.append(info)
            act_on_failure(Solution(operator.layout.unflatten_block(x), info), self.on_failure)
        return x

    def operator_of(self, tensors: Sequence[Tensor]) -> LinearOperator:
        """The operator of these tensors, transposed where that is what is solved with."""
        own = self.operator._tensors()
        same = all(mine is other for mine, other in zip(own, tensors, strict=True))
        operator = self.operator if same else self.operator._with_tensors(tensors)
        return operator._transposed() if self.transposed else operator

    def following(self, *, adjoint: bool) -> BlockSolve:
        """A solve that a derivative of this one takes: the adjoint's, or a tangent's."""
        ran = self._next_solver or self.solver  # which that of solver="auto" is
        return replace(
            self,
            columns=[],
            hvps=[],
            origin=self,
            transposed=self.transposed ^ (adjoint and not ran.self_adjoint),
            _next_solver=None,
            _used_damping=None,
            _parts={},
        )

    def part(self, i: int) -> BlockSolve:
        """The i-th of several solves with different operators, of which this one consists.

        Each has its own damping and its own sketch, and what follows from it takes those over.
        """
        if i not in self._parts:
            if self.origin is None:
                part = replace(self, _parts={})
            else:
                adjoint = self.transposed != self.origin.transposed
                part = self.origin.part(i).following(adjoint=adjoint)
                part = replace(part, columns=self.columns, hvps=self.hvps)
            self._parts[i] = part
        return self._parts[i]


def _power_of_two(size: float, dtype: torch.dtype) -> float:
    """:func:`hypergrad.norms.powers_of_two` of a number on the host, which a kernel costs more."""
    if size == 0.0:
        return 1.0
    limit = 1000 if dtype == torch.float64 else 120
    return math.ldexp(1.0, min(max(math.frexp(size)[1], -limit), limit))


def _finite(operator: LinearOperator, block: Tensor, name: str) -> Tensor:
    """The rows in the working dtype, detached, after checking that they are finite."""
    block = block.detach()
    operator.layout.check_finite(block, name)
    return block.to(working_dtype(operator.dtype, operator.device))


def traced(
    operator: LinearOperator,
    solver: Solver,
    damping: Damping,
    block: Tensor,
    start: Tensor | None,
    *,
    batched: bool,
) -> tuple[Tensor, SolveInfo]:
    """A solve as pure tensor code: a fixed amount of work, and no look at any value.

    Raises:
        DifferentiationError: something that requires grad; a compiled solve is a constant.
        SolverOptionError: the solver decides on values.
    """
    inputs = [block, *operator._tensors()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise DifferentiationError(
            "a compiled solve has no derivative, but v or a tensor of the operator requires grad. "
            "Solve under torch.no_grad(), with detached tensors, or outside the compiled function."
        )
    dtype = working_dtype(operator.dtype, operator.device)
    rows = block.detach().to(dtype)
    scales = powers_of_two(rows.abs().amax(dim=1))
    system = DampedSystem(operator, rows / scales[:, None], scales, damping)
    if start is not None:
        start = start.detach().to(dtype) / scales[:, None]
    x, norms = solver._run_traced(system, start)
    x = (system.returned(x) * scales[:, None]).to(operator.dtype)
    sizes = torch.where(system.b_norms > 0, system.b_norms, torch.ones_like(system.b_norms))
    iterations = getattr(solver, "max_iters", getattr(solver, "num_terms", 0))

    def report(norm: Any, relative: Any, columns: tuple[SolveInfo, ...] = ()) -> SolveInfo:
        return SolveInfo(
            status=Status.FIXED_ITERATIONS,
            converged=False,
            residual_norm=norm,
            relative_residual=relative,
            iterations=iterations or 0,
            num_hvps=system.num_hvps,
            damping=float(system.damping),
            solver=solver,
            columns=columns,
        )

    relative = norms / sizes
    absolute = norms * scales
    if not batched:
        return x, report(absolute[0], relative[0])
    columns = tuple(report(absolute[i], relative[i]) for i in range(len(x)))
    worst = relative.argmax(0, keepdim=True)
    return x, report(absolute.gather(0, worst)[0], relative.gather(0, worst)[0], columns)


def reports(outcome: Outcome, system: DampedSystem, solver: Solver) -> list[SolveInfo]:
    """One report a right-hand side."""
    figures = torch.stack([outcome.residual_norms, system.b_norms, system.scales])
    residuals, sizes, scales = figures.tolist()  # in one transfer
    columns = []
    for row, status in enumerate(outcome.statuses):
        direction = outcome.directions.get(row)
        columns.append(
            SolveInfo(
                status=status,
                converged=status is Status.CONVERGED,
                residual_norm=residuals[row] * scales[row],
                relative_residual=residuals[row] / (sizes[row] or 1.0),
                iterations=outcome.iterations[row],
                num_hvps=system.num_hvps,
                damping=outcome.damping,
                solver=outcome.solver or solver,
                reason=outcome.reason,
                sketch_hvps=outcome.sketch_hvps,
                rank=outcome.rank,
                smallest_eigenvalue=outcome.smallest_eigenvalue,
                direction=None
                if direction is None
                else system.operator.layout.unflatten(direction.to(system.operator.dtype)),
            )
        )
    return columns


def summary(columns: Sequence[SolveInfo]) -> SolveInfo:
    """The report of a batch: the worst of its columns, with all of them."""
    # Of columns with equal residuals, such as those whose answer is exact, one with v = 0 is
    # CONVERGED without a tolerance, which says nothing of the others.
    worst = max(
        columns, key=lambda info: (info.status.failed, not info.converged, info.relative_residual)
    )
    return replace(
        worst,
        converged=all(info.converged for info in columns),
        iterations=max(info.iterations for info in columns),
        columns=tuple(columns),
    )


def act_on_failure(solution: Solution, on_failure: OnFailure) -> None:
    """Raise or warn, as asked, where a solve failed."""
    info = solution.info
    if not info.status.failed or on_failure == "ignore":
        return
    if on_failure == "raise":
        raise ConvergenceError(info.message, solution)
    # Few digits, so that Python shows the warning once a place and not at each outer step.
    figure = f"relative residual about {info.relative_residual:.0e}"
    warn(f"{type(info.solver).__name__}: {info.status.value} ({figure}).", ConvergenceWarning)
