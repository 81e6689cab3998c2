"""Small products in graphs: computed by a kernel for their shape, with results where they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import hypergrad
from hypergrad.operators import small_products
from hypergrad.operators.loops import while_loop
from tests.operators.graphs import Told
from tests.strategies import gaussian

F32, F64 = torch.float32, torch.float64
Function = Callable[..., Any]


def single(*shape: int, seed: int) -> Tensor:
    return gaussian(*shape, seed=seed).float()


A, B = single(40, 64, seed=0), single(64, 48, seed=1)
BIAS = single(48, seed=2)
STACK, OTHERS = single(3, 40, 64, seed=3), single(3, 64, 48, seed=4)
#: Rows of larger matrices, with other numbers between them.
PART = single(50, 90, seed=5)[7:47, 13:77]

#: A function of its inputs, and how many kernels it becomes.
CASES: dict[str, tuple[Function, tuple[Tensor, ...], int]] = {
    "in rows": (torch.mm, (A, B), 1),
    "the first in columns": (lambda a, b: a.T @ b, (A.T.contiguous(), B), 1),
    "the second in columns": (lambda a, b: a @ b.T, (A, B.T.contiguous()), 1),
    "both in columns": (lambda a, b: (b.T @ a.T).T, (A, B), 1),
    "columns of both": (lambda a, b: a.T @ b.T, (A.T.contiguous(), B.T.contiguous()), 1),
    "a part of a matrix": (torch.mm, (PART, B), 1),
    "rows that are the same": (lambda a, b: a[:1].expand(40, 64) @ b, (A, B), 1),
    "stacks": (torch.bmm, (STACK, OTHERS), 1),
    "a matrix for a stack": (lambda a, b: a.expand(3, 40, 64) @ b, (A, OTHERS), 1),
    "a stack for a matrix": (lambda a, b: a @ b.expand(3, 64, 48), (STACK, B), 1),
    "stacks in columns": (lambda a, b: a.mT @ b.mT, (STACK.mT.clone(), OTHERS.mT.clone()), 1),
    "a bias": (torch.addmm, (BIAS, A, B), 1),
    "a bias a row": (torch.addmm, (single(40, 1, seed=6), A, B), 1),
    "one row": (torch.mm, (A[:1], B), 1),
    "one term": (torch.mm, (A[:, :1], B[:1]), 1),
    "long sums": (torch.mm, (single(40, 1500, seed=7), single(1500, 48, seed=8)), 1),
    "a chain": (lambda a, b: torch.tanh(a @ b) @ b.T @ b, (A, B), 3),
    # What comes after may go by places in memory, as loops and branches do by strides.
    "places": (lambda a, b: (a @ b).as_strided((9, 2), (48, 1), 3), (A.T.clone().T, B), 1),
    "one column": (lambda a, b: a @ b[:, :1], (A.repeat(20, 1), B), 0),
    "a sum of many": (lambda a: a @ a.T, (single(2, 9000, seed=10),), 0),
    "a scaled sum": (lambda c, a, b: torch.addmm(c, a, b, beta=2.0), (BIAS, A, B), 0),
    "double precision": (torch.mm, (A.double(), B.double()), 0),
    "integers": (lambda a, b: a.int() @ b.int(), (A, B), 0),
    "nothing": (torch.mm, (A[:, :0], B[:0]), 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cpp_wrapper() -> Iterator[None]:
    with config.patch(cpp_wrapper=True):
        yield


@pytest.fixture
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_products, "_has_kernel", lambda: True)


def kernels(graph: torch.fx.Graph) -> int:
    target = small_products._product_operation()
    return len(graph.find_nodes(op="call_function", target=target))


def passed(function: Function, *inputs: Tensor, mode: Any = "fake") -> torch.fx.GraphModule:
    module = make_fx(function, tracing_mode=mode)(*inputs)
    hypergrad.direct_products(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def assert_as_float64(result: Tensor, function: Function, inputs: tuple[Tensor, ...]) -> None:
    """Within the rounding of sums of float32 products, of some hundred terms of size one."""
    expected = function(*[x.double() for x in inputs]).double()
    torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.usefixtures("any_machine")
@pytest.mark.parametrize("name", CASES)
def test_small_products_become_kernels(name: str) -> None:
    function, inputs, count = CASES[name]
    module, expected = passed(function, *inputs), function(*inputs)
    assert kernels(module.graph) == count
    result = Told(module).run(*inputs)
    assert (result.shape, result.stride()) == (expected.shape, expected.stride())
    assert_as_float64(result, function, inputs)


SIZES = st.integers(1, 40)


@pytest.mark.usefixtures("any_machine")
@given(SIZES, SIZES, SIZES, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_results_do_not_depend_on_how_factors_lie(
    m: int, k: int, n: int, stack: int, left: bool, right: bool, bias: bool
) -> None:
    batch = (stack,) if stack else ()
    a = single(*batch, k, m, seed=0).mT if left else single(*batch, m, k, seed=0)
    b = single(*batch, n, k, seed=1).mT if right else single(*batch, k, n, seed=1)
    function, inputs = (torch.bmm if stack else torch.mm), (a, b)
    if bias and not stack:
        function, inputs = torch.addmm, (single(n, seed=2), a, b)  # type: ignore[assignment]
    result, expected = Told(passed(function, *inputs)).run(*inputs), function(*inputs)
    assert result.stride() == expected.stride()
    assert_as_float64(result, function, inputs)


@pytest.mark.usefixtures("any_machine")
def test_what_is_not_known_to_be_small_stays() -> None:
    assert kernels(passed(torch.mm, A, B, mode="symbolic").graph) == 0
    assert kernels(passed(torch.mm, A.to("meta"), B.to("meta")).graph) == 0
    large = torch.empty(2000, 2000)
    assert kernels(passed(torch.mm, large, large).graph) == 0


@pytest.mark.usefixtures("any_machine")
def test_without_cpp_around_it_a_product_stays() -> None:
    with config.patch(cpp_wrapper=False):
        assert kernels(passed(torch.mm, A, B).graph) == 0


@pytest.mark.usefixtures("any_machine")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_a_product_stays() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert kernels(passed(torch.mm, A, B).graph) == 0


@pytest.mark.parametrize(
    ("where", "what", "value"),
    [
        (torch, "__version__", "2.12.1"),
        (torch, "__version__", "3.13.0"),
        (torch, "__file__", "/x/y"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (torch.backends.mkldnn, "is_available", lambda: False),
    ],
)
def test_without_the_kernel_products_stay(
    where: Any, what: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_products._has_kernel.cache_clear()
    monkeypatch.setattr(where, what, value)
    try:
        assert kernels(passed(torch.mm, A, B).graph) == 0
    finally:
        small_products._has_kernel.cache_clear()


class Direct(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        hypergrad.direct_products(graph)

    def uuid(self) -> bytes:
        return os.urandom(8)  # or a cache answers


def compiled(function: Function) -> Function:
    options: Any = {"cpp_wrapper": True, "post_grad_custom_pre_pass": Direct()}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_generated_code_calls_the_kernel() -> None:
    """All cases in one graph, where factors are also what other code has made."""
    cases = list(CASES.values())
    held = single(64, 48, seed=11)

    def function(inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
        given = [f(*xs) for (f, _, _), xs in zip(cases, inputs, strict=True)]
        made = [
            torch.tanh(A @ B)[3:30, 5:21] @ inputs[0][1][4:20, 3:40],  # a view of what was made
            (inputs[0][0] + 1.0) @ held,
            torch.cat([inputs[0][0], inputs[5][0]]) @ held,
            torch.stack([inputs[0][0] @ held, inputs[5][0] @ held]).mT @ A[:40],
        ]
        return [*given, *made]

    inputs = [xs for _, xs, _ in cases]
    run = compiled(function)
    results, code = run_and_get_code(run, inputs)
    count = sum(count for _, _, count in cases) + 7
    calls = sum(text.count("hypergrad::product(") for text in code)
    assert calls >= count if small_products._has_kernel() else calls == 0
    expected = function(inputs)

    def check(results: list[Tensor]) -> None:
        for i, (mine, theirs) in enumerate(zip(results, expected, strict=True)):
            assert mine.stride() == theirs.stride(), i
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=4e-4)

    check(results)
    # Turned off since: the code that stands in for the kernel.
    with torch.backends.mkldnn.flags(enabled=False):
        check(run(inputs))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    run = compiled(lambda a, b, c: (a @ b, c @ b))
    inputs = single(3, 130, 96, seed=0), single(96, 80, seed=1), single(1000, 96, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(*inputs))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
    assert_as_float64(results[0][0], torch.matmul, inputs[:2])


def test_bodies_of_loops_call_it_too() -> None:
    def power(a: Tensor, x: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64)
        turns: Any = while_loop
        _, last = turns(lambda i, x: i < 3, lambda i, x: (i + 1, 0.1 * (a @ x)), (count, x))
        return last

    a, x = single(64, 64, seed=0), single(64, 48, seed=1)
    result, code = run_and_get_code(compiled(power), a, x)
    called = any("hypergrad::product(" in text for text in code)
    assert called == small_products._has_kernel()
    expected = 1e-3 * torch.linalg.matrix_power(a.double(), 3) @ x.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
