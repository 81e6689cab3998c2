"""Products in float64 code that a graph for PyTorch's compiler computes in float32."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

#: What each dtype becomes.
_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_log = logging.getLogger("hypergrad")
_library: Any = torch.library.Library("hypergrad", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rounded_begin(Tensor x) -> Tensor")
_library.define("rounded_end(Tensor x) -> Tensor")
_library.impl("rounded_begin", lambda x: x.to(torch.float64), "CompositeExplicitAutograd")
_library.impl("rounded_end", lambda x: x.to(torch.float32), "CompositeExplicitAutograd")
torch.library.register_fake(
    "hypergrad::rounded_begin", lambda x: torch.empty_like(x, dtype=torch.float64), lib=_library
)
torch.library.register_fake(
    "hypergrad::rounded_end", lambda x: torch.empty_like(x, dtype=torch.float32), lib=_library
)


def rounded(product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """A float64 function of a float32 vector, in a graph that is to compute it in float32.

    What depends on the vector is rounded by :func:`round_products`.  Where nobody calls that, the
    function is computed in float64, and its result rounded.
    """
    result: Tensor = torch.ops.hypergrad.rounded_end(
        product(torch.ops.hypergrad.rounded_begin(vector))
    )
    return result


def round_products(graph: Graph) -> None:
    """What depends on the argument of a :func:`rounded` function is made float32, in place.

    What does not, such as the forward pass of a loss, stays in float64 and is rounded where it is
    used: a loop that rounds it does so once, see :mod:`.loops`.  A graph with operations that
    nothing is known of is left as it is.
    """
    begin = torch.ops.hypergrad.rounded_begin.default
    if not graph.find_nodes(op="call_function", target=begin):
        return
    made: list[Node] = []
    try:
        ends = _narrow_copies(graph, made)
    except Exception as error:  # any operation may have reasons of its own to be of float64
        _log.info("products stay in float64: %s: %s", type(error).__name__, error)
        for node in reversed(made):
            graph.erase_node(node)
        return
    for end, result in ends.items():
        end.replace_all_uses_with(result)
    graph.eliminate_dead_code()


def _narrow_copies(graph: Graph, made: list[Node]) -> dict[Node, Node]:
    """Copies in float32 of what lies between beginnings and ends; the results by their ends."""
    begin, end = torch.ops.hypergrad.rounded_begin.default, torch.ops.hypergrad.rounded_end.default
    copies: dict[Node, Node] = {}
    constants: dict[Node, Node] = {}
    ends: dict[Node, Node] = {}

    def add(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        new = graph.call_function(target, args, kwargs)
        made.append(new)
        values = map_aggregate((args, kwargs), _value)
        new.meta["val"] = target(*values[0], **values[1])
        return new

    def constant(x: Node) -> Node:
        """A number, or many of the same, is made in the other dtype; anything else is rounded."""
        if x.op == "call_function" and not x.all_input_nodes:
            target: Any = x.target
            new = graph.call_function(target, x.args, {k: narrow(v) for k, v in x.kwargs.items()})
            new.meta["val"] = x.meta["val"].to(_NARROW[x.meta["val"].dtype])
            made.append(new)
            return new
        rounding = torch.ops.prims.convert_element_type.default
        return add(rounding, (x, _NARROW[x.meta["val"].dtype]), {})

    def narrow(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return _NARROW.get(x, x)
        if not isinstance(x, Node):
            return x
        if x in copies:
            return copies[x]
        if not _is_wide(x.meta["val"]):
            return x
        if x not in constants:
            constants[x] = constant(x)
        return constants[x]

    for node in list(graph.nodes):
        if node.target is begin:
            copies[node] = node.args[0]
        elif node.target is end and node.args[0] in copies:
            ends[node] = copies[node.args[0]]
        elif not copies.keys().isdisjoint(node.all_input_nodes):
            _check(node)
            with graph.inserting_before(node):
                args, kwargs = map_aggregate((node.args, node.kwargs), narrow)
                copies[node] = add(node.target, args, kwargs)
            _compare(node, copies[node])
    return ends


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, Node) else x


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def _check(node: Node) -> None:
    """Raise where an operation cannot be done in another dtype by writing so."""
    if node.op != "call_function":
        raise TypeError(f"{node.op} {node.target} depends on the vector.")
    plain = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
    if not plain and node.target is not operator.getitem:
        raise TypeError(f"{node.target} is not known.")


def _compare(old: Node, new: Node) -> None:
    """Raise unless two nodes differ in nothing but in how wide their numbers are."""
    before, after = (torch_pytree.tree_leaves(node.meta["val"]) for node in (old, new))
    for x, y in zip(before, after, strict=True):
        if not isinstance(x, Tensor):
            continue
        if (y.shape, y.dtype) != (x.shape, _NARROW.get(x.dtype, x.dtype)):
            raise TypeError(f"{old.target} in float32 is {y.dtype} of shape {tuple(y.shape)}.")
