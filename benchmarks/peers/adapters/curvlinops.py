"""curvlinops: the inverses of an operator by CG, LSMR and Neumann series."""

from __future__ import annotations

from typing import Any

import torch
from curvlinops import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "curvlinops"


class _Damped(PyTorchLinearOperator):  # type: ignore[misc]  # the package is not installed here
    """A + damping I as one of the package's operators."""

    SELF_ADJOINT = True

    def __init__(self, task: Task) -> None:
        n = len(task.v)
        super().__init__([(n,)], [(n,)])
        self.product, self.damping = torch_product(task.product), task.damping
        self.like = torch.from_numpy(task.v)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.product(x) + self.damping * x for x in X]

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device


def _solve(inverse: Any, task: Task) -> Answer:
    return Answer((inverse @ torch.from_numpy(task.v)).numpy(), "nothing")


def _cg(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {
            "max_iter": task.work,
            "max_tridiag_iter": 0,
            "tolerance": task.rtol,
            "eps": float(torch.finfo(torch.from_numpy(task.v).dtype).tiny),
            "stop_updating_after": task.rtol,
        }
    return _solve(CGInverseLinearOperator(_Damped(task), **options), task)


def _lsmr(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"atol": 0.0, "btol": 0.0, "conlim": 0.0, "maxiter": task.work}
    return _solve(LSMRInverseLinearOperator(_Damped(task), **options), task)


def _neumann(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"num_terms": task.work, "scale": 1.0 / (task.norm + task.damping)}
    return _solve(NeumannInverseLinearOperator(_Damped(task), **options), task)


PEERS = (
    Peer("CGInverse", "cg", _cg),
    Peer("LSMRInverse", "minres", _lsmr),
    Peer("NeumannInverse", "neumann", _neumann),
)
