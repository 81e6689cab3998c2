"""Products compiled by ``torch.compile``: one graph for all operators of one loss and one shape."""

from __future__ import annotations

import logging
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import CompilationWarning, HypergradError, warn
from .modes import agree

if TYPE_CHECKING:
    from .hessian import HessianOperator

_log = logging.getLogger("hypergrad")
#: As many graphs are kept.
_KEPT = 64
#: What generates the code; tests that only need the capture take another.
BACKEND = "inductor"

Products = Callable[[list[Tensor], Tensor], Tensor]


@dataclass
class _Graph:
    """Compiled products, or the knowledge that there can be none (``run`` is None then)."""

    run: Products | None
    proved: bool = False


_graphs: OrderedDict[Hashable, _Graph] = OrderedDict()


def signature(operator: HessianOperator) -> Hashable:
    """What operators have in common whose products one graph can make; their tensors differ.

    The loss counts as the object that it is: of two functions of the same code, made one after the
    other, the closures may hold different things.  (What one closure holds, ``torch.compile``
    itself watches.)
    """
    leaves, spec = torch_pytree.tree_flatten(operator.batch)
    rest = tuple(_described(leaf) for leaf in leaves)
    layout = operator.layout
    try:
        key = (
            operator.loss_fn, operator.mode, layout.paths, layout.shapes, layout.dtypes,
            str(layout.device), str(spec), rest,
        )  # fmt: skip
        hash(key)
    except TypeError:
        return operator  # only equal to itself
    return key


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, str(leaf.device))
    hash(leaf)
    return leaf  # type: ignore[no-any-return]


def is_compiled(operator: HessianOperator) -> bool:
    """Whether an operator like this one was compiled before, and its loss looked at."""
    own = signature(operator)
    return any(key[0] == own and graph.proved for key, graph in _graphs.items())  # type: ignore[index]


def forget_compiled() -> None:
    """Forget every graph; the next products are compiled anew, from PyTorch's own cache if any."""
    _graphs.clear()


def compiled_products(
    operator: HessianOperator, block: Tensor, eager: Callable[[Tensor], Tensor]
) -> Tensor:
    """The products of a block, compiled; ``eager`` ones where there is no way to compile them.

    The first product of each kind is compared with an eager one: a loss that draws random numbers,
    or changes what it reads, is another function in each evaluation and stays with the kept graph.
    """
    key = (signature(operator), tuple(block.shape))
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = _Graph(None)
        while len(_graphs) > _KEPT:
            _graphs.popitem(last=False)
        graph.run = _compiled(operator, block)
    _graphs.move_to_end(key)
    if graph.run is None:
        return eager(block)
    first, start = not graph.proved, time.perf_counter()
    try:
        with torch.no_grad():
            products = graph.run([x.detach() for x in operator._tensors()], block.detach())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError | HypergradError):
            raise
        # Where the fault is the loss's own, it shows in the eager product.
        products = eager(block)
        graph.run = None
        _report(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return products
    if first:
        seconds = time.perf_counter() - start
        _log.info("compiled %d products with %r in %.1f s", len(block), operator, seconds)
        if not agree(products[:1], eager(block[:1])):
            graph.run = None
            _report("the loss draws random numbers, or changes what it reads")
            return eager(block)
        graph.proved = True
    return products


def _compiled(operator: HessianOperator, block: Tensor) -> Products | None:
    _log.info("compiling %d products with %r", len(block), operator)
    template: Any = operator._with_tensors([x.detach() for x in operator._tensors()])

    def products(tensors: list[Tensor], rows: Tensor) -> Tensor:
        result: Tensor = template._with_tensors(tensors)._traced_products(rows)
        return result

    # Dynamo keeps what it compiled by code object, and counts how often: each graph has its own.
    own = types.FunctionType(
        products.__code__.replace(co_name=f"products_{len(_graphs)}"),
        products.__globals__,
        closure=products.__closure__,
    )
    try:
        run: Products = torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)
    except RuntimeError as error:  # this Python or platform has no torch.compile
        _report(str(error))
        return None
    return run


def _report(why: str) -> None:
    warn(
        f"products are not compiled but made eagerly, which is slower: {why}. Install a C++ "
        "compiler (a CUDA device needs Triton), write the loss in PyTorch operations only, or "
        "leave out compile=True.",
        CompilationWarning,
    )
