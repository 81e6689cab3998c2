"""Environment steps a second of training, on one thread, compiling excluded.

    python -m benchmarks.training_speed [--updates 40] [--task CartPole-v1]

By the processor time of this process, the quicker half of the updates: other work on the machine
counts little. With the published setting as ``--style paper`` has it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from hypergrad_rl import BLPOConfig, PPOConfig, preset
from hypergrad_rl.compiled import backend_of
from hypergrad_rl.trainer import make_agent, make_collector

ARMS: dict[str, tuple[str, str, dict[str, object]]] = {
    "PPO": ("ppo", "tuned", {}),
    "Nested PPO": ("nested", "tuned", {}),
    "BLPO, default": ("blpo", "tuned", {}),
    "BLPO, fast": ("blpo", "fast", {}),
    "BLPO, published": ("blpo", "paper", {}),
}


def measure(config: PPOConfig | BLPOConfig, updates: int) -> tuple[float, float, float]:
    """Milliseconds of a rollout and of an update, and steps a second of both together."""
    generator, backend = torch.Generator().manual_seed(0), backend_of(config)
    collector = make_collector(config, generator, backend)
    agent = make_agent(config, collector, generator, backend)
    agent.warm_up()
    collector.warm_up(agent.actor)
    times = []
    for i in range(updates):
        start = time.process_time()
        rollout, _ = collector.collect(agent.actor)
        between = time.process_time()
        agent.update(rollout, progress=i / updates)
        times.append((between - start, time.process_time() - between))
    collector.close()
    rollouts, steps = np.sort(np.array(times), axis=0)[: (updates + 1) // 2].mean(0)
    return 1e3 * rollouts, 1e3 * steps, config.num_envs * config.num_steps / (rollouts + steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--task", default="CartPole-v1")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':18}{'rollout, ms':>12}{'update, ms':>12}{'steps/s':>10}")
    for name, (algo, style, settings) in ARMS.items():
        config = preset(algo, args.task, style, compile=not args.eager, **settings)
        rollout, update, rate = measure(config, args.updates)
        print(f"{name:18}{rollout:12.2f}{update:12.2f}{rate:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
