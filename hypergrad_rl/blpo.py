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

from typing import Any

import torch
from torch import Tensor

from hypergrad_rl.agent import Agent
from hypergrad_rl.compiled import Compiled, fold
from hypergrad_rl.config import BLPOConfig
from hypergrad_rl.functional import AdamState, adam_scales, adam_step, flatten, unflatten
from hypergrad_rl.hypergradient import (
    act,
    check_successive,
    combine,
    correction,
    critic_advantages,
    critic_gradient,
    direct_gradient,
    follower_pass,
    successive,
)
from hypergrad_rl.inverse import draw_sketch, ritz_extremes
from hypergrad_rl.networks import Params
from hypergrad_rl.rollout import Batch, Rollout


class BLPO(Agent):
    """Bilevel policy optimisation; the module's documentation has the algorithm."""

    config: BLPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.config.compiles_whole:
            # The solver looks at values: it runs eagerly between two graphs.
            self._minibatch = Compiled(self._one_minibatch, None)
        parts = None if self.config.compiles_whole else self.backend
        self._fit = Compiled(self._fit_critic, parts, self._baked)
        self._lead = Compiled(self._step_actor, parts, self._baked)

    @property
    def folds(self) -> bool:
        """Whether the minibatches of an update are alike, so that one graph serves for all."""
        return self.config.compiles_whole and self.config.sketch_every == 1

    def _draw(self, progress: float) -> tuple[Any, ...]:
        """Every minibatch's trajectories, Adam scales, and random numbers for its sketch.

        Those are None where the last sketch serves again, and not there if the solver takes none.
        """
        config = self.config
        num_params = self.critic_state.params.numel()
        minibatches: list[Tensor] = []
        draws: list[Tensor | None] = []
        for _ in range(config.epochs):
            order = torch.randperm(config.num_envs, generator=self.generator)
            for envs in torch.split(order, config.envs_per_minibatch):
                draw, due = None, len(minibatches) % config.sketch_every == 0
                if due and draws and not config.redraw_sketch:
                    draw = draws[0]  # it would be drawn from the same numbers
                elif due:
                    system = order if config.curvature_batch == "rollout" else envs
                    num_samples = len(system) * config.num_steps
                    draw = draw_sketch(config, num_samples, num_params, self.generator)
                minibatches.append(envs)
                draws.append(draw)
        count, nested = len(minibatches), config.nested_steps
        # A sketch that is kept grows old: the last one's age would not be that of all.
        checked = torch.full((count,), config.sketch_every > 1)
        checked[-1] = True
        rows = (
            torch.stack(minibatches),
            adam_scales(self.actor_state.step, config.learning_rate, count),
            adam_scales(self.critic_state.step, config.critic_learning_rate, count * nested).view(
                count, nested, 2
            ),
            checked,
        )
        if draws[0] is None:
            return rows
        return *rows, torch.stack([d for d in draws if d is not None]) if self.folds else draws

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """As :meth:`Agent.update`.

        Raises:
            RolloutError: with ``bootstrap_truncated=False``, a next state that is not the state of
                the step after it, though the episode goes on.
        """
        if self.config.solver != "none" and successive(self.config):
            check_successive(rollout, rollout.done)
        return super().update(rollout, progress)

    def _look(self, seen: tuple[Tensor, ...]) -> dict[str, float]:
        if not seen:
            return {}
        # Of the last minibatch alone: it takes as long as a step of the critic.
        smallest, largest = ritz_extremes(*(blocks[-1] for blocks in seen))
        return {"curvature_smallest": smallest.item(), "curvature_largest": largest.item()}

    # The parts of a minibatch update are pure functions, of flat states and tensors alone.

    def _one_minibatch(
        self,
        carry: tuple[AdamState, AdamState, Any],
        tensors: tuple[Tensor, ...],
        row: tuple[Any, ...],
    ) -> tuple[tuple[AdamState, AdamState, Any], tuple[dict[str, Tensor], Any]]:
        """The states after one minibatch, and the sketch where the next is to take it over.

        Then statistics, and the :class:`~hypergrad_rl.inverse.Grams` of what the solver multiplied.

        Cost: ``nested_steps`` critic gradients, two actor gradients, one gradient of f_outer in
        the critic, the matrix J J' of the batch, 2 ``rank`` + 1 products with it. In the published
        setting ``rank`` columns of the Hessian by formula, one product in the last minibatch.
        """
        config, c = self.config, None
        seen: tuple[Tensor, ...] = ()
        actor, critic, kept = carry
        envs, step, nested_steps, checked, *draws = row
        critic, d, v, stats, passes = self._fit(actor, critic, tensors, envs, nested_steps)
        if config.solver != "none":
            theta = unflatten(actor.params, self.actor_shapes)
            w = unflatten(critic.params, self.critic_shapes)
            whole = config.curvature_batch == "rollout"
            batch = Batch(*tensors) if whole else Batch.of(tensors, envs)
            part = envs if whole else None
            sketch = kept if draws and draws[0] is None else next(iter(draws), None)
            c, solved = correction(
                self.policy, theta, w, v, batch, config, sketch, part, self.value_fn,
                checked=checked, **passes,
            )  # fmt: skip
            stats, kept = stats | solved.stats, solved.sketch or ()
            seen = tuple(solved.grams)
        actor, comparison = self._lead(actor, d, c, step)
        return (actor, critic, kept), (stats | comparison, seen)

    def _fit_critic(
        self,
        actor: AdamState,
        critic: AdamState,
        tensors: tuple[Tensor, ...],
        envs: Tensor,
        nested_steps: Tensor,
    ) -> tuple[AdamState, Params, Params, dict[str, Tensor], dict[str, Any]]:
        """The nested critic steps, then d and v under the critic that they lead to.

        Last the passes of actor and critic, for the correction if it is in the same graph.
        """
        config, batch = self.config, Batch.of(tensors, envs)

        def nested(state: Any, row: tuple[Tensor]) -> tuple[Any, Tensor]:
            critic = AdamState(*state)
            w = unflatten(critic.params, self.critic_shapes)
            grads, loss = critic_gradient(w, batch.obs, batch.targets, self.value_fn)
            return tuple(adam_step(critic, flatten(grads), row[0], config.adam_eps)), loss

        state, losses = fold(nested, tuple(critic), (nested_steps,), unroll=2)
        critic, loss = AdamState(*state), losses[-1]
        theta = unflatten(actor.params, self.actor_shapes)
        w = unflatten(critic.params, self.critic_shapes)
        acted = act(self.policy, theta, batch)
        v: Params = {}
        passes: dict[str, Any] = {}
        if config.solver == "none":
            advantages, _ = critic_advantages(w, batch, config.gamma, self.value_fn)
        else:
            rollout = config.curvature_batch == "rollout"
            system = Batch(*tensors) if rollout else batch
            log_probs = (act(self.policy, theta, system) if rollout else acted).log_probs
            log_ratio = log_probs - system.log_probs
            advantages, v, jacobian = follower_pass(w, log_ratio, system, config, self.value_fn)
            advantages = advantages[envs] if rollout else advantages
            if config.compiles_whole:
                passes = {"acted": acted, "jacobian": jacobian}
        d, stats = direct_gradient(self.policy, theta, batch, advantages, config, acted)
        del stats["log_ratio"]
        return critic, d, v, {**stats, "value_loss": loss}, passes

    def _step_actor(
        self, actor: AdamState, d: Params, c: Params | None, step: Tensor
    ) -> tuple[AdamState, dict[str, Tensor]]:
        """One step of the actor along d - c, c within its bound."""
        direction = d
        stats: dict[str, Tensor] = {}
        if c is not None:
            direction, stats = combine(d, c, self.config.correction_bound)
        return adam_step(actor, flatten(direction), step, self.config.adam_eps), stats
