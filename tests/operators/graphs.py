"""Graphs for PyTorch's compiler, run as they are told to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as torch_pytree


class Told(torch.fx.Interpreter):
    """What the compiler goes by, ``meta``, is what a node gives."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            both = (torch_pytree.tree_leaves(x) for x in (n.meta["val"], result))
            for told, found in zip(*both, strict=True):
                if isinstance(found, torch.Tensor):
                    assert (told.shape, told.dtype) == (found.shape, found.dtype)
                    assert _steps(told) == _steps(found)
        return result


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides, but for dimensions in which there is nowhere to go."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1]
