"""BLPO: bilevel policy optimisation with Nyström hypergradients (Prakash et al., arXiv 2505.11714).

The actor theta leads, the critic w follows with its best response w*(theta), and the actor descends
the total derivative of its objective (``hypergrad_rl.objectives`` defines f and g)::

    dF/dtheta = d - c,    d = grad_theta f
                          c = (d2 g / dtheta dw) x,   (d2 g / dw dw + damping I) x = v = grad_w f

One update, for a rollout of N environments x T steps under pi_old::

    G, A_w0 <- lambda-returns and advantages under the critic w0       fixed for the rollout
    repeat epochs times, for each trajectory (or group of them) in random order:
        repeat nested_steps times:  w <- Adam(w, grad_w g)
        d <- grad_theta (f - c_H entropy)        A_w under the updated critic, not normalised
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
from typing import Any, Literal

import torch
from torch import Tensor

import hypergrad
from hypergrad_rl.advantages import gae
from hypergrad_rl.agent import Agent, direct_gradient, mean_stats
from hypergrad_rl.compiled import Compiled
from hypergrad_rl.config import BLPOConfig
from hypergrad_rl.functional import AdamState, adam, flatten, gradient, unflatten
from hypergrad_rl.networks import Params, Policy, ValueJacobian, critic_value
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
    advantages, _ = critic_advantages(critic, batch, config.gamma)

    d, stats = direct_gradient(policy, actor, batch, advantages.detach(), config)
    log_ratio = stats.pop("log_ratio")

    def f_outer(w: Params) -> tuple[Tensor, dict[str, Tensor]]:
        advantages, values = critic_advantages(w, batch, config.gamma)
        if config.outer_objective == "return":
            return f_return(log_ratio, advantages, values), {}
        return f_advantage(log_ratio, advantages, config.clip), {}

    v = gradient(f_outer, critic)[0] if config.solver != "none" else {}
    return d, v, stats


def sketch_rows(
    config: BLPOConfig, num_samples: int, num_params: int, generator: torch.Generator
) -> Tensor | None:
    """Random rows to sketch the curvature of a minibatch with; None if the solver needs none.

    As long as the system: one entry a sample, or one a parameter of the critic.

    They are drawn here, and not in the solver, because what is drawn within a compiled graph is not
    what is drawn outside.
    """
    if config.solver != "nystrom":
        return None
    in_sample_space = config.curvature == "ggn" and config.cross_term != "paper"
    size = num_samples if in_sample_space else num_params
    rank = min(config.rank, size)
    if config.sketch == "gaussian":
        return torch.randn(rank, size, generator=generator)
    columns = torch.randperm(size, generator=generator)[:rank]
    return torch.zeros(rank, size).scatter_(1, columns[:, None], 1.0)


def inverse_hvp(
    critic: Params, batch: Batch, v: Params, config: BLPOConfig, omega: Tensor | None
) -> tuple[Params, Tensor]:
    """Solve (H + damping I) x = v, H the curvature of g at w; x and its true relative residual.

    The Gauss-Newton matrix of g is (2/N) J'J for N samples, positive semi-definite; the Hessian is
    indefinite away from the optimum, where CG stops early and says so in its residual.
    ``omega`` is the :func:`sketch_rows`.
    """
    if config.solver == "identity":
        x = {name: leaf / config.damping for name, leaf in v.items()}
        return x, torch.full((), torch.nan)
    curvature: hypergrad.LinearOperator
    if config.curvature == "ggn":
        curvature = hypergrad.ggn(critic_value, value_loss, critic, batch.obs, batch.targets)
    else:
        # Not the mode that was fastest today: a resumed run repeats the other to the last bit.
        mode: Literal["reverse_over_reverse"] = "reverse_over_reverse"
        curvature = hypergrad.hessian(inner_loss, critic, batch.obs, batch.targets, mode=mode)
    return _solve(curvature, v, config, omega)


def critic_response(
    critic: Params, batch: Batch, v: Params, config: BLPOConfig, omega: Tensor | None
) -> tuple[Tensor, Tensor]:
    """How x changes the critic's values on the batch: u = J x, (n, T); and the relative residual.

    It is all that the cross term needs of x. With the Gauss-Newton curvature it solves a system as
    large as the batch, not as the critic (N = 128 against 4,545 parameters by default), by

        J ((2/N) J'J + damping I)^-1 v  =  ((2/N) J J' + damping I)^-1 J v

    with J J' (N x N) formed once, without J. Both matrices have the same non-zero eigenvalues,
    hence the same Nyström rank serves. The residual is that of the system solved.
    """
    jacobian = ValueJacobian(critic, batch.obs.flatten(0, -2))
    if config.curvature == "ggn" and config.solver != "identity":
        rhs = jacobian.times(v)
        u, residual = _solve((2 / len(rhs)) * jacobian.kernel(), rhs, config, omega)
    else:
        x, residual = inverse_hvp(critic, batch, v, config, omega)
        u = jacobian.times(x)
    return u.view_as(batch.targets), residual


def _solve(curvature: Any, v: Any, config: BLPOConfig, omega: Tensor | None) -> tuple[Any, Tensor]:
    solver: hypergrad.Solver
    if config.solver == "nystrom":
        assert omega is not None
        solver = hypergrad.Nystrom(len(omega), test_matrix=omega, complement="zero")
    elif config.solver == "cg":
        solver = hypergrad.CG(max_iters=config.cg_iters, rtol=config.cg_rtol)
    else:
        solver = hypergrad.Exact()
    # An inexact answer is no failure here: its residual is logged for every update.
    solution = hypergrad.solve(curvature, v, solver, damping=config.damping, on_failure="ignore")
    return solution.value, torch.as_tensor(solution.info.relative_residual, dtype=torch.float32)


def cross_term(
    policy: Policy, actor: Params, critic: Params, u: Tensor, batch: Batch, mode: str
) -> Params:
    """The cross term c = (d2 g / dtheta dw) x on a fixed batch from u = J x, shaped like the actor.

    ``mode`` is "suffix" or "full": see :func:`cross_term_weights`.
    """
    values = critic_value(critic, batch.obs).detach()
    weights = cross_term_weights(mode, batch.matrix, batch.advantages, values, batch.targets, u)

    def weighted(theta: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, _ = policy.log_prob(theta, batch.obs, batch.actions)
        return (log_probs * weights).mean(), {}

    return gradient(weighted, actor)[0]


def published_cross_term(
    policy: Policy, actor: Params, critic: Params, x: Params, batch: Batch, config: BLPOConfig
) -> Params:
    """The published update's c: d/dw [grad_theta l(theta, w)] x on a fixed batch.

    l = mean_t L_t (G_t - V_w(s_t)), with L_t the summands of f, stands in place of g.
    Its sign is opposite to that of the derivative of g, which ``cross_term`` computes.
    """

    def derivative(theta: Params) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = policy.log_prob(theta, batch.obs, batch.actions)[0] - batch.log_probs

        def surrogate(w: Params) -> Tensor:
            advantages, values = critic_advantages(w, batch, config.gamma)
            losses = clipped_surrogate(log_ratio, advantages, config.clip)
            return (losses * (batch.targets - values)).mean()

        return _directional(surrogate, critic, x), {}

    return gradient(derivative, actor)[0]


def correction(
    policy: Policy,
    actor: Params,
    critic: Params,
    v: Params,
    batch: Batch,
    config: BLPOConfig,
    omega: Tensor | None,
) -> tuple[Params, Tensor]:
    """The cross term c by the options of ``config``, and its linear system's relative residual."""
    if config.cross_term == "paper":
        x, residual = inverse_hvp(critic, batch, v, config, omega)
        return published_cross_term(policy, actor, critic, x, batch, config), residual
    u, residual = critic_response(critic, batch, v, config, omega)
    return cross_term(policy, actor, critic, u, batch, config.cross_term), residual


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


class BLPO(Agent):
    """Bilevel policy optimisation; the module's documentation has the algorithm."""

    config: BLPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole = self.config.compiles_whole
        self._minibatch = Compiled(self._one_minibatch, self.backend if whole else None)
        # Where the solver looks at values, it runs eagerly between two graphs.
        self._fit = Compiled(self._fit_critic, None if whole else self.backend)
        self._lead = Compiled(self._step_actor, None if whole else self.backend)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve actor and critic on one rollout; statistics averaged over the minibatches.

        Cost per minibatch: ``nested_steps`` critic gradients, two actor gradients, one gradient of
        f_outer in the critic, the matrix J J' of the batch, 2 ``rank`` + 1 products with it.
        """
        config = self.config
        whole = self.make_batch(rollout)
        tensors = whole.tensors()
        rates = torch.tensor(
            [config.learning_rate, config.critic_learning_rate], dtype=torch.float64
        )
        num_params, stats = self.critic_state.params.numel(), []
        for _ in range(config.epochs):
            order = torch.randperm(config.num_envs, generator=self.generator)
            for envs in torch.split(order, config.envs_per_minibatch):
                omega = sketch_rows(
                    config, len(envs) * config.num_steps, num_params, self.generator
                )
                self.actor_state, self.critic_state, entry = self._minibatch(
                    self.actor_state, self.critic_state, tensors, envs, omega, rates
                )
                stats.append(entry)
        return mean_stats(stats, whole)

    # The parts of a minibatch update are pure functions, of flat states and tensors alone.

    def _one_minibatch(
        self,
        actor: AdamState,
        critic: AdamState,
        tensors: tuple[Tensor, ...],
        envs: Tensor,
        omega: Tensor | None,
        rates: Tensor,
    ) -> tuple[AdamState, AdamState, dict[str, Tensor]]:
        """The states after one minibatch, which is the trajectories ``envs``, and statistics."""
        critic, d, v, stats = self._fit(actor, critic, tensors, envs, rates)
        c, residual = None, None
        if self.config.solver != "none":
            theta = unflatten(actor.params, self.actor_shapes)
            w = unflatten(critic.params, self.critic_shapes)
            batch = Batch.of(tensors, envs)
            c, residual = correction(self.policy, theta, w, v, batch, self.config, omega)
        actor, comparison = self._lead(actor, d, c, rates)
        stats = stats | comparison
        if residual is not None:
            stats = stats | {"ihvp_relative_residual": residual}
        return actor, critic, stats

    def _fit_critic(
        self,
        actor: AdamState,
        critic: AdamState,
        tensors: tuple[Tensor, ...],
        envs: Tensor,
        rates: Tensor,
    ) -> tuple[AdamState, Params, Params, dict[str, Tensor]]:
        """The nested critic steps, then d and v under the critic that they lead to."""
        config, batch = self.config, Batch.of(tensors, envs)

        def g(w: Params) -> tuple[Tensor, dict[str, Tensor]]:
            return inner_loss(w, batch.obs, batch.targets), {}

        for _ in range(config.nested_steps):
            grads, loss, _ = gradient(g, unflatten(critic.params, self.critic_shapes))
            critic = adam(critic, flatten(grads), rates[1], config.adam_eps)
        theta = unflatten(actor.params, self.actor_shapes)
        w = unflatten(critic.params, self.critic_shapes)
        d, v, stats = outer_gradients(self.policy, theta, w, batch, config)
        return critic, d, v, {**stats, "value_loss": loss}

    def _step_actor(
        self, actor: AdamState, d: Params, c: Params | None, rates: Tensor
    ) -> tuple[AdamState, dict[str, Tensor]]:
        """One step of the actor along d - c, c within its bound."""
        step = d
        stats: dict[str, Tensor] = {}
        if c is not None:
            step, stats = combine(d, c, self.config.correction_bound)
        return adam(actor, flatten(step), rates[0], self.config.adam_eps), stats


def _directional(fn: Callable[[Params], Tensor], critic: Params, x: Params) -> Tensor:
    """d/ds fn(w + s x) at s = 0, by forward mode."""
    # Copies: compiled, forward mode wants point and tangent of one layout, and no views.
    point = {name: p.detach().clone() for name, p in critic.items()}
    along = {name: torch.empty_like(p).copy_(x[name]) for name, p in point.items()}
    tangent: Tensor = torch.func.jvp(fn, (point,), (along,))[1]
    return tangent
