"""How a loss is evaluated: twice differentiable, as one fixed function, leaving modules alone.

Layers run as :mod:`hypergrad.operators.layers` says, random ones draw the same numbers in every
evaluation, so that the operator is one matrix, and PyTorch's errors are told in terms of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import HypergradError, LossError
from ..pytree import TreeLayout
from ..tracing import compiling
from ..transforms import unwrapped
from .layers import Layers, named, twice_differentiable


class Evaluation:
    """The setting in which one function of an operator is evaluated and differentiated.

    ``with evaluation():`` goes around every call of the function and every product through its
    graph.  The first use draws random numbers where the caller's generators stand and moves them
    on, as calling the function does; later ones draw the same numbers again and move nothing.

    Args:
        function: ``function(params, *batch)``; evaluated here only to say which layer it was that
            could not be differentiated.
        layout: of the parameters; random numbers are drawn on its device.
        leaves: the parameters.
        batch: the function's further arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        layout: TreeLayout,
        leaves: Sequence[Tensor],
        batch: tuple[Any, ...],
    ) -> None:
        self._function, self._layout = function, layout
        self._leaves, self._batch = list(leaves), batch
        #: Where the generators stood at the first evaluation, if it drew from them.
        self._draws: list[Tensor] | None = None
        self._layers: Layers | None = None

    def __call__(self) -> AbstractContextManager[None]:
        """The setting of an evaluation."""
        if not compiling():
            return self._evaluation()
        # The one part that torch.compile can trace; it refuses what cannot be differentiated twice.
        return sdpa_kernel([SDPBackend.MATH])

    def product(self) -> AbstractContextManager[None]:
        """The setting of a backward pass through the graph that an evaluation has left."""
        if compiling():
            return nullcontext()
        # Checkpoints evaluate parts of the loss again then, with the kernels of the first time.
        again = self._layers is not None and self._layers.saved_elsewhere
        return self._evaluation() if again else self._explained()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        first = self._layers is None
        if self._layers is None:
            self._layers = Layers()
        generators = generators_of(self._layout.device) if first or self._draws else []
        outside = [generator.get_state() for generator in generators]
        if self._draws:
            set_states(generators, self._draws)
        try:
            # The function is the same each time: layers that it has not met it will not meet.
            met = self._layers if first or self._layers.met else None
            with self._explained(), twice_differentiable(met):
                yield
        finally:
            if self._draws:
                set_states(generators, outside)
        if first and not all(
            torch.equal(generator.get_state(), state)
            for generator, state in zip(generators, outside, strict=True)
        ):
            self._draws = outside

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            message = None if isinstance(error, HypergradError) else self._explanation(error)
            if message is None:
                raise
            raise LossError(message) from error

    def check(self, loss: Any) -> None:
        """Raise :class:`LossError` for what would be differentiated once, and then be a constant.

        The gradient of a function marked with ``once_differentiable`` comes without a graph: its
        share of the curvature would be zero without a word.
        """
        if compiling() or not isinstance(loss, Tensor) or loss.grad_fn is None:
            return
        for node in _graph([loss.grad_fn], set()):
            if _is_once_differentiable(node):
                raise LossError(
                    f"{node.name()} is the gradient of a torch.autograd.Function marked with "
                    f"@once_differentiable{self._place(node.name())}: it has no second "
                    "derivative. Use an implementation made of PyTorch's own operations for the "
                    "curvature."
                )

    def _explanation(self, error: Exception) -> str | None:
        """What an error of PyTorch's about second derivatives comes to; None for all others."""
        text = " ".join(str(error).split())
        if "does not currently support double backward" in text:
            return (
                "the loss runs code that AOTAutograd has compiled, which can be differentiated "
                f"once only{self._place('CompiledFunctionBackward')}. Use the module as it was "
                "before torch.compile: compiled._orig_mod is it."
            )
        if "derivative for aten::" in text and "is not implemented" in text:
            kernel = text.split("derivative for aten::", 1)[1].split(" ", 1)[0]
            return (
                f"the kernel aten::{kernel}{self._place(kernel)} has no second derivative in "
                "PyTorch. Use a layer or a setting with another kernel, or write it in terms of "
                "simpler operations; scaled_dot_product_attention outside of a scripted module "
                "is taken care of."
            )
        if "mutate a captured Tensor" in text:
            return (
                "the loss modifies a tensor in place that it did not make, such as a buffer of a "
                "module, which torch.func does not allow. Put the module into eval(), pass the "
                "buffer to functional_call beside the parameters, or use "
                'mode="reverse_over_reverse".'
            )
        if "use_reentrant=True" in text:
            return (
                "the loss uses torch.utils.checkpoint with use_reentrant=True, which knows "
                ".backward() only. Pass use_reentrant=False."
            )
        if "which are tied" in text:
            return (
                "params holds a tied parameter under two names, as two tensors. Leave one of them "
                "out, as dict(module.named_parameters()) does."
            )
        return None

    def _place(self, kernel: str) -> str:
        """In which layer a backward pass goes through a kernel, if it can be found."""
        with temporarily_clear_interpreter_stack(), torch.enable_grad():
            leaves = [unwrapped(leaf).requires_grad_() for leaf in self._leaves]
            batch = torch_pytree.tree_map_only(Tensor, unwrapped, self._batch)
            with twice_differentiable(Layers()), _Finder(kernel) as finder:
                self._function(self._layout.unflatten_leaves(leaves), *batch)
        return finder.place


def generators_of(device: torch.device) -> list[torch.Generator]:
    """PyTorch's own generators that an evaluation on a device may draw from."""
    generators = [torch.default_generator]
    if device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    elif device.type != "cpu" and hasattr(torch, device.type):
        module = torch.get_device_module(device)
        if hasattr(module, "init"):  # of CUDA and XPU, which have no generators before
            module.init()
        index = module.current_device() if device.index is None else device.index
        generators += getattr(module, "default_generators", ())[index : index + 1]
    return generators


def set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Put generators where they stood when their states were read."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed; the generators stand where they stood when it ends."""
    generators = generators_of(device)
    outside = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_states(generators, outside)


class _Finder:
    """Watches an evaluation for the layer whose gradient runs through a kernel."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.place = _plain_name(kernel), ""
        self._seen: set[Any] = set()
        self._running: list[torch.nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Finder:
        register = torch.nn.modules.module
        self._hooks = [
            register.register_module_forward_pre_hook(self._entered),
            register.register_module_forward_hook(self._left),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _entered(self, module: torch.nn.Module, inputs: Any) -> None:
        self._look_at(inputs, self._running[-1:])
        self._running.append(module)

    def _left(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self._look_at(outputs, [module])
        self._running.pop()

    def _look_at(self, values: Any, layer: list[torch.nn.Module]) -> None:
        """Look for the kernel among what has been computed since the last call."""
        nodes = [x.grad_fn for x in _tensors(values) if x.grad_fn is not None]
        found = [_plain_name(node.name()) == self.kernel for node in _graph(nodes, self._seen)]
        if any(found) and layer and not self.place:
            self.place = named(layer[0], [*self._running, *layer][0])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _plain_name(kernel: str) -> str:
    """One name for ``aten::_ctc_loss_backward`` and its node, ``CtcLossBackward0``."""
    return kernel.replace("_", "").lower().rstrip("0123456789")


def _graph(roots: Sequence[Any], seen: set[Any]) -> Iterator[Any]:
    """The nodes of a graph that have not been seen."""
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(nxt for nxt, _ in node.next_functions if nxt is not None)


def _is_once_differentiable(node: Any) -> bool:
    function = getattr(node, "_forward_cls", None)
    return function is not None and getattr(function.backward, "__code__", None) is _ONCE


_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__
