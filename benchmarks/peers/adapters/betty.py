"""betty: the hypergradients ``cg`` and ``neumann`` on a problem whose hypergradient is the solve.

With the inner loss p'(A + damping I)p / 2 - q'p, the outer vector v and the outer parameters q,
the hypergradient is (A + damping I)^-1 v.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from betty.configs import Config
from betty.hypergradient import cg, neumann
from torch import Tensor

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "betty"


def _inner_loss(task: Task) -> Any:
    """P'Ap / 2 whose Hessian products, and they alone, are counted (p = 0, where Ap is known)."""
    product = torch_product(task.product)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: Tensor) -> Tensor:
            return torch.zeros_like(p)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            result: Tensor = product(grad)
            return result

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: Tensor) -> Tensor:
            ctx.save_for_backward(p)
            return p.new_zeros(())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            result: Tensor = grad * Gradient.apply(ctx.saved_tensors[0])  # type: ignore[no-untyped-call]
            return result

    return Loss.apply


def _run(task: Task, hypergradient: Any, **options: Any) -> Answer:
    v = torch.from_numpy(task.v)
    p = torch.zeros_like(v, requires_grad=True)
    q = torch.zeros_like(v, requires_grad=True)
    loss = _inner_loss(task)
    # What these two functions read of a Problem.
    inner = SimpleNamespace(
        paths=[], config=Config(**options), cur_batch=None,
        training_step_exec=lambda batch: loss(p) + 0.5 * task.damping * (p @ p) - q @ p,
        parameters=lambda: [p], trainable_parameters=lambda: [p],
    )  # fmt: skip
    outer = SimpleNamespace(trainable_parameters=lambda: [q])
    return Answer(hypergradient([v], inner, outer)[0].numpy(), "nothing")


def _cg(task: Task) -> Answer:
    options = {} if task.work is None else {"cg_iterations": task.work}
    return _run(task, cg, type="cg", **options)


def _neumann(task: Task) -> Answer:
    options: dict[str, Any] = {}
    if task.work is not None:
        step = 1.0 / (task.norm + task.damping)
        options = {"neumann_iterations": task.work, "neumann_alpha": step}
    return _run(task, neumann, type="neumann", **options)


PEERS = (Peer("cg", "cg", _cg), Peer("neumann", "neumann", _neumann))
