"""How often a solve looks at a value: each look makes the host wait for an accelerator.

Looks at numbers that are on the host already are counted, too, so the bounds are generous; what
counts is that they do not grow with the rank, nor with the right-hand sides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad


class Looks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts ``.item()``, ``float(x)``, ``bool(x)`` and what else reads one number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def looks(solver: hypergrad.Solver, columns: int = 1) -> int:
    a = torch.diag(torch.logspace(0, -4, 200))
    v = torch.randn(columns, 200, generator=torch.Generator().manual_seed(1))
    with Looks() as seen:
        hypergrad.solve(a, v, solver, damping=1e-2, batched=True, on_failure="ignore")
    return seen.count


def nystrom(rank: int, **options: Any) -> hypergrad.Solver:
    source = torch.Generator().manual_seed(0)
    return hypergrad.Nystrom(rank, generator=source, complement="zero", **options)


@pytest.mark.parametrize("check", [True, False])
def test_a_sketch_is_decided_on_in_a_number_of_looks_that_no_size_enters(check: bool) -> None:
    few = looks(nystrom(4, check=check))
    assert few <= 40
    assert looks(nystrom(32, check=check)) <= few + 2
    assert looks(nystrom(4, check=check), columns=8) == few


@pytest.mark.parametrize("solver", [hypergrad.CG, hypergrad.MINRES])
def test_an_iteration_looks_a_few_times_whatever_the_block(solver: Any) -> None:
    def of(iterations: int, columns: int) -> int:
        return looks(solver(rtol=0.0, max_iters=iterations), columns)

    an_iteration = (of(20, 1) - of(10, 1)) / 10
    assert an_iteration <= 8
    assert (of(20, 8) - of(10, 8)) / 10 == an_iteration


def test_the_counter_counts() -> None:
    tensor: Tensor = torch.ones(3)
    with Looks() as seen:
        assert bool((tensor > 0).all())
        assert float(tensor.sum()) == 3.0
    assert seen.count == 2
