"""One operator over all minibatches of a loader, of which one is in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..errors import LoaderError, SolverOptionError
from ..precision import working_dtype
from ..pytree import Tree, TreeLayout
from ..tracing import compiling
from ..transforms import apply, pullback, tangents, transforming, unwrapped
from .base import LinearOperator
from .evaluation import seeded
from .gauss_newton import GaussNewtonOperator
from .hessian import HessianOperator
from .loader import Loader, Progress
from .modes import Mode
from .one_batch import made, naming, requires_grad, unused_by
from .point import Point, check_differentiable, report_unused
from .sampled import SampledOperator
from .sampled_batches import MinibatchPart, SampledBatches

Reduction = Literal["mean", "sum"]


class MinibatchOperator(LinearOperator):
    """The operator of a whole loader; made by :func:`minibatch_hessian`, :func:`minibatch_ggn`."""

    def __init__(
        self,
        make: Callable[[Tree, tuple[Any, ...]], HessianOperator | GaussNewtonOperator],
        params: Tree,
        batches: Any,
        *,
        batch_size: Callable[[Any], float] | None = None,
        reduction: Reduction = "mean",
        seed: int = 0,
        probe: bool = True,
        progress: bool | Progress = False,
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        if reduction not in get_args(Reduction):
            raise SolverOptionError(
                f"reduction is {reduction!r}, expected one of {get_args(Reduction)}."
            )
        self.reduction, self.seed = reduction, seed
        self._make = make
        self._loader = Loader(
            batches, self.device, batch_size=batch_size, seed=seed, progress=progress
        )
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self._point = Point(originals, ())
        self._more: bool | None = None
        if probe:
            self._probe()

    @property
    def num_batches(self) -> int | None:
        """How many minibatches there are; None before the first pass."""
        return None if self._loader.sizes is None else len(self._loader.sizes)

    @property
    def size(self) -> float | None:
        """How many examples there are; None before the first pass."""
        return None if self._loader.sizes is None else sum(self._loader.sizes)

    def sampled(self, *, generator: torch.Generator | None = None) -> SampledOperator:
        """The same mean, of which each product uses one minibatch: for LiSSA.

        A minibatch is drawn with a probability in proportion to its size (with equal ones for
        losses that are sums), loaded, used and dropped.

        Args:
            generator: source of the draws; None for torch's global one.

        Raises:
            LoaderError: the loader has no random access.  Lists have it, and a ``DataLoader`` over
                a map-style dataset, whose workers are not used here.

        Cost: a pass over the loader if there was none yet, to see the sizes.  Then one minibatch's
        product a product.
        """
        self._loader.check_random_access()
        if self._loader.sizes is None:
            for _ in self._loader.each():
                pass
        sizes = self._loader.sizes
        assert sizes is not None
        weights = sizes if self.reduction == "mean" else [1.0] * len(sizes)
        return SampledBatches(self, weights, generator)

    def _parts(self) -> list[LinearOperator]:
        """The operators of the minibatches, of which the whole is the mean."""
        assert self._loader.sizes is not None
        count = len(self._loader.sizes)
        parts: list[LinearOperator] = [MinibatchPart(self, index) for index in range(count)]
        return parts if self.reduction == "mean" else [float(count) * part for part in parts]

    def _probe(self) -> None:
        """Raise unless two passes agree."""
        wide = working_dtype(torch.float64, self.device)
        source = torch.Generator().manual_seed(self.seed)
        with temporarily_clear_interpreter_stack():  # vmap forbids to draw, even from a seed
            v = torch.randn(1, self.layout.dim, generator=source, device="cpu", dtype=torch.float64)
        v = self.layout.narrowed(v.to(dtype=self.dtype, device=self.device))
        if transforming() or tangents():  # at plain values, that can be looked at
            plain = self._with_tensors([unwrapped(x) for x in self._tensors()])
            first, second = (unwrapped(plain._attached(v)).to(wide) for _ in range(2))
        else:
            first, second = (self._apply(v).to(wide) for _ in range(2))
        gap, size = float((first - second).norm()), float(max(first.norm(), second.norm()))
        # In another order the sums round differently.
        allowed = float(torch.finfo(self.dtype).eps ** 0.5)
        if gap > allowed * size:
            raise LoaderError(
                f"two passes over batches gave products that differ by {gap / size:.1e}, expected "
                f"rounding (at most {allowed:.0e}): this is no fixed operator. Likely causes: "
                "shuffling, augmentation or dropout that draws from other generators than "
                "PyTorch's own, or a loss with a state. Give the same data each time, or pass "
                "probe=False."
            )

    def _passed(self, work: Callable[[LinearOperator, float], Any]) -> float:
        """``work(operator, weight)`` for each minibatch; what the sum is to be divided by.

        Each is evaluated with random numbers of its own seed, so that the operator is one matrix.
        """
        if compiling():
            raise LoaderError(
                "a pass over a loader cannot be traced by torch.compile. Solve outside of the "
                "compiled function, or compile with hypergrad.hessian of one batch."
            )
        self._point.check_fresh(self.layout)
        first = self._more is None and not (transforming() or tangents())
        params = self.layout.unflatten_leaves(self._point.params)
        unused = [True] * len(self.layout.paths)
        more, total = False, 0.0
        for index, (batch, size) in enumerate(self._loader.each()):
            weight = size if self.reduction == "mean" else 1.0
            with seeded(self._seed_of(index), self.device), naming(index):
                operator = made(self._make, params, batch)
                if first:
                    more = more or operator._depends_on_more() or requires_grad(batch)
                    unused = [a and b for a, b in zip(unused, unused_by(operator), strict=True)]
                work(operator, weight)
            total += weight
            del operator, batch  # before the next one is made
        if first:
            self._more = more
            report_unused(self.layout, unused, "the loss of every minibatch")
        return total if self.reduction == "mean" else 1.0

    def _seed_of(self, index: int) -> int:
        return self.seed + 1 + index

    def _apply(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block, dtype=working_dtype(self.dtype, self.device))

        def add(operator: LinearOperator, weight: float) -> None:
            total.add_(operator._apply(block).to(total.dtype), alpha=weight)

        divisor = self._passed(add)
        return (total / divisor).to(self.dtype)

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _with_tensors(self, tensors: Sequence[Tensor]) -> MinibatchOperator:
        other = copy.copy(self)
        other._point = self._point.replaced(tensors)
        return other

    def _transposed(self) -> LinearOperator:
        return self  # symmetric by construction

    def _depends_on_more(self) -> bool | None:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        return self._more

    def _attached(self, block: Tensor) -> Tensor:
        if not (transforming() or tangents() or self._more):
            return apply(_PassProduct, self, block, *self._point.params)
        # Derivatives of other kinds, or in tensors that are not known: with all graphs at once.
        parts: list[Tensor] = []
        divisor = self._passed(
            lambda operator, weight: parts.append(weight * operator._attached(block))
        )
        return torch.stack(parts).sum(dim=0) / divisor

    def _pulled_back(
        self, block: Tensor, cotangent: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of <A block, cotangent> in the wanted parameters, batch by batch."""
        params = self._point.params
        totals: list[Tensor | None] = [None] * len(params)

        def add(operator: LinearOperator, weight: float) -> None:
            count = len(params)

            def product(values: list[Tensor]) -> Tensor:
                rest = operator._tensors()[count:]
                return operator._with_tensors([*values, *rest])._attached(block)

            grads = pullback(product, params, wanted, weight * cotangent)
            for i, grad in enumerate(grads):
                before = totals[i]
                totals[i] = grad if before is None or grad is None else before + grad

        divisor = self._passed(add)
        return [None if total is None else total / divisor for total in totals]


class _PassProduct(torch.autograd.Function):
    """A times a block as a function of the parameters, with one minibatch's graph at a time."""

    @staticmethod
    def forward(operator: MinibatchOperator, block: Tensor, *params: Tensor) -> Tensor:
        return operator._apply(block.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, *params = ctx.saved_tensors
        operator: MinibatchOperator = ctx.operator._with_tensors(params)
        in_block = None
        if ctx.needs_input_grad[1]:
            in_block = apply(_PassProduct, operator, grad, *params)
        wanted = ctx.needs_input_grad[2:]
        in_params = (
            operator._pulled_back(block, grad, wanted) if any(wanted) else [None] * len(params)
        )
        return (None, in_block, *in_params)


def minibatch_hessian(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    batches: Any,
    *,
    batch_size: Callable[[Any], float] | None = None,
    reduction: Reduction = "mean",
    seed: int = 0,
    probe: bool = True,
    progress: bool | Progress = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> MinibatchOperator:
    """The Hessian of a loss over all data of a loader, one minibatch in memory at a time.

    It is the mean of the minibatches' Hessians weighted by their sizes, sum n_i H_i / sum n_i: the
    Hessian over all data at once, also where the last minibatch is shorter.  (An unweighted mean
    is not.)  That holds for losses that are means, or sums, over independent examples; BatchNorm
    in training mode couples those of a minibatch.

    Args:
        loss_fn: ``loss_fn(params, *batch) -> scalar``, as for :func:`hypergrad.hessian`.
        params: any tree of floating-point tensors.
        batches: an iterable that can be gone through again and again (a ``DataLoader``, a list), or
            a function that returns an iterator.  A tuple or list in it is ``*batch``; anything
            else, such as a dict, is one argument.  Tensors are moved to the device of ``params``.
        batch_size: a function of a batch, as it comes from the loader, that returns its weight in
            the mean, such as the number of tokens that are not masked; None for the first
            dimension of its first tensor.
        reduction: ``"mean"`` if ``loss_fn`` is a mean over the examples, ``"sum"`` if it is a sum;
            the Hessians are then added up.
        seed: of all random numbers from PyTorch's own generators and from a ``DataLoader``'s.  Each
            minibatch has draws of its own for dropout, the same in every pass, and a shuffled
            loader keeps one order, so that the operator is one symmetric matrix.  The generators
            are left as they were.
        probe: whether two passes are compared to begin with; a loader that differs from pass to
            pass is refused.
        progress: True shows each pass that takes more than a second by tqdm, which must be
            installed; or a function that wraps an iterable.
        mode: as for :func:`hypergrad.hessian`.
        chunk_size: as for :func:`hypergrad.hessian`.

    Returns:
        An operator with ``num_batches``, ``size`` and ``sampled()``, the stochastic variant.  Sums
        are carried in float64 (float32 for 16-bit products).

        Solves are differentiable in ``params``, with one minibatch's graph at a time.  Derivatives
        in what a closure or a batch brings along, in forward mode and under ``torch.func`` hold the
        graphs of all minibatches at once; freeze other parameters of the module, or solve under
        ``torch.no_grad()``.  A pass is Python code: under ``torch.compile`` it raises.

    Raises:
        LoaderError: an iterator that can be used once only, no batches, an empty one, one of
            another structure, no size to be seen, or passes that differ.
        LossError, NonFiniteError: as for :func:`hypergrad.hessian`, with the number of the batch.
        StaleOperatorError: at a product, if ``params`` have been modified in place since.
        SolverOptionError: another ``reduction`` or ``mode``; a ``batch_size`` that is a number.

    Warns:
        UnusedParameterWarning: no minibatch's loss depends on some leaves; their rows are zero.

    Cost: a product is a pass over the loader: for each minibatch a forward pass and a gradient
    with a graph, then about two gradients a vector, so that ``matmat`` of a block takes one pass.
    The probe is two passes (two HVPs).

    Examples:
        >>> import torch, hypergrad
        >>> x, y = torch.arange(10.0).reshape(5, 2), torch.ones(5)
        >>> loss = lambda p, x, y: ((x @ p - y) ** 2).mean()
        >>> batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        >>> h = hypergrad.minibatch_hessian(loss, torch.zeros(2), batches)
        >>> torch.allclose(h.to_dense(), hypergrad.hessian(loss, torch.zeros(2), x, y).to_dense())
        True
        >>> h.num_batches, h.size
        (2, 5.0)
    """
    return MinibatchOperator(
        partial(HessianOperator, loss_fn, mode=mode, chunk_size=chunk_size),
        params,
        batches,
        batch_size=batch_size,
        reduction=reduction,
        seed=seed,
        probe=probe,
        progress=progress,
    )


def minibatch_ggn(
    model_fn: Callable[..., Tensor],
    loss_fn: Callable[..., Tensor],
    params: Tree,
    batches: Any,
    *,
    batch_size: Callable[[Any], float] | None = None,
    reduction: Reduction = "mean",
    seed: int = 0,
    probe: bool = True,
    progress: bool | Progress = False,
    chunk_size: int | None = None,
) -> MinibatchOperator:
    """The Gauss-Newton matrix over all data of a loader, one minibatch in memory at a time.

    As :func:`hypergrad.minibatch_hessian`, which tells of the arguments, of ``model_fn(params,
    inputs)`` and ``loss_fn(outputs, *targets)`` as for :func:`hypergrad.ggn`, where each batch is
    ``(inputs, *targets)``.

    Raises:
        LoaderError, LossError, NonFiniteError, StaleOperatorError, SolverOptionError: as there.

    Cost: a product is a pass over the loader: for each minibatch two forward passes and a gradient
    to begin with, then about two gradients a vector.  The probe is two passes.

    Examples:
        >>> import torch, hypergrad
        >>> x, y = torch.arange(10.0).reshape(5, 2), torch.ones(5)
        >>> model = lambda p, x: (x @ p).tanh()
        >>> loss = lambda out, y: ((out - y) ** 2).mean()
        >>> batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        >>> p = torch.full((2,), 0.1)
        >>> g = hypergrad.minibatch_ggn(model, loss, p, batches)
        >>> torch.allclose(g.to_dense(), hypergrad.ggn(model, loss, p, x, y).to_dense())
        True
    """
    return MinibatchOperator(
        partial(GaussNewtonOperator, model_fn, loss_fn, chunk_size=chunk_size),
        params,
        batches,
        batch_size=batch_size,
        reduction=reduction,
        seed=seed,
        probe=probe,
        progress=progress,
    )
