"""MinAtar's games (``pip install "hypergrad-torch[minatar]"``) at a laptop's length."""

from typing import Any

_GAME: dict[str, Any] = {"total_steps": 2_000_000, "num_envs": 8, "num_steps": 128}

MINATAR: dict[str, dict[str, dict[str, Any]]] = {
    "MinAtar/Breakout-v1": {"all": _GAME},
    "MinAtar/SpaceInvaders-v1": {"all": _GAME},
}
