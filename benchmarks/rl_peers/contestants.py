"""What is compared, as data: the programs, their settings, and the environments that they need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


_JAX = ("jax", "flax", "optax", "distrax", "gymnax", "brax")
# These programs call wrappers as Gymnasium had them before 1.0, whose Hopper is v4.
_GYMNASIUM = ("gymnasium==0.29.1", "mujoco", "imageio", "tyro", "tqdm")
#: By the name of the directory, for ``--only``, ``--checkout`` and ``--python``.
ENVIRONMENTS = {
    OURS: Environment(),
    "stable-baselines3": Environment(("stable-baselines3", "gymnasium[mujoco]")),
    "cleanrl": Environment(
        _GYMNASIUM, source="https://github.com/vwxyzjn/cleanrl", file="cleanrl/ppo.py"
    ),
    # A tensordict of its time: by a later one (0.15) its policy's actions require gradients, and it
    # ends at the first step.
    "leanrl": Environment(
        (*_GYMNASIUM, "tensordict==0.6.2", "packaging"), source="https://github.com/meta-pytorch/LeanRL",
        file="leanrl/ppo_continuous_action_torchcompile.py",
    ),
    "purejaxrl": Environment(
        _JAX, False, "https://github.com/luchris429/purejaxrl", "purejaxrl/ppo.py"
    ),
    "blpo-authors": Environment(_JAX, False, "https://github.com/Arnie-He/BLPO", "main.py"),
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A program and its settings on a task.

    Attributes:
        group: what it is compared within.
        name: as it is shown.
        environment: a key of ``ENVIRONMENTS``.
        command: a module of ``programs`` and its arguments; ``{checkout}`` stands for the path.
        warm_up: environment steps before the clock, in which it compiles or touches its memory.
        compiles: whether there is a compiler in it.
        algorithm: where a group has several: a program is compared with the first of its own.
    """

    group: str
    name: str
    environment: str
    command: tuple[str, ...]
    warm_up: int
    compiles: bool = False
    algorithm: str = "PPO"


CARTPOLE = "PPO, CartPole-v1: 4 environments x 128 steps, 4 epochs of 4 minibatches"
# One environment: LeanRL's program asks each for its episode's return whenever one has ended.
BOX = "PPO, CartPole by the sign of a real action, normalised: 1 environment x 512 steps, 4 epochs"
HOPPER = "PPO, Hopper, normalised: 1 environment x 2048 steps, 10 epochs of 32 minibatches"
BLPO = "BLPO, CartPole-v1: 4 environments x 128 steps, 4 epochs of 4 trajectories, nested 10"
BOX_TASK = "benchmarks.rl_peers.box_cartpole:BoxCartPole-v1"


def _ours(
    group: str, name: str, arm: str, task: str, steps: int, warm_up: int = 2048,
    algorithm: str = "PPO", **settings: object,
) -> Program:  # fmt: skip
    """An arm of the reproduction; ``settings`` change its configuration."""
    settings = {"compile": True, **settings}
    command = ("ours", arm, task, str(steps), json.dumps(settings))
    shown = f"{OURS}, {name}" if name else OURS
    return Program(group, shown, OURS, command, warm_up, bool(settings["compile"]), algorithm)


def _sb3(group: str, task: str, steps: int, warm_up: int, envs: int, **settings: object) -> Program:
    """With the schedule, and on Hopper the normalisation, that the other programs have."""
    command = ("sb3", task, str(steps), str(envs), json.dumps(settings))
    return Program(group, "Stable-Baselines3", "stable-baselines3", command, warm_up)


def _script(
    group: str, name: str, file: str, task: str, steps: int, warm_up: int, envs: int, length: int,
    *flags: str,
) -> Program:  # fmt: skip
    """A program of one file, with its own flags; what is not among them is its default."""
    environment = "leanrl" if file.startswith("leanrl") else "cleanrl"
    marked_by = "tqdm" if environment == "leanrl" else "tensorboard"
    command = (
        "script", "{checkout}/" + file, marked_by, str(envs * length), f"--env-id={task}",
        f"--total-timesteps={steps}", f"--num-envs={envs}", f"--num-steps={length}", "--no-cuda",
        *flags,
    )  # fmt: skip
    return Program(group, name, environment, command, warm_up, "--compile" in flags)


def _authors(name: str, steps: int, *flags: str) -> Program:
    """The flags of the paper's setting, as the reproduction has them."""
    command = ("authors", "{checkout}", "--task=cartpole", f"--steps={steps}", "--seed=0",
               "--cpu=True", *flags)  # fmt: skip
    return Program(BLPO, f"authors' program, {name}", "blpo-authors", command, 2048, True, name)


_PUREJAXRL = {
    "LR": 2.5e-4, "NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 512_000, "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01,
    "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh", "ENV_NAME": "CartPole-v1",
    "ANNEAL_LR": True,
}  # fmt: skip
_CLEANRL = "cleanrl/ppo_continuous_action.py"
_LEANRL = "leanrl/ppo_continuous_action_torchcompile.py"
_BOX_FLAGS = (
    "--num-minibatches=4", "--update-epochs=4", "--learning-rate=2.5e-4", "--ent-coef=0.01"
)  # fmt: skip
_NESTED = ("--nested=10", "--ihvp_bound=1.4", "--clipf=1.0")
_NORMALISED: dict[str, Any] = {"normalize_observations": True, "normalize_rewards": True}

#: In each group ours is first: the others are divided by it.
PROGRAMS: Sequence[Program] = (
    _ours(CARTPOLE, "", "ppo", "CartPole-v1", 102_400),
    _ours(CARTPOLE, "Gymnasium's environments", "ppo", "CartPole-v1", 51_200,
          env_backend="gymnasium"),
    _ours(CARTPOLE, "uncompiled", "ppo", "CartPole-v1", 25_600, compile=False),
    _sb3(CARTPOLE, "CartPole-v1", 15_360, 1024, 4, n_steps=128, batch_size=128, n_epochs=4,
         learning_rate=2.5e-4, ent_coef=0.01),
    _script(CARTPOLE, "CleanRL", "cleanrl/ppo.py", "CartPole-v1", 15_360, 1024, 4, 128),
    Program(CARTPOLE, "PureJaxRL", "purejaxrl",
            ("purejaxrl", "{checkout}", json.dumps(_PUREJAXRL)), 0, True),

    _ours(BOX, "", "ppo", BOX_TASK, 20_480, num_envs=1, num_steps=512, **_NORMALISED),
    _script(BOX, "CleanRL", _CLEANRL, BOX_TASK, 6144, 1024, 1, 512, *_BOX_FLAGS),
    _script(BOX, "LeanRL", _LEANRL, BOX_TASK, 7168, 2048, 1, 512, *_BOX_FLAGS),
    _script(BOX, "LeanRL, --compile", _LEANRL, BOX_TASK, 7168, 2048, 1, 512, *_BOX_FLAGS,
            "--compile"),

    _ours(HOPPER, "", "ppo", "Hopper-v5", 10_240, num_envs=1, num_steps=2048, epochs=10,
          num_minibatches=32, **_NORMALISED),
    _ours(HOPPER, "uncompiled", "ppo", "Hopper-v5", 8192, num_envs=1, num_steps=2048, epochs=10,
          num_minibatches=32, compile=False, **_NORMALISED),
    _sb3(HOPPER, "Hopper-v5", 6144, 2048, 1, n_steps=2048, batch_size=64, n_epochs=10,
         learning_rate=3e-4, ent_coef=0.0, normalise=True),
    _script(HOPPER, "CleanRL", _CLEANRL, "Hopper-v4", 6144, 2048, 1, 2048),
    _script(HOPPER, "LeanRL", _LEANRL, "Hopper-v4", 6144, 2048, 1, 2048),
    _script(HOPPER, "LeanRL, --compile", _LEANRL, "Hopper-v4", 8192, 4096, 1, 2048, "--compile"),

    _ours(BLPO, "PPO", "ppo", "CartPole-v1", 102_400),
    _ours(BLPO, "Nested", "nested", "CartPole-v1", 51_200, algorithm="Nested"),
    _ours(BLPO, "BLPO, published, Nyström", "paper_nystrom", "CartPole-v1", 30_720,
          algorithm="BLPO-Nyström"),
    _ours(BLPO, "BLPO, published, CG", "paper_cg", "CartPole-v1", 25_600, algorithm="BLPO-CG"),
    _ours(BLPO, "BLPO, default", "blpo", "CartPole-v1", 30_720, algorithm="BLPO, default"),
    _ours(BLPO, "BLPO, fast", "fast", "CartPole-v1", 51_200, algorithm="BLPO, fast"),
    _authors("PPO", 204_800, "--algo=ppo"),
    _authors("Nested", 102_400, "--algo=nested", *_NESTED),
    _authors("BLPO-Nyström", 51_200, "--algo=nystrom", *_NESTED),
    _authors("BLPO-CG", 25_600, "--algo=cg", *_NESTED),
)  # fmt: skip
