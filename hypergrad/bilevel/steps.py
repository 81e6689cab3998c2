"""The steps of an inner optimiser: with a graph and without, backwards and forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import LossError, SolverOptionError, UnusedParameterWarning, warn
from ..norms import row_norms
from ..operators.evaluation import generators_of, set_states
from ..operators.layers import Layers, plain_layers
from ..operators.point import check_differentiable, check_loss, report_unused
from ..pytree import Tree
from ..transforms import forward_mode
from .hypergradient import fresh_leaves, layouts, report_unused_outer
from .optimizers import InnerOptimizer

#: Outer coordinates that forward mode carries at a time.
_FORWARD_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Point:
    """Parameters (leaves in the layout's order) and the optimiser's state between two steps."""

    params: list[Tensor]
    state: Any

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Point:
        """The point with every tensor that is differentiated changed."""
        state = torch_pytree.tree_map(lambda x: change(x) if _is_real(x) else x, self.state)
        return Point([change(leaf) for leaf in self.params], state)

    def tensors(self) -> list[Tensor]:
        """What is differentiated, in a fixed order."""
        return self.params + [x for x in torch_pytree.tree_leaves(self.state) if _is_real(x)]


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps from ``first`` to ``last``, with a graph from ``start`` to ``end`` or to be done again.

    ``random`` is the state of PyTorch's generators when the segment was first entered.
    """

    first: int
    last: int
    start: Point
    end: Point
    random: list[Tensor]


class Unrolling:
    """The steps of one problem, with a graph and without; what both directions share."""

    def __init__(
        self,
        inner_loss: Callable[..., Tensor],
        inner_params: Tree,
        outer_params: Tree,
        optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer],
        batches: Sequence[Any] | None,
        num_steps: int,
    ) -> None:
        self.inner_loss, self.optimizer, self.batches = inner_loss, optimizer, batches
        self.num_steps = num_steps
        self.inner_layout, self.outer_layout = layouts(inner_params, outer_params)
        self.inner = fresh_leaves(self.inner_layout, inner_params, "inner_params")
        self.outer = fresh_leaves(self.outer_layout, outer_params, "outer_params")
        check_differentiable(self.inner + self.outer)
        self.gradient_norm = math.nan
        self.tape: list[Segment] = []
        self._reported = False
        self.layers = Layers()

    def start(self) -> Point:
        """w_0 and the optimiser's first state."""
        params = [leaf.detach().clone() for leaf in self.inner]  # whatever a step does to them
        with torch.no_grad():
            state = self._optimizer(self._outer_tree(graph=False)).init(self._tree(params))
        return Point(params, state)

    def advance(self, point: Point, first: int, last: int, *, graph: bool = False) -> Point:
        """The point after the steps ``first`` to ``last`` - 1."""
        outer = self._outer_tree(graph)
        with torch.set_grad_enabled(graph):
            optimizer = self._optimizer(outer)
        for t in range(first, last):
            params = point.params if graph else [x.detach().requires_grad_() for x in point.params]
            with torch.enable_grad(), plain_layers(self.layers):
                loss = check_loss(self._loss(self._tree(params), outer, t), "inner_loss")
                grads = torch.autograd.grad(loss, params, create_graph=graph, allow_unused=True)
            if not self._reported:
                report_unused(self.inner_layout, [g is None for g in grads], "inner_loss")
                self._reported = True
            given = [
                torch.zeros_like(leaf) if grad is None else grad
                for leaf, grad in zip(params, grads, strict=True)
            ]
            if t == self.num_steps - 1:
                flat = self.inner_layout.flatten(self._tree(given))
                self.gradient_norm = float(row_norms(flat[None]))
            with torch.set_grad_enabled(graph):
                point = self._step(optimizer, point, given)
        return point

    def _step(self, optimizer: InnerOptimizer, point: Point, grads: list[Tensor]) -> Point:
        before = [leaf._version for leaf in point.tensors()]
        params, state = optimizer.step(self._tree(point.params), point.state, self._tree(grads))
        if before != [leaf._version for leaf in point.tensors()]:
            raise LossError(
                "optimizer.step modified its arguments in place. It must return new tensors: "
                "write w - lr * g, not w -= lr * g."
            )
        name = "the parameters from optimizer.step"
        return Point(self.inner_layout.leaves(params, name=name), state)

    def record(self, start: Point, first: int, last: int, every: int) -> None:
        """Do all steps, keeping the start of each segment from ``first``, and the last's graph."""
        point = self.advance(start, 0, first)
        for stop in range(first, last, every):
            random = random_state(self.inner_layout.device)
            until = min(stop + every, last)
            if until == last:
                self.tape.append(self._with_graph(point, stop, until, random))
            else:
                end = self.advance(point, stop, until)
                self.tape.append(Segment(stop, until, point, end, random))
                point = end

    def _with_graph(self, point: Point, first: int, last: int, random: list[Tensor]) -> Segment:
        start = point.mapped(lambda x: x.detach().requires_grad_())
        return Segment(first, last, start, self.advance(start, first, last, graph=True), random)

    def backward(self, v: list[Tensor]) -> list[Tensor | None]:
        """<v, dw_T/dy> over the recorded segments, as leaves of y; None where y has no part."""
        total: list[Tensor | None] = [None] * len(self.outer)
        cotangents: list[Tensor | None] = [*v]
        last = len(self.tape) - 1
        for index in range(last, -1, -1):
            segment = self.tape.pop()
            if index < last:
                segment = self._again(segment)
            ends = segment.end.tensors()
            cotangents += [None] * (len(ends) - len(cotangents))
            pairs = [
                (end, cotangent)
                for end, cotangent in zip(ends, cotangents, strict=True)
                if cotangent is not None and end.requires_grad
            ]
            starts = segment.start.tensors()
            found: Sequence[Tensor | None] = (None,) * (len(starts) + len(total))
            if pairs:
                with plain_layers(self.layers):
                    found = torch.autograd.grad(
                        [end for end, _ in pairs],
                        starts + self.outer,
                        grad_outputs=[cotangent for _, cotangent in pairs],
                        allow_unused=True,
                    )
            cotangents = list(found[: len(starts)])
            for i, term in enumerate(found[len(starts) :]):
                so_far = total[i]
                if term is not None:
                    total[i] = term if so_far is None else so_far + term
        return total

    def _again(self, segment: Segment) -> Segment:
        """The segment with its graph; it must end where it ended before."""
        with replayed(segment.random, self.inner_layout.device):
            again = self._with_graph(segment.start, segment.first, segment.last, segment.random)
        flat = [self.inner_layout.flatten(self._tree(p.params)) for p in (segment.end, again.end)]
        way = flat[0] - self.inner_layout.flatten(self._tree(segment.start.params))
        # Kernels may round differently with a graph, never by so much; other draws always do.
        eps = torch.finfo(min(self.inner_layout.dtypes, key=lambda d: -torch.finfo(d).eps)).eps
        gap, way_norm, size = (float(row_norms(x[None])) for x in (flat[1] - flat[0], way, flat[0]))
        if gap > 1e-3 * way_norm + 100 * eps * size:
            raise LossError(
                f"steps {segment.first + 1} to {segment.last} came out differently when they were "
                f"done again: by {gap:.1e} of the {way_norm:.1e} that they went. The losses must "
                "be the same at each call; give random batches as batches=, draw from PyTorch's "
                "global generators, or pass checkpoint_every=num_steps so that nothing is done "
                "again."
            )
        return again

    def forward(self, start: Point, v: list[Tensor]) -> list[Tensor | None]:
        """<v, dw_T/dy> by tangents, some outer entries at a time."""
        device = self.outer_layout.device

        def final(leaves: list[Tensor]) -> list[Tensor]:
            outer = self.outer_layout.unflatten_leaves(leaves)
            optimizer, point = self._optimizer(outer), start
            for t in range(self.num_steps):
                gradient = torch.func.grad(lambda w, t=t: self._loss(w, outer, t).reshape(()))
                grads = self.inner_layout.leaves(gradient(self._tree(point.params)))
                point = self._step(optimizer, point, [_retyped(grad) for grad in grads])
                point = point.mapped(_retyped)
            return point.params

        def along(direction: Tensor) -> Tensor:
            tangent = self.outer_layout.split(direction)
            base = [leaf.detach() for leaf in self.outer]
            moved = torch.func.jvp(final, (base,), (tangent,))[1]
            pieces = [(c * m).sum().to(direction.dtype) for c, m in zip(v, moved, strict=True)]
            return torch.stack(pieces).sum()

        identity = torch.eye(self.outer_layout.dim, dtype=self.outer_layout.dtype, device=device)
        random = random_state(device)

        def in_reverse() -> None:
            with replayed(random, device):
                self._in_reverse(start, v)

        remedy = 'mode="reverse"'
        with (
            plain_layers(self.layers),
            forward_mode("a loss or the optimiser", in_reverse, remedy=remedy),
        ):
            slopes = torch.func.vmap(along, chunk_size=_FORWARD_CHUNK, randomness="same")(identity)
        return list(self.outer_layout.split(slopes.detach()))

    def _in_reverse(self, start: Point, v: list[Tensor]) -> None:
        """Every step once more, each with a graph and a pass back through it."""
        point = start
        for t in range(self.num_steps):
            self.tape.append(self._with_graph(point, t, t + 1, []))
            point = self.tape[-1].end
            self.backward(v)

    def report_unused(self, start: Point, terms: list[Tensor | None], unused: list[bool]) -> None:
        """Warn of outer leaves that nothing uses, and of steps that do not use any."""
        silent = [term is None or not bool(term.any()) for term in terms]
        if any(silent):
            # A zero is no proof: see which leaves the first step's graph reaches.
            first = self._with_graph(start, 0, 1, [])
            ends = [end.sum() for end in first.end.tensors() if end.requires_grad]
            with plain_layers(self.layers):
                reached: Sequence[Tensor | None] = torch.autograd.grad(
                    torch.stack(ends).sum(), self.outer, allow_unused=True
                )
            silent = [no and grad is None for no, grad in zip(silent, reached, strict=True)]
        if all(silent):
            warn(
                "the steps on inner_loss do not depend on outer_params, so the implicit part is "
                "zero.",
                UnusedParameterWarning,
            )
        else:
            both = [no and outer for no, outer in zip(silent, unused, strict=True)]
            report_unused_outer(self.outer_layout, both)

    def _tree(self, leaves: list[Tensor]) -> Tree:
        return self.inner_layout.unflatten_leaves(leaves)

    def _outer_tree(self, graph: bool) -> Tree:
        leaves = self.outer if graph else [leaf.detach() for leaf in self.outer]
        return self.outer_layout.unflatten_leaves(leaves)

    def _loss(self, inner: Tree, outer: Tree, t: int) -> Tensor:
        if self.batches is None:
            return self.inner_loss(inner, outer)
        return self.inner_loss(inner, outer, self.batches[t])

    def _optimizer(self, outer: Tree) -> InnerOptimizer:
        made: Any = self.optimizer
        if not _is_optimizer(made) and callable(made):
            made = made(outer)
        if not _is_optimizer(made):
            raise SolverOptionError(
                f"optimizer is {made!r}, expected hypergrad.SGD(lr=...), hypergrad.Adam(...), an "
                "object with init(params) and step(params, state, grads), or a function of the "
                "outer parameters that returns one. torch.optim's cannot be differentiated."
            )
        optimizer: InnerOptimizer = made
        return optimizer


def _retyped(dual: Tensor) -> Tensor:
    """The same numbers, with the tangent in the tensor's own dtype.

    PyTorch gives a Python number times a float32 tensor without dimension a float64 tangent,
    which the next matrix product refuses; a cast there and back is applied to both.
    """
    return dual if dual.dtype == torch.float64 else dual.to(torch.float64).to(dual.dtype)


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, InnerOptimizer) and not isinstance(thing, type)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the generators that the steps may draw from."""
    return [generator.get_state() for generator in generators_of(device)]


@contextmanager
def replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw what was drawn from ``states`` on, and leave the generators as they are."""
    generators = generators_of(device)
    outside = [generator.get_state() for generator in generators]
    set_states(generators, states)
    try:
        yield
    finally:
        set_states(generators, outside)
