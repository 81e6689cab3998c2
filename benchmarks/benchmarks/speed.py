"""How fast: each solver against its own products, each product against a gradient.

``track_*`` give ratios, which carry from machine to machine; ``time_*`` give seconds, which
do not.  All run on one thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

import hypergrad

from .problems import PROBLEMS, Params, Problem
from .timing import clock, ratio, single_threaded

RANK = 10
CG_ITERATIONS = 20
#: Small enough that CG is still at work in its last iteration: past convergence the directions
#: shrink to numbers that float32 holds as subnormals, which processors multiply slowly.
DAMPING = 1e-2

HVP = Callable[[Params], Params]


def nystrom(hvp: HVP, v: Params) -> Params:
    """``RANK`` products, one that checks the sketch and one that checks the answer."""
    # Twice the products where the sketch meets negative curvature; this one must not.
    x, info = hypergrad.nystrom_ihvp(
        hvp, v, rank=RANK, generator=torch.Generator().manual_seed(0), return_info=True
    )
    if info.num_hvps not in (RANK + 1, RANK + 2):  # the answer's check may serve for the sketch
        raise RuntimeError(
            f"Nyström took {info.num_hvps} products, expected {RANK + 1} or one more"
        )
    answer: Params = x
    return answer


def cg(hvp: HVP, v: Params) -> Params:
    """Exactly ``CG_ITERATIONS`` products and one that checks the answer."""
    solver = hypergrad.CG(rtol=0.0, max_iters=CG_ITERATIONS)
    solution = hypergrad.solve(hvp, v, solver, damping=DAMPING, on_failure="raise")
    if solution.info.iterations != CG_ITERATIONS:
        raise RuntimeError(f"CG stopped after {solution.info.iterations} iterations")
    answer: Params = solution.value
    return answer


def repeated(hvp: HVP, v: Params, count: int) -> None:
    for _ in range(count):
        hvp(v)


class _OnProblems:
    """asv calls ``setup`` with one value of ``params`` before each benchmark."""

    params: ClassVar[list[list[str]]] = [list(PROBLEMS)]
    param_names: ClassVar[list[str]] = ["problem"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS

    def setup(self, name: str) -> None:
        single_threaded()
        self.problem = self.problems[name]()
        self.v = self.problem.right_hand_side()
        self.hvp = self.problem.hvp_fn()
        self.hvp(self.v)


class SolverRatios(_OnProblems):
    """A solve against as many bare calls of the same ``hvp_fn`` as the method is made of."""

    unit = "solve / its products"

    def track_nystrom_over_products(self, name: str) -> float:
        return ratio(
            lambda: nystrom(self.hvp, self.v),
            lambda: repeated(self.hvp, self.v, RANK),
            self.problem.repeats,
        )

    def track_cg_over_products(self, name: str) -> float:
        return ratio(
            lambda: cg(self.hvp, self.v),
            lambda: repeated(self.hvp, self.v, CG_ITERATIONS),
            self.problem.repeats,
        )


class OneGraph:
    """A solve with ``compile=True`` against the same solve without, on the Hessian of a problem.

    Twenty iterations or terms, or rank ten, and the check; compiling is not in it.
    """

    solvers: ClassVar[dict[str, Callable[[bool], hypergrad.Solver]]] = {
        "CG": lambda compile: hypergrad.CG(rtol=0.0, max_iters=CG_ITERATIONS, compile=compile),
        "MINRES": lambda compile: hypergrad.MINRES(
            rtol=0.0, max_iters=CG_ITERATIONS, compile=compile
        ),
        "GMRES": lambda compile: hypergrad.GMRES(
            rtol=0.0, max_iters=CG_ITERATIONS, compile=compile
        ),
        "Neumann": lambda compile: hypergrad.Neumann(CG_ITERATIONS, compile=compile),
        "Nystrom": lambda compile: hypergrad.Nystrom(
            RANK, generator=torch.Generator().manual_seed(0), compile=compile
        ),
    }
    params: ClassVar[list[list[str]]] = [["critic", "logistic"], list(solvers)]
    param_names: ClassVar[list[str]] = ["problem", "solver"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS
    unit = "compiled / eager"

    def setup(self, name: str, solver: str) -> None:
        single_threaded()
        self.problem = self.problems[name]()
        problem = self.problem
        self.operator = hypergrad.hessian(
            problem.loss_fn, problem.params, problem.inputs, problem.targets
        )
        self.v = problem.right_hand_side()

    def solve(self, solver: str, compile: bool) -> hypergrad.Solution:
        config = self.solvers[solver](compile)
        damping: float | Literal["auto"] = "auto" if solver == "Nystrom" else DAMPING
        with warnings.catch_warnings():
            warnings.simplefilter("error", hypergrad.CompilationWarning)  # that it ran eagerly
            return hypergrad.solve(
                self.operator, self.v, config, damping=damping, on_failure="raise"
            )

    def track_compiled_over_eager(self, name: str, solver: str) -> float:
        return ratio(
            lambda: self.solve(solver, True),
            lambda: self.solve(solver, False),
            self.problem.repeats,
        )


class MixedPrecision:
    """A compiled solve in float64 to ``RTOL``, its products in float32, against one without.

    The residuals are kept orthogonal in both; compiling is not in it.
    """

    RTOL = 1e-8
    params: ClassVar[list[str]] = ["critic", "logistic"]
    param_names: ClassVar[list[str]] = ["problem"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS
    unit = "float32 / float64"

    def setup(self, name: str) -> None:
        single_threaded()
        self.problem = self.problems[name]().in_float64()
        problem = self.problem
        # The Gauss-Newton matrix has no negative curvature, which CG would stop at.
        self.operator = hypergrad.ggn(
            problem.model_fn, problem.output_loss, problem.params, problem.inputs, problem.targets
        )
        self.v = problem.right_hand_side()

    def solve(self, mixed: bool) -> hypergrad.Solution:
        solver = hypergrad.CG(
            rtol=self.RTOL, compile=True, reorthogonalize=True, mixed_precision=mixed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", hypergrad.CompilationWarning)  # that it ran eagerly
            return hypergrad.solve(
                self.operator, self.v, solver, damping=DAMPING, on_failure="raise"
            )

    def track_mixed_over_float64(self, name: str) -> float:
        return ratio(lambda: self.solve(True), lambda: self.solve(False), self.problem.repeats)


class ProductRatios:
    """Products in gradients; the operator is made beforehand, except in ``track_making``."""

    kinds = ("reverse_over_reverse", "forward_over_reverse", "ggn")
    params: ClassVar[list[list[str]]] = [list(PROBLEMS), list(kinds)]
    param_names: ClassVar[list[str]] = ["problem", "kind"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS
    unit = "gradients"

    def setup(self, name: str, kind: str) -> None:
        single_threaded()
        self.problem = self.problems[name]()
        self.kind = kind
        self.operator = self.make()
        self.v = self.problem.right_hand_side()
        self.block = {key: torch.stack([leaf] * RANK) for key, leaf in self.v.items()}

    def make(self) -> hypergrad.LinearOperator:
        problem = self.problem
        batch = (problem.inputs, problem.targets)
        if self.kind == "ggn":
            return hypergrad.ggn(problem.model_fn, problem.output_loss, problem.params, *batch)
        if self.kind == "reverse_over_reverse":
            return hypergrad.hessian(
                problem.loss_fn, problem.params, *batch, mode="reverse_over_reverse"
            )
        return hypergrad.hessian(
            problem.loss_fn, problem.params, *batch, mode="forward_over_reverse"
        )

    def _in_gradients(self, work: Callable[[], object]) -> float:
        return ratio(work, self.problem.gradient, self.problem.repeats)

    def track_making(self, name: str, kind: str) -> float:
        return self._in_gradients(self.make)

    def track_one_product(self, name: str, kind: str) -> float:
        return self._in_gradients(lambda: self.operator.matvec(self.v))

    def track_ten_products(self, name: str, kind: str) -> float:
        return self._in_gradients(lambda: self.operator.matmat(self.block))


class ManyRightHandSides:
    """Thirty-two right-hand sides in one recurrence against as many separate solves.

    The operator is the same in both.  What a block saves is the overhead of its products: most of
    forward mode, and of reverse mode where the data are few; products that are all arithmetic
    cost as much together as one by one.
    """

    modes = ("reverse_over_reverse", "forward_over_reverse")
    solvers: ClassVar[dict[str, hypergrad.Solver]] = {
        "cg": hypergrad.CG(rtol=0.0, max_iters=CG_ITERATIONS),
        "minres": hypergrad.MINRES(rtol=0.0, max_iters=CG_ITERATIONS),
    }
    params: ClassVar[list[list[str]]] = [list(solvers), list(modes)]
    param_names: ClassVar[list[str]] = ["solver", "mode"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS
    many = 32
    unit = "one block / separate solves"

    def setup(self, solver: str, mode: Literal["reverse_over_reverse"]) -> None:
        single_threaded()
        self.problem = self.problems["critic"]()
        self.solver = self.solvers[solver]
        self.operator = hypergrad.hessian(
            self.problem.loss_fn,
            self.problem.params,
            self.problem.inputs,
            self.problem.targets,
            mode=mode,
        )
        generator = torch.Generator().manual_seed(1)
        self.block = {
            name: torch.randn(self.many, *leaf.shape, generator=generator)
            for name, leaf in self.problem.params.items()
        }

    def together(self) -> Params:
        solution = hypergrad.solve(
            self.operator,
            self.block,
            self.solver,
            damping=DAMPING,
            batched=True,
            on_failure="raise",
        )
        answer: Params = solution.value
        return answer

    def apart(self) -> list[Params]:
        rows = [{name: leaf[i] for name, leaf in self.block.items()} for i in range(self.many)]
        return [
            hypergrad.solve(
                self.operator, row, self.solver, damping=DAMPING, on_failure="raise"
            ).value
            for row in rows
        ]

    def track_block_over_separate(self, solver: str, mode: str) -> float:
        return ratio(self.together, self.apart, repeats=2)


class Seconds(_OnProblems):
    """The same pieces in seconds of processor time."""

    timer = staticmethod(clock)

    def time_gradient(self, name: str) -> None:
        self.problem.gradient()

    def time_product(self, name: str) -> None:
        self.hvp(self.v)

    def time_nystrom(self, name: str) -> None:
        nystrom(self.hvp, self.v)

    def time_cg(self, name: str) -> None:
        cg(self.hvp, self.v)


class OwnSeconds:
    """What the solvers themselves take: the products here are one multiplication an entry."""

    params: ClassVar[list[list[int]]] = [[1_000, 10_000, 100_000, 1_000_000]]
    param_names: ClassVar[list[str]] = ["dimension"]

    def setup(self, dim: int) -> None:
        single_threaded()
        diagonal = torch.linspace(0.1, 1.0, dim)
        self.hvp: Callable[[Tensor], Tensor] = lambda v: diagonal * v
        self.v = torch.ones(dim)

    def time_nystrom(self, dim: int) -> None:
        hypergrad.nystrom_ihvp(self.hvp, self.v, rank=RANK)

    def time_cg(self, dim: int) -> None:
        solver = hypergrad.CG(rtol=0.0, max_iters=CG_ITERATIONS)
        hypergrad.solve(self.hvp, self.v, solver)

    def time_products(self, dim: int) -> None:
        for _ in range(RANK):
            self.hvp(self.v)
