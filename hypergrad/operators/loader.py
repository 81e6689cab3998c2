"""Passes over a loader of minibatches: fresh each time, in one order, checked and moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.data import DataLoader, IterableDataset

from ..errors import LoaderError, SolverOptionError
from .evaluation import generators_of, seeded

#: What wraps the iterable of one pass, such as ``tqdm.tqdm``.
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Loader:
    """Passes over minibatches.

    What a loader draws from PyTorch's own generators and from that of a ``DataLoader``, such as the
    order of shuffled data and the seeds of workers, is the same in each pass, and leaves them where
    they stood.

    Args:
        batches: an iterable that begins anew each time, or a function that returns one.
        device: where the tensors of each batch are moved.
        batch_size: of a batch; None for the first dimension of its first tensor.
        seed: of the loader's draws.
        progress: what wraps the iterable of each pass; True for tqdm.
    """

    def __init__(
        self,
        batches: Any,
        device: torch.device,
        *,
        batch_size: Callable[[Any], float] | None,
        seed: int,
        progress: bool | Progress,
    ) -> None:
        if isinstance(batches, Iterator):
            raise LoaderError(
                f"batches is a {type(batches).__name__}, which can be gone through once only; each "
                "product needs a pass of its own. Pass what it iterates over: the DataLoader, a "
                "list of batches, or a generator function without calling it."
            )
        if isinstance(batches, Tensor | Mapping | str) or not (
            isinstance(batches, Iterable) or callable(batches)
        ):
            raise LoaderError(
                f"batches is a {type(batches).__name__}, expected an iterable of minibatches: a "
                "DataLoader, a list of tuples, or a function that returns an iterator. For one "
                "batch use hypergrad.hessian or hypergrad.ggn."
            )
        self.batches, self.device, self.seed = batches, device, seed
        if batch_size is not None and not callable(batch_size):
            raise SolverOptionError(
                f"batch_size is {batch_size!r}, expected None or a function of a batch that "
                "returns how many examples it counts for. Sizes are seen by themselves."
            )
        self._batch_size = batch_size
        self._progress = _tqdm if progress is True else (progress or None)
        if self._progress is _tqdm:
            _tqdm(())  # that it is missing is better known now
        self._structure: Any = None
        #: The size of each batch, once there has been a pass.
        self.sizes: list[float] | None = None
        self._indices: list[Any] | None = None

    def each(self) -> Iterator[tuple[tuple[Any, ...], float]]:
        """One pass: the arguments that each batch stands for, and its size.

        Raises:
            LoaderError: no batch, an empty or unlike one, or other sizes than in the first pass.
        """
        passing: Iterable[Any] = self._pass()
        if self._progress is not None:
            passing = self._progress(passing)
        sizes = []
        for index, batch in enumerate(passing):
            sizes.append(self._size(batch, index))
            arguments = self._arguments(batch, index)
            del batch  # the pass holds one minibatch at a time, and it is the caller's now
            yield arguments, sizes[-1]
            del arguments
        if not sizes:
            again = "" if self.sizes is None else " this time (a one-shot iterator?)"
            raise LoaderError(f"batches is empty{again}; expected at least one minibatch.")
        # In another order they are still the same batches.
        if self.sizes is not None and sorted(sizes) != sorted(self.sizes):
            raise LoaderError(
                f"this pass over batches had {len(sizes)} of {sum(sizes):g} examples in all, the "
                f"first {len(self.sizes)} of {sum(self.sizes):g}. The loader must give the same "
                "data each time."
            )
        if self.sizes is None:
            self.sizes = sizes

    def _pass(self) -> Iterator[Any]:
        stream = self._stream()
        with stream.drawing():
            source = self.batches() if not isinstance(self.batches, Iterable) else self.batches
            if not isinstance(source, Iterable):
                raise LoaderError(
                    f"batches() returned a {type(source).__name__}, expected an iterable."
                )
            running = getattr(source, "_iterator", None) is not None
            if isinstance(source, DataLoader) and running:
                self._draw_seed(source)  # persistent workers have theirs, and draw none
            with self._plain(source):
                iterator = iter(source)
        end = object()
        while True:
            with stream.drawing(), self._plain(source):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch
            del batch

    def _plain(self, source: Any) -> AbstractContextManager[Any]:
        """Outside of ``torch.func.vmap``, which forbids to draw an order or seeds of workers."""
        if isinstance(source, DataLoader):
            return temporarily_clear_interpreter_stack()
        return nullcontext()

    def _stream(self) -> _Stream:
        generators = generators_of(self.device)
        if isinstance(self.batches, DataLoader):
            for owner in (self.batches, self.batches.sampler, self.batches.batch_sampler):
                own = getattr(owner, "generator", None)
                if own is not None and all(own is not other for other in generators):
                    generators.append(own)
        return _Stream(generators, self.seed)

    def at(self, index: int) -> tuple[Any, ...]:
        """The arguments of one batch, without a pass.

        Raises:
            LoaderError: the loader has no random access, or another batch there than before.
        """
        batch = self._fetch(index)
        size = self._size(batch, index)
        if self.sizes is not None and size != self.sizes[index]:
            raise LoaderError(
                f"batch {index} has size {size:g}, but {self.sizes[index]:g} in the first pass. "
                "The batches must be the same each time."
            )
        return self._arguments(batch, index)

    def check_random_access(self) -> None:
        """Raise :class:`LoaderError` where a single batch cannot be had without a pass."""
        if isinstance(self.batches, DataLoader):
            good = not isinstance(self.batches.dataset, IterableDataset)
        else:
            good = isinstance(self.batches, Sequence)
        if not good:
            raise LoaderError(
                f"a {type(self.batches).__name__} has no random access to its batches. Pass "
                "list(batches), a DataLoader over a map-style dataset, or to the solver a callable "
                "that draws a minibatch itself."
            )

    def _fetch(self, index: int) -> Any:
        if not isinstance(self.batches, DataLoader):
            return self.batches[index]
        loader = self.batches
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if self._indices is None:
            with self._stream().drawing():
                self._draw_seed(loader)
                self._indices = list(sampler)
        with seeded(self.seed + index, self.device):  # augmentations
            chosen = self._indices[index]
            if loader.batch_sampler is None:
                return loader.collate_fn(loader.dataset[chosen])
            return loader.collate_fn([loader.dataset[i] for i in chosen])

    def _draw_seed(self, loader: DataLoader[Any]) -> None:
        """As a pass of a ``DataLoader`` draws the seed of its workers, before the order."""
        if loader is self.batches or loader.generator is None:  # not from what is not put back
            place = None if loader.generator is None else loader.generator.device
            torch.empty((), dtype=torch.int64, device=place).random_(generator=loader.generator)

    def _arguments(self, batch: Any, index: int) -> tuple[Any, ...]:
        structure = torch_pytree.tree_structure(batch, is_leaf=_without_tensors)
        if self._structure is None:
            self._structure = structure
        if structure != self._structure:
            raise LoaderError(
                f"batch {index} has another structure than the first: {structure}, expected "
                f"{self._structure}. Every batch must hold the same arguments of the loss."
            )
        moved = torch_pytree.tree_map(self._move, batch)
        return tuple(moved) if isinstance(moved, list | tuple) else (moved,)

    def _move(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(self.device, non_blocking=True)
        return leaf.to(self.device) if hasattr(leaf, "to") else leaf

    def _size(self, batch: Any, index: int) -> float:
        if self._batch_size is not None:
            size = float(self._batch_size(batch))
        else:
            tensors = [x for x in torch_pytree.tree_leaves(batch) if isinstance(x, Tensor)]
            if not tensors or tensors[0].ndim == 0:
                what = "no tensor" if not tensors else "a first tensor without dimensions"
                raise LoaderError(
                    f"batch {index} has {what} to tell its size by. Pass batch_size, a function "
                    "of the batch that returns how many examples it counts for."
                )
            size = float(len(tensors[0]))
        if not (math.isfinite(size) and size > 0):
            raise LoaderError(
                f"batch {index} has size {size:g}, expected a finite number > 0. Leave out empty "
                "batches."
            )
        return size


def _without_tensors(part: Any) -> bool:
    """Whether a list holds other things than tensors, such as names: as many as samples."""
    if not isinstance(part, list | tuple):
        return False
    return not any(isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(part))


class _Stream:
    """Random numbers of a seed, drawn bit by bit from generators that others draw from too."""

    def __init__(self, generators: list[torch.Generator], seed: int) -> None:
        self._generators = generators
        self._states = [
            torch.Generator(generator.device).manual_seed(seed).get_state()
            for generator in self._generators
        ]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The generators stand in this stream, and afterwards where they stood."""
        outside = [generator.get_state() for generator in self._generators]
        self._set(self._states)
        try:
            yield
        finally:
            self._states = [generator.get_state() for generator in self._generators]
            self._set(outside)

    def _set(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


def _tqdm(passing: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise LoaderError(
            "progress=True shows passes by tqdm, which is not installed. Install it, or pass a "
            "function that wraps an iterable."
        ) from error
    bar: Iterable[Any] = tqdm(passing, desc="minibatches", leave=False, delay=1.0)
    return bar
