"""What PPO and BLPO share: parameters, their optimisers' state, and statistics."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad_rl.compiled import FOLDS, Compiled, fold
from hypergrad_rl.config import AgentConfig
from hypergrad_rl.errors import CheckpointError
from hypergrad_rl.functional import AdamState, Shapes, shapes_of, unflatten
from hypergrad_rl.networks import Critic, CriticModule, Params, Policy
from hypergrad_rl.rollout import Batch, Rollout, example_rollout, make_batch


class Agent(ABC):
    """Actor and critic with an Adam state each; what PPO and BLPO share."""

    def __init__(
        self,
        config: AgentConfig,
        policy: Policy,
        obs_dim: int,
        generator: torch.Generator,
        backend: str | None = None,
        critic_module: CriticModule | None = None,
    ) -> None:
        """``backend``: of ``torch.compile``, which the minibatch update runs by; None: eagerly.

        ``critic_module`` is that of :class:`~hypergrad_rl.Networks`; the policy has the actor's.
        """
        self.config, self.policy, self.generator = config, policy, generator
        actor = policy.init(obs_dim, config.hidden, generator)
        self.value_fn = Critic(critic_module)
        critic = self.value_fn.init(obs_dim, config.hidden, generator)
        self.actor_shapes, self.critic_shapes = shapes_of(actor), shapes_of(critic)
        self.actor_state, self.critic_state = AdamState.of(actor), AdamState.of(critic)
        self.obs_dim, self.backend = obs_dim, backend
        # One graph for all of an update where that can be, else one for each minibatch.
        whole = backend is not None and FOLDS and self.folds
        self._improve = Compiled(self._all_minibatches, backend if whole else None, self._baked)
        self._minibatch = Compiled(self._one_minibatch, None if whole else backend, self._baked)

    @property
    def _baked(self) -> tuple[Any, ...]:
        """All that graphs of this agent contain of it.

        Not what only decides on their inputs, so that runs which differ in that share them.
        """
        config = replace(
            self.config, seed=0, total_steps=1, learning_rate=1.0, critic_learning_rate=1.0
        )
        return config, self.policy, self.value_fn, self.actor_shapes, self.critic_shapes

    @property
    def actor(self) -> Params:
        """The actor's parameters, views of its flat vector."""
        return unflatten(self.actor_state.params, self.actor_shapes)

    @property
    def critic(self) -> Params:
        """The critic's parameters, views of its flat vector."""
        return unflatten(self.critic_state.params, self.critic_shapes)

    @property
    @abstractmethod
    def folds(self) -> bool:
        """Whether the minibatches of an update are alike, so that one graph serves for all."""

    @abstractmethod
    def _draw(self, progress: float) -> tuple[Any, ...]:
        """What minibatches differ in, drawn before any of them: sequences with an entry for each.

        ``progress`` is the fraction of the training that is done.
        """

    @abstractmethod
    def _one_minibatch(
        self, carry: tuple[AdamState, AdamState, Any], tensors: tuple[Tensor, ...], row: Any
    ) -> tuple[tuple[AdamState, AdamState, Any], tuple[dict[str, Tensor], Any]]:
        """The states after one minibatch, statistics of it, and what else is to be looked at.

        A pure function; the carry is the actor's state, the critic's, and what a minibatch leaves
        to the next.
        """

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve actor and critic on one rollout, of shape (num_envs, num_steps, ...).

        ``progress`` is the fraction of the training that is done. The statistics are means over
        the minibatches, and the explained variance before the update.
        """
        self.actor_state, self.critic_state, table, seen, unexplained = self._improve(
            self.actor_state, self.critic_state, tuple(vars(rollout).values()),
            self._draw(progress),
        )  # fmt: skip
        stats = torch.stack(list(table.values())).nanmean(1)
        means = dict(zip(table, stats.tolist(), strict=True))
        means["explained_variance"] = 1 - unexplained.item()
        return means | self._look(seen)

    def _look(self, seen: Any) -> dict[str, float]:
        """Statistics of what the last minibatches left to be looked at."""
        return {}

    def _all_minibatches(
        self,
        actor: AdamState,
        critic: AdamState,
        rollout: tuple[Tensor, ...],
        rows: tuple[Any, ...],
    ) -> tuple[AdamState, AdamState, dict[str, Tensor], Any, Tensor]:
        batch = self._batch(actor, critic, Rollout(*rollout))
        # What a scan reads may share no memory, as states and next states, or ends, may.
        tensors = tuple(field.clone() for field in self._samples(batch).tensors())

        def step(carry: tuple[Any, Any, Any], row: Any) -> tuple[tuple[Any, Any, Any], Any]:
            states = AdamState(*carry[0]), AdamState(*carry[1])
            (actor, critic, kept), seen = self._minibatch((*states, carry[2]), tensors, row)
            return (tuple(actor), tuple(critic), kept), seen  # a scan takes no named tuples

        carry, (stats, seen) = fold(step, (tuple(actor), tuple(critic), ()), rows)
        actor, critic = AdamState(*carry[0]), AdamState(*carry[1])
        unexplained = (batch.targets - batch.values).var() / batch.targets.var()
        return actor, critic, stats, seen, unexplained

    def _samples(self, batch: Batch) -> Batch:
        """What minibatches are rows of: trajectories."""
        return batch

    def warm_up(self) -> float:
        """Compile all that ``update`` runs, on made-up data; the seconds it took (0 for eager).

        The agent stays as it is.
        """
        if self.backend is None:
            return 0.0
        start = time.perf_counter()
        states, generator = (self.actor_state, self.critic_state), self.generator.get_state()
        self.update(example_rollout(self.policy, self.actor, self.config, self.obs_dim), 0.0)
        (self.actor_state, self.critic_state) = states
        self.generator.set_state(generator)
        return time.perf_counter() - start

    def make_batch(self, rollout: Rollout) -> Batch:
        """The rollout with what stays fixed while the agent improves on it."""
        return self._batch(self.actor_state, self.critic_state, rollout)

    def _batch(self, actor: AdamState, critic: AdamState, rollout: Rollout) -> Batch:
        config = self.config
        if not config.bootstrap_truncated:
            rollout = replace(rollout, terminated=rollout.done)
        return make_batch(
            self.policy, unflatten(actor.params, self.actor_shapes),
            unflatten(critic.params, self.critic_shapes), rollout, config.gamma,
            config.gae_lambda, self.value_fn,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: parameters, Adam's state, the generator."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "actor_adam": self.actor_state._asdict(),
            "critic_adam": self.critic_state._asdict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that ``state_dict`` returned."""
        check_parameters("actor", state["actor"], self.actor_shapes)
        check_parameters("critic", state["critic"], self.critic_shapes)
        self.actor_state = AdamState(**state["actor_adam"])
        self.critic_state = AdamState(**state["critic_adam"])
        self.generator.set_state(state["generator"])


def check_parameters(name: str, saved: Params, expected: Shapes) -> None:
    """Raise CheckpointError unless a checkpoint's parameters are those of the network."""
    shapes = shapes_of(saved)
    if shapes == expected:
        return
    unlike = dict.fromkeys(n for n in [*shapes, *expected] if shapes.get(n) != expected.get(n))
    leaf = next(iter(unlike), None)  # None where only their order differs

    def told(shapes: Shapes) -> str:
        count = sum(shape.numel() for shape in shapes.values())
        place = "" if leaf is None else f" ({leaf}: {tuple(shapes.get(leaf, ())) or 'none'})"
        return f"{count} parameters{place}"

    raise CheckpointError(
        f"the checkpoint's {name} has {told(shapes)}, that of the configuration and networks= "
        f"{told(expected)}; expected the config.json and the networks that the run was trained with"
    )
