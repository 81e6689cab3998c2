"""Generalised Gauss-Newton products: positive semi-definite curvature of a model and a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LossError, NonFiniteError, SolverOptionError
from ..pytree import Tree, TreeLayout
from ..transforms import building_no_graph, reaches_beyond, tangents, transforming
from .base import LinearOperator
from .evaluation import Evaluation
from .hessian import Point, check_differentiable, report_unused


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
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self.model_fn, self.loss_fn, self.chunk_size = model_fn, loss_fn, chunk_size
        self._point = Point(originals, batch)
        self._evaluating = Evaluation(model_fn, self.layout, originals, batch[:1])
        self._built: _Built | None = None
        self._more: bool | None = None
        if not building_no_graph():  # a solve builds it later, from the plain tensors
            self._build()

    def _functions(self) -> tuple[Callable[[Tree], Any], Callable[[Tensor], Any]]:
        """The outputs of the parameters, and the loss of the outputs."""
        inputs, targets = self._point.batch[0], self._point.batch[1:]
        return lambda p: self.model_fn(p, inputs), lambda out: self.loss_fn(out, *targets)

    def _build(self) -> _Built:
        """The product, linearised once at the detached parameters."""
        if self._built is None:
            model, loss_fn = self._functions()
            report_unused(self.layout, self._unused(model), "the output of model_fn")
            point = [leaf.detach() for leaf in self._point.params]
            with torch.enable_grad():
                outputs, product = self._linearised(point)
                loss = loss_fn(outputs)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise LossError(f"loss_fn returned {got}, expected a scalar torch.Tensor.")
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is {float(loss)}; expected a finite number.")
            self._built = _Built(outputs, loss, product)
        return self._built

    def _unused(self, model: Callable[[Tree], Any]) -> list[bool]:
        # torch.func gives zeros for parameters that the model ignores; autograd tells them apart.
        leaves = [leaf.detach().requires_grad_() for leaf in self._point.params]
        with torch.enable_grad(), self._evaluating():
            outputs = model(self.layout.unflatten_leaves(leaves))
            if not isinstance(outputs, Tensor):
                raise LossError(
                    f"model_fn returned a {type(outputs).__name__}, expected one torch.Tensor."
                )
            used: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if outputs.requires_grad:
                used = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
        return [grad is None for grad in used]

    def _linearised(self, params: list[Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The model's outputs at ``params``, and the product with a flat vector there."""
        model, loss_fn = self._functions()
        point = self.layout.unflatten_leaves(params)
        with self._evaluating():
            passed = torch.func.vjp(model, point)
        outputs, pull_back = passed[0], passed[1]
        loss_hessian: list[Callable[[Tensor], Any]] = []

        def product(vector: Tensor) -> Tensor:
            if not loss_hessian:
                # The Hessian is symmetric, so reverse mode serves; some losses of PyTorch
                # (mse_loss, huber_loss) have no other through their gradients.
                loss_hessian.append(torch.func.vjp(torch.func.grad(loss_fn), outputs)[1])
            tangent = self.layout.unflatten(vector)
            with self._evaluating():
                pushed = torch.func.jvp(model, (point,), (tangent,))[1]
                (weighted,) = loss_hessian[0](pushed)
                (pulled,) = pull_back(weighted)
            return torch.cat(
                [x.reshape(-1).to(self.dtype) for x in self.layout.leaves_unchecked(pulled)]
            )

        return outputs, product

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built, other._more = self._point.replaced(tensors), None, None
        return other

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction

    def _depends_on_more(self) -> bool:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        if self._more is None:
            built = self._build()
            known = [x for x in self._point.batch_tensors if x.requires_grad]
            self._more = reaches_beyond([built.outputs, built.loss], known)
        return self._more

    def _attached(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        product = self._linearised(self._point.params)[1]
        return torch.func.vmap(product, randomness="same")(block)

    def _apply(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph():
            return self._attached(block).detach()
        product = self._build().product
        if block.shape[0] == 1:
            return product(block[0]).detach()[None]
        products = torch.func.vmap(product, chunk_size=self.chunk_size, randomness="same")
        return products(block).detach()


@dataclass(frozen=True, eq=False)
class _Built:
    """What one pass through the model and the loss leaves behind."""

    outputs: Tensor
    loss: Tensor
    product: Callable[[Tensor], Tensor]


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
