"""Fisher matrices: of targets drawn from the model's own distribution, and of those observed."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import LossError, NonFiniteError, SolverOptionError
from ..pytree import Tree
from ..transforms import building_no_graph
from .likelihoods import Likelihood, sampler_of
from .outputs import OutputOperator, Weight

Reduction = Literal["mean", "sum"]


class ScoreOperator(OutputOperator):
    """A mean or sum over samples of J_i' s s' J_i, for scores s in the outputs of sample i."""

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        reduction: Reduction,
        chunk_size: int | None,
    ) -> None:
        if not isinstance(reduction, str) or reduction not in get_args(Reduction):
            raise SolverOptionError(
                f"reduction is {reduction!r}, expected one of {get_args(Reduction)}."
            )
        super().__init__(model_fn, params, batch, chunk_size=chunk_size)
        self.reduction = reduction

    @property
    @abstractmethod
    def num_scores(self) -> int:
        """How many scores each sample has."""

    @abstractmethod
    def _scores(self, outputs: Tensor) -> Tensor:
        """Scores at these outputs, differentiable in them; shape (scores, *outputs.shape)."""

    @property
    def num_rows(self) -> int:
        """One row for each sample and score."""
        return len(self._build().outputs) * self.num_scores

    def _checked(self, outputs: Tensor) -> list[Tensor]:
        if outputs.ndim == 0:
            raise LossError(
                "model_fn returned a scalar, expected one output or more for each sample, along "
                "the leading dimension."
            )
        scores = self._scores(outputs)
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(
                "the gradient of the negative log-likelihood in the outputs holds nan or inf. Look "
                "for a log or sqrt at zero, an ignored target, or diverged parameters."
            )
        return [scores]

    def _scaled(self, outputs: Tensor) -> Tensor:
        """Scores whose squares add up to the mean or sum, shape (samples, scores, c)."""
        scores = self._scores(outputs)
        count = self.num_scores * (len(outputs) if self.reduction == "mean" else 1)
        by_sample: Tensor = scores.reshape(self.num_scores, len(outputs), -1).movedim(0, 1)
        return by_sample / math.sqrt(count)

    def _weight(self, outputs: Tensor) -> Weight:
        scores = self._scaled(outputs)

        def product(tangent: Tensor) -> Tensor:
            shares = scores @ tangent.reshape(len(scores), -1, 1)
            weighted: Tensor = scores.mT @ shares
            return weighted.reshape(tangent.shape)

        return product

    def _roots(self, outputs: Tensor) -> Tensor:
        return self._scaled(outputs).detach()


class FisherOperator(ScoreOperator):
    """The Fisher matrix by drawn targets; made by :func:`fisher`."""

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        params: Tree,
        inputs: Any,
        *,
        likelihood: Likelihood,
        num_samples: int,
        generator: torch.Generator | None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
            raise SolverOptionError(f"num_samples is {num_samples!r}, expected an integer >= 1.")
        if building_no_graph():
            raise SolverOptionError(
                "fisher draws targets when it is made, which torch.compile and the transforms of "
                "torch.func cannot follow. Make it outside the function."
            )
        super().__init__(model_fn, params, (inputs,), reduction=reduction, chunk_size=chunk_size)
        self._draw, self._nll = sampler_of(likelihood)
        self._batches = isinstance(likelihood, str)
        self._num_samples, self.generator = num_samples, generator
        #: The targets, drawn once: products are those of one matrix.
        self._targets: Any = None
        self._build()

    @property
    def num_scores(self) -> int:
        """How many targets are drawn for each sample."""
        return self._num_samples

    def _scores(self, outputs: Tensor) -> Tensor:
        if self._targets is None:
            self._targets = self._drawn(outputs.detach())
        if self._batches:
            scores: Tensor = torch.func.vmap(self._score, in_dims=(None, 0))(outputs, self._targets)
            return scores
        return torch.stack([self._score(outputs, targets) for targets in self._targets])

    def _drawn(self, outputs: Tensor) -> Any:
        if not self._batches:  # distributions look at values, and functions may be of one batch
            return [self._draw(outputs, self.generator) for _ in range(self._num_samples)]
        repeated = outputs.repeat(self._num_samples, *[1] * (outputs.ndim - 1))
        return self._draw(repeated, self.generator).unflatten(0, (self._num_samples, len(outputs)))

    def _score(self, outputs: Tensor, targets: Any) -> Tensor:
        def total(out: Tensor) -> Tensor:
            nll = self._nll(out, targets)
            if not isinstance(nll, Tensor):
                raise LossError(
                    f"the negative log-likelihood is a {type(nll).__name__}, expected a tensor."
                )
            return nll.sum()

        score: Tensor = torch.func.grad(total)(outputs)
        return score


class EmpiricalFisherOperator(ScoreOperator):
    """The mean or sum of g g' over per-sample gradients; made by :func:`empirical_fisher`."""

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        loss_fn: Callable[..., Tensor],
        params: Tree,
        batch: tuple[Any, ...],
        *,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        if not batch:
            raise LossError(
                "empirical_fisher needs at least the model's inputs: empirical_fisher(model_fn, "
                "loss_fn, params, inputs, *targets)."
            )
        super().__init__(model_fn, params, batch, reduction=reduction, chunk_size=chunk_size)
        self.loss_fn = loss_fn
        if not building_no_graph():
            self._build()

    @property
    def num_scores(self) -> int:
        """A single one, the gradient of the sample's own loss."""
        return 1

    def _scores(self, outputs: Tensor) -> Tensor:
        leaves, spec = torch_pytree.tree_flatten(self._point.batch[1:])
        count = len(outputs)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (leaf.ndim == 0 or len(leaf) != count):
                raise LossError(
                    f"a target has shape {tuple(leaf.shape)}, expected {count} samples along the "
                    "leading dimension, as the outputs have. Give loss_fn what all samples share "
                    "through a closure."
                )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def loss(output: Tensor, own: list[Tensor]) -> Tensor:
            rest = iter(own)
            single = [next(rest)[None] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            value = self.loss_fn(output[None], *torch_pytree.tree_unflatten(single, spec))
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise LossError(f"loss_fn returned {got}, expected a scalar torch.Tensor.")
            return value.reshape(())

        scores: Tensor = torch.func.vmap(torch.func.grad(loss))(outputs, tensors)
        return scores[None]


def fisher(
    model_fn: Callable[..., Tensor],
    params: Tree,
    inputs: Any,
    *,
    likelihood: Likelihood = "categorical",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> FisherOperator:
    """The Fisher matrix, by targets drawn from the model's own distribution at each input.

    With p(y | f) the distribution of targets given the outputs f, and J_i the Jacobian of the
    outputs of sample i,

        F = mean_i J_i' E[s s'] J_i,    s = -d log p(y | f_i) / d f_i,  y ~ p(. | f_i),

    where the expectation is a mean over ``num_samples`` draws: an unbiased estimate, and positive
    semi-definite for any draw.  It equals the Gauss-Newton matrix of the negative log-likelihood in
    expectation wherever f holds natural parameters: that of ``cross_entropy`` for
    ``"categorical"``, that of half the squared error, summed over the outputs of a sample, for
    ``"gaussian"``.  The targets are drawn once, when the operator is made.

    Args:
        model_fn: ``model_fn(params, inputs) -> outputs``, one tensor with the samples along its
            leading dimension.
        params: any tree of floating-point tensors.
        inputs: passed on to ``model_fn``.
        likelihood: ``"categorical"``, logits along dimension 1 as in ``cross_entropy``;
            ``"bernoulli"``, a logit for each output; ``"gaussian"``, unit variance around each
            output; a callable from outputs to a ``torch.distributions`` object of independent
            samples; or a pair of functions, ``sampler(outputs, generator) -> targets`` and
            ``negative_log_likelihood(outputs, targets) -> tensor``, summed over its entries.
        num_samples: targets drawn for each sample.
        generator: source of the draws; None for torch's global one.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
        chunk_size: as in :func:`hypergrad.ggn`.

    Returns:
        An operator with a row for each sample and draw, for :class:`hypergrad.Gram`.  Derivatives
        of a solve in ``params`` hold the drawn targets still.  Its products compile to one graph
        with ``torch.compile``.

    Raises:
        LossError: outputs that are no tensor, are a scalar, or do not depend on ``params``.
        NonFiniteError: a score is nan or inf.
        SolverOptionError: an unknown likelihood or reduction, ``num_samples`` below one, or made
            under ``torch.compile`` or a transform.
        StaleOperatorError: at a product, if ``params`` or ``inputs`` have been modified in
            place since.

    Warns:
        UnusedParameterWarning: the outputs do not depend on some leaves; their rows are zero.

    Cost: as :func:`hypergrad.ggn`: a product is one forward-mode and one reverse pass, whatever
    ``num_samples``.
    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 21 (2020),
    sections 9.2 and 11.

    Examples:
        >>> import torch, hypergrad
        >>> inputs, source = torch.eye(2) * 3, torch.Generator().manual_seed(0)
        >>> f = hypergrad.fisher(
        ...     lambda p, x: x @ p, torch.zeros(2), inputs,
        ...     likelihood="gaussian", num_samples=10_000, generator=source,
        ... )
        >>> (f.to_dense() - inputs.T @ inputs / 2).abs().max() < 0.2
        tensor(True)
    """
    return FisherOperator(
        model_fn,
        params,
        inputs,
        likelihood=likelihood,
        num_samples=num_samples,
        generator=generator,
        reduction=reduction,
        chunk_size=chunk_size,
    )


def empirical_fisher(
    model_fn: Callable[..., Tensor],
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Any,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> EmpiricalFisherOperator:
    """The mean of g g' over the samples, with g the gradient of a sample's own loss.

    It uses the targets observed where the Fisher matrix has the model's own, so that it is *not*
    curvature: it vanishes where all samples are fitted (Kunstner, Balles, Hennig, arXiv
    1905.12558).

    Args:
        model_fn: ``model_fn(params, inputs) -> outputs``, samples along the leading dimension.
        loss_fn: ``loss_fn(outputs, *targets) -> scalar``; called with one sample at a time (of
            leading size 1) under ``torch.func.vmap``, so that mean and sum over samples are the
            same.
        params: any tree of floating-point tensors.
        *batch: ``inputs`` first, then what ``loss_fn`` needs, samples along the leading dimension.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
        chunk_size: as in :func:`hypergrad.ggn`.

    Returns:
        An operator with a row for each sample, for :class:`hypergrad.Gram`.  Its products compile
        to one graph with ``torch.compile``.

    Raises:
        LossError: no inputs, a loss that is no scalar, targets of another leading size, or outputs
            that do not depend on ``params``.
        NonFiniteError: the gradient of a loss is nan or inf.
        StaleOperatorError: at a product, if ``params`` or a tensor of ``batch`` have been modified
            in place since.

    Warns:
        UnusedParameterWarning: the outputs do not depend on some leaves; their rows are zero.

    Cost: as :func:`hypergrad.ggn`; no gradient of a sample is ever formed for a product.

    Examples:
        >>> import torch, hypergrad
        >>> loss = lambda out, y: 0.5 * ((out - y) ** 2).sum()
        >>> inputs, targets = torch.eye(2) * 3, torch.tensor([1.0, 2.0])
        >>> model, params = lambda p, x: x @ p, torch.zeros(2)
        >>> f = hypergrad.empirical_fisher(model, loss, params, inputs, targets)
        >>> f.to_dense()  # gradients -3 and -6
        tensor([[ 4.5000,  0.0000],
                [ 0.0000, 18.0000]])
    """
    return EmpiricalFisherOperator(
        model_fn, loss_fn, params, batch, reduction=reduction, chunk_size=chunk_size
    )
