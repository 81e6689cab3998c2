"""The whole of BLPO's step on sampled rollouts against the exact total derivative dF/dtheta.

The library's own functions, on softmax policies and linear critics of one-hot states; the exact
derivative is :func:`hypergrad.hypergradient` on sums over states, actions and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from benchmarks.outer_objective import Game
from benchmarks.tabular import ACTIONS, GAMMA, LAMBDA, STATES, TabularMDP
from hypergrad_rl import BLPOConfig
from hypergrad_rl import hypergradient as pieces
from hypergrad_rl.advantages import gae
from hypergrad_rl.networks import CategoricalPolicy, Params, critic_value
from hypergrad_rl.objectives import cross_term_weights
from hypergrad_rl.rollout import Batch, Rollout, make_batch

#: Every group of rollouts makes one step, as a minibatch does; their spread is the standard error.
ROLLOUTS = 2_000
#: The derivative of the whole g is far noisier than that with the states held fixed.
GROUPS = {"suffix": 20, "full": 100}
POLICY = CategoricalPolicy(ACTIONS)
F64 = torch.float64


def linear(weight: Tensor) -> Params:
    """A network without hidden layers, (out, STATES) on one-hot states, no bias."""
    return {"weight0": weight, "bias0": torch.zeros(len(weight), dtype=F64)}


def batch_of(mdp: TabularMDP, seed: int) -> Batch:
    """Rollouts under theta, with advantages and targets under the frozen critic."""
    sample = mdp.sample(ROLLOUTS, seed)
    rollout = Rollout(
        obs=torch.nn.functional.one_hot(sample["states"], STATES).to(F64),
        actions=sample["actions"],
        rewards=sample["rewards"],
        next_obs=torch.nn.functional.one_hot(sample["next_states"], STATES).to(F64),
        terminated=sample["end"],
        done=sample["end"],
    )
    frozen = linear(mdp.frozen_values[None])
    return make_batch(POLICY, linear(mdp.theta.T), frozen, rollout, GAMMA, LAMBDA)


def sampled(mdp: TabularMDP, response: Tensor, config: BLPOConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the step d - c over groups, (STATES, ACTIONS) each."""
    actor = {name: p.requires_grad_() for name, p in linear(mdp.theta.T.clone()).items()}
    critic = {name: p.requires_grad_() for name, p in linear(response[None].clone()).items()}
    steps = []
    groups = GROUPS[config.cross_term]
    for group in range(groups):
        batch = batch_of(mdp, seed=100 + group)
        advantages, _ = pieces.critic_advantages(critic, batch, config.gamma)
        d, stats = pieces.direct_gradient(POLICY, actor, batch, advantages.detach(), config)
        v = pieces.follower_gradient(critic, stats["log_ratio"], batch, config)
        c, _ = pieces.correction(POLICY, actor, critic, v, batch, config)
        step, _ = pieces.combine(d, c, config.correction_bound)
        steps.append(step["weight0"].T)
    all_steps = torch.stack(steps)
    return all_steps.mean(0), all_steps.std(0) / groups**0.5


def settings(cross_term: Any, objective: Any) -> BLPOConfig:
    # The bias makes the critic's Hessian singular, on directions that change no value.
    return BLPOConfig(
        gamma=GAMMA, gae_lambda=LAMBDA, solver="exact", curvature="hessian", damping=1e-9,
        cross_term=cross_term, outer_objective=objective, correction_bound=None,
    )  # fmt: skip


def exact(mdp: TabularMDP, cross_term: str, objective: str) -> tuple[Tensor, Tensor]:
    """The best response, and the total derivative there."""
    distribution = "fixed" if cross_term == "suffix" else "moving"
    game = Game(mdp, torch.eye(STATES, dtype=F64), LAMBDA, objective, distribution)
    response = game.best_response()
    result = hypergrad.hypergradient(
        game.inner_loss, game.outer_loss, response, mdp.theta, solver=hypergrad.Exact()
    )
    return response, result.grad


def agrees(mean: Tensor, error: Tensor, derivative: Tensor) -> bool:
    """Every coordinate within 4 standard errors, which must be small enough to mean something."""
    assert error.norm() <= 0.05 * derivative.norm()
    return bool(((mean - derivative).abs() <= 4 * error + 1e-12).all())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("objective", ["return", "advantage"])
@pytest.mark.parametrize("cross_term", ["suffix", pytest.param("full", marks=pytest.mark.slow)])
def test_the_step_is_the_total_derivative(cross_term: str, objective: str, seed: int) -> None:
    mdp = TabularMDP.random(seed)
    response, derivative = exact(mdp, cross_term, objective)
    mean, error = sampled(mdp, response, settings(cross_term, objective))
    assert agrees(mean, error, derivative)


def own_step_only(mode: str, matrix: Tensor, advantages: Tensor, *rest: Tensor) -> Tensor:
    return -2 * advantages * rest[-1]


def wrong_sign(*arguments: Any) -> Tensor:
    return -cross_term_weights(*arguments)


def gamma_alone(mode: str, matrix: Tensor, *rest: Tensor) -> Tensor:
    lag = torch.arange(matrix.shape[-1]) - torch.arange(matrix.shape[-1])[:, None]
    return cross_term_weights(mode, matrix * LAMBDA ** -lag.to(F64), *rest)


def detached(
    critic: Params, batch: Batch, gamma: float, value_fn: Any = critic_value
) -> tuple[Tensor, Tensor]:
    """Advantages that bootstrap from values the critic's gradient does not reach."""
    values = value_fn(critic, batch.obs)
    next_values = value_fn(critic, batch.next_obs).detach()
    return gae(batch.matrix, batch.rewards, values, next_values, batch.terminated, gamma), values


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cross_term_weights", own_step_only),
        ("cross_term_weights", wrong_sign),
        ("cross_term_weights", gamma_alone),
        ("critic_advantages", detached),
    ],
)
def test_a_wrong_step_is_noticed(
    name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mdp = TabularMDP.random(0)
    response, derivative = exact(mdp, "suffix", "return")
    monkeypatch.setattr(pieces, name, wrong)
    mean, error = sampled(mdp, response, settings("suffix", "return"))
    assert not agrees(mean, error, derivative)
