"""What is compared, as data: the programs, their settings, and the environments that they need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

OURS = "hypergrad_rl"


@dataclass(frozen=True)
class Environment:
    """Where a program comes from.

    Attributes:
        requirements: what pip is asked for, in an environment of its own; () for this interpreter.
        with_torch: whether PyTorch goes with it, at the version of ``constraints.txt``.
        source: of the checkout that its users are to have; "" where pip brings the program.
        file: that the checkout is known by.
    """

    requirements: tuple[str, ...] = ()
    with_torch: bool = True
    source: str = ""
    file: str = ""


#: By the name of the directory, for ``--checkout`` and ``--python`` as well.
JAX = ("jax", "flax", "optax", "distrax", "gymnax", "brax")
ENVIRONMENTS = {
    OURS: Environment(),
    "stable-baselines3": Environment(("stable-baselines3", "gymnasium[mujoco]")),
    # Their wrappers have the arguments of Gymnasium before 1.0.
    "cleanrl": Environment(
        ("gymnasium==0.29.1", "mujoco", "imageio", "tyro", "tqdm"),
        source="https://github.com/vwxyzjn/cleanrl", file="cleanrl/ppo.py",
    ),
    "leanrl": Environment(
        ("gymnasium==0.29.1", "mujoco", "imageio", "tyro", "tqdm", "tensordict"),
        source="https://github.com/meta-pytorch/LeanRL",
        file="leanrl/ppo_continuous_action_torchcompile.py",
    ),
    "purejaxrl": Environment(
        JAX, False, "https://github.com/luchris429/purejaxrl", "purejaxrl/ppo.py"
    ),
    "blpo-authors": Environment(JAX, False, "https://github.com/Arnie-He/BLPO", "main.py"),
}


@dataclass(frozen=True)
class Program:
    """A program and its settings on a task.

    Attributes:
        group: what it is compared within.
        name: as it is shown; the first of a group is what the others are divided by.
        environment: a key of ``ENVIRONMENTS``.
        command: a module of ``programs`` and its arguments; ``{checkout}`` stands for the path.
        settings: in words, where they are not the group's.
        warm_up: environment steps before the clock, in which a program compiles or warms up.
        compiles: whether there is a compiler in it.
    """

    group: str
    name: str
    environment: str
    command: tuple[str, ...]
    settings: str = ""
    warm_up: int = 0
    compiles: bool = False


CARTPOLE = "PPO, CartPole-v1"


def _ours(
    group: str, name: str, arm: str, task: str, steps: int, warm_up: int, note: str = "",
    **settings: object,
) -> Program:  # fmt: skip
    settings = {"compile": True, **settings}
    command = ("ours", arm, task, str(steps), json.dumps(settings))
    return Program(group, name, OURS, command, note, warm_up, bool(settings["compile"]))


SB3_CARTPOLE = {
    "n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01,
}  # fmt: skip

PROGRAMS: Sequence[Program] = (
    _ours(CARTPOLE, "hypergrad_rl", "ppo", "CartPole-v1", 102_400, 2048),
    _ours(CARTPOLE, "hypergrad_rl, Gymnasium's environments", "ppo", "CartPole-v1", 51_200, 2048,
          env_backend="gymnasium"),
    _ours(CARTPOLE, "hypergrad_rl, uncompiled", "ppo", "CartPole-v1", 25_600, 2048, compile=False),
    Program(CARTPOLE, "Stable-Baselines3", "stable-baselines3",
            ("sb3", "CartPole-v1", "20480", "4", json.dumps(SB3_CARTPOLE)), warm_up=1024),
)  # fmt: skip
