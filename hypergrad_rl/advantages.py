"""Generalised advantage estimation (Schulman et al. 2016) as one product with a fixed matrix.

GAE is linear in the critic's values: A = M delta with delta_t = r_t + gamma (1 - terminated_t)
V(s_{t+1}) - V(s_t), and M depends on episode ends only. So it is differentiable in the critic with
no loop over time, and M' is what carries the critic's change back in the cross term of BLPO.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discount_matrix(done: Tensor, decay: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """M[t, k] = decay^(k-t) for k >= t while no episode ends in steps t, ..., k-1; else 0.

    Args:
        done: bool (..., T); True where the episode ended (terminated or truncated) with step t.
        decay: gamma * lambda for GAE.
        dtype: of the result, that of the rewards and values.

    Returns:
        (..., T, T) upper triangular.

    >>> discount_matrix(torch.tensor([False, True, False]), 0.5)
    tensor([[1.0000, 0.5000, 0.0000],
            [0.0000, 1.0000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    steps = torch.arange(done.shape[-1], device=done.device)
    lag = steps - steps[:, None]
    episode = done.long().cumsum(-1) - done.long()  # episodes ended before step t
    same = episode[..., :, None] == episode[..., None, :]
    # A product over time, looked up: a compiled graph would compute the power at every entry.
    powers = torch.full((len(steps),), decay, dtype=torch.float64, device=done.device)
    powers = (powers.cumprod(0) / decay).to(dtype) if decay else (steps == 0).to(dtype)
    return torch.where(same & (lag >= 0), powers[lag.clamp(min=0)], 0.0)


def gae(
    matrix: Tensor,
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    gamma: float,
) -> Tensor:
    """Advantages A = M (r + gamma (1 - terminated) V(s') - V(s)), all (..., T).

    ``next_values`` are V of the transition's own next state, also where a time limit cut the
    episode: a truncated episode is bootstrapped, a terminated one is not.
    """
    delta = rewards + gamma * next_values * (~terminated) - values
    return torch.matmul(matrix, delta.unsqueeze(-1)).squeeze(-1)
