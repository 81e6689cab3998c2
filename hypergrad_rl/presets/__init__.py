"""Settings per task, as readable files: what differs from the defaults of the configurations.

Each file maps an environment id to settings for ``"all"`` algorithms, ``"ppo"`` and ``"blpo"``
(which Nested PPO shares): ``paper`` the published ones, the others ours.
"""

from __future__ import annotations

from typing import Any

from hypergrad_rl.config import BLPOConfig, PPOConfig, make_config
from hypergrad_rl.errors import ConfigError
from hypergrad_rl.presets.classic_control import CLASSIC_CONTROL, FAST
from hypergrad_rl.presets.minatar import MINATAR
from hypergrad_rl.presets.mujoco import FAST_MUJOCO, MUJOCO
from hypergrad_rl.presets.paper import PAPER

STYLES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "tuned": {**CLASSIC_CONTROL, **MINATAR, **MUJOCO},
    "paper": PAPER,
    "fast": {**FAST, **FAST_MUJOCO},
}


def preset(algo: str, env: str, style: str = "tuned", **settings: Any) -> PPOConfig | BLPOConfig:
    """The settings of a task; ``settings`` override them.

    Args:
        algo: "ppo", "nested" or "blpo".
        env: the environment's id.
        style: "tuned", our settings where there are some and the defaults otherwise; "paper", the
            published ones; or "fast", ours that cost least, at returns where no loss was seen.
        settings: of the configuration.

    Raises:
        ConfigError: an unknown style, a task that it has no settings for, or a bad setting.

    >>> preset("blpo", "Acrobot-v1", seed=3).total_steps
    400000
    >>> preset("blpo", "Hopper-v5", style="paper").correction_bound
    0.8
    """
    if style not in STYLES:
        raise ConfigError(f"style={style!r}: expected one of {', '.join(STYLES)}")
    if style != "tuned" and env not in STYLES[style]:
        raise ConfigError(
            f"no {style} settings for {env!r}; expected one of {', '.join(STYLES[style])} "
            'or style="tuned"'
        )
    task = STYLES[style].get(env, {})
    family = "ppo" if algo == "ppo" else "blpo"
    merged = {**task.get("all", {}), **task.get(family, {}), **settings}
    if algo == "nested" and "solver" not in settings:
        merged.pop("solver", None)
    return make_config(algo, env=env, **merged)
