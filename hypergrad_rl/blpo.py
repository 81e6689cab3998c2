"""BLPO: bilevel policy optimisation with Nyström hypergradients (Prakash et al., arXiv 2505.11714).

The actor theta leads, the critic w follows with its best response w*(theta), and the actor descends
the total derivative of its objective (``hypergrad_rl.objectives`` defines f and g)::

    dF/dtheta = d - c,    d = grad_theta f
                          c = (d2 g / dtheta dw) x,   (d2 g / dw dw + damping I) x = v = grad_w f

One update, for a rollout of N environments x T steps under pi_old::

    G, A_w0 <- lambda-returns and advantages under the critic w0       fixed for the rollout
    repeat epochs times, for each trajectory (or group of them) in random order:
        repeat nested_steps times:  w <- Adam(w, grad_w g)
        d <- grad_theta f(theta, w)              A_w under the updated critic, not normalised
        v <- grad_w f_outer(theta, w)            through GAE; f_outer: the return or f itself
        x <- solve (H + damping I) x = v         H: Gauss-Newton (or Hessian) of g, by Nyström; of x
                                                 only u = J x is needed, see critic_response
        c <- (d2 g / dtheta dw) x                one sweep over time, one actor gradient
        c <- c min(1, bound |d| / |c|)           if a bound is set
        theta <- Adam(theta, d - c)

Nested PPO is c = 0 (``solver="none"``); ``solver="identity"`` is x = v / damping, the null model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hypergrad
from hypergrad_rl.advantages import gae
from hypergrad_rl.agent import Agent, apply_gradient, mean_stats, policy_stats
from hypergrad_rl.config import BLPOConfig
from hypergrad_rl.networks import Params, Policy, critic_value
from hypergrad_rl.objectives import (
    clipped_surrogate,
    cross_term_weights,
    f_advantage,
    f_return,
    value_loss,
)
from hypergrad_rl.rollout import Batch, Rollout


def inner_loss(critic: Params, obs: Tensor, targets: Tensor) -> Tensor:
    """g(w), the critic's loss on fixed targets."""
    return value_loss(critic_value(critic, obs), targets)


def critic_advantages(critic: Params, batch: Batch, gamma: float) -> tuple[Tensor, Tensor]:
    """A_w and V_w on the batch, (n, T) each, differentiable in the critic."""
    values, next_values = critic_value(critic, torch.stack([batch.obs, batch.next_obs]))
    return (
        gae(batch.matrix, batch.rewards, values, next_values, batch.terminated, gamma),
        values,
    )


def outer_gradients(
    policy: Policy, actor: Params, critic: Params, batch: Batch, config: BLPOConfig
) -> tuple[Params, Params, dict[str, Tensor]]:
    """The gradients d = grad_theta f and v = grad_w f_outer on a fixed batch, and statistics.

    ``config.outer_objective`` names f_outer: "return" for :func:`f_return`, "advantage" for f
    itself. d is grad_theta f under both. v is empty for ``solver="none"``.
    """
    log_probs, entropy = policy.log_prob(actor, batch.obs, batch.actions)
    log_ratio = log_probs - batch.log_probs
    advantages, values = critic_advantages(critic, batch, config.gamma)
    f = f_advantage(log_ratio, advantages.detach(), config.clip)
    d = _grad(f, actor)
    v: Params = {}
    if config.solver != "none":
        if config.outer_objective == "return":
            outer = f_return(log_ratio.detach(), advantages, values)
        else:
            outer = f_advantage(log_ratio.detach(), advantages, config.clip)
        v = _grad(outer, critic)
    return d, v, {"policy_loss": f.detach(), **policy_stats(log_ratio, entropy, config.clip)}


def inverse_hvp(
    critic: Params, batch: Batch, v: Params, config: BLPOConfig, generator: torch.Generator
) -> tuple[Params, float]:
    """Solve (H + damping I) x = v, H the curvature of g at w; x and its true relative residual.

    The Gauss-Newton matrix of g is (2/N) J'J for N samples, positive semi-definite; the Hessian is
    indefinite away from the optimum, where CG stops early and says so in its residual.
    """
    if config.solver == "identity":
        return {name: leaf / config.damping for name, leaf in v.items()}, float("nan")
    curvature: hypergrad.LinearOperator
    if config.curvature == "ggn":
        curvature = hypergrad.ggn(critic_value, value_loss, critic, batch.obs, batch.targets)
    else:
        curvature = hypergrad.hessian(inner_loss, critic, batch.obs, batch.targets)
    return _solve(curvature, v, config, generator)


def critic_response(
    critic: Params, batch: Batch, v: Params, config: BLPOConfig, generator: torch.Generator
) -> tuple[Tensor, float]:
    """How x changes the critic's values on the batch: u = J x, (n, T); and the relative residual.

    It is all that the cross term needs of x. With the Gauss-Newton curvature it solves a system as
    large as the batch, not as the critic (N = 128 against 4,545 parameters by default), by

        J ((2/N) J'J + damping I)^-1 v  =  ((2/N) J J' + damping I)^-1 J v

    with J (N x parameters) computed once, so that a product costs two small matrix products. Both
    matrices have the same non-zero eigenvalues, hence the same Nyström rank serves. The residual is
    that of the system solved.
    """
    if config.curvature == "ggn" and config.solver != "identity":
        jacobian = _jacobian(critic, batch.obs)
        rhs = jacobian @ _flatten(v)
        kernel = hypergrad.as_operator(
            lambda u: (2 / len(rhs)) * (jacobian @ (u @ jacobian)), like=rhs, batchable=True
        )
        u, residual = _solve(kernel, rhs, config, generator)
        return u.view_as(batch.targets), residual
    x, residual = inverse_hvp(critic, batch, v, config, generator)
    return _directional(lambda w: critic_value(w, batch.obs), critic, x).detach(), residual


def _solve(
    curvature: hypergrad.LinearOperator, v: Any, config: BLPOConfig, generator: torch.Generator
) -> tuple[Any, float]:
    solver: hypergrad.Solver
    if config.solver == "nystrom":
        rank = min(config.rank, curvature.shape[0])
        solver = hypergrad.Nystrom(rank, config.sketch, generator=generator)
    elif config.solver == "cg":
        solver = hypergrad.CG(max_iters=config.cg_iters, rtol=config.cg_rtol)
    else:
        solver = hypergrad.Exact()
    # An inexact answer is no failure here: its residual is logged for every update.
    solution = hypergrad.solve(curvature, v, solver, damping=config.damping, on_failure="ignore")
    return solution.value, solution.info.relative_residual


def cross_term(
    policy: Policy, actor: Params, critic: Params, u: Tensor, batch: Batch, mode: str
) -> Params:
    """The cross term c = (d2 g / dtheta dw) x on a fixed batch from u = J x, shaped like the actor.

    ``mode`` is "suffix" or "full": see :func:`cross_term_weights`.
    """
    with torch.no_grad():
        values = critic_value(critic, batch.obs)
        weights = cross_term_weights(mode, batch.matrix, batch.advantages, values, batch.targets, u)
    log_probs, _ = policy.log_prob(actor, batch.obs, batch.actions)
    return _grad((log_probs * weights).mean(), actor)


def published_cross_term(
    policy: Policy, actor: Params, critic: Params, x: Params, batch: Batch, config: BLPOConfig
) -> Params:
    """The published update's c: d/dw [grad_theta l(theta, w)] x on a fixed batch.

    l = mean_t L_t (G_t - V_w(s_t)), with L_t the summands of f, stands in place of g.
    Its sign is opposite to that of the derivative of g, which ``cross_term`` computes.
    """

    def surrogate(w: Params) -> Tensor:
        log_ratio = policy.log_prob(actor, batch.obs, batch.actions)[0] - batch.log_probs
        advantages, values = critic_advantages(w, batch, config.gamma)
        losses = clipped_surrogate(log_ratio, advantages, config.clip)
        return (losses * (batch.targets - values)).mean()

    return _grad(_directional(surrogate, critic, x), actor)


def correction(
    policy: Policy,
    actor: Params,
    critic: Params,
    v: Params,
    batch: Batch,
    config: BLPOConfig,
    generator: torch.Generator,
) -> tuple[Params, float]:
    """The cross term c by the options of ``config``, and its linear system's relative residual."""
    if config.cross_term == "paper":
        x, residual = inverse_hvp(critic, batch, v, config, generator)
        return published_cross_term(policy, actor, critic, x, batch, config), residual
    u, residual = critic_response(critic, batch, v, config, generator)
    return cross_term(policy, actor, critic, u, batch, config.cross_term), residual


def combine(
    d: Params, c: Params, bound: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The step d - c min(1, bound |d| / |c|), and how c compares with d: ratio, cosine, bound."""
    flat_d, flat_c = _flatten(d), _flatten(c)
    norm_d, norm_c = flat_d.norm(), flat_c.norm()
    tiny = torch.finfo(norm_c.dtype).tiny
    ratio = norm_c / norm_d.clamp_min(tiny)
    scale = torch.ones(()) if bound is None else (bound / ratio.clamp_min(tiny)).clamp_max(1.0)
    stats = {
        # Undefined for d = 0, which happens when every sample of a minibatch is clipped.
        "correction_ratio": norm_c / norm_d if norm_d > 0 else torch.tensor(torch.nan),
        "correction_cosine": flat_d.dot(flat_c) / (norm_d * norm_c),
        "bound_active": (scale < 1).float(),
    }
    return {name: d[name] - scale * c[name] for name in d}, stats


class BLPO(Agent):
    """Bilevel policy optimisation; the module's documentation has the algorithm."""

    config: BLPOConfig

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve actor and critic on one rollout; statistics averaged over the minibatches.

        Cost per minibatch: ``nested_steps`` critic gradients, two actor gradients, one gradient of
        f_outer in the critic, the critic's Jacobian on the batch, ``rank`` + 1 products with it.
        """
        config, policy, actor, critic = self.config, self.policy, self.actor, self.critic
        whole = self.make_batch(rollout)
        stats = []
        for _ in range(config.epochs):
            order = torch.randperm(config.num_envs, generator=self.generator)
            for envs in torch.split(order, config.envs_per_minibatch):
                batch = whole.select(envs)
                for _ in range(config.nested_steps):
                    g = inner_loss(critic, batch.obs, batch.targets)
                    apply_gradient(self.critic_optimizer, critic, _grad(g, critic).values())
                step, v, entry = outer_gradients(policy, actor, critic, batch, config)
                entry["value_loss"] = g.detach()
                if config.solver != "none":
                    c, residual = correction(
                        policy, actor, critic, v, batch, config, self.generator
                    )
                    step, comparison = combine(step, c, config.correction_bound)
                    entry |= comparison | {"ihvp_relative_residual": torch.tensor(residual)}
                apply_gradient(self.actor_optimizer, actor, step.values())
                stats.append(entry)
        return mean_stats(stats, whole)


def _grad(loss: Tensor, params: Params) -> Params:
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def _detach(params: Params) -> Params:
    return {name: p.detach() for name, p in params.items()}


def _directional(fn: Callable[[Params], Tensor], critic: Params, x: Params) -> Tensor:
    """d/ds fn(w + s x) at s = 0, by forward mode."""
    tangent: Tensor = torch.func.jvp(fn, (_detach(critic),), (x,))[1]
    return tangent


def _jacobian(critic: Params, obs: Tensor) -> Tensor:
    """J = dV_w(s)/dw, one row a state: (N, parameters), in the order of ``_flatten``."""
    gradient = torch.func.grad(critic_value)
    rows = torch.func.vmap(gradient, (None, 0))(_detach(critic), obs.flatten(0, -2))
    return torch.cat([leaf.flatten(1) for leaf in rows.values()], dim=1)


def _flatten(params: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in params.values()])
