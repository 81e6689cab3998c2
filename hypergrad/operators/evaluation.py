"""How a loss is evaluated: twice differentiable, as one fixed function, leaving modules alone.

What is done to it, and undone at the end of each evaluation:

- fused attention gives way to its plain form, as the fused kernels have no second derivative;
- recurrent layers run without cuDNN and oneDNN, which lack some of the derivatives;
- what ``torch.compile`` made of a module runs as it was written: AOTAutograd differentiates once;
- BatchNorm and InstanceNorm in training mode leave their running statistics as they are;
- random layers draw the same numbers in every evaluation, so that the operator is one matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from ..errors import HypergradError, LossError
from ..pytree import TreeLayout
from ..transforms import unwrapped


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
        self._layers: _Layers | None = None

    def __call__(self) -> AbstractContextManager[None]:
        """The setting of an evaluation."""
        if not torch.compiler.is_compiling():
            return self._evaluation()
        # The one part that torch.compile can trace; it refuses what cannot be differentiated twice.
        return sdpa_kernel([SDPBackend.MATH])

    def product(self) -> AbstractContextManager[None]:
        """The setting of a backward pass through the graph that an evaluation has left."""
        if torch.compiler.is_compiling():
            return nullcontext()
        # Checkpoints evaluate parts of the loss again then, with the kernels of the first time.
        again = self._layers is not None and self._layers.saved_elsewhere
        return self._evaluation() if again else self._explained()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        first = self._layers is None
        if self._layers is None:
            self._layers = _Layers()
        generators = generators_of(self._layout.device) if first or self._draws else []
        outside = [generator.get_state() for generator in generators]
        if self._draws:
            _set_states(generators, self._draws)
        try:
            # The function is the same each time: layers that it has not met it will not meet.
            met = self._layers if first or self._layers.met else None
            with self._explained(), twice_differentiable(met):
                yield
        finally:
            if self._draws:
                _set_states(generators, outside)
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
        if torch.compiler.is_compiling() or not isinstance(loss, Tensor) or loss.grad_fn is None:
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
            with twice_differentiable(_Layers()), _Finder(kernel) as finder:
                self._function(self._layout.unflatten_leaves(leaves), *self._batch)
        return finder.place


def generators_of(device: torch.device) -> list[torch.Generator]:
    """PyTorch's own generators that an evaluation on a device may draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators


def _set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
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
        _set_states(generators, outside)


@contextmanager
def twice_differentiable(layers: _Layers | None) -> Iterator[None]:
    """Kernels that can be differentiated twice, and layers run as ``layers`` says, if given."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes long
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_plain_attention())
        if layers is not None:
            stack.enter_context(layers)
        yield


@contextmanager
def _plain_attention() -> Iterator[None]:
    # torch.nn.attention.sdpa_kernel does the same, at ten times the cost.
    cuda: Any = torch.backends.cuda
    switches = (
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled(), False),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled(), False),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled(), False),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled(), True),
    )
    for switch, _, wanted in switches:
        switch(wanted)
    try:
        yield
    finally:
        for switch, before, _ in switches:
            switch(before)


class _Layers(TorchFunctionMode):
    """Runs the operations of some layers in another way.

    While it is active the inference-only kernels of ``nn.TransformerEncoderLayer`` and
    ``nn.MultiheadAttention``, which have no derivatives, are off: PyTorch sees to that.

    Attributes:
        met: whether there was such an operation.
        saved_elsewhere: whether there was one whose tensors for the backward pass are not kept in
            the graph but packed away, or computed again, by hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = self.saved_elsewhere = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        special = _SPECIAL.get(func)
        if special is None:
            return func(*args, **(kwargs or {}))
        self.met = True
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self.saved_elsewhere = True
        return special(sys._getframe(1), func, args, kwargs or {})


def _attention(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    with _plain_attention():  # once more: the model may have asked for a kernel itself
        return func(*args, **kwargs)


def _recurrent(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    # oneDNN's, on the CPU, lacks the forward-mode derivative.  (The public switch for it warns of
    # other flags that it touches.)
    one_dnn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(one_dnn)


def _batch_norm(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs["training"]:  # the batch's statistics count, the running ones are only moved
        args = (args[0], None, None)
    return func(*args, **kwargs)


def _instance_norm(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs["use_input_stats"]:
        kwargs = {**kwargs, "running_mean": None, "running_var": None}
    return func(*args, **kwargs)


def _in_batch_norm(frame: FrameType) -> bool:
    return frame.f_code in _BATCH_NORMS


def _add_in_place(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    # The layer's count of batches stays where it is ...
    return args[0] if _in_batch_norm(frame) else func(*args, **kwargs)


def _to_number(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    # ... and a cumulative average divides by it, though nothing is averaged here.
    return func(*args, **kwargs) + (1.0 if _in_batch_norm(frame) else 0.0)


def _random(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    # Numbers are drawn in the order of the memory, which under torch.func is not always that of
    # plain autograd: a mask would be another one in another mode.
    layer_input = args[0]
    if not kwargs.get("inplace"):
        return func(layer_input.contiguous(), *args[1:], **kwargs)
    return layer_input.copy_(
        func(layer_input.contiguous(), *args[1:], **{**kwargs, "inplace": False})
    )


def _normalize(frame: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("out") is not None and _SPECTRAL_NORM in [f.f_code for f in _callers(frame)]:
        raise LossError(
            f"spectral_norm in training mode{_layer(frame)} moves its vectors at each evaluation: "
            "the loss is another function each time. Put the module into eval()."
        )
    return func(*args, **kwargs)


_BATCH_NORMS = (
    torch.nn.modules.batchnorm._BatchNorm.forward.__code__,
    torch.nn.SyncBatchNorm.forward.__code__,
)
_SPECTRAL_NORM = parametrizations._SpectralNorm._power_method.__code__

#: What some operations are replaced by: (the caller's frame, the operation, its arguments).
_SPECIAL: dict[Any, Callable[[FrameType, Any, Any, Any], Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.normalize: _normalize,
    Tensor.add_: _add_in_place,
    Tensor.__float__: _to_number,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((F.dropout, F.alpha_dropout, torch.rand_like, torch.randn_like), _random),
}


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
            self.place = _named(layer[0], [*self._running, *layer][0])


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


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _layer(frame: FrameType | None) -> str:
    """The module that is running."""
    running = [f.f_locals.get("self") for f in _callers(frame)]
    modules = [module for module in running if isinstance(module, torch.nn.Module)]
    return _named(modules[0], modules[-1]) if modules else ""


def _named(inner: torch.nn.Module, outer: torch.nn.Module) -> str:
    """A module by its name in another one: " (layer 'a.b', LSTM)"."""
    name = next((name for name, module in outer.named_modules() if module is inner), "")
    return f" (layer {name!r}, {type(inner).__name__})" if name else f" ({type(inner).__name__})"
