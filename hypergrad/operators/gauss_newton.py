"""Generalised Gauss-Newton products: positive semi-definite curvature of a model and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LossError, NonFiniteError, SolverOptionError, StaleOperatorError
from ..pytree import Tree, TreeLayout
from .base import LinearOperator
from .hessian import check_differentiable, report_unused


class GaussNewtonOperator(LinearOperator):
    """J' (d2 loss / d outputs2) J; made by :func:`ggn`."""

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        loss_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        if not batch:
            raise LossError(
                "ggn needs at least the model's inputs: ggn(model_fn, loss_fn, params, inputs, "
                "*targets) with model_fn(params, inputs) and loss_fn(outputs, *targets)."
            )
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise SolverOptionError(
                f"chunk_size is {chunk_size!r}, expected None or an integer >= 1."
            )
        inputs, targets = batch[0], batch[1:]
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self._versions = [(leaf, leaf._version) for leaf in originals]
        self._point = self.layout.unflatten_leaves([leaf.detach() for leaf in originals])
        self._model: Callable[[Tree], Any] = lambda p: model_fn(p, inputs)
        report_unused(self.layout, self._unused(), "the output of model_fn")
        pass_forward = torch.func.vjp(self._model, self._point)
        self._outputs, self._pull_back = pass_forward[0], pass_forward[1]
        loss = loss_fn(self._outputs, *targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(f"loss_fn returned {got}, expected a scalar torch.Tensor.")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}; expected a finite number.")
        # The Hessian is symmetric, so reverse mode serves; some losses of PyTorch (mse_loss,
        # huber_loss) have no other through their gradients.
        loss_gradient = torch.func.grad(lambda outputs: loss_fn(outputs, *targets))
        self._loss_hessian = torch.func.vjp(loss_gradient, self._outputs)[1]
        self.chunk_size = chunk_size

    def _unused(self) -> list[bool]:
        # torch.func gives zeros for parameters that the model ignores; autograd tells them apart.
        leaves = [leaf.detach().requires_grad_() for leaf, _ in self._versions]
        with torch.enable_grad():
            outputs = self._model(self.layout.unflatten_leaves(leaves))
            if not isinstance(outputs, Tensor):
                raise LossError(
                    f"model_fn returned a {type(outputs).__name__}, expected one torch.Tensor."
                )
            used: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if outputs.requires_grad:
                used = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
        return [grad is None for grad in used]

    def _product(self, vector: Tensor) -> Tensor:
        tangent = self.layout.unflatten(vector)
        pushed = torch.func.jvp(self._model, (self._point,), (tangent,))[1]
        (weighted,) = self._loss_hessian(pushed)
        (pulled,) = self._pull_back(weighted)
        return torch.cat(
            [x.reshape(-1).to(self.dtype) for x in self.layout.leaves_unchecked(pulled)]
        )

    def _apply(self, block: Tensor) -> Tensor:
        for (leaf, version), path in zip(self._versions, self.layout.paths, strict=True):
            if leaf._version != version:
                raise StaleOperatorError(
                    f"params{path} was modified in place after this operator was made. "
                    "Make a new operator after each optimiser step."
                )
        if block.shape[0] == 1:
            return self._product(block[0]).detach()[None]
        return torch.func.vmap(self._product, chunk_size=self.chunk_size)(block).detach()


def ggn(
    model_fn: Callable[..., Tensor],
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    chunk_size: int | None = None,
) -> GaussNewtonOperator:
    """The generalised Gauss-Newton matrix J' H J of ``loss_fn(model_fn(params, inputs), ...)``.

    J is the Jacobian of the model's outputs in ``params`` and H the Hessian of the loss in the
    outputs, so the operator is positive semi-definite whenever the loss is convex in them.

    Args:
        model_fn: ``model_fn(params, inputs) -> outputs``, one tensor of any shape.
        loss_fn: ``loss_fn(outputs, *targets) -> scalar``; its reduction (mean or sum) counts.
        params: any tree of floating-point tensors.
        *batch: ``inputs`` first, then what ``loss_fn`` needs.
        chunk_size: how many vectors are carried at a time in a block of products.

    Raises:
        LossError: no inputs, outputs that are no tensor or do not depend on ``params``, or a loss
            that is no scalar.
        NonFiniteError: the loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` have been modified in place since.

    Warns:
        UnusedParameterWarning: the outputs do not depend on some leaves; their rows are zero.

    Cost: one gradient and one forward pass when made.  A product is one forward-mode pass, one
    product with H and one reverse pass, about two gradients.
    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14 (2002).

    Examples:
        >>> import torch, hypergrad
        >>> model = lambda p, x: x @ p
        >>> loss = lambda out, y: 0.5 * ((out - y) ** 2).sum()
        >>> g = hypergrad.ggn(model, loss, torch.zeros(2), torch.eye(2) * 3, torch.ones(2))
        >>> g @ torch.tensor([1.0, 2.0])
        tensor([ 9., 18.])
    """
    return GaussNewtonOperator(model_fn, loss_fn, params, batch, chunk_size=chunk_size)
