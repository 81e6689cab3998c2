"""A device that is not the CPU, on every machine.

Its tensors keep their numbers in tensors of the CPU, and every operation of PyTorch's on them is
done there; but for all else they are elsewhere: an operation that meets tensors of both places
fails as it would with an accelerator, and what makes the host wait for one is counted.  Random
numbers are drawn there from a generator of its own, or from one that is on that device.

With HYPERGRAD_ELSEWHERE=float32 it has no float64, as MPS has none, and to ask it for such a tensor
is an error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hypergrad import precision

NAME = "elsewhere"
#: Whether it has float64.
WIDE = os.environ.get("HYPERGRAD_ELSEWHERE") != "float32"
if not WIDE:
    precision.NARROW_DEVICES.add(NAME)


class _Kind(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_Kind):
    """PyTorch's, also for that device, where a backend in Python has none."""

    #: Those of that device.  To an operation they come as others, with the same data.
    there: ClassVar[dict[int, Generator]] = {}

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == NAME:
            cls.there[made._cdata] = made  # type: ignore[attr-defined]
        return made

    def __init__(self, device: Any = "cpu") -> None:
        """PyTorch's takes a device of its own."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if self._cdata in self.there else CPU  # type: ignore[attr-defined]


class Module:
    """What ``torch.elsewhere`` is, as ``torch.cuda`` and ``torch.xpu`` are."""

    default_generators: tuple[torch.Generator, ...] = ()

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return self.default_generators[0].get_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        self.default_generators[0].set_state(state)


_setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
for module in [*sys.modules.values()]:  # also those that have taken it from torch by its name
    if vars(module).get("Generator") is torch._C.Generator and module is not torch._C:
        module.Generator = Generator  # type: ignore[attr-defined]
Module.default_generators = (Generator(DEVICE),)

aten = torch.ops.aten
#: These may meet tensors of both places.
_COPIES = {aten._copy_from, aten.copy_, aten.copy, aten._to_copy}
#: These take indices of the CPU, too, which are moved.
_INDEXED = {aten.index, aten.index_put, aten.index_put_}
#: The shape of what they return is known only when they are done, as that of a[mask] is.
_COUNTING = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal}

_waits: list[str] = []


class Elsewhere(Tensor):
    """A tensor of that device; ``numbers`` is where the CPU keeps it."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        return made

    def __init__(self, numbers: Tensor) -> None:
        if not WIDE and numbers.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{DEVICE} has no float64")
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(op, *args, **(kwargs or {}))

    # What PyTorch does not do for subclasses.
    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **options})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.numbers!r})"

    def __format__(self, spec: str) -> str:
        return format(self.detach().cpu(), spec)


def _is_there(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == NAME


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation, done by the CPU."""
    leaves, spec = tree.tree_flatten((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    numbers = [
        x.numbers if isinstance(x, Elsewhere) else CPU if _is_there(x) else x for x in leaves
    ]
    if op is aten._has_compatible_shallow_copy_type.default:
        return True
    _look_at(op, given, kwargs)
    if op is aten._copy_from.default:
        aten.copy_.default(numbers[1], numbers[0])
        return leaves[1]
    if op is aten._efficientzerotensor.default:
        op = aten.zeros.default
    inner_args, inner_kwargs = tree.tree_unflatten(numbers, spec)
    with _drawing(op, leaves):
        result = op(*inner_args, **inner_kwargs)
    for x in given:  # written to, it may have another shape
        if isinstance(x, Elsewhere) and x.shape != x.numbers.shape:
            x.data = Elsewhere(x.numbers)
    device = kwargs.get("device")
    home = device is not None and not _is_there(device)
    known = {id(x.numbers): x for x in given if isinstance(x, Elsewhere)}

    def there(x: Any) -> Any:
        if home or not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree.tree_map(there, result)


@contextmanager
def _drawing(op: Any, leaves: list[Any]) -> Iterator[None]:
    """From the device's generator, where an operation draws from the one that its device has."""
    given = [x for x in leaves if isinstance(x, torch._C.Generator)]
    for generator in given:
        if generator._cdata not in Generator.there:  # type: ignore[attr-defined]
            raise RuntimeError(f"{op} expected a generator of {DEVICE}, found one of the CPU")
    if given or torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    (there,), state = Module.default_generators, torch.get_rng_state()
    torch.set_rng_state(there.get_state())
    yield
    there.set_state(torch.get_rng_state())
    torch.set_rng_state(state)


def _look_at(op: Any, given: list[Tensor], kwargs: dict[str, Any]) -> None:
    """Raise where an accelerator would; count what makes the host wait for it."""
    kind, device = op.overloadpacket, kwargs.get("device")
    strangers = [x for x in given if not isinstance(x, Elsewhere)]
    copied, indexed = kind in _COPIES, kind in _INDEXED
    looked_up = indexed and strangers and isinstance(given[0], Elsewhere)
    if looked_up:
        strangers = [x for x in strangers if x.dtype.is_floating_point]
    if not copied and any(x.ndim for x in strangers):  # of no dimension, it is passed as a number
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
        raise RuntimeError(f"{op} expected all tensors to be on the same device, found {found}")
    masked = indexed and any(x.dtype == torch.bool for x in given[1:])
    moved = copied and (strangers or (device is not None and not _is_there(device)))
    if moved or looked_up or masked or kind in _COUNTING or kind is aten._local_scalar_dense:
        frames = [x for x in traceback.extract_stack() if "/hypergrad" in x.filename]
        last = frames[-1] if frames else None
        _waits.append(f"{last.filename}:{last.lineno} {last.line}" if last else str(op))


@contextmanager
def waits() -> Iterator[list[str]]:
    """The lines at which the host had to wait, in this context."""
    _waits.clear()
    yield _waits


def move(x: Any) -> Any:
    """A tree of tensors, there."""
    return tree.tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, x)


def _through_the_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **options)
        return make(data, *args, **options).to(device)

    return made


# What is done there is done at once.
torch.accelerator.synchronize = lambda *_: None
#: PyTorch makes these tensors where no code in Python is asked.
torch.tensor = _through_the_cpu(torch.tensor)
torch.as_tensor = _through_the_cpu(torch.as_tensor)

_library = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_library.fallback(_call, "PrivateUse1")  # type: ignore[no-untyped-call]
