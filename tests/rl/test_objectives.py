"""Losses against finite differences, networks and distributions against PyTorch's own."""

import math
from typing import Any

import pytest
import torch

from hypergrad_rl.networks import (
    CategoricalPolicy,
    GaussianPolicy,
    Params,
    Policy,
    critic_value,
    init_critic,
)
from hypergrad_rl.objectives import clipped_surrogate, f_advantage, f_return, value_loss


def double(params: Params) -> Params:
    return {name: p.detach().double().requires_grad_() for name, p in params.items()}


def test_losses_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages, values, targets = 0.3 * torch.randn(
        4, 2, 6, generator=generator, dtype=torch.float64
    )
    for loss, inputs in (
        (value_loss, (values, targets)),
        (lambda r, a: f_advantage(r, a, 0.2), (log_ratio, advantages)),
        (f_return, (log_ratio, advantages, values)),
    ):
        assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


def test_clipping_stops_the_gradient_only_where_it_should() -> None:
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(
        clipped_surrogate(log_ratio, advantages, 0.2).sum(), log_ratio
    )
    # Moving further away pays no more where A > 0 and rho > 1.2, or A < 0 and rho < 0.8.
    assert gradient.tolist() == [0.0, 1.5, -0.5, 0.0]


@pytest.mark.parametrize("policy", [CategoricalPolicy(3), GaussianPolicy(2)])
def test_log_probabilities_and_entropy(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    params = double(policy.init(4, (8, 8), generator))
    obs = torch.randn(5, 7, 4, generator=generator, dtype=torch.float64)
    if isinstance(policy, CategoricalPolicy):
        actions = torch.randint(3, (5, 7), generator=generator)
        mode_logits = torch.stack(
            [policy.log_prob(params, obs, torch.full((5, 7), a))[0] for a in range(3)], -1
        )
        reference: Any = torch.distributions.Categorical(logits=mode_logits)
    else:
        with torch.no_grad():
            params["log_std"].copy_(torch.tensor([-0.5, 0.3]))
        actions = torch.randn(5, 7, 2, generator=generator, dtype=torch.float64)
        normal = torch.distributions.Normal(policy.act(params, obs, None), params["log_std"].exp())
        reference = torch.distributions.Independent(normal, 1)
    log_prob, entropy = policy.log_prob(params, obs, actions)
    torch.testing.assert_close(log_prob, reference.log_prob(actions))
    torch.testing.assert_close(entropy, reference.entropy())


def test_gumbel_noise_samples_the_softmax() -> None:
    policy = CategoricalPolicy(3)
    generator = torch.Generator().manual_seed(0)
    params = policy.init(1, (4,), generator)
    with torch.no_grad():
        params["bias1"].copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    samples = 40_000
    actions = policy.act(params, torch.zeros(samples, 1), policy.noise(1, samples, generator)[0])
    frequency = actions.bincount(minlength=3) / samples
    error = 4 * torch.sqrt(torch.tensor([0.25, 0.21, 0.16]) / samples)
    assert ((frequency - torch.tensor([0.5, 0.3, 0.2])).abs() <= error).all()


def test_initialisation_is_orthogonal_with_the_published_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    actor = CategoricalPolicy(3).init(4, (64, 64), generator)
    critic = init_critic(4, (64, 64), generator)
    for params, gain in ((actor, 0.01), (critic, 1.0)):
        hidden, head = params["weight1"], params["weight2"]
        torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), rtol=0, atol=1e-4)
        torch.testing.assert_close(head @ head.T, gain**2 * torch.eye(len(head)), rtol=0, atol=1e-4)
        assert all(not p.any() for name, p in params.items() if name.startswith("bias"))
    assert critic_value(critic, torch.zeros(2, 5, 4)).shape == (2, 5)


def test_gaussian_entropy_at_unit_scale() -> None:
    policy = GaussianPolicy(1)
    params = policy.init(2, (4,), torch.Generator().manual_seed(0))
    _, entropy = policy.log_prob(params, torch.zeros(1, 2), torch.zeros(1, 1))
    assert math.isclose(entropy.item(), 0.5 * math.log(2 * math.pi * math.e), rel_tol=1e-6)
