"""TorchOpt: ``solve_cg``, ``solve_normal_cg`` and the Neumann series of ``solve_inv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "TorchOpt"


def _matvec(task: Task) -> Callable[[Tensor], Tensor]:
    """X -> (A + damping I) x, whose derivative is a counted product too."""
    product = torch_product(task.product)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            result: Tensor = product(x)
            return result

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            result: Tensor = Product.apply(grad)  # type: ignore[no-untyped-call]
            return result

    def damped(x: Tensor) -> Tensor:
        result: Tensor = Product.apply(x)  # type: ignore[no-untyped-call]
        return result + task.damping * x

    return damped


def _run(task: Task, solver: Any, *, derivative: bool = True) -> Answer:
    product = torch_product(task.product)
    # Where the solver differentiates no product, it gets one without the machinery for it.
    plain = lambda x: product(x) + task.damping * x  # noqa: E731
    x = solver(_matvec(task) if derivative else plain, torch.from_numpy(task.v))
    return Answer(x.detach().numpy(), "nothing")


def _cg(task: Task) -> Answer:
    options = {} if task.work is None else {"rtol": task.rtol, "maxiter": task.work}
    return _run(task, solve_cg(**options), derivative=False)


def _normal_cg(task: Task) -> Answer:
    options = {} if task.work is None else {"rtol": task.rtol, "maxiter": task.work}
    return _run(task, solve_normal_cg(**options))


def _neumann(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"maxiter": task.work, "alpha": 1.0 / (task.norm + task.damping)}
    return _run(task, solve_inv(ns=True, **options))


PEERS = (
    Peer("solve_cg", "cg", _cg),
    Peer("solve_normal_cg", "minres", _normal_cg),
    Peer("solve_inv(ns=True)", "neumann", _neumann),
)
