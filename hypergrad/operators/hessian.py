"""Hessian-vector products of a loss over any tree of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import (
    LossError,
    NonFiniteError,
    SolverOptionError,
    StaleOperatorError,
    UnusedParameterWarning,
    warn,
)
from ..pytree import Tree, TreeLayout
from ..transforms import (
    building_no_graph,
    carries_derivatives,
    forward_mode,
    reaches_beyond,
    tangents,
    transforming,
    unwrapped,
)
from .base import LinearOperator
from .evaluation import Evaluation

#: Fewer vectors than this go through the graph one by one.
_WORTH_A_BATCH = 4
#: As many numbers of directions go through the graph at once, at most: memory grows with them, and
#: large parameters gain nothing.
_BATCH_NUMBERS = 2**22

Mode = Literal["auto", "reverse_over_reverse", "forward_over_reverse"]


class HessianOperator(LinearOperator):
    """The Hessian of ``loss_fn(params, *batch)`` in ``params``; made by :func:`hessian`."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        mode: Mode = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        if mode not in get_args(Mode):
            raise SolverOptionError(f"mode is {mode!r}, expected one of {get_args(Mode)}.")
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise SolverOptionError(
                f"chunk_size is {chunk_size!r}, expected None or an integer >= 1."
            )
        self.loss_fn, self.batch, self.mode, self.chunk_size = loss_fn, batch, mode, chunk_size
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self._point = Point(originals, batch)
        self._evaluating = Evaluation(loss_fn, self.layout, originals, batch)
        self._batches = True
        self._built: _Built | None = None
        self._more: bool | None = None
        if not building_no_graph():  # a solve builds it later, from the plain tensors
            self._build()

    @property
    def loss(self) -> Tensor:
        """The loss at the parameters, detached."""
        return self._build().loss

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradient by leaf, with its graph; None for leaves that the loss does not use.

        Leaves in which the loss is linear have a gradient without a graph: their rows are zero.
        """
        return self._build().gradients

    def _build(self) -> _Built:
        """The graph of the gradient, once."""
        if self._built is None:
            # Fresh leaves that share storage: the caller's flags and .grad stay untouched.
            leaves = [leaf.detach().requires_grad_() for leaf in self._point.params]
            params = self.layout.unflatten_leaves(leaves)
            with torch.enable_grad(), self._evaluating():
                loss = check_loss(self.loss_fn(params, *self.batch), "the loss")
                self._evaluating.check(loss)
                grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            report_unused(self.layout, [grad is None for grad in grads], "the loss")
            self._built = _Built(loss.detach(), leaves, grads)
        return self._built

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built, other._more = self._point.replaced(tensors), None, None
        other.batch = other._point.batch
        return other

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction

    def _depends_on_more(self) -> bool:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        if self._more is None:
            built = self._build()
            known = built.leaves + [x for x in self._point.batch_tensors if x.requires_grad]
            self._more = reaches_beyond([x for x in built.gradients if x is not None], known)
        return self._more

    def _attached(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph() or tangents():
            return self._functional(block)
        # Each leaf by itself: what else depends on it, such as the batch, stands still.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in self._point.params
        ]
        with torch.enable_grad(), self._evaluating():
            loss = check_loss(
                self.loss_fn(self.layout.unflatten_leaves(leaves), *self.batch), "the loss"
            )
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            return torch.stack([self._pulled(grads, leaves, row, create=True) for row in block])

    def _functional(self, block: Tensor) -> Tensor:
        """Reverse-over-reverse products by ``torch.func``, where plain autograd may not run."""
        point = self.layout.unflatten_leaves(self._point.params)
        gradient = torch.func.grad(lambda params: self.loss_fn(params, *self.batch).reshape(()))
        with self._evaluating():
            pull = torch.func.vjp(gradient, point)[1]
        rows = []
        for row in block.unbind():
            with self._evaluating.product():
                (product,) = pull(self.layout.unflatten(row))
            leaves = self.layout.leaves_unchecked(product)
            rows.append(torch.cat([x.reshape(-1).to(self.dtype) for x in leaves]))
        return torch.stack(rows)

    def _apply(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if self.mode == "forward_over_reverse":
            return self._forward_over_reverse(block)
        if building_no_graph():
            return self._functional(block).detach()
        if self.mode == "auto" and self._batches and len(block) >= _WORTH_A_BATCH:
            try:
                return self._reverse_in_batches(block)
            except RuntimeError as error:
                # Too little memory, or an operation that vmap cannot batch, if the loop gets
                # through; if not, the fault is another, and both errors are shown.
                try:
                    products = self._reverse_one_by_one(block)
                except RuntimeError as fault:
                    raise fault from error
                self._batches = False
                return products
        return self._reverse_one_by_one(block)

    def _reverse_one_by_one(self, block: Tensor) -> Tensor:
        built = self._build()
        rows = [self._pulled(built.gradients, built.leaves, row).detach() for row in block]
        return torch.stack(rows)

    def _reverse_in_batches(self, block: Tensor) -> Tensor:
        built = self._build()
        size = self.chunk_size or max(1, _BATCH_NUMBERS // self.layout.dim)
        parts = [
            self._pulled(built.gradients, built.leaves, part, batched=True).detach()
            for part in torch.split(block, size)
        ]
        return torch.cat(parts)

    def _pulled(
        self,
        gradients: Sequence[Tensor | None],
        leaves: list[Tensor],
        vectors: Tensor,
        *,
        batched: bool = False,
        create: bool = False,
    ) -> Tensor:
        """d/dp <grad(p), v> on the kept graph of the gradient: one backward pass a product.

        ``vectors`` is one of shape (n,), or with ``batched`` a block that goes through the graph at
        once, by ``vmap``.
        """
        lead = tuple(vectors.shape[:1]) if batched else ()
        directions = self.layout.split(vectors, lead)
        pairs = [
            (grad, direction)
            for grad, direction in zip(gradients, directions, strict=True)
            if grad is not None and grad.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vectors)
        with self._evaluating.product():
            products = torch.autograd.grad(
                [grad for grad, _ in pairs],
                leaves,
                grad_outputs=[direction for _, direction in pairs],
                retain_graph=True,
                create_graph=create,
                is_grads_batched=batched,
                allow_unused=True,
                materialize_grads=True,
            )
        # Leaves that the products do not reach have plain zeros, without the leading dimension.
        flat = [
            product.expand(lead + shape).reshape((*lead, -1)).to(self.dtype)
            for product, shape in zip(products, self.layout.shapes, strict=True)
        ]
        return torch.cat(flat, dim=-1)

    def _forward_over_reverse(self, block: Tensor) -> Tensor:
        """Forward-mode products of the gradient, batched over the block by vmap."""
        point = self.layout.unflatten_leaves([leaf.detach() for leaf in self._point.params])
        gradient = torch.func.grad(lambda params: self.loss_fn(params, *self.batch).reshape(()))

        def product(vector: Tensor) -> Tensor:
            tangent = self.layout.unflatten(vector)
            with self._evaluating():
                directional = torch.func.jvp(gradient, (point,), (tangent,))[1]
            return torch.cat(
                [x.reshape(-1).to(self.dtype) for x in self.layout.leaves_unchecked(directional)]
            )

        with forward_mode("the loss", remedy='mode="reverse_over_reverse"'):
            products = torch.func.vmap(product, chunk_size=self.chunk_size, randomness="same")
            return products(block).detach()


@dataclass(frozen=True, eq=False)
class _Built:
    """The gradient at a point, with its graph."""

    loss: Tensor
    leaves: list[Tensor]
    gradients: tuple[Tensor | None, ...]


class Point:
    """The parameters and the batch that an operator was made with, and the tensors among them."""

    def __init__(self, params: Sequence[Tensor], batch: tuple[Any, ...]) -> None:
        self.params, self.batch = list(params), batch
        self._leaves, self._spec = torch_pytree.tree_flatten(batch)
        compiling = torch.compiler.is_compiling()
        self._versions = [] if compiling else [leaf._version for leaf in self.params]

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
        batch = torch_pytree.tree_unflatten(leaves, self._spec)
        return Point(tensors[:count], batch)

    def check_fresh(self, layout: TreeLayout) -> None:
        """Raise :class:`StaleOperatorError` if the parameters were modified in place since."""
        if torch.compiler.is_compiling():
            return
        for leaf, version, path in zip(self.params, self._versions, layout.paths, strict=True):
            if leaf._version != version:
                raise StaleOperatorError(
                    f"params{path} was modified in place after this operator was made. "
                    "Make a new operator after each optimiser step."
                )

    def depends_on_more(self, operator: LinearOperator) -> bool:
        """Whether products are being differentiated though all listed tensors are constants."""
        constants = operator._with_tensors([unwrapped(x) for x in self.tensors])
        probe = torch.ones(1, operator.layout.dim, dtype=operator.dtype, device=operator.device)
        return carries_derivatives(lambda: constants._attached(probe))


def hessian(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> HessianOperator:
    """The Hessian of ``loss_fn(params, *batch)`` with respect to ``params``, as an operator.

    Args:
        loss_fn: returns a real scalar tensor, computed from its first argument.
        params: any tree of floating-point tensors, such as ``dict(module.named_parameters())``
            (call the module with ``torch.func.functional_call``).
        *batch: passed on to ``loss_fn``.
        mode: ``"reverse_over_reverse"`` builds the graph of the gradient once and costs one
            backward pass through it a product; ``"forward_over_reverse"`` recomputes the
            gradient with tangents and batches many vectors with ``vmap``; ``"auto"`` is the
            first, with blocks of vectors batched through the graph where ``vmap`` supports the
            model's operations and one by one where not: it works for every double-differentiable
            model.
        chunk_size: how many vectors are carried at a time where they are batched; None for all,
            or with ``"auto"`` for as many as hold four million numbers.

    Returns:
        An operator at the values that ``params`` had when it was made.  It keeps the graph of
        the gradient alive; ``.loss`` is the loss there.  Changes through ``param.data`` go
        unseen and give products of neither point: update under ``torch.no_grad()`` instead.

    Raises:
        LossError: the loss is no real scalar tensor, or does not depend on ``params``.
        NonFiniteError: the loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` have been modified in place since.

    Warns:
        UnusedParameterWarning: the loss does not depend on some leaves; their rows are zero.

    Cost: one forward pass and one gradient with a graph when made; then a product is worth about
    two gradients.  Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural
    Computation 6 (1994).

    Examples:
        >>> import torch, hypergrad
        >>> x, y = torch.eye(3), torch.zeros(3)
        >>> loss = lambda p, x, y: ((x @ p["w"] - y) ** 2).sum()
        >>> h = hypergrad.hessian(loss, {"w": torch.ones(3)}, x, y)
        >>> h @ {"w": torch.tensor([1.0, 2.0, 3.0])}
        {'w': tensor([2., 4., 6.])}
    """
    return HessianOperator(loss_fn, params, batch, mode=mode, chunk_size=chunk_size)


def check_differentiable(leaves: list[Tensor]) -> None:
    """Raise where PyTorch's inference mode forbids derivatives."""
    if torch.compiler.is_compiling():
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
