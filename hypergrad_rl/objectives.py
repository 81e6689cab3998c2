"""The leader's and the follower's objectives, and the cross term between them.

    outer  f(theta, w) = -E[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ]
    inner  g(theta, w) =  E[ (G_t - V_w(s_t))^2 ]        rho_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)

Every expectation is a mean over the batch's samples. Shapes are (n, T): n trajectories of T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Summands of f: -min(rho A, clip(rho) A) per sample (Schulman et al. 2017, equation 7)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """The inner objective g = mean (G - V)^2, a scalar."""
    return (targets - values).square().mean()


def f_advantage(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The published outer objective, a scalar.

    Through A_w it contains -V_w: a leader that sees the critic's response gains by making the
    critic pessimistic.
    """
    return clipped_surrogate(log_ratio, advantages, clip).mean()


def f_return(log_ratio: Tensor, advantages: Tensor, values: Tensor) -> Tensor:
    """The value the leader wants, without the baseline: -E[rho_t (A_w,t + V_w(s_t))], a scalar."""
    return -(log_ratio.exp() * (advantages + values)).mean()


def cross_term_weights(
    mode: str,
    matrix: Tensor,
    advantages: Tensor,
    values: Tensor,
    targets: Tensor,
    value_change: Tensor,
) -> Tensor:
    """W with (d2 g / dtheta dw) x = mean_k grad_theta log pi(a_k|s_k) W_k.

    grad_w g . x = (1/T) sum_t e_t with e_t = -2 (G_t - V_w(s_t)) u_t and u_t = grad_w V_w(s_t) . x.
    An action at step k changes, by the score-function identity,

    - the targets G_t of the steps t <= k of its episode, by (gamma lambda)^(k-t) A_k:
      W_k = -2 A_k sum_{t <= k} (gamma lambda)^(k-t) u_t             ("suffix": these alone)
    - the states visited later: + sum_{t > k} e_t          ("full": unbiased for g, high variance)

    A_k are the advantages under the critic that made the targets, which are fixed. Actor-critics of
    this family are derived by Zheng et al. 2022 ("Stackelberg actor-critic").

    Args:
        mode: "suffix" or "full".
        matrix: (n, T, T), see ``discount_matrix``.
        advantages: (n, T), under the frozen critic w0.
        values: (n, T), V_w under the current critic.
        targets: (n, T), G under the frozen critic w0.
        value_change: (n, T), u.
    """
    change_before = torch.matmul(value_change.unsqueeze(-2), matrix).squeeze(-2)  # M' u
    weights = -2.0 * advantages * change_before
    if mode == "full":
        e = -2.0 * (targets - values) * value_change
        # Later episodes of the same rollout count: when this one ends decides when they begin.
        weights = weights + e.sum(-1, keepdim=True) - e.cumsum(-1)
    elif mode != "suffix":
        raise ValueError(f'mode={mode!r}: expected "suffix" or "full"')
    return weights
