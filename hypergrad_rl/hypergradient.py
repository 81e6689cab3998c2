"""The pieces of the leader's derivative dF/dtheta = d - c, on parameters and a fixed batch.

    d = grad_theta f        x solves (H + damping I) x = v = grad_w f_outer
    c = (d2 g / dtheta dw) x

Every function here is pure, so that a piece can be compared with another implementation; V_w is
that of the default network, or any ``value_fn`` of parameters w and states. The
linear system of x is in :mod:`hypergrad_rl.inverse`, the step that follows in
:func:`hypergrad_rl.functional.adam`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad_rl.advantages import gae
from hypergrad_rl.config import AgentConfig, BLPOConfig
from hypergrad_rl.functional import flatten, gradient, shapes_of, unflatten
from hypergrad_rl.inverse import Sketch, Solved, critic_response, inverse_hvp
from hypergrad_rl.networks import DEFAULT_CRITIC, Critic, Params, Policy, ValueFn, directional
from hypergrad_rl.objectives import cross_term_weights, f_advantage, f_return
from hypergrad_rl.rollout import Batch


def critic_advantages(
    critic: Params, batch: Batch, gamma: float, value_fn: ValueFn = DEFAULT_CRITIC
) -> tuple[Tensor, Tensor]:
    """A_w and V_w on the batch, (n, T) each, differentiable in the critic."""
    values, next_values = value_fn(critic, torch.stack([batch.obs, batch.next_obs]))
    return (
        gae(batch.matrix, batch.rewards, values, next_values, batch.terminated, gamma),
        values,
    )


def direct_gradient(
    policy: Policy, actor: Params, batch: Batch, advantages: Tensor, config: AgentConfig
) -> tuple[Params, dict[str, Tensor]]:
    """The gradient d = grad_theta (f - c_H E[entropy]) on a fixed batch, and statistics.

    The statistics are f, entropy, the clipped fraction, and KL(old || new) by the estimator
    (rho - 1) - log rho; under "log_ratio" log rho of every sample, for who needs it further.
    """

    def f(theta: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, entropy = policy.log_prob(theta, batch.obs, batch.actions)
        log_ratio, mean_entropy = log_probs - batch.log_probs, entropy.mean()
        loss = f_advantage(log_ratio, advantages, config.clip)
        stats = {"policy_loss": loss, "log_ratio": log_ratio, "entropy": mean_entropy}
        return loss - config.entropy_bonus * mean_entropy if config.entropy_bonus else loss, stats

    d, _, stats = gradient(f, actor)
    log_ratio = stats["log_ratio"]
    ratio = log_ratio.exp()
    stats["approx_kl"] = (ratio - 1 - log_ratio).mean()
    stats["clip_fraction"] = ((ratio - 1).abs() > config.clip).float().mean()
    return d, stats


def follower_gradient(
    critic: Params,
    log_ratio: Tensor,
    batch: Batch,
    config: BLPOConfig,
    value_fn: ValueFn = DEFAULT_CRITIC,
) -> Params:
    """The right-hand side v = grad_w f_outer, through the advantages, shaped like the critic.

    ``config.outer_objective`` names f_outer: "return" for ``f_return``, "advantage" for f.

    Args:
        critic: w.
        log_ratio: log rho of every sample, (n, T).
        batch: n trajectories.
        config: of it, the objective, ``gamma`` and ``clip``.
        value_fn: V_w.
    """

    def f_outer(w: Params) -> tuple[Tensor, dict[str, Tensor]]:
        advantages, values = critic_advantages(w, batch, config.gamma, value_fn)
        if config.outer_objective == "return":
            return f_return(log_ratio, advantages, values), {}
        return f_advantage(log_ratio, advantages, config.clip), {}

    return gradient(f_outer, critic)[0]


def cross_term(
    policy: Policy,
    actor: Params,
    critic: Params,
    u: Tensor,
    batch: Batch,
    mode: str,
    value_fn: ValueFn = DEFAULT_CRITIC,
) -> Params:
    """The cross term c = (d2 g / dtheta dw) x on a fixed batch from u = J x, shaped like the actor.

    ``mode`` is "suffix" or "full": see ``objectives.cross_term_weights``.
    """
    values = value_fn(critic, batch.obs).detach()
    weights = cross_term_weights(mode, batch.matrix, batch.advantages, values, batch.targets, u)

    def weighted(theta: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, _ = policy.log_prob(theta, batch.obs, batch.actions)
        return (log_probs * weights).mean(), {}

    return gradient(weighted, actor)[0]


def published_cross_term(
    policy: Policy,
    actor: Params,
    critic: Params,
    x: Params,
    batch: Batch,
    config: BLPOConfig,
    value_fn: ValueFn = DEFAULT_CRITIC,
) -> Params:
    """The published update's c: d/dw [grad_theta l(theta, w)] x on a fixed batch.

    l = 2 sum_t L_t (G_t - V_w(s_t)), with L_t = -rho_t A_w,t not clipped, stands in place of g; the
    mean over trajectories. It is a sum over the steps where g is a mean, so that c is far longer
    than d and the bound decides its length. Its sign is opposite to that of the derivative of g,
    which ``cross_term`` computes.
    """

    def derivative(theta: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = policy.log_prob(theta, batch.obs, batch.actions)[0] - batch.log_probs

        def surrogate(w: Params) -> Tensor:
            advantages, values = critic_advantages(w, batch, config.gamma, value_fn)
            losses = -log_ratio.exp() * advantages
            # Not .sum(-1).mean(): of one trajectory, that crashes as compiled by PyTorch 2.13.
            return (losses * (batch.targets - values)).sum() * (2 / len(losses))

        return directional(surrogate, critic, x), {}

    return gradient(derivative, actor)[0]


def correction(
    policy: Policy,
    actor: Params,
    critic: Params,
    v: Params,
    batch: Batch,
    config: BLPOConfig,
    sketch: Tensor | Sketch | None = None,
    envs: Tensor | None = None,
    value_fn: Critic = DEFAULT_CRITIC,
) -> tuple[Params, Solved]:
    """The cross term c by the options of ``config``, and the solve behind it.

    The curvature is that of ``batch``; c is formed on its trajectories ``envs``, None for all.
    """
    part = batch if envs is None else batch.select(envs)
    if config.cross_term == "paper":
        solved = inverse_hvp(critic, batch, v, config, sketch, value_fn)
        x = unflatten(solved.value, shapes_of(critic))
        return published_cross_term(policy, actor, critic, x, part, config, value_fn), solved
    solved = critic_response(critic, batch, v, config, sketch, value_fn)
    u = solved.value if envs is None else solved.value[envs]
    return cross_term(policy, actor, critic, u, part, config.cross_term, value_fn), solved


def combine(
    d: Params, c: Params, bound: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The step d - c min(1, bound |d| / |c|), and how c compares with d: ratio, cosine, bound."""
    flat_d, flat_c = flatten(d), flatten(c)
    norm_d, norm_c = flat_d.norm(), flat_c.norm()
    tiny = torch.finfo(norm_c.dtype).tiny
    ratio = norm_c / norm_d.clamp_min(tiny)
    scale = torch.ones_like(ratio)
    if bound is not None:
        scale = (bound / ratio.clamp_min(tiny)).clamp_max(1.0)
    stats = {
        # Undefined for d = 0, which happens when every sample of a minibatch is clipped.
        "correction_ratio": torch.where(norm_d > 0, norm_c / norm_d, torch.nan),
        "correction_cosine": flat_d.dot(flat_c) / (norm_d * norm_c),
        "bound_active": (scale < 1).float(),
    }
    return {name: d[name] - scale * c[name] for name in d}, stats
