"""Loops in compiled graphs: one is run by PyTorch, and computes what never changes only once."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch.fx import Graph, GraphModule, Node

from . import narrow_products, rounded_products, small_products
from .narrow_products import transpose_narrow
from .rounded_products import round_products
from .small_products import direct_products

try:
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._higher_order_ops.while_loop import while_loop
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    HAS_LOOPS = True
except ImportError:  # a PyTorch without them: nothing with a loop in it is compiled
    HAS_LOOPS = False
    CustomGraphPass = object  # type: ignore[assignment,misc]

#: What only looks at memory in another way: done within the loop, where it costs nothing, so that
#: what goes into it shares no memory.
_VIEWS = {
    "_unsafe_view", "alias", "detach", "expand", "getitem", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip

__all__ = ["HAS_LOOPS", "HoistInvariants", "while_loop"]


class HoistInvariants(CustomGraphPass):
    """What each turn of a ``while_loop`` computes from what is the same in all moves out of it.

    A product with a Hessian is linear in the vector that changes; what is not, the loss and its
    gradient, would be computed again in every turn. Nor is it computed twice by what surrounds the
    loop: another product that begins or checks.  And small products call a kernel, narrow ones are
    transposed; what is to be rounded becomes float32.
    """

    def __call__(self, graph: Graph) -> None:
        """Change ``graph``, and those of its loops, in place."""
        module = graph.owning_module
        assert module is not None
        round_products(graph)
        direct_products(graph)
        transpose_narrow(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is torch.ops.higher_order.while_loop:
                _hoist(module, graph, node)
        module.graph = fx_graph_cse(graph)

    def uuid(self) -> bytes:
        """What PyTorch's cache of compiled graphs knows this pass by."""
        code: bytes = get_hash_for_files(
            (
                __file__,
                small_products.__file__,
                narrow_products.__file__,
                rounded_products.__file__,
            )
        )
        return code


def _hoist(module: GraphModule, graph: Graph, loop: Node) -> None:
    condition_name, body_name, carried, constants = loop.args
    condition, body = (getattr(module, str(n.target)) for n in (condition_name, body_name))  # type: ignore[union-attr]
    nodes = list(body.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    outside: dict[Node, Node] = dict(
        zip(inputs[len(carried) :], constants, strict=True)  # type: ignore[arg-type]
    )
    invariant, written = _invariant(nodes, set(outside))
    moved = _needed(nodes, invariant)
    if not moved:
        return
    with graph.inserting_before(loop):
        for node in nodes:
            if node in invariant and node not in outside:
                outside[node] = graph.node_copy(node, lambda x: outside[x])
    first = next(node for node in nodes if node.op != "placeholder")
    for node in moved:
        replacement = _new_input(body.graph, node)
        _new_input(condition.graph, node)
        if node in written:  # in each turn, which is to find it as it was
            with body.graph.inserting_before(first):
                copy = body.graph.call_function(torch.ops.aten.clone.default, (replacement,))
            copy.meta = dict(node.meta)
            replacement = copy
        node.replace_all_uses_with(replacement)
    body.graph.eliminate_dead_code()
    body.recompile()
    condition.recompile()
    loop.args = (condition_name, body_name, carried, (*constants, *(outside[n] for n in moved)))  # type: ignore[misc]
    graph.eliminate_dead_code()


def _invariant(nodes: list[Node], known: set[Node]) -> tuple[set[Node], set[Node]]:
    """The nodes that depend on nothing but the loop's constants, and those with memory written to.

    The former with the constants; what reads memory after it was written to is not among them.
    """
    found, written = set(known), set[Node]()
    for node in nodes:
        if node.op != "call_function":
            continue
        fixed = all(x in found and _owners(x).isdisjoint(written) for x in node.all_input_nodes)
        if fixed and _pure(node):
            found.add(node)
        for x in _written_by(node):
            written |= _owners(x)
    return found, written


def _written_by(node: Node) -> list[Node]:
    """The arguments that an operation writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            written += [x for x in torch_pytree.tree_leaves(value) if isinstance(x, Node)]
    return written


def _owners(node: Node) -> set[Node]:
    """The nodes whose memory a node may look at, itself if it looks at nobody's."""
    owners, asked = set[Node](), [node]
    while asked:
        x = asked.pop()
        if x.all_input_nodes and _is_view(x):
            asked += x.all_input_nodes
        else:
            owners.add(x)
    return owners


def _pure(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") in _VIEWS
    return not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def _needed(nodes: list[Node], invariant: set[Node]) -> list[Node]:
    """Of the invariant nodes, those with memory of their own that the rest is computed from."""
    seen: set[Node] = set()
    needed: set[Node] = set()
    asked = [x for node in nodes if node not in invariant for x in node.all_input_nodes]
    while asked:
        node = asked.pop()
        if node in seen or node not in invariant or node.op == "placeholder":
            continue
        seen.add(node)
        if _is_view(node):
            asked += node.all_input_nodes
        elif not node.all_input_nodes:
            continue  # a number
        else:
            needed.add(node)
    return [node for node in nodes if node in needed]


def _is_view(node: Node) -> bool:
    target: Any = getattr(node.target, "_overloadpacket", node.target)
    if target is operator.getitem:  # of several results, such as the parts of one
        return _is_view(node.all_input_nodes[0])
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(x.alias_info is not None for x in schema.returns)
    return aliases or getattr(target, "__name__", "") in _VIEWS


def _new_input(graph: Graph, like: Node) -> Node:
    """One more input of a loop's condition or body, after the others."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"{like.name}_before")
    node.meta = dict(like.meta)
    return node
