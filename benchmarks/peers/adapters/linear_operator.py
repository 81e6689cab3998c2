"""linear_operator: ``solve`` (Cholesky up to 800 rows), its CG and its MINRES."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator import settings, solve
from linear_operator.operators import LinearOperator
from linear_operator.utils import linear_cg, minres
from torch import Tensor

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "linear_operator"


class _Counted(LinearOperator):  # type: ignore[misc]  # the package is not installed here
    """A as one of the package's operators; its products are those of the task."""

    def __init__(self, like: Tensor, product: Any) -> None:
        super().__init__(like, product=product)
        self.like, self.product = like, product

    def _matmul(self, rhs: Tensor) -> Tensor:
        result: Tensor = self.product(rhs)
        return result

    def _size(self) -> torch.Size:
        return torch.Size((len(self.like), len(self.like)))

    def _transpose_nonbatch(self) -> _Counted:
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype


def _system(task: Task) -> tuple[Any, Tensor]:
    v = torch.from_numpy(task.v)
    operator = _Counted(v, torch_product(task.product))
    return operator.add_diagonal(torch.tensor(task.damping, dtype=v.dtype)), v


def _dense(task: Task) -> Answer:
    operator, v = _system(task)
    return Answer(solve(operator, v[:, None])[:, 0].numpy(), "nothing")


def _damped(task: Task) -> tuple[Any, Tensor]:
    product, v = torch_product(task.product), torch.from_numpy(task.v)
    return (lambda x: product(x) + task.damping * x), v[:, None]


def _cg(task: Task) -> Answer:
    if task.work is None:  # solve() as it does above 800 rows
        operator, v = _system(task)
        with settings.max_cholesky_size(0):
            return Answer(solve(operator, v[:, None])[:, 0].numpy(), "nothing")
    product, v = _damped(task)
    tiny = float(torch.finfo(v.dtype).tiny)
    x = linear_cg(
        product, v, max_iter=task.work, max_tridiag_iter=0, tolerance=task.rtol,
        eps=tiny, stop_updating_after=task.rtol,
    )  # fmt: skip
    return Answer(x[:, 0].numpy(), "nothing")


def _minres(task: Task) -> Answer:
    product, v = _damped(task)
    if task.work is None:
        return Answer(minres(product, v)[:, 0].numpy(), "nothing")
    with settings.minres_tolerance(task.rtol):
        return Answer(minres(product, v, max_iter=task.work)[:, 0].numpy(), "nothing")


PEERS = (
    Peer("solve", "dense", _dense),
    Peer("linear_cg", "cg", _cg),
    Peer("minres", "minres", _minres),
)
