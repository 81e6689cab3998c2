"""Sums, multiples and shifts of operators: what ``+``, ``*`` and ``shift`` make of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..transforms import plain
from .base import LinearOperator, check_same_layout


class Affine(LinearOperator):
    """scale * A + shift * I."""

    def __init__(self, base: LinearOperator, scale: float | Tensor, shift: float | Tensor) -> None:
        super().__init__(base.layout)
        self.base: LinearOperator = base
        self.scale: float | Tensor = scale
        self.offset: float | Tensor = shift
        self._attached_count = base._attached_count
        if isinstance(base, Affine):  # keep chains of algebra one level deep
            whole, offset = scale * base.scale, scale * base.offset
            if _holds(whole, scale, base.scale) and _holds(offset, scale, base.offset):
                self.base, self.scale, self.offset = base.base, whole, offset + shift

    def _apply(self, block: Tensor) -> Tensor:
        return self._combined(self.base._apply(block), block, plain(self.scale), plain(self.offset))

    @staticmethod
    def _combined(
        product: Tensor, block: Tensor, scale: float | Tensor, offset: float | Tensor
    ) -> Tensor:
        if isinstance(scale, Tensor) or scale != 1.0:
            product = scale * product
        if isinstance(offset, Tensor):
            return product + offset.to(block.dtype) * block
        if block.element_size() == 2:  # a number passed as alpha is rounded to 16 bits first
            return product + offset * block if offset else product
        return torch.add(product, block, alpha=offset) if offset else product

    def _tensors(self) -> list[Tensor]:
        own = [x for x in (self.scale, self.offset) if isinstance(x, Tensor)]
        return own + self.base._tensors()

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        rest = list(tensors)
        scale = rest.pop(0) if isinstance(self.scale, Tensor) else self.scale
        offset = rest.pop(0) if isinstance(self.offset, Tensor) else self.offset
        return Affine(self.base._with_tensors(rest), scale, offset)

    def _attached(self, block: Tensor) -> Tensor:
        return self._combined(self.base._attached(block), block, self.scale, self.offset)

    def _signature(self) -> Hashable:
        base, fixed = self.base._signature(), (self.scale, self.offset)
        known = base is not None and not any(isinstance(x, Tensor) for x in fixed)
        return (Affine, base, *fixed) if known else None

    def _check_fresh(self) -> None:
        self.base._check_fresh()

    def _note_reached(self, reached: bool) -> None:
        self.base._note_reached(reached)

    def _traced_products(self, block: Tensor) -> Tensor:
        product = self.base._traced_products(block)
        return self._combined(product, block, plain(self.scale), plain(self.offset))

    def _depends_on_more(self) -> bool | None:
        return self.base._depends_on_more()

    def _look(self) -> int:
        return self.base._look()

    def _transposed(self) -> LinearOperator:
        return Affine(self.base._transposed(), self.scale, self.offset)


def _holds(product: float | Tensor, *factors: float | Tensor) -> bool:
    """Whether numbers were multiplied without leaving the range; of tensors nothing is asked."""
    if isinstance(product, Tensor) or 0.0 in factors:
        return True
    return sys.float_info.min <= abs(product) < math.inf


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        check_same_layout(left.layout, right.layout, "the two operators of a sum")
        super().__init__(left.layout)
        self.left, self.right = left, right

    def _apply(self, block: Tensor) -> Tensor:
        return self.left._apply(block) + self.right._apply(block)

    def _tensors(self) -> list[Tensor]:
        return self.left._tensors() + self.right._tensors()

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        split = len(self.left._tensors())
        return Sum(
            self.left._with_tensors(tensors[:split]), self.right._with_tensors(tensors[split:])
        )

    def _attached(self, block: Tensor) -> Tensor:
        return self.left._attached(block) + self.right._attached(block)

    def _signature(self) -> Hashable:
        both = self.left._signature(), self.right._signature()
        return None if None in both else (Sum, *both)

    def _check_fresh(self) -> None:
        self.left._check_fresh()
        self.right._check_fresh()

    def _note_reached(self, reached: bool) -> None:
        self.left._note_reached(reached)
        self.right._note_reached(reached)

    def _traced_products(self, block: Tensor) -> Tensor:
        return self.left._traced_products(block) + self.right._traced_products(block)

    def _depends_on_more(self) -> bool | None:
        parts = (self.left._depends_on_more(), self.right._depends_on_more())
        return True if any(parts) else (None if None in parts else False)

    def _look(self) -> int:
        return max(self.left._look(), self.right._look())

    def _transposed(self) -> LinearOperator:
        return Sum(self.left._transposed(), self.right._transposed())
