"""Graphs for PyTorch's compiler, run as they are told to it."""

from __future__ import annotations

from typing import Any

import torch


class Told(torch.fx.Interpreter):
    """What the compiler goes by, ``meta``, is what a node gives."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            told = n.meta["val"]
            assert (told.shape, told.stride(), told.dtype) == (
                result.shape, result.stride(), result.dtype,
            )  # fmt: skip
        return result
