"""A mean of operators, such as the Hessians of minibatches, seen one at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SolverOptionError
from ..precision import working_dtype
from ..pytree import Tree
from .base import LinearOperator, check_same_layout
from .interop import as_operator


class SampledOperator(LinearOperator):
    """The mean of operators, of which each product uses one that is drawn at random.

    Made for LiSSA, ``Neumann(num_samples=...)``; no other solver can use products that differ from
    call to call.  All vectors of one block are multiplied by the same draw.  The derivatives of a
    solve in the tensors of the operators are those of the mean, all of whose products they take.

    Args:
        operators: at least one of anything that :func:`hypergrad.as_operator` takes, such as the
            Hessian of each minibatch.
        like: a tree of the structure of the operators' argument; callables need it.
        weights: weights > 0 of the mean, such as the sizes of the minibatches; they are the
            probabilities of a draw up to their sum.  None for equal ones.
        generator: source of the draws; None for torch's global one.

    Attributes:
        operators: the operators.
        probabilities: of each to be drawn, float64 of sum one.

    Raises:
        SolverOptionError: no operators, or weights that are not one finite number > 0 for each.
        TreeStructureError: the operators act on different trees.

    Cost: a product with one of the operators a product; with all of them one with :attr:`mean`.
    ``torch.compile`` cannot trace a product, which depends on the value of a random number; those
    of :attr:`mean` it can.

    Examples:
        >>> import torch, hypergrad
        >>> parts = [torch.diag(torch.tensor([1.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))]
        >>> drawn = hypergrad.SampledOperator(parts, generator=torch.Generator().manual_seed(0))
        >>> drawn.mean @ torch.ones(2)
        tensor([1., 2.])
        >>> solver = hypergrad.Neumann(num_terms=200, step_size=0.05, num_samples=20)
        >>> x = hypergrad.solve(drawn, torch.ones(2), solver).value
        >>> bool((x - torch.tensor([1.0, 0.5])).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        operators: Sequence[Any],
        like: Tree | None = None,
        *,
        weights: Sequence[float] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.operators = [as_operator(operator, like=like) for operator in operators]
        if not self.operators:
            raise SolverOptionError("operators is empty; expected at least one operator.")
        super().__init__(self.operators[0].layout)
        for operator in self.operators[1:]:
            check_same_layout(self.layout, operator.layout, "two of the operators of a mean")
        numbers = [1.0] * len(self.operators) if weights is None else [float(w) for w in weights]
        good = all(math.isfinite(number) and number > 0 for number in numbers)
        if not good or len(numbers) != len(self.operators):
            raise SolverOptionError(
                f"weights are {numbers}, expected {len(self.operators)} finite numbers > 0, one "
                "for each operator."
            )
        total = math.fsum(numbers)
        self._shares = [w / total for w in numbers]
        self.probabilities = torch.tensor(self._shares, dtype=torch.float64, device="cpu")
        self.generator = generator
        self._attached_count = len(self.operators)

    @property
    def mean(self) -> LinearOperator:
        """The mean itself, which is one and the same in each product."""
        return _Mean(self)

    def _apply(self, block: Tensor) -> Tensor:
        place = torch.device("cpu") if self.generator is None else self.generator.device
        chances = self.probabilities.to(working_dtype(torch.float64, place)).to(place)
        drawn = torch.multinomial(chances, 1, generator=self.generator)
        return self.operators[int(drawn)]._apply(block)

    def _tensors(self) -> list[Tensor]:
        return [tensor for part in self.operators for tensor in part._tensors()]

    def _with_tensors(self, tensors: Sequence[Tensor]) -> SampledOperator:
        rest = iter(tensors)
        return self._of(
            [part._with_tensors([next(rest) for _ in part._tensors()]) for part in self.operators]
        )

    def _of(self, operators: list[LinearOperator]) -> SampledOperator:
        other = copy.copy(self)
        other.operators = operators
        return other

    def _attached(self, block: Tensor) -> Tensor:
        """Products with the mean: one that is drawn anew is no function to be differentiated."""
        parts = zip(self._shares, self.operators, strict=True)
        return torch.stack([weight * part._attached(block) for weight, part in parts]).sum(dim=0)

    def _depends_on_more(self) -> bool | None:
        parts = [part._depends_on_more() for part in self.operators]
        return True if any(parts) else (None if None in parts else False)

    def _look(self) -> int:
        # Each: a draw says nothing of the others.
        return sum(part._look() for part in self.operators if part._depends_on_more() is None)

    def _transposed(self) -> SampledOperator:
        return self._of([part._transposed() for part in self.operators])


class _Mean(LinearOperator):
    def __init__(self, sampled: SampledOperator) -> None:
        super().__init__(sampled.layout)
        self.sampled = sampled

    def _apply(self, block: Tensor) -> Tensor:
        parts = zip(self.sampled._shares, self.sampled.operators, strict=True)
        return sum((weight * part._apply(block) for weight, part in parts), torch.zeros_like(block))

    def _tensors(self) -> list[Tensor]:
        return self.sampled._tensors()

    def _with_tensors(self, tensors: Sequence[Tensor]) -> LinearOperator:
        return _Mean(self.sampled._with_tensors(tensors))

    def _attached(self, block: Tensor) -> Tensor:
        return self.sampled._attached(block)

    def _depends_on_more(self) -> bool | None:
        return self.sampled._depends_on_more()

    def _look(self) -> int:
        self.sampled._look()
        return 1

    def _transposed(self) -> LinearOperator:
        return _Mean(self.sampled._transposed())
