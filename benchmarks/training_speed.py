"""Environment steps a second of training, on one thread, compiling excluded.

    python -m benchmarks.training_speed [--updates 40] [--task CartPole-v1] [--arms "BLPO, fast"]
    python -m benchmarks.training_speed --start

By the processor time of this process, all arms in turns, the quicker half of the updates: other
work on the machine counts little. With the published setting as ``--style paper`` has it, by
columns of the Hessian and by 20 iterations of CG, and the fast one where the task has one.
``--start``: the processor time of whole processes that train for one update, their compilers
included, with PyTorch's cache and ours empty and then full.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from hypergrad_rl import preset
from hypergrad_rl.agent import Agent
from hypergrad_rl.compiled import backend_of
from hypergrad_rl.presets import STYLES
from hypergrad_rl.trainer import make_agent, make_collector

#: Algorithm, style, and what differs from that.
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PPO": ("ppo", "tuned", {}),
    "Nested PPO": ("nested", "tuned", {}),
    "BLPO, default": ("blpo", "tuned", {}),
    "BLPO, fast": ("blpo", "fast", {}),
    "BLPO, published": ("blpo", "paper", {}),
    "BLPO, CG": ("blpo", "paper", {"solver": "cg", "cg_iters": 20, "cg_rtol": 0.0}),
}


class Arm:
    """An agent in training on environments of its own, compiled in ``seconds``."""

    def __init__(
        self, algo: str, task: str, style: str, settings: dict[str, Any], eager: bool
    ) -> None:
        config = preset(algo, task, style, compile=not eager, **settings)
        generator, backend = torch.Generator().manual_seed(0), backend_of(config)
        self.collector = make_collector(config, generator, backend)
        self.agent: Agent = make_agent(config, self.collector, generator, backend)
        self.seconds = self.agent.warm_up() + self.collector.warm_up(self.agent.actor)
        self.steps = config.num_envs * config.num_steps
        self.times: list[tuple[float, float]] = []

    def update(self, progress: float) -> None:
        """A rollout and what is learned from it, timed."""
        start = time.process_time()
        rollout, _ = self.collector.collect(self.agent.actor)
        between = time.process_time()
        self.agent.update(rollout, progress)
        self.times.append((between - start, time.process_time() - between))

    def result(self) -> tuple[float, float, float]:
        """Milliseconds of a rollout and of an update, microseconds a step of both together."""
        half = np.sort(np.array(self.times), axis=0)[: (len(self.times) + 1) // 2].mean(0)
        return 1e3 * half[0], 1e3 * half[1], 1e6 * half.sum() / self.steps


def start_seconds(name: str, task: str) -> list[float]:
    """Processor seconds of a process that trains for one update: from empty and full caches."""
    command = [sys.executable, "-m", "benchmarks.training_speed", "--updates", "1"]
    seconds = []
    with tempfile.TemporaryDirectory() as empty:
        # PyTorch keeps precompiled headers in the directory for temporary files.
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{empty}/cache", "TMPDIR": empty}
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [*command, "--task", task, "--arms", name], env=os.environ | cache, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--task", default="CartPole-v1")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--start", action="store_true", help="what it takes to begin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {
        name: (algo, style, settings)
        for name, (algo, style, settings) in ARMS.items()
        if name in args.arms and (style == "tuned" or args.task in STYLES[style])
    }
    if args.start:
        print(f"{'':18}{'empty cache, s':>18}{'full cache, s':>18}")
        for name in chosen:
            cold, cached = start_seconds(name, args.task)
            print(f"{name:18}{cold:18.1f}{cached:18.1f}", flush=True)
        return
    arms = {
        name: Arm(algo, args.task, style, settings, args.eager)
        for name, (algo, style, settings) in chosen.items()
    }
    for i in range(args.updates):
        for arm in arms.values():
            arm.update(i / args.updates)
    head = ("rollout, ms", "update, ms", "us a step", "to the first", "steps/s", "compiling, s")
    print(f"{'':18}" + "".join(f"{word:>14}" for word in head))
    base = next(iter(arms.values())).result()[2]
    for name, arm in arms.items():
        rollout, update, step = arm.result()
        print(
            f"{name:18}{rollout:14.2f}{update:14.2f}{step:14.1f}{step / base:14.2f}"
            f"{1e6 / step:14,.0f}{arm.seconds:14.0f}"
        )
        arm.collector.close()


if __name__ == "__main__":
    main()
