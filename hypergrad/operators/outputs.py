"""Curvature that passes through a model's outputs: J'WJ, with W positive semi-definite."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import HypergradError, LossError, SolverOptionError
from ..pytree import Tree, TreeLayout
from ..transforms import (
    building_no_graph,
    forward_mode,
    reaches_beyond,
    tangents,
    transforming,
)
from .base import LinearOperator
from .evaluation import Evaluation
from .point import Point, check_differentiable, report_unused
from .root import RootOperator

#: A product with W: from a tangent of the outputs to a cotangent of the same shape.
Weight = Callable[[Tensor], Tensor]

#: Rows of the factor that are pulled back at a time, and the numbers that they may hold.
_ROWS, _ROW_NUMBERS = 256, 2**24


class OutputOperator(RootOperator):
    """J'WJ, with J the Jacobian of the outputs in the parameters and W a matrix on the outputs.

    A subclass gives W: as a product, and as a root, W = R'R by sample where it can be had so.
    """

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        chunk_size: int | None,
    ) -> None:
        super().__init__(TreeLayout.of(params, name="params"))
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise SolverOptionError(
                f"chunk_size is {chunk_size!r}, expected None or an integer >= 1."
            )
        originals = self.layout.leaves(params, name="params")
        check_differentiable(originals)
        self.model_fn, self.chunk_size = model_fn, chunk_size
        self._point = Point(originals, batch)
        #: The setting in which the model is evaluated and differentiated.
        self._evaluating = Evaluation(model_fn, self.layout, originals, batch[:1])
        self._built: Built | None = None
        self._more: bool | None = None

    @abstractmethod
    def _weight(self, outputs: Tensor) -> Weight:
        """W at these outputs, as a product that is differentiable in them."""

    @abstractmethod
    def _roots(self, outputs: Tensor) -> Tensor:
        """R at these outputs by sample, detached.

        Shape (groups, r, c): each of ``groups`` equal parts of the flat outputs has r rows of its
        own.  W = R'R is then block-diagonal.
        """

    def _checked(self, outputs: Tensor) -> list[Tensor]:
        """What else the operator computes of the outputs once, with its graph, after checks."""
        return []

    @property
    def outputs(self) -> Tensor:
        """The model's outputs at the parameters, detached."""
        return self._build().outputs.detach()

    @property
    def num_rows(self) -> int:
        """At most how many rows the factor has, which is the number of outputs in all."""
        return self._build().outputs.numel()

    def _model(self, batch: tuple[Any, ...] | None = None) -> Callable[[Tree], Any]:
        inputs = (self._point.batch if batch is None else batch)[0]
        return lambda p: self.model_fn(p, inputs)

    def _build(self) -> Built:
        """The product, linearised once at the detached parameters."""
        if self._built is None:
            report_unused(self.layout, self._unused(), "the output of model_fn")
            point = [leaf.detach() for leaf in self._point.params]
            with torch.enable_grad(), self._evaluating():
                passed = torch.func.vjp(self._model(), self.layout.unflatten_leaves(point))
                outputs, pull_back = passed[0], passed[1]
                more = self._checked(outputs)
                product = self._product(point, outputs, pull_back)
            self._built = Built(outputs, more, product, pull_back)
        return self._built

    def _unused(self) -> list[bool]:
        # torch.func gives zeros for parameters that the model ignores; autograd tells them apart.
        leaves = [leaf.detach().requires_grad_() for leaf in self._point.params]
        with torch.enable_grad(), self._evaluating():
            outputs = self._model()(self.layout.unflatten_leaves(leaves))
            if not isinstance(outputs, Tensor):
                raise LossError(
                    f"model_fn returned a {type(outputs).__name__}, expected one torch.Tensor."
                )
            used: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if outputs.requires_grad:
                used = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
        return [grad is None for grad in used]

    def _product(
        self, params: list[Tensor], outputs: Tensor, pull_back: Callable[..., Any]
    ) -> Callable[[Tensor], Tensor]:
        """The product with a flat vector at ``params``."""
        point = self.layout.unflatten_leaves(params)
        weight: list[Weight] = []

        def product(vector: Tensor) -> Tensor:
            if not weight:
                weight.append(self._weight(outputs))
            tangent = self.layout.unflatten(vector)
            with self._evaluating():
                pushed = torch.func.jvp(self._model(), (point,), (tangent,))[1]
                (pulled,) = pull_back(weight[0](pushed))
            return self._flat(pulled)

        return product

    def _flat(self, tree: Tree) -> Tensor:
        leaves = self.layout.leaves_unchecked(tree)
        return torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in leaves])

    def _tensors(self) -> list[Tensor]:
        return self._point.tensors

    def _check_fresh(self) -> None:
        self._point.check_fresh(self.layout)

    def _note_reached(self, reached: bool) -> None:
        if not reached:
            self._more = False

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        other = copy.copy(self)
        other._point, other._built, other._more = self._point.replaced(tensors), None, None
        return other

    def _depends_on_more(self) -> bool:
        if transforming() or tangents():
            return self._point.depends_on_more(self)
        if self._more is None:
            built = self._build()
            known = [x for x in self._point.batch_tensors if x.requires_grad]
            self._more = reaches_beyond([built.outputs, *built.more], known)
        return self._more

    def _attached(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        params = self._point.params
        with self._evaluating():
            passed = torch.func.vjp(self._model(), self.layout.unflatten_leaves(params))
        product = self._product(params, passed[0], passed[1])
        return torch.func.vmap(product, randomness="same")(block)

    def _apply(self, block: Tensor) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph():
            return self._attached(block).detach()
        product = self._build().product
        with forward_mode("the output of model_fn", self._in_reverse, remedy=_REMEDY):
            if block.shape[0] == 1:
                return product(block[0]).detach()[None]
            products = torch.func.vmap(product, chunk_size=self.chunk_size, randomness="same")
            return products(block).detach()

    def _in_reverse(self) -> None:
        """Once more what a product is made of, without forward mode and ``vmap``."""
        self._unused()
        outputs = self._build().outputs
        self._weight(outputs)(torch.ones_like(outputs))

    def _factor(self) -> Tensor:
        self._point.check_fresh(self.layout)
        if building_no_graph():
            with self._evaluating():
                point = self.layout.unflatten_leaves(self._point.params)
                passed = torch.func.vjp(self._model(), point)
            return self._rows(passed[0], passed[1], self._roots(passed[0])).detach()
        built = self._build()
        roots = self._roots(built.outputs)
        rows = self._rows_by_sample(roots)
        return self._rows(built.outputs, built.pull_back, roots) if rows is None else rows

    def _chunk(self) -> int:
        return self.chunk_size or max(1, min(_ROWS, _ROW_NUMBERS // self.layout.dim))

    def _rows(self, outputs: Tensor, pull_back: Callable[..., Any], roots: Tensor) -> Tensor:
        """F by pulling each row of R back through the whole batch."""
        groups, r = roots.shape[:2]

        def row(index: Tensor) -> Tensor:
            group, own = index // r, index % r
            # The row at its group's place among the outputs, zeros elsewhere.
            place = (torch.arange(groups, device=index.device) == group).to(roots.dtype)
            cotangent = place[:, None] * roots[group, own]
            (pulled,) = pull_back(cotangent.reshape(outputs.shape).to(outputs.dtype))
            return self._flat(pulled)

        indices = torch.arange(groups * r, device=roots.device)
        return torch.func.vmap(row, chunk_size=self._chunk())(indices).detach()

    def _rows_by_sample(self, roots: Tensor) -> Tensor | None:
        """F by pulling each row of R back through its own sample; None where that is not right.

        As many times cheaper as there are samples.  It asks that the model treats each sample
        (leading index of inputs and outputs) by itself, which is not so with BatchNorm in training
        mode: outputs and a product are compared with those of the whole batch.
        """
        outputs, inputs = self._build().outputs.detach(), self._point.batch[0]
        leaves, spec = torch_pytree.tree_flatten(inputs)
        groups, r = roots.shape[:2]
        whole = outputs.ndim and groups == len(outputs) and groups > 1
        if not whole or not all(
            isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == groups for leaf in leaves
        ):
            return None
        point = self.layout.unflatten_leaves([leaf.detach() for leaf in self._point.params])

        def of_sample(own: list[Tensor], root: Tensor) -> tuple[Tensor, Tensor]:
            single = torch_pytree.tree_unflatten([leaf[None] for leaf in own], spec)
            with self._evaluating():
                passed = torch.func.vjp(self._model((single,)), point)
            output, pull_back = passed[0], passed[1]
            cotangents = root.reshape(r, *output.shape).to(output.dtype)
            rows = torch.func.vmap(lambda u: self._flat(pull_back(u)[0]))(cotangents)
            return output[0], rows

        size = max(1, self._chunk() // r)
        own_leaves = [leaf.detach() for leaf in leaves]
        try:
            again, rows = torch.func.vmap(of_sample, chunk_size=size)(own_leaves, roots)
        except Exception as error:
            # vmap does not know an operation, or the model does not take one sample: then the whole
            # batch serves, and where the fault is another it is met again there.
            if isinstance(error, HypergradError | torch.OutOfMemoryError):
                raise
            return None
        factor: Tensor = rows.reshape(groups * r, -1).detach()
        eps = torch.finfo(outputs.dtype).eps ** 0.75
        if again.shape != outputs.shape or not _close(again, outputs, eps):
            return None
        seeded = torch.Generator().manual_seed(0)
        probe = torch.randn(1, self.layout.dim, generator=seeded, device="cpu").to(factor)
        return factor if _close((probe @ factor.T) @ factor, self._apply(probe), eps) else None


_REMEDY = (
    "operations that have one: for attention, torch.nn.attention.sdpa_kernel(SDPBackend.MATH) "
    "inside model_fn; for a torch.autograd.Function, give it a jvp"
)


def _close(one: Tensor, other: Tensor, rtol: float) -> bool:
    wide = torch.promote_types(one.dtype, torch.float32)
    difference = torch.linalg.vector_norm((one - other).to(wide))
    return bool(difference <= rtol * torch.linalg.vector_norm(other.to(wide)))


@dataclass(frozen=True, eq=False)
class Built:
    """What one pass through the model leaves behind."""

    outputs: Tensor
    more: list[Tensor]
    product: Callable[[Tensor], Tensor]
    pull_back: Callable[..., Any]
