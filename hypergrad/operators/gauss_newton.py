"""Generalised Gauss-Newton products: positive semi-definite curvature of a model and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..errors import LossError, NegativeCurvatureError, NonFiniteError
from ..precision import working_dtype
from ..pytree import Tree
from ..tracing import compiling
from ..transforms import building_no_graph
from .compilation import check_compile, compiled_products, is_compiled, signature_of
from .outputs import OutputOperator, Weight


class GaussNewtonOperator(OutputOperator):
    """J' (d2 loss / d outputs2) J; made by :func:`ggn`."""

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        loss_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        chunk_size: int | None = None,
        check_convex: bool = False,
        compile: bool = False,
    ) -> None:
        check_compile(compile)
        if not batch:
            raise LossError(
                "ggn needs at least the model's inputs: ggn(model_fn, loss_fn, params, inputs, "
                "*targets) with model_fn(params, inputs) and loss_fn(outputs, *targets)."
            )
        super().__init__(model_fn, params, batch, chunk_size=chunk_size)
        self.loss_fn, self.compile = loss_fn, compile
        if building_no_graph():  # a solve builds it later, from the plain tensors
            return
        if check_convex:
            self._roots(self.outputs)
        elif not (compile and is_compiled(self)):  # else it was looked at, and may not be needed
            self._build()

    def _signature(self) -> Hashable:
        return signature_of(self, self._point.batch, self.model_fn, self.loss_fn)

    def _apply(self, block: Tensor) -> Tensor:
        if self.compile and not building_no_graph():
            return compiled_products(self, block, self._eager)
        return super()._apply(block)

    def _eager(self, block: Tensor) -> Tensor:
        return super()._apply(block)

    def _loss(self, outputs: Tensor) -> Tensor:
        return self.loss_fn(outputs, *self._point.batch[1:])

    def _checked(self, outputs: Tensor) -> list[Tensor]:
        loss = self._loss(outputs)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(f"loss_fn returned {got}, expected a scalar torch.Tensor.")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}; expected a finite number.")
        return [loss]

    def _weight(self, outputs: Tensor) -> Weight:
        return _hessian_of(self._loss, outputs)

    def _roots(self, outputs: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(self._blocks(outputs.detach()))
        if not compiling():
            self._check_convex(values, outputs)
            # Directions without curvature, such as the one that softmax does not see, need no row.
            floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().max()
            seen = max(int((values > floor).sum(dim=-1).max()), 1)
            values, vectors = values[:, -seen:], vectors[..., -seen:]
        roots: Tensor = values.clamp(min=0.0).sqrt()[..., None] * vectors.mT
        return roots

    def _check_convex(self, values: Tensor, outputs: Tensor) -> None:
        """Raise unless the loss is convex at the outputs, to rounding."""
        smallest, largest = float(values.min()), float(values.abs().max())
        eps = torch.finfo(values.dtype).eps
        if smallest >= -(eps**0.25) * largest:
            return
        # Where a softmax is sure of every sample, rounding is all that is left of p - p^2.  It is
        # that of p: of the size of the curvature where nothing is sure.
        elsewhere = float(self._blocks(torch.zeros_like(outputs)).abs().max())
        if math.isfinite(elsewhere) and smallest >= -100 * eps * elsewhere:
            return
        sample = int(values.amin(dim=-1).argmin())
        where = f" (sample {sample})" if len(values) > 1 else ""
        raise NegativeCurvatureError(
            f"loss_fn is not convex in the outputs: its Hessian there has an eigenvalue of "
            f"{smallest:.3g}{where}, the largest magnitude being {largest:.3g}. The Gauss-Newton "
            "matrix is then not positive semi-definite and has no factor F'F: use a convex loss, "
            "hypergrad.hessian with MINRES, or raise damping with CG."
        )

    def _blocks(self, outputs: Tensor) -> Tensor:
        """The Hessian of the loss in the outputs, shape (groups, c, c), in the working dtype.

        One group a sample where no two samples are coupled, else one group of all outputs.
        """
        # Where a softmax is sure, p - p^2 cancels: a wide dtype keeps what is left.
        wide = outputs.to(working_dtype(outputs.dtype, outputs.device))
        targets = [_widened(x, outputs.dtype, wide.dtype) for x in self._point.batch[1:]]
        try:
            product = _hessian_of(lambda out: self.loss_fn(out, *targets), wide)
            return _blocks_of(product, wide)
        except RuntimeError as error:
            # Such as a tensor of the outputs' own dtype in the loss's closure.
            if wide.dtype == outputs.dtype or isinstance(error, torch.OutOfMemoryError):
                raise
        return _blocks_of(self._weight(outputs), outputs).to(wide.dtype)


def _hessian_of(loss_fn: Callable[[Tensor], Tensor], outputs: Tensor) -> Weight:
    # The Hessian is symmetric, so reverse mode serves; some losses of PyTorch (mse_loss,
    # huber_loss) have no other through their gradients.
    pull = torch.func.vjp(torch.func.grad(loss_fn), outputs)[1]

    def product(tangent: Tensor) -> Tensor:
        weighted: Tensor = pull(tangent)[0]
        return weighted

    return product


def _widened(target: Any, narrow: torch.dtype, wide: torch.dtype) -> Any:
    return target.to(wide) if isinstance(target, Tensor) and target.dtype == narrow else target


def _blocks_of(product: Weight, outputs: Tensor) -> Tensor:
    """Blocks on the diagonal of a symmetric matrix on outputs, that outside of which it is zero."""
    count = outputs.shape[0] if outputs.ndim else 1
    groups = 1 if compiling() or _coupled(product, outputs) else count
    size = outputs.numel() // groups
    # Column j of every block at once.
    probes = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
    stacked = probes[:, None].expand(size, groups, size).reshape(size, *outputs.shape)
    columns = torch.func.vmap(product)(stacked).detach().reshape(size, groups, size)
    blocks = columns.movedim(0, -1)
    return 0.5 * (blocks + blocks.mT)


def _coupled(product: Weight, outputs: Tensor) -> bool:
    """Whether a symmetric matrix on outputs couples any two samples.

    Two samples have different binary numbers.  Of a vector on the samples whose bit is set, the
    product on the others is zero for each bit (and exactly so: zeros were multiplied) if and only
    if no two are coupled.
    """
    count = outputs.shape[0] if outputs.ndim else 1
    seeded = torch.Generator().manual_seed(0)
    dense = torch.randn(outputs.shape, generator=seeded, device="cpu").to(outputs)
    numbers = torch.arange(count, device=outputs.device)
    for bit in range((count - 1).bit_length()):
        chosen = (numbers >> bit) & 1 == 1
        image = product(torch.where(chosen.reshape(-1, *[1] * (outputs.ndim - 1)), dense, 0.0))
        size = image.abs().max()
        if bool((image[~chosen].abs() > torch.finfo(image.dtype).eps * size).any()):
            return True
    return False


def ggn(
    model_fn: Callable[..., Tensor],
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    chunk_size: int | None = None,
    check_convex: bool = False,
    compile: bool = False,
) -> GaussNewtonOperator:
    """The generalised Gauss-Newton matrix J' H J of ``loss_fn(model_fn(params, inputs), ...)``.

    J is the Jacobian of the model's outputs in ``params`` and H the Hessian of the loss in the
    outputs, so the operator is positive semi-definite whenever the loss is convex in them.

    Args:
        model_fn: ``model_fn(params, inputs) -> outputs``, one tensor of any shape.
        loss_fn: ``loss_fn(outputs, *targets) -> scalar``; its reduction (mean or sum) counts.
        params: any tree of floating-point tensors.
        *batch: ``inputs`` first, then what ``loss_fn`` needs.
        chunk_size: how many vectors are carried at a time in a block of products, and how many
            rows of the factor; None for all vectors, and as many rows as hold 2^24 numbers.
        check_convex: whether to look at the eigenvalues of H, and refuse a loss that is not convex
            at these outputs; not under ``torch.compile`` and transforms, which hide values.
        compile: whether products are compiled, all vectors of a block together: as by
            :func:`hypergrad.hessian`.  Operators of the same two functions, shapes and dtypes
            share their graphs, and after the first one are made without an evaluation.

    Returns:
        An operator J'HJ = F'F with, at most, a row for each number in the outputs, for
        :class:`hypergrad.Gram`.  Its products compile to one graph with ``torch.compile``.

    Raises:
        NegativeCurvatureError: with ``check_convex``, H has a negative eigenvalue.
        LossError: no inputs, outputs that are no tensor or do not depend on ``params``, or a loss
            that is no scalar.
        NonFiniteError: the loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` or a tensor of ``batch`` have been modified
            in place since.

    Warns:
        UnusedParameterWarning: the outputs do not depend on some leaves; their rows are zero.
        CompilationWarning: with ``compile``, once a graph: there is no compiler, or it cannot
            trace the functions, or they draw random numbers; products are then eager ones.

    Cost: one gradient and one forward pass when made.  A product is one forward-mode pass, one
    product with H and one reverse pass, about two gradients.  H is taken apart only for F and for
    ``check_convex``: as many products with it as outputs a sample, of all samples at once where the
    loss couples no two.
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
    return GaussNewtonOperator(
        model_fn,
        loss_fn,
        params,
        batch,
        chunk_size=chunk_size,
        check_convex=check_convex,
        compile=compile,
    )
