"""Layers that PyTorch differentiates once only, or that have a state, run in another way.

- Fused attention gives way to its plain form, as the fused kernels have no second derivative.
- Recurrent layers run without cuDNN and oneDNN, which lack some of the derivatives.
- What ``torch.compile`` made of a module runs as it was written: AOTAutograd differentiates once.
- BatchNorm and InstanceNorm in training mode leave their running statistics as they are.
- Random layers draw in an order that does not depend on how memory is laid out.

All of it ends with the evaluation, and nothing of a module is modified.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from ..errors import LossError
from ..tracing import compiling


def plain_layers(layers: Layers | None = None) -> AbstractContextManager[None]:
    """The setting of losses that no operator evaluates: those of bilevel problems.

    It goes around the backward pass, too, in which checkpoints evaluate parts of the loss again:
    with the same ``layers``, where it is not the same setting.
    """
    if compiling():
        return sdpa_kernel([SDPBackend.MATH])  # all that torch.compile can trace
    if layers is None:
        layers = Layers()
    # A loss is the same function each time: layers that it has not met it will not meet.
    return twice_differentiable(layers if layers.met or not layers.entered else None)


@contextmanager
def twice_differentiable(layers: Layers | None) -> Iterator[None]:
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


class Layers(TorchFunctionMode):
    """Runs the operations of some layers in another way.

    While it is active the inference-only kernels of ``nn.TransformerEncoderLayer`` and
    ``nn.MultiheadAttention``, which have no derivatives, are off: PyTorch sees to that.

    Attributes:
        met: whether there was such an operation.
        entered: whether it was active before, without an error.
        saved_elsewhere: whether there was one whose tensors for the backward pass are not kept in
            the graph but packed away, or computed again, by hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = self.entered = self.saved_elsewhere = False
        #: Running statistics within checkpoints, which evaluate again where no mode sees it.
        self._statistics: list[Tensor] = []
        self._before: list[list[Tensor]] = []  # where they stood, for each time that it is active

    def __enter__(self) -> Layers:
        self._before.append([x.clone() for x in self._statistics])
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.entered |= error[0] is None
        for own, before in zip(self._statistics, self._before.pop(), strict=False):
            if not torch.equal(own, before):
                # By .data, as they are saved in graphs that do not look at their values.
                own.data.copy_(before)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        special = _SPECIAL.get(func)
        if special is None:
            return func(*args, **(kwargs or {}))
        self.met = True
        frame, kwargs = sys._getframe(1), kwargs or {}
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self.saved_elsewhere = True
            if func is F.batch_norm and kwargs["training"]:
                copies: Any = map(self._copied, args[1:])
                return func(args[0], *copies, **kwargs)
            if func is F.instance_norm and kwargs["use_input_stats"]:
                own = {x: self._copied(kwargs.get(x)) for x in ("running_mean", "running_var")}
                return func(*args, **{**kwargs, **own})
            if func is Tensor.add_ and _in_batch_norm(frame):
                self._copied(args[0])
        return special(frame, func, args, kwargs)

    def _copied(self, statistic: Tensor | None) -> Tensor | None:
        # A checkpoint evaluates again within torch.autograd.grad, of which a mode sees the call and
        # nothing inside, and compares what is saved then: it has to be as many tensors of the same
        # shapes.  So the layer gets copies now, and its own are put back in the end.
        if statistic is None:
            return None
        if not any(statistic is known for known in self._statistics):
            self._statistics.append(statistic)
            for before in self._before:
                before.append(statistic.clone())
        return statistic.clone()


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
    if kwargs.get("out") is not None and any(f.f_code in _SPECTRAL_NORMS for f in _callers(frame)):
        raise LossError(
            f"spectral_norm in training mode{_layer(frame)} moves its vectors at each evaluation: "
            "the loss is another function each time. Put the module into eval()."
        )
    return func(*args, **kwargs)


_BATCH_NORMS = (
    torch.nn.modules.batchnorm._BatchNorm.forward.__code__,
    torch.nn.SyncBatchNorm.forward.__code__,
)
_SPECTRAL_NORMS = (
    parametrizations._SpectralNorm._power_method.__code__,
    SpectralNorm.compute_weight.__code__,
)

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


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _layer(frame: FrameType | None) -> str:
    """The module that is running."""
    running = [f.f_locals.get("self") for f in _callers(frame)]
    modules = [module for module in running if isinstance(module, torch.nn.Module)]
    return named(modules[0], modules[-1]) if modules else ""


def named(inner: torch.nn.Module, outer: torch.nn.Module) -> str:
    """A module by its name in another one: " (layer 'a.b', LSTM)"."""
    name = next((name for name, module in outer.named_modules() if module is inner), "")
    return f" (layer {name!r}, {type(inner).__name__})" if name else f" ({type(inner).__name__})"
