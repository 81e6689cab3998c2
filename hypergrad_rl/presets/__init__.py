"""Settings per task, as readable files: what differs from the defaults of the configurations.

Each file maps an environment id to settings for ``"all"`` algorithms, ``"ppo"`` and ``"blpo"``
(which Nested PPO shares).
"""

from __future__ import annotations

from typing import Any

from hypergrad_rl.config import BLPOConfig, PPOConfig, make_config
from hypergrad_rl.presets.classic_control import CLASSIC_CONTROL
from hypergrad_rl.presets.mujoco import MUJOCO

PRESETS: dict[str, dict[str, dict[str, Any]]] = {**CLASSIC_CONTROL, **MUJOCO}


def preset(algo: str, env: str, **settings: Any) -> PPOConfig | BLPOConfig:
    """The preset of a task where there is one, the defaults otherwise; ``settings`` override it.

    >>> preset("blpo", "Acrobot-v1", seed=3).total_steps
    400000
    """
    task = PRESETS.get(env, {})
    family = "ppo" if algo == "ppo" else "blpo"
    merged = {**task.get("all", {}), **task.get(family, {}), **settings}
    if algo == "nested" and "solver" not in settings:
        merged.pop("solver", None)
    return make_config(algo, env=env, **merged)
