"""Hyper-parameters: one frozen dataclass per agent, validated when made."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from hypergrad_rl.errors import ConfigError


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ABC):
    """What PPO, Nested PPO and BLPO share; steps are summed over the environments."""

    env: str = "CartPole-v1"
    seed: int = 0
    total_steps: int = 500_000
    num_envs: int = 4
    num_steps: int = 128  # per environment and rollout
    epochs: int = 4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_bonus: float = 0.0  # c_H in f - c_H E[entropy], of which d is the gradient
    learning_rate: float = 2.5e-4  # of the actor
    critic_learning_rate: float = 1e-3
    adam_eps: float = 1e-5
    hidden: tuple[int, ...] = (64, 64)
    normalize_observations: bool = False
    normalize_rewards: bool = False
    # What follows an episode that a time limit cut counts by the critic's estimate; False: for
    # nothing, as if it had terminated.
    bootstrap_truncated: bool = True
    # "tensor": the environment's physics as array code (CartPole-v1, Acrobot-v1; without
    # normalisation), which "auto" takes where it can.
    env_backend: Literal["auto", "gymnasium", "tensor", "envpool"] = "auto"
    # The minibatch update as one graph: "auto" compiles trainings long enough to be worth the
    # minute that it takes; without a working C++ compiler it runs eagerly, with equal results.
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.hidden, list):  # JSON has no tuples
            object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("total_steps", "num_envs", "num_steps", "epochs"):
            self._integer(name, 1)
        self._integer("seed", 0)
        _check(self.seed < 2**63, "seed", self.seed, "an integer below 2^63, as PyTorch takes")
        _check(
            isinstance(self.hidden, tuple) and len(self.hidden) > 0
            and all(isinstance(h, int) and h >= 1 for h in self.hidden),
            "hidden", self.hidden, "one or more widths >= 1",
        )  # fmt: skip
        for name in ("gamma", "gae_lambda"):
            self._number(name, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        for name in ("clip", "learning_rate", "critic_learning_rate", "adam_eps"):
            self._positive(name)
        self._number("entropy_bonus", lambda v: v >= 0, "a number >= 0")
        self._switch("bootstrap_truncated")
        self._choice("env_backend", ("auto", "gymnasium", "tensor", "envpool"))
        ok = isinstance(self.compile, bool) or self.compile == "auto"
        _check(ok, "compile", self.compile, 'True, False or "auto"')

    @property
    @abstractmethod
    def algo(self) -> str:
        """The name of the algorithm on the command line."""

    @property
    def num_updates(self) -> int:
        """Rollouts needed to see at least ``total_steps`` environment steps."""
        return math.ceil(self.total_steps / (self.num_envs * self.num_steps))

    @property
    @abstractmethod
    def gradient_steps(self) -> int:
        """How many gradients, of the actor or the critic, the whole training computes."""

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
        _check(ok, name, value, f"an integer >= {low}")

    def _number(self, name: str, domain: Any, expected: str) -> None:
        value = getattr(self, name)
        ok = isinstance(value, (int, float)) and math.isfinite(value) and domain(value)
        _check(ok, name, value, expected)

    def _positive(self, name: str) -> None:
        self._number(name, lambda v: v > 0, "a number > 0")

    def _switch(self, name: str) -> None:
        value = getattr(self, name)
        _check(isinstance(value, bool), name, value, "True or False")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        _check(value in choices, name, value, f"one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """PPO (Schulman et al. 2017) with the usual details (Huang et al. 2022, "37 details").

    Rates annealed to zero, normalised advantages, an entropy bonus, gradient clipping. The
    networks and the rates are BLPO's, so that a comparison shows nesting and the hypergradient
    alone (CartPole-v1, 150k steps, seed 0: last tenth 500 with this critic rate, 442 with the
    actor's rate for both).
    """

    num_minibatches: int = 4
    normalize_advantages: bool = True
    anneal: bool = True
    entropy_bonus: float = 0.01
    max_grad_norm: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("num_minibatches", 1)
        size = self.num_envs * self.num_steps
        _check(
            2 * self.num_minibatches <= size, "num_minibatches", self.num_minibatches,
            f"at least 2 samples per minibatch of the {size} in a rollout",
        )  # fmt: skip
        self._positive("max_grad_norm")

    @property
    def algo(self) -> str:
        """The name of the algorithm on the command line."""
        return "ppo"

    @property
    def gradient_steps(self) -> int:
        """How many gradients, of the actor or the critic, the whole training computes."""
        return 2 * self.num_updates * self.epochs * self.num_minibatches


@dataclass(frozen=True, kw_only=True)
class BLPOConfig(AgentConfig):
    """BLPO (arXiv 2505.11714); with ``solver="none"`` it is Nested PPO.

    No gradient clipping, no annealing, and by default no entropy bonus: the published setting.
    """

    nested_steps: int = 10
    envs_per_minibatch: int = 1  # a minibatch is this many whole trajectories
    solver: str = "nystrom"
    # The residual alone does not tell a good rank: u is small where the curvature is large, so a
    # residual of 0.04 left an error of 3 |u| on Acrobot-v1 (damping 1, rank 32, largest eigenvalue
    # 4,000). Here, on CartPole-v1: residual below 1e-4, error in u below 1e-3.
    damping: float | Literal["auto"] = 10.0
    rank: int = 32
    sketch: Literal["gaussian", "columns", "diagonal"] = "gaussian"
    sketch_every: int = 1  # minibatches of a rollout that share a sketch
    redraw_sketch: bool = True  # False: the same random numbers for every sketch
    sketch_shift: float = 0.0  # added to the diagonal of the core W of a sketch of columns
    cg_iters: int = 20
    cg_rtol: float = 1e-3  # 0 for exactly cg_iters iterations
    curvature: str = "ggn"
    curvature_batch: str = "minibatch"  # what H and v are of
    outer_objective: str = "return"
    cross_term: str = "suffix"
    # |c| <= bound |d|; None for no bound. Unbounded, c is about 15 |d| and training drops out now
    # and then. CartPole-v1, 200k steps, seeds 0 and 1 (damping 1, rank 10), area under the curve:
    # 452 and 411 without a bound, 462 and 467 with 0.5 (Nested 464 and 472).
    correction_bound: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nested_steps", "envs_per_minibatch", "rank", "sketch_every", "cg_iters"):
            self._integer(name, 1)
        _check(
            self.num_envs % self.envs_per_minibatch == 0, "envs_per_minibatch",
            self.envs_per_minibatch, f"a divisor of num_envs={self.num_envs}",
        )  # fmt: skip
        self._choice("solver", ("nystrom", "nystrom_pcg", "cg", "exact", "identity", "none"))
        self._choice("sketch", ("gaussian", "columns", "diagonal"))
        _check(
            self.sketch_every == 1 or self.solver != "nystrom_pcg", "sketch_every",
            self.sketch_every, '1 with solver "nystrom_pcg", whose preconditioner is not kept',
        )  # fmt: skip
        self._choice("curvature", ("ggn", "hessian"))
        self._choice("curvature_batch", ("minibatch", "rollout"))
        self._choice("outer_objective", ("return", "advantage"))
        self._choice("cross_term", ("suffix", "full", "paper"))
        if self.damping != "auto":
            self._number("damping", lambda v: v > 0, 'a number > 0 or "auto"')
        self._switch("redraw_sketch")
        for name in ("cg_rtol", "sketch_shift"):
            self._number(name, lambda v: v >= 0, "a number >= 0")
        if self.correction_bound is not None:
            self._positive("correction_bound")

    @property
    def algo(self) -> str:
        """The name of the algorithm on the command line."""
        return "nested" if self.solver == "none" else "blpo"

    @property
    def gradient_steps(self) -> int:
        """How many gradients, of the actor or the critic, the whole training computes."""
        minibatches = self.num_updates * self.epochs * self.num_envs // self.envs_per_minibatch
        return minibatches * (self.nested_steps + (1 if self.solver == "none" else 3))

    @property
    def compiles_whole(self) -> bool:
        """Whether a minibatch update is one graph.

        What decides on values, CG with a tolerance or an automatic damping, runs eagerly between
        two graphs.
        """
        looks = self.solver == "nystrom_pcg" or (self.solver == "cg" and self.cg_rtol > 0)
        return self.solver == "none" or not (looks or self.damping == "auto")


ALGOS = ("ppo", "nested", "blpo")


def make_config(algo: str, **settings: Any) -> PPOConfig | BLPOConfig:
    """The configuration of ``algo`` ("ppo", "nested" or "blpo").

    Raises:
        ConfigError: an unknown algorithm, an unknown hyper-parameter or a value outside its domain.

    >>> make_config("nested", nested_steps=5).solver
    'none'
    """
    _check(algo in ALGOS, "algo", algo, f"one of {', '.join(ALGOS)}")
    cls = PPOConfig if algo == "ppo" else BLPOConfig
    known = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
        _check(
            name in known, name, settings[name], f"a hyper-parameter of {algo}: {', '.join(known)}"
        )
    if algo == "nested":
        _check(settings.get("solver", "none") == "none", "solver", settings.get("solver"),
               'no solver with algo "nested"; use algo "blpo"')  # fmt: skip
        settings["solver"] = "none"
    return cls(**settings)
