"""``torch.compile`` for the minibatch updates: when it is used, and what if it cannot be."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hypergrad_rl.config import AgentConfig

try:
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._higher_order_ops.scan import scan
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    FOLDS = True
except ImportError:  # a PyTorch without it: what would be one graph is a loop over smaller ones
    FOLDS = False
    CustomGraphPass = object  # type: ignore[assignment,misc]

#: Gradients of a training from which on ``compile="auto"`` compiles: it saves 0.6 to 0.8 ms of each
#: (docs/rl.md has the figures) and takes up to a minute, where the cache has nothing of it yet.
WORTH_COMPILING = 75_000


def backend_of(config: AgentConfig) -> str | None:
    """The backend of ``torch.compile`` that a training with ``config`` uses, or None for eager."""
    wanted = config.compile
    if wanted == "auto":
        wanted = config.gradient_steps >= WORTH_COMPILING
    return "inductor" if wanted else None


def _not_of_shims(record: logging.LogRecord) -> bool:
    """Drops what PyTorch logs of decompositions that graphs call through Python: no news here."""
    return "missing a c-shim" not in record.getMessage()


class _Once(CustomGraphPass):
    """What a graph, or the body of a loop in it, would compute twice it computes once.

    PyTorch 2.13 sees to that in graphs with a backward pass only. Here one pass of a network
    serves several derivatives.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        module.graph = fx_graph_cse(graph)

    def uuid(self) -> bytes:
        """What PyTorch's cache of compiled graphs knows this pass by."""
        code: bytes = get_hash_for_files((__file__,))
        return code


class Compiled:
    """``function`` as one compiled graph; eagerly, after one warning, where no compiler works.

    ``function`` must be pure and keep the shapes of its inputs over the calls. With backend None
    it is simply called.
    """

    def __init__(self, function: Callable[..., Any], backend: str | None) -> None:
        self.function, self.run = function, function
        if backend is not None:
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
            if backend == "inductor":  # calls of kernels in C++ cost less than in Python
                options["options"] = {"cpp_wrapper": True}
                if FOLDS:
                    options["options"]["post_grad_custom_pre_pass"] = _Once()
            # Agents of one process are no reason to give up on any of them (torch >= 2.13).
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
                options["isolate_recompiles"] = True
            self.run = torch.compile(function, **options)
            logging.getLogger("torch._inductor.ir").addFilter(_not_of_shims)
            from torch._dynamo.exc import TorchDynamoException
            from torch._inductor.exc import InductorError  # half a second to import

            # No compiler that works; a network of one's own that is no graph.
            self.failures: tuple[type[Exception], ...] = (InductorError, TorchDynamoException)

    @property
    def compiles(self) -> bool:
        """Whether calls run a graph."""
        return self.run is not self.function

    def __call__(self, *inputs: Any) -> Any:
        """The results of ``function(*inputs)``, as constants."""
        with torch.no_grad():
            if not self.compiles:
                return self.function(*inputs)
            try:
                return self.run(*inputs)
            except self.failures as error:
                cause = getattr(error, "inner_exception", error)
                reason = str(cause).strip().split("\n")[0]
                warnings.warn(
                    f"torch.compile failed ({type(cause).__name__}: {reason}), so "
                    "updates run uncompiled, with equal results but slower; a C++ compiler is "
                    "needed, and networks without branches on values; compile=False goes without",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.run = self.function
                return self.function(*inputs)


def fold(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: tuple[Any, ...]) -> Any:
    """``carry, result = body(carry, row)`` over ``rows``; the last carry, the results stacked.

    In a compiled graph the body is there once (a scan), outside of one it is a loop. ``rows`` are
    tensors, or outside of graphs lists, of one length; the row that the body gets is a tuple.
    Carries and results are trees of tensors.
    """
    if torch.compiler.is_compiling():

        def apart(carry: Any, row: Any) -> tuple[Any, Any]:
            # A scan's outputs may share no memory with one another, nor with its inputs.
            after: tuple[Any, Any] = tree_map(torch.clone, body(carry, row))
            return after

        return scan(apart, carry, rows)
    results = []
    for row in zip(*rows, strict=True):
        carry, result = body(carry, row)
        results.append(result)
    return carry, tree_map(lambda *parts: torch.stack(parts), *results)
