"""CartPole-v1 whose push is the sign of a real number, for programs that know no other actions.

Importing this registers ``BoxCartPole-v1``, with Gymnasium of any version.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class SignOfAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Actions in [-1, 1], of shape (1,): right where they are positive."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def action(self, action: Any) -> int:
        """The push that CartPole knows."""
        return int(action[0] > 0)


def make(**settings: Any) -> gymnasium.Env[Any, Any]:
    """Without a time limit: that is the registration's."""
    return SignOfAction(gymnasium.make("CartPole-v1", **settings).unwrapped)


if "BoxCartPole-v1" not in gymnasium.registry:
    gymnasium.register("BoxCartPole-v1", make, max_episode_steps=500)
