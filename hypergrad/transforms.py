"""What is being differentiated or batched: autograd's graphs, dual numbers and ``torch.func``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch.overrides import TorchFunctionMode

from .errors import HypergradError, LossError
from .tracing import compiling

_functorch = torch._C._functorch
_state = threading.local()


def transforming() -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad, jvp ...) is running."""
    return not compiling() and torch._C._are_functorch_transforms_active()


@contextmanager
def repeating() -> Iterator[None]:
    """Within, what is computed twice is to be the same to the last bit.

    Backward passes are held to that: ``torch.autograd.gradcheck`` runs each of them twice.
    """
    before = getattr(_state, "repeating", False)
    _state.repeating = True
    try:
        yield
    finally:
        _state.repeating = before


def must_repeat() -> bool:
    """Whether one is within :func:`repeating`."""
    return getattr(_state, "repeating", False)


def building_no_graph() -> bool:
    """Whether autograd's own graphs cannot be built: under ``torch.func`` or ``torch.compile``."""
    return compiling() or transforming()


def differentiable(tensor: Tensor) -> bool:
    """Whether a derivative, or a batch of values, runs through a tensor at any level.

    ``requires_grad`` alone tells of the innermost level only.
    """
    if not transforming():
        return (tensor.requires_grad and torch.is_grad_enabled()) or has_tangent(tensor)
    interpreter = retrieve_current_functorch_interpreter()
    if (
        _functorch.is_functorch_wrapped_tensor(tensor)
        and _functorch.maybe_get_level(tensor) == interpreter.level()
    ):
        if _functorch.is_batchedtensor(tensor) or tensor.requires_grad or has_tangent(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    with interpreter.lower():
        return differentiable(tensor)


def carries_derivatives(compute: Callable[[], Tensor]) -> bool:
    """Whether what ``compute`` makes of constants is :func:`differentiable` after all.

    Code that calls plain autograd does not run under a transform; it runs beside it then, watched
    for tensors that belong to one.
    """
    try:
        output = compute()
        return differentiable(output) if transforming() else has_tangent(output)
    except RuntimeError as error:
        if isinstance(error, HypergradError):
            raise
    try:
        with temporarily_clear_interpreter_stack(), _Watch():
            return compute().requires_grad
    except _TransformedTensorError:
        return True


class _TransformedTensorError(Exception):
    """A tensor of a transform takes part in a computation."""


class _Watch(TorchFunctionMode):
    """Stops a computation at the first tensor of a transform."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in torch_pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and _functorch.is_functorch_wrapped_tensor(leaf):
                raise _TransformedTensorError
        return func(*args, **(kwargs or {}))


def unwrapped(tensor: Tensor) -> Tensor:
    """One plain, detached value of a tensor that transforms of ``torch.func`` run over."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        dim = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor if dim is None else tensor.select(dim, 0)
    return (split_dual(tensor)[0] if tangents() else tensor).detach()


def recording() -> bool:
    """Whether derivatives are being recorded: gradients, or tangents of dual numbers."""
    return torch.is_grad_enabled() or tangents()


def tangents() -> bool:
    """Whether forward-mode differentiation by dual numbers is on."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor is a dual number of forward-mode differentiation."""
    return tangents() and split_dual(tensor)[1] is not None


def plain(value: float | Tensor) -> float | Tensor:
    """A tensor detached; a number as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def split_dual(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The value of a dual number, and its tangent."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, tangent


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """``function.apply(*inputs)``, typed."""
    output: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def forward_mode(what: str, without: Callable[[], object], *, remedy: str) -> Iterator[None]:
    """Tell errors that come of forward mode or ``vmap`` from those of what is computed in them.

    Args:
        what: whose fault it is to be called.
        without: computes the same, or a part that meets every operation, without the two; called
            after an error only.  If it fails too, the error is the caller's own and is passed on.
        remedy: what to use instead.

    Raises:
        LossError: what ``without`` can do failed: an operation has no forward-mode derivative, or
            cannot be batched, or reads a value that a transform hides.
    """
    try:
        yield
    except (torch.OutOfMemoryError, HypergradError):
        raise  # neither is a matter of the mode
    except RuntimeError as error:
        if not _succeeds(without):
            raise
        raise LossError(
            f"{what} has an operation without the forward-mode derivative that is needed, or one "
            f"that vmap cannot batch ({' '.join(str(error).split())[:120]}). Use {remedy}."
        ) from error


def _succeeds(compute: Callable[[], object]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of a second time
            compute()
    except Exception:
        return False
    return True


def pullback(
    function: Callable[[list[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangent: Tensor,
) -> list[Tensor | None]:
    """The gradient of <function(inputs), cotangent> in each wanted input, None for the others.

    Differentiable in the inputs and the cotangent where gradients are being recorded.  Each input
    is taken by itself: one that was computed from another does not pass its gradient on to it.
    """
    index = [i for i, want in enumerate(wanted) if want]
    if not index:
        return [None] * len(inputs)

    # In jacrev and hessian PyTorch 2.13 trips over w**2 where w is left out.
    taken = index
    if transforming():
        taken = [i for i, x in enumerate(inputs) if x.is_floating_point()]

    def of_taken(*chosen: Tensor) -> Tensor:
        every = list(inputs)
        for i, tensor in zip(taken, chosen, strict=True):
            every[i] = tensor
        return function(every)

    if transforming():
        pull = torch.func.vjp(of_taken, *(inputs[i] for i in taken))[1]
        found = dict(zip(taken, pull(cotangent), strict=True))
        grads: Sequence[Tensor] = [found[i] for i in index]
    else:
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            chosen = [
                inputs[i].view_as(inputs[i]) if create else inputs[i].detach().requires_grad_()
                for i in index
            ]
            output = of_taken(*chosen)
            if output.requires_grad:
                grads = torch.autograd.grad(
                    output,
                    chosen,
                    cotangent,
                    create_graph=create,
                    allow_unused=True,
                    materialize_grads=True,
                )
            else:  # such as the Hessian of a quadratic loss
                grads = [torch.zeros_like(x) for x in chosen]
    out: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(index, grads, strict=True):
        out[i] = grad
    return out


def below_tangents(function: Callable[..., Tensor], *values: Tensor | None) -> Tensor:
    """``function(*values)`` in the ``jvp`` of an autograd Function, with derivatives of its own.

    There PyTorch turns forward mode off for all levels, not only for the one whose rule runs: the
    tangents of an outer ``jvp`` would be lost without a word.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        if not transforming():  # dual numbers do not nest: without their tangents
            primals = [split_dual(x)[0] if isinstance(x, Tensor) else x for x in values]
            return function(*primals)
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        lower = [
            _functorch._unwrap_for_grad(x, level) if isinstance(x, Tensor) else x for x in values
        ]
        with interpreter.lower():
            out = function(*lower)
        wrapped: Tensor = _functorch._wrap_for_grad(out, level)
        return wrapped


def pushforward(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    """The derivative of ``function`` at ``primals`` along ``tangents``."""
    if transforming():
        moved: Tensor = torch.func.jvp(function, primals, tangents)[1]
        return moved
    output = function(*map(forward_ad.make_dual, primals, tangents))
    tangent = split_dual(output)[1]
    return torch.zeros_like(output) if tangent is None else tangent


def reaches_beyond(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> bool:
    """Whether the graph of ``outputs`` ends in a leaf other than through the ``known`` tensors."""
    edge_of = torch.autograd.graph.get_gradient_edge
    stops = {(edge.node, edge.output_nr) for edge in map(edge_of, known)}
    pending = [edge_of(x)[:2] for x in outputs if x.requires_grad]
    seen = set()
    while pending:
        node, number = pending.pop()
        if (node, number) in stops:
            continue
        if hasattr(node, "variable"):  # a leaf's accumulator
            return True
        if node in seen:
            continue
        seen.add(node)
        pending.extend((nxt, nr) for nxt, nr in node.next_functions if nxt is not None)
    return False
