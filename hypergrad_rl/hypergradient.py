"""The pieces of the leader's derivative dF/dtheta = d - c, on parameters and a fixed batch.

    d = grad_theta f        x solves (H + damping I) x = v = grad_w f_outer
    c = (d2 g / dtheta dw) x

Every function here is pure, so that a piece can be compared with another implementation; V_w is
that of the default network, or any ``value_fn`` of parameters w and states. The
linear system of x is in :mod:`hypergrad_rl.inverse`, the step that follows in
:func:`hypergrad_rl.functional.adam`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad_rl.advantages import gae
from hypergrad_rl.config import AgentConfig, BLPOConfig
from hypergrad_rl.errors import RolloutError
from hypergrad_rl.functional import flatten, gradient, shapes_of, unflatten
from hypergrad_rl.inverse import Sketch, Solved, critic_response, inverse_hvp
from hypergrad_rl.modules import Pull, pullback
from hypergrad_rl.networks import (
    DEFAULT_CRITIC,
    Critic,
    Jacobian,
    Params,
    Policy,
    ValueFn,
)
from hypergrad_rl.objectives import cross_term_weights, f_advantage, f_return
from hypergrad_rl.rollout import Batch, Rollout


def critic_advantages(
    critic: Params, batch: Batch, gamma: float, value_fn: ValueFn = DEFAULT_CRITIC
) -> tuple[Tensor, Tensor]:
    """A_w and V_w on the batch, (n, T) each, differentiable in the critic."""
    values, next_values = value_fn(critic, torch.stack([batch.obs, batch.next_obs]))
    return (
        gae(batch.matrix, batch.rewards, values, next_values, batch.terminated, gamma),
        values,
    )


class Acted(NamedTuple):
    """One pass of the policy over a batch: all that d and c need of it.

    Args:
        log_probs: log pi(a|s), (n, T).
        entropy: of pi(.|s), (n, T).
        pull: takes gradients in both to the one in the actor.
    """

    log_probs: Tensor
    entropy: Tensor
    pull: Pull


def act(policy: Policy, actor: Params, batch: Batch) -> Acted:
    """The policy's pass over the batch."""
    (log_probs, entropy), pull = pullback(
        lambda theta: policy.log_prob(theta, batch.obs, batch.actions), actor
    )
    return Acted(log_probs, entropy, pull)


def direct_gradient(
    policy: Policy,
    actor: Params,
    batch: Batch,
    advantages: Tensor,
    config: AgentConfig,
    acted: Acted | None = None,
) -> tuple[Params, dict[str, Tensor]]:
    """The gradient d = grad_theta (f - c_H E[entropy]) on a fixed batch, and statistics.

    The statistics are f, entropy, the clipped fraction, and KL(old || new) by the estimator
    (rho - 1) - log rho; under "log_ratio" log rho of every sample, for who needs it further.
    ``acted`` is the policy's pass where there is one already.
    """
    acted = acted or act(policy, actor, batch)

    def f(outputs: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio, entropy = outputs["log_probs"] - batch.log_probs, outputs["entropy"].mean()
        loss = f_advantage(log_ratio, advantages, config.clip)
        stats = {"policy_loss": loss, "log_ratio": log_ratio, "entropy": entropy}
        return loss - config.entropy_bonus * entropy, stats

    outputs = {"log_probs": acted.log_probs, "entropy": acted.entropy}
    weights, _, stats = gradient(f, outputs)
    log_ratio = stats["log_ratio"]
    ratio = log_ratio.exp()
    stats["approx_kl"] = (ratio - 1 - log_ratio).mean()
    stats["clip_fraction"] = ((ratio - 1).abs() > config.clip).float().mean()
    return acted.pull((weights["log_probs"], weights["entropy"])), stats


def critic_gradient(
    critic: Params, obs: Tensor, targets: Tensor, value_fn: Critic = DEFAULT_CRITIC
) -> tuple[Params, Tensor]:
    """The gradient of g in the critic, J' (2/N) (V_w - G), and g itself; targets (...)."""
    jacobian = value_fn.jacobian(critic, obs.flatten(0, -2))
    errors = jacobian.values - targets.flatten()
    return jacobian.pull((2 / len(errors)) * errors), errors.square().mean()


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


def follower_pass(
    critic: Params,
    log_ratio: Tensor,
    batch: Batch,
    config: BLPOConfig,
    value_fn: Critic = DEFAULT_CRITIC,
) -> tuple[Tensor, Params, Jacobian]:
    """A_w, v, and :func:`transition_jacobian`, of one pass over the states.

    They are those of :func:`critic_advantages` and :func:`follower_gradient`: f_outer depends on w
    through the values alone, so that v = J' (its gradient in them).

    Raises:
        RolloutError: that of :func:`check_successive`.
    """
    jacobian = transition_jacobian(critic, batch, value_fn, successive(config))
    table = {"values": jacobian.values}
    advantages, _ = critic_advantages(table, batch, config.gamma, _entries)
    weights = follower_gradient(table, log_ratio, batch, config, _entries)["values"]
    return advantages, jacobian.pull(weights), jacobian


def successive(config: BLPOConfig) -> bool:
    """Whether a next state counts only where it is the state of the step after it.

    That is so where every end of an episode is worth nothing. The last step of a rollout has no
    step after it.
    """
    return not config.bootstrap_truncated


def check_successive(rollout: Rollout, over: Tensor) -> None:
    """See that next states are the states of the steps after, but where nothing counts: ``over``.

    Up to rounding: the same state may be observed twice, by other code. What is not finite is for
    those to refuse who compute with it.

    Raises:
        RolloutError: one is not.
    """
    following, states = rollout.next_obs[:, :-1], rollout.obs[:, 1:]
    ahead = torch.isclose(following, states, rtol=1e-5, atol=1e-6, equal_nan=True).all(-1)
    skipped = ~(ahead | over[:, :-1])
    if skipped.any():
        env, step = skipped.nonzero()[0].tolist()
        raise RolloutError(
            f"next_obs[{env}, {step}] is not obs[{env}, {step + 1}], though what follows counts "
            "there; expected successive states of an episode, with ends of both kinds counted as "
            "terminated, or bootstrap_truncated=True, which takes every next state as it is"
        )


def transition_jacobian(
    critic: Params, batch: Batch, value_fn: Critic = DEFAULT_CRITIC, successive: bool = False
) -> Jacobian:
    """The Jacobian of the values at ``batch.obs``, then at ``batch.next_obs``: 2 n T rows.

    ``successive``: of the latter only the n at the last step, so that half of the work is saved
    where the others are not needed: see :func:`successive`.

    Raises:
        RolloutError: that of :func:`check_successive`. A graph cannot look; who calls it does.
    """
    if successive and not torch.compiler.is_compiling():
        check_successive(batch, batch.terminated)
    following = batch.next_obs[:, -1:] if successive else batch.next_obs
    states = torch.cat([batch.obs.flatten(0, -2), following.flatten(0, -2)])
    return value_fn.jacobian(critic, states)


def _entries(table: Params, states: Tensor) -> Tensor:
    """A critic that is a table of its values at the states of :func:`transition_jacobian`.

    ``states`` (2, n, T, obs_dim) are states and next states.
    """
    values, shape = table["values"], states.shape[:-1]
    if len(values) == shape.numel():
        return values.view(shape)
    now = values[: shape[1:].numel()].view(shape[1:])
    last = values[now.numel() :, None]
    return torch.stack([now, torch.cat([now[:, 1:], last], 1)])


def cross_term(
    policy: Policy,
    actor: Params,
    critic: Params,
    u: Tensor,
    batch: Batch,
    mode: str,
    value_fn: ValueFn = DEFAULT_CRITIC,
    acted: Acted | None = None,
) -> Params:
    """The cross term c = (d2 g / dtheta dw) x on a fixed batch from u = J x, shaped like the actor.

    ``mode`` is "suffix" or "full": see ``objectives.cross_term_weights``. ``acted`` is the
    policy's pass where there is one already.
    """
    values = value_fn(critic, batch.obs).detach()
    weights = cross_term_weights(mode, batch.matrix, batch.advantages, values, batch.targets, u)
    acted = acted or act(policy, actor, batch)
    return acted.pull((weights / weights.numel(), torch.zeros_like(acted.entropy)))


def published_cross_term(
    policy: Policy,
    actor: Params,
    critic: Params,
    x: Params,
    batch: Batch,
    config: BLPOConfig,
    value_fn: Critic = DEFAULT_CRITIC,
    acted: Acted | None = None,
    jacobian: Jacobian | None = None,
) -> Params:
    """The published update's c: d/dw [grad_theta l(theta, w)] x on a fixed batch.

    l = 2 sum_t L_t (G_t - V_w(s_t)), with L_t = -rho_t A_w,t not clipped, stands in place of g; the
    mean over trajectories. It is a sum over the steps where g is a mean, so that c is far longer
    than d and the bound decides its length. Its sign is opposite to that of the derivative of g,
    which ``cross_term`` computes.

    Along x the values change by J x and, being linear in them, the advantages by those of J x
    without rewards; rho alone depends on theta. ``acted``, the policy's pass, and ``jacobian``,
    that of ``transition_jacobian``, serve where there are any.

    Raises:
        RolloutError: that of :func:`check_successive`.
    """
    acted = acted or act(policy, actor, batch)
    jacobian = jacobian or transition_jacobian(critic, batch, value_fn, successive(config))
    now, change = ({"values": u} for u in (jacobian.values, jacobian.times(x)))
    without = replace(batch, rewards=torch.zeros_like(batch.rewards))
    advantages, values = critic_advantages(now, batch, config.gamma, _entries)
    advantages_change, values_change = critic_advantages(change, without, config.gamma, _entries)
    slope = advantages_change * (batch.targets - values) - advantages * values_change
    weights = -(acted.log_probs - batch.log_probs).exp() * slope * (2 / len(slope))
    return acted.pull((weights, torch.zeros_like(acted.entropy)))


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
    acted: Acted | None = None,
    jacobian: Jacobian | None = None,
    checked: Tensor | None = None,
) -> tuple[Params, Solved]:
    """The cross term c by the options of ``config``, and the solve behind it.

    The curvature is that of ``batch``; c is formed on its trajectories ``envs``, None for all. The
    policy's pass over these, and :func:`transition_jacobian` of the batch, serve where there are
    any.

    Raises:
        RolloutError: that of :func:`check_successive`, under the cross term "paper".
    """
    part = batch if envs is None else batch.select(envs)
    states = jacobian and jacobian.first(batch.targets.numel())
    if config.cross_term == "paper":
        solved = inverse_hvp(critic, batch, v, config, sketch, value_fn, checked, states)
        x = unflatten(solved.value, shapes_of(critic))
        known = jacobian if envs is None else None
        c = published_cross_term(policy, actor, critic, x, part, config, value_fn, acted, known)
        return c, solved
    solved = critic_response(critic, batch, v, config, sketch, value_fn, states, checked)
    u = solved.value if envs is None else solved.value[envs]
    c = cross_term(policy, actor, critic, u, part, config.cross_term, value_fn, acted)
    return c, solved


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
