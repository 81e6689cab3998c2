"""GAE against the recursion, and its derivative in the critic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad_rl.advantages import discount_matrix, gae


def naive_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    decay: float,
) -> Tensor:
    """A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}, backwards in time."""
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values[:, t] * ~terminated[:, t] - values[:, t]
        following = delta + following * decay * ~done[:, t]
        advantages[:, t] = following
    return advantages


def random_rollout(seed: int, envs: int, steps: int, ends: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(
        3, envs, steps, generator=generator, dtype=torch.float64
    )
    done = torch.rand(envs, steps, generator=generator) < ends
    terminated = done & (torch.rand(envs, steps, generator=generator) < 0.5)
    return rewards, values, next_values, terminated, done


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    envs=st.integers(1, 4),
    steps=st.integers(1, 40),
    ends=st.sampled_from([0.0, 0.2, 1.0]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_is_the_recursion(
    seed: int, envs: int, steps: int, ends: float, gamma: float, gae_lambda: float
) -> None:
    rewards, values, next_values, terminated, done = random_rollout(seed, envs, steps, ends)
    matrix = discount_matrix(done, gamma * gae_lambda, torch.float64)
    ours = gae(matrix, rewards, values, next_values, terminated, gamma)
    naive = naive_gae(rewards, values, next_values, terminated, done, gamma, gamma * gae_lambda)
    # T terms of a dot product: rounding about T eps of the largest partial sum.
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)


def test_gae_derivative_in_the_values_by_finite_differences() -> None:
    rewards, values, next_values, terminated, done = random_rollout(3, 2, 9, 0.3)
    matrix = discount_matrix(done, 0.9, torch.float64)

    def advantages(v: Tensor, next_v: Tensor) -> Tensor:
        return gae(matrix, rewards, v, next_v, terminated, 0.95)

    assert torch.autograd.gradcheck(
        advantages, (values.requires_grad_(), next_values.requires_grad_())
    )


@pytest.mark.parametrize("ended_by", ["termination", "time limit"])
def test_a_time_limit_is_bootstrapped_and_a_termination_is_not(ended_by: str) -> None:
    rewards, values = torch.ones(2, 1, 1)
    next_values = torch.full((1, 1), 10.0)
    terminated = torch.tensor([[ended_by == "termination"]])
    matrix = discount_matrix(torch.tensor([[True]]), 0.9)
    advantage = gae(matrix, rewards, values, next_values, terminated, 0.5)
    assert advantage.item() == (0.0 if ended_by == "termination" else 5.0)
