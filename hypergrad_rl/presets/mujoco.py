"""MuJoCo tasks (``pip install "hypergrad-torch[mujoco]"``): the published setting.

Scaled to a few environments on a CPU.
"""

from typing import Any

_CONTINUOUS: dict[str, Any] = {
    "total_steps": 1_000_000,
    "num_envs": 8,
    "num_steps": 256,
    "learning_rate": 3e-4,
    "critic_learning_rate": 1.2e-3,
    "normalize_observations": True,
    "normalize_rewards": True,
}
_PPO: dict[str, Any] = {"num_minibatches": 8, "entropy_bonus": 0.0}


def _task(nested_steps: int) -> dict[str, dict[str, Any]]:
    return {"all": _CONTINUOUS, "ppo": _PPO, "blpo": {"nested_steps": nested_steps}}


MUJOCO: dict[str, dict[str, dict[str, Any]]] = {
    "Hopper-v5": _task(nested_steps=3),
    "Walker2d-v5": _task(nested_steps=3),
    "HalfCheetah-v5": _task(nested_steps=7),
    "Humanoid-v5": _task(nested_steps=5),
    "HumanoidStandup-v5": _task(nested_steps=5),
    "Reacher-v5": _task(nested_steps=3),
    "Pusher-v5": _task(nested_steps=3),
    "InvertedPendulum-v5": _task(nested_steps=5),
    "InvertedDoublePendulum-v5": _task(nested_steps=3),
    "Ant-v5": _task(nested_steps=3),
    "Swimmer-v5": _task(nested_steps=3),
}

#: As in classic control, a quarter of the epochs with longer steps; on two seeds of 200,000 steps
#: returns were like those of the tuned settings (docs/rl.md), which is no proof of ten.
FAST_MUJOCO: dict[str, dict[str, dict[str, Any]]] = {
    "HalfCheetah-v5": {
        **MUJOCO["HalfCheetah-v5"],
        "blpo": {
            "epochs": 1,
            "learning_rate": 1e-3,
            "nested_steps": 5,
            "critic_learning_rate": 2.4e-3,
            "solver": "cg",
            "cg_iters": 5,
            "cg_rtol": 0.0,
        },
    }
}
