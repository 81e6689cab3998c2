"""Which way products go through a graph: guessed from its size, then measured as they are made."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import LossError, SolverOptionError

Mode = Literal["auto", "reverse_over_reverse", "forward_over_reverse"]
ChunkSize = int | Literal["auto"] | None
#: The leaves of stacked trees: each with one more leading dimension.
Block: TypeAlias = list[Tensor]

#: Bytes that the vectors carried together may take by default; see :func:`hypergrad.hessian`.
MEMORY_CAP = 2**28
#: Graphs that hold fewer bytes than this a node spend their time on the calls, which vectors that
#: are carried together share.  (Measured on one core of x86-64: ten vectors together cost a third
#: of ten by themselves at 1 kB a node, as much at 15 kB, a fifth more at 20 kB.)  On an accelerator
#: a call costs more and a byte less.
_LIGHT = 12 * 2**10
_LIGHT_ON_ACCELERATOR = 2**20
#: Share of the time spent on products that trying other ways may cost.
_BUDGET = 0.1
#: A way is timed so often; the first time pays for what PyTorch sets up at a first call.
_TRIALS = 3
#: How much slower a way that was never tried is taken to be.
_FEARED = 2.0
#: A way that was tried twice is given up if it took this many times the best.
_HOPELESS = 1.3
#: A way must be so much faster to replace the one that the graph's size suggests.
_BETTER = 0.95
#: Seconds that the first forward-mode product of a process takes to set up PyTorch's rules.
_FIRST_FORWARD = 2.0
#: So many vectors are tried at a time, at most.
MOST_TRIED = 16
#: As many kinds of operators are remembered.
_REMEMBERED = 256


def check_modes(mode: object, chunk_size: object, memory_cap: object) -> None:
    """Raise :class:`SolverOptionError` for options that :func:`hypergrad.hessian` does not know."""
    if mode not in get_args(Mode):
        raise SolverOptionError(f"mode is {mode!r}, expected one of {get_args(Mode)}.")
    if chunk_size not in (None, "auto") and not _is_positive(chunk_size):
        raise SolverOptionError(
            f"chunk_size is {chunk_size!r}, expected None, 'auto' or an integer >= 1."
        )
    if not _is_positive(memory_cap):
        raise SolverOptionError(
            f"memory_cap is {memory_cap!r}, expected a number of bytes, an integer >= 1."
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Way(Enum):
    """How a block of products is made."""

    ONE_BY_ONE = "one by one over the kept graph"
    TOGETHER = "together over the kept graph"
    FORWARD = "together in forward mode"

    __hash__ = object.__hash__  # that of Enum is slow, and asked for at every product

    @property
    def mode(self) -> Mode:
        """The ``mode`` of :func:`hypergrad.hessian` that it belongs to."""
        return "forward_over_reverse" if self is Way.FORWARD else "reverse_over_reverse"


@dataclass(frozen=True)
class Footprint:
    """The size of the graph of a gradient.

    Attributes:
        nodes: operations that a product goes through.
        saved: bytes of the tensors that they keep, without parameters and data.
    """

    nodes: int
    saved: int

    @classmethod
    def of(cls, outputs: Sequence[Tensor | None], known: Sequence[Tensor]) -> Footprint:
        """Of the graph behind ``outputs``; the storage of ``known`` tensors is not counted."""
        pending = [x.grad_fn for x in outputs if x is not None and x.grad_fn is not None]
        seen = set(pending)
        own = {x.untyped_storage()._cdata for x in known}
        sizes: dict[tuple[Any, ...], int] = {}
        while pending:
            node = pending.pop()
            for tensor in _saved(node):
                # Not its address: storages of tensor subclasses may have none.
                storage = tensor.untyped_storage()._cdata
                if storage not in own:
                    place = (storage, tensor.storage_offset())
                    size = tensor.numel() * tensor.element_size()
                    sizes[place] = max(size, sizes.get(place, 0))
            fresh = {following for following, _ in node.next_functions if following is not None}
            pending.extend(fresh - seen)
            seen |= fresh
        return cls(len(seen), sum(sizes.values()))

    def chunk_size(self, vector: int, cap: int) -> int:
        """How many vectors of ``vector`` bytes fit below ``cap`` with what a product carries.

        A vector carries at worst, in forward mode, a tangent and a cotangent of all that the graph
        has saved and of the parameters, and once more of what is at work.
        """
        return max(1, cap // (3 * (self.saved + vector)))

    def light(self, device: torch.device) -> bool:
        """Whether the calls cost more than the arithmetic."""
        limit = _LIGHT if device.type == "cpu" else _LIGHT_ON_ACCELERATOR
        return self.saved <= limit * self.nodes


def _saved(node: Any) -> list[Tensor]:
    """The tensors that a node of autograd's graph keeps."""
    found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    found.extend(getattr(node, "saved_tensors", ()))  # a torch.autograd.Function's
    flat = [y for x in found for y in (x if isinstance(x, list | tuple) else (x,))]
    return [x for x in flat if isinstance(x, Tensor) and x.layout is torch.strided]


@dataclass
class Choice:
    """The way for blocks of one size, and what is known of the others.

    Ways are timed on products that are needed anyway, so that nothing is computed twice: what a
    trial can lose is the difference to the best way, and that stays below a tenth of the time
    spent so far.

    Attributes:
        first: what the graph's size suggests.
        seconds: least time a product, by way.
        trials: how often a way was timed.
        refused: ways that do not work here.
        spent: seconds of products so far.
        lost: seconds by which trials were slower than the best way.
    """

    first: Way
    ways: tuple[Way, ...]
    seconds: dict[Way, float] = field(default_factory=dict)
    trials: dict[Way, int] = field(default_factory=dict)
    refused: set[Way] = field(default_factory=set)
    spent: float = 0.0
    lost: float = 0.0

    @property
    def best(self) -> Way:
        """The fastest way known; the first until another has been timed often enough."""
        base = self.first if self.first not in self.refused else Way.ONE_BY_ONE
        known = [
            way
            for way, count in self.trials.items()
            if count >= _TRIALS and way not in self.refused
        ]
        if base not in known:
            return base
        fastest = min(known, key=lambda way: self.seconds[way])
        return fastest if self.seconds[fastest] < _BETTER * self.seconds[base] else base

    @property
    def settled(self) -> bool:
        """Whether every way has been timed, or given up."""
        return not self._open()

    def _open(self) -> list[Way]:
        return [
            way
            for way in self.ways
            if way not in self.refused and self.trials.get(way, 0) < _TRIALS
        ]

    def trial(self, count: int) -> Way | None:
        """A way that ``count`` vectors may be tried with now, if any."""
        best = self.best
        if best not in self.seconds:
            return None
        for way in self._open():
            if way is best:
                continue
            slower = _FEARED
            if way in self.seconds:
                slower = max(self.seconds[way] / self.seconds[best] - 1.0, 0.0)
            risk = slower * count * self.seconds[best]
            if way is Way.FORWARD and way not in self.seconds:
                risk += _FIRST_FORWARD
            if self.lost + risk <= _BUDGET * self.spent:
                return way
        return None

    def record(self, way: Way, count: int, seconds: float) -> None:
        """``count`` products took so long."""
        best = self.best
        if way is not best and best in self.seconds:
            self.lost += max(seconds - count * self.seconds[best], 0.0)
        self.spent += seconds
        self.trials[way] = self.trials.get(way, 0) + 1
        self.seconds[way] = min(seconds / count, self.seconds.get(way, float("inf")))
        hopeless = best in self.seconds and self.seconds[way] > _HOPELESS * self.seconds[best]
        if hopeless and self.trials[way] == 2:  # it has had a turn after the first call
            self.trials[way] = _TRIALS


@dataclass
class Memory:
    """What is remembered of one kind of operator: model, shapes, dtypes and device."""

    footprint: Footprint
    choices: dict[int, Choice] = field(default_factory=dict)

    def choice(self, count: int, device: torch.device) -> Choice:
        """The choice for blocks of ``count`` vectors: one for each power of two, up to sixteen."""
        size = min(1 << (count.bit_length() - 1), MOST_TRIED)
        if size not in self.choices:
            if size == 1:
                choice = Choice(Way.ONE_BY_ONE, (Way.ONE_BY_ONE, Way.FORWARD))
            else:
                light = self.footprint.light(device)
                choice = Choice(Way.TOGETHER if light else Way.ONE_BY_ONE, tuple(Way))
            self.choices[size] = choice
        return self.choices[size]


_memories: OrderedDict[Hashable, Memory] = OrderedDict()


def remembered(key: Hashable, footprint: Callable[[], Footprint]) -> Memory:
    """The memory of a kind of operator, made at its first use."""
    if key not in _memories:
        _memories[key] = Memory(footprint())
        while len(_memories) > _REMEMBERED:
            _memories.popitem(last=False)
    _memories.move_to_end(key)
    return _memories[key]


def forget_modes() -> None:
    """Forget every measurement that ``mode="auto"`` has made in this process."""
    _memories.clear()


def identity(function: Callable[..., Any]) -> Hashable:
    """What stays the same where a function is defined anew in every turn of a loop: its code."""
    inner = getattr(function, "func", function)  # of a functools.partial
    inner = getattr(inner, "__func__", inner)  # of a bound method
    if hasattr(inner, "__code__"):
        return (inner.__code__,)
    return (type(inner),)


def explore(
    choice: Choice,
    way: Way,
    refused: set[Way],
    make: Callable[[Way, Block, Block | None], Block],
    directions: Block,
    out: Block | None,
) -> Block:
    """Products in ``way``, the best known; some of them in another, when it is time to try one.

    Args:
        choice: of ways for blocks of this size; it learns from these products.
        way: the way to go.
        refused: gains the ways that failed.
        make: makes products of a block in a way, into the leaves of its last argument if any.
        directions: the block.
        out: where the products go, or None for memory of their own.
    """
    device = directions[0].device
    if choice.settled:
        return or_one_by_one(way, refused, make, directions, out)
    count = len(directions[0])
    few = min(count, MOST_TRIED)
    other = choice.trial(few)
    done = 0
    if other is not None and other not in refused:
        if out is None:
            out = [torch.empty_like(leaf) for leaf in directions]
        head = [leaf[:few] for leaf in directions], [leaf[:few] for leaf in out]
        done = few if _tried(choice, other, refused, make, *head) else 0
    if done == count and out is not None:
        return out
    rest = [leaf[done:] for leaf in directions]
    into = None if out is None else [leaf[done:] for leaf in out]
    products, seconds = _timed(lambda: or_one_by_one(way, refused, make, rest, into), device)
    if way not in refused:
        choice.record(way, count - done, seconds)
    return products if out is None else out


def _tried(
    choice: Choice,
    way: Way,
    refused: set[Way],
    make: Callable[[Way, Block, Block | None], Block],
    directions: Block,
    out: Block,
) -> bool:
    """Products in a way that is not known yet; False if it turns out not to work."""
    try:
        _, seconds = _timed(lambda: make(way, directions, out), directions[0].device)
    except (RuntimeError, LossError) as error:
        # A fault of the loop's own shows there; this one only rules the way out.
        refused.add(way)
        if not isinstance(error, torch.OutOfMemoryError):
            choice.refused.add(way)
        return False
    if way not in choice.seconds:
        known = make(Way.ONE_BY_ONE, [leaf[:1] for leaf in directions], None)
        if not all(agree(x[:1], y) for x, y in zip(out, known, strict=True)):
            # The loss is another function at each call: only the kept graph is one operator.
            choice.refused.add(way)
            return False
    choice.record(way, len(directions[0]), seconds)
    return True


def or_one_by_one(
    way: Way,
    refused: set[Way],
    make: Callable[[Way, Block, Block | None], Block],
    directions: Block,
    out: Block | None,
) -> Block:
    """In this way, or one by one over the kept graph where it does not work."""
    if way is Way.ONE_BY_ONE:
        return make(way, directions, out)
    try:
        return make(way, directions, out)
    except (RuntimeError, LossError) as error:
        # Too little memory, or an operation that vmap cannot batch, if the loop gets through; if
        # not, the fault is another, and both errors are shown.
        try:
            products = make(Way.ONE_BY_ONE, directions, out)
        except (RuntimeError, LossError) as fault:
            raise fault from error
        refused.add(way)
        return products


def _timed(work: Callable[[], Block], device: torch.device) -> tuple[Block, float]:
    """What ``work`` computes, and the seconds that it took."""
    # On one thread its own time: that of other processes on the machine says nothing of the way.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    _wait_for(device)
    start = clock()
    result = work()
    _wait_for(device)
    return result, clock() - start


def _wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given: kernels run on after their call."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def agree(left: Tensor, right: Tensor) -> bool:
    """Whether the leaves of two products are the same to rounding, amplified as deep models do.

    They are not where the loss draws random numbers or reads what changes from call to call.
    """
    allowed = torch.finfo(left.dtype).eps ** 0.5
    wide = torch.promote_types(left.dtype, torch.float32)
    size = torch.linalg.vector_norm(right, dtype=wide)
    gap = torch.linalg.vector_norm(left - right, dtype=wide)
    return bool(gap <= allowed * size)
