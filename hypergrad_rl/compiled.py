"""``torch.compile`` for the minibatch updates: when it is used, and what if it cannot be."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.exc import InductorError

from hypergrad_rl.config import AgentConfig

#: Gradient steps of a training above which ``compile="auto"`` compiles.  Compiling takes about a
#: minute and saves 0.5 to 2 ms of each step: see docs/rl.md for the figures.
WORTH_COMPILING = 50_000


def backend_of(config: AgentConfig) -> str | None:
    """The backend of ``torch.compile`` that a training with ``config`` uses, or None for eager."""
    wanted = config.compile
    if wanted == "auto":
        wanted = config.gradient_steps >= WORTH_COMPILING
    return "inductor" if wanted else None


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
            # Agents of one process are no reason to give up on any of them (torch >= 2.13).
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
                options["isolate_recompiles"] = True
            self.run = torch.compile(function, **options)

    def __call__(self, *inputs: Any) -> Any:
        """The results of ``function(*inputs)``, as constants."""
        with torch.no_grad():
            if self.run is self.function:
                return self.function(*inputs)
            try:
                return self.run(*inputs)
            except InductorError as error:
                reason = str(error.inner_exception).strip().split("\n")[0]
                warnings.warn(
                    f"torch.compile failed ({type(error.inner_exception).__name__}: {reason}), so "
                    "updates run uncompiled, with equal results but slower; install a C++ "
                    "compiler, or pass compile=False to go without",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.run = self.function
                return self.function(*inputs)
