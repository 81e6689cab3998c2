"""This package: ``train`` with an arm of the reproduction, or its settings changed.

python -m benchmarks.rl_peers.programs.ours ARM TASK STEPS [SETTINGS AS JSON]
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.reproduction.arms import arm_config
from benchmarks.rl_peers.marks import Marks
from hypergrad_rl import train


def main(arm: str, task: str, steps: str, settings: str = "{}") -> None:
    config = arm_config(arm, task, 0, **{"total_steps": int(steps), **json.loads(settings)})
    torch.set_num_threads(1)
    marks = Marks()
    rollout = config.num_envs * config.num_steps
    train(config, callbacks=[lambda update, *_: marks.at(rollout * update)])
    marks.report("torch", "gymnasium")


if __name__ == "__main__":
    main(*sys.argv[1:])
