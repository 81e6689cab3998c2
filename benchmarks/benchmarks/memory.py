"""How much memory products and a sketch take, in vectors of the parameters' size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .problems import Params


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made since it was entered have held at once.

    Counted are the storages of what PyTorch's operations return, while anything keeps them; not
    the workspace inside an operation.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self.now: int = 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {x.untyped_storage().data_ptr() for x in _stored((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _stored(result):
            self._count(tensor.untyped_storage(), before)
        return result

    def _count(self, storage: Any, before: set[int]) -> None:
        if storage in self._alive or storage.data_ptr() in before:
            return  # a view, or an operation in place
        self._alive.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def _stored(tree: Any) -> list[Tensor]:
    """The tensors in a tree that have memory; those that stand for zeros have none."""
    leaves = [x for x in torch_pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    return [x for x in leaves if not x._is_zerotensor()]


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes of tensors that ``work`` makes, at most at once."""
    memory = PeakMemory()
    with memory:
        kept = work()
        del kept
    return memory.peak


def wide_model(
    width: int = 2200, batch: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Params, Tensor, Tensor], Tensor], Params, Tensor, Tensor]:
    """A loss, ten million parameters in two square layers and a head, and a small batch.

    The targets are what the model says, so that the Hessian has no negative part.
    """
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
        return drawn.div(columns**0.5).to(dtype)

    params = {
        "first": weight(width, width),
        "second": weight(width, width),
        "last": weight(9, width),
    }

    def outputs(p: Params, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ p["first"].T) @ p["second"].T) @ p["last"].T

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (outputs(p, x) - y).square().sum(1).mean()

    x = torch.randn(batch, width, generator=generator, dtype=torch.float32).to(dtype)
    return loss_fn, params, x, outputs(params, x)
