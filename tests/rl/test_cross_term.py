"""The cross term against an independent loop and against exact derivatives of tabular MDPs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.tabular import ACTIONS, GAMMA, LAMBDA, STATES, TabularMDP
from hypergrad_rl.advantages import discount_matrix, gae
from hypergrad_rl.objectives import cross_term_weights

ROLLOUTS = 60_000
Weights = Callable[..., Tensor]


def naive_weights(
    mode: str,
    done: Tensor,
    advantages: Tensor,
    values: Tensor,
    targets: Tensor,
    u: Tensor,
    decay: float,
) -> Tensor:
    """W by the definition, one trajectory, three nested loops."""
    steps = len(done)
    weights = []
    for k in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(k + 1):
            if not any(done[t:k]):
                total += -2 * advantages[k] * decay ** (k - t) * u[t]
        if mode == "full":
            for t in range(k + 1, steps):
                total += -2 * (targets[t] - values[t]) * u[t]
        weights.append(total)
    return torch.stack(weights)


@pytest.mark.parametrize("mode", ["suffix", "full"])
def test_weights_are_those_of_the_definition(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    done = torch.rand(3, 17, generator=generator) < 0.2
    advantages, values, targets, u = torch.randn(4, 3, 17, generator=generator, dtype=torch.float64)
    matrix = discount_matrix(done, 0.9, torch.float64)
    weights = cross_term_weights(mode, matrix, advantages, values, targets, u)
    for row in range(3):
        naive = naive_weights(
            mode, done[row], advantages[row], values[row], targets[row], u[row], 0.9
        )
        torch.testing.assert_close(weights[row], naive, rtol=1e-12, atol=1e-12)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match='expected "suffix" or "full"'):
        cross_term_weights("prefix", *torch.zeros(5, 1, 1))


def estimates(mdp: TabularMDP, weights_of: Weights) -> tuple[Tensor, Tensor]:
    """The estimator's mean over rollouts and its standard error, (STATES, ACTIONS) each."""
    batch = mdp.sample(ROLLOUTS, seed=1)
    values0, next0 = mdp.frozen_values[batch["states"]], mdp.frozen_values[batch["next_states"]]
    total, squares = torch.zeros(2, STATES, ACTIONS, dtype=torch.float64)
    for rows in torch.split(
        torch.arange(ROLLOUTS), 10_000
    ):  # a (T, T) matrix per rollout: in parts
        part = {name: x[rows] for name, x in batch.items()}
        matrix = discount_matrix(part["end"], GAMMA * LAMBDA, torch.float64)
        advantages = gae(matrix, part["rewards"], values0[rows], next0[rows], part["end"], GAMMA)
        weights = weights_of(
            matrix,
            advantages,
            mdp.values[part["states"]],
            advantages + values0[rows],
            mdp.value_change[part["states"]],
            part["end"],
        )
        # grad log pi(a|s) of a softmax policy, summed over time: one-hot(a) - pi(.|s).
        score = (
            torch.nn.functional.one_hot(part["actions"], ACTIONS)
            - mdp.theta.softmax(-1)[part["states"]]
        )
        visits = torch.nn.functional.one_hot(part["states"], STATES).double()
        sample = torch.einsum("nt,nts,nta->nsa", weights, visits, score) / weights.shape[-1]
        total += sample.sum(0)
        squares += sample.square().sum(0)
    mean = total / ROLLOUTS
    return mean, ((squares / ROLLOUTS - mean.square()) / ROLLOUTS).sqrt()


def agrees(mean: Tensor, error: Tensor, exact: Tensor) -> bool:
    """Every coordinate within 4 standard errors, which must be small enough to mean something."""
    assert error.norm() <= 0.05 * exact.norm()
    return bool(((mean - exact).abs() <= 4 * error + 1e-12).all())


def library(mode: str) -> Weights:
    def weights_of(
        matrix: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, u: Tensor, end: Tensor
    ) -> Tensor:
        return cross_term_weights(mode, matrix, advantages, values, targets, u)

    return weights_of


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["suffix", "full"])
def test_cross_term_is_the_exact_mixed_derivative(mode: str, seed: int) -> None:
    mdp = TabularMDP.random(seed)
    exact = mdp.exact_cross_term(fixed_distribution=mode == "suffix")
    mean, error = estimates(mdp, library(mode))
    assert agrees(mean, error, exact)


def wrong_sign(
    matrix: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, u: Tensor, end: Tensor
) -> Tensor:
    return -cross_term_weights("suffix", matrix, advantages, values, targets, u)


def own_step_only(
    matrix: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, u: Tensor, end: Tensor
) -> Tensor:
    return -2 * advantages * u


def gamma_instead_of_gamma_lambda(
    matrix: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, u: Tensor, end: Tensor
) -> Tensor:
    return cross_term_weights(
        "suffix", discount_matrix(end, GAMMA, torch.float64), advantages, values, targets, u
    )


def across_episodes(
    matrix: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, u: Tensor, end: Tensor
) -> Tensor:
    uncut = discount_matrix(torch.zeros_like(end), GAMMA * LAMBDA, torch.float64)
    return cross_term_weights("suffix", uncut, advantages, values, targets, u)


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_sign,
        own_step_only,
        gamma_instead_of_gamma_lambda,
        across_episodes,
    ],
)
def test_a_wrong_cross_term_is_noticed(wrong: Weights) -> None:
    mdp = TabularMDP.random(0)
    mean, error = estimates(mdp, wrong)
    assert not agrees(mean, error, mdp.exact_cross_term(fixed_distribution=True))


def test_the_two_terms_differ() -> None:
    """What "full" adds is no noise: "suffix" is not the derivative of the whole g."""
    mdp = TabularMDP.random(0)
    mean, error = estimates(mdp, library("suffix"))
    assert not agrees(mean, error, mdp.exact_cross_term(fixed_distribution=False))
