"""torchsolve: ``conjugate_gradient`` with the damping as an identity regulariser."""

from __future__ import annotations

from typing import Any

import torch
from torchsolve import Regularizer, conjugate_gradient

from ...atlas.records import Answer
from ..protocol import Peer, Task, torch_product

OWNER = "torchsolve"


def _cg(task: Task) -> Answer:
    v = torch.from_numpy(task.v)
    options: dict[str, Any] = {}
    if task.work is not None:
        options = {"rtol": task.rtol, "max_iter": task.work}
    result = conjugate_gradient(
        torch_product(task.product), v, regularizers=[Regularizer(task.damping)], **options
    )
    x = result.solution.numpy()
    if not result.definite:
        return Answer(x, "failed", detail="definite=False")
    if result.converged:
        return Answer(x, "converged", task.rtol if options else 0.0, "converged=True")
    if options:
        return Answer(x, "failed", detail="converged=False")
    # At its defaults no tolerance is asked for; the result carries the residual it ended at.
    figure = float(result.residual_norm.double() / torch.linalg.vector_norm(v.double()))
    return Answer(x, "figure", figure, "residual_norm")


PEERS = (Peer("conjugate_gradient", "cg", _cg),)
