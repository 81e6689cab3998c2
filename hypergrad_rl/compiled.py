"""``torch.compile`` for the minibatch updates: when it is used, and what if it cannot be."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from hypergrad_rl.config import AgentConfig
from hypergrad_rl.graph_cache import Graph, graph_of, signature_of, traced

try:
    from torch._higher_order_ops.scan import scan

    FOLDS = True
except ImportError:  # a PyTorch without it: what would be one graph is a loop over smaller ones
    FOLDS = False

logger = logging.getLogger(__name__)
#: Gradients of a training from which on ``compile="auto"`` compiles: it saves 0.6 to 0.8 ms of each
#: (docs/rl.md has the figures) and takes up to a minute, where the cache has nothing of it yet.
WORTH_COMPILING = 75_000


def backend_of(config: AgentConfig) -> str | None:
    """The backend of ``torch.compile`` that a training with ``config`` uses, or None for eager."""
    wanted = config.compile
    if wanted == "auto":
        wanted = config.gradient_steps >= WORTH_COMPILING
    return "inductor" if wanted else None


class Compiled:
    """``function`` as one compiled graph; eagerly, after one warning, where no compiler works.

    ``function`` must be pure and keep the structure of its inputs. With backend None it is simply
    called. ``baked`` is all that it holds and a graph would contain, besides the code of this
    package: other processes find the graph by it (:mod:`~hypergrad_rl.graph_cache`); None where
    that cannot be said.
    """

    def __init__(
        self, function: Callable[..., Any], backend: str | None, baked: Any = None
    ) -> None:
        self.function, self.backend = function, backend
        self.baked = baked if backend == "inductor" else None
        #: Whether something was compiled here, and not loaded.
        self.compiled_here = False
        self.graphs: dict[tuple[Any, ...], Graph | None] = {}
        self.run: Callable[..., Any] | None = None

    @property
    def compiles(self) -> bool:
        """Whether calls run a graph."""
        return self.backend is not None

    def __call__(self, *inputs: Any) -> Any:
        """The results of ``function(*inputs)``, as constants."""
        with torch.no_grad():
            if self.backend is None:
                return self.function(*inputs)
            if self.baked is not None:
                leaves = tree_flatten(inputs)[0]
                graph = self._graph(inputs, leaves)
                if graph is not None:
                    return graph(leaves)
            return self._by_torch(inputs)

    def _graph(self, inputs: tuple[Any, ...], leaves: list[Any]) -> Graph | None:
        """The graph for inputs like these; None where there is none that could be kept."""
        try:
            signature = signature_of(leaves)
            if signature not in self.graphs:
                self.graphs[signature] = None
                graph, loaded = graph_of(self.function, self.baked, inputs, signature)
                self.graphs[signature] = graph
                self.compiled_here |= not loaded
            return self.graphs[signature]
        except Exception as error:  # PyTorch's compiler has many ways to fail
            logger.debug("%s is compiled by torch.compile: %r", self.function, error)
            return None

    def _by_torch(self, inputs: tuple[Any, ...]) -> Any:
        """The results by ``torch.compile``, whose graphs live in this process alone."""
        from torch._dynamo.exc import TorchDynamoException  # a second to import

        try:
            from torch._inductor.exc import InductorError
        except ImportError:  # before PyTorch 2.7 its errors are of the former kind
            InductorError = TorchDynamoException  # type: ignore[misc,assignment]
        from hypergrad_rl.graph_passes import inductor_options

        if self.run is None:
            options = {}
            if self.backend == "inductor":  # calls of kernels in C++ cost less than in Python
                options["options"] = {"cpp_wrapper": True, **inductor_options()}
            self.run = traced(self.function, self.backend, **options)
            self.compiled_here = True
        try:
            return self.run(*inputs)
        except (InductorError, TorchDynamoException) as error:
            # No compiler that works; a network of one's own that is no graph.
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().split("\n")[0]
            warnings.warn(
                f"torch.compile failed ({type(cause).__name__}: {reason}), so "
                "updates run uncompiled, with equal results but slower; a C++ compiler is "
                "needed, and networks without branches on values; compile=False goes without",
                RuntimeWarning,
                stacklevel=3,
            )
            self.backend = None
            return self.function(*inputs)


def compiled_here(owner: object) -> bool:
    """Whether a graph of an agent or a collector was compiled in this process, and not loaded."""
    return any(part.compiled_here for part in vars(owner).values() if isinstance(part, Compiled))


def fold(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    rows: tuple[Any, ...],
    unroll: int = 1,
) -> Any:
    """``carry, result = body(carry, row)`` over ``rows``; the last carry, the results stacked.

    In a compiled graph the body is there once (a scan), or ``unroll`` times if the rows are a
    multiple of that; outside of one it is a loop. ``rows`` are tensors, or outside of graphs lists,
    of one length; the row that the body gets is a tuple. Carries and results are trees of tensors.
    """
    if not torch.compiler.is_compiling():
        return _loop(body, carry, rows)
    count = unroll if len(rows[0]) % unroll == 0 else 1

    def apart(carry: Any, rows: Any) -> tuple[Any, Any]:
        # A scan's outputs may share no memory with one another, nor with its inputs.
        after: tuple[Any, Any] = tree_map(torch.clone, _loop(body, carry, rows))
        return after

    carry, results = scan(apart, carry, tuple(x.unflatten(0, (-1, count)) for x in rows))
    return carry, tree_map(lambda x: x.flatten(0, 1), results)


def _loop(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any) -> tuple[Any, Any]:
    results = []
    for row in zip(*rows, strict=True):
        carry, result = body(carry, row)
        results.append(result)
    return carry, tree_map(lambda *parts: torch.stack(parts), *results)
