"""Hessian products: every mode in gradients, the automatic choice against the best, and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import hypergrad

from .memory import peak_bytes, wide_model
from .problems import Params, Problem, classifier, critic
from .timing import seconds, single_threaded

#: Vectors of a block, and the gradients that so many products are worth at least.
VECTORS = 10
FLOOR = 2 * VECTORS
#: Right-hand sides solved together, iterations of CG, and the damping.
MANY = 32
ITERATIONS = 20
DAMPING = 2.0


def convolutional(batch: int = 64, size: int = 16, channels: tuple[int, int] = (16, 32)) -> Problem:
    """Two convolutions with tanh and pooling, and a linear layer of ten classes.

    The soft labels are fitted exactly, as in the other problems.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = channels
    shapes = {
        "first": (first, 1, 3, 3),
        "second": (second, first, 3, 3),
        "last": (10, second * (size // 4) ** 2),
    }
    params: Params = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        params[name] = drawn / drawn[0].numel() ** 0.5
        params[f"{name}_bias"] = torch.zeros(shape[0])

    def model(p: Params, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            x = torch.tanh(F.conv2d(x, p[name], p[f"{name}_bias"], padding=1))
            x = F.avg_pool2d(x, 2)
        return F.linear(x.flatten(1), p["last"], p["last_bias"])

    inputs = torch.randn(batch, 1, size, size, generator=generator)
    return Problem(
        params=params,
        model_fn=model,
        output_loss=F.cross_entropy,
        inputs=inputs,
        targets=torch.softmax(model(params, inputs), dim=1),
        repeats=10,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "critic": critic,
    "classifier": classifier,
    "cnn": convolutional,
}
SMALL_PROBLEMS: dict[str, Callable[[], Problem]] = {
    "critic": partial(critic, 16, 4),
    "classifier": partial(classifier, 4, (5, 3)),
    "cnn": partial(convolutional, 2, 4, (2, 2)),
}

#: The ways by hand, as ``mode`` and ``chunk_size``.
MODES: dict[str, dict[str, Any]] = {
    "reverse, one by one": {"mode": "reverse_over_reverse"},
    "reverse, together": {"mode": "reverse_over_reverse", "chunk_size": "auto"},
    "forward, together": {"mode": "forward_over_reverse", "chunk_size": "auto"},
}


def interleaved(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least time of each, of runs that take turns.

    Each turn has another order: who runs after a large block finds the caches empty.
    """
    for work in works.values():
        work()
    least = dict.fromkeys(works, float("inf"))
    names, generator = list(works), torch.Generator().manual_seed(0)
    for _ in range(repeats):
        for i in torch.randperm(len(names), generator=generator).tolist():
            name = names[i]
            least[name] = min(least[name], seconds(works[name]))
    return least


def _operator(problem: Problem, **options: Any) -> hypergrad.HessianOperator:
    return hypergrad.hessian(
        problem.loss_fn, problem.params, problem.inputs, problem.targets, **options
    )


class _OnProblems:
    params: ClassVar[list[str]] = list(PROBLEMS)
    param_names: ClassVar[list[str]] = ["problem"]
    problems: ClassVar[dict[str, Callable[[], Problem]]] = PROBLEMS
    #: How many blocks ``mode="auto"`` may learn from first.
    warm_up = 100

    def setup(self, name: str) -> None:
        single_threaded()
        self.problem = self.problems[name]()
        operator = _operator(self.problem)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(VECTORS, operator.layout.dim, generator=generator)
        self.block = operator.layout.unflatten_block(rows)

    def times(self, kinds: dict[str, dict[str, Any]]) -> dict[str, float]:
        works: dict[str, Callable[[], object]] = {"gradient": self.problem.gradient}
        for kind, options in kinds.items():
            operator = _operator(self.problem, **options)
            for _ in range(self.warm_up if kind == "auto" else 0):
                operator.matmat(self.block)
            works[kind] = partial(operator.matmat, self.block)
        return interleaved(works, self.problem.repeats)


class TenProducts(_OnProblems):
    """Ten products in one block, over twenty gradients."""

    unit = "products / 20 gradients"

    def _over_floor(self, kinds: dict[str, dict[str, Any]]) -> float:
        times = self.times(kinds)
        return min(times[kind] for kind in kinds) / (FLOOR * times["gradient"])

    def track_one_by_one(self, name: str) -> float:
        return self._over_floor({"one": MODES["reverse, one by one"]})

    def track_together(self, name: str) -> float:
        return self._over_floor({"together": MODES["reverse, together"]})

    def track_forward(self, name: str) -> float:
        return self._over_floor({"forward": MODES["forward, together"]})

    def track_best(self, name: str) -> float:
        return self._over_floor(MODES)

    def track_auto(self, name: str) -> float:
        return self._over_floor({"auto": {}})


class AutomaticMode(_OnProblems):
    """``mode="auto"``, once it has seen some blocks, over the best of the ways by hand."""

    unit = "auto / best"

    def track_auto_over_best(self, name: str) -> float:
        times = self.times({**MODES, "auto": {}})
        return times["auto"] / min(times[kind] for kind in MODES)

    def track_first_sketch(self, name: str) -> float:
        """A rank-10 sketch by an operator nothing is known of, against one of the best mode."""
        from hypergrad.operators.modes import forget_modes

        def sketch(forget: bool = False, **options: Any) -> None:
            if forget:
                forget_modes()
            operator = _operator(self.problem, **options)
            generator = torch.Generator().manual_seed(1)
            hypergrad.nystrom_sketch(operator, VECTORS, generator=generator)

        works: dict[str, Callable[[], object]] = {
            kind: partial(sketch, **options) for kind, options in MODES.items()
        }
        works["auto"] = partial(sketch, forget=True)
        times = interleaved(works, self.problem.repeats)
        return times["auto"] / min(times[kind] for kind in MODES)


class ManyRightHandSides:
    """Thirty-two systems solved in one block, over as many solves in the best mode for one."""

    params: ClassVar[list[str]] = list(MODES)
    param_names: ClassVar[list[str]] = ["mode of the block"]
    problem_of: ClassVar[Callable[[], Problem]] = staticmethod(critic)
    unit = "one block / separate solves in the best mode"
    many = MANY

    def setup(self, mode: str) -> None:
        single_threaded()
        self.problem = type(self).problem_of()
        generator = torch.Generator().manual_seed(1)
        self.operators = {name: _operator(self.problem, **MODES[name]) for name in MODES}
        layout = self.operators[mode].layout
        rows = torch.randn(self.many, layout.dim, generator=generator)
        self.block = layout.unflatten_block(rows)
        self.rows = [layout.unflatten(row) for row in rows]

    def _solve(self, mode: str, v: Params, batched: bool) -> None:
        solver = hypergrad.CG(rtol=0.0, max_iters=ITERATIONS)
        hypergrad.solve(self.operators[mode], v, solver, damping=DAMPING, batched=batched)

    def track_block_over_separate(self, mode: str) -> float:
        def apart(kind: str) -> None:
            for row in self.rows:
                self._solve(kind, row, batched=False)

        works: dict[str, Callable[[], object]] = {
            "reverse": partial(apart, "reverse, one by one"),
            "forward": partial(apart, "forward, together"),
            "block": partial(self._solve, mode, self.block, batched=True),
        }
        times = interleaved(works, repeats=2)
        return times["block"] / min(times["reverse"], times["forward"])


class SketchMemory:
    """What a rank-10 sketch of ten million parameters takes, above the operator."""

    params: ClassVar[list[str]] = ["float32", "float64"]
    param_names: ClassVar[list[str]] = ["dtype"]
    unit = "vectors of the parameters' size"
    timeout = 600
    width = 2200

    def track_peak(self, dtype: str) -> float:
        single_threaded()
        loss, params, x, y = wide_model(self.width, dtype=getattr(torch, dtype))
        operator = hypergrad.hessian(loss, params, x, y)
        size = operator.layout.dim * x.element_size()
        generator = torch.Generator().manual_seed(1)
        work = partial(hypergrad.nystrom_sketch, operator, VECTORS, generator=generator)
        return peak_bytes(work) / size


class ChunkMemory(_OnProblems):
    """What a block of products takes at most, over the cap that its chunks are planned with."""

    unit = "bytes / memory_cap"
    many = 100

    def track_peak_over_cap(self, name: str) -> float:
        known = _operator(self.problem)
        # As documented: three times the parameters and what the graph has saved, a vector.
        one = 3 * (4 * known.layout.dim + known._remembered().footprint.saved)
        cap = 5 * one
        operator = _operator(
            self.problem, mode="reverse_over_reverse", chunk_size="auto", memory_cap=cap
        )
        block = torch.randn(self.many, operator.layout.dim)
        return (peak_bytes(lambda: operator._apply(block)) - 4 * block.numel()) / cap
