"""CartPole and Acrobot as array code: a whole rollout is one compiled graph, or a NumPy loop.

Physics and episode ends are those of Gymnasium's ``CartPole-v1`` and ``Acrobot-v1`` (Barto, Sutton
and Anderson 1983; Sutton and Barto 2018, section 9.3 of the first edition), in float64 and equal to
them step by step. What is drawn, the policy's noise and the states that new episodes would begin
in, is drawn before the rollout, so that compiled and uncompiled rollouts see the same numbers.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad_rl.compiled import FOLDS, Compiled, fold
from hypergrad_rl.config import AgentConfig
from hypergrad_rl.networks import CategoricalPolicy, Params
from hypergrad_rl.rollout import Episodes, Rollout

#: NumPy or PyTorch: what both call by one name is all that the physics needs.
Namespace = Any
Arrays = Any


class ArrayTask(ABC):
    """The physics of one task for many states at once, (N, 4) float64, in NumPy or PyTorch."""

    obs_dim: int
    num_actions: int
    time_limit = 500  # steps
    spread: float  # episodes begin at states uniform in +-spread

    @abstractmethod
    def observe(self, xp: Namespace, state: Arrays) -> Arrays:
        """Observations (N, obs_dim) in float64."""

    @abstractmethod
    def step(self, xp: Namespace, state: Arrays, action: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        """The next states, rewards (float64) and whether the episodes have terminated."""


class CartPole(ArrayTask):
    """A pole on a cart, pushed left or right; reward 1 a step until it falls."""

    obs_dim, num_actions, spread = 4, 2, 0.05
    gravity, pole_mass, total_mass, half_length = 9.8, 0.1, 1.1, 0.5
    force, seconds, far, tilted = 10.0, 0.02, 2.4, 12 * 2 * math.pi / 360

    def observe(self, xp: Namespace, state: Arrays) -> Arrays:
        """Position and velocity of the cart, angle and angular velocity of the pole."""
        return state

    def step(self, xp: Namespace, state: Arrays, action: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        """Euler's explicit method."""
        x, speed, angle, spin = (state[:, i] for i in range(4))
        moment = self.pole_mass * self.half_length
        force = (2.0 * action - 1.0) * self.force
        cos, sin = xp.cos(angle), xp.sin(angle)
        common = (force + moment * (spin * spin) * sin) / self.total_mass
        twist = (self.gravity * sin - cos * common) / (
            self.half_length * (4.0 / 3.0 - self.pole_mass * (cos * cos) / self.total_mass)
        )
        push = common - moment * twist * cos / self.total_mass
        rates = (speed, push, spin, twist)
        after = [state[:, i] + self.seconds * rate for i, rate in enumerate(rates)]
        fallen = (abs(after[0]) > self.far) | (abs(after[2]) > self.tilted)
        return xp.stack(after, 1), xp.ones_like(x), fallen


class Acrobot(ArrayTask):
    """Two links, torque at the joint between them; reward -1 a step until the tip is high."""

    obs_dim, num_actions, spread = 6, 3, 0.1
    seconds, gravity = 0.2, 9.8  # unit masses, lengths and moments, centres of mass at 1/2
    fastest = 4 * math.pi, 9 * math.pi

    def observe(self, xp: Namespace, state: Arrays) -> Arrays:
        """Cosine and sine of both angles, and their velocities."""
        one, two = state[:, 0], state[:, 1]
        parts = [xp.cos(one), xp.sin(one), xp.cos(two), xp.sin(two), state[:, 2], state[:, 3]]
        return xp.stack(parts, 1)

    def step(self, xp: Namespace, state: Arrays, action: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        """One step of the classical Runge-Kutta method."""
        torque, h = action - 1.0, self.seconds
        start = tuple(state[:, i] for i in range(4))

        def along(rate: tuple[Arrays, ...], length: float) -> tuple[Arrays, ...]:
            return tuple(x + length * r for x, r in zip(start, rate, strict=True))

        k1 = self._rates(xp, start, torque)
        k2 = self._rates(xp, along(k1, h / 2), torque)
        k3 = self._rates(xp, along(k2, h / 2), torque)
        k4 = self._rates(xp, along(k3, h), torque)
        one, two, speed1, speed2 = (
            x + h / 6.0 * (a + 2 * b + 2 * c + d)
            for x, a, b, c, d in zip(start, k1, k2, k3, k4, strict=True)
        )
        one, two = _wrapped(xp, one), _wrapped(xp, two)
        fast1, fast2 = self.fastest
        speed1, speed2 = xp.clip(speed1, -fast1, fast1), xp.clip(speed2, -fast2, fast2)
        high = -xp.cos(one) - xp.cos(two + one) > 1.0
        reward = xp.where(high, 0.0 * one, 0.0 * one - 1.0)
        return xp.stack([one, two, speed1, speed2], 1), reward, high

    def _rates(
        self, xp: Namespace, state: tuple[Arrays, ...], torque: Arrays
    ) -> tuple[Arrays, ...]:
        one, two, speed1, speed2 = state
        cos, sin = xp.cos(two), xp.sin(two)
        d1 = 0.25 + (1.25 + cos) + 2.0  # the moments of inertia are 1
        d2 = 0.25 + 0.5 * cos + 1.0
        phi2 = 0.5 * self.gravity * xp.cos(one + two - math.pi / 2.0)
        phi1 = (
            -0.5 * (speed2 * speed2) * sin
            - speed2 * speed1 * sin
            + 1.5 * self.gravity * xp.cos(one - math.pi / 2.0)
            + phi2
        )
        twist2 = (torque + d2 / d1 * phi1 - 0.5 * (speed1 * speed1) * sin - phi2) / (
            0.25 + 1.0 - d2 * d2 / d1
        )
        twist1 = -(d2 * twist2 + phi1) / d1
        return speed1, speed2, twist1, twist2


def _wrapped(xp: Namespace, angle: Arrays) -> Arrays:
    """Into [-pi, pi], as often as needed: no step turns a link by more than two full turns."""
    for _ in range(2):
        angle = xp.where(angle > math.pi, angle - 2 * math.pi, angle)
        angle = xp.where(angle < -math.pi, angle + 2 * math.pi, angle)
    return angle


TASKS: dict[str, ArrayTask] = {"CartPole-v1": CartPole(), "Acrobot-v1": Acrobot()}


class ArrayCollector:
    """Rollouts of an :class:`ArrayTask`, in the place of a ``Collector`` over a ``VectorEnv``.

    Compiled, all steps of a rollout are one graph (a scan over time), without a call of Python
    between them; uncompiled they are a loop over NumPy arrays. What either starts from and draws is
    the same, and all of it is in ``state_dict``, so that a resumed run goes on to the last bit.
    """

    obs_moments = return_moments = None

    def __init__(
        self,
        task: ArrayTask,
        config: AgentConfig,
        generator: torch.Generator,
        backend: str | None = None,
    ) -> None:
        self.task, self.config, self.generator = task, config, generator
        self.obs_dim = task.obs_dim
        self.policy = CategoricalPolicy(task.num_actions)
        self._graph = Compiled(self._scanned, backend if FOLDS else None, (task, self.policy))
        self.state = self._fresh(1)[0]
        self.age = torch.zeros(config.num_envs, dtype=torch.int64)
        self.returns = np.zeros(config.num_envs)

    def _fresh(self, steps: int) -> Tensor:
        """States to begin new episodes in, one for every step and environment."""
        shape = steps, self.config.num_envs, 4
        uniform = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return self.task.spread * (2 * uniform - 1)

    def collect(self, actor: Params) -> tuple[Rollout, Episodes]:
        """One rollout of ``config.num_steps`` steps in each environment."""
        steps, num_envs = self.config.num_steps, self.config.num_envs
        noise, fresh = self.policy.noise(steps, num_envs, self.generator), self._fresh(steps)
        run = self._graph if self._graph.compiles else self._looped
        self.state, age, rollout = run(actor, self.state, self.age, noise, fresh)
        rollout = Rollout(*rollout)
        episodes = self._episodes(rollout.rewards.numpy(), rollout.done.numpy())
        self.age = age
        return rollout, episodes

    def warm_up(self, actor: Params) -> float:
        """Compile, if at all, without taking a step; the seconds it took."""
        if not self._graph.compiles:
            return 0.0
        began = time.perf_counter()
        kept = self.state, self.age, self.returns.copy(), self.generator.get_state()
        self.collect(actor)
        self.state, self.age, self.returns = kept[:3]
        self.generator.set_state(kept[3])
        return time.perf_counter() - began

    def close(self) -> None:
        """There is nothing to close."""

    def _after(
        self, xp: Namespace, state: Arrays, age: Arrays, action: Arrays, fresh: Arrays
    ) -> Any:
        """The states to go on from, and what a transition has besides where it began."""
        after, reward, terminated = self.task.step(xp, state, action)
        age = age + 1
        done = terminated | (age >= self.task.time_limit)
        state = xp.where(done[:, None], fresh, after)
        return state, xp.where(done, 0, age), (reward, after, terminated, done)

    def _scanned(
        self, actor: Params, state: Tensor, age: Tensor, noise: Tensor, fresh: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        def step(
            carried: tuple[Tensor, Tensor], drawn: tuple[Tensor, Tensor]
        ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
            obs = self.task.observe(torch, carried[0]).float()
            action = self.policy.act(actor, obs, drawn[0])
            state, age, (reward, after, terminated, done) = self._after(
                torch, *carried, action, drawn[1]
            )
            next_obs = self.task.observe(torch, after).float()
            return (state, age), (obs, action, reward.float(), next_obs, terminated, done)

        # An agent's layers are views of one vector, and what a scan is over may share no memory.
        actor = {name: leaf.clone() for name, leaf in actor.items()}
        (state, age), out = fold(step, (state, age), (noise, fresh))
        return state, age, tuple(x.transpose(0, 1).contiguous() for x in out)

    def _looped(
        self, actor: Params, state: Tensor, age: Tensor, noise: Tensor, fresh: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        act, now, old = self.policy.numpy_step(actor), state.numpy(), age.numpy()
        rows: list[tuple[Arrays, ...]] = []
        for eps, new in zip(noise.numpy(), fresh.numpy(), strict=True):
            obs = self.task.observe(np, now).astype(np.float32)
            action = act(obs, eps)
            now, old, (reward, after, terminated, done) = self._after(np, now, old, action, new)
            rows.append((obs, action, reward, after, terminated, done))
        obs, actions, rewards, after, terminated, done = (
            np.stack(column, 1) for column in zip(*rows, strict=True)
        )
        flat = self.task.observe(np, after.reshape(-1, 4)).astype(np.float32)
        next_obs = flat.reshape(obs.shape)
        out = obs, actions, rewards.astype(np.float32), next_obs, terminated, done
        return torch.from_numpy(now), torch.from_numpy(old), tuple(map(torch.from_numpy, out))

    def _episodes(self, rewards: Arrays, done: Arrays) -> Episodes:
        """The episodes that ended, (N, T) rewards and ends, in order of time."""
        ended = Episodes([], [])
        totals = self.returns[:, None] + rewards.cumsum(1, dtype=np.float64)
        before = np.zeros(len(done))
        start = -self.age.numpy()  # the step of this rollout at which the episode began
        for t, i in zip(*np.nonzero(done.T), strict=True):
            ended.returns.append(float(totals[i, t] - before[i]))
            ended.lengths.append(int(t + 1 - start[i]))
            before[i], start[i] = totals[i, t], t + 1
        self.returns = totals[:, -1] - before
        return ended

    def state_dict(self) -> dict[str, Tensor]:
        """Where the environments are."""
        return {"state": self.state, "age": self.age, "returns": torch.from_numpy(self.returns)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned."""
        self.state, self.age = state["state"], state["age"]
        self.returns = state["returns"].numpy().copy()
