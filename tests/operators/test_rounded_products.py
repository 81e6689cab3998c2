"""Float64 functions that a graph computes in float32, from their argument on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

import hypergrad
from hypergrad.operators import compilation
from hypergrad.operators.loops import HoistInvariants
from hypergrad.operators.rounded_products import round_products, rounded
from tests.operators import networks
from tests.operators.graphs import Told
from tests.strategies import F32, F64, gaussian

Function = Callable[[Tensor], Tensor]
VECTOR = gaussian(12).float()
MATRIX = gaussian(12, 12, seed=1)
INDEX = torch.arange(12) % 5


@dataclass
class Rounded:
    """A rounded function, compiled as far as to the graph that code would be made from.

    Attributes:
        module: after the pass.
        before: what the operations were before it.
        moving: the operations that depend on the vector, after it.
        result: of the graph, run as it is told to the compiler.
    """

    module: GraphModule
    before: list[str]
    moving: list[Node]
    result: Tensor

    @classmethod
    def of(cls, function: Function, vector: Tensor) -> Rounded:
        found: dict[str, Any] = {}

        def look(module: GraphModule, inputs: Any) -> Any:
            begin = torch.ops.hypergrad.rounded_begin.default
            (first,) = module.graph.find_nodes(op="call_function", target=begin)
            source = first.args[0]
            found["before"] = operations(module)
            round_products(module.graph)
            module.graph.lint()
            module.recompile()
            moving = [source]
            for node in module.graph.nodes:
                if node.op == "call_function" and set(moving) & set(node.all_input_nodes):
                    moving.append(node)
            found.update(module=module, moving=moving[1:])
            return make_boxed_func(Told(module).run)

        backend = aot_autograd(fw_compiler=look, decompositions=select_decomp_table())
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: rounded(function, x), backend=backend, fullgraph=True, dynamic=False
        )
        with torch.no_grad():
            found["result"] = compiled(vector)
        return cls(**found)


def operations(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def dtypes(nodes: list[Node]) -> set[torch.dtype]:
    values = torch.utils._pytree.tree_leaves([node.meta["val"] for node in nodes])
    return {x.dtype for x in values if isinstance(x, Tensor)}


FUNCTIONS: dict[str, Function] = {
    "matrix": lambda x: MATRIX @ x,
    "block": lambda x: (MATRIX @ x[:, None])[:, 0],
    "sum of products": lambda x: MATRIX @ x + MATRIX.T @ (2.5 * x),
    "numbers of 64 bits": lambda x: torch.tensor(0.3, dtype=F64) * x + 1.0,
    "its own dtype": lambda x: (MATRIX.to(F64) @ x.to(F64)).double(),
    "new tensors": lambda x: torch.cat([torch.zeros(3, dtype=F64), x[3:]]) + x.new_ones(12),
    "places": lambda x: torch.zeros(5, dtype=F64).index_add(0, INDEX, x)[INDEX],
    "written to": lambda x: x.clone().mul_(2.0).add_(MATRIX[0]),
    "parts": lambda x: torch.cat([part.flip(0) for part in torch.split(x, 5)]),
    "several results": lambda x: torch.nn.functional.layer_norm(x, (12,), MATRIX[0]),
    "views": lambda x: (x.view(3, 4).mT.reshape(12) * MATRIX[1]).expand(2, 12).sum(0),
    "chosen": lambda x: torch.where(MATRIX[0] > 0, x, 3.0 * x),
    "compared": lambda x: x * (x > 0),
    "einsum": lambda x: torch.einsum("ij,j,kj->i", MATRIX, x, MATRIX),
    "frequencies": lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1.0 + 2.0j), n=12),
    "as it is": lambda x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_that_depends_on_the_vector_is_float32(name: str) -> None:
    function = FUNCTIONS[name]
    found = Rounded.of(function, VECTOR)
    assert F64 not in dtypes(found.moving)
    assert found.result.dtype == F32
    expected = function(VECTOR.double())
    assert float((found.result - expected).norm() / expected.norm()) <= 1e-6


def test_it_is_computed_in_float32() -> None:
    """Not in float64, and rounded: two thirds of a rounding are not in the result."""

    def function(x: Tensor) -> Tensor:
        return (x + 1.0) - 1.0

    small = torch.full((12,), 1e-5)
    found = Rounded.of(function, small).result
    assert torch.equal(found, (small + 1.0) - 1.0)
    assert not torch.equal(found, function(small.double()).float())


def test_what_is_the_same_for_all_vectors_stays_in_float64() -> None:
    found = Rounded.of(lambda x: (MATRIX @ MATRIX).tanh() @ x, VECTOR)
    nodes = [node for node in found.module.graph.nodes if node.op == "call_function"]
    fixed = {str(n.target): n.meta["val"].dtype for n in nodes if n not in found.moving}
    assert fixed == {
        "aten.mm.default": F64,
        "aten.tanh.default": F64,
        "prims.convert_element_type.default": F32,
    }


def test_a_function_that_does_not_read_the_vector() -> None:
    found = rounded(lambda x: MATRIX[0] * 2.0, VECTOR)
    torch.testing.assert_close(found, (2.0 * MATRIX[0]).float(), rtol=0, atol=0)
    compiled = torch.compile(
        lambda x: rounded(lambda x: MATRIX[0] * 2.0 + x.new_zeros(12), x), fullgraph=True,
        options={"post_grad_custom_pre_pass": HoistInvariants()},
    )  # fmt: skip
    torch.testing.assert_close(compiled(VECTOR), found, rtol=0, atol=0)


#: PyTorch's compiler takes no LSTM.
NETWORKS = [name for name in networks.NAMES if "lstm" not in name]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_of_networks(name: str, kind: str) -> None:
    case = networks.case(name)
    params = case.params
    if kind == "hessian":
        operator: hypergrad.LinearOperator = hypergrad.hessian(
            lambda p: case.loss_fn(case.model_fn(p, case.inputs), case.targets), params
        )
    else:
        operator = hypergrad.ggn(case.model_fn, case.loss_fn, params, case.inputs, case.targets)
    v = gaussian(operator.layout.dim).float()
    template = compilation.detached(operator)
    found = Rounded.of(lambda x: template._traced_products(x[None])[0], v)
    assert F64 not in dtypes(found.moving)
    expected = operator._apply(v.double()[None])[0]
    assert float((found.result - expected).norm() / expected.norm()) <= 1e-5


@torch.library.custom_op("hypergrad_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operation for float64 alone."""
    if x.dtype != F64:
        raise TypeError("expected float64")
    return 2.0 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    if x.dtype != F64:
        raise TypeError("expected float64")
    return torch.empty_like(x)


@torch.library.custom_op("hypergrad_tests::widened", mutates_args=())
def widened(x: Tensor) -> Tensor:
    """An operation that answers in float64, whatever it is asked in."""
    return x.double() + 1.0


@widened.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=F64)


@pytest.mark.parametrize("function", [doubled, widened])
def test_what_is_for_float64_alone_stays(function: Any, caplog: pytest.LogCaptureFixture) -> None:
    def whole(x: Tensor) -> Tensor:
        return MATRIX @ function(MATRIX @ x)

    with caplog.at_level(logging.INFO, logger="hypergrad"):
        found = Rounded.of(whole, VECTOR)
    assert "products stay in float64" in caplog.text
    assert operations(found.module) == found.before
    expected = whole(VECTOR.double()).float()
    torch.testing.assert_close(found.result, expected, rtol=1e-6, atol=1e-6)


def test_without_the_pass_the_function_is_one_of_float64() -> None:
    found = rounded(lambda x: MATRIX @ x, VECTOR)
    assert torch.equal(found, (MATRIX @ VECTOR.double()).float())
