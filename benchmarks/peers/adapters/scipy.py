"""SciPy: ``cg``, ``minres`` and ``gmres`` of ``scipy.sparse.linalg``."""

from __future__ import annotations

from typing import Any

from scipy.sparse.linalg import LinearOperator, cg, gmres, minres

from ...atlas.records import Answer
from ..protocol import Peer, Task

OWNER = "SciPy"
#: The tolerance of each function's defaults.
DEFAULT_RTOL = 1e-5


def _operator(task: Task) -> Any:
    n = len(task.v)
    return LinearOperator(
        (n, n), matvec=task.damped, rmatvec=task.damped, dtype=task.v.dtype
    )  # matmat is never called by these


def _answer(task: Task, x: Any, code: int) -> Answer:
    rtol = DEFAULT_RTOL if task.work is None else task.rtol
    if code == 0:
        return Answer(x, "converged", rtol, "info=0")
    return Answer(x, "failed", detail="info>0" if code > 0 else "info<0")


def _cg(task: Task) -> Answer:
    options = {} if task.work is None else {"rtol": task.rtol, "maxiter": task.work}
    return _answer(task, *cg(_operator(task), task.v, **options))


def _minres(task: Task) -> Answer:
    options = {} if task.work is None else {"rtol": task.rtol, "maxiter": task.work}
    return _answer(task, *minres(_operator(task), task.v, **options))


def _gmres(task: Task) -> Answer:
    # One cycle without a restart is the most accurate that a budget can buy.
    full = {"rtol": task.rtol, "restart": task.work, "maxiter": 1}
    options = {} if task.work is None else full
    return _answer(task, *gmres(_operator(task), task.v, **options))


PEERS = (Peer("cg", "cg", _cg), Peer("minres", "minres", _minres), Peer("gmres", "gmres", _gmres))
