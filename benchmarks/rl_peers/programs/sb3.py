"""Stable-Baselines3's PPO, through its public interface.

python -m benchmarks.rl_peers.programs.sb3 TASK STEPS ENVS 'SETTINGS AS JSON'
"""

from __future__ import annotations

import json
import sys

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.rl_peers.marks import Marks


class Between(BaseCallback):  # type: ignore[misc]  # a class of a package that is not here
    """Marks the beginning of each rollout, when the former one has been learnt from."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.marks.at(self.num_timesteps)

    def _on_training_end(self) -> None:
        self.marks.at(self.num_timesteps)


def main(task: str, steps: str, envs: str, settings: str) -> None:
    torch.set_num_threads(1)
    marks = Marks()
    env = make_vec_env(task, n_envs=int(envs), seed=0)
    chosen = json.loads(settings)
    rate = chosen.pop("learning_rate")
    if chosen.pop("normalise", False):
        env = VecNormalize(env)
    agent = PPO(
        "MlpPolicy", env, learning_rate=lambda left: rate * left, seed=0, device="cpu", **chosen
    )
    agent.learn(int(steps), callback=Between(marks))
    marks.report("stable-baselines3", "torch", "gymnasium")


if __name__ == "__main__":
    main(*sys.argv[1:])
