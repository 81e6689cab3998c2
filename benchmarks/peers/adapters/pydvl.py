"""pyDVL: the operators behind its CG, LiSSA, Nyström and Arnoldi influence functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from pydvl.influence.torch.base import TensorOperator
from pydvl.influence.torch.functional import (
    operator_nystroem_approximation,
    operator_spectral_approximation,
)
from pydvl.influence.torch.operator import CgOperator, LissaOperator, LowRankOperator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "pyDVL"
#: The rank of its Arnoldi influence when none is named; its Nyström names none.
DEFAULT_RANK = 10


class _Operator(TensorOperator):  # type: ignore[misc]  # the package is not installed here
    """A as one of the package's operators: rows are vectors."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.product, self.like = torch_product(task.product), torch.from_numpy(task.v)

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def input_size(self) -> int:
        return len(self.like)

    def to(self, device: torch.device) -> _Operator:
        return self

    def _apply_to_vec(self, vec: Tensor) -> Tensor:
        result: Tensor = self.product(vec)
        return result

    def _apply_to_mat(self, mat: Tensor) -> Tensor:
        result: Tensor = self.product(mat.T.contiguous()).T
        return result


def _answer(task: Task, inverse: Any) -> Answer:
    x = inverse.apply(torch.from_numpy(task.v).clone())
    return Answer(x.reshape(-1).numpy(), "nothing")


def _cg(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"rtol": task.rtol, "atol": 0.0, "maxiter": task.work}
    return _answer(task, CgOperator(_Operator(task), regularization=task.damping, **options))


def _lissa(task: Task) -> Answer:
    operator = _Operator(task)
    # One batch, which is all of the data: the deterministic form.
    batch = SimpleNamespace(
        device=operator.device, dtype=operator.dtype, input_size=operator.input_size,
        apply=lambda batch, vector: operator.apply(vector),
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.zeros(1, 1), torch.zeros(1, 1)), batch_size=1)
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"maxiter": task.work, "scale": task.norm + task.damping, "rtol": task.rtol}
    return _answer(task, LissaOperator(batch, data, regularization=task.damping, **options))


def _nystrom(task: Task) -> Answer:
    torch.manual_seed(2)
    rank = DEFAULT_RANK if task.work is None else min(task.work, len(task.v))
    sketch = operator_nystroem_approximation(_Operator(task), rank)
    return _answer(task, LowRankOperator(sketch, task.damping))


def _arnoldi(task: Task) -> Answer:
    if task.work is None:
        sketch = operator_spectral_approximation(_Operator(task))
    else:
        n = len(task.v)
        rank = max(1, min(task.work // 2, n - 2))
        sketch = operator_spectral_approximation(
            _Operator(task), rank, krylov_dimension=min(n, max(task.work, rank + 2)), max_iter=1
        )
    return _answer(task, LowRankOperator(sketch, task.damping))


PEERS = (
    Peer("CgOperator", "cg", _cg),
    Peer("LissaOperator", "neumann", _lissa),
    Peer("Nyström", "nystrom", _nystrom),
    Peer("Arnoldi", "nystrom", _arnoldi),
)
