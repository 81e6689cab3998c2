"""Hyper-parameters: one frozen dataclass per agent, validated when made.

The annotation of a hyper-parameter says what it may be: its type and, of a number, its range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from hypergrad_rl.errors import ConfigError

#: The ranges of numbers, by the words of annotations and errors.
RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "> 0": lambda x: x > 0,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    ">= 0 and below 2^63": lambda x: 0 <= x < 2**63,  # what PyTorch takes for a seed
}
_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}

Count = Annotated[int, ">= 1"]
Positive = Annotated[float, "> 0"]
NotNegative = Annotated[float, ">= 0"]
Fraction = Annotated[float, "in [0, 1]"]


def _allowed(kind: Any, value: object) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _allowed(parts[0], value) and RANGES[parts[1]](typing.cast(float, value))
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_allowed(part, value) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and value != () and all(
            _allowed(parts[0], entry) for entry in value
        )  # fmt: skip
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(typing.cast(float, value))
    return type(value) is kind  # True is an int for isinstance


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_words(parts[0])} {parts[1]}"
    if origin is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else f'"{parts[0]}"'
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is tuple:
        return f"one or more widths, each {_words(parts[0])}"
    return _NAMES.get(kind, "None")


def _read(kind: Any, text: str) -> Any:
    """What a text says where this kind is expected; the text itself where it says no such thing."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _read(parts[0], text)
    if origin in (typing.Union, types.UnionType):
        read = [(part, _read(part, text)) for part in parts]
        return next((value for part, value in read if _allowed(part, value)), text)
    if origin is tuple:
        return tuple(_read(parts[0], entry) for entry in text.split("x"))
    if kind in (bool, types.NoneType):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ABC):
    """What PPO, Nested PPO and BLPO share; steps are summed over the environments."""

    env: str = "CartPole-v1"
    seed: Annotated[int, ">= 0 and below 2^63"] = 0
    total_steps: Count = 500_000
    num_envs: Count = 4
    num_steps: Count = 128  # per environment and rollout
    epochs: Count = 4
    gamma: Fraction = 0.99
    gae_lambda: Fraction = 0.95
    clip: Positive = 0.2
    entropy_bonus: NotNegative = 0.0  # c_H in f - c_H E[entropy], of which d is the gradient
    learning_rate: Positive = 2.5e-4  # of the actor
    critic_learning_rate: Positive = 1e-3
    adam_eps: Positive = 1e-5
    hidden: tuple[Count, ...] = (64, 64)
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
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            kind, value = hints[field.name], getattr(self, field.name)
            _check(_allowed(kind, value), field.name, value, _words(kind))

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


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """PPO (Schulman et al. 2017) with the usual details (Huang et al. 2022, "37 details").

    Rates annealed to zero, normalised advantages, an entropy bonus, gradient clipping. The
    networks and the rates are BLPO's, so that a comparison shows nesting and the hypergradient
    alone (CartPole-v1, 150k steps, seed 0: last tenth 500 with this critic rate, 442 with the
    actor's rate for both).
    """

    num_minibatches: Count = 4
    normalize_advantages: bool = True
    anneal: bool = True
    entropy_bonus: NotNegative = 0.01
    max_grad_norm: Positive = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.num_envs * self.num_steps
        _check(
            2 * self.num_minibatches <= size, "num_minibatches", self.num_minibatches,
            f"at least 2 samples per minibatch of the {size} in a rollout",
        )  # fmt: skip

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

    nested_steps: Count = 10
    envs_per_minibatch: Count = 1  # a minibatch is this many whole trajectories
    solver: Literal["nystrom", "nystrom_pcg", "cg", "exact", "identity", "none"] = "nystrom"
    # The residual alone does not tell a good rank: u is small where the curvature is large, so a
    # residual of 0.04 left an error of 3 |u| on Acrobot-v1 (damping 1, rank 32, largest eigenvalue
    # 4,000). Here, on CartPole-v1: residual below 1e-4, error in u below 1e-3.
    damping: Positive | Literal["auto"] = 10.0
    rank: Count = 32
    sketch: Literal["gaussian", "columns", "diagonal"] = "gaussian"
    sketch_every: Count = 1  # minibatches of a rollout that share a sketch
    redraw_sketch: bool = True  # False: the same random numbers for every sketch
    sketch_shift: NotNegative = 0.0  # added to the diagonal of the core W of a sketch of columns
    cg_iters: Count = 20
    cg_rtol: NotNegative = 1e-3  # 0 for exactly cg_iters iterations
    curvature: Literal["ggn", "hessian"] = "ggn"
    curvature_batch: Literal["minibatch", "rollout"] = "minibatch"  # what H and v are of
    outer_objective: Literal["return", "advantage"] = "return"
    cross_term: Literal["suffix", "full", "paper"] = "suffix"
    # |c| <= bound |d|; None for no bound. Unbounded, c is about 15 |d| and training drops out now
    # and then. CartPole-v1, 200k steps, seeds 0 and 1 (damping 1, rank 10), area under the curve:
    # 452 and 411 without a bound, 462 and 467 with 0.5 (Nested 464 and 472).
    correction_bound: Positive | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.num_envs % self.envs_per_minibatch == 0, "envs_per_minibatch",
            self.envs_per_minibatch, f"a divisor of num_envs={self.num_envs}",
        )  # fmt: skip
        _check(
            self.sketch_every == 1 or self.solver != "nystrom_pcg", "sketch_every",
            self.sketch_every, '1 with solver "nystrom_pcg", whose preconditioner is not kept',
        )  # fmt: skip

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


def hyper_parameters(algo: str) -> list[str]:
    """The names that ``make_config(algo)`` takes, in the order of the configuration."""
    cls = PPOConfig if algo == "ppo" else BLPOConfig
    names = [field.name for field in dataclasses.fields(cls)]
    return [name for name in names if algo != "nested" or name != "solver"]


def read_setting(algo: str, name: str, text: str) -> Any:
    """The value of a hyper-parameter of ``algo`` from a text; ``setting_text`` is the inverse.

    Widths are joined as in "64x64"; "true", "false" and "none" are Python's.

    Raises:
        ConfigError: the text says none of its values.

    >>> read_setting("blpo", "hidden", "64x32"), read_setting("blpo", "correction_bound", "none")
    ((64, 32), None)
    """
    kind = _hints(PPOConfig if algo == "ppo" else BLPOConfig)[name]
    value = _read(kind, text)
    form = ", joined as in 64x64" if get_origin(kind) is tuple else ""
    _check(_allowed(kind, value), name, text, _words(kind) + form)
    return value


def setting_text(value: Any) -> str:
    """The value of a hyper-parameter as a word.

    >>> setting_text((64, 32)), setting_text(1e-4), setting_text(None)
    ('64x32', '0.0001', 'none')
    """
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
