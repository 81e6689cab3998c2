from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from curvlinops.examples.functorch import functorch_empirical_fisher
from torch import Tensor
from torch.distributions import Categorical, Distribution, Gamma, Independent, Normal

import hypergrad
from tests.operators import networks
from tests.strategies import DTYPES, F32, F64, flat, gaussian, generator, relative_error

CASES = ("mlp, classes", "cnn, classes", "pixels, classes", "lstm, classes")
POSITIONS = "transformer, positions"


def draws(outputs: Tensor, source: torch.Generator | None) -> Tensor:
    return outputs + torch.randn(outputs.shape, generator=source, dtype=outputs.dtype)


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((outputs - targets) ** 2).sum(1)


def of_last_dimension(outputs: Tensor) -> Distribution:
    return Categorical(logits=outputs)


def total_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((outputs - targets) ** 2).sum()


def total_binary(outputs: Tensor, targets: Tensor) -> Tensor:
    chances = targets.sigmoid()
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, chances, reduction="sum")


def total_last_dimension(outputs: Tensor, targets: Tensor) -> Tensor:
    return networks.of_positions(outputs, targets) * targets.numel()


#: Likelihood, a network, and the loss summed over samples whose Gauss-Newton matrix it expects.
EXPECTED: dict[str, tuple[Any, str, Any]] = {
    "categorical": ("categorical", "mlp, classes", networks.cross_entropy_sum),
    "categorical pixels": ("categorical", "pixels, classes", networks.cross_entropy_sum),
    "gaussian": ("gaussian", "mlp, squared", total_squares),
    "bernoulli": ("bernoulli", "mlp, squared", total_binary),
    "distribution": (of_last_dimension, POSITIONS, total_last_dimension),
    "wide distribution": (
        lambda out: Independent(Normal(out, 2.0), 1),
        "mlp, squared",
        lambda out, y: total_squares(out, y) / 4,
    ),
    "sampler": ((draws, nll), "mlp, squared", total_squares),
}


def fisher_of(made: networks.Case, **options: Any) -> hypergrad.FisherOperator:
    return hypergrad.fisher(made.model_fn, made.params, made.inputs, **options)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_expectation_is_the_gauss_newton_matrix(name: str) -> None:
    likelihood, network, loss_fn = EXPECTED[name]
    made, source = networks.case(network), generator(3)
    num_samples = 200 if isinstance(likelihood, str) else 40
    exact = hypergrad.ggn(made.model_fn, loss_fn, made.params, made.inputs, made.targets)
    groups = 12
    estimates = torch.stack(
        [
            fisher_of(
                made,
                likelihood=likelihood,
                num_samples=num_samples,
                generator=source,
                reduction="sum",
            ).to_dense()
            for _ in range(groups)
        ]
    )
    mean, spread = estimates.mean(0), estimates.std(0)
    error, dense = mean - exact.to_dense(), exact.to_dense()
    # Entries have a t-distribution of 11 degrees of freedom: beyond 9, one in half a million.
    assert bool((error.abs() <= 9 * spread / math.sqrt(groups) + 1e-12).all())
    # And the estimate is near enough to tell it from a multiple.
    assert float(error.norm()) < 0.25 * float(dense.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_mean_of_squared_gradients_at_the_drawn_targets(
    name: str, dtype: torch.dtype
) -> None:
    made = networks.case(name, dtype)
    op = fisher_of(made, num_samples=2, generator=generator(1))
    assert op._targets is not None
    rows = [
        flat(
            torch.func.grad(
                lambda p, x=x, y=y: networks.cross_entropy_sum(made.model_fn(p, x[None]), y[None])
            )(made.params)
        )
        for targets in op._targets
        for x, y in zip(made.inputs, targets, strict=True)
    ]
    expected = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    tolerance = 1e-10 if dtype == F64 else 1e-4
    assert relative_error(op.to_dense(), expected) <= tolerance
    factor = op._factor()
    assert len(factor) == op.num_rows == len(rows)
    assert relative_error(factor.T @ factor, expected) <= tolerance


@pytest.mark.parametrize("name", ["mlp, squared sum", *CASES])
def test_the_empirical_one_agrees_with_the_reference_of_curvlinops(name: str) -> None:
    made = networks.case(name)
    op = hypergrad.empirical_fisher(
        made.model_fn, made.loss_fn, made.params, made.inputs, made.targets, reduction="sum"
    )
    rows = torch.stack(
        [
            flat(
                torch.func.grad(
                    lambda p, x=x, y=y: made.loss_fn(made.model_fn(p, x[None]), y[None])
                )(made.params)
            )
            for x, y in zip(made.inputs, made.targets, strict=True)
        ]
    )
    assert relative_error(op.to_dense(), rows.T @ rows) <= 1e-10
    assert relative_error(op._factor(), rows) <= 1e-10
    if name in ("mlp, squared sum", "mlp, classes"):  # theirs is one of losses of one term a sample
        params = list(made.module.parameters())
        loss = torch.nn.MSELoss(reduction="sum")
        if name == "mlp, classes":
            loss = torch.nn.CrossEntropyLoss(reduction="sum")  # type: ignore[assignment]
        theirs = functorch_empirical_fisher(
            made.module, loss, params, [(made.inputs, made.targets)]
        ).detach()
        assert relative_error(op.to_dense(), theirs) <= 1e-10


def test_mean_and_sum_differ_by_the_number_of_samples() -> None:
    made = networks.case("mlp, classes")
    batch = (made.model_fn, made.loss_fn, made.params, made.inputs, made.targets)
    mean = hypergrad.empirical_fisher(*batch).to_dense()
    total = hypergrad.empirical_fisher(*batch, reduction="sum").to_dense()
    torch.testing.assert_close(5 * mean, total)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_positive_semidefinite_for_any_draw_and_one_matrix(seed: int) -> None:
    made = networks.case("mlp, classes")
    op = fisher_of(made, generator=generator(seed))
    dense = op.to_dense()
    values = torch.linalg.eigvalsh(dense)
    assert float(values[0]) >= -1e-14 * float(values[-1])
    assert torch.equal(op.to_dense(), dense)  # drawn once
    assert torch.equal(fisher_of(made, generator=generator(seed)).to_dense(), dense)
    assert not torch.equal(fisher_of(made, generator=generator(seed + 9)).to_dense(), dense)


def test_a_given_generator_leaves_the_global_one_alone() -> None:
    made = networks.case(POSITIONS)
    before = torch.get_rng_state()
    first = fisher_of(made, likelihood=of_last_dimension, generator=generator(2))
    assert torch.equal(torch.get_rng_state(), before)
    second = fisher_of(made, likelihood=of_last_dimension, generator=generator(2))
    assert torch.equal(first.to_dense(), second.to_dense())


def test_derivatives_of_a_solve_hold_the_targets_still() -> None:
    made = networks.case("mlp, squared")
    v = {name: gaussian(*p.shape, seed=3) for name, p in made.params.items()}

    def answer(bias: Tensor) -> Tensor:
        op = hypergrad.empirical_fisher(
            made.model_fn, made.loss_fn, {**made.params, "0.bias": bias}, made.inputs, made.targets
        )
        return flat(hypergrad.solve(op, v, hypergrad.Gram(), damping=0.1).value)

    assert torch.autograd.gradcheck(answer, (made.params["0.bias"].requires_grad_(),))


class TestBadInput:
    made = networks.case("mlp, classes")

    def test_unknown_names_are_refused(self) -> None:
        for wrong in ("poisson", 3, (draws,)):
            with pytest.raises(hypergrad.SolverOptionError, match="likelihood is"):
                fisher_of(self.made, likelihood=wrong)
        with pytest.raises(hypergrad.SolverOptionError, match="reduction is 'none'"):
            fisher_of(self.made, reduction="none")
        with pytest.raises(hypergrad.SolverOptionError, match="num_samples is 0"):
            fisher_of(self.made, num_samples=0)
        with pytest.raises(hypergrad.SolverOptionError, match="chunk_size is 0"):
            fisher_of(self.made, chunk_size=0)

    def test_a_likelihood_that_returns_no_distribution(self) -> None:
        with pytest.raises(hypergrad.SolverOptionError, match="returned a Tensor"):
            fisher_of(self.made, likelihood=lambda out: out)
        with pytest.raises(hypergrad.LossError, match="log-likelihood is a float"):
            fisher_of(self.made, likelihood=(draws, lambda out, y: 1.0))

    def test_outputs_without_samples_or_classes(self) -> None:
        p, x = gaussian(3), gaussian(4, 3)
        with pytest.raises(hypergrad.LossError, match="returned a scalar"):
            hypergrad.fisher(lambda p, x: (x @ p).sum(), p, x, likelihood="gaussian")
        with pytest.raises(hypergrad.LossError, match="logits along dimension 1"):
            hypergrad.fisher(lambda p, x: x @ p, p, x)

    def test_scores_that_are_not_finite(self) -> None:
        with pytest.raises(hypergrad.NonFiniteError, match="negative log-likelihood"):
            fisher_of(
                self.made,
                likelihood=(lambda out, source: out, lambda out, y: (out - y).abs().sqrt()),
            )

    def test_targets_of_another_length(self) -> None:
        with pytest.raises(hypergrad.LossError, match=r"target has shape \(4,\), expected 5"):
            hypergrad.empirical_fisher(
                self.made.model_fn,
                self.made.loss_fn,
                self.made.params,
                self.made.inputs,
                self.made.targets[:4],
            )
        with pytest.raises(hypergrad.LossError, match="needs at least the model's inputs"):
            hypergrad.empirical_fisher(self.made.model_fn, self.made.loss_fn, self.made.params)
        with pytest.raises(hypergrad.LossError, match="loss_fn returned"):
            hypergrad.empirical_fisher(
                self.made.model_fn, lambda out, y: out, self.made.params, self.made.inputs,
                self.made.targets,
            )  # fmt: skip

    def test_params_modified_in_place_make_the_operator_stale(self) -> None:
        params = {name: p.clone() for name, p in self.made.params.items()}
        op = hypergrad.fisher(self.made.model_fn, params, self.made.inputs)
        params["0.bias"].add_(1.0)
        with pytest.raises(hypergrad.StaleOperatorError, match=r"0\.bias"):
            op @ params


def test_a_distribution_that_is_checked_on_values() -> None:
    """Gamma validates its support, which only plain tensors can answer."""
    made = networks.case("mlp, squared", F32)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return made.model_fn(p, x).exp()

    op = hypergrad.fisher(
        model_fn,
        made.params,
        made.inputs,
        likelihood=lambda out: Gamma(out, torch.ones_like(out)),
        generator=generator(0),
    )
    assert float(torch.linalg.eigvalsh(op.to_dense())[-1]) > 0


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 1e3), (F32, 1e8)])
def test_noise_is_not_rounded_away_beside_large_outputs(dtype: torch.dtype, offset: float) -> None:
    # The score of a unit Gaussian is the noise itself, whatever the outputs.
    made = hypergrad.fisher(
        lambda p, x: x @ p + offset,
        torch.zeros(2, dtype=dtype),
        torch.eye(2, dtype=dtype),
        likelihood="gaussian",
        num_samples=4000,
        generator=generator(0),
        reduction="sum",
    )
    # Four standard errors of a mean of squares, and the rounding of the products.
    allowed = 4.0 * math.sqrt(2.0 / 4000) + 4.0 * torch.finfo(dtype).eps
    assert bool(((made.to_dense().diagonal().double() - 1.0).abs() <= allowed).all())
