"""The point that an operator is made at, and the checks of losses there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    LossError,
    NonFiniteError,
    StaleOperatorError,
    UnusedParameterWarning,
    warn,
)
from ..pytree import TreeLayout, flat_batch, rebuilt_batch
from ..tracing import compiling
from ..transforms import carries_derivatives, unwrapped
from .base import LinearOperator


class Point:
    """The parameters and the batch that an operator was made with, and the tensors among them."""

    def __init__(self, params: Sequence[Tensor], batch: tuple[Any, ...]) -> None:
        self.params, self.batch = list(params), batch
        self._leaves, self._spec = flat_batch(batch)
        self._versions = [] if compiling() else [version_of(x) for x in self.tensors]

    @property
    def batch_tensors(self) -> list[Tensor]:
        """The tensors of the batch, wherever they are in it."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, then the tensors of the batch."""
        return self.params + self.batch_tensors

    def replaced(self, tensors: Sequence[Tensor]) -> Point:
        """The same point with other tensors."""
        count = len(self.params)
        rest = iter(tensors[count:])
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return Point(tensors[:count], rebuilt_batch(leaves, self._spec))

    def check_fresh(self, layout: TreeLayout) -> None:
        """Raise :class:`StaleOperatorError` if a tensor was modified in place since.

        Where the graph was built once products would be of the old values, where the loss is
        evaluated again of the new ones.
        """
        if compiling() or not self._versions:
            return
        count = len(self.params)
        for leaf, version, path in zip(self.params, self._versions, layout.paths, strict=False):
            if leaf._version != version:
                raise StaleOperatorError(
                    f"params{path} was modified in place after this operator was made. "
                    "Make a new operator after each optimiser step."
                )
        for leaf, version in zip(self.batch_tensors, self._versions[count:], strict=True):
            if version_of(leaf) != version:
                raise StaleOperatorError(
                    f"a tensor of the batch, of shape {tuple(leaf.shape)}, was modified in place "
                    "after this operator was made. Make a new operator for new data, or pass "
                    "copies."
                )

    def depends_on_more(self, operator: LinearOperator) -> bool:
        """Whether products are being differentiated though all listed tensors are constants."""
        constants = operator._with_tensors([unwrapped(x) for x in self.tensors])
        probe = torch.ones(1, operator.layout.dim, dtype=operator.dtype, device=operator.device)
        return carries_derivatives(lambda: constants._attached(probe))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place."""
    # Inference tensors have none.
    return 0 if tensor.is_inference() else tensor._version


def check_differentiable(leaves: list[Tensor]) -> None:
    """Raise where PyTorch's inference mode forbids derivatives."""
    if compiling():
        return
    if torch.is_inference_mode_enabled() or any(leaf.is_inference() for leaf in leaves):
        raise LossError(
            "params are inference tensors, or torch.inference_mode() is on: derivatives cannot be "
            "taken there. Leave inference mode, clone() its tensors, or use torch.no_grad()."
        )


def check_loss(loss: Any, name: str) -> Tensor:
    """Raise unless ``loss`` is a finite, real, scalar tensor that depends on something."""
    if not isinstance(loss, Tensor):
        raise LossError(f"{name} is a {type(loss).__name__}, expected a scalar torch.Tensor.")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise LossError(
            f"{name} has shape {tuple(loss.shape)} and dtype {loss.dtype}, expected one real "
            "number. Reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise LossError(
            f"{name} does not depend on params: it carries no gradient. loss_fn must compute it "
            "from its first argument with differentiable operations, without .detach(), .item() "
            "or torch.no_grad()."
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"{name} is {float(loss.detach())}; expected a finite number.")
    return loss.reshape(())


def check_dense(layout: TreeLayout, grads: Sequence[Tensor | None], name: str) -> None:
    """Raise where a layer, such as an embedding, has made a sparse gradient of a loss."""
    for grad, path in zip(grads, layout.paths, strict=True):
        if grad is not None and grad.layout is not torch.strided:
            raise LossError(
                f"the gradient of {name} in params{path} is sparse ({grad.layout}), expected a "
                "dense one. Make its layer without sparse gradients: torch.nn.Embedding(..., "
                "sparse=False)."
            )


def report_unused(layout: TreeLayout, unused: list[bool], name: str) -> None:
    """Raise if no leaf is used, warn if some are not; ``name`` is what should depend on them."""
    names = [path or "the tensor" for path, no in zip(layout.paths, unused, strict=True) if no]
    if len(names) == len(unused):
        raise LossError(
            f"{name} does not depend on params at all. It must be computed from the function's "
            "first argument; a model called directly uses its own parameters instead: call it "
            "with torch.func.functional_call(model, params, inputs)."
        )
    if names:
        warn(
            f"{name} does not depend on {', '.join(names)}: its curvature there is zero. "
            "Leave unused or frozen parameters out of params.",
            UnusedParameterWarning,
        )
