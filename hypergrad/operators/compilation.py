"""Products compiled by ``torch.compile``: one graph for all operators of one loss and one shape."""

from __future__ import annotations

import logging
import re
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from ..errors import CompilationWarning, HypergradError, SolverOptionError, warn
from ..pytree import flat_batch
from .modes import agree

if TYPE_CHECKING:
    from .base import LinearOperator

_log = logging.getLogger("hypergrad")
#: As many graphs are kept.
_KEPT = 64
#: Why the results of a graph are not used.
IMPURE = "the loss draws random numbers, or changes what it reads"
#: What generates the code; tests that only need the capture take another.
BACKEND = "inductor"


class Graph:
    """A compiled function, or the knowledge that there can be none.

    Attributes:
        what: it computes, for the log and for warnings.
        proved: whether its results were compared with those of eager code, and agreed.
        attached: whether the function reads a tensor that requires grad, besides its inputs, or
            read one before that changed.
        opaque: whether the function is given objects, whose state PyTorch may not watch in full;
            then every operator's first results are compared.
        recorded: whether its results may be where the next call writes its own.
    """

    def __init__(
        self, function: Callable[..., Any], what: str, instead: str, options: dict[str, Any]
    ) -> None:
        self.what, self.instead, self.options = what, instead, options
        self.proved = self.used = self.attached = self.opaque = self.recorded = False
        self._last: weakref.ref[LinearOperator] | None = None
        _log.info("compiling %s", what)
        # Dynamo keeps what it compiled by code object, and counts how often: each has its own.
        own = types.FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{len(_graphs)}"),
            function.__globals__,
            closure=function.__closure__,
        )
        self.compiled: Callable[..., Any] | None = None
        try:
            self.compiled = torch.compile(
                own, fullgraph=True, dynamic=False, backend=self._backend, options=_watching()
            )
        except RuntimeError as error:  # this Python or platform has no torch.compile
            self.refuse(str(error))

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """The code for what was captured; once more for each change of what the function reads."""
        self.proved = False  # a module in training mode is another function, perhaps a random one
        read = [*inputs, *module.parameters(), *module.buffers()]
        self.attached |= any(isinstance(x, Tensor) and x.requires_grad for x in read)
        self.recorded |= _as_cuda_graphs()
        patches = {"config_patches": self.options} if self.options else {}
        return torch._dynamo.lookup_backend(BACKEND)(module, inputs, **patches)  # type: ignore[arg-type]

    def run(self, operator: LinearOperator, *inputs: Any) -> Any:
        """The results for an operator's tensors; None, after a warning, if they cannot be had.

        Raises:
            StaleOperatorError: the tensors were modified in place since the operator was made.
        """
        operator._check_fresh()
        if self.compiled is None:
            return None
        if self.opaque and (self._last is None or self._last() is not operator):
            self.proved, self._last = False, weakref.ref(operator)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                results = self.compiled([_plain(x) for x in operator._tensors()], *inputs)
        except Exception as error:  # PyTorch's compiler fails in many ways
            if isinstance(error, torch.OutOfMemoryError | HypergradError):
                raise
            # Where the fault is that of the code compiled, it shows when that runs eagerly.
            self.refuse(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        if not self.used:
            self.used = True
            _log.info("compiled %s in %.1f s", self.what, time.perf_counter() - start)
        operator._note_reached(self.attached)
        if self.recorded and operator.device.type == "cuda":
            return torch_pytree.tree_map_only(Tensor, torch.clone, results)
        return results

    def refuse(self, why: str) -> None:
        """Say why there are no compiled results, now and from now on."""
        self.compiled = None
        warn(
            f"{self.instead}, which is slower: {why}. Install a C++ compiler (a CUDA device needs "
            "Triton), write the loss in PyTorch operations only, or leave out compile=True.",
            CompilationWarning,
        )


def _as_cuda_graphs() -> bool:
    """Whether what PyTorch's compiler makes now is recorded as CUDA graphs.

    It is where the user has switched that on when the code is made.
    """
    from torch._inductor import config

    return BACKEND == "inductor" and bool(config.triton.cudagraphs)


def _plain(tensor: Tensor) -> Tensor:
    plain = type(tensor) is Tensor and not tensor.requires_grad
    return tensor if plain else tensor.detach()


_graphs: OrderedDict[Hashable, Graph] = OrderedDict()
#: Signatures of operators that were found to depend on tensors that they do not list.
_reaching: set[Hashable] = set()


def graph_of(key: tuple[Hashable, ...], make: Callable[[], Graph]) -> Graph:
    """The graph of this key, made if there is none; ``key[0]`` is the operator's signature."""
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = make()
        graph.opaque = _holds_objects(key)
        while len(_graphs) > _KEPT:
            _graphs.popitem(last=False)
    _graphs.move_to_end(key)
    return graph


def signature_of(operator: LinearOperator, batch: tuple[Any, ...], *rest: Any) -> Hashable:
    """What operators have in common whose products one graph can make; their tensors differ.

    They have a batch, and ``rest``, which no tensor is part of.  Functions count as the objects
    that they are: of two of the same code, made one after the other, the closures may hold
    different things.  (What one closure holds, ``torch.compile`` itself watches.)
    """
    leaves, spec = flat_batch(batch)
    layout = operator.layout
    try:
        for leaf in leaves:
            hash(leaf)
    except TypeError:
        return operator  # only equal to itself
    return (
        type(operator), *(_named(x) for x in rest), layout.paths, layout.shapes, layout.dtypes,
        str(layout.device), str(spec), tuple(_described(leaf) for leaf in leaves),
    )  # fmt: skip


class _Same:
    """An object as itself, held: equal ones may still do different things."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Given(_Same):
    """An object of a batch, which may have another state by the next operator."""


def _named(thing: Any) -> Hashable:
    """What a function, or a value, is told from others by."""
    if isinstance(thing, types.MethodType):  # made anew each time that it is asked for
        return (_Same(thing.__self__), _Same(thing.__func__))
    plain = thing is None or type(thing) in (str, int, bool, float, complex, torch.dtype)
    return (type(thing), repr(thing)) if plain else _Same(thing)


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, str(leaf.device))
    name = _named(leaf)
    return name if isinstance(name, tuple) and not callable(leaf) else _Given(leaf)


def _holds_objects(key: Hashable) -> bool:
    if isinstance(key, tuple):
        return any(_holds_objects(part) for part in key)
    return isinstance(key, _Given)


def check_compile(compile: Any) -> None:
    """Raise :class:`SolverOptionError` unless it is True or False."""
    if not isinstance(compile, bool):
        raise SolverOptionError(f"compile is {compile!r}, expected True or False.")


def note_reaching(operator: LinearOperator) -> None:
    """Remember that operators like this one depend on more than they list."""
    signature = operator._signature()
    if signature is not operator:
        _reaching.add(signature)


def is_reaching(operator: LinearOperator) -> bool:
    """Whether operators like this one were found to."""
    return bool(_reaching) and operator._signature() in _reaching


def is_compiled(operator: LinearOperator) -> bool:
    """Whether an operator like this one was compiled before, and its loss looked at."""
    own = operator._signature()
    return any(key[0] == own and graph.proved for key, graph in _graphs.items())  # type: ignore[index]


def forget_compiled() -> None:
    """Forget every graph; the next products are compiled anew, from PyTorch's own cache if any."""
    _graphs.clear()
    _reaching.clear()


def compiled_products(
    operator: LinearOperator, block: Tensor, eager: Callable[[Tensor], Tensor]
) -> Tensor:
    """The products of a block, compiled; ``eager`` ones where there is no way to compile them.

    The first product of each kind is compared with an eager one: a loss that draws random numbers,
    or changes what it reads, is another function in each evaluation and stays with the kept graph.
    """
    graph = graph_of(
        (operator._signature(), tuple(block.shape)), lambda: _products_of(operator, len(block))
    )
    products: Tensor | None = graph.run(operator, block.detach())
    if products is None:
        return eager(block)
    if not graph.proved:
        if not agree(products[:1], eager(block[:1])):
            graph.refuse(IMPURE)
            return eager(block)
        graph.proved = True
    return products


def _products_of(operator: LinearOperator, count: int) -> Graph:
    template = detached(operator)

    def products(tensors: list[Tensor], rows: Tensor) -> Tensor:
        return template._with_tensors(tensors)._traced_products(rows)

    return Graph(
        products,
        f"{count} products with {operator!r}",
        "products are made eagerly",
        options(operator.device),
    )


def detached(operator: LinearOperator) -> LinearOperator:
    """The same operator, of tensors that carry no graph."""
    return operator._with_tensors([x.detach() for x in operator._tensors()])


def options(device: torch.device) -> dict[str, Any]:
    """How PyTorch's compiler is to make code for a device."""
    if BACKEND != "inductor":
        return {}
    from . import loops  # takes as long to import as the rest of the library

    chosen: dict[str, Any] = {}
    if loops.HAS_LOOPS:
        chosen["post_grad_custom_pre_pass"] = loops.HoistInvariants()
    if device.type == "cpu":  # calls of kernels in C++ cost less than in Python
        chosen["cpp_wrapper"] = True
        logging.getLogger("torch._inductor.ir").addFilter(_not_of_shims)
    return chosen


#: Of what a graph was made from, that which does not change: the code of PyTorch, of Python and of
#: this library, and how an operator is put together.
_FIXED = re.compile(
    r".*\b(G\['__import_(torch|hypergrad)(_dot_\w+)?'\]|G\['__builtins_dict\w*'\]"
    r"|G\['(torch|__import_(copy|copyreg|contextlib|functools))'\]|__import__\('torch'\))"
    r"|(type\()?template(\)|\._point((\.params|\._leaves)(\[\d+\])?|\._spec\b.*)?)?$"
    r"|template\.__dict__\['(layout|mode)'\]|.*template\.__dict__\['_evaluating'\]"
)
#: What may change there all the same: a switch, unless it is the default of an argument.
_SWITCH = re.compile(r"(?!.*__(kw)?defaults__|.*__closure__)")


def _watching() -> dict[str, Any] | None:
    """What is looked at before a graph runs, where PyTorch lets us say: not what never changes.

    That would be a thousand things, which take a tenth of a millisecond.
    """
    if not hasattr(torch.compiler, "keep_tensor_guards_unsafe"):
        return None

    def watched(entries: Sequence[Any]) -> list[bool]:
        return [
            not _FIXED.match(entry.name)
            or (
                entry.is_global
                and entry.guard_type in ("CONSTANT_MATCH", "EQUALS_MATCH")
                and _SWITCH.match(entry.name) is not None
            )
            for entry in entries
        ]

    return {"guard_filter_fn": watched}


def _not_of_shims(record: logging.LogRecord) -> bool:
    """Drops what PyTorch logs of decompositions that graphs call through Python: no news here."""
    return "missing a c-shim" not in record.getMessage()
