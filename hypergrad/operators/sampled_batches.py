"""The operators of single minibatches, and the whole of which each product draws one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import LinearOperator
from .evaluation import seeded
from .one_batch import made, naming
from .sampled import SampledOperator

if TYPE_CHECKING:
    from .minibatch import MinibatchOperator


class MinibatchPart(LinearOperator):
    """The operator of one minibatch, which is loaded for each product."""

    def __init__(self, whole: MinibatchOperator, index: int) -> None:
        super().__init__(whole.layout)
        self.whole, self.index = whole, index

    def _apply(self, block: Tensor) -> Tensor:
        whole = self.whole
        whole._point.check_fresh(self.layout)
        batch = whole._loader.at(self.index)
        params = self.layout.unflatten_leaves(whole._point.params)
        with seeded(whole._seed_of(self.index), self.device), naming(self.index):
            product: Tensor = made(whole._make, params, batch)._apply(block)
            return product


class SampledBatches(SampledOperator):
    """One minibatch a product; its derivatives are by passes, with one minibatch at a time."""

    def __init__(
        self,
        whole: MinibatchOperator,
        weights: list[float],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(whole._parts(), weights=weights, generator=generator)
        self.whole = whole

    def _tensors(self) -> list[Tensor]:
        return self.whole._tensors()

    def _with_tensors(self, tensors: Sequence[Tensor]) -> SampledOperator:
        whole = self.whole._with_tensors(tensors)
        other = copy.copy(self)
        other.whole, other.operators = whole, whole._parts()
        return other

    def _attached(self, block: Tensor) -> Tensor:
        return self.whole._attached(block)

    def _depends_on_more(self) -> bool | None:
        return self.whole._depends_on_more()

    def _look(self) -> int:
        self.whole._look()
        return len(self.operators)

    def _transposed(self) -> SampledOperator:
        return self
