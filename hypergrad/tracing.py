"""What looking at a value costs: traced code cannot, and for an accelerator's the host waits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import TracingContext


def compiling() -> bool:
    """Whether this very code is being traced, so that no value can be looked at.

    ``torch.compiler.is_compiling()`` is one flag for all threads: while one of them compiles, which
    can take a minute, it is True in the others, too, which run as ever.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant, which is True in what is traced
        return True
    return torch.compiler.is_compiling() and _traced_here()


def far(tensor: Tensor) -> bool:
    """Whether the host waits for a look at its values: until the device has done all it was given.

    A few operations more, without a branch on them, then cost less.
    """
    return tensor.device.type != "cpu"


def _traced_here() -> bool:
    """Whether this thread runs code on tensors without values."""
    return TracingContext.try_get() is not None or torch._C._len_torch_dispatch_stack() > 0
